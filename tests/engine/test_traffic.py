"""Two processes with norm.sync train as one does, and say what they send."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine import checkpoint, traffic
from engine.prepare import prepare
from tests.engine import synced
from tests.engine.toy import config, small


def states(folder: Path) -> list[dict[str, Tensor]]:
    """Weights, running statistics and momentum after each step."""
    found = []
    for number in range(1, synced.STEPS + 1):
        content = checkpoint.load(folder / f"step-{number:08}.pt")
        moments = {f"momentum.{key}": one["momentum_buffer"] for key, one in content["optimizer"]["state"].items()}
        found.append({**content["model"], **moments})
    return found


def difference(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> float:
    """The largest one of a tensor's, as |a - b| / |a|."""
    worst = 0.0
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys() and any("running_mean" in key for key in one)
        for key in one:
            a, b = one[key].double(), other[key].double()
            worst = max(worst, float((a - b).norm() / a.norm().clamp(min=1e-3)))
    return worst


@pytest.mark.parametrize("name", synced.RUNS)
def test_two_processes_train_as_one(two: Path, tmp_path: Path, name: str) -> None:
    """Six steps with momentum: weights, gradients' averages and running statistics after each of them. Pixels are
    ignored in unequal numbers."""
    synced.run(tmp_path, name, "float64")
    folder = f"{name} float64"
    assert difference(states(tmp_path / folder), states(two / folder)) < 1e-10


@pytest.mark.parametrize("name", ["deconv", "deconv_fast"])
def test_in_float32_too(two: Path, tmp_path: Path, name: str) -> None:
    synced.run(tmp_path, name, "float32")
    folder = f"{name} float32"
    assert difference(states(tmp_path / folder)[:1], states(two / folder)[:1]) < 2e-5


def test_without_sync_they_part(two: Path, tmp_path: Path) -> None:
    """Else the tests above would show nothing."""
    synced.run(tmp_path, "deconv", "float64", norm__sync=False)
    assert difference(states(tmp_path / "deconv float64"), states(two / "apart" / "deconv float64")) > 1e-3


def test_what_is_sent_was_said(two: Path) -> None:
    texts = [(two / f"traffic_{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    lines = texts[0].splitlines()
    for numbers in lines[0::2]:
        sent, said = map(float, numbers.split())
        assert sent == said
    assert lines[1] == "norm.sync: statistics of 2 layers, at most 0.32 MiB a step and process in 6 sums"
    assert lines[3].startswith("norm.sync: statistics of 2 layers, at most 0.0")
    assert lines[5].startswith("traffic of a step and process: gradients 0.04 MiB, buffers 0.32 MiB")


def test_gradients_and_statistics_are_computed_from_the_layers() -> None:
    cfg = config(norm__name="deconv", norm__sync=True, norm__stem_freeze=False, norm__stem_n_iter=15, batch=32, micro=4)
    net = prepare(small(), cfg).raw
    found = traffic.step(net, cfg, 4)
    assert found.gradients == 4 * (8 * 27 + 8 + 2 * 8 + 2) and found.buffers == 0
    one_pass = sum(size * (2 * f + 1 + f * (f + 1)) for f, size in ((27, 8), (8, 4)))  # fifteen steps in float64
    assert found.statistics == 2 * one_pass and found.calls == 2 * 2 * 3


def test_buffers_are_broadcast_where_a_layer_has_its_own() -> None:
    cfg = config(norm__name="deconv", norm__sync=True)
    net = nn.Sequential(prepare(small(), cfg).raw)
    assert traffic.same_buffers(net)
    net.append(nn.BatchNorm2d(2))
    assert not traffic.same_buffers(net)
    assert traffic.step(net, cfg, 2).buffers == sum(buffer.nbytes for buffer in net.buffers()) > 0


def test_one_process_is_told_so() -> None:
    assert prepare(small(), config(norm__name="deconv", norm__sync=True)).report.endswith(
        "one process: norm.sync changes nothing"
    )
    assert "norm.sync" not in prepare(small(), config(norm__name="deconv")).report


def test_a_network_of_float64_counts_eight_bytes() -> None:
    cfg = config(norm__name="deconv", norm__sync=True, norm__stem_n_iter=5)
    net = prepare(small(), cfg).raw
    before = traffic.step(net, cfg, 2)
    assert traffic.step(net.to(torch.float64), cfg, 2).statistics == 2 * before.statistics

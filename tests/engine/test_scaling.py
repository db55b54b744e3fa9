"""What the scaling table says, by hand; the sums themselves are counted in test_traffic.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import scaling
from engine.optim import parameter_groups
from engine.probe import Workload
from engine.traffic import Step
from tests.engine import toy
from tests.engine.toy import ToyConfig, config

FAST, SLOW = scaling.NETWORKS
ROOT = Path(__file__).resolve().parents[2]


def workload(cfg: ToyConfig) -> Workload:
    """For `measure`, in other processes."""

    def batch(count: int) -> toy.Batch:
        shape = (count, 16, 16)
        return {"image": torch.randn(count, 3, 16, 16), "target": torch.zeros(shape, dtype=torch.int64), "name": []}

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    return Workload(
        cfg, build, toy.loss, batch, lambda model: parameter_groups(model, cfg.optim, lambda name: False), []
    )


def test_a_sum_takes_latency_and_the_ring() -> None:
    step = Step(gradients=100 * 2**20, buffers=0, statistics=8e6, calls=10)
    found = scaling.cost(step, 8, FAST)
    latency = 4.4e-6 + 2 * 7 * 1.2e-6
    assert found.statistics == pytest.approx(10 * latency + 8e6 * 2 * 7 / 8 / 450e9)
    assert found.gradients == pytest.approx(4 * latency + 100 * 2**20 * 2 * 7 / 8 / 450e9)
    assert found.buffers == 0


def test_between_machines_the_cards_decide() -> None:
    step = Step(gradients=0, buffers=1000, statistics=1e9, calls=1)
    for network, bandwidth in ((FAST, 400e9), (SLOW, 12.5e9)):
        found = scaling.cost(step, 64, network)
        latency = 4.4e-6 + 2 * (7 * 1.2e-6 + 3 * 8.5e-6)
        assert found.statistics == pytest.approx(latency + 1e9 * 2 * 63 / 64 / bandwidth)
        assert found.buffers == pytest.approx(latency + 1000 / bandwidth)
    assert scaling.cost(step, 1024, FAST).statistics > scaling.cost(step, 64, FAST).statistics


def test_two_processes_send_what_was_said(tmp_path: Path) -> None:
    fast = config(norm__name="deconv_fast", norm__sync=True, norm__stem_freeze=False, norm__rank=8, batch=4)
    variants = [
        scaling.Variant("plain", config(norm__name="deconv", batch=4)),
        scaling.Variant("fast", fast),
    ]
    plain, joint = scaling.measure(workload, variants, [2], rounds=2)  # renewals fall on other steps each time
    assert plain.counted == plain.said.gradients + plain.said.buffers and plain.said.statistics == 0
    stem = 4 * (27 + 1)  # the images have no gradient, so the stem sends none
    assert joint.counted == joint.said.gradients + joint.said.statistics - stem
    assert min(plain.seconds, joint.seconds) > 0 and (plain.processes, plain.images) == (2, 4)
    lines = scaling.measured_table([plain, joint]).splitlines()
    assert len(lines) == 3 and lines[1].split()[:3] == ["plain", "2", "8"]
    if plain.wire is not None:
        assert plain.wire > plain.said.gradients
    steps = scaling.steps(workload, variants)
    assert steps["fast"] == joint.said
    table = scaling.computed_table(steps, [8, 1024])
    assert len(table.splitlines()) == 1 + 2 * len(scaling.NETWORKS) and "1024 GPUs" in table


def test_a_round_is_all_that_a_norm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deconv_fast` renews in one step of four, which the median of single steps would leave out."""
    fast = config(norm__name="deconv_fast", norm__stem_freeze=False, norm__rank=8, batch=4)
    work = scaling._Work(workload(fast), scaling.Variant("fast", fast))
    now, done = [0.0], []

    class Step:
        cycle = work.step.cycle

        def __call__(self, batch: object) -> None:
            done.append(1)
            now[0] += 5.0 if len(done) % 4 == 0 else 1.0

    monkeypatch.setattr(scaling.time, "perf_counter", lambda: now[0])
    work.step = Step()
    for keep in (False, True, True):
        work.once(keep)
    assert work.times == [2.0, 2.0] and len(done) == 12


def test_bytes_that_a_machine_sent_to_itself(tmp_path: Path) -> None:
    text = "Inter-|   Receive\n face |bytes\n    lo: 11 1 0 0 0 0 0 0 5678 1 0 0 0 0 0 0\n"
    (tmp_path / "dev").write_text(text)
    assert scaling.loopback(tmp_path / "dev") == 5678
    assert scaling.loopback(tmp_path / "none") is None
    assert math.isfinite(scaling.cost(Step(1, 1, 1.0, 1.0), 2, FAST).gradients)


def test_the_program_computes_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.scaling import VARIANTS, main

    assert main([str(ROOT / "configs/classify/lenet_mnist.yaml"), "--gpus", "16", "--processes"]) == 0
    out = capsys.readouterr().out
    assert "step ms" not in out and "16 GPUs" in out
    assert all(f"\n{label} " in out for label in VARIANTS)
    with pytest.raises(SystemExit):
        main([str(ROOT / "configs/classify/lenet_mnist.yaml"), "--gpus", "1"])
    assert "--gpus at least 2" in capsys.readouterr().err


def test_a_mistake_in_the_network_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Other processes would tell it with a traceback."""
    from tools.scaling import main

    assert main([str(ROOT / "configs/classify/lenet_mnist.yaml"), "model.options={widht: 1}", "--processes", "1"]) == 2
    err = capsys.readouterr().err
    assert "widht" in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("micro_batch=15", "128 images cannot be divided evenly"),
        ("norm.sync=true", "key=value: norm.sync cannot be set: the variants differ in it"),
        ("runtime={device: cuda}", "key=value: runtime.device cannot be set: processes compute on CPUs here"),
    ],
)
def test_mistakes_are_one_error_before_processes_start(
    change: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.scaling import main

    assert main([str(ROOT / "configs/classify/lenet_mnist.yaml"), change, "--processes", "1"]) == 2
    err = capsys.readouterr().err
    assert text in err and err.startswith("error: ") and err.count("\n") == 1

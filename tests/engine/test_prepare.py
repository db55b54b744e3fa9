from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import norm
from engine.config import NormConfig, RuntimeConfig
from engine.errors import UserError
from engine.optim import parameter_groups
from engine.prepare import convert_norm, prepare, seed_all, session
from tests.engine.toy import config, small


def test_convert_norm_changes_the_model_and_reports() -> None:
    net = small()
    report = convert_norm(net, NormConfig(name="gn"))
    assert isinstance(net[1], nn.GroupNorm)
    assert "GroupNorm" in report


def test_options_and_overrides_reach_the_recipe() -> None:
    net = small()
    convert_norm(net, NormConfig(name="deconv", n_iter=4, overrides={"3": {"n_iter": 2}}))
    assert isinstance(net[0], norm.FastDeconv) and isinstance(net[3], norm.FastDeconv)
    assert net[3].n_iter == 2


def test_override_that_matches_nothing() -> None:
    net = small()
    with pytest.raises(UserError, match="^norm: .*nothing_here"):
        convert_norm(net, NormConfig(name="deconv", overrides={"nothing_here.*": {"n_iter": 2}}))
    assert isinstance(net[1], nn.BatchNorm2d)


def test_calibration_takes_as_many_batches_as_asked_for() -> None:
    net = small().eval()
    images = [torch.randn(8, 3, 16, 16) for _ in range(5)]
    taken: list[int] = []

    def stream() -> object:
        for number, image in enumerate(images):
            taken.append(number)
            yield image

    before = net(images[0])
    prepared = prepare(net, config(norm__name="deconv", norm__calibrate_batches=2), images=stream())  # type: ignore[arg-type]
    assert taken == [0, 1]
    torch.testing.assert_close(prepared.raw.eval()(images[0]), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["bn", "deconv", "gn"])
def test_parameters_with_a_rate_of_0_are_frozen(name: str) -> None:
    """Those of the converted network, before what looks for gradients; the optimiser's groups stay as they were."""
    cfg = config(norm__name=name, optim__backbone_lr_factor=0.0, runtime__channels_last=True)
    groups = partial(parameter_groups, cfg=cfg.optim, is_backbone=lambda key: not key.startswith("3."))
    prepared = prepare(small(), cfg, groups=groups)
    named = dict(prepared.raw.named_parameters())
    assert {key for key, one in named.items() if one.requires_grad} == {"3.weight", "3.bias"}
    assert sum(len(group["params"]) for group in prepared.groups) == len(named)
    assert f"frozen, without gradients: {len(named) - 2} parameters whose learning rate is 0" in prepared.report
    prepared.wrapped(torch.randn(8, 3, 16, 16)).sum().backward()
    assert {key for key, one in named.items() if one.grad is not None} == {"3.weight", "3.bias"}
    cfg = config(norm__name=name)
    prepared = prepare(small(), cfg, groups=partial(parameter_groups, cfg=cfg.optim))
    assert all(one.requires_grad for one in prepared.raw.parameters()) and "frozen" not in prepared.report


def test_one_process() -> None:
    net = small()
    prepared = prepare(net, config(runtime__channels_last=True))
    assert prepared.wrapped is prepared.raw is net
    assert prepared.device == torch.device("cpu")
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_depthwise_convolutions_in_the_usual_layout_are_said() -> None:
    def report(groups: int, kernel: int, last: bool) -> str:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, kernel, groups=groups))
        return prepare(net, config(runtime__channels_last=last)).report

    assert "1 of 2 convolutions are depthwise" in report(8, 3, last=False)
    assert "runtime.channels_last=true" in report(8, 3, last=False)
    for groups, kernel, last in ((8, 3, True), (8, 1, False), (4, 3, False), (1, 3, False)):
        assert "channels_last" not in report(groups, kernel, last)


def test_compile_is_in_place_and_keeps_the_names() -> None:
    net = small()
    names = list(net.state_dict())
    prepared = prepare(net, config(runtime__compile=True))
    assert prepared.raw is net and list(prepared.raw.state_dict()) == names
    with torch.compiler.set_stance("force_eager"):
        assert prepared.wrapped(torch.randn(2, 3, 8, 8)).shape == (2, 2, 6, 6)


@pytest.mark.parametrize(("chosen", "mode"), [(True, None), ("reduce-overhead", "reduce-overhead")])
def test_the_mode_is_the_compilers(chosen: Any, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: found.append(given))
    prepare(small(), config(runtime__compile=chosen))
    assert found == [{"mode": mode}]


def test_sync_bn_in_one_process_is_said() -> None:
    prepared = prepare(small(), config(norm__name="sync_bn"))
    assert prepared.report.endswith("one process: SyncBatchNorm works as BatchNorm")
    assert prepared.wrapped.train()(torch.randn(2, 3, 8, 8)).shape == (2, 2, 6, 6)


def test_two_processes(two: Path) -> None:
    assert (two / "wrapped_0").exists() and (two / "wrapped_1").exists()
    text = (two / "sync_bn.txt").read_text()
    assert text.startswith(
        "norm.name: sync_bn synchronises GPUs, and this run is on CPUs; use bn, or runtime.device=cuda"
    )


def test_session_seeds_and_leaves_things_as_they_were() -> None:
    threads = torch.get_num_threads()
    draws = []
    for _ in range(2):
        with session(RuntimeConfig(device="cpu", seed=3, threads=1, deterministic=True)) as device:
            assert device == torch.device("cpu")
            assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
            draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1]
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == threads


def test_a_session_sets_the_precision_of_products() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with session(RuntimeConfig(device="cpu", matmul_precision="high")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_other_seed_other_numbers() -> None:
    seed_all(0)
    first = (random.random(), np.random.rand(), float(torch.rand(())))
    seed_all(1)
    second = (random.random(), np.random.rand(), float(torch.rand(())))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_weights_are_filled_in_after_the_conversion() -> None:
    seen: list[str] = []

    def fill(net: nn.Module) -> None:
        seen.append(type(net.get_submodule("0")).__name__)
        nn.init.constant_(net.get_parameter("0.weight"), 3.0)

    with session(RuntimeConfig(device="cpu")):
        prepared = prepare(small(), config(norm__name="deconv"), fill=fill)
    assert seen == ["FastDeconv"] and bool((prepared.raw.get_parameter("0.weight") == 3).all())


def test_precise_statistics_of_a_network_without_running_ones_are_refused() -> None:
    with session(RuntimeConfig(device="cpu")):
        cfg = config(norm__name="gn", norm__precise_batches=2)
        with pytest.raises(UserError, match="norm.precise_batches: 2 has no effect, since with norm.name=gn no layer"):
            prepare(small(), cfg)
        prepare(small(), config(norm__name="bn", norm__precise_batches=2))

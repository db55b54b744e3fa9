"""What a GPU computes is what the CPU computes. Skipped without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from norm import Delinear, FastDeconv, precise_statistics, recorded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"max_rows": 300, "dense_small_maps": True},
    "grouped": {"groups": 4},
    "groups of blocks": {"groups": 2, "block": 4},
    "dilated": {"dilation": 2, "padding": 2},
    "cheap": {"every": 2, "fresh_steps": 1, "rank": 16},
    "cheap grouped": {"every": 2, "fresh_steps": 1, "rank": 16, "groups": 4},
    "cheap depthwise": {"every": 2, "fresh_steps": 1, "rank": 9, "groups": 16, "out_channels": 16},
    "gain": {"gain": True},
    "1x1": {"kernel_size": 1, "padding": 0, "sampling_stride": 5},
    "cheap 1x1": {"kernel_size": 1, "padding": 0, "every": 2, "fresh_steps": 1, "rank": 2, "sampling_stride": 5},
    "cheap 1x1, all directions": {
        "kernel_size": 1,
        "padding": 0,
        "every": 2,
        "max_rows": 100,
        "dense_small_maps": True,
    },
    "cheap interleaved": {"every": 2, "fresh_steps": 1, "rank": 16, "grouping": "published"},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gpu_computes_the_same(options: dict[str, Any], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    standard = {"out_channels": 24, "kernel_size": 3, "padding": 1, "block": 8}
    here = FastDeconv(16, **{**standard, **options}).double()
    there = copy.deepcopy(here).cuda()
    for _ in range(3):
        x = torch.randn(6, 16, 12, 14, dtype=torch.float64).to(memory_format=layout).requires_grad_()
        y = x.detach().cuda().to(memory_format=layout).requires_grad_()
        for layer, images in ((here, x), (there, y)):
            layer.zero_grad()
            layer(images).square().sum().backward()
        torch.testing.assert_close(y.grad.cpu(), x.grad, rtol=1e-6, atol=1e-8)
        for (name, one), other in zip(here.named_parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=1e-6, atol=1e-8, msg=name)
    x = torch.randn(2, 16, 12, 14, dtype=torch.float64)
    torch.testing.assert_close(there.eval()(x.cuda()).cpu(), here.eval()(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"rank": 72}, {"kernel_size": 1, "padding": 0, "block": 16}])
def test_recorded_renewals_are_those_that_are_not(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    standard = {"out_channels": 24, "kernel_size": 3, "padding": 1, "block": 8, "rank": 8, "every": 1, "fresh_steps": 3}
    layers = [FastDeconv(16, **{**standard, **options}).cuda() for _ in range(2)]
    others = copy.deepcopy(layers)
    replayed = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph)))
    recorded._recording.cache_clear()
    for step in range(12):
        x = torch.randn(6, 16, 12, 14, device="cuda") * (1 + step)
        for layer in layers:
            layer(x)
        with monkeypatch.context() as patched:
            patched.setattr(recorded, "_BEFORE", 1000)
            for layer in others:
                layer(x)
        for layer, other in zip(layers, others, strict=True):
            torch.testing.assert_close(dict(layer.named_buffers()), dict(other.named_buffers()), rtol=1e-4, atol=1e-5)
    assert len(replayed) > 10 and len(set(replayed)) == 1  # both layers share a recording


@pytest.mark.parametrize("every", [0, 2])
def test_linear_layers_and_precise_statistics_too(every: int) -> None:
    torch.manual_seed(0)
    here = Delinear(32, 10, block=16, every=every, rank=8).double()
    there = copy.deepcopy(here).cuda()
    batches = [torch.randn(40, 32, dtype=torch.float64) for _ in range(3)]
    precise_statistics(here, batches)
    precise_statistics(there, [batch.cuda() for batch in batches])
    torch.testing.assert_close(there.eval()(batches[0].cuda()).cpu(), here.eval()(batches[0]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("every", [0, 2])
def test_half_precision_keeps_statistics_in_full(every: int) -> None:
    torch.manual_seed(0)
    layer = FastDeconv(16, 24, 3, padding=1, block=8, every=every).cuda()
    other = copy.deepcopy(layer)
    x = torch.randn(6, 16, 12, 14).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), other(x), rtol=0.05, atol=0.05)
    mine, others = layer.running_mean, other.running_mean
    torch.testing.assert_close(mine, others, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("options", [{}, {"every": 2, "fresh_steps": 1, "rank": 16}], ids=["exact", "cheap"])
def test_a_compiled_network_computes_the_same(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layers = [
        FastDeconv(3, 16, 3, padding=1, freeze=True, freeze_iter=1, **options),
        torch.nn.ReLU(),
        FastDeconv(16, 8, 3, padding=1, block=8, dense_small_maps=True, max_rows=300, **options),
        FastDeconv(8, 8, 1, **options),
    ]
    plain = torch.nn.Sequential(*layers).double().cuda()
    compiled = copy.deepcopy(plain)
    compiled.compile(fullgraph=True)
    for _ in range(4):
        x = torch.randn(6, 3, 12, 14, dtype=torch.float64).cuda()
        for network in (plain, compiled):
            network.zero_grad()
            network(x).square().sum().backward()
        for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-8, msg=name)
    for (name, one), other in zip(plain.named_buffers(), compiled.named_buffers(), strict=True):
        torch.testing.assert_close(other[1], one, rtol=1e-6, atol=1e-8, msg=name)

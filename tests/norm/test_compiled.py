"""The layers under torch.compile and in recorded CUDA graphs."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import norm
from norm import ChannelDeconv, Delinear, FastDeconv, recorded

D64 = torch.float64


@pytest.mark.parametrize("options", [{}, {"every": 2, "rank": 5, "fresh_steps": 1}], ids=["exact", "cheap"])
def test_compiled_network_equals_eager_without_a_graph_break(options: dict[str, Any]):
    """Through the ahead-of-time tracer (no C++ compiler needed); a stem in a Sequential, held from step two on."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = (
        FastDeconv(3, 8, 3, freeze=True, freeze_iter=1, **options),
        nn.ReLU(),
        FastDeconv(8, 8, 1, dense_small_maps=True, max_rows=20, **options),
        FastDeconv(8, 4, 3, groups=2, block=2, gain=True, **options),
        nn.Flatten(1, 2),
        Delinear(5, 6, **options),
    )
    model = nn.Sequential(*layers).double()
    twin = copy.deepcopy(model)
    twin.compile(backend="aot_eager", fullgraph=True)
    for images in (2, 2, 3, 3, 3):
        x = torch.randn(images, 3, 9, 9, dtype=D64)
        got, want = twin(x), model(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    if options:  # goes on without the compiler where it was
        torch.testing.assert_close(model[-1](x[..., :5]), twin[-1](x[..., :5]))
    counted = [each for each in twin if hasattr(each, "steps")]
    assert len(counted) == (4 if options else 1)
    assert all(int(each.steps) == each._steps for each in counted)


@pytest.mark.parametrize("options", [{}, {"every": 2, "rank": 5, "fresh_steps": 1}], ids=["exact", "cheap"])
def test_compiled_gradients_of_statistics_are_in_full_precision_under_autocast(options: dict[str, Any]):
    """A compiled graph has its backward under the autocast of its forward."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = FastDeconv(3, 8, 3, **options), ChannelDeconv(4), nn.Flatten(1, 2), Delinear(7, 6, **options)
    network = nn.Sequential(*layers)
    twin = copy.deepcopy(network)
    twin.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 9, 9)
    for each in (network, twin):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        y.float().square().sum().backward()
    for (name, a), b in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"every": 4}, {"freeze": True}])
def test_a_step_that_is_recorded_by_hand_is_refused(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    layer = FastDeconv(3, 4, 3, **options)
    monkeypatch.setattr(recorded, "by_hand", lambda _: True)
    with pytest.raises(norm.NormError, match="cannot be trained in a CUDA graph that is recorded by hand"):
        layer(torch.randn(2, 3, 8, 8))
    FastDeconv(3, 4, 3)(torch.randn(2, 3, 8, 8))
    layer.eval()(torch.randn(2, 3, 8, 8))


def test_a_cuda_graph_does_not_record_what_the_host_decides():
    assert torch.Tag.cudagraph_unsafe in torch.ops.network_deconvolution.renew_when_due.default.tags

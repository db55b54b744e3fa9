"""Folding anew in the backward changes what is kept, not what is computed."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from norm import FastDeconv, folded_conv


def both(layer: FastDeconv, x: Tensor, monkeypatch: pytest.MonkeyPatch, amp: bool = False) -> list[list[Tensor | None]]:
    """Output and gradients, folded anew and not."""
    results = []
    for anew in (True, False):
        monkeypatch.setattr(folded_conv, "worth_it", lambda *_, anew=anew: anew)
        twin, source = copy.deepcopy(layer), x.detach().clone().requires_grad_(x.requires_grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = twin(source)
        if y.requires_grad:
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        results.append([y, source.grad, *(each.grad for each in twin.parameters())])
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2},
        {"stride": 2, "bias": False},
        {"dilation": 2, "every": 2},
        {"grouping": "published", "block": 4},
    ],
    ids=str,
)
def test_equal_to_the_kept_weight(options: dict, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer = FastDeconv(8, 6, 3, padding=1, **options).double()
    for a, b in zip(*both(layer, torch.randn(2, 8, 9, 9).double().requires_grad_(), monkeypatch), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_and_inputs_without_gradient(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer = FastDeconv(4, 4, 3)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    for x in (torch.randn(2, 4, 9, 9), torch.randn(2, 4, 9, 9).requires_grad_()):
        for a, b in zip(*both(layer, x, monkeypatch), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))


def test_under_autocast_it_is_the_convolution_of_autocast(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    anew, kept = both(FastDeconv(4, 4, 3), torch.randn(2, 4, 9, 9).requires_grad_(), monkeypatch, amp=True)
    assert anew[0].dtype is kept[0].dtype is torch.bfloat16
    for a, b in zip(anew, kept, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def test_neither_patches_nor_the_folded_weight_are_kept():
    """What is kept beside the input and the parameters: D, mean, the eigenbasis and eigenvalues of the inverse root."""
    layer, x = FastDeconv(16, 512, 3, padding=1), torch.randn(4, 16, 24, 24).requires_grad_()
    own = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    features, weight = layer.features, layer.weight.numel() * 4
    assert sum(size for place, size in kept.items() if place not in own) < 2.2 * features**2 * 4 < weight + features**2


def test_it_is_done_where_it_is_cheap():
    assert folded_conv.worth_it(576, 2, (32, 32)) and not folded_conv.worth_it(576, 32, (4, 4))


def test_a_network_trains_through_it():
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(3, 8, 3, padding=1), nn.ReLU(), FastDeconv(8, 4, 3, padding=1))
    x, y = torch.randn(8, 3, 12, 12), torch.randn(8, 4, 12, 12)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

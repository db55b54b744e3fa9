"""The learned gain: gain times the direction of each output channel's weight (arXiv 1602.07868, equation 2)."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import norm
from norm import Delinear, FastDeconv
from tests.norm.test_calibration import trained

D64 = torch.float64

LAYERS: dict[str, Any] = {
    "3x3": lambda **more: FastDeconv(8, 6, 3, padding=1, block=4, **more),
    "groups": lambda **more: FastDeconv(8, 4, 3, padding=1, groups=2, **more),
    "linear": lambda **more: Delinear(8, 6, block=4, **more),
}


def pair(case: str, **more: Any) -> tuple[Any, Any, Tensor]:
    """A layer with a gain of its own, the same layer without, and an input."""
    torch.manual_seed(0)
    layer, plain = LAYERS[case](gain=True, **more).to(D64), LAYERS[case](**more).to(D64)
    nn.init.uniform_(layer.gain, 0.5, 2)
    return layer, plain, torch.randn(5, 8, dtype=D64) if case == "linear" else torch.randn(3, 8, 9, 9, dtype=D64)


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("case", LAYERS)
def test_values_and_gradients_are_those_of_the_formula(case: str, every: int) -> None:
    layer, plain, x = pair(case, every=every)
    weight, gain = (one.detach().clone().requires_grad_() for one in (layer.weight, layer.gain))
    shape = (-1, *[1] * (weight.ndim - 1))
    effective = gain.view(shape) * weight / weight.flatten(1).square().sum(1).sqrt().view(shape)
    with torch.no_grad():
        plain.weight.copy_(effective)
        plain.bias.copy_(layer.bias)
    target = torch.randn_like(plain(x))
    mine = layer(x)
    plain = copy.deepcopy(LAYERS[case](every=every).to(D64))
    with torch.no_grad():
        plain.weight.copy_(effective)
        plain.bias.copy_(layer.bias)
    other = plain(x)
    torch.testing.assert_close(mine, other)
    (mine * target).sum().backward()
    (other * target).sum().backward()
    effective.backward(plain.weight.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.gain.grad, gain.grad)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    torch.testing.assert_close(norm.fold(layer)(x), plain(x))


@pytest.mark.parametrize("case", LAYERS)
def test_of_the_weight_only_its_direction_counts(case: str) -> None:
    layer, _, x = pair(case)
    want = copy.deepcopy(layer)(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    torch.testing.assert_close(layer(x), want)


def test_conversion_keeps_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 4))
    nn.init.normal_(model[0].weight, std=2)  # type: ignore[arg-type]
    old = copy.deepcopy(model)
    norm.convert(model, "deconv", gain=True, fc_block=3)
    for new, before in ((model[0], old[0]), (model[3], old[3])):
        torch.testing.assert_close(new.effective_weight(), before.weight)
        torch.testing.assert_close(new.weight, before.weight)


def test_calibrated_weights_get_the_norms_of_fresh_ones() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    x = torch.randn(6, 3, 20, 20)
    want = model(x)
    norm.convert(model, "deconv", gain=True, calibrate=x)
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4)
    for layer in model:
        if isinstance(layer, FastDeconv):
            norms = layer.weight.detach().flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, torch.full_like(norms, 1 / math.sqrt(3)))


def test_a_filter_of_zeros_gives_its_bias_and_finite_gradients() -> None:
    layer, _, x = pair("3x3")
    with torch.no_grad():
        layer.weight[2] = 0
    y = layer(x)
    torch.testing.assert_close(y[:, 2], layer.bias[2].expand_as(y[:, 2]))
    y.sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in layer.parameters())


@pytest.mark.parametrize("calibrated", [False, True])
def test_filters_that_begin_as_zeros_learn(calibrated: bool) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(4, 3, 9, 9)
    nn.init.zeros_(model[1].weight[:2] if calibrated else model[0].weight[:2])
    norm.convert(model, "deconv", gain=True, calibrate=x if calibrated else None)
    layer = model[0]
    assert not layer.effective_weight()[:2].any() and layer.effective_weight()[2:].all()
    (model.train()(x) * torch.randn(4, 4, 7, 7)).sum().backward()
    assert layer.gain.grad.all()

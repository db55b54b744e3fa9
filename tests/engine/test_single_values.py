"""Norms over one value: behind an image pooling, with one image."""

import copy

import pytest
import torch
from torch import nn

import norm
from engine.config import NormConfig
from engine.prepare import convert_norm
from engine.single_values import allow_single_values


def pooled(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), layer)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_batch_norm_takes_its_running_statistics(kind: type[nn.Module]):
    torch.manual_seed(0)
    layer = kind(4)
    with torch.no_grad():
        layer.running_mean.copy_(torch.randn(4))
        layer.running_var.copy_(torch.rand(4) + 0.5)
        layer.weight.copy_(torch.randn(4))
    model, x = pooled(layer), torch.randn(1, 4, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x)
    before = copy.deepcopy(layer.state_dict())
    allow_single_values(model)
    found = model(x)
    assert layer.training and "_single_value" not in vars(layer)
    assert all(torch.equal(one, layer.state_dict()[key]) for key, one in before.items())
    found.sum().backward()
    assert layer.weight.grad.isfinite().all() and (layer.bias.grad == 1).all()
    torch.testing.assert_close(found, copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("last", [False, True], ids=["channels", "features last"])
def test_channel_deconv_takes_its_running_statistics(last: bool):
    """In front of a classifier (`delinear: false`) with one image; a rest of the channels is standardised."""
    torch.manual_seed(0)
    layer = norm.ChannelDeconv(4, features_last=last)
    shape = (1, 1, 10) if last else (1, 10)
    layer(torch.randn(9, *shape[1:]))  # something to hold
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match="ChannelDeconv: one vector alone has no covariance"):
        by_itself = copy.deepcopy(layer)(x)
    allow_single_values(layer)
    found = layer(x)
    assert layer.training and all(torch.equal(one, layer.state_dict()[key]) for key, one in before.items())
    torch.testing.assert_close(found, copy.deepcopy(layer).eval()(x))
    assert torch.equal(found, by_itself)
    assert norm.precise_statistics(layer, [x, x]) == 0
    assert all(torch.equal(one, layer.state_dict()[key]) for key, one in before.items())
    layer(torch.randn(2, *shape[1:]))
    assert not torch.equal(before["running_mean"], layer.running_mean)


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("linear", [False, True])
def test_whitening_layers_take_their_running_statistics(linear: bool, every: int, recwarn: pytest.WarningsRecorder):
    torch.manual_seed(0)
    options = {"block": 4, "every": every, "fresh_steps": 0}
    layer = norm.Delinear(16, 3, **options) if linear else norm.FastDeconv(16, 3, 1, **options)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), *([nn.Flatten()] if linear else []), layer)
    several, x = torch.randn(9, 16, 3, 3), torch.randn(1, 16, 3, 3)
    model(several)  # something to hold
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad(), pytest.warns(UserWarning, match="has no covariance; it is taken with the averages"):
        by_itself = copy.deepcopy(model)(x)
    allow_single_values(model)
    recwarn.clear()
    found = model(x)
    assert not recwarn.list
    assert layer.training and all(torch.equal(one, layer.state_dict()[key]) for key, one in before.items())
    torch.testing.assert_close(found, copy.deepcopy(model).eval()(x))
    torch.testing.assert_close(found, by_itself)
    found.sum().backward()
    assert (layer.weight.grad != 0).any() and (layer.bias.grad == 1).all()
    assert norm.precise_statistics(model, [x, x]) == 0
    assert all(torch.equal(one, layer.state_dict()[key]) for key, one in before.items())
    assert norm.precise_statistics(model, [x, several]) == 1 and layer.training
    for _ in range(2):  # as ever
        model(torch.randn_like(several))
    assert not torch.equal(layer.running_mean, before["running_mean"])


def test_more_values_are_treated_as_ever():
    torch.manual_seed(0)
    plain, model = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    allow_single_values(model)
    for shape in ((2, 4, 1, 1), (1, 4, 1, 2)):
        x = torch.randn(shape)
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.running_var, plain.running_var)
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_single_values_leave_precise_statistics_out():
    layer = nn.BatchNorm2d(4)
    layer.running_mean.fill_(5)
    layer.running_var.fill_(9)
    model = pooled(layer)
    allow_single_values(model)
    assert norm.precise_statistics(model, torch.randn(1, 4, 3, 3)) == 0
    assert (layer.running_mean == 5).all() and (layer.running_var == 9).all() and layer.training
    batches = [torch.randn(images, 4, 3, 3) for images in (1, 3, 1, 2)]
    assert norm.precise_statistics(model, batches) == 1
    means = [x.mean((0, 2, 3)) for x in batches[1::2]]
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))


def test_group_norm_gives_what_it_gives_for_two_images():
    model = nn.GroupNorm(4, 4)
    with torch.no_grad():
        model.bias.copy_(torch.arange(4.0))
    allow_single_values(model)
    x = torch.randn(1, 4, 1, 1, requires_grad=True)
    for mode in (True, False):
        found = model.train(mode)(x)
        assert found.shape == (1, 4, 1, 1)
        torch.testing.assert_close(found, nn.functional.group_norm(x.repeat(2, 1, 1, 1), 4, bias=model.bias)[:1])


def test_an_error_inside_leaves_the_mode():
    layer = nn.BatchNorm2d(4)
    allow_single_values(layer)
    with pytest.raises(RuntimeError):
        layer(torch.randn(1, 3, 1, 1))
    assert layer.training and "_single_value" not in vars(layer)


def test_layers_are_called_by_keyword_as_ever():
    layers = nn.Conv2d(4, 4, 1), norm.FastDeconv(4, 4, 1, block=2), nn.BatchNorm2d(4)
    for layer in layers:
        allow_single_values(layer)
        assert layer(input=torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
    with pytest.raises(norm.NormError, match="expects an input"):
        layers[1](torch.randn(4))
    for layer in layers:
        with pytest.raises(TypeError):
            layer()


def test_a_single_value_given_by_keyword():
    group = nn.GroupNorm(4, 4)
    for layer in (norm.FastDeconv(4, 4, 1, block=2), nn.BatchNorm2d(4), group):
        allow_single_values(layer)
        x = torch.randn(1, 4, 1, 1)
        before = copy.deepcopy(layer.state_dict())
        found = layer(input=x)
        assert layer.training and all(torch.equal(one, layer.state_dict()[key]) for key, one in before.items())
        if layer is not group:
            torch.testing.assert_close(found, copy.deepcopy(layer).eval()(x))
        assert torch.equal(found, layer(x))


def test_a_second_call_adds_nothing():
    layer = nn.BatchNorm2d(4)
    for _ in range(2):
        allow_single_values(layer)
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


@pytest.mark.parametrize("recipe", [name for name in norm.available() if name != "frozen_bn"])
def test_every_recipe_trains_and_evaluates_with_one_image(recipe: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 32, 1))
    model.extend([nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 5, 1)])
    convert_norm(model, NormConfig(name=recipe))
    x = torch.randn(1, 3, 8, 8)
    model(x).square().sum().backward()
    assert all(one.training for one in model.modules())
    assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())
    with torch.no_grad():
        found = model.eval()(x)
        torch.testing.assert_close(norm.fold(model)(x), found, rtol=1e-4, atol=1e-5)


def test_compiled():
    torch.manual_seed(0)
    model = pooled(nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(4, 4), norm.FastDeconv(4, 4, 1, block=2)))
    allow_single_values(model)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for images in (1, 2, 1):
        x = torch.randn(images, 4, 3, 3)
        torch.testing.assert_close(compiled(x), model(x))

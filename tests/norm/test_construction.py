"""Making layers as torch's own are made: on a device, in a dtype, on the meta device first, anew."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import norm
from norm import ChannelDeconv, Delinear, FastDeconv

Made = FastDeconv | Delinear | ChannelDeconv

LAYERS: dict[str, tuple[type[Made], tuple[int, ...], dict[str, Any]]] = {
    "exact": (FastDeconv, (4, 6, 3), {}),
    "exact, frozen": (FastDeconv, (4, 6, 3), {"freeze": True}),
    "few directions, groups": (FastDeconv, (8, 6, 3), {"every": 2, "rank": 3, "groups": 2}),
    "all directions": (FastDeconv, (4, 6, 3), {"every": 2, "gain": True}),
    "linear": (Delinear, (6, 4), {"block": 3}),
    "linear, few": (Delinear, (8, 4), {"every": 2, "rank": 2, "gain": True}),
    "channels": (ChannelDeconv, (4,), {}),
}


@pytest.fixture(params=LAYERS)
def made(request: pytest.FixtureRequest) -> tuple[type[Made], tuple[int, ...], dict[str, Any]]:
    return LAYERS[request.param]


def images(layer: Made) -> Tensor:
    dtype = layer.running_mean.dtype
    if isinstance(layer, Delinear):
        return torch.randn(12, layer.in_features, dtype=dtype)
    return torch.randn(3, layer.in_channels if isinstance(layer, FastDeconv) else 6, 9, 9, dtype=dtype)


def test_device_and_dtype_are_those_of_all_tensors(made):
    kind, sizes, options = made
    layer = kind(*sizes, **options, device="cpu", dtype=torch.float64)
    floats = [each for each in layer.state_dict().values() if each.is_floating_point()]
    assert floats and all(each.dtype == torch.float64 for each in floats)
    assert layer(images(layer)).dtype == torch.float64
    away = kind(*sizes, **options, device="meta")
    assert all(each.is_meta for each in away.state_dict().values())
    with pytest.raises(norm.NormError, match="cannot be made in torch.bfloat16.*autocast"):
        kind(*sizes, **options, dtype=torch.bfloat16)


def test_a_layer_made_on_meta_is_a_new_one_after_reset_parameters(made):
    kind, sizes, options = made
    torch.manual_seed(0)
    want = kind(*sizes, **options)
    with torch.device("meta"):
        layer = kind(*sizes, **options)
    layer.to_empty(device="cpu")
    for each in layer.state_dict().values():
        each.fill_(7)  # what memory held before
    torch.manual_seed(0)
    layer.reset_parameters()
    assert list(layer.state_dict()) == list(want.state_dict())
    for name, each in want.state_dict().items():
        assert torch.equal(layer.state_dict()[name], each), name


def test_reset_parameters_forgets_a_training(made):
    kind, sizes, options = made
    torch.manual_seed(0)
    layer = kind(*sizes, **options)
    x = images(layer)
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        layer.reset_parameters()
        outputs.append([layer(x * (2 + step)).detach() for step in range(3)])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_options_for_layers_that_do_not_whiten_are_refused():
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))

    for name in ("1", "3"):
        before = model()
        with pytest.raises(norm.NormError, match=rf"overrides\['{name}'\] has no effect: it matches {name}, and"):
            norm.convert(before, "deconv", overrides={name: {"n_iter": 3}})
        assert type(before[0]) is nn.Conv2d
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(norm.NormError, match="convolutions with keep_depthwise; .* or leave the override out"):
        norm.convert(depthwise, "deconv", keep_depthwise=True, overrides={"1": {"n_iter": 3}})
    norm.convert(model(), "deconv", overrides={"[01]": {"n_iter": 3}, "1": {"recipe": "keep"}})
    norm.convert(model(), "deconv", fc_block=4, overrides={"3": {"n_iter": 3}})
    norm.convert(model(), "gn", overrides={"0": {"recipe": "deconv"}, "1": {"groups": 4}})

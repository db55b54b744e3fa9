"""Folded networks are plain and equal."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune

import norm
from norm import FastDeconv
from norm.other_layers import ChannelAffine


def test_every_layer_of_the_norm_becomes_plain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=4),
        ChannelAffine(8),
        norm.ChannelDeconv(3),
        nn.Conv2d(8, 4, 1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        norm.ChannelDeconv(2),
        nn.Linear(4, 3),
    )
    norm.convert(model, "deconv", fc_block=2)
    nn.init.normal_(model[3].weight)
    x = torch.randn(40, 3, 8, 8)
    for _ in range(3):
        model(x)
    plain = norm.fold(model)
    assert model.training and not plain.training
    kinds = {type(layer) for layer in plain.modules()} - {nn.Sequential, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten}
    assert kinds == {nn.Conv2d, nn.Linear}
    assert plain[0].padding_mode == "reflect" and plain[2].padding == "same"
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_weight_standardised_networks_fold_too():
    model = torchvision.models.resnet18(num_classes=3)
    norm.convert(model, "gn", weight_standardisation=True)
    x = torch.randn(2, 3, 32, 32)
    plain = norm.fold(model)
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_shared_layers_and_bare_layers():
    layer = norm.FastDeconv(3, 3, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    layer(x)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    plain = norm.fold(model)
    assert plain[0] is plain[2] and type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), model.eval()(x))
    assert type(norm.fold(layer)) is nn.Conv2d


def test_folded_half_precision_works_where_the_layer_refuses_it():
    layer = nn.Sequential(norm.FastDeconv(3, 4, 3))
    layer(torch.randn(2, 3, 8, 8))
    half = norm.fold(layer).bfloat16()
    assert half(torch.randn(1, 3, 8, 8).bfloat16()).dtype == torch.bfloat16


def test_a_channel_deconv_that_saw_nothing_is_named():
    with pytest.raises(norm.NormError, match="0: a ChannelDeconv learns its channels from its input; run one batch"):
        norm.fold(nn.Sequential(norm.ChannelDeconv(4), nn.ReLU()))


@pytest.mark.parametrize("kernel", [1, 3])
def test_layers_keep_the_memory_format(kernel: int) -> None:
    """A 1x1 map is in all formats: there the weight decides on the output's, in training and in evaluation."""
    layer = FastDeconv(4, 6, kernel, padding=kernel // 2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 1, 1)
    plain = F.conv2d(x, layer.weight, padding=kernel // 2)
    network = nn.Sequential(layer)
    for each in (network(x), network.eval()(x), norm.fold(network)(x)):
        assert each.stride() == plain.stride()
    assert norm.fold(network)[0].weight.stride() == layer.weight.stride()


@pytest.mark.parametrize("computed", ["pruned", "weight_norm"])
def test_weights_that_hooks_compute_are_those_loaded_since(computed: str):
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        norm.convert(model, "deconv", fc_block=16)
        for layer in (model[0], model[4]):
            prune.l1_unstructured(layer, "weight", 0.5) if computed == "pruned" else nn.utils.weight_norm(layer)
        return model

    trained, other, x = network(), network(), torch.randn(4, 3, 8, 8)
    other.eval()
    with torch.no_grad():
        trained(x), other(x)
    other.load_state_dict(trained.state_dict())
    plain = norm.fold(other)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), other(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(x), network().eval()(x), rtol=1e-2, atol=1e-2)


def test_pruned_layers_fold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    norm.convert(model, "deconv")
    calls: list[nn.Module] = []
    model[0].register_forward_pre_hook(lambda module, args: calls.append(module))
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(5, 3, 9, 9)
    with torch.no_grad():  # otherwise torch cannot copy a pruned layer
        model(x)
    plain = norm.fold(model)
    calls.clear()
    torch.testing.assert_close(plain(x), model.eval()(x))
    assert calls == [plain[0], model[0]]


def test_a_folded_layer_learns_where_what_its_weight_is_computed_from_does():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(100, 3))
    norm.convert(model, "deconv", fc_block=10)
    for layer in (model[0], model[2], model[4]):
        nn.utils.parametrizations.weight_norm(layer)
    model[0].requires_grad_(False)
    plain = norm.fold(model)
    assert [each.requires_grad for each in plain.parameters()] == [False, False, True, True, True, True]
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(plain(x), model.eval()(x))


class Keeps(nn.Module):
    """It keeps what its last layer but one gave, for a loss."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        self.kept = self.bn(self.conv(x))
        return self.head(self.kept)


def test_a_network_that_holds_tensors_of_its_last_forward():
    model, x = Keeps(), torch.randn(2, 3, 9, 9)
    norm.convert(model, "deconv")
    prune.l1_unstructured(model.head, "weight", 0.5)
    model(x).sum().backward()
    with pytest.raises(norm.NormError, match="holds tensors of its last forward.* Run it once under torch.no_grad"):
        norm.fold(model)
    with torch.no_grad():
        model.eval()(x)
    torch.testing.assert_close(norm.fold(model)(x), model(x))

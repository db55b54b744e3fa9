"""Conversion of networks: places, overrides, sharing, adapters, and that an error changes nothing."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import norm
from norm import Delinear, FastDeconv, other_layers


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 5, 1))


def deconvs(model: nn.Module) -> dict[str, FastDeconv]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FastDeconv)}


def test_every_conv_becomes_a_deconvolution_and_every_batch_norm_goes():
    model = torchvision.models.resnet18()
    report = norm.convert(model, "deconv", fc_block=64)
    assert len(deconvs(model)) == 20 and isinstance(model.fc, Delinear)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert len(report.rows) == len(report.changed) == 41
    stem, other = model.conv1, model.layer1[0].conv1
    assert (stem.n_iter, stem.freeze, stem.block) == (5, True, 3) and (other.n_iter, other.freeze) == (5, False)


def test_weights_survive_and_linear_layers_stay_without_fc_block():
    model = torchvision.models.resnet18(num_classes=3)
    before = copy.deepcopy(model)
    norm.convert(model, "deconv")
    assert torch.equal(model.layer2[0].conv1.weight, before.layer2[0].conv1.weight)
    assert type(model.fc) is nn.Linear
    assert model.layer2[0].conv1.bias.abs().sum() == 0


def test_last_convs_of_all_heads_take_their_whole_input_as_a_block():
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    report = norm.convert(model, "deconv")
    last = [row.name for row in report.rows if "last" in row.why]
    assert last == ["classifier.4", "aux_classifier.4"]
    assert model.classifier[4].block == 256 and model.aux_classifier[4].block == 256
    assert model.classifier[1].block == 64


def test_overrides_by_pattern():
    model = torchvision.models.resnet18()
    overrides = {
        "layer4.*": {"n_iter": 3},
        "layer4.1.conv2": {"block": 32},
        "layer3.*": {"recipe": "keep"},
        "layer2.*.bn1": {"recipe": "gn", "groups": 8},
        "nothing.*|conv1": {"n_iter": 10},
    }
    report = norm.convert(model, "deconv", overrides=overrides)
    assert model.layer4[0].conv1.n_iter == 3 and model.layer4[1].conv2.block == 32 and model.layer4[1].conv2.n_iter == 3
    assert type(model.layer3[0].conv1) is nn.Conv2d and type(model.layer3[0].bn1) is nn.BatchNorm2d
    assert isinstance(model.layer2[0].bn1, nn.GroupNorm) and isinstance(model.layer2[0].bn2, nn.Identity)
    assert model.conv1.n_iter == 10
    assert any("override layer4.1.conv2" in row.why for row in report.rows)


@pytest.mark.parametrize(
    "overrides, text",
    [
        ({"layer9.*": {"n_iter": 3}}, r"overrides\['layer9.\*'\] matches no layer; layers are named 0, 1, 3"),
        ({"layer9.*|layer8.*": {"n_iter": 3}}, r"matches no layer"),
        ({"0": {"n_iters": 3}}, r"overrides\['0'\]: recipe 'deconv' has no option 'n_iters' \(did you mean 'n_iter'"),
        ({"0": {"n_iter": 0}}, r"overrides\['0'\]: n_iter is 0"),
        ({"0": {"recipe": "nope"}}, r"overrides\['0'\]: unknown recipe 'nope'"),
        ({"0": {}}, r"overrides\['0'\] is \{\}; expected options"),
    ],
)
def test_bad_overrides_are_named_and_change_nothing(overrides, text):
    model = block()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(norm.NormError, match=text):
        norm.convert(model, "deconv", overrides=overrides)
    assert type(model[0]) is nn.Conv2d and model.state_dict().keys() == before.keys()


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), shared)
    report = norm.convert(model, "deconv")
    assert model[1] is model[3] and isinstance(model[1], FastDeconv)
    assert [row.why for row in report.rows] == ["first", "last, in 2 places"]


def test_layers_that_share_a_weight_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    with pytest.raises(norm.NormError, match="0 and 1 are two layers that share one weight"):
        norm.convert(model, "deconv")


def test_an_unknown_subclass_is_refused_by_name_and_can_be_kept():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(4, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(norm.NormError, match=r"1 is a .*Scaled, a conv layer that may do more.*\{'recipe': 'keep'\}"):
        norm.convert(model, "deconv")
    assert type(model[0]) is nn.Conv2d
    norm.convert(model, "gn", groups=2)  # replaces no convolution: the subclass does not matter
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(4, 4, 1))
    norm.convert(model, "deconv", overrides={"1": {"recipe": "keep"}})
    assert type(model[1]) is Scaled


def test_a_second_conversion_is_refused():
    model = block()
    norm.convert(model, "deconv")
    with pytest.raises(norm.NormError, match="0 is already a FastDeconv; convert the network as it was built"):
        norm.convert(model, "deconv")


@pytest.mark.parametrize("name", ["deconv", "deconv_fast"])
def test_depthwise_layers_may_stay(name: str) -> None:
    def separable(*between: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(8, 8, 3, padding=1, groups=8), *between, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]

    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *separable(nn.BatchNorm2d(8), nn.ReLU()), *separable()]
    model = nn.Sequential(*layers, nn.BatchNorm2d(8)).double()
    x = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    model(x)
    before, want = list(model), model.eval()(x)
    norm.convert(model, name, keep_depthwise=True, calibrate=x)
    stayed = [i for i, layer in enumerate(before) if not isinstance(layer, nn.ReLU) and model[i] is layer]
    assert stayed == [3, 4, 9]
    assert [i for i, layer in enumerate(model) if isinstance(layer, norm.FastDeconv)] == [0, 6, 10]
    torch.testing.assert_close(model.eval()(x), want)
    torch.testing.assert_close(norm.fold(model)(x), want)


def test_models_without_layers_and_bare_layers_are_refused():
    with pytest.raises(norm.NormError, match="has no Conv2d, BatchNorm2d or Linear layer"):
        norm.convert(nn.Sequential(nn.ReLU()), "deconv")
    with pytest.raises(norm.NormError, match="bare Conv2d; put it into an nn.Sequential"):
        norm.convert(nn.Conv2d(3, 3, 1), "deconv")


def test_computed_weights_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)))
    with pytest.raises(norm.NormError, match="ParametrizedConv2d, a conv layer that may do more"):
        norm.convert(model, "deconv")
    old_style = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.utils.spectral_norm(old_style[0])
    with pytest.raises(norm.NormError, match=r"0: its weight is computed.*'recipe': 'keep'"):
        norm.convert(old_style, "deconv")
    norm.convert(old_style, "gn", groups=2)


def test_a_recipe_must_return_a_module(monkeypatch):
    monkeypatch.setattr(norm.recipe("deconv").__class__, "conv", lambda self, old, at: None)
    with pytest.raises(norm.NormError, match="Deconv.conv returned None for 0, not a module"):
        norm.convert(block(), "deconv")


def test_batch_norm_with_activation_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=nn.SiLU))
    x = torch.randn(2, 3, 6, 6)
    norm.convert(model, "gn", groups=2)
    hidden = nn.functional.group_norm(model[0](x), 2)
    torch.testing.assert_close(model(x), nn.functional.silu(hidden))


def test_uneven_padding_is_kept_and_comes_back_when_folded():
    model = nn.Sequential(Conv2dSame(3, 8, 3, stride=2), nn.ReLU())
    reference = copy.deepcopy(model)
    norm.convert(model, "none")
    x = torch.randn(2, 3, 10, 11)
    torch.testing.assert_close(model(x), reference(x))
    norm.convert(reference, "deconv")
    reference(x)
    plain = norm.fold(reference)
    assert type(plain[0]) is Conv2dSame
    torch.testing.assert_close(plain(x), reference.eval()(x))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_weight_standardised_convs_hand_over_the_weight_they_use(kind):
    model = nn.Sequential(kind(3, 8, 3, bias=False))
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    norm.convert(model, "none")
    assert type(model[0]) is nn.Conv2d or model[0].bias is not None
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("frozen", [FrozenBatchNorm2d, other_layers.FrozenBatchNorm2d])
def test_frozen_batch_norm_is_a_norm(frozen):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), frozen(4))
    norm.convert(model, "gn", groups=2)
    assert isinstance(model[1], nn.GroupNorm)


@pytest.mark.parametrize("names", [("norm", "act", "conv"), ("conv", "norm", "act")])
def test_in_place_activation_behind_a_norm_that_goes_does_not_reach_the_shortcut(names):
    layers = {"norm": nn.BatchNorm2d(4), "act": nn.ReLU(inplace=True), "conv": nn.Conv2d(4, 4, 1)}

    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:  # the order of registration says nothing about that of the calls
                setattr(self, name, layers[name])

        def forward(self, x):
            return x + self.conv(self.act(self.norm(x)))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), PreActivation())
    norm.convert(model, "none")
    x = torch.randn(2, 3, 5, 5)
    hidden = model[0](x)
    torch.testing.assert_close(model(x), hidden + model[1].conv(hidden.relu()))


def test_hooks_move_to_the_new_layer_and_its_folded_one_and_can_be_removed():
    model = block()
    seen = []
    handle = model[0].register_forward_hook(lambda layer, args, out: seen.append(type(layer)))
    norm.convert(model, "deconv")
    x = torch.randn(2, 3, 9, 9)
    model(x)
    norm.fold(model)(x)
    handle.remove()
    model(x)
    assert seen == [FastDeconv, nn.Conv2d]


def test_what_a_user_registered_on_a_layer_moves_with_the_hook_that_reads_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, 2))
    for index, size in ((0, (4, 1, 1)), (4, (2,))):
        model[index].register_buffer("mask", torch.rand(size))
        model[index].register_buffer("passing", torch.ones(size), persistent=False)
        model[index].register_parameter("strength", nn.Parameter(torch.rand(size)))
        model[index].beside = nn.LayerNorm(1)
        model[index].register_forward_hook(lambda layer, args, out: out * layer.mask * layer.passing * layer.strength)
    theirs = {key: one for key, one in model.state_dict(keep_vars=True).items() if key.startswith(("0.", "4."))}
    theirs = {key: one for key, one in theirs.items() if key.split(".")[1] not in ("weight", "bias")}
    norm.convert(model, "deconv_fast", fc_block=8)
    x = torch.randn(64, 3, 9, 9)
    model(x)
    held = model.state_dict(keep_vars=True)
    assert len(theirs) == 8 and all(held[key] is one for key, one in theirs.items())
    plain = norm.fold(model.eval())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)
    assert set(plain.state_dict()) == {*theirs, "0.weight", "0.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"gain": True}, {"rank": 4, "grouping": "published"}])
@pytest.mark.parametrize("name", ["deconv", "deconv_fast"])
def test_nothing_of_the_norm_is_left_in_a_folded_network(name, options):
    if "rank" in options and name == "deconv":
        options = {"n_iter": 3}
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Conv2d(8, 4, 3, groups=2)]
    model = nn.Sequential(*layers)
    norm.convert(model, name, block=2, **options)
    model(torch.randn(8, 3, 16, 16))
    plain = norm.fold(model)
    assert set(plain.state_dict()) == {f"{number}.{each}" for number in (0, 3, 4) for each in ("weight", "bias")}
    known = set(vars(nn.Conv2d(1, 1, 1)))
    assert all(set(vars(plain[number])) <= known for number in (0, 3, 4))


def test_a_layer_that_a_user_registered_on_a_convolution_is_converted_and_folded_there():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model[0].register_module("adapter", nn.Conv2d(3, 8, 1))
    model[0].register_forward_hook(lambda layer, args, out: out + layer.adapter(*args))
    report = norm.convert(model, "deconv")
    x = torch.randn(4, 3, 9, 9)
    model(x)
    assert isinstance(model[0].adapter, FastDeconv) and "0.adapter" in str(report)
    plain = norm.fold(model.eval())
    assert type(plain[0].adapter) is nn.Conv2d
    torch.testing.assert_close(plain(x), model(x))


def test_backward_hooks_move_too():
    model = block()
    seen = []
    model[0].register_full_backward_hook(lambda layer, inputs, outputs: seen.append(outputs[0].shape))
    norm.convert(model, "deconv")
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    assert seen == [(2, 8, 7, 7)]


def test_feature_extractor_with_hooks_converts_and_folds():
    model = timm.create_model("efficientnet_b0", features_only=True, feature_location="expansion").eval()
    norm.convert(model, "deconv", block=16)
    x = torch.randn(2, 3, 64, 64)
    for got, want in zip(norm.fold(model)(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, options", [("deconv", {"fc_block": 4}), ("gn", {}), ("none", {}), ("sync_bn", {})])
def test_frozen_networks_stay_frozen(name, options):
    model = nn.Sequential(*block(), nn.Flatten(), nn.Linear(8, 2)).requires_grad_(False)
    norm.convert(model, name, **options)
    assert not [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [key for key, parameter in norm.fold(model).named_parameters() if parameter.requires_grad]


def test_evaluation_mode_stays():
    model = block().eval()
    norm.convert(model, "deconv")
    assert not any(layer.training for layer in model.modules())


def test_layers_without_weights_yet_are_refused():
    with pytest.raises(norm.NormError, match="0 has no weights yet; run one batch through the network"):
        norm.convert(nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.Conv2d(4, 4, 1)), "deconv")


def test_norm_without_statistics_cannot_be_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(norm.NormError, match="frozen_bn: 1 tracks no running statistics"):
        norm.convert(model, "frozen_bn")


def test_an_override_reaches_the_last_layer_too():
    model = block()
    norm.convert(model, "deconv", overrides={"3": {"block": 2}})
    assert model[3].block == 2


def test_attention_projections_are_left_to_their_owner():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 2)})
    norm.convert(model, "deconv", fc_block=8)
    assert isinstance(model["fc"], Delinear) and not isinstance(model["attention"].out_proj, Delinear)


def test_the_report_reads_as_a_table():
    model = block()
    lines = str(norm.convert(model, "deconv", block=4)).splitlines()
    assert lines[0].split() == ["layer", "|", "from", "|", "to", "|", "why"]
    assert "FastDeconv(block=3, n_iter=5)" in lines[1] and lines[1].endswith("first")
    cheap = str(norm.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "deconv_fast"))
    assert "FastDeconv(block=3, n_iter=5)" in cheap, "its own default, not the paper's"
    assert lines[-1].startswith("Deconv(block=4") and lines[-1].endswith("3 of 3 layers replaced")


def test_pre_activation_network_of_timm_trains():
    torch.manual_seed(0)
    model = timm.create_model("resnetv2_18", num_classes=4)
    norm.convert(model, "deconv", block=16)
    model(torch.randn(2, 3, 64, 64)).logsumexp(1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_without_delinear_the_features_are_whitened_before_a_plain_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    weight = model[3].weight.detach().clone()
    report = norm.convert(model, "deconv", fc_block=4, delinear=False)
    whitening, linear = model[3]
    assert isinstance(whitening, norm.ChannelDeconv) and whitening.block == 4
    assert type(linear) is nn.Linear and torch.equal(linear.weight, weight)
    assert "ChannelDeconv(block=4, n_iter=5) + Linear" in str(report)
    images = torch.randn(8, 3, 9, 9)
    model(images).sum().backward()
    assert torch.isfinite(linear.weight.grad).all()
    model.eval()
    plain = norm.fold(model)
    assert not any(isinstance(module, norm.ChannelDeconv) for module in plain.modules())
    torch.testing.assert_close(plain(images), model(images))


def test_delinear_without_effect_is_refused():
    with pytest.raises(norm.NormError, match="delinear=False has no effect with fc_block=0"):
        norm.convert(nn.Linear(2, 2), "deconv", delinear=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(norm.NormError, match="use delinear=True"):
        norm.convert(model, "deconv", fc_block=4, delinear=False, calibrate=torch.randn(4, 3, 3, 3))


def test_weights_that_other_layers_share_are_not_cut_off():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    with pytest.raises(norm.NormError, match="0 and 1 are two layers that share one weight"):
        norm.convert(model, "deconv", fc_block=4)
    norm.convert(model, "deconv")
    assert model[1].weight is model[0].weight
    pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    pair[1].weight = pair[0].weight
    with pytest.raises(norm.NormError, match="share one weight"):
        norm.convert(pair, "deconv", overrides={"1": {"recipe": "keep"}})
    norm.convert(pair, "deconv", overrides={"[01]": {"recipe": "keep"}})
    assert pair[1].weight is pair[0].weight and isinstance(pair[2], norm.FastDeconv)
    pair[1] = nn.Conv2d(4, 4, 1)
    pair[1].bias = pair[0].bias
    with pytest.raises(norm.NormError, match="0 and 1 are two layers that share one bias"):
        norm.convert(pair, "deconv", overrides={"2": {"recipe": "keep"}})


def test_norms_do_not_go_where_nothing_whitens():
    def generator(*more: nn.Module) -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(4, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), *more)

    with pytest.raises(norm.NormError, match="no Conv2d that would become a whitening layer, but batch norms"):
        norm.convert(generator(), "deconv")
    report = norm.convert(generator(nn.Conv2d(8, 3, 1), nn.Flatten(), nn.BatchNorm1d(3)), "deconv")
    assert str(report).endswith("left alone: 1 ConvTranspose2d, 1 BatchNorm1d") and len(report.changed) == 2
    norm.convert(generator(), "none")
    layers = [nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (4, 1, 1)), nn.BatchNorm2d(4)]
    with pytest.raises(norm.NormError, match=r"\(3, ...\). fc_block whitens linear layers"):
        norm.convert(nn.Sequential(*layers), "deconv")
    norm.convert(nn.Sequential(*layers), "deconv", fc_block=4)


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2)], {}),
        ([nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)], {"keep_depthwise": True}),
        ([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)], {"overrides": {"*": {"recipe": "keep"}}}),
    ],
    ids=["one dimension", "depthwise", "kept"],
)
def test_a_network_that_would_stay_as_it_is_is_refused(layers: list[nn.Module], options: dict[str, Any]):
    """It would train as if it whitened."""
    with pytest.raises(norm.NormError, match=r"no Conv2d that would become a whitening layer\. .*use another recipe"):
        norm.convert(nn.Sequential(*layers), "deconv_fast", **options)


@pytest.mark.parametrize("recipe", ["deconv", "gn", "in", "none"])
def test_synchronised_norms_over_vectors_stay_as_those_that_they_were_made_from(recipe: str):
    head = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8)]
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    volume = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*body, nn.Sequential(*head), volume))
    report = norm.convert(model, recipe)
    assert [type(model[4][each]) for each in (1, 5)] == [nn.SyncBatchNorm] * 2
    assert type(model[5][1]) is nn.SyncBatchNorm and type(model[1]) is not nn.SyncBatchNorm
    assert "SyncBatchNorm" in str(report)
    if recipe == "deconv":
        with pytest.raises(norm.NormError, match="matches no layer"):
            norm.convert(model, "deconv", overrides={"4.1": {"n_iter": 1}})


def test_synchronised_norms_stay_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    norm.convert(model, "bn", momentum=0.01)
    assert type(model[1]) is nn.SyncBatchNorm and model[1].momentum == 0.01
    norm.convert(model, "gn", groups=2)
    assert type(model[1]) is nn.GroupNorm


def test_half_precision_is_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half()
    with pytest.raises(norm.NormError, match="^0 has weights of torch.float16; .* convert the network in float32"):
        norm.convert(model, "deconv")
    assert type(model[1]) is nn.BatchNorm2d


def test_features_in_the_last_dimension_are_whitened_where_a_linear_layer_reads_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.Linear(4, 5))
    norm.convert(model, "deconv", fc_block=4, delinear=False)
    x = torch.randn(8, 16, 16, 4) @ torch.randn(4, 4) + 3
    seen = model[3][0](x)
    assert seen.shape == x.shape
    covariance = torch.cov(seen.flatten(0, -2).T, correction=0)
    torch.testing.assert_close(covariance, torch.eye(4), atol=0.1, rtol=0)
    model.eval()
    torch.testing.assert_close(norm.fold(model)[3](x), model[3](x))


@pytest.mark.parametrize("calibrated", [False, True])
def test_converted_in_inference_mode_a_network_trains_all_the_same(calibrated):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.inference_mode():
        images = torch.randn(4, 3, 8, 8)
        before = model.eval()(images)
        norm.convert(model, "deconv", **({"calibrate": images} if calibrated else {}))
        if calibrated:
            torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-3)
    model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

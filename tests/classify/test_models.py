"""The paper's networks: sizes, shapes, conversion, folding, options, and what a wrong name or value says."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import norm
from classify import models
from engine.errors import UserError

PAPER = {
    "vgg16": 14.71,
    "resnet18": 11.17,
    "preact_resnet18": 11.17,
    "densenet121": 6.88,
    "resnext29_32x4d": 4.76,
    "mobilenet_v2": 2.28,
    "dpn92": 34.18,
    "pnasnet_a": 0.13,
    "senet18": 11.26,
    "efficientnet_b0": 2.91,
}
"""Millions of parameters with 10 classes, as the paper prints them."""
NARROW = {
    **{name: {"width": 0.25} for name in ("vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50")},
    **{name: {"width": 0.25} for name in ("preact_resnet18", "senet18", "mobilenet_v2")},
    "densenet121": {"growth": 8},
}
GREY = ("lenet", "mlp")
DECONV = {"block": 8, "n_iter": 2, "stem_n_iter": 3}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def images(name, count=2):
    channels, size = (1, 28) if name in GREY else (3, 32)
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def narrow(name, **options):
    channels, size = (1, 28) if name in GREY else (3, 32)
    return models.build(name, 10, channels, size=size, **{**NARROW.get(name, {}), **options})


def test_the_known_names():
    assert " ".join(models.available()) == (
        "densenet121 dpn92 efficientnet_b0 lenet mlp mobilenet_v2 pnasnet_a pnasnet_b preact_resnet18 resnet18 "
        "resnet34 resnet50 resnext29_32x4d senet18 vgg11 vgg13 vgg16 vgg19"
    )


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_those_of_the_paper(name):
    printed = max(0.01 * PAPER[name], 0.005)  # 1%, or what two decimals leave open
    with torch.device("meta"):
        model = models.build(name)
        batch_norm = parameters(model)
        norm.convert(model, "deconv")
    assert parameters(model) / 1e6 == pytest.approx(PAPER[name], abs=printed)
    # The paper counts its own networks; DenseNet's has 73,280 parameters fewer than the one with batch norm.
    assert batch_norm / 1e6 == pytest.approx(PAPER[name], abs=printed + (0.01 if name == "densenet121" else 0))


@pytest.mark.parametrize("name", models.available())
def test_other_classes_channels_and_sizes(name):
    with torch.device("meta"):
        for channels, size in ((1, 33), (3, 96)):
            model = models.build(name, 7, channels, size=size).eval()
            assert model.training is False and model(torch.zeros(3, channels, size, size)).shape == (3, 7)


@pytest.mark.parametrize("recipe", ["deconv", "gn", "none"])
@pytest.mark.parametrize("name", models.available())
def test_converted_networks_train(name, recipe):
    model = narrow(name)
    assert model.training and any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    more = {"fc_block": 32} if name == "mlp" else {}  # which has nothing but linear layers
    norm.convert(model, recipe, **({**DECONV, **more} if recipe == "deconv" else {}))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if recipe == "deconv":
        assert all(type(module) is not nn.Conv2d for module in model.modules())
    out = model(images(name))
    F.cross_entropy(out, torch.tensor([1, 2])).backward()
    assert out.shape == (2, 10) and out.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", models.available())
def test_no_layer_changes_its_input(name):
    model = narrow(name)
    norm.convert(model, "none")
    versions = {}

    def before(module, inputs):
        versions[module] = inputs[0]._version

    def after(module, inputs, output):
        assert inputs[0]._version == versions[module], f"{type(module).__name__} works in place"

    for module in model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    model(images(name))
    assert len(versions) > 10


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "vgg11", "mobilenet_v2", "lenet", "mlp"])
def test_folded_network_is_the_same(name):
    model = narrow(name)
    norm.convert(model, "deconv", momentum=0.5, fc_block=32, **DECONV)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images(name, 8)), torch.arange(8)).backward()
        optimizer.step()
    plain = norm.fold(model)
    assert {type(m) for m in plain.modules() if hasattr(m, "weight")} <= {nn.Conv2d, nn.Linear}
    with torch.no_grad():
        expected, found = model.eval()(images(name, 8)), plain(images(name, 8))
    assert expected.std(0).max() > 1e-3, "the images must tell the outputs apart"
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "senet18", "lenet"])
def test_calibrated_conversion_keeps_the_function(name):
    model = narrow(name)
    x = images(name, 8)
    with torch.no_grad():
        model(x)
        before = model.eval()(x)
        norm.convert(model, "deconv", calibrate=x, **DECONV)
        assert (model(x) - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("recipe", ["bn", "deconv"])
@pytest.mark.parametrize("name", ["preact_resnet18", "vgg11", "lenet"])
def test_learns_a_few_images(name, recipe):
    torch.manual_seed(0)
    model = narrow(name)
    norm.convert(model, recipe, **(DECONV if recipe == "deconv" else {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if name == "lenet" else 0.02, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images(name, 8)), torch.arange(8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_width_scales_every_channel():
    for name in ("vgg16", "resnet18", "resnet50", "preact_resnet18", "senet18", "mobilenet_v2"):
        with torch.device("meta"):
            ratio = parameters(models.build(name)) / parameters(models.build(name, width=0.5))
        assert 3.5 < ratio < 4.1, name
    assert models.build("resnet18", width=1e-6)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert models.build("resnet50", width=2e-2)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_seed_decides_the_weights_whether_or_not_a_size_is_tried():
    torch.manual_seed(3)
    first = models.build("vgg11", width=0.1).state_dict()
    torch.manual_seed(3)
    second = models.build("vgg11", width=0.1, size=32).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_options_of_the_small_networks():
    assert parameters(models.build("mlp", 10, 1)) == 784 * 128 + 2 * 128 * 128 + 3 * 3 * 128 + 1290
    model = models.build("mlp", 10, 3, size=16, hidden=20, layers=2, activation="relu")
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear == [(3 * 16 * 16, 20), (20, 20), (20, 10)]
    assert any(isinstance(m, nn.ReLU) for m in model.modules())
    assert not any(isinstance(m, nn.Sigmoid) for m in model.modules())
    for name in ("mlp", "lenet", "vgg11"):
        model, x = narrow(name, dropout=0.9), images(name, 4)
        assert not torch.equal(model(x), model(x)), name
        model.eval()
        assert torch.equal(model(x), model(x)), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet",
            {},
            r"model.name: unknown network 'resnet' \(did you mean 'resnet\d+'\?\); known: densenet121, dpn92",
        ),
        ("torchvision/", {}, "unknown network 'torchvision/'.*torchvision/NAME and timm/NAME"),
        (
            "vgg16",
            {"wdth": 1},
            r"model.options.wdth: vgg16 has no such option \(did you mean 'width'\?\); its options: w",
        ),
        ("dpn92", {"width": 1}, "model.options.width: dpn92 has no such option; it has none"),
        ("vgg16", {"width": 0}, "model.options.width: found 0, expected greater than 0"),
        ("vgg16", {"width": math.inf}, "model.options.width: found inf, expected a finite number"),
        ("vgg16", {"width": "half"}, "model.options.width: found 'half', expected a valid number"),
        ("vgg16", {"width": True}, "model.options.width: found True, expected a valid number"),
        ("vgg16", {"dropout": 1}, "model.options.dropout: found 1, expected less than 1"),
        ("mlp", {"layers": 0}, "model.options.layers: found 0, expected greater than or equal to 1"),
        ("mlp", {"hidden": 2.5}, "model.options.hidden: found 2.5, expected a valid integer"),
        ("mlp", {"activation": "tanh"}, "model.options.activation: found 'tanh', expected 'sigmoid' or 'relu'"),
        ("torchvision/resnet", {}, "torchvision has no classification network 'resnet'; did you mean torchvision/res"),
        ("torchvision/fcn_resnet50", {}, "torchvision has no classification network 'fcn_resnet50'"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "model.options.weights: not an option.*model.weights decides"),
        ("torchvision/resnet18", {"grups": 1}, "model.options.grups: .*did you mean groups.*its options: groups"),
        (
            "torchvision/resnet18",
            {"groups": 2},
            "model.options: torchvision/resnet18 cannot be built with {'groups': 2}",
        ),
    ],
)
def test_what_is_wrong_is_said(name, options, message):
    with pytest.raises(UserError, match=message):
        models.build(name, **options)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vgg16", 28, "vgg16 cannot take images of 28x28; the smallest that it takes are 32x32: set data.size=32"),
        ("vgg11", 16, "vgg11 cannot take images of 16x16; .* set data.size=32"),
        ("densenet121", 7, "densenet121 cannot take images of 7x7; the smallest that it takes are 8x8"),
        ("lenet", 11, "lenet cannot take images of 11x11; the smallest that it takes are 12x12"),
        ("torchvision/alexnet", 32, "torchvision/alexnet cannot take images of 32x32; the smallest .* 63x63"),
        ("torchvision/vit_b_32", 64, r"set data.size=224 or model.options.image_size=64"),
    ],
)
def test_images_that_are_too_small(name, size, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        models.build(name, size=size)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "preact_resnet18", "mobilenet_v2", "pnasnet_a", "dpn92"])
def test_images_of_16_work_without_vgg(name):
    with torch.device("meta"):
        assert models.build(name, size=16)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_torchvision_network_for_other_channels():
    torch.manual_seed(0)
    colour = models.build("torchvision/resnet18", 7, 3)
    grey = models.build("torchvision/resnet18", 7, 1, size=32)
    assert grey(torch.zeros(2, 1, 32, 32)).shape == (2, 7) and grey.training
    theirs, mine = colour.state_dict(), grey.state_dict()
    assert {key for key in theirs if theirs[key].shape != mine[key].shape} == {"conv1.weight"}
    assert grey.conv1.extra_repr() == colour.conv1.extra_repr().replace("3, 64", "1, 64", 1)


def test_torchvision_options_and_heads():
    model = models.build("torchvision/vit_b_32", 7, image_size=64, size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert models.classifier_names(model) == ("heads.head.weight", "heads.head.bias")
    with torch.device("meta"):
        model = models.build("torchvision/googlenet", 7)
        assert torch.is_tensor(model(torch.zeros(2, 3, 64, 64)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ("fc.weight", "fc.bias")),
        ("mlp", ("fc.weight", "fc.bias")),
        ("torchvision/vgg11", ("classifier.6.weight", "classifier.6.bias")),
        ("torchvision/mobilenet_v3_small", ("classifier.3.weight", "classifier.3.bias")),
        ("torchvision/squeezenet1_1", ("classifier.1.weight", "classifier.1.bias")),
        ("torchvision/maxvit_t", ("classifier.5.weight",)),
    ],
)
def test_classifier_names(name, expected):
    with torch.device("meta"):
        model = models.build(name, 7)
        assert models.classifier_names(model) == expected
        assert model.get_parameter(expected[0]).shape[0] == 7
        norm.convert(model, "deconv", fc_block=16)
    names = models.classifier_names(model)
    assert names[0] == expected[0] and len(names) == 2  # a whitening layer has a bias always


def test_classifier_of_a_network_with_a_whitening_before_it():
    model = models.build("resnet18", width=0.1)
    norm.convert(model, "deconv", fc_block=8, delinear=False)
    assert models.classifier_names(model) == ("fc.1.weight", "fc.1.bias")


def test_timm_networks():
    pytest.importorskip("timm")
    model = models.build("timm/resnet18", 7, 1, size=32, drop_rate=0.1)
    assert model.training and model(torch.zeros(2, 1, 32, 32)).shape == (2, 7) and model.drop_rate == 0.1
    assert models.classifier_names(model) == ("fc.weight", "fc.bias")
    distilled = models.build("timm/deit_tiny_distilled_patch16_224", 7)
    assert models.classifier_names(distilled) == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    for name, options, message in (
        ("resnet19", {}, "model.name: timm has no classification network 'resnet19'; did you mean timm/resnet"),
        (
            "resnet18",
            {"drop_rte": 0.1},
            "model.options.drop_rte: timm/resnet18 has no such option; did you mean drop_rate",
        ),
        ("resnet18", {"pretrained": True}, "model.options.pretrained: not an option .* model.weights decides it"),
        (
            "resnet18",
            {"drop_path_rate": 2},
            r"model.options: with {'drop_path_rate': 2} timm/resnet18 cannot be trained: .*\bp\b",
        ),
        ("resnet18", {"features_only": True}, r"timm/resnet18 gives list for an image, expected \(1, 10\)"),
        ("vit_tiny_patch16_224", {}, "set data.size=224 or model.options.img_size=32"),
    ):
        with pytest.raises(UserError, match=message):
            models.build(f"timm/{name}", size=32, **options)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"timm is not installed; install it with pip install 'deconvseg\[pretrained\]'"
    ):
        models.build("timm/resnet18")


def test_networks_can_be_copied():
    model = models.build("senet18", width=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))

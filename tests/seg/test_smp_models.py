"""Networks of segmentation-models-pytorch: any input size, every norm, one image, and what cannot be had."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import norm
from engine.config import NormConfig, OptimConfig, load
from engine.errors import UserError
from engine.optim import build_ema
from engine.prepare import convert_norm
from seg import models, smp_models, train
from seg.config import ModelConfig, SegConfig

ARCHITECTURES = smp_models.architectures()
ENCODERS = ["resnet18", "mit_b0", "tu-mobilenetv3_small_100", "tu-tf_efficientnet_lite0"]
WITHOUT = {("linknet", "mit_b0"), ("unetplusplus", "mit_b0")}
"""Pairs that the library does not have."""
PAIRS = [
    (architecture, encoder)
    for architecture in ARCHITECTURES
    for encoder in (["tu-vit_tiny_patch16_224"] if architecture == "dpt" else ENCODERS)
    if (architecture, encoder) not in WITHOUT
]


def build(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return models.build(ModelConfig(name=name, **more), 5, pretrained=False)  # type: ignore[arg-type]


def test_the_twelve_architectures_are_known():
    assert {"deeplabv3", "deeplabv3plus", "dpt", "fpn", "linknet", "manet", "pan", "pspnet"} <= set(ARCHITECTURES)
    assert {"segformer", "unet", "unetplusplus", "upernet"} <= set(ARCHITECTURES)
    assert {"resnet50", "mit_b0", "efficientnet-b0", "tu-tf_efficientnet_lite0"} <= set(smp_models.encoders())


@pytest.mark.parametrize("architecture, encoder", PAIRS)
def test_logits_have_the_size_of_the_input(architecture: str, encoder: str):
    """Sizes that no stride divides, also those smaller than the network's coarsest pixel."""
    model = build(f"smp/{architecture}/{encoder}").eval()
    with torch.no_grad():
        for size in ((64, 96), (71, 83), (20, 33)):
            found = model(torch.randn(1, 3, *size))
            assert list(found) == ["out"] and found["out"].shape == (1, 5, *size) and found["out"].isfinite().all()


@pytest.mark.parametrize("architecture", ["unet", "deeplabv3plus"])
def test_what_fits_goes_through_as_it_is(architecture: str):
    model = build(f"smp/{architecture}/resnet18").eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x)["out"], model.network(x))


class Echo(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


def test_padding_mirrors_the_image_and_repeats_the_border_of_small_ones():
    net = Echo()
    model = smp_models.AnySize(net, 8, 16)
    x = torch.arange(3 * 13 * 17.0).reshape(1, 3, 13, 17)
    assert torch.equal(model(x)["out"], x)
    assert net.seen.shape == (1, 3, 16, 24)
    assert torch.equal(net.seen[..., 13:, :17], x[..., [11, 10, 9], :])
    assert torch.equal(net.seen[..., :13, 17:], x[..., range(15, 8, -1)])
    x = torch.rand(1, 3, 2, 20)
    assert torch.equal(model(x)["out"], x) and net.seen.shape == (1, 3, 16, 24)
    assert torch.equal(net.seen[0, 0, :, 0], x[0, 0, [0] + [1] * 15, 0])


@pytest.mark.parametrize("recipe", ["bn", "deconv", "deconv_fast"])
def test_it_converts_trains_and_folds(recipe: str):
    model = build("smp/unet/resnet18")
    norm.convert(model, recipe)
    model(torch.randn(2, 3, 65, 97))["out"].square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(norm.fold(model)(x)["out"], model(x)["out"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("smp/deeplabv3plus/tu-tf_efficientnet_lite0", "bn"),
        ("smp/deeplabv3plus/tu-tf_efficientnet_lite0", "deconv"),
        ("smp/deeplabv3plus/tu-tf_efficientnet_lite0", "in"),
        ("smp/pan/resnet18", "bn"),
        ("smp/pan/resnet18", "in"),
        ("smp/upernet/resnet18", "bn"),
        ("smp/fpn/tu-resnest14d", "bn"),
        ("smp/fpn/tu-resnest14d", "gn"),
    ],
)
def test_one_image_trains_and_evaluates(name: str, recipe: str):
    """Image pooling and attention leave one value a channel."""
    model = build(name)
    convert_norm(model, NormConfig(name=recipe))
    model(torch.randn(1, 3, 64, 64))["out"].square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64))["out"].isfinite().all()


def test_the_average_of_the_weights_is_a_network_of_its_own():
    model = build("smp/deeplabv3plus/tu-mobilenetv3_small_100")
    ema = build_ema(model, OptimConfig(ema_decay=0.5))
    assert ema is not None
    ema.update_parameters(model)
    assert ema.module.state_dict().keys() == model.state_dict().keys()


def test_its_encoder_is_the_backbone():
    model = build("smp/unet/resnet18")
    backbone = {name for name, _ in model.named_parameters() if models.is_backbone(name)}
    assert len(backbone) == len(list(model.network.encoder.parameters())) > 50
    assert len(backbone) < len(list(model.parameters()))


@pytest.mark.parametrize(
    "name, stride", [("deeplabv3", 8), ("deeplabv3", 16), ("deeplabv3plus", 8), ("pan", 16), ("pan", 32)]
)
@pytest.mark.parametrize("encoder", ["resnet18", "tu-tf_efficientnet_lite0"])
def test_output_stride(name: str, stride: int, encoder: str):
    model = build(f"smp/{name}/{encoder}", output_stride=stride).eval()
    with torch.no_grad():
        assert model.network.encoder(torch.randn(1, 3, 128, 64))[-1].shape[-2:] == (128 // stride, 64 // stride)
        assert model(torch.randn(1, 3, 100, 64))["out"].shape[-2:] == (100, 64)


@pytest.mark.parametrize(
    "name, stride, message",
    [
        (
            "deeplabv3plus/densenet121",
            8,
            "densenet121 cannot have 8, .*pooling.*; choose another encoder, .* smp/unet/",
        ),
        ("deeplabv3plus/densenet121", None, "densenet121 cannot have 16, which smp/deeplabv3plus/densenet121 needs"),
        ("pan/tu-vgg11", None, "tu-vgg11 cannot have 16, which smp/pan/tu-vgg11 needs .it refuses the argument."),
        ("deeplabv3/tu-edgenext_xx_small", 8, "cannot have 8, .*unexpected keyword argument 'output_stride'"),
        ("deeplabv3/resnet18", 32, "32, but smp/deeplabv3 can have 8 or 16"),
        ("pan/resnet18", 8, "8, but smp/pan can have 16 or 32"),
        ("unet/resnet18", 16, "16, but smp/unet has none to choose; set it to null, or take one of smp/deeplabv3, "),
    ],
)
def test_output_strides_that_cannot_be_had(name: str, stride: int | None, message: str):
    with pytest.raises(UserError, match=f"model.output_stride: .*{message}"):
        build(f"smp/{name}", output_stride=stride)


@pytest.mark.parametrize(
    "name, message",
    [
        ("smp/unet", "found 'smp/unet', expected smp/ARCHITECTURE/ENCODER"),
        ("smp/unett/resnet18", "unknown architecture 'unett'; did you mean unet or .*; known: deeplabv3, "),
        ("smp/unet/resnet180", "unknown encoder 'resnet180'; did you mean resnet18 or .*; it may be one of"),
        ("smp/unet/tu-resnet180", "unknown encoder 'tu-resnet180'; did you mean tu-resnet18 or "),
        ("smp/unet/resnet18.a1_in1k", "unknown encoder 'resnet18.a1_in1k'"),
        ("smp/linknet/mit_b0", "smp/linknet/mit_b0 cannot be built: .*not supported for Linknet"),
        ("smp/unet/tu-vit_tiny_patch16_224", "cannot be built: Unsupported model downsampling pattern"),
        ("smp/dpt/tu-resnet18", "cannot be built: .*dpt takes timm's vision transformers, such as tu-vit_small_patch"),
        ("smp/dpt/tu-vit_small_patch14_dinov2", "smp/dpt needs patches of 8, 16 or 32 pixels, and tu-vit_small"),
        ("smp/unet/tu-swin_tiny_patch4_window7_224", "takes images of 224x224 only; let it take others by model.opt"),
    ],
)
def test_networks_that_do_not_exist(name: str, message: str):
    with pytest.raises(UserError, match=f"model.name: .*{message}"):
        build(name)


def test_options_reach_the_architecture_and_timms_encoder():
    model = build("smp/unet/resnet18", options={"encoder_depth": 3, "decoder_channels": [64, 32, 16]})
    assert model.network.segmentation_head[0].in_channels == 16
    assert model.eval()(torch.randn(1, 3, 40, 50))["out"].shape == (1, 5, 40, 50)
    model = build("smp/pspnet/resnet18", options={"encoder_depth": 4}).eval()
    assert model(torch.randn(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)
    options = {"strict_img_size": False}
    model = build("smp/fpn/tu-swin_tiny_patch4_window7_224", options=options).eval()
    assert model(torch.randn(1, 3, 71, 83))["out"].shape == (1, 5, 71, 83)
    rates = [
        one.drop_prob
        for one in build("smp/fpn/tu-resnet18", options={"drop_path_rate": 0.25}).modules()
        if type(one).__name__ == "DropPath"
    ]
    assert max(rates) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "encoder, options, message",
    [
        ("resnet18", {"decoder_channel": [8]}, "options.decoder_channel: smp/unet has no such .* decoder_channels or"),
        ("resnet18", {"decoder_channels": [8, 8]}, "options: smp/unet/resnet18 cannot be built with decoder_channels="),
        ("resnet18", {"drop_path_rate": 0.1}, "options.drop_path_rate: smp/unet has no such option"),
        ("tu-resnet18", {"nosuch": 1}, "options: .*cannot be built with nosuch=1: .*unexpected keyword argument"),
        ("resnet18", {"activation": "softmax"}, "options.activation: cannot be set: the losses need logits"),
        ("resnet18", {"encoder_weights": "imagenet"}, "options.encoder_weights: .* set model.backbone_weights"),
        ("resnet18", {"classes": 2}, "options.classes: cannot be set: it is the number of classes of the data"),
    ],
)
def test_options_that_are_refused(encoder: str, options: dict[str, object], message: str):
    with pytest.raises(UserError, match=f"model.{message}"):
        build(f"smp/unet/{encoder}", options=options)


def test_no_auxiliary_head():
    with pytest.raises(UserError, match="model.aux: smp/unet/resnet18 has no auxiliary head; set model.aux=false"):
        build("smp/unet/resnet18", aux=True)


def test_building_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("smp/deeplabv3plus/tu-tf_efficientnet_lite0")


EXPERIMENT = """
task: seg
length: 2 steps
batch_size: 1
data: {crop: [64, 72]}
model: {name: smp/deeplabv3plus/tu-mobilenetv3_small_100, options: {decoder_channels: 32}}
loss: {terms: {cross_entropy: 1, lovasz: 0.5}, class_weights: auto}
optim: {lr: 0.01, ema_decay: 0.9, backbone_lr_factor: 0.1}
recipes: {deconv: {calibrate_batches: 2, block: 16}}
runtime: {workers: 0, device: cpu, threads: 1}
report: {log_every: 1 step, images: 0, tensorboard: false}
"""


@pytest.mark.parametrize("recipe", ["bn", "deconv"])
def test_an_experiment_with_one_image_a_step_from_start_to_checkpoint(tmp_path: Path, sample_root: Path, recipe: str):
    (tmp_path / "one.yaml").write_text(EXPERIMENT)
    overrides = [f"data.root={sample_root}", f"norm.name={recipe}"]
    result = train.run(load(tmp_path / "one.yaml", overrides, SegConfig), tmp_path / "work")
    assert result.step == 2 and result.score is not None
    model, cfg, _ = models.from_checkpoint(tmp_path / "work/best.pt")
    assert cfg.loss.class_weights == "auto" and cfg.loss.terms == {"cross_entropy": 1, "lovasz": 0.5}
    with torch.no_grad():
        assert model(torch.randn(1, 3, 50, 60))["out"].shape == (1, 19, 50, 60)

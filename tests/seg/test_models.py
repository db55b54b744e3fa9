"""Networks by name, backbone weights, and what comes back from a checkpoint."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model

from engine.errors import UserError
from seg import models
from seg.config import ModelConfig

NAMES = [
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet101",
    "deeplabv3_resnet50",
    "fcn_resnet101",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
]


def config(name: str, **options) -> ModelConfig:
    return ModelConfig(name=name, **({"output_stride": 16} if "mobilenet" in name else {}) | options)


def test_available_lists_the_networks():
    assert models.available() == NAMES


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50", *NAMES[::5]])
def test_logits_have_the_size_of_the_input(name):
    model = models.build(config(name), 19).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96))["out"].shape == (1, 19, 64, 96)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride(stride):
    model = models.build(ModelConfig(name="deeplabv3_resnet50", output_stride=stride, aux=True)).eval()
    with torch.no_grad():
        features = model.backbone(torch.randn(1, 3, 64, 64))
    assert features["out"].shape[-1] == 64 // stride and features["out"].shape[1] == 2048
    rate = {8: 12, 16: 6, 32: 3}[stride]
    assert model.classifier[0].convs[1][0].dilation == (rate, rate)


def test_auxiliary_head():
    model = models.build(ModelConfig(name="fcn_resnet50", aux=True), 5).train()
    assert set(model(torch.randn(2, 3, 32, 32))) == {"out", "aux"}
    with pytest.raises(UserError, match="lraspp_mobilenet_v3_large has no auxiliary head; set model.aux=false"):
        models.build(config("lraspp_mobilenet_v3_large", aux=True))


def test_names_and_strides_that_do_not_exist():
    with pytest.raises(
        UserError, match="unknown network 'unet'; known: deeplabv3_mobilenet_v3_large.* and smp/ARCHITECT"
    ):
        models.build(ModelConfig(name="unet"))
    with pytest.raises(UserError, match="unknown network 'fcn_resnet5'; did you mean fcn_resnet50.; known"):
        models.build(ModelConfig(name="fcn_resnet5"))
    with pytest.raises(UserError, match="output_stride: 8, but lraspp_.* has 16; set model.output_stride=16"):
        models.build(ModelConfig(name="lraspp_mobilenet_v3_large", output_stride=8))
    with pytest.raises(UserError, match="model.options: fcn_resnet50 takes none; they are for the networks smp/ARCH"):
        models.build(ModelConfig(name="fcn_resnet50", options={"decoder_channels": 64}))


@pytest.mark.parametrize("name, stride", [("deeplabv3_resnet50", 8), ("lraspp_mobilenet_v3_large", 16)])
def test_a_network_has_its_own_stride_where_none_is_asked(name, stride):
    backbone = models.build(ModelConfig(name=name)).eval().backbone
    with torch.no_grad():
        features = list(backbone(torch.randn(1, 3, 64, 64)).values())
    assert min(one.shape[-1] for one in features) == 64 // stride
    assert models.multiple(ModelConfig(name=name)) == stride


def test_what_sides_should_be_multiples_of():
    assert models.multiple(ModelConfig(output_stride=32)) == 32
    assert models.multiple(ModelConfig(name="smp/unet/resnet18")) == 1


def test_backbone_weights_from_a_file(tmp_path):
    resnet = get_model("resnet50", weights=None)
    torch.save(resnet.state_dict(), tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in resnet.state_dict().items()}}, tmp_path / "wrapped.pth")
    save_file(resnet.state_dict(), tmp_path / "weights.safetensors")
    for name in ("plain.pth", "wrapped.pth", "weights.safetensors"):
        model = models.build(ModelConfig(name="fcn_resnet50", backbone_weights=str(tmp_path / name)))
        assert torch.equal(model.backbone.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)
        assert torch.equal(model.backbone.bn1.weight, resnet.bn1.weight)


def test_mobilenet_backbone_from_a_file(tmp_path):
    net = get_model("mobilenet_v3_large", weights=None)
    torch.save(net.state_dict(), tmp_path / "m.pth")
    cfg = config("deeplabv3_mobilenet_v3_large", backbone_weights=str(tmp_path / "m.pth"))
    model = models.build(cfg)
    assert torch.equal(dict(model.backbone.named_parameters())["0.0.weight"], net.features[0][0].weight)


def test_backbone_files_that_do_not_fit(tmp_path):
    def load(path):
        return models.build(ModelConfig(name="fcn_resnet50", backbone_weights=str(path)))

    with pytest.raises(UserError, match="nowhere.pth: cannot read the checkpoint: No such file"):
        load(tmp_path / "nowhere.pth")
    torch.save(get_model("resnet18", weights=None).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(
        UserError, match=r"another network(.|\n)*layer1.0.conv1.weight: here \(64, 64, 1, 1\), in the file"
    ):
        load(tmp_path / "r18.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="code.pth: refused, because the file is a bare pickle"):
        load(tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="missing in the file"):
        load(tmp_path / "list.pth")


def test_download_that_fails_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"cannot download https://.*resnet50.*no network.*model.backbone_weights=PATH"):
        models.build(ModelConfig(name="fcn_resnet50", backbone_weights="torchvision"))


def test_parameters_of_the_backbone():
    assert models.is_backbone("backbone.layer1.0.conv1.weight") and not models.is_backbone("classifier.4.bias")
    assert models.is_backbone("network.encoder.conv1.weight") and not models.is_backbone("network.decoder.conv1.weight")


def test_sources_of_weights_that_are_for_other_networks():
    for source in ("timm", "package:efficientnet-lite0"):
        with pytest.raises(UserError, match=f"'{source}' is for encoders of timm's, .*; for fcn_resnet50 set 'torchv"):
            models.build(ModelConfig(name="fcn_resnet50", backbone_weights=source))

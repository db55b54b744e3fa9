"""Networks by name, backbone weights, and what comes back from a checkpoint."""

import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

import seg.config
from engine.config import load
from engine.errors import UserError
from seg import models, train
from seg.config import ModelConfig, SegConfig

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


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_root: Path) -> Path:
    """A config of the network in docs/segmentation.md, in a folder with its module."""
    monkeypatch.setattr(models, "_BUILDERS", dict(models._BUILDERS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    page = (Path(__file__).parents[2] / "docs/segmentation.md").read_text(encoding="utf-8")
    (tmp_path / "my_networks.py").write_text(re.findall(r"```python\n(.*?)```", page, re.S)[0])
    config = tmp_path / "own.yaml"
    config.write_text(
        f"{{task: seg, length: 2 steps, batch_size: 2, data: {{root: {sample_root}, crop: [64, 96]}}, "
        "imports: [my_networks], model: {name: small, options: {width: 8}}, norm: {name: deconv, block: 16}, "
        "optim: {lr: 0.01, backbone_lr_factor: 0}, runtime: {workers: 0, device: cpu}, report: {tensorboard: false}}"
    )
    return config


def test_a_network_of_ones_own_trains_and_comes_back(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load(own, [], SegConfig)
    torch.manual_seed(loaded.config.runtime.seed)
    before = models.build(loaded.config.model).state_dict()
    train.run(loaded, tmp_path / "run")
    model, cfg, _ = models.from_checkpoint(tmp_path / "run/last.pt")
    assert type(model).__name__ == "Small" and cfg.model.options == {"width": 8}
    after = model.state_dict()
    assert torch.equal(after["backbone.0.weight"], before["backbone.0.weight"]), "backbone_lr_factor"
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    made = eval(models.call(cfg.model, 19), {"my_networks": sys.modules["my_networks"], "seg": seg})
    assert type(made) is type(model) and made.state_dict().keys() == before.keys()
    monkeypatch.delitem(models._BUILDERS, "small")
    with pytest.raises(
        UserError, match=r"last.pt: model.name: 'small' is not known here.*my_networks.*--allow-imports"
    ):
        models.from_checkpoint(tmp_path / "run/last.pt")
    monkeypatch.delitem(sys.modules, "my_networks")
    assert models.from_checkpoint(tmp_path / "run/last.pt", allow_imports=True)


def test_a_network_of_ones_own_starts_from_a_trained_one(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = models.build(load(own, ["norm={name: bn}"], SegConfig).config.model, 7)
    torch.save(first.state_dict(), tmp_path / "first.pt")
    options = [f"model.weights={tmp_path / 'first.pt'}", "length=1 step", "norm.calibrate_batches=1"]
    train.run(load(own, options, SegConfig), tmp_path / "run")
    assert "first.pt; classifier starts anew (7 classes in the file, 19 here)" in capsys.readouterr().out
    torch.save(first.backbone.state_dict(), tmp_path / "backbone.pt")
    cfg = ModelConfig(name="small", options={"width": 8}, backbone_weights=str(tmp_path / "backbone.pt"))
    found = models.build(cfg, 5).get_parameter("backbone.0.weight")
    assert torch.equal(found, first.get_parameter("backbone.0.weight"))


def test_what_a_network_of_ones_own_cannot_have(own: Path):
    load(own, [], SegConfig)

    def build(**more) -> None:
        models.build(ModelConfig(name="small", **more), 5)

    with pytest.raises(
        UserError, match="model.options.widht: small has no such option; did you mean width.; known: wi"
    ):
        build(options={"widht": 8})
    with pytest.raises(UserError, match="model.aux: small has no auxiliary head .aux_classifier.; set model.aux=false"):
        build(aux=True)
    with pytest.raises(
        UserError, match="model.backbone_weights: no weights 'imagenet' are known for small; give the p"
    ):
        build(backbone_weights="imagenet")


class Logits(nn.Conv2d):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"out": super().forward(images)}


def test_functions_that_make_no_such_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_BUILDERS", dict(models._BUILDERS))

    def built(network: object, **more) -> nn.Module:
        models._BUILDERS.pop("x", None)
        models.register("x")(lambda cfg, classes: network)
        return models.build(ModelConfig(name="x", **more), 5)

    with pytest.raises(UserError, match="model.name: x, of .*: gave a int, expected an nn.Module"):
        built(3)
    with pytest.raises(
        UserError, match=r"gives a Tensor for images \(2, 3, 64, 64\), expected {'out': logits of shape"
    ):
        built(nn.Conv2d(3, 5, 1))
    with pytest.raises(UserError, match=r"gives 'out' of shape \(2, 5, 32, 32\) for images"):
        built(Logits(3, 5, 1, 2))
    assert built(Logits(3, 5, 1))
    with pytest.raises(
        UserError, match="x has no part called 'backbone' that they could fill; set null, or model.weig"
    ):
        built(Logits(3, 5, 1), backbone_weights="x.pt")
    assert models.call(ModelConfig(name="x", output_stride=16), 5) == (
        "seg.models.build(seg.config.ModelConfig(name='x', output_stride=16), 5)"
    ), "a function without a name of its own"


def test_an_option_without_a_default_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_BUILDERS", dict(models._BUILDERS))
    models.register("x")(lambda cfg, classes, *, width: Logits(3, classes, 1))
    with pytest.raises(UserError, match="model.options.width: not set, and x has no default for it; set it"):
        models.build(ModelConfig(name="x"), 5)
    assert models.build(ModelConfig(name="x", options={"width": 2}), 5)


def test_names_of_networks_are_given_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_BUILDERS", dict(models._BUILDERS))

    @models.register("y")
    def first(cfg: ModelConfig, classes: int) -> nn.Module:
        return nn.Identity()

    models.register("y")(first)  # a module that is imported again
    for name, told in (
        ("y", "network 'y' is already known, by .*first"),
        ("fcn_resnet50", "already known, by seg.mod"),
    ):
        with pytest.raises(UserError, match=told):
            models.register(name)(lambda cfg, classes: nn.Identity())
    with pytest.raises(UserError, match="network 'smp/y': names that begin with smp/ are those of the library"):
        models.register("smp/y")

"""The network of an experiment: its initial weights, and weights from files."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from classify.config import ClassifyConfig, ModelConfig
from classify.data import DataInfo
from classify.network import build, fill, fits_converted
from engine import checkpoint
from engine.errors import UserError

INFO = DataInfo(tuple("abcd"), 3, 32, (0.5,) * 3, (0.5,) * 3)
SMALL = {"width": 0.125}


@pytest.mark.parametrize("init", ["kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal"])
def test_initial_weights(init: str):
    torch.manual_seed(0)
    model, _ = build(ModelConfig(name="vgg11", options=SMALL, init=init), INFO)
    weight = model.get_parameter("features.4.weight").detach()  # 16 x 8 x 3 x 3
    fan_in, fan_out = 8 * 9, 16 * 9
    rows = weight.flatten(1)
    if init == "orthogonal":
        torch.testing.assert_close(rows @ rows.t(), torch.eye(16), atol=1e-5, rtol=0)
    else:
        expected = (2 / fan_in if init.startswith("kaiming") else 2 / (fan_in + fan_out)) ** 0.5
        assert rows.std() == pytest.approx(expected, rel=0.1)
        if init.endswith("uniform"):
            assert rows.abs().max() <= expected * 3**0.5 + 1e-6
    assert not model.get_parameter("fc.bias").any()


def test_weights_of_a_plain_file_and_of_data_parallel(tmp_path: Path):
    cfg = ModelConfig(name="vgg11", options=SMALL)
    source, _ = build(cfg, INFO)
    state = source.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "wrapped.pt")
    compiled = {f"_orig_mod.module.{name}": value for name, value in state.items()}
    torch.save({"model": compiled, "args": Namespace(lr=0.1)}, tmp_path / "reference.pth")
    checkpoint.export_weights(tmp_path / "x.safetensors", state)
    for name in ("plain.pt", "wrapped.pt", "reference.pth", "x.safetensors"):
        model, said = build(cfg.model_copy(update={"weights": str(tmp_path / name)}), INFO)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert said == f"weights of {tmp_path / name}"


def test_weights_of_a_checkpoint_are_the_average_where_one_was_kept(tmp_path: Path):
    cfg = ModelConfig(name="vgg11", options=SMALL)
    last, average = (build(cfg, INFO)[0].state_dict() for _ in range(2))
    steps = {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in average.items()}}
    for content, expected in (
        ({"model": last, "ema": average}, average),
        ({"model": last, "ema": None}, last),
        ({"model": last, "model_ema": steps, "args": Namespace(lr=0.1)}, average),
        ({"state_dict": last, "state_dict_ema": average, "arch": "vgg11"}, average),
        ({"state_dict": last, "ema": {}}, last),
    ):
        torch.save(content, tmp_path / "best.pt")
        model, _ = build(cfg.model_copy(update={"weights": str(tmp_path / "best.pt")}), INFO)
        assert torch.equal(model.get_parameter("fc.weight"), expected["fc.weight"])


def test_initial_weights_beside_those_of_a_file_are_refused(tmp_path: Path):
    cfg = ModelConfig(name="vgg11", options=SMALL, weights=str(tmp_path / "x.pt"), init="orthogonal")
    with pytest.raises(UserError, match="model.init: orthogonal has no effect beside the weights of model.weights"):
        build(cfg, INFO)
    build(cfg, INFO, pretrained=False)  # of a checkpoint


def test_weights_that_were_trained_on_images_of_another_normalisation(tmp_path: Path):
    cfg = ModelConfig(name="timm/resnet10t", weights=str(tmp_path / "timm.pth"))
    torch.save(build(cfg, INFO, pretrained=False)[0].state_dict(), tmp_path / "timm.pth")
    assert build(cfg, INFO)[1].endswith(
        "note: timm's weights of this network are for images normalised with data.mean=[0.485, 0.456, 0.406] "
        "data.std=[0.229, 0.224, 0.225], here they are [0.5, 0.5, 0.5] and [0.5, 0.5, 0.5]"
    )
    assert "note" not in build(cfg, replace(INFO, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))[1]
    cfg = ModelConfig(name="torchvision/googlenet", weights="pretrained")
    with pytest.raises(
        UserError, match="model.options.transform_input: torchvision's weights of torchvision/googlenet"
    ):
        fill(nn.Identity(), cfg, INFO)


def test_weights_of_another_network_are_refused(tmp_path: Path):
    source, _ = build(ModelConfig(name="vgg13", options=SMALL), INFO)
    torch.save(source.state_dict(), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    cfg = ModelConfig(name="vgg11", options=SMALL)
    with pytest.raises(UserError, match="other.pt: these weights are of another network"):
        build(cfg.model_copy(update={"weights": str(tmp_path / "other.pt")}), INFO)
    with pytest.raises(UserError, match="list.pt: found a list, expected a file of weights"):
        build(cfg.model_copy(update={"weights": str(tmp_path / "list.pt")}), INFO)


def test_a_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    cfg = ModelConfig(name="torchvision/resnet18", weights="pretrained")
    with pytest.raises(
        UserError, match="pretrained weights of torchvision/resnet18: no route to host.*model.weights=PATH"
    ):
        build(cfg, INFO)
    with pytest.raises(UserError, match="'pretrained' is for torchvision/NAME and timm/NAME, not for vgg11"):
        build(ModelConfig(name="vgg11", options=SMALL, weights="pretrained"), INFO)


def test_the_norm_of_a_checkpoint_is_the_configs_where_it_makes_the_same_network(tmp_path: Path):
    stored = {"name": "deconv", "overrides": {}, "calibrate_batches": 0, "precise_batches": 4, "block": 32}
    torch.save({"config": {"norm": stored}}, tmp_path / "best.pt")

    def fits(**section: object) -> bool:
        plain = {"length": "1 step", "batch_size": 1, "model": {"weights": str(tmp_path / "best.pt")}, "norm": section}
        return fits_converted(ClassifyConfig.model_validate(plain))

    assert fits(**stored) and fits(name="deconv", block=32) and fits(name="deconv", block=32, fc_block=0)
    assert not (fits(name="deconv") or fits(name="bn") or fits(name="deconv", block=32, overrides={"fc": {"block": 8}}))

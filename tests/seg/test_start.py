"""A new training from a whole trained network: what is taken, what starts anew, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from engine import checkpoint
from engine.errors import UserError
from engine.prepare import convert_norm
from seg import models
from seg.config import SegConfig
from seg.start import Start, check

SMALL = "smp/unet/tu-mobilenetv3_small_050"
TORCHVISION = "deeplabv3_mobilenet_v3_large"
DECONV = {"name": "deconv", "block": 16}
ABC = ("a", "b", "c")


def config(source: object = None, norm: dict[str, Any] | None = None, **sections: Any) -> SegConfig:
    model = {"name": SMALL, **sections.pop("model", {}), "weights": None if source is None else str(source)}
    return SegConfig.model_validate(
        {"length": "1 step", "batch_size": 1, "model": model, "norm": norm or {"name": "bn"}, **sections}
    )


def built(cfg: SegConfig, classes: Sequence[str] = ABC) -> nn.Module:
    return models.build(cfg.model, len(classes), pretrained=False)


def converted(model: nn.Module, cfg: SegConfig) -> nn.Module:
    convert_norm(model, cfg.norm, models.blank_images() if cfg.norm.calibrate_batches else None)
    return model


def trained(path: Path, cfg: SegConfig, classes: Sequence[str] = ABC) -> dict[str, Tensor]:
    """Writes the checkpoint of a network whose statistics are not those of a fresh one; gives its weights."""
    model = converted(built(cfg, classes), cfg)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    state = model.state_dict()
    stored = {"task": "seg", "config": cfg.model_dump(mode="json"), "meta": {"classes": list(classes)}}
    checkpoint.save(path, {"format": 1, **stored, "model": state, "ema": None})
    return state


def begin(cfg: SegConfig, classes: Sequence[str] = ABC) -> tuple[nn.Module, Start]:
    """As `seg.train` does."""
    model = built(cfg, classes)
    start = Start(cfg, classes, model)
    if not start.converted:
        start.fill(model)
    converted(model, cfg)
    if start.converted:
        start.fill(model)
    return model, start


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("norm", [{"name": "bn"}, DECONV, {**DECONV, "calibrate_batches": 1, "gain": True}])
def test_a_checkpoint_of_the_same_norm_and_classes_is_taken_whole(tmp_path: Path, norm: dict[str, Any]):
    state = trained(tmp_path / "best.pt", config(norm=norm))
    model, start = begin(config(tmp_path / "best.pt", norm))
    assert same(model.state_dict(), state)
    assert start.report(model) == [f"weights of {tmp_path / 'best.pt'}"]


def test_the_average_is_taken_where_there_is_one(tmp_path: Path):
    cfg = config()
    last, average = (built(cfg).state_dict() for _ in range(2))
    torch.save({"config": cfg.model_dump(mode="json"), "model": last, "ema": average}, tmp_path / "best.pt")
    assert same(begin(config(tmp_path / "best.pt"))[0].state_dict(), average)


def test_files_of_other_programs(tmp_path: Path):
    """The library's own names, those in wrappers, and what tools/export.py writes."""
    cfg = config()
    state = built(cfg).state_dict()
    inner = {name.removeprefix("network."): one for name, one in state.items()}
    torch.save(inner, tmp_path / "smp.pth")
    torch.save({"state_dict": {f"module.{name}": one for name, one in state.items()}}, tmp_path / "wrapped.pt")
    checkpoint.export_weights(tmp_path / "exported.safetensors", inner)
    for name in ("smp.pth", "wrapped.pt", "exported.safetensors"):
        assert same(begin(config(tmp_path / name))[0].state_dict(), state)


@pytest.mark.parametrize("norm", [{"name": "bn"}, {**DECONV, "calibrate_batches": 1, "gain": True}])
def test_the_head_starts_anew_where_the_number_of_classes_differs(tmp_path: Path, norm: dict[str, Any]):
    state = trained(tmp_path / "best.pt", config(norm=norm), "abcde")
    torch.manual_seed(3)
    model, start = begin(config(tmp_path / "best.pt", norm))
    torch.manual_seed(3)
    fresh = built(config()).get_submodule("network.segmentation_head.0")
    head = model.get_submodule("network.segmentation_head.0")
    torch.testing.assert_close(head.weight, fresh.weight)  # not what a calibration on blank images makes of it
    assert start.report(model)[0].endswith("; network.segmentation_head.0 starts anew (5 classes in the file, 3 here)")
    found = model.state_dict()
    differing = [name for name, one in found.items() if one.shape != state[name].shape or not one.equal(state[name])]
    assert {name.rpartition(".")[0] for name in differing} == {"network.segmentation_head.0"}
    assert all(name.endswith(("weight", "bias", "gain")) for name in differing), "statistics of its input stay"


def test_as_many_other_classes_start_the_head_anew(tmp_path: Path):
    state = trained(tmp_path / "best.pt", config())
    model, start = begin(config(tmp_path / "best.pt"), ("a", "c", "b"))
    assert start.notes == [
        "network.segmentation_head.0 starts anew (other classes, such as 'b' in the file and 'c' here)"
    ]
    name = "network.segmentation_head.0.weight"
    assert not torch.equal(model.state_dict()[name], state[name])
    exported = {key.removeprefix("network."): one for key, one in state.items()}
    checkpoint.export_weights(tmp_path / "x.safetensors", exported)  # which has no names of classes
    assert begin(config(tmp_path / "x.safetensors"), ("a", "c", "b"))[1].notes == []


@pytest.mark.parametrize("aux", [True, False])
def test_torchvisions_network_with_its_auxiliary_head(tmp_path: Path, aux: bool):
    theirs = get_model(TORCHVISION, weights=None, weights_backbone=None, num_classes=21, aux_loss=True).state_dict()
    torch.save(theirs, tmp_path / "coco.pth")
    cfg = config(tmp_path / "coco.pth", model={"name": TORCHVISION, "aux": aux})
    model, start = begin(cfg)
    assert torch.equal(model.state_dict()["classifier.1.weight"], theirs["classifier.1.weight"])
    assert start.notes == (
        ["classifier.4 and aux_classifier.4 start anew (21 classes in the file, 3 here)"]
        if aux
        else [
            "the file's auxiliary head is left out (model.aux is false)",
            "classifier.4 starts anew (21 classes in the file, 3 here)",
        ]
    )
    assert aux is ("aux_classifier.1.weight" in model.state_dict())


@pytest.mark.parametrize("norm", [{"name": "bn"}, {**DECONV, "calibrate_batches": 1}])
def test_an_auxiliary_head_that_the_file_lacks_starts_anew(tmp_path: Path, norm: dict[str, Any]):
    state = trained(tmp_path / "best.pt", config(norm=norm, model={"name": TORCHVISION}))
    torch.manual_seed(3)
    model, start = begin(config(tmp_path / "best.pt", norm, model={"name": TORCHVISION, "aux": True}))
    assert start.notes == ["the auxiliary head starts anew (the file has none)"]
    torch.manual_seed(3)
    fresh = built(config(model={"name": TORCHVISION, "aux": True}))
    found = model.state_dict()
    assert torch.equal(found["classifier.4.weight"], state["classifier.4.weight"])
    torch.testing.assert_close(found["aux_classifier.0.weight"], fresh.state_dict()["aux_classifier.0.weight"])


@pytest.mark.filterwarnings("ignore:.*fewer than half as many")
def test_a_network_of_batch_norm_keeps_its_function_where_it_is_calibrated(tmp_path: Path):
    """The statistics of the checkpoint count, and so the conversion comes after the weights."""
    plain = config(data={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    trained(tmp_path / "best.pt", plain)
    old, _ = begin(config(tmp_path / "best.pt", data={"mean": (0.5,) * 3, "std": (0.5,) * 3}))
    cfg = config(tmp_path / "best.pt", {**DECONV, "calibrate_batches": 1})
    model = built(cfg)
    start = Start(cfg, ABC, model)
    assert not start.converted
    start.fill(model)
    images = torch.randn(2, 3, 64, 64)
    convert_norm(model, cfg.norm, [images])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images)["out"], old.eval()(images)["out"], rtol=1e-3, atol=1e-4)
    assert start.report(model)[1:] == [
        "note: the file's network was trained with data.mean=[0.5, 0.5, 0.5], here it is [0.485, 0.456, 0.406]",
        "note: the file's network was trained with data.std=[0.5, 0.5, 0.5], here it is [0.229, 0.224, 0.225]",
    ]


def test_a_conversion_without_calibration_is_told(tmp_path: Path):
    trained(tmp_path / "best.pt", config())
    model, start = begin(config(tmp_path / "best.pt", DECONV))
    assert start.report(model)[1] == (
        "note: with norm.name=deconv the layers that whiten compute something else than the file's network did; "
        "norm.calibrate_batches=4 keeps its function"
    )


def test_options_that_make_the_same_layers_may_differ(tmp_path: Path):
    """As where a first stage froze the encoder's statistics, and the second does not."""
    frozen = {**DECONV, "overrides": {"*encoder*": {"recipe": "frozen_bn"}}}
    state = trained(tmp_path / "best.pt", config(norm=frozen))
    model, start = begin(config(tmp_path / "best.pt", {**DECONV, "overrides": {"*encoder*": {"recipe": "keep"}}}))
    found = {name: one for name, one in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert same(found, {name.replace(".norm.", "."): one for name, one in state.items()})
    assert start.report(model)[1:] == [
        "note: norm.overrides: {'*encoder*': {recipe: frozen_bn}} in the file, {'*encoder*': {recipe: keep}} here, of "
        "layers alike"
    ]


def test_another_norm_says_what_to_set(tmp_path: Path):
    trained(tmp_path / "best.pt", config(norm=DECONV))
    with pytest.raises(UserError) as caught:
        begin(config(tmp_path / "best.pt"))
    assert str(caught.value).splitlines() == [
        f"model.weights: {tmp_path / 'best.pt'}: was trained with another norm, whose weights do not fit this one:",
        "  norm.name: deconv in the file, bn here",
        "  norm.block: 16 in the file, not set here",
        "  set norm.name=deconv norm.block=16, or start from a network that was trained with batch norm",
    ]
    with pytest.raises(UserError, match=r"norm.block: 16 in the file, 32 here\n  set norm.block=16, or start"):
        begin(config(tmp_path / "best.pt", {**DECONV, "block": 32}))


def test_other_layers_by_calibration_say_what_to_set(tmp_path: Path):
    named = {
        "model": {"name": "smp/unet/densenet121", "options": {"encoder_depth": 3, "decoder_channels": [16, 16, 8]}}
    }
    trained(tmp_path / "best.pt", config(norm={**DECONV, "calibrate_batches": 2}, **named))
    with pytest.raises(UserError, match=r"norm.calibrate_batches: 2 in the file, 0 here(.|\n)*set norm.cal\w+=2"):
        begin(config(tmp_path / "best.pt", DECONV, **named))


def test_another_network_is_named(tmp_path: Path):
    options = {"decoder_channels": [32, 16, 16, 8, 8]}
    trained(tmp_path / "best.pt", config(model={"options": options}))
    with pytest.raises(
        UserError, match=r"another network(.|\n)*here \((.|\n)*options: {'decoder_channels': \[32.*here"
    ):
        begin(config(tmp_path / "best.pt"))
    with pytest.raises(
        UserError, match=f"model.name: {SMALL} in the file, {TORCHVISION} here; set what the file has, or"
    ):
        begin(config(tmp_path / "best.pt", model={"name": TORCHVISION}))
    torch.save(get_model("mobilenet_v3_large", weights=None).state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="an encoder alone goes into model.backbone_weights"):
        begin(config(tmp_path / "encoder.pth", model={"name": TORCHVISION}))


def test_folded_weights_are_named(tmp_path: Path):
    import norm

    model = converted(built(config()), config(norm=DECONV))
    state = norm.fold(model).get_submodule("network").state_dict()
    checkpoint.export_weights(tmp_path / "model.safetensors", state)
    with pytest.raises(UserError, match="exported weights of a deconvolved network are folded, .* give the best.pt"):
        begin(config(tmp_path / "model.safetensors", DECONV))


def test_weights_of_whitening_layers_without_a_config(tmp_path: Path):
    """As a loop of one's own saves them."""
    state = trained(tmp_path / "best.pt", config(norm=DECONV))
    torch.save(state, tmp_path / "own.pt")
    assert same(begin(config(tmp_path / "own.pt", DECONV))[0].state_dict(), state)


def test_backbone_weights_are_not_loaded_beside_them(tmp_path: Path):
    trained(tmp_path / "best.pt", config())
    model, start = begin(config(tmp_path / "best.pt", model={"backbone_weights": "nowhere.pth"}))
    assert start.report(model)[0].endswith("; model.backbone_weights=nowhere.pth is not loaded beside them")


@pytest.mark.parametrize("word", ["imagenet", "torchvision", "package:efficientnet-lite0"])
def test_words_of_the_backbones_weights(word: str):
    with pytest.raises(UserError, match=f"found '{word}', expected the path .*model.backbone_weights={word}"):
        check(word)


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(UserError, match="model.weights: nowhere.pt: cannot read the checkpoint: No such file"):
        check("nowhere.pt")
    for content in ({"task": "seg"}, [1]):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"model.weights: .*x.pt: (holds no tensors|found a list), expected"):
            check(str(tmp_path / "x.pt"))
    torch.save({"task": "classify", "config": {"task": "classify"}, "model": {"w": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: a checkpoint of the task 'classify', expected one of 'seg'"):
        check(str(tmp_path / "x.pt"))


def test_what_is_drawn_after_it_stays_as_it_was(tmp_path: Path):
    trained(tmp_path / "best.pt", config())
    cfg = config(tmp_path / "best.pt")
    model = built(cfg)
    before = torch.get_rng_state()
    Start(cfg, ABC, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_encoder_takes_the_statistics_of_one_that_was_not(tmp_path: Path):
    encoder = "network.encoder*"
    before = {**DECONV, "overrides": {encoder: {"recipe": "keep"}}}
    state = trained(tmp_path / "best.pt", config(norm=before))
    model, _ = begin(config(tmp_path / "best.pt", {**DECONV, "overrides": {encoder: {"recipe": "frozen_bn"}}}))
    found = {name.replace(".norm.", "."): one for name, one in model.state_dict().items()}  # around timm's activations
    assert all(torch.equal(one, state[name]) for name, one in found.items())
    assert {name.rpartition(".")[2] for name in state.keys() - found.keys()} == {"num_batches_tracked"}


def test_other_options_are_named_before_another_norm(tmp_path: Path):
    trained(tmp_path / "best.pt", config())
    cfg = config(tmp_path / "best.pt", DECONV, model={"options": {"decoder_channels": [64, 32, 16, 8, 8]}})
    with pytest.raises(UserError, match=r"model.options: \{\} in the file, \{'decoder_channels'"):
        begin(cfg)

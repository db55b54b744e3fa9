"""Training from end to end on tiny data: it learns, resumes exactly, and every option of the config is taken up."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from classify import sets, train
from classify.config import ClassifyConfig
from classify.evaluate import evaluate_checkpoint
from classify.network import build, from_checkpoint
from engine import checkpoint
from engine.config import Loaded, from_dict
from engine.errors import UserError
from engine.processes import in_processes
from engine.report import read_metrics


def loaded(root: Path, *overrides: str, **data: Any) -> Loaded[ClassifyConfig]:
    plain = {
        "task": "classify",
        "length": "4 epochs",
        "batch_size": 20,
        "data": {"name": "cifar10", "root": str(root), "check_files": False, "download": False, **data},
        "model": {"name": "vgg11", "options": {"width": 0.125}},
        "optim": {"lr": 0.05, "schedule": "cosine"},
        "recipes": {"deconv": {"block": 8, "fc_block": 16}},
        "runtime": {"workers": 0, "device": "cpu", "threads": 1},
        "report": {"log_every": "1 step", "eval_every": "2 epochs", "tensorboard": False},
    }
    return from_dict(plain, list(overrides), ClassifyConfig, "test")


@pytest.mark.parametrize("norm", ["bn", "deconv"])
def test_it_learns_and_the_checkpoint_scores_the_same(cifar_root: Path, tmp_path: Path, norm: str):
    experiment = loaded(cifar_root, f"norm.name={norm}", "norm.momentum=0.5", "length=6 epochs")
    result = train.run(experiment, tmp_path / "run")
    assert result.step == 30 and result.score is not None and result.score > 0.3
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0] and "top1" in rows[0]["parts"]
    scores = evaluate_checkpoint(tmp_path / "run/last.pt")
    assert scores is not None and scores[1] == "test" and scores[0].top1 == result.last_score
    best = [row for row in rows if row["kind"] == "eval"][-1]
    assert best["scalars"]["loss"] == pytest.approx(scores[0].loss) and "accuracy/frog" in best["scalars"]


def test_a_stopped_run_goes_on_bit_for_bit(cifar_root: Path, tmp_path: Path):
    options = ["norm.name=deconv", "data.randaugment=1", "data.mixup=0.2", "report.checkpoint_every=3 steps"]
    train.run(loaded(cifar_root, *options, "length=9 steps"), tmp_path / "whole")
    whole = checkpoint.load(tmp_path / "whole/last.pt")
    experiment = loaded(cifar_root, *options, "length=9 steps", "report.keep_all=true")
    train.run(experiment, tmp_path / "kept")
    (tmp_path / "kept/step-00000006.pt").rename(tmp_path / "kept/last.pt")
    train.run(experiment, tmp_path / "kept", "auto")
    again = checkpoint.load(tmp_path / "kept/last.pt")
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())


@pytest.mark.parametrize(
    "options",
    [
        ["optim.name=amsgrad", "optim.lr=0.001", "loss.name=l2", "data.erasing=0.5", "optim.warmup=1 step"],
        ["optim.name=adamw", "optim.lr=0.001", "data.cutmix=1", "data.mixup=0.2", "loss.label_smoothing=0.1"],
        ["optim.schedule=multistep", "optim.milestones=['1 step']", "optim.ema_decay=0.9", "model.init=xavier_normal"],
        ["runtime.amp=bf16", "micro_batch=10", "runtime.channels_last=true", "norm.name=gn"],
    ],
    ids=["amsgrad-l2", "adamw-mixed", "multistep-ema", "amp-accumulated-gn"],
)
def test_options_of_a_config(cifar_root: Path, tmp_path: Path, options: list[str]):
    result = train.run(loaded(cifar_root, *options, "length=2 steps"), tmp_path)
    assert result.step == 2 and result.score is not None
    model, cfg, info = from_checkpoint(tmp_path / "best.pt")
    assert info.classes[6] == "frog" and model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_normalisation_that_does_not_fit_a_trained_network(cifar_root: Path, tmp_path: Path):
    train.run(loaded(cifar_root, "length=1 step"), tmp_path)
    for key in ("mean", "std"):
        said = f"data.{key}: 1 numbers, and the network takes images of 3 channels; give one for each channel"
        with pytest.raises(UserError, match=said):
            from_checkpoint(tmp_path / "best.pt", [f"data.{key}=[0.5]"])


def test_a_folder_of_images_with_a_broken_one(image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    (root / "val/car/1.png").write_bytes(b"broken")
    (root / "train/bus/2.png").write_bytes(b"broken")
    options = ["data.on_error=skip", "batch_size=6", "length=3 epochs", "data.size=32"]
    experiment = loaded(root, *options, name="folder", val_split="val")
    with pytest.raises(UserError, match="(2|1).png: .* Repair it; data.on_error=skip goes on without such"):
        train.run(loaded(root, *options, "data.on_error=stop", name="folder", val_split="val"), tmp_path / "stopped")
    train.run(experiment, tmp_path / "run")
    said = capsys.readouterr().out
    assert "2 unreadable images left out" in said and "car/1.png" in said and "bus/2.png" in said
    scores = evaluate_checkpoint(tmp_path / "run/best.pt")
    assert scores is not None and scores[0].images == 8 and len(scores[0].problems) == 1


def test_what_the_error_of_a_broken_image_advises_goes_on(image_root: Path, tmp_path: Path):
    root = Path(shutil.copytree(image_root, tmp_path / "images"))
    options = dict(name="folder", val_split="val", size=32)
    train.run(loaded(root, "batch_size=6", "length=1 epoch", **options), tmp_path / "run")
    (root / "train/bus/2.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="data.on_error=skip goes on without such images. To remove it makes another"):
        train.run(loaded(root, "batch_size=6", "length=3 epochs", **options), tmp_path / "run", "auto")
    removed = Path(shutil.copytree(root, tmp_path / "removed"))
    (removed / "train/bus/2.png").unlink()
    with pytest.raises(UserError, match="was trained with other images: of 'train' it had 18 images"):
        train.run(loaded(removed, "batch_size=6", "length=3 epochs", **options), tmp_path / "run", "auto")
    skip = loaded(root, "batch_size=6", "length=3 epochs", "data.on_error=skip", **options)
    done = train.run(skip, tmp_path / "run", "auto")
    assert not done.stopped and (tmp_path / "run/best.pt").exists()


def test_a_crop_larger_than_the_image_is_an_error_for_predictions_too(image_root: Path, tmp_path: Path):
    options = ["batch_size=6", "length=1 step", "data.size=32", "data.eval_resize=40"]
    train.run(loaded(image_root, *options, name="folder", val_split="val"), tmp_path)
    from_checkpoint(tmp_path / "best.pt", ["data.size=40"])
    with pytest.raises(UserError, match="data.eval_resize: 40 is less than data.size, the 64 pixels"):
        from_checkpoint(tmp_path / "best.pt", ["data.size=64"])


def test_files_that_vanish_meanwhile_are_named_and_the_checkpoint_stays(
    image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, save = tmp_path / "data", checkpoint.save
    shutil.copytree(image_root, root)

    def save_and_remove(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        shutil.rmtree(root / "train", ignore_errors=True)

    monkeypatch.setattr(checkpoint, "save", save_and_remove)
    options = ["data.size=32", "batch_size=6", "report.checkpoint_every=1 step"]
    experiment = loaded(root, *options, name="folder", val_split="val")
    with pytest.raises(UserError, match=r"train/\w+/\d\.png: "):
        train.run(experiment, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run/last.pt")["step"] >= 1


def test_a_class_that_is_called_otherwise_ends_a_resumed_training(image_root: Path, tmp_path: Path) -> None:
    """The classes after it would be those of other outputs."""
    root = Path(shutil.copytree(image_root, tmp_path / "images"))
    options = dict(name="folder", val_split="val", size=32)
    train.run(loaded(root, "batch_size=6", "length=1 step", **options), tmp_path / "run")
    for split in ("train", "val"):
        (root / split / "tram").rename(root / split / "a tram")
    with pytest.raises(UserError, match=r"run/last.pt: the network's class 'bus' is 'a tram' in the data set"):
        train.run(loaded(root, "batch_size=6", "length=2 steps", **options), tmp_path / "run", "auto")


def test_a_training_goes_on_with_the_pixels_that_it_began_with(cifar_root: Path, tmp_path: Path) -> None:
    """Such as those of a copy of CIFAR whose images were encoded anew; earlier versions noted the labels alone."""
    root, last = Path(shutil.copytree(cifar_root, tmp_path / "data")), tmp_path / "run/last.pt"
    train.run(loaded(root, "length=1 step"), tmp_path / "run")
    began = checkpoint.load(last)
    labels = {name: one.rpartition(", ")[0] for name, one in began["meta"]["data"].items()}
    file = root / "cifar-10-batches-py/test_batch"
    entry = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps({**entry, "data": entry["data"] ^ 1}))
    said = rf"{last}: was trained with other images: of 'val' it had {began['meta']['data']['val']}, now there are "
    with pytest.raises(UserError, match=said + rf"{labels['val']}, \w+ \(after the number of images come checksums"):
        train.run(loaded(root, "length=2 steps"), tmp_path / "run", "auto")
    checkpoint.save(last, {**began, "meta": {**began["meta"], "data": labels}})
    assert train.run(loaded(root, "length=2 steps"), tmp_path / "run", "auto").step == 2
    assert checkpoint.load(last)["meta"]["data"]["train"] == began["meta"]["data"]["train"]


@pytest.mark.parametrize("norm", ["bn", "deconv"])
def test_a_frozen_backbone_stays_and_goes_on(
    cifar_root: Path, tmp_path: Path, norm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"norm.name={norm}", "optim.backbone_lr_factor=0", "optim.weight_decay=0.1"]
    train.run(loaded(cifar_root, *options, "length=1 step"), tmp_path)
    first = checkpoint.load(tmp_path / "last.pt")["model"]
    train.run(loaded(cifar_root, *options, "length=3 steps"), tmp_path, "auto")
    assert "frozen, without gradients: " in capsys.readouterr().out
    last = checkpoint.load(tmp_path / "last.pt")["model"]
    parameters = {name for name, _ in from_checkpoint(tmp_path / "last.pt")[0].named_parameters()}
    moved = {name for name in parameters if not torch.equal(first[name], last[name])}
    assert moved == {"fc.weight", "fc.bias"} and len(parameters) > 10


def test_weights_of_another_number_of_classes_start_the_classifier_anew(
    cifar_root: Path, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train.run(loaded(cifar_root, "length=1 step"), tmp_path / "first")
    options = ["batch_size=6", "length=1 step", "data.size=32", f"model.weights={tmp_path / 'first/best.pt'}"]
    capsys.readouterr()
    train.run(loaded(image_root, *options, name="folder", val_split="val"), tmp_path / "second")
    assert "fc.weight, fc.bias start anew (another number of classes)" in capsys.readouterr().out
    root = Path(shutil.copytree(image_root, tmp_path / "images"))
    for split in ("train", "val"):
        (root / split / "tram").rename(root / split / "a tram")
    options[-1] = f"model.weights={tmp_path / 'second/best.pt'}"
    train.run(loaded(root, *options, name="folder", val_split="val"), tmp_path / "third")
    said = capsys.readouterr().out
    assert "fc.weight, fc.bias start anew (other classes)" in said, "as many, but in another order"
    stored = checkpoint.load(tmp_path / "first/best.pt")["model"]
    cfg = loaded(cifar_root, f"model.weights={tmp_path / 'first/best.pt'}").config
    from classify.data import describe

    model, _ = build(cfg.model, describe(cfg.data))
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


def test_weights_of_a_deconvolution_network_start_another(
    cifar_root: Path, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train.run(loaded(cifar_root, "norm.name=deconv", "length=2 steps"), tmp_path / "first")
    options = [f"model.weights={tmp_path / 'first/last.pt'}", "batch_size=6", "length=1 step", "data.size=32"]
    experiment = loaded(image_root, *options, "norm.name=deconv", "optim.lr=1.0e-9", name="folder", val_split="val")
    capsys.readouterr()
    train.run(experiment, tmp_path / "second")
    assert "fc.weight, fc.bias start anew (another number of classes)" in capsys.readouterr().out
    first, second = (checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("first", "second"))
    torch.testing.assert_close(second["features.4.weight"], first["features.4.weight"])
    with pytest.raises(UserError, match="weights are of another network"):
        train.run(loaded(cifar_root, options[0], "norm.name=deconv", "norm.fc_block=0"), tmp_path / "third")


def as_folder(root: Path, place: Path) -> Path:
    """The test images of the CIFAR-like set as PNG files, in the split photos of a folder."""
    arrays = sets.load(loaded(root).config.data, "test")
    for i, (pixels, label) in enumerate(zip(arrays.images, arrays.labels, strict=True)):
        path = place / "photos" / sets.CIFAR10_CLASSES[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return place


def test_another_data_set_enters_as_that_of_the_training(cifar_root: Path, tmp_path: Path):
    """The same images in a folder, even as its only split, have the same scores; what is given is taken."""
    train.run(loaded(cifar_root, "length=8 steps", crop_padding=2), tmp_path / "run")
    path = tmp_path / "run/last.pt"
    here = evaluate_checkpoint(path)
    there = ["data.name=folder", f"data.root={as_folder(cifar_root, tmp_path / 'images')}"]
    found = evaluate_checkpoint(path, there, "photos")
    assert here is not None and found is not None and 0.1 < here[0].top1 < 1
    assert torch.equal(found[0].matrix, here[0].matrix) and found[0].loss == pytest.approx(here[0].loss, rel=1e-5)
    darker = evaluate_checkpoint(path, [*there, "data.mean=[0.9, 0.9, 0.9]"], "photos")
    assert darker is not None and darker[0].loss != pytest.approx(here[0].loss, rel=1e-2)
    _, cfg, info = from_checkpoint(path, [*there, "data.size=48"])
    assert (info.size, cfg.data.size, info.mean) == (48, 48, (0.4914, 0.4822, 0.4465))
    with pytest.raises(UserError, match="the network's class 'airplane' is '0' in the data set"):
        evaluate_checkpoint(path, ["data.name=mnist"])


def in_one_of_two(root: Path, place: Path) -> None:
    options = ["data.on_error=skip", "batch_size=18", "length=1 epoch", "data.size=32", "report.eval_every=1 epoch"]
    with (place / f"printed_{os.environ['RANK']}.txt").open("w") as log, contextlib.redirect_stdout(log):
        train.run(loaded(root, *options, name="folder", val_split="val"), place / "run")
        result = evaluate_checkpoint(place / "run/last.pt")
    if result is not None:
        scores, _ = result
        wrong = scores.images - int(scores.matrix.trace())
        (place / "counts.txt").write_text(f"{wrong} {len(scores.mistakes)} {len({m.name for m in scores.mistakes})}")


def test_two_processes_tell_what_each_has_found(image_root: Path, tmp_path: Path):
    """Unreadable training images and the surest mistakes are those of all processes."""
    shutil.copytree(image_root, tmp_path / "images")
    for name in ("bus/1", "car/2", "tram/3", "tram/4"):
        (tmp_path / f"images/train/{name}.png").write_bytes(b"broken")
    in_processes(in_one_of_two, tmp_path / "images", tmp_path)
    assert "4 unreadable images left out" in (tmp_path / "printed_0.txt").read_text()
    wrong, kept, names = (int(word) for word in (tmp_path / "counts.txt").read_text().split())
    assert wrong == kept == names > 1


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["model.name=resnet19"], "model.name: .*resnet19.*resnet18"),
        (["model.options.depth=3"], "depth"),
        (["model.options.size=3"], "model.options.size: the network's name stands in model.name"),
        (["model.weights=pretrained"], "'pretrained' is for torchvision/NAME and timm/NAME"),
        (["model.weights=nowhere.pt"], "nowhere.pt: cannot read"),
        (["batch_size=1000"], "batch_size"),
        (["norm.name=deconv", "norm.overrides={nothing: {n_iter: 1}}"], "nothing"),
    ],
)
def test_mistakes(cifar_root: Path, tmp_path: Path, overrides: list[str], text: str):
    with pytest.raises(UserError, match=text):
        train.run(loaded(cifar_root, *overrides), tmp_path)


def test_an_option_that_would_do_nothing(cifar_root: Path):
    with pytest.raises(UserError, match="report.images has no effect with task: classify"):
        loaded(cifar_root, "report.images=8")
    assert loaded(cifar_root, "report.images=0").config.report.images == 0


def test_a_segmentation_checkpoint_is_refused(cifar_root: Path, tmp_path: Path):
    train.run(loaded(cifar_root, "length=1 step"), tmp_path)
    content = checkpoint.load(tmp_path / "best.pt")
    checkpoint.save(tmp_path / "other.pt", {**content, "task": "seg"})
    with pytest.raises(UserError, match="other.pt: a checkpoint of the task 'seg', expected one of 'classify'"):
        from_checkpoint(tmp_path / "other.pt")
    with pytest.raises(UserError, match="cifar100|classes"):
        evaluate_checkpoint(tmp_path / "best.pt", ["data.name=cifar100"])

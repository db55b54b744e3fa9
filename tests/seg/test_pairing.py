"""Predictions find the labels of any data set by the images' names, all of them or none."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import UserError
from seg import evaluate, sample
from seg.cityscapes import Sample
from seg.config import DataConfig
from seg.datasets import samples
from seg.label_files import label_files
from seg.labels import read_label_ids, table
from seg.metrics import ConfusionMatrix
from seg.pairing import pair_samples
from seg.predict import Predictor
from tests import programs
from tests.seg import layouts
from tests.seg.test_datasets import Stripes, config


def cityscapes(root: Path) -> None:
    sample.render(root, size=(64, 128), counts={"train": 1, "val": 3})


WRITERS: dict[str, Callable[[Path], object]] = {**layouts.WRITERS, "cityscapes": cityscapes}


def inputs(name: str, root: Path) -> list[Path]:
    """What a user gives tools/predict.py to label the validation images."""
    folders = {
        "cityscapes": "leftImg8bit/val",
        "camvid": "val",
        "bdd100k": "images/10k/val",
        "mapillary": "validation/images",
        "folder": "images/val",
    }
    if name in folders:
        return [root / folders[name]]
    if name == "acdc":
        return [root / "rgb_anon" / condition / "val" for condition in ("fog", "night", "rain", "snow")]
    return [one.image for one in samples(DataConfig(name=name, root=root), "val")]  # type: ignore[arg-type]


def wrong_labels(cfg: DataConfig, out: Path, name: Callable[[Sample], str]) -> ConfusionMatrix:
    """Predictions in places that `name` gives, which are the labels of the split val, shifted; and their scores."""
    known = table(cfg)
    expected = ConfusionMatrix(labels=known)
    for one in samples(cfg, "val"):
        assert one.label is not None
        truth = read_label_ids(one.label)
        prediction = np.roll(truth, 5, axis=1)
        layouts.put(out / f"{name(one)}.png", prediction)
        expected.update(prediction, truth)
    return expected


@pytest.mark.parametrize("name", WRITERS)
def test_what_the_prediction_program_writes_scores_as_the_network(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "data")
    cfg = config(name, tmp_path / "data")
    known = table(cfg.data)
    model = Stripes(known.num_classes)
    predictor = Predictor.from_config(model.eval(), cfg, torch.device("cpu"))
    done = label_files(
        predictor.predict, inputs(name, tmp_path / "data"), tmp_path / "out", table=known, say=lambda _: None
    )
    assert not done.problems and done.done == len(samples(cfg.data, "val")) > 1
    scores = evaluate.evaluate_predictions(tmp_path / "out", cfg.data)
    assert np.array_equal(scores.matrix, evaluate.evaluate_model(model, cfg)[0].matrix)
    assert scores.labels == known and scores.images == done.done


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("scheme", ["name", "image", "image_labelIds", "label", "deep"])
def test_a_prediction_is_called_as_its_image_or_its_label(tmp_path: Path, name: str, scheme: str) -> None:
    WRITERS[name](tmp_path / "data")
    cfg = DataConfig(name=name, root=tmp_path / "data")  # type: ignore[arg-type]
    schemes: dict[str, Callable[[Sample], str]] = {
        "name": lambda one: one.name,
        "image": lambda one: str(Path(one.name).parent / one.image.stem),
        "image_labelIds": lambda one: str(Path(one.name).parent / f"{one.image.stem}_labelIds"),
        "label": lambda one: str(Path(one.name).parent / (one.label.stem if one.label else "")),
        "deep": lambda one: f"results/of today/{one.name}_labelIds",
    }
    expected = wrong_labels(cfg, tmp_path / "out", schemes[scheme])
    scores = evaluate.evaluate_predictions(tmp_path / "out", cfg)
    assert np.array_equal(scores.matrix, expected.matrix.numpy()) and 0 < scores.mean_iou < 1


def test_cityscapes_scores_are_those_of_its_own_way_instance_ids_included(sample_root: Path, tmp_path: Path) -> None:
    cfg = DataConfig(root=sample_root)
    wrong_labels(cfg, tmp_path, lambda one: one.name)
    ours = evaluate.evaluate_predictions(tmp_path, cfg)
    theirs = evaluate.evaluate_folder(tmp_path, sample_root / "gtFine/val")
    assert ours.to_json() == theirs.to_json() and ours.mean_iiou > 0


def flat(one: Sample) -> str:
    return Path(one.name).name


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"acdc"}))
def test_missing_and_surplus_predictions_are_counted_and_named(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "data")
    cfg = DataConfig(name=name, root=tmp_path / "data")  # type: ignore[arg-type]
    wrong_labels(cfg, tmp_path / "out", flat)
    first = samples(cfg, "val")[0]
    path = tmp_path / "out" / f"{flat(first)}.png"
    shutil.copy(path, tmp_path / "out" / "other.png")
    with pytest.raises(UserError) as error:
        evaluate.evaluate_predictions(tmp_path / "out", cfg)
    count = len(samples(cfg, "val"))
    assert f"1 PNG for none of the {count} images of the split 'val' of {name} in {cfg.root}" in str(error.value)
    assert str(tmp_path / "out" / "other.png") in str(error.value)
    path.unlink()
    with pytest.raises(UserError) as error:
        evaluate.evaluate_predictions(tmp_path / "out", cfg)
    assert f"no prediction for 1 of the {count} images of the split 'val' of {name}" in str(error.value)
    assert f"the first is {first.image}; 1 PNG for none of them, the first is " in str(error.value)
    assert f"called such as {flat(first)}.png or {flat(first)}_labelIds.png" in str(error.value)


def test_two_predictions_for_one_image(tmp_path: Path) -> None:
    layouts.camvid(tmp_path / "data")
    cfg = DataConfig(name="camvid", root=tmp_path / "data")
    wrong_labels(cfg, tmp_path / "out", flat)
    first = tmp_path / "out" / f"{samples(cfg, 'val')[0].name}.png"
    shutil.copy(first, first.with_name(f"{first.stem}_labelIds.png"))
    with pytest.raises(UserError, match=r"000000\.png: 2 predictions, .*00\.png and .*00_labelIds\.png; expected one"):
        evaluate.evaluate_predictions(tmp_path / "out", cfg)


def test_images_of_one_name_need_their_folders(tmp_path: Path) -> None:
    layouts.acdc(tmp_path / "data")
    cfg = DataConfig(name="acdc", root=tmp_path / "data")
    every = samples(cfg, "val")
    for i, one in enumerate(every):
        layouts.put(tmp_path / "a" / one.image.relative_to(cfg.root), np.full((40, 56), i, np.uint8))
        layouts.put(tmp_path / "b" / str(i) / f"{flat(one)}.png", np.full((40, 56), i, np.uint8))
    assert [int(read_label_ids(path)[0, 0]) for path in pair_samples(tmp_path / "a", every, cfg, "val")] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"b/0/.*may belong to .*fog.* or to .*night.*have one name; put predictions"):
        pair_samples(tmp_path / "b", every, cfg, "val")


def test_a_prediction_in_the_images_own_folder_is_that_images(tmp_path: Path) -> None:
    layouts.folder(tmp_path / "data")
    cfg = DataConfig(name="folder", root=tmp_path / "data")
    first = samples(cfg, "val")[0]
    assert first.label is not None
    for place in ("", "a", "b", "b/a"):
        for path in (first.image, first.label):
            (path.parents[1] / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, path.parents[1] / place / path.name)
    every, name = samples(cfg, "val"), flat(first)
    assert {f"{place}{name}" for place in ("", "a/", "b/", "b/a/")} <= {one.name for one in every}
    for place in ("out", "out/labels"):
        for i, one in enumerate(every):
            layouts.put(tmp_path / place / f"{one.name}_labelIds.png", np.full((4, 4), i, np.uint8))
        paths = pair_samples(tmp_path / "out", every, cfg, "val")
        assert [int(read_label_ids(path)[0, 0]) for path in paths] == list(range(len(every)))
        shutil.rmtree(tmp_path / "out")


def test_where_scores_go_is_looked_at_first(tmp_path: Path) -> None:
    """Not after minutes of scoring; here there is nothing to score, which would be the error otherwise."""
    (tmp_path / "file").touch()
    for option in (["--out", tmp_path / "file"], ["--json", tmp_path / "file" / "x.json"], ["--json", tmp_path]):
        done = programs.run("evaluate", "--predictions", tmp_path, "--ground-truth", tmp_path / "none", *option)
        assert done.returncode == 2 and str(option[1]).removesuffix("/x.json") in done.stderr
        assert "is a folder" in done.stderr or "cannot write there" in done.stderr


def test_wrong_predictions_and_splits_without_labels(tmp_path: Path) -> None:
    layouts.folder(tmp_path / "data")
    cfg = DataConfig(name="folder", root=tmp_path / "data")
    with pytest.raises(UserError, match=r"none \(--predictions\): no such folder"):
        evaluate.evaluate_predictions(tmp_path / "none", cfg)
    wrong_labels(cfg, tmp_path / "out", lambda one: one.name)
    with pytest.raises(UserError, match="has no label to score against, the split 'test' has no public ones"):
        evaluate.evaluate_predictions(tmp_path / "out", cfg, "test")
    path = sorted((tmp_path / "out").rglob("*.png"))[0]
    Image.fromarray(np.full(read_label_ids(path).shape, 77, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"shot 0\.png for .*\(prediction\): unknown label ids 77 .* ids 3 to 4, 9, 40"):
        evaluate.evaluate_predictions(tmp_path / "out", cfg)
    Image.fromarray(np.full((40, 8), 3, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"prediction of 8 x 40 pixels for a label of 56 x 40"):
        evaluate.evaluate_predictions(tmp_path / "out", cfg)


def test_train_ids_are_noticed_where_label_ids_are_cityscapes(tmp_path: Path) -> None:
    layouts.kitti(tmp_path / "data")
    cfg = DataConfig(name="kitti", root=tmp_path / "data")
    for one in samples(cfg, "val"):
        ids = table(cfg).to_train_ids(read_label_ids(one.label), "") if one.label else np.zeros(0)
        layouts.put(tmp_path / "out" / f"{one.name}.png", np.where(ids == 255, 0, ids).astype(np.uint8))
    with pytest.raises(UserError, match="the files hold train ids, not label ids"):
        evaluate.evaluate_predictions(tmp_path / "out", cfg)


# ---------------------------------------------------------------- the program


def test_the_program_scores_another_data_set(tmp_path: Path) -> None:
    layouts.voc(tmp_path / "data")
    cfg = DataConfig(name="voc", root=tmp_path / "data")
    wrong_labels(cfg, tmp_path / "out", flat)
    (tmp_path / "voc.yaml").write_text("task: seg\nlength: 1 epochs\nbatch_size: 1\ndata: {name: voc}\n")
    root = f"data.root={tmp_path}/data"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return programs.run("evaluate", "--predictions", tmp_path / "out", *arguments, cwd="/")

    done = run(tmp_path / "voc.yaml", root, "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == evaluate.evaluate_predictions(tmp_path / "out", cfg).table() + "\n"
    assert (tmp_path / "s.json").is_file()
    done = run("data.name=voc", root, "--split", "train")
    assert done.returncode == 2 and "error: " in done.stderr and "no prediction for 4 of the 4 images" in done.stderr

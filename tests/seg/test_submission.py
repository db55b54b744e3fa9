"""Submissions: the names that the official evaluation finds, every image once, whole or not at all, resumable."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import io
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import checkpoint
from engine.config import from_dict
from engine.errors import UserError
from seg import sample, submission
from seg.averaging import Views
from seg.config import SegConfig
from seg.data import Cityscapes, read_rgb
from seg.label_tables import TABLES
from seg.labels import TRAIN_LABEL_IDS, to_label_ids
from seg.models import build, from_checkpoint
from seg.predict import Predictor

TOOL = Path(submission.__file__).parents[1] / "tools" / "submit.py"
Make = Callable[..., SegConfig]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with three test images."""
    return sample.render(
        tmp_path_factory.mktemp("s") / "data", size=(64, 128), counts={"train": 1, "val": 1, "test": 3}
    )


def made(zip_file: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(zip_file) as archive:
        assert archive.testzip() is None
        return {name: np.array(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()}


def test_every_test_image_once_as_predicted(small_checkpoint: Path, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "s.zip"
    text = submission.submit(small_checkpoint, out, [f"data.root={root}"])
    model, cfg, _ = from_checkpoint(small_checkpoint)
    predict = Predictor.from_config(model, cfg).predict
    found = made(out)
    samples = Cityscapes(root, "test").samples
    assert list(found) == [f"{one.name}_labelIds.png" for one in samples] and len(found) == 3
    for one in samples:
        ids = found[f"{one.name}_labelIds.png"]
        assert ids.dtype == np.uint8 and np.array_equal(ids, to_label_ids(predict(read_rgb(one.image))))
        assert set(np.unique(ids)) <= set(TRAIN_LABEL_IDS)
    assert "3 images of 128 x 64 pixels, each once" in text
    assert "scores images of 2048 x 1024 pixels; these are others" in text and "has 1525 images" in text
    assert [path.name for path in out.parent.iterdir()] == ["s.zip"]
    again = tmp_path / "again.zip"
    submission.submit(small_checkpoint, again, [f"data.root={root}"])
    assert again.read_bytes() == out.read_bytes()


def test_the_official_evaluation_finds_the_predictions(small_checkpoint: Path, root: Path, tmp_path: Path) -> None:
    official = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    submission.submit(small_checkpoint, tmp_path / "s.zip", [f"data.root={root}"])
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        archive.extractall(tmp_path / "results")
    args = SimpleNamespace(predictionPath=str(tmp_path / "results"), predictionWalk=None)
    for one in Cityscapes(root, "test").samples:
        found = official.getPrediction(args, f"gtFine/test/{one.city}/{one.name}_gtFine_labelIds.png")
        assert Path(found).name == f"{one.name}_labelIds.png"


@pytest.mark.filterwarnings("ignore:.in1d.:DeprecationWarning")
def test_the_official_evaluation_reads_the_predictions(small_checkpoint: Path, root: Path, tmp_path: Path) -> None:
    """Against a truth made of the same predictions, with void in a corner: everything that is scored is right."""
    official = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    submission.submit(small_checkpoint, tmp_path / "s.zip", [f"data.root={root}"])
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        archive.extractall(tmp_path / "results")
    args = official.args
    args.predictionPath, args.predictionWalk = str(tmp_path / "results"), None
    args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, False
    truths, present = [], set[int]()
    for one in Cityscapes(root, "test").samples:
        truths.append(str(tmp_path / f"{one.name}_gtFine_labelIds.png"))
        ids = np.array(Image.open(tmp_path / "results" / f"{one.name}_labelIds.png"))
        ids[:9, :9] = 0
        present |= set(np.unique(ids).tolist()) - {0}
        Image.fromarray(ids).save(truths[-1])
    try:
        found = official.evaluateImgLists([official.getPrediction(args, path) for path in truths], truths, args)
    finally:
        args.predictionPath, args.predictionWalk = None, None
    assert sum(map(sum, found["confMatrix"])) == 3 * 64 * 128
    scored = {name: value for name, value in found["classScores"].items() if value == value}
    assert len(scored) == len(present) > 1 and set(scored.values()) == {1.0}


def test_what_was_interrupted_goes_on(
    small_checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "s.zip", list[int]()
    batch = Predictor.predict_batch

    def stops(self: Predictor, images: Sequence[Any]) -> list[Any]:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, images)

    monkeypatch.setattr(Predictor, "predict_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        submission.submit(small_checkpoint, out, [f"data.root={root}"])
    assert not out.exists() and len(list((tmp_path / "s.zip.parts").glob("*.png"))) == 2
    with pytest.raises(UserError, match=r"s.zip.parts: holds predictions of another checkpoint, data set or options"):
        submission.submit(small_checkpoint, out, [f"data.root={root}"], views=Views(flip=True))
    said: list[str] = []
    submission.submit(small_checkpoint, out, [f"data.root={root}"], say=said.append)
    assert calls == [1, 1, 1, 1] and said == [f"{tmp_path / 's.zip.parts'}: goes on after 2 of 3 images"]
    monkeypatch.setattr(Predictor, "predict_batch", batch)
    submission.submit(small_checkpoint, tmp_path / "whole.zip", [f"data.root={root}"])
    assert out.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zip", "whole.zip"]


def test_a_damaged_part_is_predicted_again(
    small_checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*args: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "s.zip"
    with monkeypatch.context() as patched:
        patched.setattr(submission, "write_zip", stops)
        with pytest.raises(KeyboardInterrupt):
            submission.submit(small_checkpoint, out, [f"data.root={root}"])
    first = sorted((tmp_path / "s.zip.parts").glob("*.png"))[0]
    first.write_bytes(first.read_bytes()[:-30])
    submission.submit(small_checkpoint, out, [f"data.root={root}"])
    submission.submit(small_checkpoint, tmp_path / "whole.zip", [f"data.root={root}"])
    assert out.read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_a_folder_for_the_parts_that_is_there_already(small_checkpoint: Path, root: Path, tmp_path: Path) -> None:
    out, parts, disk = tmp_path / "s.zip", tmp_path / "s.zip.parts", tmp_path / "disk"
    parts.mkdir()
    disk.mkdir()
    (disk / ".0123456789ab.part").touch()  # left by one that was killed while it wrote its first file
    text = submission.submit(small_checkpoint, out, [f"data.root={root}"])
    assert "cannot be removed" not in text and not parts.exists()
    parts.symlink_to(disk)
    again = submission.submit(small_checkpoint, out, [f"data.root={root}"])
    assert again == text and not parts.is_symlink() and list(disk.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "s.zip"]


def test_parts_that_cannot_be_removed_are_no_error(
    small_checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(submission.shutil, "rmtree", fails)
    text = submission.submit(small_checkpoint, tmp_path / "s.zip", [f"data.root={root}"])
    assert text.endswith("s.zip.parts is needed no more, but cannot be removed (Permission denied)")


def test_an_older_zip_stays_until_the_new_one_is_checked(
    small_checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.zip"
    out.write_bytes(b"old")

    def fails(*args: object) -> None:
        raise UserError("not good")

    monkeypatch.setattr(submission, "check_zip", fails)
    with pytest.raises(UserError, match="not good"):
        submission.submit(small_checkpoint, out, [f"data.root={root}"])
    assert out.read_bytes() == b"old" and not list(tmp_path.glob(".*"))


def packed(path: Path, **files: np.ndarray) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, ids in files.items():
            data = io.BytesIO()
            Image.fromarray(ids).save(data, "png")
            archive.writestr(f"{name}.png", data.getvalue())
    return path


@pytest.mark.parametrize(
    "files, text",
    [
        ({"a_labelIds": np.full((4, 6), 7, np.uint8)}, "1 files for 2 images; look at b_labelIds.png"),
        ({n: np.full((4, 6), 7, np.uint8) for n in ("a_labelIds", "b_labelIds", "c")}, "3 files for 2 .* c.png"),
        (
            {"a_labelIds": np.full((4, 6), 7, np.uint8), "b_labelIds": np.full((4, 5), 7, np.uint8)},
            r"b_labelIds.png is uint8 \(4, 5\), expected uint8 \(4, 6\)",
        ),
        (
            {"a_labelIds": np.full((4, 6), 7, np.uint8), "b_labelIds": np.full((4, 6), 3, np.uint8)},
            r"b_labelIds.png holds the ids \[3\], which are not evaluated",
        ),
    ],
)
def test_what_the_check_finds(tmp_path: Path, files: dict[str, np.ndarray], text: str) -> None:
    sizes = {"a": (4, 6), "b": (4, 6)}
    with pytest.raises(UserError, match=text):
        submission.check_zip(packed(tmp_path / "s.zip", **files), sizes)
    submission.check_zip(
        packed(tmp_path / "good.zip", **{f"{n}_labelIds": np.full((4, 6), 7, np.uint8) for n in sizes}), sizes
    )


def test_mistakes_come_before_the_work(
    small_checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "predict_missing", lambda *args: pytest.fail("the work was begun"))
    data = [f"data.root={root}"]
    with pytest.raises(UserError, match="expected a name that ends in .zip"):
        submission.submit(small_checkpoint, tmp_path / "s.tar", data)
    (tmp_path / "d.zip").mkdir()
    with pytest.raises(UserError, match="d.zip is a folder"):
        submission.submit(small_checkpoint, tmp_path / "d.zip", data)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot write there"):
        submission.submit(small_checkpoint, tmp_path / "file" / "s.zip", data)
    parts = tmp_path / "s.zip.parts"
    for make, found in ((parts.touch, "a file"), (lambda: parts.symlink_to("none"), "a link that leads to no folder")):
        make()
        with pytest.raises(UserError, match=f"s.zip.parts: is {found}, where predictions are kept until the zip is"):
            submission.submit(small_checkpoint, tmp_path / "s.zip", data)
        parts.unlink()
    parts.mkdir()
    (parts / "notes.txt").touch()
    with pytest.raises(UserError, match=r"s.zip.parts: holds .* or other files, which must not be mixed; remove this"):
        submission.submit(small_checkpoint, tmp_path / "s.zip", data)
    shutil.rmtree(parts)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    first = sorted((copy / "leftImg8bit" / "test").glob("*/*"))[0]
    first.rename(first.with_name("photo_leftImg8bit.png"))
    with pytest.raises(
        UserError, match=r"photo_leftImg8bit.png: the test server looks for .*; 1 of 3 images are called"
    ):
        submission.submit(small_checkpoint, tmp_path / "s.zip", [f"data.root={copy}"])
    first.with_name("photo_leftImg8bit.png").rename(
        first.with_name(os.fsdecode(b"b\xfc_000000_000019_leftImg8bit.png"))
    )
    with pytest.raises(UserError, match="the test server looks for .*; 1 of 3 images are called otherwise"):
        submission.submit(small_checkpoint, tmp_path / "s.zip", [f"data.root={copy}"])
    shutil.rmtree(copy / "leftImg8bit" / "test")
    with pytest.raises(UserError, match="has no split 'test'"):
        submission.submit(small_checkpoint, tmp_path / "s.zip", [f"data.root={copy}"])
    (copy / "leftImg8bit" / "test").mkdir()
    with pytest.raises(UserError, match="test: the split is empty"):
        submission.submit(small_checkpoint, tmp_path / "s.zip", [f"data.root={copy}"])
    assert not list(tmp_path.glob("*.parts"))


def test_the_program(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("submit_tool", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    call = ["submit.py", str(small_checkpoint), "--out", str(tmp_path / "s.zip"), "--scales", "0.5", "1", "--flip"]
    monkeypatch.setattr(sys, "argv", [*call, "--sliding-window"])
    assert tool.main() == 0
    assert "s.zip: 1 images of 128 x 64 pixels" in capsys.readouterr().out and len(made(tmp_path / "s.zip")) == 1
    monkeypatch.setattr(sys, "argv", [*call, "--device", "cpu", "data.root=/nowhere"])
    assert tool.main() == 2 and "/nowhere (data.root): no such folder" in capsys.readouterr().err


def test_a_network_of_other_classes_is_refused(small_checkpoint: Path, root: Path, tmp_path: Path) -> None:
    """Its train ids would be written as label ids of Cityscapes' classes."""
    state = checkpoint.load(small_checkpoint)
    state["meta"] = {"classes": list(TABLES["camvid"].classes), "labels": TABLES["camvid"].to_plain()}
    cfg = from_dict(state["config"], ["data.name=camvid"], SegConfig, "test").config
    state["config"] = cfg.model_dump(mode="json")
    torch.manual_seed(0)
    state["model"] = build(cfg.model, TABLES["camvid"].num_classes, pretrained=False).state_dict()
    path = tmp_path / "best.pt"
    checkpoint.save(path, {key: state[key] for key in checkpoint.KEYS})
    with pytest.raises(UserError, match="predicts the 11 classes of CamVid; the Cityscapes test server"):
        submission.submit(path, tmp_path / "s.zip", [f"data.root={root}"])
    assert not (tmp_path / "s.zip").exists()

"""Inspection of data sets: numbers against counts made here, each kind of damage by its name, and the program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import UserError
from seg import inspect_data, inspect_page
from seg.data import Cityscapes, read_pair, read_rgb
from seg.inspect_data import Inspection
from seg.labels import LABEL_NAMES, TRAIN_CLASSES, TRAIN_LABEL_IDS, read_label_ids, to_train_ids

ROOT = Path(inspect_data.__file__).parents[1]


@pytest.fixture(scope="module")
def found(sample_root: Path) -> Inspection:
    return inspect_data.inspect(sample_root)


@pytest.fixture
def copy(sample_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_root, tmp_path / "data"))


def label_files(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / "gtFine" / split).glob("*/*_labelIds.png"))


def image_files(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / "leftImg8bit" / split).glob("*/*.png"))


def kinds(root: Path) -> Counter[str]:
    """How often each kind of problem is found, notes on classes left out."""
    problems = inspect_data.inspect(root).problems
    return Counter(problem.kind for problem in problems if problem.kind not in inspect_page.NOTES)


def test_numbers_are_those_of_the_files(found: Inspection, sample_root: Path) -> None:
    assert found.splits == ["train", "val", "test"]
    assert [len(found.of(split)) for split in found.splits] == [4, 2, 1]
    for split in ("train", "val"):
        labels = [read_label_ids(path) for path in label_files(sample_root, split)]
        pixels = np.sum([np.bincount(one.ravel(), minlength=256) for one in labels], 0)
        assert np.array_equal(found.pixels(split), pixels)
        valid = pixels[list(TRAIN_LABEL_IDS)].sum()
        expected = {LABEL_NAMES[i]: pixels[i] / valid for i in TRAIN_LABEL_IDS}
        assert found.shares(split) == pytest.approx(expected)
        assert found.images_with(split)[7] == sum((one == 7).any() for one in labels)
    assert not found.pixels("test").any()
    some = np.concatenate([read_rgb(path)[::4, ::4].reshape(-1, 3) for path in image_files(sample_root)]) / 255
    colours = found.colours("train")
    assert (
        colours is not None and colours[0] == pytest.approx(some.mean(0)) and colours[1] == pytest.approx(some.std(0))
    )


def test_sound_data_has_no_mistakes(found: Inspection) -> None:
    assert inspect_page.mistakes(found) == 0, found.problems
    text = inspect_page.text(found)
    lines = [line.split() for line in text.splitlines()]
    cities = str(len({path.parent for path in image_files(found.root)}))
    assert any(line[:5] == ["train", "4", "4", cities, "128x64"] for line in lines) and "not read" in text
    assert "\n0 problems and " in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert set(TRAIN_CLASSES) <= set(rows)
    assert f"{100 * found.shares('train')['road']:.3f}" in rows["road"]


def test_rare_classes_and_classes_that_never_occur(copy: Path) -> None:
    for split in ("train", "val"):
        for path in label_files(copy, split):
            ids = read_label_ids(path)
            ids[(ids == 33) | (ids == 23)] = 7
            if split == "val":
                ids[0, :3] = 23
            ids[ids == 31] = 7
            if split == "train" and path == label_files(copy)[0]:
                ids[5, 5:8] = 31
            Image.fromarray(ids).save(path)
    texts = {problem.kind: [] for problem in inspect_data.inspect(copy).problems}
    for problem in inspect_data.inspect(copy).problems:
        texts[problem.kind].append(problem.text)
    assert texts["class that never occurs"] == ["bicycle: neither in 'train' nor 'val'"]
    assert texts["class that cannot be learned"] == ["sky: not one pixel in 'train', but in 'val'"]
    assert any(text.startswith("train: 0.0") and "in 1 training images" in text for text in texts["rare class"])


def test_each_damage_is_named(copy: Path) -> None:
    images, labels = image_files(copy), label_files(copy)
    images[0].write_bytes(images[0].read_bytes()[:100])
    Image.fromarray(read_label_ids(labels[1])[:, :100]).save(labels[1])
    ids = read_label_ids(labels[2])
    ids[0, :3], ids[1, :2] = 99, 255
    Image.fromarray(ids).save(labels[2])
    labels[3].unlink()
    shutil.copy(image_files(copy, "val")[0], image_files(copy, "test")[0])
    Image.fromarray(np.full((64, 128, 3), 9, np.uint8)).save(image_files(copy, "val")[1])
    (copy / "gtFine" / "val" / "ghost").mkdir()
    shutil.copy(labels[2], copy / "gtFine" / "val" / "ghost" / "ghost_000000_000019_gtFine_labelIds.png")
    found = inspect_data.inspect(copy)
    texts = {problem.kind: problem.text for problem in found.problems}
    assert str(images[0]) in texts["unreadable image"]
    assert texts["label of another size than its image"] == f"{labels[1]}: 100 x 64, its image 128 x 64"
    assert "99 (3 pixels), 255 (2 pixels); label ids are 0 to 33" in texts["unknown label ids"]
    assert texts["image without label"] == str(images[3])
    assert (
        "/val/" in texts["the same image in several splits"] and "/test/" in texts["the same image in several splits"]
    )
    assert texts["image of one colour"] == str(image_files(copy, "val")[1])
    assert "ghost_000000_000019" in texts["label without image"]
    assert inspect_page.mistakes(found) == 8  # the ghost's unknown ids too
    text, document = inspect_page.text(found), inspect_page.document(found)
    for kind in texts:
        assert kind in text and kind in document
    assert "<p class=wrong>8 problems" in document


def test_a_copy_in_another_format_is_noticed_within_a_split(copy: Path) -> None:
    first, second, *_ = image_files(copy)
    Image.open(first).save(second, compress_level=0)
    assert kinds(copy) == {"the same image twice": 1}
    assert first.read_bytes() != second.read_bytes()


def test_train_ids_in_place_of_label_ids(copy: Path) -> None:
    for split in ("train", "val"):
        for path in label_files(copy, split):
            Image.fromarray(to_train_ids(read_label_ids(path), path)).save(path)
    found = kinds(copy)
    assert found["labels look like train ids"] == 1 and found["unknown label ids"] == 6


def test_colour_labels_and_missing_splits(copy: Path) -> None:
    path = label_files(copy)[0]
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(path)
    shutil.rmtree(copy / "leftImg8bit" / "val")
    shutil.rmtree(copy / "gtFine" / "val")
    found = inspect_data.inspect(copy)
    texts = {problem.kind: problem.text for problem in found.problems}
    assert f"{path}: holds RGB colours" in texts["unreadable label"]
    assert texts["empty split"] == "data.val_split: 'val' has no image (splits there: train, test)"


def test_two_files_for_one_image_and_instances_of_some(copy: Path) -> None:
    first = image_files(copy)[0]
    shutil.copy(first, first.with_suffix(".jpg"))
    next((copy / "gtFine" / "train").glob("*/*_instanceIds.png")).unlink()
    found = inspect_data.inspect(copy)
    texts = {problem.kind: problem.text for problem in found.problems}
    assert (
        str(first) in texts["two files for one image"]
        and "1 of 4 labels" in texts["no instance ids beside some labels"]
    )


def test_the_table_is_an_argument(sample_root: Path) -> None:
    found = inspect_data.inspect(sample_root, names=[*LABEL_NAMES[:33]], evaluated=[7, 8])
    assert list(found.shares("train")) == ["road", "sidewalk"] and sum(found.shares("train").values()) == pytest.approx(
        1
    )
    assert sum(problem.kind == "unknown label ids" for problem in found.problems) > 0  # id 33 is no longer known


def test_overlays_show_images_of_the_rarest_classes(found: Inspection, sample_root: Path) -> None:
    document = inspect_page.document(found)
    shares = found.shares("train")
    rarest = min(shares, key=lambda name: shares[name])
    pixels = {
        sample.name: int((read_pair(sample)[1] == LABEL_NAMES.index(rarest)).sum())
        for sample in Cityscapes(sample_root, "train").samples
    }
    best = max(pixels, key=lambda name: pixels[name])
    assert f"{best} (most {rarest}" in document
    assert 1 + 2 * 3 <= document.count("<img") <= 1 + 2 * 6


def test_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none \(data.root\): no such folder"):
        inspect_data.inspect(tmp_path / "none")
    with pytest.raises(UserError, match=r"\(data.root\): no image in it; expected leftImg8bit/<split>"):
        inspect_data.inspect(tmp_path)


# ---------------------------------------------------------------- the program


def tool(*arguments: object, name: str = "inspect", cwd: str | Path = "/") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_program(sample_root: Path, copy: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text("task: seg\nlength: 2 steps\nbatch_size: 2\ndata: {val_split: mini}\n")
    done = tool(config, f"data.root={sample_root}")
    assert (
        done.returncode == 1 and "data.val_split: 'mini' has no image (splits there: train, val, test)" in done.stdout
    )
    done = tool(config, "data.val_split=val", f"data.root={sample_root}", "--out", tmp_path / "new" / "report.html")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "page with pictures: " in done.stdout
    assert (tmp_path / "new" / "report.html").read_text().count("<img") > 5
    image_files(copy)[0].write_bytes(b"")
    done = tool(f"data.root={copy}", cwd=ROOT / "tools")  # where the empty entry of the path is this folder
    assert done.returncode == 1 and "unreadable image (1)" in done.stdout and "zero bytes" in done.stdout


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["data.root=/nowhere"], "error: /nowhere (data.root): no such folder"),
        (["data.roott=/x"], "did you mean data.root?"),
        (["data.name=voc", "data.root=/tmp"], "data.name: voc, but only the Cityscapes layout"),
        (["a.yaml", "b.yaml"], "a.yaml, b.yaml: more than one config"),
        (["data.root=/tmp", "--out", "/proc/x.html"], "error: /proc: cannot write there"),
        (["data.root=/tmp", "--out", "/tmp"], "--out: /tmp is a folder"),
        ([], "give data.root=FOLDER, or a config"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments: list[str], text: str) -> None:
    done = tool(*arguments)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr


def test_the_other_programs_still_find_the_module_of_the_standard_library() -> None:
    """A program's folder comes first on Python's path, and with it tools/inspect.py."""
    check = (
        "import sys; sys.path.insert(0, {!r}); import inspect, dataclasses; print(inspect.signature, inspect.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", check.format(str(ROOT / "tools"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout and "function signature" in done.stdout
    code = (ROOT / "tools" / "train.py").read_text()
    assert "import inspect" not in code  # so it is a library that asks for it, as here:
    done = tool("nowhere.yaml", name="train")
    assert done.returncode == 2 and done.stderr == "error: nowhere.yaml: no such config file\n"

"""Inspection of data sets: numbers against counts made here, each kind of damage by its name, and the program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.errors import UserError
from seg import inspect_data, inspect_page
from seg.config import DataConfig
from seg.data import Cityscapes, read_pair, read_rgb
from seg.datasets import samples
from seg.inspect_data import Inspection
from seg.labels import (
    IGNORE,
    LABEL_NAMES,
    TRAIN_CLASSES,
    TRAIN_LABEL_IDS,
    read_instance_ids,
    read_label_ids,
    table,
    to_train_ids,
)
from tests import programs
from tests.seg import layouts

ROOT = Path(inspect_data.__file__).parents[1]


@pytest.fixture(scope="module")
def found(sample_root: Path) -> Inspection:
    return inspect(sample_root)


@pytest.fixture
def copy(sample_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_root, tmp_path / "data"))


def inspect(root: Path, **data: Any) -> Inspection:
    return inspect_data.inspect(DataConfig.model_validate({"root": root, **data}))


def label_files(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / "gtFine" / split).glob("*/*_labelIds.png"))


def image_files(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / "leftImg8bit" / split).glob("*/*.png"))


def kinds(root: Path) -> Counter[str]:
    """How often each kind of problem is found, notes on classes left out."""
    problems = inspect(root).problems
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
        assert found.class_images(split)[0] == sum((one == 7).any() for one in labels)
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
    cities = str(len({path.parent for path in image_files(found.data.root)}))
    assert any(line[:5] == ["train", "4", "4", cities, "128x64"] for line in lines) and "not read" in text
    assert "\n0 problems and " in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert set(TRAIN_CLASSES) <= set(rows)
    assert f"{100 * found.shares('train')['road']:.3f}" in rows["road"]


def test_a_training_on_several_splits(found: Inspection, sample_root: Path) -> None:
    both = inspect(sample_root, train_split="train+val")
    sums = np.add(found.class_pixels("train"), found.class_pixels("val"))
    assert both.class_pixels("train+val") == sums.tolist() and both.splits == found.splits
    assert inspect_page.mistakes(both) == 0 and both.colours("train+val") != found.colours("train")


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
    texts = {problem.kind: [] for problem in inspect(copy).problems}
    for problem in inspect(copy).problems:
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
    found = inspect(copy)
    texts = {problem.kind: problem.text for problem in found.problems}
    assert str(images[0]) in texts["unreadable image"]
    assert texts["label of another size than its image"] == f"{labels[1]}: 100 x 64, its image 128 x 64"
    assert "99 (3 pixels), 255 (2 pixels); Cityscapes label ids are 0 to 33" in texts["unknown label ids"]
    assert texts["image without label"] == str(images[3])
    assert (
        "/val/" in texts["the same image in several splits"] and "/test/" in texts["the same image in several splits"]
    )
    assert texts["image of one colour"] == str(image_files(copy, "val")[1])
    assert "ghost_000000_000019" in texts["label without image"]
    assert inspect_page.mistakes(found) == 9  # the ghost has unknown ids and no instance ids too
    text, document = inspect_page.text(found), inspect_page.document(found)
    for kind in texts:
        assert kind in text and kind in document
    assert "<p class=wrong>9 problems" in document


def test_camera_values_of_12_bits_are_told(copy: Path) -> None:
    path = image_files(copy, "val")[0]
    grey = np.arange(64 * 128, dtype=np.uint16).reshape(64, 128) % 4096
    Image.fromarray(grey).save(path)
    told = {problem.kind: problem.text for problem in inspect(copy).problems}
    assert told["image that is almost black"].startswith(f"{path}: its brightest value is 15 of 255; of 16 bits")


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
    found = inspect(copy)
    texts = {problem.kind: problem.text for problem in found.problems}
    assert f"{path}: holds RGB colours" in texts["unreadable label"]
    assert texts["split that cannot be used"].startswith(
        f"val: {copy}/leftImg8bit: has no split 'val' (splits there: test, train). Download"
    )


def test_two_files_for_one_image_and_instances_of_some(copy: Path) -> None:
    first = image_files(copy)[0]
    shutil.copy(first, first.with_suffix(".jpg"))
    next((copy / "gtFine" / "train").glob("*/*_instanceIds.png")).unlink()
    found = inspect(copy)
    texts = {problem.kind: problem.text for problem in found.problems}
    assert (
        str(first) in texts["two files for one image"]
        and "1 of 4 labels" in texts["no instance ids beside some labels"]
    )


def test_damaged_instance_ids(copy: Path) -> None:
    first, second, *_ = sorted((copy / "gtFine" / "train").glob("*/*_instanceIds.png"))
    first.write_bytes(first.read_bytes()[:200])
    Image.fromarray(read_instance_ids(second)[:, :100]).save(second)
    texts = {problem.kind: problem.text for problem in inspect(copy).problems}
    assert texts["unreadable instance ids"].startswith(f"{first}: is truncated or damaged")
    assert texts["instance ids of another size than its image"] == f"{second}: 100 x 64, its image 128 x 64"


def test_instance_ids_that_scoring_refuses(copy: Path) -> None:
    first, second, *_ = sorted((copy / "gtFine" / "train").glob("*/*_instanceIds.png"))
    for path, wrong in ((first, 7001), (second, 34001)):
        ids = read_instance_ids(path)
        ids[0, 0] = wrong
        Image.fromarray(ids).save(path)
    texts = [problem.text for problem in inspect(copy).problems if problem.kind == "wrong instance ids"]
    assert texts[0] == f"{first}: instance id 7001, but the class 'road' has no instances."
    assert texts[1].startswith(f"{second}: unknown instance id 34001") and len(texts) == 2


def test_training_images_that_scaling_would_spoil(copy: Path) -> None:
    too_many = {"base_size": 30000}
    texts = [one.text for one in inspect(copy, **too_many).problems if one.kind == "image that cannot be scaled"]
    assert texts[0].startswith(f"{image_files(copy)[0]}: has 128 x 64 pixels, too many to be scaled to a shorter side")
    assert len(texts) == len(image_files(copy))  # those of val are not scaled at random


def test_coarse_labels_are_looked_at_if_training_takes_them(copy: Path) -> None:
    for path in image_files(copy):
        name = path.name.removesuffix("_leftImg8bit.png")
        image = copy / "leftImg8bit" / "train_extra" / "ulm" / f"x{path.name}"
        label = copy / "gtCoarse" / "train_extra" / "ulm" / f"x{name}_gtCoarse_labelIds.png"
        layouts.put(image, 255 - read_rgb(path))
        layouts.put(label, np.full((64, 128), 7, np.uint8))
    assert inspect(copy).splits == ["train", "val", "test"]
    found = inspect(copy, coarse_share=0.5)
    assert found.splits == ["train", "train_extra", "val", "test"] and inspect_page.mistakes(found) == 0
    assert found.class_pixels("train_extra") == [4 * 64 * 128, *[0] * 18]
    label.unlink()
    assert [p.text for p in inspect(copy, coarse_share=0.5).problems if p.kind == "image without label"] == [str(image)]


# ---------------------------------------------------------------- the other layouts


@pytest.mark.parametrize("name", layouts.WRITERS)
def test_each_layout_is_counted_as_training_reads_it(tmp_path: Path, name: str) -> None:
    layouts.WRITERS[name](tmp_path)
    found = inspect(tmp_path, name=name)
    labels = table(found.data)
    assert found.labels == labels and found.splits == ["train", "val", "test"]
    for split in ("train", "val"):
        every = samples(found.data, split)
        assert [(e.image, e.label) for e in found.of(split)] == sorted((s.image, s.label) for s in every)
        ids = [labels.to_train_ids(read_pair(sample)[1], "") for sample in every]
        pixels = np.sum([np.bincount(one.ravel(), minlength=256) for one in ids], 0)[: labels.num_classes]
        assert found.class_pixels(split) == pixels.tolist()
        assert found.class_images(split) == [sum((one == c).any() for one in ids) for c in range(labels.num_classes)]
    wrong = [p.text for p in found.problems if p.kind not in inspect_page.NOTES]
    # the only image of the test list here is one of val's too
    assert [text.partition("JPEGImages/")[2] for text in wrong] == ["2007_val0.jpg in 'val' and 'test'"] * (
        name == "voc"
    )
    text, document = inspect_page.text(found), inspect_page.document(found)
    assert text.startswith(f"{tmp_path}: {labels.name}, {labels.num_classes} classes\n") and "not read" in (
        text if name != "camvid" else "not read"
    )
    assert ("cities" in text) == (name in ("camvid", "acdc")) and ("<h2>Cities</h2>" in document) == ("cities" in text)
    assert document.count("<img") >= 1 + 2 * 3


@pytest.mark.parametrize("name", layouts.WRITERS)
def test_each_layouts_damage_is_named(tmp_path: Path, name: str) -> None:
    layouts.WRITERS[name](tmp_path)
    cfg = DataConfig(name=name, root=tmp_path)  # type: ignore[arg-type]
    first, second, third, *_ = samples(cfg, "train")
    assert first.label and second.label and third.label
    first.label.unlink()
    ids = read_label_ids(second.label)
    known = {label.id for label in table(cfg).labels}
    strange = next(i for i in range(256) if i not in known)
    ids[0, :3] = strange
    Image.fromarray(ids).save(second.label)
    third.image.write_bytes(third.image.read_bytes()[:90])
    texts = {problem.kind: problem.text for problem in inspect(tmp_path, name=name).problems}
    if name == "voc":  # whose list names the file, which then cannot be read
        assert texts["unreadable label"] == f"{first.label}: cannot be read (No such file or directory)."
    else:
        assert texts["image without label"] == str(first.image)
    assert texts["unknown label ids"].startswith(f"{second.label}: unknown label ids {strange} (3 pixels); ")
    assert texts["unreadable image"].startswith(f"{third.image}: ")
    with pytest.raises(UserError):
        samples(cfg, "train")


@pytest.mark.parametrize("name", layouts.WRITERS)
def test_a_wrong_folder_is_the_error_of_a_training(tmp_path: Path, name: str) -> None:
    cfg = DataConfig(name=name, root=tmp_path)  # type: ignore[arg-type]
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError) as trained:
            samples(cfg.model_copy(update={"root": root}), "train")
        with pytest.raises(UserError) as inspected:
            inspect(root, name=name)
        assert str(inspected.value) == str(trained.value) and str(root) in str(trained.value)


def test_images_turned_by_their_orientation_are_told(tmp_path: Path) -> None:
    layouts.folder(tmp_path)
    paths = [tmp_path / "images/train/day0/shot 0.jpg", tmp_path / "images/test/day0/shot 0.jpg"]
    for path in paths:
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down: the size of its label still fits
        Image.open(path).save(path, exif=exif)
    found = inspect(tmp_path, name="folder")
    texts = [problem.text for problem in found.problems if problem.kind == "images turned by their EXIF orientation"]
    assert len(texts) == 1 and texts[0].startswith(f"split 'train': 1, the first is {paths[0]}; ")
    assert "turned by its EXIF orientation" in inspect_page.document(found)
    assert inspect_page.mistakes(found) == 0


def test_one_class_alone_is_told(tmp_path: Path) -> None:
    layouts.folder(tmp_path)
    ignored = layouts.LABELS.replace("train_id: 0", "ignore: true").replace("train_id: 2", "ignore: true")
    (tmp_path / "labels.yaml").write_text(ignored.replace("train_id: 1", "train_id: 0"))
    kinds = {problem.kind: problem.text for problem in inspect(tmp_path, name="folder").problems}
    assert kinds["one class alone"].startswith("road: ")


def test_merged_and_ignored_labels_of_a_folder(tmp_path: Path) -> None:
    layouts.folder(tmp_path)
    found = inspect(tmp_path, name="folder")
    ids = [read_label_ids(sample.label) for sample in samples(found.data, "train") if sample.label]
    assert found.class_pixels("train")[0] == sum(int(np.isin(one, (3, 4)).sum()) for one in ids)
    rows = {row[0]: row[1:3] for row in inspect_page._id_rows(found)[1]}
    assert rows == {
        "3": ["car", "class"],
        "4": ["truck", "counts as car"],
        "40": ["road", "class"],
        "200": ["void", "void"],
    }
    assert table(found.data).labels[-1].train_id == IGNORE
    stray = next((tmp_path / "masks/train").rglob("*.png"))
    stray.rename(stray.with_name(f"{stray.stem}_mask.png"))
    texts = {problem.kind: problem.text for problem in inspect(tmp_path, name="folder").problems}
    assert texts["image without label"].endswith(f"(there is 'day0/{stray.stem}_mask'; names must be equal)")
    assert texts["label without image"].endswith(f"{stray.stem}_mask.png")


@pytest.mark.parametrize("hidden", [["train"], ["val"], ["train", "val"]])
def test_a_split_without_labelled_pixels(tmp_path: Path, hidden: list[str]) -> None:
    layouts.folder(tmp_path)
    for split in hidden:
        layouts.hide(tmp_path, split)
    found = inspect(tmp_path, name="folder")
    texts = [p.text for p in found.problems if p.kind == "split without labelled pixels"]
    assert [text.partition(":")[0] for text in texts] == hidden and inspect_page.mistakes(found) == len(hidden)
    pixels = sum(read_label_ids(path).size for path in (tmp_path / "masks" / hidden[0]).rglob("*.png"))
    assert f"none of its {pixels:,} label pixels has an evaluated class" in texts[0]
    assert "split without labelled pixels (" in inspect_page.document(found)


def test_a_split_that_has_no_public_labels_is_not_for_training(sample_root: Path) -> None:
    for splits in ({"val_split": "test"}, {"train_split": "train+test"}):
        found = inspect(sample_root, **splits)
        assert [p.text for p in found.problems if p.kind == "split without labels"] == [
            "test: has no public labels, so nothing is trained or scored on it; name another split"
        ]
        assert inspect_page.mistakes(found) == 1


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


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    layouts.folder(tmp_path)
    image = next((tmp_path / "images/train/day0").iterdir())
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/\xff.png"))
    found = inspect(tmp_path, name="folder")
    text, document = inspect_page.text(found), inspect_page.document(found)
    assert r"\udcff.png" in text and r"\udcff.png" in document and text.encode() and document.encode()


# ---------------------------------------------------------------- the program


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return programs.run("inspect", *arguments, cwd="/")


def python(name: str, *arguments: object, cwd: str | Path) -> subprocess.CompletedProcess[str]:
    """A program in a new Python, which finds the modules that it imports by itself."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_program(sample_root: Path, copy: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text("task: seg\nlength: 2 steps\nbatch_size: 2\ndata: {val_split: mini}\n")
    done = tool(config, f"data.root={sample_root}")
    assert done.returncode == 1 and f"mini: {sample_root}/leftImg8bit: has no split 'mini' (splits" in done.stdout
    done = tool(config, "data.val_split=val", f"data.root={sample_root}", "--out", tmp_path / "new" / "report.html")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "page with pictures: " in done.stdout
    assert (tmp_path / "new" / "report.html").read_text().count("<img") > 5
    image_files(copy)[0].write_bytes(b"")
    done = python(
        "inspect", f"data.root={copy}", cwd=ROOT / "tools"
    )  # where the empty entry of the path is this folder
    assert done.returncode == 1 and "unreadable image (1)" in done.stdout and "zero bytes" in done.stdout


def test_opencv_does_not_tell_of_a_damaged_file_too(copy: Path) -> None:
    for path in (image_files(copy)[0], label_files(copy)[1]):
        path.write_bytes(path.read_bytes()[:-200])
    done = python("inspect", f"data.root={copy}", cwd="/")
    assert done.returncode == 1 and "unreadable image (1)" in done.stdout and "unreadable label (1)" in done.stdout
    # libpng prints a line of its own, whatever OpenCV is told
    assert all(line.startswith("libpng error: ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["data.root=/nowhere"], "error: /nowhere (data.root): no such folder"),
        (["data.roott=/x"], "did you mean data.root?"),
        (["data.name=voc", "data.root=/nowhere"], "error: /nowhere (data.root): no such folder; expected"),
        (["data.name=vok", "data.root=/tmp"], "data.name: found 'vok', expected"),
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
    done = python("train", "nowhere.yaml", cwd="/")
    assert done.returncode == 2 and done.stderr == "error: nowhere.yaml: no such config file\n"

"""One's own images and masks: suffixes, folders of other names, lists, and one folder that is divided."""

from __future__ import annotations

import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import load
from engine.errors import UserError
from seg import datasets, inspect_data, inspect_page, train
from seg.config import DataConfig, SegConfig
from seg.evaluate import evaluate_predictions
from tests.seg.layouts import LABELS, folder
from tests.seg.test_datasets import TINY, config


def own(root: Path, **options: Any) -> DataConfig:
    return config("folder", root, **options).data


def names(cfg: DataConfig, split: str) -> list[str]:
    return [sample.name for sample in datasets.samples(cfg, split)]


def error(cfg: DataConfig, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        datasets.samples(cfg, split)
    return str(caught.value)


def renamed(root: Path, images: str, masks: str, image_suffix: str = "", mask_suffix: str = "") -> Path:
    """The files of `folder` below other folders, with these suffixes."""
    folder(root / "plain")
    for kind, to, suffix in (("images", images, image_suffix), ("masks", masks, mask_suffix)):
        for path in (root / "plain" / kind).rglob("*.*"):
            target = root / to / path.relative_to(root / "plain" / kind).with_stem(path.stem + suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (root / "labels.yaml").write_text(LABELS)
    return root


def flat(root: Path, count: int = 100, mask_suffix: str = "") -> Path:
    """Empty files; folders of the images are no splits."""
    for i in range(count):
        for kind, name in (("images", f"drive{i % 3}/{i}.jpg"), ("masks", f"drive{i % 3}/{i}{mask_suffix}.png")):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (root / kind / name).touch()
    return root


def listed(root: Path, split: str, *lines: str) -> None:
    (root / "lists").mkdir(parents=True, exist_ok=True)
    (root / "lists" / f"{split}.txt").write_text("\n".join(lines) + "\n")


VAL = [f"drive{i % 3}/{i}" for i in (12, 33, 54, 60, 81, 1, 19, 52, 70, 79, 17, 2, 5, 68)]
"""Those of `flat` whose blake2b of 8 bytes, as a share of 2**64, is below 0.2."""


# ---------------------------------------------------------------- names and folders


@pytest.mark.parametrize(
    "images, masks, ends",
    [
        ("images", "masks", ("_leftImg8bit", "_gtFine_labelIds")),
        ("img_dir", "ann_dir", ("", "_mask")),
        (".", ".", ("", "_mask")),  # one folder: x.jpg and x_mask.png
        (".", ".", ("_rgb", "_mask_rgb")),
        (".", ".", ("_sat", "")),
    ],
)
def test_other_folders_and_suffixes_are_the_same_samples(
    tmp_path: Path, images: str, masks: str, ends: tuple[str, str]
) -> None:
    root = renamed(tmp_path / "data", images, masks, *ends)
    shutil.move(root / "plain", tmp_path)
    cfg = own(root, images=images, masks=masks, image_suffix=ends[0], mask_suffix=ends[1])
    for split in ("train", "val", "test", "train+val"):
        assert names(cfg, split) == names(own(tmp_path / "plain"), split)
    for sample in datasets.samples(cfg, "train"):
        assert sample.image.stem == Path(sample.name).name + ends[0]
        assert sample.label and sample.label.stem == Path(sample.name).name + ends[1]
    assert all(sample.label is None for sample in datasets.samples(cfg, "test"))
    assert inspect_page.mistakes(inspect_data.inspect(cfg, say=lambda _: None)) == 0


def test_predictions_may_be_called_as_any_of_the_files(tmp_path: Path) -> None:
    root = renamed(tmp_path, "images", "masks", "_img", "_mask")
    cfg = own(root, image_suffix="_img", mask_suffix="_mask")
    for number, called in enumerate(("shot 0_img", "shot 0_mask", "shot 0", "shot 0_img_labelIds")):
        out = tmp_path / f"predictions{number}"
        for sample in datasets.samples(cfg, "val"):
            assert sample.label is not None
            out.mkdir(exist_ok=True)
            shutil.copy(sample.label, out / f"{called.replace('0', sample.label.stem[5])}.png")
        assert evaluate_predictions(out, cfg).mean_iou == 1


@pytest.mark.parametrize("ends", [("", "_mask"), ("_rgb", ""), ("_leftImg8bit", "_gtFine_labelIds")])
def test_suffixes_that_would_pair_the_files_are_proposed(tmp_path: Path, ends: tuple[str, str]) -> None:
    root = renamed(tmp_path, "images", "masks", *ends)
    keys = [f"data.{key}={end}" for key, end in zip(("image_suffix", "mask_suffix"), ends, strict=True) if end]
    told = f"With {' '.join(keys)} every image has its mask."
    assert told in error(own(root))
    problems = inspect_data.inspect(own(root), say=lambda _: None).problems
    assert [p.text for p in problems if p.kind == "suffixes that are not given"] == [f"train: {told}", f"val: {told}"]
    if ends[0]:
        return
    for path in [*(root / "masks").rglob("*_mask.png")]:
        shutil.copy(path, path.with_stem(path.stem.replace("_mask", "_color")))
    assert "With data.mask_suffix=_color or _mask every image has its mask." in error(own(root))
    next((root / "masks/train").rglob("*.png")).unlink()
    assert "With data.mask_suffix=_mask every" in error(own(root))


def test_no_suffix_is_proposed_where_one_mask_is_missing(tmp_path: Path) -> None:
    folder(tmp_path)
    next((tmp_path / "masks/train").rglob("*.png")).unlink()
    assert "1 of 4 images have no mask" in error(own(tmp_path)) and "With data." not in error(own(tmp_path))


def test_a_suffix_that_no_file_has(tmp_path: Path) -> None:
    folder(tmp_path)
    for key, kind in (("image_suffix", "images"), ("mask_suffix", "masks")):
        told = error(own(tmp_path, **{key: "_x"}))
        assert told.startswith(
            f"{tmp_path}/{kind}/train: none of its 4 image files has a name that ends in '_x' (data.{key})"
        )
        assert "the first is day0/shot 0." in told


def test_keys_that_are_wrong_or_without_effect(tmp_path: Path) -> None:
    values = {"images": "x", "masks": "x", "image_suffix": "_x", "mask_suffix": "_x", "lists": "x", "val_share": 0.1}
    for key, value in values.items():
        with pytest.raises(ValidationError, match=f"{key} has no effect with name: voc, whose layout is fixed"):
            config("voc", tmp_path, **{key: value})
    for end in ("_mask.png", ".PNG", "a/b"):
        with pytest.raises(ValidationError, match=r"expected what names end in before the extension, such as _mask"):
            own(tmp_path, mask_suffix=end)
    with pytest.raises(ValidationError, match="val_share has no effect with lists"):
        own(tmp_path, lists=".", val_share=0.1)
    with pytest.raises(ValidationError, match="images and masks are one folder, 'masks'; give image_suffix or mask"):
        own(tmp_path, images="masks")
    with pytest.raises(ValidationError, match="less than 1"):
        own(tmp_path, val_share=1)


# ---------------------------------------------------------------- one folder that is divided


def test_the_division_goes_by_the_names_alone(tmp_path: Path) -> None:
    root = flat(tmp_path)
    train, val = (names(own(root, val_share=0.2), split) for split in ("train", "val"))
    assert not set(train) & set(val) and len(train) + len(val) == 100
    assert val == VAL
    assert set(val) < set(names(own(root, val_share=0.4), "val"))
    few = own(flat(tmp_path / "few", 40), val_share=0.2)
    assert names(few, "val") == [name for name in val if int(name.rpartition("/")[2]) < 40]
    for path in list((root / "images").rglob("*.jpg")):  # another format, read in another order
        path.rename(path.with_suffix(".png"))
    assert names(own(root, val_share=0.2), "val") == val
    assert sorted(names(own(root, val_share=0.2), "val+train")) == sorted(train + val)


def test_composed_and_decomposed_names_are_the_same_side(tmp_path: Path) -> None:
    """macOS keeps names decomposed; a share of 0.5 would divide some of these if that told."""
    sides = []
    for form in ("NFC", "NFD"):
        for i in range(20):
            for kind in ("images", "masks"):
                path = tmp_path / form / kind / unicodedata.normalize(form, f"Straße für {i}.png")  # type: ignore[arg-type]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        val = names(own(tmp_path / form, val_share=0.5), "val")
        sides.append({unicodedata.normalize("NFC", name) for name in val})
    assert sides[0] == sides[1] and 0 < len(sides[0]) < 20


def test_a_folder_test_is_no_part_of_the_division(tmp_path: Path) -> None:
    root = flat(tmp_path)
    cfg = own(root, val_share=0.2)
    before = names(cfg, "train"), names(cfg, "val")
    (root / "images/test").mkdir()
    (root / "images/test/0.jpg").touch()
    assert (names(cfg, "train"), names(cfg, "val"), names(cfg, "test")) == (*before, ["0"])
    with pytest.raises(UserError, match="data.val_share makes no split 'dev'; expected train, val, or test"):
        datasets.samples(cfg, "dev")


def test_what_a_division_refuses(tmp_path: Path) -> None:
    folder(tmp_path / "split")
    told = error(own(tmp_path / "split", val_share=0.2))
    assert "images/train: data.val_share=0.2 divides a folder that has no train and val in it; set it to 0, or" in told
    assert "data.images=images/train data.masks=masks/train." in told
    one = own(tmp_path / "split", images="images/train", masks="masks/train", val_share=0.6)
    assert len(names(one, "train")) + len(names(one, "val")) == 4
    few = own(flat(tmp_path / "few", 3), val_share=0.001)
    assert "none of the 3 images is val with data.val_share=0.001; choose another share, or list" in error(few, "val")
    root = flat(tmp_path / "lonely")
    cfg = own(root, val_share=0.2)
    (root / "masks/drive0/more.png").touch()
    for split in ("train", "val"):
        assert "masks have no image" in error(cfg, split)
    root = flat(tmp_path / "ends", mask_suffix="_mask")
    for split in ("train", "val"):
        assert "With data.mask_suffix=_mask every image" in error(own(root, val_share=0.2), split)
    assert names(own(root, val_share=0.2, mask_suffix="_mask"), "val") == VAL
    assert "data.val_share" in error(own(root))  # a folder without train/ and val/ is told of it


def test_the_division_is_told_by_training_and_inspection(tmp_path: Path, monkeypatch: Any) -> None:
    folder(tmp_path / "data")
    (tmp_path / "tiny.yaml").write_text(TINY)
    changes = [f"data.root={tmp_path}/data", "data.images=images/train", "data.masks=masks/train", "data.val_share=0.6"]
    loaded = load(tmp_path / "tiny.yaml", changes, SegConfig)
    val = len(names(loaded.config.data, "val"))
    expected = f"{val} of 4 images are val (data.val_share=0.6, by a hash of their names); neighbouring frames"
    said: list[str] = []
    monkeypatch.setattr(train.Log, "message", lambda self, text: said.append(text))
    monkeypatch.setattr(train, "fit", lambda *args, **options: None)
    train.run(loaded, tmp_path / "run")
    assert expected in "".join(said) and 0 < val < 4
    found = inspect_data.inspect(loaded.config.data, say=lambda _: None)
    assert expected in inspect_page.text(found) and expected in inspect_page.document(found)
    plain = inspect_data.inspect(own(tmp_path / "data"), say=lambda _: None)
    assert "val_share" not in inspect_page.text(plain) + inspect_page.document(plain)


# ---------------------------------------------------------------- lists


def test_lists_of_names(tmp_path: Path) -> None:
    root = renamed(tmp_path, "img_dir", "ann_dir", "_img", "_mask")
    listed(root, "train", "day1/shot 1", "", "train/day0/shot 2  ", "day0/shot 0_img.jpg")
    listed(root, "val", "day0/shot 0")
    listed(root, "test", "day0/shot 0")
    options = {"images": "img_dir", "masks": "ann_dir", "image_suffix": "_img", "mask_suffix": "_mask"}
    cfg = own(root, lists="lists", **options)
    assert names(cfg, "train") == ["train/day1/shot 1", "train/day0/shot 2", "train/day0/shot 0"]
    plain = {sample.image: sample.label for sample in datasets.samples(own(root, **options), "train")}
    assert all(plain[sample.image] == sample.label for sample in datasets.samples(cfg, "train"))
    assert names(cfg, "val") == ["val/day0/shot 0"] and names(cfg, "val+train")[0] == "val/day0/shot 0"
    assert datasets.samples(cfg, "test")[0].label is None
    assert inspect_page.mistakes(inspect_data.inspect(cfg, say=lambda _: None)) == 0


def test_lists_of_pairs(tmp_path: Path) -> None:
    root = renamed(tmp_path, "JPEGImages", "Annotations")
    pictures = sorted((root / "JPEGImages").rglob("*.*"), key=lambda path: random.Random(path.name).random())
    used = [path for path in pictures if "test" not in path.parts]
    lines = [(path.relative_to(root), root / "Annotations" / path.relative_to(root / "JPEGImages")) for path in used]
    pairs = [
        f"{image}{' ' if i % 2 else ' 	'}{mask.relative_to(root).with_suffix('.png')}"
        for i, (image, mask) in enumerate(lines)
    ]
    listed(root, "train", *pairs[:4])
    listed(root, "val", *pairs[4:])
    listed(root, "test", "JPEGImages/test/day0/shot 0.jpg")
    for more in ({}, {"images": "JPEGImages", "masks": "Annotations"}):
        cfg = own(root, lists=root / "lists", **more)
        found = datasets.samples(cfg, "train+val")
        assert [sample.image for sample in found] == used
        assert [sample.label for sample in found] == [mask.with_suffix(".png") for _, mask in lines]
        assert len({sample.name for sample in found}) == 6
        assert datasets.samples(cfg, "test")[0].label is None


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["0", "", "1", "0"], "line 4: names {root}/images/0.jpg, as line 1 does; expected each image once"),
        (["0", "images/0.jpg"], "line 2: names {root}/images/0.jpg, as line 1 does"),
        (["0", "7", "8"], "line 2: no image '7' below {root}/images (2 lines are wrong, this is the first)"),
        (["2"], "line 1: no image '2' below {root}/images (there is '2_img'; names must be equal)"),
        (["images/7.jpg masks/0.png"], "line 1: no image {root}/images/7.jpg. Expected"),
        (["images/0.jpg\tmasks/7.png"], "line 1: no mask {root}/masks/7.png. Expected"),
        (["a b c"], "line 1: no image 'a b c' below {root}/images. Expected"),
        (["x" * 5000], "line 1: no image 'xxx"),
        (["3", "0"], "line 1: no mask '3' below {root}/masks (there is '3_mask'; names must be equal)"),
        (["4"], "line 1: '4' may be {root}/images/4.jpg or {root}/images/4.png; remove or rename one of them"),
        (["5"], "line 1: '5' may be {root}/images/5.jpg or {root}/images/train/5.jpg; remove"),
        (["", " "], "train.txt: names no image. Expected in each line the name of an image below data.images"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path: Path, lines: list[str], expected: str) -> None:
    there = ("images/0.jpg", "images/1.jpg", "images/2_img.jpg", "images/3.jpg", "images/4.jpg", "images/4.png")
    for name in (*there, "images/5.jpg", "images/train/5.jpg", "masks/0.png", "masks/1.png", "masks/3_mask.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed(tmp_path, "train", *lines)
    told = error(own(tmp_path, lists="lists"))
    assert told.startswith(f"{tmp_path}/lists/train.txt: ") and expected.format(root=tmp_path) in told


def test_lists_that_are_missing_or_no_text(tmp_path: Path) -> None:
    folder(tmp_path)
    cfg = own(tmp_path, lists="lists")
    assert f"{tmp_path}/lists: no such folder" in error(cfg) and "Put train.txt and val.txt into it." in error(cfg)
    listed(tmp_path, "val", "day0/shot 0")
    assert "lists/train.txt: no such list (lists there: val). Expected in each line" in error(cfg)
    (tmp_path / "lists/train.txt").write_bytes(b"caf\xe9\n")
    assert "an image's name, or the paths of image and mask, in each line, in UTF-8" in error(cfg)
    shutil.rmtree(tmp_path / "images")
    assert f"since there is no folder {tmp_path}/images (data.images)" in error(cfg, "val")


def test_an_image_by_other_spellings_of_its_path_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat(tmp_path, 3)
    monkeypatch.chdir(tmp_path.parent)
    cfg = own(Path(tmp_path.name), lists="lists")
    first = "images/drive0/0.jpg masks/drive0/0.png"
    for again in (f"{tmp_path}/images/drive0/0.jpg {tmp_path}/masks/drive0/0.png", f"images/../{first}"):
        listed(tmp_path, "train", first, again)
        assert "line 2: names" in error(cfg) and "as line 1 does" in error(cfg)
        listed(tmp_path, "train", again)
        assert names(cfg, "train") == ["drive0/0"]
        assert datasets.samples(cfg, "train")[0].image == Path(tmp_path.name, "images/drive0/0.jpg")
    listed(tmp_path, "train", f"{tmp_path}/images/drive1/1.jpg")
    assert names(cfg, "train") == ["drive1/1"]


def test_masks_in_a_folder_below_the_images_are_none(tmp_path: Path) -> None:
    flat(tmp_path, 100)
    (tmp_path / "masks").rename(tmp_path / "images/masks")
    cfg = own(tmp_path, masks="images/masks", val_share=0.2)
    assert sorted(names(cfg, "val")) == sorted(VAL) and len(names(cfg, "train")) == 100 - len(VAL)

"""The index of the data set's files, augmentation, batches, and what bad data says."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine.errors import UserError
from engine.images import read_image
from seg import data
from seg.config import DataConfig, SegConfig
from seg.labels import IGNORE

HOW = "csDownload leftImg8bit_trainvaltest.zip"


def write(root: Path, split: str, count: int, size: tuple[int, int] = (40, 64), suffix: str = "png") -> list[Path]:
    """Random images and label maps; returns the image files."""
    rng = np.random.default_rng(count)
    files = []
    for i in range(count):
        city = ("aachen", "bonn")[i % 2]
        image = root / "leftImg8bit" / split / city / f"{city}_{i:06d}_000019_leftImg8bit.{suffix}"
        label = root / "gtFine" / split / city / f"{city}_{i:06d}_000019_gtFine_labelIds.png"
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
        Image.fromarray(rng.integers(0, 34, size, dtype=np.uint8)).save(label)
        files.append(image)
    return files


def label_of(image: Path) -> Path:
    text = str(image).replace("leftImg8bit.png", "gtFine_labelIds.png").replace("/leftImg8bit/", "/gtFine/")
    return Path(text)


def config(root: Path, batch_size: int = 2, workers: int = 0, **sections: Any) -> SegConfig:
    settings = {"root": root, "crop": (32, 48), "color_jitter": 0.3, **sections.pop("data", {})}
    runtime = {"workers": workers, "device": "cpu", **sections.pop("runtime", {})}
    return SegConfig.model_validate(
        {"length": "1 epochs", "batch_size": batch_size, "data": settings, "runtime": runtime, **sections}
    )


# ---------------------------------------------------------------- index


def test_files_are_found_in_a_fixed_order(tmp_path: Path) -> None:
    files = write(tmp_path, "train", 4)
    (files[0].parent / "._junk_leftImg8bit.png").write_bytes(b"resource fork")
    (files[0].parent / "notes.txt").write_text("x")
    found = data.Cityscapes(tmp_path, "train").samples
    assert [s.name for s in found] == [
        "aachen_000000_000019",
        "aachen_000002_000019",
        "bonn_000001_000019",
        "bonn_000003_000019",
    ]
    assert found[0] == data.Sample(files[0], label_of(files[0]), None, "aachen_000000_000019", "aachen")


def test_instance_ids_are_optional_but_complete(tmp_path: Path) -> None:
    files = write(tmp_path, "train", 2)
    instances = [Path(str(label_of(f)).replace("labelIds", "instanceIds")) for f in files]
    Image.fromarray(np.full((40, 64), 26001, np.uint16)).save(instances[0])
    with pytest.raises(
        UserError, match="half unpacked.*1 of 2 label files have no instance ids, others do.*instanceIds"
    ):
        data.Cityscapes(tmp_path, "train")
    Image.fromarray(np.full((40, 64), 26001, np.uint16)).save(instances[1])
    assert [s.instance for s in data.Cityscapes(tmp_path, "train").samples] == instances


def test_jpeg_images_and_sample_data(tmp_path: Path, sample_root: Path) -> None:
    write(tmp_path, "train", 1, suffix="jpg")
    assert data.read_pair(data.Cityscapes(tmp_path, "train").samples[0])[0].shape == (40, 64, 3)
    sample = data.Cityscapes(sample_root, "val").samples[0]
    assert sample.instance is not None
    image, label = data.read_pair(sample)
    assert image.shape == (64, 128, 3) and label.shape == (64, 128)


def test_labels_of_the_test_split_are_not_used(sample_root: Path) -> None:
    assert [s.label for s in data.Cityscapes(sample_root, "test").samples] == [None]


def test_missing_root() -> None:
    with pytest.raises(UserError, match="/no/such/place.*no such folder; expected leftImg8bit/ and gtFine/") as error:
        data.Cityscapes("/no/such/place", "val")
    assert HOW in str(error.value) and "make_sample.py" in str(error.value)


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine"])
def test_missing_folder_names_it_and_an_archive_beside_it(tmp_path: Path, kind: str) -> None:
    write(tmp_path, "val", 1)
    (tmp_path / kind).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"has no folder {kind}/") as error:
        data.Cityscapes(tmp_path, "val")
    assert HOW in str(error.value)
    (tmp_path / f"{kind}_trainvaltest.zip").touch()
    with pytest.raises(UserError, match=f"{kind}_trainvaltest.zip lies there and is not unpacked"):
        data.Cityscapes(tmp_path, "val")


def test_missing_split_lists_those_there(tmp_path: Path) -> None:
    write(tmp_path, "val", 1)
    with pytest.raises(UserError, match=r"leftImg8bit: has no split 'train' \(splits there: val\)"):
        data.Cityscapes(tmp_path, "train")


def test_empty_split(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit" / "val" / "aachen").mkdir(parents=True)
    with pytest.raises(
        UserError, match="leftImg8bit/val: the split is empty; expected <city>/.*leftImg8bit.png"
    ) as error:
        data.Cityscapes(tmp_path, "val")
    assert HOW in str(error.value)


def test_images_without_labels_and_labels_without_images(tmp_path: Path) -> None:
    files = write(tmp_path, "val", 4)
    label_of(files[1]).rename(tmp_path / "kept.png")
    with pytest.raises(UserError, match=r"half unpacked, in the split 'val' 1 of 4 images have no label file") as error:
        data.Cityscapes(tmp_path, "val")
    assert str(label_of(files[1])) in str(error.value) and HOW in str(error.value)
    (tmp_path / "kept.png").rename(label_of(files[1]))
    files[2].unlink()
    with pytest.raises(UserError, match=r"1 of 4 label files have no image") as error:
        data.Cityscapes(tmp_path, "val")
    assert str(files[2]) in str(error.value)


def test_two_files_for_one_image(tmp_path: Path) -> None:
    files = write(tmp_path, "val", 1)
    Image.open(files[0]).save(files[0].with_suffix(".jpg"))
    with pytest.raises(UserError, match="are two files for one image; remove one"):
        data.Cityscapes(tmp_path, "val")


# ---------------------------------------------------------------- bad files, seen through the loaders


def bomb(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 50000, 50000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def resize(path: Path) -> None:
    Image.fromarray(np.zeros((40, 63), np.uint8)).save(path)


def turn(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def unknown(path: Path) -> None:
    ids = np.array(Image.open(path))
    ids[0, :7] = 200
    Image.fromarray(ids).save(path)


@pytest.mark.parametrize(
    ("spoil", "target", "workers", "text"),
    [
        (bomb, "image", 0, "says that it has 50000 x 50000 pixels"),
        (bomb, "label", 0, "says that it has 50000 x 50000 pixels"),
        (cut, "image", 0, "is truncated or damaged"),
        (cut, "label", 0, "is truncated or damaged"),
        (cut, "label", 2, "is truncated or damaged"),
        (empty, "image", 0, r"is empty \(zero bytes\)"),
        (empty, "label", 0, r"is empty \(zero bytes\)"),
        (resize, "label", 0, "label of 63 x 40 pixels for an image of 64 x 40.*the sizes must be equal"),
        (turn, "image", 0, "label of 64 x 40 pixels for an image of 40 x 64 .* has the EXIF orientation 6"),
        (unknown, "label", 0, r"unknown label ids 200 \(7 pixels\)"),
        (unknown, "label", 2, r"unknown label ids 200 \(7 pixels\)"),
    ],
)
def test_bad_files_stop_with_one_sentence(tmp_path: Path, spoil: Any, target: str, workers: int, text: str) -> None:
    files = write(tmp_path, "train", 2)
    path = files[1] if target == "image" else label_of(files[1])
    spoil(path)
    cfg = config(tmp_path, workers=workers)
    with pytest.raises(UserError, match=text) as error:
        list(data.train_batches(cfg).epoch(0))
    message = str(error.value)
    del error  # its frames hold the loader's workers
    assert str(path) in message and "Traceback" not in message
    if spoil is not unknown:  # there the scorer looks at the ids
        with pytest.raises(UserError, match=text):
            list(data.eval_batches(cfg, "train"))


def test_truncated_jpeg(tmp_path: Path) -> None:
    files = write(tmp_path, "train", 1, suffix="jpg")
    cut(files[0])
    with pytest.raises(UserError, match=r"_leftImg8bit\.jpg: .*truncated"):
        data.read_rgb(files[0])


def test_the_home_folder_and_that_of_a_user_who_is_not_known() -> None:
    assert DataConfig(root="~/x").root == Path.home() / "x"
    assert DataConfig(root="~no-such-user/x").root == Path("~no-such-user/x")


def test_instance_ids_of_another_size(tmp_path: Path) -> None:
    files = write(tmp_path, "val", 1)
    path = Path(str(label_of(files[0])).replace("labelIds", "instanceIds"))
    Image.fromarray(np.zeros((40, 60), np.uint16)).save(path)
    with pytest.raises(UserError, match="instanceIds.png: instance ids of another size"):
        list(data.eval_batches(config(tmp_path)))


@pytest.mark.parametrize(
    ("size", "options", "text"),
    [
        (
            (1, 300),
            {"scale": (0.5, 2.0)},
            r"300 x 1 pixels, too thin to be scaled to a shorter side of 1 times 0.5 to 2 ",
        ),
        ((2, 300000), {"base_size": 520}, "300000 x 2 pixels, too many to be scaled to a shorter side of 520 times"),
    ],
)
def test_training_images_that_scaling_would_spoil(
    tmp_path: Path, size: tuple[int, int], options: dict[str, Any], text: str
) -> None:
    path = write(tmp_path, "train", 1)[0]
    Image.new("RGB", size[::-1]).save(path)
    Image.new("L", size[::-1]).save(label_of(path))
    with pytest.raises(UserError, match=text) as error:
        list(data.train_batches(config(tmp_path, batch_size=1, data=options)).epoch(0))
    assert str(error.value).startswith(f"{path}: has ")


@pytest.mark.parametrize("size", [(374, 1238), (375, 1242), (1238, 374), (720, 1280), (123, 457)])
@pytest.mark.parametrize("base", [100, 128, 512])
def test_the_shorter_side_is_brought_to_the_base_size(size: tuple[int, int], base: int) -> None:
    """And not to one pixel less, so that a crop of that size would have a row of padding."""
    cfg = DataConfig(base_size=base, scale=(1.0, 1.0), crop=(base, base), flip=0.0, color_jitter=0.0)
    image, mask = np.full((*size, 3), 9, np.uint8), np.zeros(size, np.uint8)
    image, mask = data.augment(image, mask, cfg, (1,))
    assert (image == 9).all() and (mask == 0).all()


def test_fewer_images_than_a_batch(tmp_path: Path) -> None:
    write(tmp_path, "train", 3)
    with pytest.raises(UserError, match="split 'train' in .* has 3 images, fewer than batch_size 4"):
        data.train_batches(config(tmp_path, batch_size=4))


# ---------------------------------------------------------------- reading and augmenting


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
def test_images_of_any_mode_are_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 256).save(tmp_path / "x.png")
    else:
        (Image.fromarray(grey) if mode == "P" else Image.fromarray(grey).convert("RGB")).convert(mode).save(
            tmp_path / "x.png"
        )
    image = data.read_rgb(tmp_path / "x.png")
    assert image.dtype == np.uint8 and np.array_equal(image, np.repeat(grey[..., None], 3, 2))


def test_a_transparent_colour_is_white_as_in_every_prediction(tmp_path: Path) -> None:
    """The network must not see one image in training and another one in tools/predict.py."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", transparency=tuple(pixels[1, 2].tolist()))
    image = data.read_rgb(tmp_path / "x.png")
    assert image[1, 2].tolist() == [255, 255, 255] and (image == read_image(tmp_path / "x.png")).all()


@pytest.mark.parametrize("where", ["eXIf", "raw profile", "xmp", "none"])
def test_an_orientation_turns_an_image_wherever_it_is_written(tmp_path: Path, where: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngInfo()
    if where == "raw profile":  # as ImageMagick writes it
        data_ = b"Exif\0\0" + exif.tobytes()[6:]
        info.add_text("Raw profile type exif", f"\nexif\n{len(data_):8}\n{data_.hex()}\n", zip=True)
    elif where == "xmp":
        xmp = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
        info.add_itxt("XML:com.adobe.xmp", xmp)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    more = {"exif": exif} if where == "eXIf" else {}
    Image.fromarray(pixels).save(tmp_path / "x.png", pnginfo=info, **more)
    image = data.read_rgb(tmp_path / "x.png")
    assert image.shape == ((40, 60, 3) if where == "none" else (60, 40, 3))
    assert (image == read_image(tmp_path / "x.png")).all()


def test_channels_are_rgb_not_bgr(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 10)).save(tmp_path / "x.png")
    assert data.read_rgb(tmp_path / "x.png")[0, 0].tolist() == [255, 0, 10]


def test_normalize() -> None:
    cfg = config(Path(".")).data
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 1] = (255, 51, 0)
    result = data.normalize(image, cfg)
    assert result.shape == (3, 2, 3) and result.dtype == torch.float32 and result.is_contiguous()
    expected = [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    assert result[:, 0, 1].tolist() == pytest.approx(expected, abs=1e-6)


def picture(size: tuple[int, int] = (60, 100)) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image whose red channel tells the mask: mask k where red is 12 k."""
    ramp = np.tile(np.arange(size[1]) * 19 // size[1], (size[0], 1)).astype(np.uint8)
    return np.stack([ramp * 12, ramp * 0 + 90, ramp * 0], -1).astype(np.uint8), ramp


def test_augmentation_is_a_pure_function_and_varies() -> None:
    cfg = config(Path(".")).data
    image, mask = picture()
    before = image.copy(), mask.copy()
    results = [data.augment(image, mask, cfg, (1, 0, 0, i)) for i in range(20)]
    np.random.seed(99)
    for i in reversed(range(20)):
        again = data.augment(image, mask, cfg, (1, 0, 0, i))
        assert all(np.array_equal(a, b) for a, b in zip(again, results[i], strict=True))
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])
    assert len({r[0].tobytes() for r in results}) == 20
    assert all(r[0].shape == (32, 48, 3) and r[1].shape == (32, 48) for r in results)


def test_image_and_mask_move_together_and_padding_is_ignored() -> None:
    cfg = config(Path("."), data={"color_jitter": 0.0, "crop": (64, 96), "scale": (0.5, 1.2)}).data
    image, mask = picture()
    padded = 0
    for i in range(30):
        out, ids = data.augment(image, mask, cfg, (i,))
        void = ids == IGNORE
        padded += int(void.any())
        assert set(np.unique(ids)) <= {*range(19), IGNORE}, "masks are never interpolated"
        assert (out[void] == [124, 116, 104]).all(), "padding has the mean colour"
        off = np.abs(out[..., 0].astype(int)[~void] - 12 * ids[~void].astype(int))
        assert (off > 12).mean() < 0.02 and off.mean() < 3
    assert padded > 20


@pytest.mark.parametrize("scale", [0.6, 0.9, 1.1, 1.3, 1.7])
def test_scaled_labels_lie_on_the_scaled_image(scale: float) -> None:
    rows, columns = np.mgrid[:200, :200]
    disc = ((rows - 99.5) ** 2 + (columns - 99.5) ** 2 < 3600).astype(np.uint8)
    cfg = config(Path("."), data={"scale": (scale, scale), "crop": [round(200 * scale)] * 2, "color_jitter": 0.0}).data
    image, mask = data.augment(np.repeat(255 * disc[..., None], 3, 2), disc, cfg, (0,))
    middles = [np.argwhere(part).mean(0) for part in (image[..., 0] > 127, mask)]
    assert np.abs(middles[0] - middles[1]).max() < 0.1  # OpenCV's INTER_NEAREST: 0.4 to the right and down


def test_scale_range_base_size_and_independence_of_flip() -> None:
    image, mask = picture()
    cfg = config(
        Path("."), data={"base_size": 120, "scale": (0.5, 2.0), "crop": (400, 400), "color_jitter": 0.0, "flip": 0.5}
    ).data
    heights, flips = [], []
    for i in range(200):
        _, ids = data.augment(image, mask, cfg, (i,))
        rows = np.flatnonzero((ids != IGNORE).any(1))
        columns = np.flatnonzero((ids != IGNORE).any(0))
        heights.append(len(rows))
        flips.append(int(ids[rows[0], columns[0]] > ids[rows[0], columns[-1]]))
    assert 60 <= min(heights) < 70 and 230 < max(heights) <= 240
    assert abs(np.mean(heights) - 150) < 12 and 0.35 < np.mean(flips) < 0.65
    assert abs(np.corrcoef(heights, flips)[0, 1]) < 0.25, "each step has draws of its own"


def test_albumentations_does_not_ask_the_network_at_import(tmp_path: Path) -> None:
    code = (
        "import urllib.request as u, sys, numpy as np, pathlib\n"
        "u.OpenerDirector.open = lambda *a, **k: sys.exit('asked the network')\n"
        "from seg import data\nassert 'albumentations' not in sys.modules\n"
        "from seg.config import DataConfig\n"
        "data.augment(np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.uint8), DataConfig(crop=(16, 16)), (1,))\n"
        "assert 'albumentations' in sys.modules"
    )
    env = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    env["PYTHONPATH"] = str(Path(data.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- batches


def flat(batches: Any) -> list[tuple[list[str], bytes, bytes]]:
    return [(b["name"], b["image"].numpy().tobytes(), b["target"].numpy().tobytes()) for b in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")
def test_training_batches_do_not_depend_on_workers_or_history(tmp_path: Path) -> None:
    write(tmp_path, "train", 9)
    alone = data.train_batches(config(tmp_path))
    batch = next(alone.epoch(0))
    assert batch["image"].shape == (2, 3, 32, 48) and batch["image"].dtype == torch.float32
    assert batch["target"].shape == (2, 32, 48) and batch["target"].dtype == torch.int64
    assert all(Path(name).is_file() for name in batch["name"])
    epochs = [flat(alone.epoch(e)) for e in (0, 1)]
    assert len(alone) == 4 == len(epochs[0]) and epochs[0] != epochs[1]
    many = data.train_batches(config(tmp_path, workers=4))
    stopped = many.epoch(1)
    next(stopped)
    assert flat(many.epoch(1)) == epochs[1], "also after an iterator that was left half way"
    assert flat(many.epoch(0)) == epochs[0]
    other = data.train_batches(config(tmp_path, runtime={"seed": 1}))
    assert flat(other.epoch(0)) != epochs[0]


def test_an_epoch_goes_on_in_the_middle_without_reading_what_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "train", 8)
    batches = data.train_batches(config(tmp_path))
    whole = flat(batches.epoch(3))
    read = []
    real = data.read_pair
    monkeypatch.setattr(data, "read_pair", lambda sample: read.append(sample) or real(sample))
    assert flat(batches.epoch(3, start=3)) == whole[3:]
    assert len(read) == 2
    assert flat(batches.epoch(3, start=4)) == []


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (2, 2), (4, 1), (1, 2)])
def test_a_step_holds_the_same_images_on_any_number_of_ranks(tmp_path: Path, world: int, micro: int) -> None:
    write(tmp_path, "train", 19)
    cfg = config(tmp_path, batch_size=8, micro_batch=micro)
    one = data.train_batches(config(tmp_path, batch_size=8)).order(5)
    ranks = [data.train_batches(cfg, world, rank) for rank in range(world)]
    assert {len(r) for r in ranks} == {2 * 8 // (world * micro)}
    accumulation = ranks[0].accumulation
    for step in range(2):
        seen = [i for r in ranks for m in r.order(5)[step * accumulation : (step + 1) * accumulation] for i in m]
        assert sorted(seen) == sorted(one[step])
    assert len({i for step in one for i in step}) == 16


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_validation_image_is_on_exactly_one_rank(tmp_path: Path, world: int) -> None:
    write(tmp_path, "val", 5)
    cfg = config(tmp_path, data={"eval_batch_size": 2})
    names = [
        item["sample"].name
        for rank in range(world)
        for items in data.eval_batches(cfg, world=world, rank=rank)
        for item in items
    ]
    assert sorted(names) == [s.name for s in data.Cityscapes(tmp_path, "val").samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_items_are_whole(tmp_path: Path, workers: int) -> None:
    files = write(tmp_path, "val", 3)
    cfg = config(tmp_path, workers=workers, data={"eval_batch_size": 2, "eval_base_size": 16})
    items = [item for batch in data.eval_batches(cfg) for item in batch]
    assert len(items) == 3
    for item in items:
        assert item["instance"] is None and item["sample"].image in files
        assert np.array_equal(item["label"], np.array(Image.open(item["sample"].label)))
        bgr = cv2.imread(str(item["sample"].image))
        assert np.array_equal(item["image"], bgr[..., ::-1])


def test_datasets_go_to_processes_that_are_not_forked(tmp_path: Path) -> None:
    write(tmp_path, "train", 2)
    cfg = config(tmp_path)
    samples = data.Cityscapes(tmp_path, "train").samples
    dataset = data.SegDataset(samples, cfg.data, 3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[(2, 1)]["image"], dataset[(2, 1)]["image"])

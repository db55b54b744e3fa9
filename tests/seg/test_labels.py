"""Label tables and label files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from cityscapesscripts.helpers.labels import id2label, name2label, trainId2label
from PIL import Image

from engine.errors import UserError
from seg import labels


def test_tables_are_the_official_ones() -> None:
    assert len(labels.TRAIN_CLASSES) == 19 and len(labels.LABEL_NAMES) == labels.NUM_LABELS == 34
    for train_id, name in enumerate(labels.TRAIN_CLASSES):
        official = trainId2label[train_id]
        assert (official.name, official.id) == (name, labels.TRAIN_LABEL_IDS[train_id])
        assert tuple(labels.TRAIN_COLORS[train_id]) == official.color
    for label_id, name in enumerate(labels.LABEL_NAMES):
        assert id2label[label_id].name == name and tuple(labels.LABEL_COLORS[label_id]) == id2label[label_id].color
    assert list(labels.CATEGORIES) == ["void", "flat", "construction", "object", "nature", "sky", "human", "vehicle"]
    assert labels.CATEGORIES["vehicle"] == tuple(range(26, 34))
    assert tuple(range(24, 34)) == labels.INSTANCE_LABEL_IDS


def test_label_ids_become_train_ids_and_come_back() -> None:
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
    train = labels.to_train_ids(ids, "x.png")
    assert train.dtype == np.uint8
    assert train.ravel().tolist() == [id2label[i].trainId for i in range(34)]
    back = labels.to_label_ids(train)
    assert all(b == (i if id2label[i].trainId != 255 else 0) for i, b in zip(ids.ravel(), back.ravel(), strict=True))


def test_unknown_label_ids_name_file_ids_and_counts() -> None:
    ids = np.full((4, 5), name2label["road"].id, np.uint8)
    ids[0, :3], ids[1, 0] = 255, 77
    with pytest.raises(
        UserError, match=r"a/b\.png: unknown label ids 77 \(1 pixels\), 255 \(3 pixels\).*0 to 33"
    ) as error:
        labels.to_train_ids(ids, Path("a/b.png"))
    assert "train-id PNG" in str(error.value)
    with pytest.raises(ValueError, match=r"not train ids: \[19, 254\]"):
        labels.to_label_ids(np.array([[0, 19, 254, 255]], np.uint8))


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_reading_gives_what_the_official_scorer_sees(tmp_path: Path, mode: str) -> None:
    ids = np.random.default_rng(0).integers(0, 2 if mode == "1" else 34, (8, 11), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(ids.astype(np.uint16))
    elif mode == "P":
        image = Image.fromarray(ids, "L").convert("P")
        image.putdata(ids.ravel().tolist())
    else:
        image = Image.fromarray(ids.astype(bool)) if mode == "1" else Image.fromarray(ids)
    image.save(tmp_path / "x.png")
    read = labels.read_label_ids(tmp_path / "x.png")
    assert read.dtype == np.uint8
    assert np.array_equal(read, np.array(Image.open(tmp_path / "x.png")).astype(np.uint8))
    assert np.array_equal(read, ids)


def test_grey_png_with_a_transparent_value_stays_ids(tmp_path: Path) -> None:
    ids = np.arange(30, dtype=np.uint8).reshape(5, 6)
    Image.fromarray(ids).save(tmp_path / "x.png", transparency=7)
    assert np.array_equal(labels.read_label_ids(tmp_path / "x.png"), ids)


def grey_png(path: Path, ids: np.ndarray, depth: int) -> None:
    """A PNG of 1, 2 or 4 bits a pixel, which neither Pillow nor OpenCV writes."""
    bits = np.unpackbits(ids[..., None], axis=2)[..., 8 - depth :].reshape(len(ids), -1)
    rows = np.pad(np.packbits(bits, axis=1), ((0, 0), (1, 0)))  # each begins with its filter, none
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], depth, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    ]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_stays_ids(tmp_path: Path, depth: int) -> None:
    ids = (np.arange(5 * 7, dtype=np.uint8) % 2**depth).reshape(5, 7)
    grey_png(tmp_path / "x.png", ids, depth)
    assert np.array_equal(labels.read_label_ids(tmp_path / "x.png"), ids)


def test_instance_ids_keep_16_bits(tmp_path: Path) -> None:
    ids = np.array([[26001, 33999], [7, 24000]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "i.png")
    assert np.array_equal(labels.read_instance_ids(tmp_path / "i.png"), ids)
    with pytest.raises(UserError, match=r"i\.png: holds values up to 33999"):
        labels.read_label_ids(tmp_path / "i.png")


def test_colour_files_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    Image.new("RGBA", (4, 4)).save(tmp_path / "a.png")
    Image.new("L", (4, 4)).save(tmp_path / "j.jpg")
    with pytest.raises(UserError, match=r"c\.png: holds RGB colours; expected one channel of label ids"):
        labels.read_label_ids(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"a\.png: holds RGBA colours"):
        labels.read_label_ids(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"j\.jpg: is no PNG file"):
        labels.read_label_ids(tmp_path / "j.jpg")


@pytest.mark.parametrize("kept", [12, 40, 0.5, -13, -1])
@pytest.mark.parametrize("palette", [False, True])
def test_truncated_files(tmp_path: Path, kept: float, palette: bool) -> None:
    path = tmp_path / "t.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 34, (64, 64), dtype=np.uint8))
    (image.convert("P") if palette else image).save(path)
    data = path.read_bytes()
    size = int(len(data) * kept) if 0 < kept < 1 else int(kept)
    path.write_bytes(data[:size])
    if palette and kept in (-1, -13):  # all pixels are there
        assert labels.read_label_ids(path).shape == (64, 64)
        return
    with pytest.raises(UserError, match=r"t\.png: is truncated or damaged"):
        labels.read_label_ids(path)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_a_turned_bit_is_noticed(tmp_path: Path, mode: str) -> None:
    """Pillow, which reads palettes, takes one in ten for other labels."""
    rows, columns = np.mgrid[:60, :100]
    ids = ((rows - 30) ** 2 + (columns - 40) ** 2 < 500).astype(np.uint8) + (columns > 60)
    path = tmp_path / "t.png"
    Image.fromarray(ids.astype(np.uint8) * (255 if mode == "1" else 1)).convert(mode).save(path)
    data = path.read_bytes()
    for place in range(data.find(b"IDAT") + 4, data.find(b"IEND") - 8):
        turned = bytearray(data)
        turned[place] ^= 4
        path.write_bytes(turned)
        with pytest.raises(UserError, match=r"t\.png: is truncated or damaged"):
            labels.read_label_ids(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "z.png").touch()
    with pytest.raises(UserError, match=r"z\.png: is empty \(zero bytes\)"):
        labels.read_label_ids(tmp_path / "z.png")
    with pytest.raises(UserError, match=r"none\.png: cannot be read \(No such file"):
        labels.read_label_ids(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot be read"):
        labels.read_label_ids(tmp_path)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    _, coded = cv2.imencode(".png", np.zeros((8, 8), np.uint8))
    data = bytearray(coded.tobytes())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"bomb\.png: says that it has 60000 x 60000 pixels; more than 100000000"):
        labels.read_label_ids(path)

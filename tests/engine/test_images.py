"""Files in and out: every kind of image, every kind of broken input, and where outputs go."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.errors import UserError
from engine.images import Found, check_file, find_images, read_image, write_bytes, write_png

RAMP = np.stack(np.meshgrid(np.arange(0, 250, 10), np.arange(0, 240, 20)), -1).astype(np.uint8)
RGB = np.dstack([RAMP, RAMP[..., :1] // 2])  # 12 x 25, no two pixels alike


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(RGB)).save(path, **options)
    return path


# reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "jp2"])
def test_rgb_formats_are_exact(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    read = read_image(save(tmp_path / f"x.{suffix}", **options))
    assert read.dtype == np.uint8 and np.array_equal(read, RGB)


def test_grey_one_bit_and_palette(tmp_path: Path) -> None:
    grey = Image.fromarray(RGB[..., 0])
    assert np.array_equal(read_image(save(tmp_path / "l.png", grey)), np.repeat(RGB[..., :1], 3, 2))
    bits = RGB[..., 0] > 100
    read = read_image(save(tmp_path / "1.png", Image.fromarray(bits)))
    assert np.array_equal(read, np.repeat((bits * 255).astype(np.uint8)[..., None], 3, 2))
    palette = Image.fromarray(RGB).quantize(256)
    assert np.array_equal(read_image(save(tmp_path / "p.gif", palette)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_upper_byte(tmp_path: Path, suffix: str) -> None:
    wide = RGB.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / f"rgb.{suffix}"), wide[..., ::-1])
    cv2.imwrite(str(tmp_path / f"grey.{suffix}"), wide[..., 0])
    assert np.array_equal(read_image(tmp_path / f"rgb.{suffix}"), RGB)
    assert np.array_equal(read_image(tmp_path / f"grey.{suffix}"), np.repeat(RGB[..., :1], 3, 2))


def test_big_endian_and_wide_integers(tmp_path: Path) -> None:
    wide = RGB[..., 0].astype(np.int32) * 257
    big = Image.frombytes("I;16B", wide.shape[::-1], wide.astype(">u2").tobytes())
    for path in (save(tmp_path / "big.tif", big), save(tmp_path / "i.tif", Image.fromarray(wide))):
        assert np.array_equal(read_image(path)[..., 0], RGB[..., 0])
    with pytest.raises(UserError, match="values from 0 to 6168000, expected 0 to 65535 in an image of mode I"):
        read_image(save(tmp_path / "far.tif", Image.fromarray(wide * 100)))


def test_float_images(tmp_path: Path) -> None:
    unit = RGB[..., 0].astype(np.float32) / 255
    assert np.array_equal(read_image(save(tmp_path / "f.tif", Image.fromarray(unit)))[..., 2], RGB[..., 0])
    unit[0, 0] = np.nan
    with pytest.raises(UserError, match="f.tif: values from nan to nan, expected 0 to 1"):
        read_image(save(tmp_path / "f.tif", Image.fromarray(unit)))


def test_transparency_shows_white(tmp_path: Path) -> None:
    alpha = np.zeros(RGB.shape[:2], np.uint8)
    alpha[:, 10:] = 255
    expected = RGB.copy()
    expected[:, :10] = 255
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    assert np.array_equal(read_image(save(tmp_path / "rgba.png", rgba)), expected)
    la = Image.fromarray(np.dstack([RGB[..., 0], alpha]), "LA")
    assert np.array_equal(read_image(save(tmp_path / "la.png", la)), np.repeat(expected[..., :1], 3, 2))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for name in ("p.png", "p.gif"):
        read = read_image(save(tmp_path / name, palette, transparency=1))
        assert read.tolist() == [[[10, 20, 30], [255, 255, 255]]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert 125 <= read_image(save(tmp_path / "half.png", half))[0, 0, 0] <= 129


def test_cmyk_and_ycbcr_jpeg(tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 16), (200, 60, 20))
    for name, image in [("cmyk.jpg", flat.convert("CMYK")), ("rgb.jpg", flat), ("cmyk.tif", flat.convert("CMYK"))]:
        assert np.abs(read_image(save(tmp_path / name, image)).astype(int) - [200, 60, 20]).max() <= 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_all_eight_orientations_come_upright(tmp_path: Path, suffix: str) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    pen = ImageDraw.Draw(upright)
    pen.rectangle((0, 0, 15, 15), fill="red")
    pen.rectangle((32, 0, 47, 15), fill="blue")
    # how a camera stores it: the inverse of what the orientation asks a viewer to do
    ways = Image.Transpose
    stored = {
        1: upright,
        2: upright.transpose(ways.FLIP_LEFT_RIGHT),
        3: upright.transpose(ways.ROTATE_180),
        4: upright.transpose(ways.FLIP_TOP_BOTTOM),
        5: upright.transpose(ways.TRANSPOSE),
        6: upright.transpose(ways.ROTATE_90),
        7: upright.transpose(ways.TRANSVERSE),
        8: upright.transpose(ways.ROTATE_270),
    }
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = read_image(save(tmp_path / f"{orientation}.{suffix}", image, exif=exif))
        assert read.shape == (32, 48, 3), orientation
        assert np.abs(read.astype(int) - np.asarray(upright)).mean() < 8, orientation


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        assert np.abs(read_image(path).astype(int) - [255, 0, 0]).max() < 8


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    good = save(
        tmp_path / "good.png", Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    )
    jpeg = save(tmp_path / "good.jpg", Image.open(good))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image at all")
    (tmp_path / "head.png").write_bytes(good.read_bytes()[:20])
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "cut.jpg").write_bytes(jpeg.read_bytes()[:1500])
    damaged = bytearray(good.read_bytes())
    damaged[3000:3200] = bytes(200)
    (tmp_path / "damaged.png").write_bytes(damaged)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere.png")
    for name, why in {
        "empty.png": "the file is empty",
        "text.jpg": "not an image of a known format",
        "head.png": "not an image of a known format, or cut off at its start|cannot be",
        "cut.png": "cannot be read .damaged or cut off",
        "cut.jpg": "cannot be read .damaged or cut off",
        "damaged.png": "cannot be (read|decoded)",
        "pipe.png": "not a regular file",
        "dead.png": "cannot be read .No such file",
        "missing.png": "cannot be read .No such file",
        ".": "not a regular file",
    }.items():
        with pytest.raises(UserError, match=why) as error:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_a_turned_bit_in_a_png_is_noticed(tmp_path: Path, mode: str) -> None:
    """Pillow reads one in ten as other pixels."""
    big = Image.fromarray(RGB).resize((100, 60)).convert(mode)
    path = save(tmp_path / "x.png", big)
    data = path.read_bytes()
    right = read_image(path)
    start, end = data.find(b"IDAT") + 4, data.find(b"IEND") - 8
    for place in range(start, end, max(1, (end - start) // 60)):
        turned = bytearray(data)
        turned[place] ^= 4
        path.write_bytes(turned)
        with pytest.raises(UserError, match="x.png: cannot be (read|decoded)"):
            read_image(path)
    path.write_bytes(data.replace(b"IEND\xae", b"IEND\x00"))
    assert np.array_equal(read_image(path), right), "no pixel depends on the end's"


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_of(60_000, 50_000))
    with pytest.raises(UserError, match=r"bomb.png: 3000 megapixels, the limit is 128"):
        read_image(bomb)
    small = save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small.png: 0.0003 megapixels, the limit is 0.0001; raise it"):
        read_image(small, max_pixels=100)
    before = Image.MAX_IMAGE_PIXELS
    assert read_image(small, max_pixels=300).shape == (12, 25, 3)
    assert before == Image.MAX_IMAGE_PIXELS


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels and holds next to nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(50))
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("suffix", ["ico", "icns"])
def test_a_bomb_within_a_small_image_is_refused(tmp_path: Path, suffix: str) -> None:
    bomb = png_of(60_000, 50_000)
    place = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(bomb), 22)
    icon = b"ic07" + struct.pack(">I", len(bomb) + 8) + bomb
    whole = {"ico": place + bomb, "icns": b"icns" + struct.pack(">I", len(icon) + 8) + icon}
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(whole[suffix])
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=rf"x.{suffix}: 3000 megapixels, the limit is 128"):
        read_image(path)
    assert before == Image.MAX_IMAGE_PIXELS


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for name in ("x.eps", "x.png"):
        save(tmp_path / name, format="EPS")
        with pytest.raises(UserError, match=rf"{name}: is PostScript \(EPS\), a program that is not run here"):
            read_image(tmp_path / name)


def test_a_damaged_entry_in_the_exif_costs_no_image(tmp_path: Path) -> None:
    """The orientation is sound; another tag's name was changed to one whose value has another type."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker of cameras"
    damaged = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")
    assert damaged != exif.tobytes()
    read = read_image(save(tmp_path / "x.jpg", exif=damaged))
    assert read.shape == (25, 12, 3) and np.abs(read.astype(int) - np.rot90(RGB, -1)).mean() < 20


def test_a_place_before_the_start_of_the_file_is_damage(tmp_path: Path) -> None:
    """Told as such, not as the system's "invalid argument"."""
    words = [
        0
    ] * 65  # a McIDAS file: lines 9, columns 10, bytes 11, bands 14, prefix 15, and where the pixels begin, 34
    words[2], words[9], words[10], words[11], words[14], words[34] = 4, 8, 8, 1, 1, -999
    (tmp_path / "x.bin").write_bytes(struct.pack(">64i", *words[1:]) + bytes(100))
    with pytest.raises(UserError, match="x.bin: cannot be read .damaged or cut off"):
        read_image(tmp_path / "x.bin")


def test_the_limit_may_be_above_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(save(tmp_path / "x.png")).shape == (12, 25, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


# finding


def names(found: list[Found]) -> list[str]:
    return [item.name for item in found]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name in ["b.jpg", "a.PNG", "city/c.webp", "city/deep/d.tiff", "city/notes.txt", ".hidden/e.jpg", "._a.jpg"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_folders_are_searched_below_in_order(photos: Path) -> None:
    found, problems = find_images([photos])
    assert names(found) == ["a", "b", "city/c", "city/deep/d"] and not problems
    assert [item.path for item in found][2] == photos / "city/c.webp"


def test_globs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*patterns: str) -> list[str]:
        found, problems = find_images(patterns)
        assert not problems
        return names(found)

    assert of(f"{photos}/*.jpg") == ["b"]
    assert of(f"{photos}/**/*.webp") == ["city/c"]
    assert of(f"{photos}/**/*.*") == ["a", "b", "city/c", "city/notes", "city/deep/d"]
    assert of(f"{photos}/**") == ["a", "b", "city/c", "city/deep/d"]
    assert of(f"{photos}/c*") == ["city/c", "city/deep/d"]
    assert of(f"{photos}/*/deep/[a-d].tif?") == ["city/deep/d"]
    monkeypatch.chdir(photos)
    assert of("*.jpg", "./**/deep/*", "city") == ["b", "city/deep/d", "c"]
    assert of(".") == ["a", "b", "city/c", "city/deep/d"]
    assert of("../photos/city") == ["c", "deep/d"]


def test_a_name_with_glob_characters_is_a_file_if_there_is_one(tmp_path: Path) -> None:
    odd = ["[1] b.png", "a*.png", "ü – 東京.png", "new\nline.png", "-x.png", " .png"]
    for name in [*odd, "1 b.png", "ab.png"]:
        save(tmp_path / name)
    for name in odd:
        found, problems = find_images([tmp_path / name])
        assert [item.path.name for item in found] == [name] and not problems


def test_duplicates_come_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    (photos.parent / "link").symlink_to(photos)
    found, _ = find_images(["photos/b.jpg", photos / "b.jpg", "photos/../photos/b.jpg", "photos", "link", "photos/*"])
    assert names(found) == ["b", "a", "c", "deep/d"] or names(found) == ["b", "a", "city/c", "city/deep/d"]


def test_links_in_circles_end(photos: Path) -> None:
    (photos / "city/notes.txt").unlink()
    (photos / "city/again").symlink_to(photos)
    (photos / "city/deep/again").symlink_to(photos / "city")
    (photos / "self").symlink_to(photos / "self")
    for pattern in (str(photos), f"{photos}/**/*.[jPwt]*", f"{photos}/**"):
        found, problems = find_images([pattern])
        assert names(found) == ["a", "b", "city/c", "city/deep/d"] and not problems


def test_links_to_folders_are_followed(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/days").symlink_to(photos / "city")
    assert names(find_images([tmp_path / "set"])[0]) == ["days/c", "days/deep/d"]


def test_outputs_never_meet(tmp_path: Path) -> None:
    for name in ["a/x.png", "b/x.png", "a/y.png", "a/y.jpg", "a/y.jpg.png", "b/z.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, _ = find_images([tmp_path / "a", tmp_path / "b"])
    assert len(set(names(found))) == 6
    assert {str(item.path.relative_to(tmp_path)): item.name for item in found} == {
        "a/x.png": "a/x",
        "b/x.png": "b/x",
        "a/y.jpg": "a/y.jpg",
        "a/y.png": "y.png",
        "a/y.jpg.png": "y.jpg.png",
        "b/z.png": "z",
    }


def test_what_is_not_there_is_a_problem(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    inputs = [photos / "b.jpg", tmp_path / "bare", tmp_path / "typo", f"{tmp_path}/no*.jpg", f"{photos}/**/*.bmp", ""]
    found, problems = find_images(inputs)
    assert names(found) == ["b"] and len(problems) == 5
    assert problems[0] == f"{tmp_path / 'bare'}: no such file or no image in it."
    assert problems[4] == "an empty name: no such file or no image in it."


def test_a_folder_of_a_cameras_videos(tmp_path: Path) -> None:
    for ending in ("MTS", "m2ts", "3gp"):
        path = tmp_path / ending / f"00001.{ending}"
        path.parent.mkdir()
        path.touch()
        assert str(path) in find_images([path.parent], videos=True)[1][0]


def test_a_folder_of_videos(tmp_path: Path) -> None:
    (tmp_path / "clips/day").mkdir(parents=True)
    for name in ("b.MP4", "day/a.mkv"):
        (tmp_path / "clips" / name).touch()
    assert find_images([tmp_path / "clips"])[1] == [f"{tmp_path / 'clips'}: no such file or no image in it."]
    told = f"no image in it, but videos; a video is given by itself, such as {tmp_path / 'clips/b.MP4'}."
    assert find_images([tmp_path / "clips"], videos=True)[1] == [f"{tmp_path / 'clips'}: {told}"]
    assert find_images([""], videos=True)[1] == ["an empty name: no such file or no image in it."]


def test_a_folder_that_may_not_be_read_is_a_problem(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, problems = find_images([photos])
    assert names(found) == ["a", "b", "city/c"]
    assert problems == [f"{photos / 'city/deep'}: the folder cannot be read (Permission denied)."]


# writing


def test_write_png_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/x.png"
    write_png(path, RGB)
    assert np.array_equal(np.asarray(Image.open(path)), RGB)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="x.png: cannot be written .No space left on device"):
        write_png(path, RGB[::-1])
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]
    assert np.array_equal(np.asarray(Image.open(path)), RGB)


def test_write_png_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", RGB)
    (tmp_path / "y").touch()
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_write_png_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/labels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the output folder"):
        write_png(tmp_path / "out/labels/x.png", RGB, inside=tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_link_in_the_way_is_replaced_not_followed(tmp_path: Path) -> None:
    precious = save(tmp_path / "precious.png")
    before = precious.read_bytes()
    (tmp_path / "x.png").symlink_to(precious)
    write_png(tmp_path / "x.png", RGB[::-1])
    assert precious.read_bytes() == before and not (tmp_path / "x.png").is_symlink()


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """As root, /dev/null itself would become a file."""
    os.mkfifo(tmp_path / "pipe")
    for write in (check_file, lambda path: write_bytes(path, b"x")):
        with pytest.raises(UserError, match="pipe: is a device or a pipe, which would be replaced; name a file"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()

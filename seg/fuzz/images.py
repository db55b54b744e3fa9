"""Images: every format and mode that Pillow writes, odd files and names, and damaged ones. One call labels a folder."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from engine.images import find_images, show
from seg.fuzz.case import Call, Ran, Wrong, damaged, pick, texture
from seg.fuzz.ground import Ground
from seg.label_files import KINDS
from seg.labels import to_label_ids

Array = NDArray[np.uint8]
LIMIT = 300_000
"""Pixels above which the calls refuse an image."""


@dataclass(frozen=True)
class _File:
    """What should become of a file: labelled as `pixels` (RGB uint8 (H, W, 3)), refused, or whatever Pillow makes of
    it."""

    what: str
    pixels: Array | None = None
    refuse: bool = False
    upright: bool = True
    """Whether the EXIF block, if there is one, says so."""


_LOSSLESS = {
    "png": ("1", "L", "LA", "P", "P+", "RGB", "RGB+", "RGBA", "I;16"),
    "apng": ("RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "gif": ("L", "P", "P+"),
    "webp": ("RGB", "RGBA"),
    "ppm": ("1", "L", "RGB", "I;16"),
    "pfm": ("F",),
    "pcx": ("1", "L", "P", "RGB"),
    "tga": ("L", "LA", "P", "RGB", "RGBA"),
    "sgi": ("L", "RGB", "RGBA"),
    "dds": ("L", "LA", "RGB", "RGBA"),
    "jp2": ("L", "LA", "RGB", "RGBA", "I;16"),
    "qoi": ("RGB", "RGBA"),
    "ico": ("RGBA",),
}
_LOSSY = {"jpg": ("L", "RGB", "CMYK"), "webp": ("RGB",), "avif": ("RGB",), "mpo": ("RGB",), "icns": ("RGBA",)}
_NAMES = ("", " with spaces", "-ü 東京", "\nline", "\udcff\udcfe", "[1]*?", "'\"$(x)`;&", "%s{0}", "." * 9, "\x1b[31m")


def make(rng: Generator, folder: Path, count: int, ground: Ground) -> Call:
    """A folder of `count` files, labelled in one call."""
    inputs = folder / "in"
    files: dict[Path, _File] = {}
    for number in range(count):
        kind = pick(rng, (_valid, _valid, _damaged, _damaged, _damaged, _odd))
        stem = inputs / f"{number:03}{pick(rng, _NAMES)}"
        path, file = kind(rng, stem)
        files[path] = file
    out = folder / "out"
    arguments = [str(ground.weights), str(inputs), "--out", str(out), "--save", *KINDS]

    def check(ran: Ran) -> None:
        _check(ran, files, inputs, out, ground)

    return Call(
        "predict",
        [*arguments, "--max-megapixels", str(LIMIT / 1e6)],
        "; ".join(f"{show(path.name)}: {file.what}" for path, file in files.items()),
        check,
        names=(show(inputs),),
        count=count,
        refused=lambda ran: ran.out.count("FAILED"),
    )


def _check(ran: Ran, files: dict[Path, _File], inputs: Path, out: Path, ground: Ground) -> None:
    names = {item.path: item.name for item in find_images([inputs])[0]}
    lines = [line[2:] for line in ran.out.splitlines() if line.startswith("  ")]
    labelled = 0
    for path, file in files.items():
        if path not in names:  # a folder, which is searched and not read
            continue
        told = [line for line in lines if line.startswith(show(path))]
        targets = {kind: out / kind / f"{names[path]}{end}" for kind, end in KINDS.items()}
        made = [kind for kind, target in targets.items() if target.exists()]
        if len(told) + (len(made) == len(KINDS)) != 1 or (told and made):
            raise Wrong(f"{show(path)} ({file.what}): made {made}, told {told}")
        labelled += len(made) > 0
        if file.refuse and made:
            raise Wrong(f"{show(path)} ({file.what}): labelled, expected an error")
        pixels = file.pixels
        if pixels is None and not file.refuse:
            pixels = _by_pillow(path, file)
        if pixels is not None and not made:
            raise Wrong(f"{show(path)} ({file.what}): refused though it is readable: {told}")
        if made and pixels is not None:
            _compare(path, file, targets, pixels, ground)
    found = re.search(r"(\d+) images? labelled", ran.out)
    if (int(found[1]) if found else 0) != labelled:
        raise Wrong(f"{labelled} images were labelled, told: {ran.out.splitlines()[-1:]}")


def _compare(path: Path, file: _File, targets: dict[str, Path], pixels: Array, ground: Ground) -> None:
    ids = np.asarray(Image.open(targets["labels"]))
    if ids.shape != pixels.shape[:2]:
        raise Wrong(f"{show(path)} ({file.what}): labels of {ids.shape}, expected {pixels.shape[:2]}")
    if not np.array_equal(ids, to_label_ids(ground.predictor.predict(pixels))):
        raise Wrong(f"{show(path)} ({file.what}): not the labels of the image as Pillow decodes it")


def _by_pillow(path: Path, file: _File) -> Array | None:
    """The image as Pillow alone decodes it; None if it can't, or if its mode is one that is judged otherwise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=sorted(set(Image.ID) - {"EPS"})) as image:
                if image.width * image.height > LIMIT or not file.upright:
                    return None
                image.load()
                if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr") or image.has_transparency_data:
                    return None
                if image.getexif().get(0x0112, 1) != 1 or image.width * image.height > LIMIT:
                    return None
                return np.asarray(image.convert("RGB"))
    except Exception:  # the decoders raise whatever they like on damaged files
        return None


def _valid(rng: Generator, stem: Path) -> tuple[Path, _File]:
    data, ending, file = _encoded(rng)
    if rng.random() < 0.15:
        ending = pick(rng, ("jpg", "PNG", "bmp", "tiff", "gif"))  # the content tells what it is
        file = _File(f"{file.what} called .{ending}", file.pixels)
    return _written(stem, ending, data), file


def _damaged(rng: Generator, stem: Path) -> tuple[Path, _File]:
    data, ending, file = _encoded(rng)
    changed, how = damaged(data, rng)
    return _written(stem, ending, changed), _File(f"{file.what}: {how}")


def _written(stem: Path, ending: str, data: bytes) -> Path:
    path = stem.with_name(f"{stem.name}.{ending}")
    path.write_bytes(data)
    return path


def _encoded(rng: Generator) -> tuple[bytes, str, _File]:
    """A file's content, its ending, and what should become of it."""
    side = pick(rng, (1, 2, 7, 31, 40, 97))
    height, width = (side, pick(rng, (1, 3, 64, 150))) if rng.random() < 0.7 else (pick(rng, (1, 200)), side)
    rgb = texture(rng, height, width)
    special = pick(rng, (None, None, None, None, _turned, _sixteen_bits, _many))
    if special is not None:
        return special(rng, rgb)  # type: ignore[no-any-return]
    lossless = rng.random() < 0.7
    ending = pick(rng, sorted(_LOSSLESS if lossless else _LOSSY))
    mode = pick(rng, (_LOSSLESS if lossless else _LOSSY)[ending])
    if ending in ("ico", "icns"):  # squares of certain sizes
        rgb = texture(rng, 32, 32)
    image, pixels = _image(rgb, mode, rng)
    options: dict[str, Any] = {"webp": {"lossless": lossless}, "jp2": {"irreversible": False}}.get(ending, {})
    if ending == "tif":
        options["compression"] = pick(rng, ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"))
        options |= {"compression": "group4"} if mode == "1" and rng.random() < 0.5 else {}
        options |= {"big_tiff": True} if rng.random() < 0.2 else {}
    if ending == "tga" and rng.random() < 0.5:
        options["compression"] = "tga_rle"
    if ending == "jpg":
        options |= {"quality": int(rng.integers(5, 100)), "progressive": bool(rng.random() < 0.5)}
    if ending == "ico":
        options["sizes"] = [(32, 32)]
    if mode.endswith("+"):
        options["transparency"] = 3 if mode == "P+" else tuple(int(v) for v in rgb[0, 0])
    data = _saved(image, ending, options)
    if not lossless:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA" if mode == "RGBA" else "RGB"))
        pixels = _on_paper(pixels[..., :3], pixels[..., 3]) if mode == "RGBA" else pixels
    what = f"{ending} {mode} {pixels.shape[1]} x {pixels.shape[0]} {options}"
    large = pixels.size > 3 * LIMIT  # an ICNS file holds sizes up to 1024
    return data, ending, _File(what, None if large else pixels, refuse=large)


def _saved(image: Image.Image, ending: str, options: dict[str, Any]) -> bytes:
    formats = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000", "apng": "PNG", "pfm": "PPM"}
    file = io.BytesIO()
    image.save(file, formats.get(ending, ending.upper()), **options)
    return file.getvalue()


def _image(rgb: Array, mode: str, rng: Generator) -> tuple[Image.Image, Array]:
    """An image in a mode, and the RGB pixels that it shows."""
    color, grey = Image.fromarray(rgb), rgb[..., 0]
    alpha = np.where(rng.random(grey.shape) < 0.3, 0, 255).astype(np.uint8)
    as_rgb: Callable[[Array], Array] = lambda one: np.repeat(one[..., None], 3, 2)  # noqa: E731
    if mode in ("LA", "RGBA"):
        layers = (grey if mode == "LA" else rgb, alpha)
        image = Image.fromarray(np.dstack(layers), mode)
        return image, _on_paper(as_rgb(grey) if mode == "LA" else rgb, alpha)
    if mode in ("I;16", "I"):
        wide = grey.astype(np.uint16 if mode == "I;16" else np.int32) * 256 + rng.integers(0, 256)
        return Image.fromarray(wide.astype(np.uint16 if mode == "I;16" else np.int32)), as_rgb(grey)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255), as_rgb(grey)
    if mode in ("P", "P+"):
        image = color.quantize(8)
        pixels = np.asarray(image.convert("RGB"))
        hidden = np.where((np.asarray(image) == 3) & (mode == "P+"), 0, 255).astype(np.uint8)
        return image, _on_paper(pixels, hidden)
    if mode == "RGB+":  # one colour is transparent
        return color, _on_paper(rgb, np.where((rgb == rgb[0, 0]).all(-1), 0, 255).astype(np.uint8))
    image = color.convert(mode)
    return image, np.asarray(image.convert("RGB"))


def _on_paper(rgb: Array, alpha: Array) -> Array:
    """What is transparent shows white; alpha is 0 or 255."""
    return np.where(alpha[..., None] == 0, np.uint8(255), rgb)


def _turned(rng: Generator, rgb: Array) -> tuple[bytes, str, _File]:
    """An EXIF orientation: what is stored is turned back by it."""
    way = int(rng.integers(1, 9))
    exif = Image.Exif()
    exif[0x0112] = way
    ending = pick(rng, ("png", "tif"))
    data = _saved(Image.fromarray(rgb), ending, {"exif": exif})
    # EXIF 2.32: where the stored row 0 and column 0 are in the scene
    turned = rgb.transpose(1, 0, 2) if way > 4 else rgb
    if way in (3, 4, 7, 8):
        turned = turned[::-1]
    if way in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return data, ending, _File(f"{ending} with orientation {way}", np.ascontiguousarray(turned), upright=way == 1)


def _sixteen_bits(rng: Generator, rgb: Array) -> tuple[bytes, str, _File]:
    ending = pick(rng, ("png", "tif"))
    wide = rgb.astype(np.uint16) * 257
    return cv2.imencode(f".{ending}", wide[..., ::-1])[1].tobytes(), ending, _File(f"{ending} of 3 x 16 bits", rgb)


def _many(rng: Generator, rgb: Array) -> tuple[bytes, str, _File]:
    """An animation or several pages: the first one counts."""
    ending = pick(rng, ("webp", "png", "tif"))
    options = {"lossless": True} if ending == "webp" else {}
    other = Image.fromarray(255 - rgb)
    data = _saved(Image.fromarray(rgb), ending, {"save_all": True, "append_images": [other], **options})
    return data, ending, _File(f"{ending} of two pictures", rgb)


def _odd(rng: Generator, stem: Path) -> tuple[Path, _File]:
    """What is no image, or none that may be read."""
    name, act = pick(rng, _ODD)
    path = stem.with_name(f"{stem.name}.{pick(rng, ('png', 'jpg', 'tif', 'webp', 'gif'))}")
    act(path)
    return path, _File(name, refuse=True)


def _bomb(path: Path) -> None:
    chunk, data = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 50_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(999))
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _huge(path: Path) -> None:
    path.write_bytes(b"BM" + struct.pack("<IIIIiiHHIIiiII", 999, 0, 54, 40, 2**31 - 1, 2**30, 1, 24, 0, 0, 0, 0, 0, 0))


def _postscript(path: Path) -> None:
    marker = path.parent.parent / "ran"
    path.write_text(
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch {marker}) (w) file\nshowpage\n"
    )


_ODD: list[tuple[str, Callable[[Path], Any]]] = [
    ("an empty file", lambda path: path.touch()),
    ("a folder", lambda path: path.mkdir()),
    ("a link to itself", lambda path: path.symlink_to(path)),
    ("a link to nothing", lambda path: path.symlink_to("nowhere")),
    ("a link to the folder above", lambda path: path.symlink_to("..")),
    ("a pipe", os.mkfifo),
    ("text", lambda path: path.write_text("no image at all\n" * 50)),
    ("a PNG of 60000 x 50000 pixels in a few bytes", _bomb),
    ("a BMP of 2 billion columns", _huge),
    ("a PostScript program", _postscript),
    ("a video's start", lambda path: path.write_bytes(b"\0\0\0\x20ftypisom" + bytes(500))),
    ("zeros", lambda path: path.write_bytes(bytes(3000))),
]

"""A user's files in and out: finding and reading images of any kind, writing PNGs whole or not at all."""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import IO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from engine.errors import UserError

Array = NDArray[np.uint8]
Own = Callable[[Path, bool], bool]
"""Whether a file, by its absolute path, is one of the program's outputs; and whether the user named it by itself."""

SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "heic", "heif", "gif", "bmp", "dib"),
        *("tif", "tiff", "jp2", "j2k", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm", "tga", "sgi", "pcx", "ico"),
        *("icns", "dds", "psd", "qoi"),
    )
)
"""Endings of the files that are taken from folders, in lower case; a file named by itself may have any. Some that
cannot be read (.heic) are among them: a photo that is reported is better than one that is passed over."""
VIDEO_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "ts", "mts", "m2ts", "3gp", "ogv"),
        *("vob", "asf", "mxf"),
    )
)
"""Endings, in lower case, of the files that are taken for videos."""
MAX_PIXELS = 128_000_000
"""Images with more pixels are refused before they are decoded, unless told otherwise."""

_BLOCK = 2**20
_ROOM = 4_000_000
"""Pixels that Pillow's own limit leaves at least: it holds for the words too that other threads draw meanwhile."""

_ORIENTATION = 0x0112
_WAYS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


@dataclass(frozen=True)
class Found:
    """An image file and the name of its outputs: a relative path without suffix that no other input has."""

    path: Path
    name: str


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS, *, opaque: bool = False) -> Array:
    """An image file as upright RGB, uint8 (H, W, 3).

    Grey, palette, CMYK and 1-bit images are converted, 16-bit ones lose their lower byte, transparent pixels show
    white (with `opaque`, the colour that the file holds: a mask's, say), the EXIF orientation is applied, an animation
    gives its first frame. Float images must lie in [0, 1].
    Raises UserError (naming the file) if it can't be opened, isn't an image, is cut off, or has more than `max_pixels`.
    PostScript (EPS) is refused: it is a program, and showing it would run it.
    """
    path = Path(path)
    try:
        with _open(path) as file, _pil_limit(max_pixels), Image.open(file, formats=_formats()) as image:
            _check_size(image, max_pixels)
            image.load()
            _check_size(image, max_pixels)  # of an ICO another one than was announced
            if image.format == "PNG" and not checksums_hold(file):
                raise OSError("the checksum of its pixels is wrong")
            return _rgb(_upright(image), path, opaque)
    except Image.DecompressionBombError as error:
        size = re.search(r"\((\d+) pixels\)", str(error))
        found = f"{int(size[1]) / 1e6:.4g} megapixels" if size else "too many pixels"
        limit = f"the limit is {max_pixels / 1e6:g}; raise it if you trust the file"
        raise UserError(f"{show(path)}: {found}, {limit}.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{show(path)}: not an image of a known format, or cut off at its start.") from error
    except OSError as error:
        # Pillow seeks to where a damaged file says, which may be no place: "invalid argument" tells the user nothing
        known = error.strerror if error.errno != errno.EINVAL else None
        reason = known or f"damaged or cut off: {error}"
        raise UserError(f"{show(path)}: cannot be read ({reason}).") from error
    except UserError:
        raise
    except Exception as error:  # the decoders raise whatever they like on damaged files: SyntaxError, struct.error, ...
        raise UserError(f"{show(path)}: cannot be decoded ({type(error).__name__}: {error}).") from error


def stored_orientation(path: Path) -> int:
    """The EXIF orientation by which `read_image` turns or mirrors an image file, 2 to 8; 1 where it leaves it as it is
    stored, also where the file cannot be read."""
    try:
        with _open(path) as file, _pil_limit(MAX_PIXELS), Image.open(file, formats=_formats()) as image:
            found = image.getexif().get(_ORIENTATION)
    except Exception:  # what is wrong with the file is for `read_image` to say
        return 1
    return found if found in _WAYS else 1


def find_images(
    inputs: Sequence[str | Path],
    own: Own | None = None,
    *,
    videos: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[list[Found], list[str]]:
    """Images that files, folders (recursively, by suffix, hidden files left out) and globs name: (images, problems).

    The order is that of the inputs, sorted within each; a file named twice comes once. Files that `own` takes for the
    program's outputs are left out, so that none is read again and no input is overwritten: `say` gets a line about
    those from folders and globs, and one that is named by itself is a problem. Outputs are named by the path relative
    to the folder or the glob's fixed part; names that meet are told apart by folders above or suffix.
    With `videos`, for a program that takes a video by itself, that is said of a folder that holds nothing else.
    """
    problems: list[str] = []
    only_own: list[str] = []
    chosen: dict[Path, tuple[Path, Path]] = {}
    left_out: dict[Path, Path] = {}
    for text in map(str, inputs):
        files = [(_key(path), path, relative) for path, relative in _expand(text, problems)]
        named = len(files) == 1 and files[0][1] == Path(text)
        others = [file for file in files if own is None or not own(file[0], named)]
        for key, path, relative in others:
            chosen.setdefault(key, (path, relative))
        if not files:
            problems.append(f"{show(text) or 'an empty name'}: {_nothing(text, videos)}")
        elif named and not others:
            problems.append(
                f"{show(text)}: lies where this program writes, by its name an output; left out, copy it elsewhere."
            )
        elif not others:
            only_own.append(f"{show(text)}: only outputs of this program, which are left out.")
        left_out |= {key: path for key, path, _ in files if not named}
    if not chosen:
        problems += only_own
    elif passed := [path for key, path in left_out.items() if key not in chosen]:
        say(f"left out as outputs of this program: {len(passed)}, such as {show(passed[0])}")
    paths = [path for path, _ in chosen.values()]
    names = _output_names(list(chosen), [relative for _, relative in chosen.values()])
    return [Found(path, name) for path, name in zip(paths, names, strict=True)], problems


def walk(folder: Path | str, problems: list[str], suffixes: frozenset[str] | None = SUFFIXES) -> Iterator[Path]:
    """Files below a folder in sorted order, hidden files and folders left out. Links to folders are followed, each real
    folder is entered once; a folder that cannot be read is told in `problems`."""
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        problems.append(f"{show(error.filename)}: the folder cannot be read ({error.strerror}).")

    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        info = os.stat(here)
        if (info.st_dev, info.st_ino) in seen:
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            known = suffixes is None or os.path.splitext(name)[1].lower() in suffixes
            if known and not name.startswith("."):
                yield Path(here, name)


def write_png(path: Path | str, pixels: Array, inside: Path | str | None = None) -> None:
    """Writes uint8 (H, W) or (H, W, 3) as PNG by `write_bytes`."""
    data = io.BytesIO()
    # of the ways that were tried on labels and overlays the fastest whose files are about as small as by default
    Image.fromarray(pixels).save(data, "png", compress_level=1, compress_type=zlib.Z_RLE)
    write_bytes(path, data.getvalue(), inside)


def write_bytes(path: Path | str, data: bytes, inside: Path | str | None = None) -> None:
    """Writes a file whole or not at all: a temporary file in the same folder takes the name when it is complete.

    With `inside`, a path that leads out of that folder (through a symbolic link) is refused.
    Raises UserError naming the path.
    """
    path = Path(path)
    part = path.parent / f".{uuid4().hex[:12]}.part"
    try:
        if inside is not None and not path.parent.resolve().is_relative_to(Path(inside).resolve()):
            raise UserError(f"{show(path)}: leads out of the output folder through a symbolic link; remove the link.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():  # whose error tells as much below
            check_file(path)
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be written ({error.strerror or error}).") from error


def show(path: Path | str) -> str:
    """A path for a message: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in os.fspath(path))


def checksums_hold(png: IO[bytes]) -> bool:
    """Whether the parts of a PNG that its pixels are made of are as their checksums say. Pillow does not look at those,
    so that a turned bit may give other pixels. The file is read from its start, as far as it goes; where it is cut off
    is for Pillow to say."""
    png.seek(8)
    while len(head := png.read(8)) == 8:
        left, kind = int.from_bytes(head[:4], "big"), head[4:]
        found = zlib.crc32(kind)
        while left and (block := png.read(min(left, _BLOCK))):
            found, left = zlib.crc32(block, found), left - len(block)
        told = png.read(4)
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT") and len(told) == 4 and told != found.to_bytes(4, "big"):
            return False
        if kind == b"IEND":
            break
    return True


def _open(path: Path) -> IO[bytes]:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{show(path)}: not a regular file.")
    if info.st_size == 0:
        raise UserError(f"{show(path)}: the file is empty (0 bytes).")
    file = open(path, "rb")  # noqa: SIM115
    start = file.read(4)
    file.seek(0)
    if start == b"%!PS" or start == b"\xc5\xd0\xd3\xc6":
        file.close()
        raise UserError(f"{show(path)}: is PostScript (EPS), a program that is not run here; convert it to PNG.")
    return file


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if (pixels := image.width * image.height) > max_pixels:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} ({pixels} pixels)")


@contextmanager
def _pil_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own limit is one for the whole program; `max_pixels` takes its place, for images within images too (ICO,
    ICNS). Its warnings are silent: what is wrong with a file is told by one error of ours."""
    before = Image.MAX_IMAGE_PIXELS
    limit = max(max_pixels, _ROOM) / 2  # it warns above and refuses above the double
    Image.MAX_IMAGE_PIXELS = limit  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@cache
def _formats() -> list[str]:
    """Pillow's formats but for those that are no pictures by themselves: it has another program run PostScript, and
    hands the others to whatever was registered for them."""
    Image.init()
    return [name for name in Image.ID if name not in ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")]


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants it. Pillow's own function also writes the other entries anew, and fails
    when one of them is damaged."""
    orientation = image.getexif().get(_ORIENTATION)
    way = _WAYS.get(orientation) if isinstance(orientation, int) else None
    return image if way is None else image.transpose(way)


def _rgb(image: Image.Image, path: Path, opaque: bool) -> Array:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        top = 1 if image.mode == "F" else 65535
        if not (low >= 0 and high <= top):
            found = f"values from {low:.9g} to {high:.9g}"
            raise UserError(f"{show(path)}: {found}, expected 0 to {top} in an image of mode {image.mode}.")
        grey = np.rint(values * 255) if image.mode == "F" else values >> 8
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if opaque:
            return np.array(layer)[..., :3].copy()
        paper = Image.new("RGB", image.size, (255, 255, 255))
        paper.paste(layer, mask=layer.getchannel("A"))
        return np.array(paper)
    return np.array(image.convert("RGB"))


def _expand(text: str, problems: list[str]) -> Iterator[tuple[Path, Path]]:
    """Files that one input names, each with its path relative to the folder it was searched in."""
    if os.path.isdir(text) and text:
        yield from ((p, p.relative_to(text)) for p in walk(text, problems))
    elif os.path.lexists(text):
        yield Path(text), Path(Path(text).name)
    elif glob.has_magic(text):
        fixed = Path(*_fixed_parts(text))
        for hit in _glob(text, problems):
            inner = walk(hit, problems) if os.path.isdir(hit) else [hit]
            yield from ((p, p.relative_to(fixed)) for p in inner)


def _nothing(text: str, videos: bool) -> str:
    """What is said of an input that names no image."""
    lonely = next(walk(text, [], VIDEO_SUFFIXES), None) if videos and text and os.path.isdir(text) else None
    if lonely is None:
        return "no such file or no image in it."
    return f"no image in it, but videos; a video is given by itself, such as {show(lonely)}."


def _glob(pattern: str, problems: list[str]) -> list[Path]:
    """Sorted matches. `**` goes through `walk`, because the library's own follows links in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(map(Path, glob.glob(pattern)))
    fixed = Path(*_fixed_parts(pattern))
    wanted = parts[len(fixed.parts) :]
    files = walk(fixed, problems, SUFFIXES if wanted[-1] == "**" else None)
    return [path for path in files if _matches(path.relative_to(fixed).parts, wanted)]


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return wanted == ("**",) or any(_matches(parts[i:], wanted[1:]) for i in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _fixed_parts(pattern: str) -> list[str]:
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return list(parts[:first])


def _output_names(keys: Sequence[Path], relative: Sequence[Path]) -> list[str]:
    """A name for each file: as short as it can be, names that meet grow by the folders above, then by the suffix.

    `keys` are absolute and differ, so the longest form (folders below the common one, and the suffix) is always unique.
    """
    common = os.path.commonpath([key.parent for key in keys]) if keys else ""
    forms = [
        [rel.parent / rel.stem, key.parent.relative_to(common) / key.stem, rel, key.relative_to(common)]
        for key, rel in zip(keys, relative, strict=True)
    ]
    levels = [0] * len(forms)
    while True:
        meeting: dict[Path, list[int]] = {}
        for i, level in enumerate(levels):
            meeting.setdefault(forms[i][level], []).append(i)
        clashes = [i for group in meeting.values() if len(group) > 1 for i in group if levels[i] < 3]
        if not clashes:
            return [str(forms[i][level]) for i, level in enumerate(levels)]
        for i in clashes:
            levels[i] += 1


def _key(path: Path) -> Path:
    """Where a file really is; its own name stays, so that two links to one image are two images."""
    return Path(os.path.realpath(path.parent), path.name)


def check_results_writable(checkpoint: Path, out: Path | None, json_file: Path | None) -> None:
    """`check_writable` for the scores of a checkpoint, which lie beside it where nothing else is said, the JSON in
    `out`."""
    if json_file is not None:
        check_file(json_file)
    out = out or checkpoint.parent
    for folder in (out, json_file.parent if json_file else out):
        if folder != checkpoint.parent or folder.is_dir():  # a checkpoint that is missing has an error of its own
            check_writable(folder)


def check_file(path: Path) -> None:
    """Raises UserError where a file is to be written and a folder, a device or a pipe is."""
    if path.is_dir():
        raise UserError(f"{show(path)}: is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{show(path)}: is a device or a pipe, which would be replaced; name a file")


def check_writable(folder: Path) -> None:
    """Finds out before the first prediction rather than after it. Raises UserError."""
    probe = folder / f".{uuid4().hex[:12]}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{show(folder)}: cannot write there ({error.strerror}); choose another output folder."
        ) from error

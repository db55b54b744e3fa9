"""Video files, read and written frame by frame with OpenCV (FFmpeg).

A written file has no sound, and a constant rate of frames; it has its name only when it is complete.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.images import check_writable, show

Array = NDArray[np.uint8]

CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
"""Endings of the files that can be written, and the codec of each."""
LOSSLESS = {".mkv": "FFV1", ".avi": "FFV1"}
"""The same for grey frames that must come back exactly, such as label ids."""
_COUNTED = frozenset({".mp4", ".m4v", ".mov", ".avi"})
"""Endings of the files that hold their number of frames. For the others OpenCV computes it from the length of all there
is in the file, sound included, and the rate."""
_LATE_SOUND = 0.1
"""Seconds by which the sound of any file may last longer than its pictures: it comes in blocks of its own length."""
_UNEVEN = 0.1
"""Seconds by which a frame may come beside its time at a constant rate before that is said."""
_USUAL_RATE = 25.0
_HIGHEST_RATE = 1000.0
_LARGEST_INDEX = 2**28
"""Bytes of an .mp4's index that are looked at; one of hours has some millions."""


class Reader:
    """The frames of a video, RGB uint8 (H, W, 3), upright; to be iterated over once, in a `with` block.

    Attributes:
        rate: frames a second.
        size: width and height.
        announced: frames that the file says it has, or that its length and rate make; None where it tells neither.
        read: frames so far.
        seconds: spent on them.
        remarks: what was assumed, and what the file leaves out; complete after the last frame.
        problems: what is wrong with the file; complete after the last frame.

    Raises:
        UserError: no such file, not a video that OpenCV can decode, no frame in it; while iterating, a frame of another
            size.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.read, self.seconds, self._time = 0, 0.0, 0.0
        self.remarks, self.problems = list[str](), list[str]()
        if not self.path.is_file():
            raise UserError(f"{show(self.path)}: no such file.")
        if self.path.stat().st_size == 0:
            raise UserError(f"{show(self.path)}: the file is empty (0 bytes).")
        # several decoding threads make other pictures of a damaged file in each run
        self._capture = cv2.VideoCapture(_known(self.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not self._capture.isOpened():
            raise UserError(
                f"{show(self.path)}: cannot be opened as a video: not a video file, cut off (an .mp4 keeps its index "
                "at the end), or of a codec that OpenCV's FFmpeg does not know; repair or convert it, such as with "
                "ffmpeg -i IN -c:v libx264 OUT.mp4"
            )
        self._first = self._next()
        if self._first is None:
            self._capture.release()
            raise UserError(
                f"{show(self.path)}: has no frame that can be decoded (no video stream, none before the file is cut "
                "off, or an unknown codec); repair or convert it"
            )
        self.size = self._first.shape[1], self._first.shape[0]
        self.rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        if not 0 < self.rate <= _HIGHEST_RATE:
            self.remarks.append(f"the file tells no frame rate (found {self.rate:g}); {_USUAL_RATE:g} is assumed")
            self.rate = _USUAL_RATE
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = int(count) if 0 < count < 2**40 else None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[Array]:
        frame, self._first = self._first, None
        start, beside = self._time, 0.0
        while frame is not None:
            beside = max(beside, abs(self._time - start - self.read / self.rate))
            if frame.shape[:2] != (self.size[1], self.size[0]):
                raise UserError(
                    f"{show(self.path)}: frame {self.read + 1} has {frame.shape[1]} x {frame.shape[0]} pixels, those "
                    f"before {self.size[0]} x {self.size[1]}; cut the video there"
                )
            self.read += 1
            yield frame
            frame = self._next()
        if beside > max(_UNEVEN, 1.5 / self.rate):
            self.remarks.append(
                f"frames come up to {beside:.2g} s earlier or later than at the constant {self.rate:.4g} a second that "
                "are taken: its rate varies"
            )
        counted = self.path.suffix.lower() in _COUNTED
        if self.announced is None or self.read >= self.announced - (0 if counted else _LATE_SOUND * self.rate):
            return
        found = f"{self.read} frames could be read of the {self.announced}"
        shown = self.announced * shown_share(self.path)
        if shown <= self.announced - 0.9 and self.read >= shown - 1.5:  # the edges may lie within a frame
            self.remarks.append(f"{found} in the file, whose edit list leaves out the others: it was trimmed")
        else:
            self.problems.append(
                f"{found} announced; the file is cut off or damaged"
                if counted
                else f"{found} that its length and rate make: its sound is longer than its pictures, their rate "
                "varies, or the file is cut off or damaged"
            )

    def _next(self) -> Array | None:
        start = time.perf_counter()
        there, frame = self._capture.read()
        rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False) if there else None
        self._time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 if there else self._time
        self.seconds += time.perf_counter() - start
        return rgb


def _known(path: Path, named: Path | None = None) -> str:
    """A path as FFmpeg takes it: what stands before a first colon would be a protocol to it. Raises UserError, about
    `named` if it is another, for a name that is no text: with that OpenCV ends the process."""
    known = os.path.join(".", path)
    try:
        known.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{show(named or path)}: OpenCV opens no video whose name, or that of a folder above it, is not UTF-8; "
            "rename it"
        ) from None
    return known


def shown_share(path: Path) -> float:
    """Share of the pictures' time that the edit list of an .mp4 or .mov shows: programs that cut without encoding anew
    leave the frames before and after in the file. 1 for other files, and where there is no sound list."""
    try:
        with open(path, "rb") as file:
            end, found = path.stat().st_size, b""
            while file.tell() + 8 <= end and found != b"moov":
                start = file.tell()
                size, found = struct.unpack(">I4s", file.read(8))
                size = struct.unpack(">Q", file.read(8))[0] if size == 1 else size or end - start
                if found == b"moov":
                    file.seek(start)
                    return _shown_share(file.read(min(size, _LARGEST_INDEX)))
                file.seek(start + max(8, size))
    except (OSError, struct.error, ValueError, IndexError, ArithmeticError):  # damaged
        pass
    return 1.0


def _shown_share(index: bytes) -> float:
    (movie,) = _boxes(index, b"moov")
    for track in _boxes(movie, b"trak"):
        media = b"".join(_boxes(track, b"mdia"))
        lists = [one for edits in _boxes(track, b"edts") for one in _boxes(edits, b"elst")]
        if lists and any(one[8:12] == b"vide" for one in _boxes(media, b"hdlr")):
            length, movie_units = _boxes(media, b"mdhd")[0], _boxes(movie, b"mvhd")[0]
            form = ">Qq4x" if lists[0][0] else ">Ii4x"  # by the version
            count = struct.unpack(">I", lists[0][4:8])[0]
            edits = struct.iter_unpack(form, lists[0][8 : 8 + count * struct.calcsize(form)])
            seconds = sum(duration for duration, start in edits if start >= 0) / _times(movie_units)[0]
            units, duration = _times(length)
            return min(1.0, seconds * units / duration) if seconds else 1.0
    return 1.0


def _boxes(data: bytes, kind: bytes) -> list[bytes]:
    """The contents of the boxes of a kind, of ISO base media (ISO/IEC 14496-12)."""
    found, place = [], 0
    while place + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[place : place + 8])
        if name == kind:
            found.append(data[place + 8 : place + size])
        place += max(8, size)
    return found


def _times(header: bytes) -> tuple[int, int]:
    """Units in a second, and the length in them, of a box `mvhd` or `mdhd`."""
    form, start = (">IQ", 20) if header[0] else (">II", 12)
    units, length = struct.unpack(form, header[start : start + struct.calcsize(form)])
    return units, length


@contextmanager
def writing(
    path: Path | str, rate: float, size: tuple[int, int], lossless: bool = False
) -> Iterator[Callable[[Array], None]]:
    """A function that appends a frame to a video: RGB uint8 (H, W, 3), or with `lossless` grey uint8 (H, W), exactly.

    Until the block ends well the file has a temporary name in the same folder; else it is removed. `size` is width and
    height, both even (the codecs store colour for 2 x 2 pixels). MPEG-4 keeps rates above 65 with one or two decimals.

    Raises:
        UserError: an ending of no video, or of no lossless one; a path that cannot be written; an incomplete file.
    """
    path = Path(path)
    codec = check_name(path, lossless)
    check_writable(path.parent)
    part = path.with_name(f".{uuid4().hex[:12]}.part{path.suffix.lower()}")
    rate = _kept(rate) if codec == "mp4v" else rate
    color = [cv2.VIDEOWRITER_PROP_IS_COLOR, int(not lossless)]
    writer = cv2.VideoWriter(_known(part, path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), rate, size, color)
    count = 0

    def write(frame: Array) -> None:
        nonlocal count
        writer.write(frame if lossless else cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        count += 1

    try:
        if not writer.isOpened():
            raise UserError(
                f"{show(path)}: OpenCV cannot write this video (codec {codec}, {size[0]} x {size[1]}, {rate:g} "
                "frames/s); choose another ending"
            )
        yield write
        writer.release()
        _check_complete(part, path, count)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be written ({error.strerror or error})") from error
    finally:
        writer.release()
        part.unlink(missing_ok=True)


def _kept(rate: float) -> float:
    """The rate as MPEG-4 can hold it: a fraction of 16 bits (ISO/IEC 14496-2, vop_time_increment_resolution), which
    OpenCV makes with a power of ten below it."""
    decimals = next(places for places in (3, 2, 1, 0) if rate * 10**places < 2**16 - 1)
    return round(rate, decimals)


def check_name(path: Path, lossless: bool = False) -> str:
    """The codec for a file of this name. Raises UserError if its ending is not one that can be written."""
    codecs = LOSSLESS if lossless else CODECS
    found = path.suffix.lower()
    if found not in codecs:
        why = "label ids need a lossless file, " if lossless and found in CODECS else ""
        ending = f"the ending {found}" if found else "no ending"
        raise UserError(f"--out {show(path)}: {why}found {ending}, expected a video's: {', '.join(codecs)}")
    return codecs[found]


def _check_complete(part: Path, path: Path, count: int) -> None:
    """The writer tells of no error, such as a full disk: its last frame must be there."""
    capture = cv2.VideoCapture(_known(part, path), cv2.CAP_FFMPEG)
    there = capture.isOpened() and int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) >= count
    there = there and capture.set(cv2.CAP_PROP_POS_FRAMES, count - 1) and capture.read()[0]
    capture.release()
    if not there:
        raise UserError(f"{show(path)}: not all of its {count} frames could be written; check the free space and quota")

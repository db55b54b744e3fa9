"""Label a video: reading, the network and writing work at the same time, and memory does not grow with its length.

The written file has the frame rate and the size of the one read, and no sound; its frames come at a constant rate, also
where those of the source did not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import UserError
from engine.images import show
from engine.pipeline import ahead, behind
from engine.video import Reader, check_name, writing
from seg import draw, labels
from seg.flicker import Flicker, Motion
from seg.html import counted
from seg.label_files import KINDS

Array = NDArray[np.uint8]
Labels = Callable[[Sequence[Array]], Sequence[Array]]
"""Frames, RGB uint8 (H, W, 3) -> train ids, uint8 (H, W), as `Predictor.predict_batch`."""
Probabilities = Callable[[Sequence[Array]], Sequence[Tensor]]
"""Frames -> probabilities, float32 (C, H, W), as `Predictor.probabilities_batch`."""

_PROGRESS_SECONDS = 5.0


@dataclass
class Speed:
    """Frames, and the seconds in which each part was busy with them."""

    frames: int = 0
    total: float = 0.0
    """From the first frame to the finished file."""
    reading: float = 0.0
    labelling: float = 0.0
    writing: float = 0.0
    """Drawing included."""

    def __str__(self) -> str:
        total, reading, labelling, writing = (
            f"{self.frames / max(seconds, 1e-9):.1f}"
            for seconds in (self.total, self.reading, self.labelling, self.writing)
        )
        return (
            f"{total} frames/s end to end; by the time that each part was busy, reading alone would give {reading}, "
            f"the network {labelling}, writing {writing}"
        )


@dataclass
class Summary:
    """What `label_video` did."""

    source: Path
    files: list[Path]
    rate: float
    """Frames a second, of the source and of the files."""
    size: tuple[int, int]
    """Width and height of the files in pixels."""
    speed: Speed
    flicker: Flicker
    """Of the network's labels frame by frame."""
    smoothed: Flicker | None
    """Of the labels after smoothing, if it was asked for."""
    cuts: int
    """Scene cuts found."""
    remarks: list[str] = field(default_factory=list)
    """What the files do not have as the source has it."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the source, such as frames that are missing."""

    def __str__(self) -> str:
        where = ", ".join(show(path) for path in self.files)
        frames = self.speed.frames
        lines = [
            f"{show(self.source)}: {frames} frame{'s' if frames != 1 else ''} of {self.size[0]} x {self.size[1]} at "
            f"{self.rate:.4g} frames/s labelled -> {where}",
            str(self.speed),
        ]
        if not math.isnan(self.flicker.share):
            lines.append("flicker (pixels that change class from a frame to the next): " + self._flicker())
        elif self.cuts:
            lines.append(f"flicker: no two neighbouring frames of one scene; {counted(self.cuts, 'scene cut')}")
        lines += [f"remark: {text}" for text in self.remarks]
        return "\n".join([*lines, *(f"problem: {text}" for text in self.problems)])

    def _flicker(self) -> str:
        text = _shares(self.flicker)
        if self.smoothed is not None:
            text += f"; after smoothing {_shares(self.smoothed)}"
        return text + (f"; {counted(self.cuts, 'scene cut')} left out" if self.cuts else "")


def _shares(found: Flicker) -> str:
    still = "" if math.isnan(found.still_share) else f" ({100 * found.still_share:.2f}% where the image hardly changes)"
    return f"{100 * found.share:.2f}%{still}"


def label_video(
    predict: Labels,
    source: Path | str,
    out: Path | str,
    save: Sequence[str] = ("overlay",),
    *,
    table: labels.LabelTable = labels.CITYSCAPES,
    batch_size: int = 1,
    smoothing: float | None = None,
    probabilities: Probabilities | None = None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Label every frame of a video and write what `save` names.

    Args:
        predict: frames to train ids.
        source: the video.
        out: the file to write. Of several kinds each gets a file, `NAME_KIND.ENDING`.
        save: `overlay`, `color`, `labels` (8-bit label ids in an .mkv or .avi, lossless).
        table: of the labels, for colours and label ids.
        batch_size: frames that go through the network together.
        smoothing: None, or the weight (0 to 1) of the newest frame in an exponential average of the probabilities over
            the frames, whose best class is the label. It starts anew at each scene cut (`seg.flicker`).
        probabilities: frames to probabilities; needed with `smoothing`.
        say: gets a line of progress every few seconds.

    Raises:
        UserError: see `Reader` and `writing`; an unknown kind; out is the source.
    """
    source = Path(source)
    targets = _targets(Path(out), save)
    for target in targets.values():
        if target.exists() and source.exists() and os.path.samefile(target, source):
            raise UserError(f"--out {show(target)}: is the video that is read; choose another name")
    with Reader(source) as reader:
        size = reader.size[0] // 2 * 2, reader.size[1] // 2 * 2
        if 0 in size:
            raise UserError(f"{show(source)}: frames of {reader.size[0]} x {reader.size[1]} are too small for a video")
        if size != reader.size:
            cut = f"{reader.size[0]} x {reader.size[1]}"
            reader.remarks.append(f"odd sides ({cut}) lose their last pixel, codecs take even ones only")
        speed, work = Speed(), _Labeller(predict, smoothing, probabilities)
        start = time.perf_counter()
        with ExitStack() as files:
            writers = {k: files.enter_context(writing(p, reader.rate, size, k == "labels")) for k, p in targets.items()}

            def write(image: Array, ids: Array) -> None:
                began = time.perf_counter()
                for kind, append in writers.items():
                    append(_painted(kind, image[: size[1], : size[0]], ids[: size[1], : size[0]], table))
                speed.writing += time.perf_counter() - began

            # in this order: the last frame is written before the files are closed
            with behind(write, 2 * batch_size) as later, ahead(reader, 2 * batch_size) as frames:
                tell = _Progress(say, show(source), reader.announced)
                for batch in _batches(frames, batch_size):
                    for image, ids in zip(batch, work(batch), strict=True):
                        later(image, ids)
                    speed.frames += len(batch)
                    tell(speed.frames)
        speed.total, speed.reading, speed.labelling = time.perf_counter() - start, reader.seconds, work.seconds
        return Summary(
            source,
            list(targets.values()),
            reader.rate,
            size,
            speed,
            work.flicker,
            work.smoothed,
            work.motion.cuts,
            reader.remarks,
            reader.problems,
        )


class _Labeller:
    """Batches of frames to train ids, with smoothing, and what is counted on the way."""

    def __init__(self, predict: Labels, smoothing: float | None, probabilities: Probabilities | None) -> None:
        if smoothing is not None and (probabilities is None or not 0 < smoothing <= 1):
            raise ValueError("smoothing needs a weight above 0 and up to 1, and a function for the probabilities")
        self.predict, self.weight, self.probabilities = predict, smoothing, probabilities
        self.motion, self.flicker = Motion(), Flicker()
        self.smoothed = None if smoothing is None else Flicker()
        self.average: Tensor | None = None
        self.seconds = 0.0

    def __call__(self, frames: Sequence[Array]) -> Iterable[Array]:
        start = time.perf_counter()
        if self.weight is None or self.probabilities is None:
            found = list(self.predict(frames))
            for image, ids in zip(frames, found, strict=True):
                self.flicker.update(ids, self.motion.update(image))
        else:
            shares = self.probabilities(frames)
            found = [self._smooth(image, share, self.weight) for image, share in zip(frames, shares, strict=True)]
        self.seconds += time.perf_counter() - start
        return found

    def _smooth(self, image: Array, share: Tensor, weight: float) -> Array:
        still = self.motion.update(image)
        self.flicker.update(_best(share), still)
        if self.average is None or still is None:
            self.average = share.clone()
        else:
            self.average.lerp_(share, weight)
        ids = _best(self.average)
        assert self.smoothed is not None
        self.smoothed.update(ids, still)
        return ids


class _Progress:
    def __init__(self, say: Callable[[str], None], name: str, announced: int | None) -> None:
        self.say, self.name, self.of = say, name, f" of {announced}" if announced else ""
        self.start = self.last = time.perf_counter()

    def __call__(self, frames: int) -> None:
        now = time.perf_counter()
        if now - self.last > _PROGRESS_SECONDS:
            self.last = now
            self.say(f"{self.name}: frame {frames}{self.of}, {frames / (now - self.start):.1f} frames/s")


def _targets(out: Path, save: Sequence[str]) -> dict[str, Path]:
    """The file of each kind."""
    kinds = list(dict.fromkeys(save))
    known = [kind for kind in KINDS if kind != "confidence"]
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        which = f"{', '.join(unknown) or 'nothing'} of a video"
        why = ", only of images, such as its frames" if "confidence" in unknown else ""
        raise UserError(f"Cannot save {which}{why}; choose from {', '.join(known)}.")
    if out.is_dir():
        raise UserError(f"--out {show(out)}: is a folder; a video needs the name of a file, such as drive_seg.mp4")
    for kind in kinds:
        check_name(out, kind == "labels")
    if len(kinds) == 1:
        return {kinds[0]: out}
    return {kind: out.with_name(f"{out.stem}_{kind}{out.suffix}") for kind in kinds}


def _batches(frames: Iterator[Array], size: int) -> Iterator[list[Array]]:
    while batch := list(islice(frames, size)):
        yield batch


def _painted(kind: str, image: Array, ids: Array, table: labels.LabelTable) -> Array:
    """The picture of one frame, of its size."""
    if kind == "labels":
        return np.ascontiguousarray(table.to_label_ids(ids))
    if kind == "color":
        return draw.colorize(ids, table.colors)
    return draw.overlay(np.ascontiguousarray(image), ids, legend=False, table=table)


def _best(shares: Tensor) -> Array:
    best: Any = shares.max(0).indices.byte().cpu().numpy()  # a multiple faster than argmax on a CPU
    return best  # type: ignore[no-any-return]

"""Label a user's images: what tools/predict.py does.

One bad file is reported and stops nothing; nothing is written outside the output folder. The next image is read, and
those before are drawn and written, while the network labels one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from engine.errors import UserError
from engine.images import MAX_PIXELS, Array, Found, Own, check_writable, find_images, read_image, show, write_png
from engine.pipeline import ahead, spread
from seg import draw, labels

KINDS = {
    "labels": "_labelIds.png",
    "color": "_color.png",
    "overlay": "_overlay.png",
    "confidence": "_confidence.png",
}
"""What `label_files` can save, and how the files end."""
Confident = Callable[[Array], tuple[NDArray[Any], Array]]
"""An image, RGB uint8 (H, W, 3) -> train ids and round(255 p), uint8 (H, W), as `Predictor.predict_confident`."""
_ROOM = 32_000_000
"""Pixels of the images that are labelled and not yet written, beyond which no further one is labelled: about 10 bytes
each while they wait, and as many again for each that is being drawn."""


@dataclass
class Summary:
    """What `label_files` did: images labelled, and what went wrong, one sentence each."""

    done: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = f"{self.done} image{'s' if self.done != 1 else ''} labelled"
        if not self.problems:
            return done
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        return "\n".join([f"{done}, {count}:", *(f"  {problem}" for problem in self.problems)])


def label_files(
    predict: Callable[[Array], NDArray[Any]],
    inputs: Sequence[str | Path],
    out: Path | str,
    save: Sequence[str] = ("labels",),
    *,
    table: labels.LabelTable = labels.CITYSCAPES,
    confident: Confident | None = None,
    max_pixels: int = MAX_PIXELS,
    say: Callable[[str], None] = print,
) -> Summary:
    """Labels every image that `inputs` (files, folders, globs) name and writes the pictures below `out`.

    `predict` takes an RGB image (H, W, 3) uint8 and returns train ids (H, W) of `table`. `save` names what is kept:
    `labels` (8-bit label ids; with Cityscapes' table the test server's format), `color` (RGB), `overlay` (with a legend
    below), `confidence` (8-bit grey: round(255 p), p being the probability of the predicted class), each in a folder of
    that name under `out`. With `confidence`, `confident` predicts in place of `predict`. Raises UserError if nothing
    can be done at all: no image, an unknown kind, `out` can't be written.
    """
    unknown = [kind for kind in save if kind not in KINDS]
    if unknown or not save:
        raise UserError(f"Cannot save {', '.join(unknown) or 'nothing'}; choose from {', '.join(KINDS)}.")
    if "confidence" in save and confident is None:
        raise ValueError("to save confidence, label_files needs the function `confident`")
    out = Path(out)
    found, problems = find_images(inputs, _own(out), videos=True, say=say)
    if not found:
        raise UserError("; ".join(problems))
    check_writable(out)
    summary = Summary(problems=problems)
    kinds = tuple(dict.fromkeys(save))

    def decide(image: Array) -> tuple[NDArray[Any], Array | None]:
        return confident(image) if confident is not None and "confidence" in kinds else (predict(image), None)

    def write(job: _Labelled | UserError) -> tuple[int, int]:
        if isinstance(job, UserError):
            raise job
        for kind in kinds:
            target = out / kind / f"{job.item.name}{KINDS[kind]}"
            write_png(target, _picture(kind, job, table), inside=out)
        return job.ids.shape[0], job.ids.shape[1]

    threads = min(8, os.cpu_count() or 1)
    with (
        ahead(_read(found, max_pixels), 1) as images,
        spread(write, _labelled(images, decide), threads, _pixels, _ROOM) as written,
    ):
        for number, (item, one) in enumerate(zip(found, written, strict=True), 1):
            try:
                height, width = one.result()
                summary.done += 1
                say(f"[{number}/{len(found)}] {show(item.path)}: {width} x {height} -> {show(item.name)}")
            except UserError as error:
                summary.problems.append(str(error))
                say(f"[{number}/{len(found)}] {show(item.path)}: FAILED")
    return summary


class _Labelled(NamedTuple):
    """An image file, its pixels, its train ids and, where that is saved, the confidence in them."""

    item: Found
    image: Array
    ids: NDArray[Any]
    confidence: Array | None


def _read(found: Iterable[Found], max_pixels: int) -> Iterator[tuple[Found, Array | UserError]]:
    for item in found:
        try:
            yield item, read_image(item.path, max_pixels)
        except UserError as error:
            yield item, error


def _labelled(
    images: Iterable[tuple[Found, Array | UserError]], decide: Callable[[Array], tuple[NDArray[Any], Array | None]]
) -> Iterator[_Labelled | UserError]:
    for item, image in images:
        if isinstance(image, UserError):
            yield image
            continue
        try:
            yield _Labelled(item, image, *decide(image))
        except UserError as error:
            yield UserError(f"{show(item.path)}: {error}")


def _pixels(job: _Labelled | UserError) -> int:
    return 0 if isinstance(job, UserError) else job.ids.size


def _own(out: Path) -> Own:
    """By its name an output of this program: from folders and globs also of an earlier run, elsewhere."""
    folders = {Path(os.path.realpath(out / kind)): end for kind, end in KINDS.items()}

    def own(path: Path, named: bool) -> bool:
        if any(path.is_relative_to(folder) and path.name.endswith(end) for folder, end in folders.items()):
            return True
        return not named and any(kind in path.parent.parts and path.name.endswith(KINDS[kind]) for kind in KINDS)

    return own


def _picture(kind: str, job: _Labelled, table: labels.LabelTable) -> Array:
    if kind == "labels":
        return table.to_label_ids(job.ids)
    if kind == "confidence":
        assert job.confidence is not None
        return job.confidence
    return draw.colorize(job.ids, table.colors) if kind == "color" else draw.overlay(job.image, job.ids, table=table)

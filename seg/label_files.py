"""Label a user's images: what tools/predict.py does.

One bad file is reported and stops nothing; nothing is written outside the output folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.errors import UserError
from engine.images import MAX_PIXELS, Array, Own, check_writable, find_images, read_image, show, write_png
from seg import draw, labels

KINDS = {"labels": "_labelIds.png", "color": "_color.png", "overlay": "_overlay.png"}
"""What `label_files` can save, and how the files end."""


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
    max_pixels: int = MAX_PIXELS,
    say: Callable[[str], None] = print,
) -> Summary:
    """Labels every image that `inputs` (files, folders, globs) name and writes the pictures below `out`.

    `predict` takes an RGB image (H, W, 3) uint8 and returns train ids (H, W) of `table`. `save` names what is kept:
    `labels` (8-bit label ids; with Cityscapes' table the test server's format), `color` (RGB), `overlay` (with a legend
    below), each in a folder of that name under `out`. Raises UserError if nothing can be done at all: no image, an
    unknown kind, `out` can't be written.
    """
    unknown = [kind for kind in save if kind not in KINDS]
    if unknown or not save:
        raise UserError(f"Cannot save {', '.join(unknown) or 'nothing'}; choose from {', '.join(KINDS)}.")
    out = Path(out)
    found, problems = find_images(inputs, _own(out), videos=True, say=say)
    if not found:
        raise UserError("; ".join(problems))
    check_writable(out)
    summary = Summary(problems=problems)
    for number, item in enumerate(found, 1):
        try:
            image = read_image(item.path, max_pixels)
            ids = _named(predict, image, item.path)
            for kind in dict.fromkeys(save):
                target = out / kind / f"{item.name}{KINDS[kind]}"
                write_png(target, _picture(kind, image, ids, table), inside=out)
            summary.done += 1
            say(f"[{number}/{len(found)}] {show(item.path)}: {image.shape[1]} x {image.shape[0]} -> {show(item.name)}")
        except UserError as error:
            summary.problems.append(str(error))
            say(f"[{number}/{len(found)}] {show(item.path)}: FAILED")
    return summary


def _own(out: Path) -> Own:
    """By its name an output of this program: from folders and globs also of an earlier run, elsewhere."""
    folders = {Path(os.path.realpath(out / kind)): end for kind, end in KINDS.items()}

    def own(path: Path, named: bool) -> bool:
        if any(path.is_relative_to(folder) and path.name.endswith(end) for folder, end in folders.items()):
            return True
        return not named and any(kind in path.parent.parts and path.name.endswith(KINDS[kind]) for kind in KINDS)

    return own


def _picture(kind: str, image: Array, ids: NDArray[Any], table: labels.LabelTable) -> Array:
    if kind == "labels":
        return table.to_label_ids(ids)
    return draw.colorize(ids, table.colors) if kind == "color" else draw.overlay(image, ids, table=table)


def _named(predict: Callable[[Array], NDArray[Any]], image: Array, path: Path) -> NDArray[Any]:
    try:
        return predict(image)
    except UserError as error:
        raise UserError(f"{show(path)}: {error}") from error

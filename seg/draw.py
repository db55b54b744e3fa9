"""Pictures: palettes, overlays with a legend, panels, plots of scores, and the one picture of several runs.

Arrays in and out are uint8: images and colours (H, W, 3) in RGB, ids (H, W). Ids are train ids unless another palette
is given, Cityscapes' unless another table is; 255 is void and drawn in a colour of its own, see `void`. Plots are
written to a path, whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from engine import plots
from engine.plots import Record, bars, curves, figure, in_legend, records
from seg import labels

Array = NDArray[np.uint8]

_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_KEY_COLUMNS = 10
"""Names of classes in a row below the examples of a picture of runs."""


@dataclass(frozen=True)
class Run:
    """One training run, as `plot_runs` shows it."""

    name: str
    metrics: Path | str | Sequence[Record]
    """A metrics.jsonl or its records; those with "loss" or "score" (0 to 1) beside "step" are drawn."""
    class_iou: Mapping[str, float | None] | None = None
    """IoU by class (0 to 1; nan or None: nothing to score), if known."""


@dataclass(frozen=True)
class Example:
    """One image, its true train ids (None: there are none) and each run's prediction (train ids) by the run's name."""

    image: Array
    label: Array | None
    predictions: Mapping[str, Array]


_VOID = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "magenta": (255, 0, 255)}


def void(palette: NDArray[np.uint8]) -> str:
    """The colour of void beside classes of these colours: black, but a class may have that, as VOC's background has."""
    taken = set(map(tuple, palette.tolist()))
    return next((name for name, color in _VOID.items() if color not in taken), "black")


def colorize(ids: NDArray[Any], palette: NDArray[np.uint8] | None = None) -> Array:
    """Colours of ids (H, W): RGB uint8 (H, W, 3). `palette` (K, 3) defaults to the 19 train classes; 255 is `void`.

    Raises ValueError on any other id outside the palette, since that means ids of another kind.
    """
    palette = labels.TRAIN_COLORS if palette is None else palette
    table = np.zeros((256, 3), np.uint8)
    table[labels.IGNORE] = _VOID[void(palette)]
    table[: len(palette)] = palette
    strange = [i for i in _present(ids) if not (0 <= i < len(palette) or i == labels.IGNORE)]
    if strange:
        raise ValueError(f"ids {strange[:5]} are not in a palette of {len(palette)} colours (255 is void)")
    return cast(Array, table.take(ids, axis=0))  # in half the time of table[ids]


def overlay(
    image: Array,
    ids: NDArray[Any],
    alpha: float = 0.5,
    legend: bool = True,
    table: labels.LabelTable = labels.CITYSCAPES,
) -> Array:
    """The image tinted with the colours of its train ids; void pixels stay as they are.

    Has the image's size; with `legend`, a strip below it names the classes present, the largest first (and a very small
    image gets a margin at its right so that the words fit).
    """
    if image.shape[:2] != ids.shape:
        raise ValueError(f"image {image.shape[:2]} and ids {ids.shape} differ in size")
    mixed = cv2.addWeighted(image, 1 - alpha, colorize(ids, table.colors), alpha, 0).astype(np.uint8, copy=False)
    void = ids == labels.IGNORE
    mixed[void] = image[void]
    if not legend:
        return mixed
    return _stack([mixed, _legend(ids, mixed.shape[1], max(12, min(64, mixed.shape[1] // 60)), table)])


def panel(
    image: Array,
    label: NDArray[Any] | None,
    prediction: NDArray[Any],
    max_width: int = 640,
    legend: bool = True,
    table: labels.LabelTable = labels.CITYSCAPES,
) -> Array:
    """Image, true label (if there is one) and prediction beside each other, titled, each at most `max_width` wide."""
    parts: list[tuple[str, Array]] = [("image", image)]
    if label is not None:
        parts.append(("label", colorize(label, table.colors)))
    parts.append(("prediction", colorize(prediction, table.colors)))
    tiles = [_titled(_fit(pixels, max_width, smooth=title == "image"), title) for title, pixels in parts]
    gap = np.full((tiles[0].shape[0], 4, 3), 255, np.uint8)
    row = np.concatenate([x for tile in tiles for x in (tile, gap)][:-1], axis=1)
    shown = prediction if label is None else np.concatenate([label.ravel(), prediction.ravel()])[None]
    return _stack([row, _legend(shown, row.shape[1], _title_size(tiles[0]), table)]) if legend else row


def plot_confusion(matrix: Any, names: Sequence[str], path: Path | str, title: str = "") -> None:
    """`engine.plots.plot_confusion` of counted pixels."""
    plots.plot_confusion(matrix, names, path, title or "Confusion, % of the true class's pixels")


def plot_class_iou(
    class_iou: Mapping[str, float | None] | Mapping[str, Mapping[str, float | None]], path: Path | str, title: str = ""
) -> None:
    """Bars of IoUs (0 to 1; nan or None: nothing to score), of one run {class: IoU} or several {run: {class: IoU}}."""
    first = next(iter(class_iou.values()), None)
    runs = class_iou if isinstance(first, Mapping) else {"": class_iou}
    runs = cast(Mapping[str, Mapping[str, float | None]], runs)
    classes = list(dict.fromkeys(name for run in runs.values() for name in run))
    with figure(path, (7, 1.4 + len(classes) * (0.16 + 0.13 * len(runs)))) as drawn:
        bars(drawn.add_subplot(), runs, classes, title or "Class IoU, %")


def plot_runs(
    runs: Sequence[Run],
    path: Path | str,
    examples: Sequence[Example] = (),
    title: str = "",
    table: labels.LabelTable = labels.CITYSCAPES,
) -> None:
    """One picture of several runs: loss and mIoU over steps, class IoUs, and predictions side by side with labels."""
    classes = list(dict.fromkeys(name for run in runs for name in run.class_iou or {}))
    columns = 2 + len(runs)
    ratio = max((x.image.shape[0] / x.image.shape[1] for x in examples), default=0)
    width = 13.0
    tall = width / columns * ratio + 0.35
    shown = [ids for each in examples for ids in (each.label, *each.predictions.values()) if ids is not None]
    present = sorted({i for ids in shown for i in _present(ids)} - {labels.IGNORE})
    key = 0.1 + 0.2 * math.ceil(len(present) / _KEY_COLUMNS)  # inches for the names of the classes
    top = max(5.0, 1.2 + len(classes) * (0.12 + 0.1 * len(runs))) if classes else 5.0
    heights = [top, tall * len(examples) + key] if examples else [top]
    with figure(path, (width, sum(heights))) as drawn:
        parts: Any = drawn.subfigures(2, 1, height_ratios=heights) if examples else [drawn]
        axes = parts[0].subplot_mosaic([["mIoU", "bars"], ["loss", "bars"]] if classes else [["mIoU", "loss"]])
        rows = [(run.name, records(run.metrics)) for run in runs]
        curves(axes["mIoU"], axes["loss"], rows, "Mean IoU on the validation split")
        if classes:
            bars(axes["bars"], {run.name: run.class_iou or {} for run in runs}, classes, "Class IoU, %")
        if examples:
            _examples(parts[1], examples, [run.name for run in runs], table.colors)
            _key(parts[1], present, table)
        if title:
            drawn.suptitle(title)


def _examples(figure: Any, examples: Sequence[Example], names: Sequence[str], palette: NDArray[np.uint8]) -> None:
    grid = figure.subplots(len(examples), 2 + len(names), squeeze=False)
    for row, example in zip(grid, examples, strict=True):
        ids = [example.label, *(example.predictions.get(name) for name in names)]
        shown = [example.image, *(None if x is None else colorize(x, palette) for x in ids)]
        for axes, pixels in zip(row, shown, strict=True):
            axes.axis("off")
            if pixels is not None:
                axes.imshow(pixels, interpolation="nearest")
    for axes, text in zip(grid[0], ["image", "label", *names], strict=True):
        axes.set_title(text, fontsize=9)


def _key(figure: Any, classes: Sequence[int], table: labels.LabelTable) -> None:
    """The colours of the classes (train ids) below the examples."""
    from matplotlib.patches import Patch

    patches = [Patch(color=table.colors[i] / 255, label=in_legend(table.classes[i])) for i in classes]
    columns = max(1, min(_KEY_COLUMNS, len(patches)))
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _legend(ids: NDArray[Any], width: int, size: int, table: labels.LabelTable) -> Array:
    """Colour and name of the classes present, the largest first, flowing in rows over at least `width` pixels."""
    font = ImageFont.load_default(size)
    box, gap, line = size, size // 2, round(size * 1.6)
    entries = []
    for i in _present(ids, by_size=True):
        if i == labels.IGNORE:
            name, color = "void", _VOID[void(table.colors)]
        else:
            name, color = table.classes[i], tuple(table.colors[i].tolist())
        entries.append((name, color, box + gap // 2 + math.ceil(font.getlength(name)) + gap * 2))
    width = max([width, *(gap + length for *_, length in entries)])
    places, x, y = [], gap, gap // 2
    for name, color, length in entries:
        if x > gap and x + length > width:
            x, y = gap, y + line
        places.append((x, y, name, color))
        x += length
    strip = Image.new("RGB", (width, y + line + gap // 2), _PAPER)
    pen = ImageDraw.Draw(strip)
    for x, y, name, color in places:
        middle = y + line // 2
        pen.rectangle((x, middle - box // 2, x + box, middle + box // 2), fill=color, outline=_INK)
        pen.text((x + box + gap // 2, middle), name, font=font, fill=_INK, anchor="lm")
    return np.asarray(strip)


def _title_size(tile: Array) -> int:
    return max(12, min(20, tile.shape[1] // 30))


def _titled(pixels: Array, title: str) -> Array:
    size = _title_size(pixels)
    bar = Image.new("RGB", (pixels.shape[1], size + 8), _PAPER)
    ImageDraw.Draw(bar).text(
        (pixels.shape[1] // 2, bar.height // 2), title, font=ImageFont.load_default(size), fill=_INK, anchor="mm"
    )
    return np.concatenate([np.asarray(bar), pixels])


def _fit(pixels: Array, max_width: int, smooth: bool) -> Array:
    """Brings a picture to at most `max_width`, and a tiny one up to 160 pixels so that its title fits."""
    height, width = pixels.shape[:2]
    factor = min(max_width / width, max(1, math.ceil(160 / width)))
    if factor == 1:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    way = Image.Resampling.BOX if smooth and factor < 1 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize(size, way))


def _stack(parts: Sequence[Array]) -> Array:
    """Pictures below each other, left-aligned on white."""
    width = max(p.shape[1] for p in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in parts])


def _present(ids: NDArray[Any], by_size: bool = False) -> list[int]:
    if ids.dtype == np.uint8:
        counts = np.bincount(ids.ravel(), minlength=256)
        found = np.flatnonzero(counts)
        return [int(i) for i in (found[np.argsort(-counts[found], kind="stable")] if by_size else found)]
    values, sizes = np.unique(ids, return_counts=True)
    return [int(i) for i in (values[np.argsort(-sizes, kind="stable")] if by_size else values)]

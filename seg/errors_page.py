"""Where a network errs: the worst images, the largest confusions as crops, and labels that may be wrong themselves.

One pass over a split keeps numbers and places only; the images that are shown are read and predicted once more.

A suspected label error is a connected region in which the label says one class and the network another one, with a
probability of at least `SURE` in every pixel, that is large and not thin (a contour that is off by some pixels is no
label error). It is a suspicion: a network that errs with confidence looks the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import UserError
from engine.images import check_writable
from seg import draw, labels
from seg.averaging import Averaged, Views, predictor_of
from seg.card import describe, labelled
from seg.config import SegConfig
from seg.data import EvalBatches, Rgb, Sample, eval_batches
from seg.datasets import split_name
from seg.html import MAX_ROWS, legend, page, paragraph, percent, picture, row, section, table
from seg.labels import IGNORE, scored_table
from seg.metrics import nothing_scored
from seg.per_image import Ids, ImageScores, Matrix, told
from seg.predict import Predictor

SURE = 0.9
"""Least probability of the predicted class in all pixels of a suspected label error."""
SMALLEST = 0.001
"""Least area of a suspected label error, as a share of the image."""
THINNEST = 0.008
"""Least radius of the largest circle in it, as a share of the image's diagonal."""
_PAIRS, _CROPS = 8, 3
_RED = (255, 0, 60)


@dataclass(frozen=True)
class Region:
    """A connected region of an image with one true and one predicted class (train ids)."""

    sample: Sample
    true: int
    predicted: int
    area: int
    """Pixels."""
    box: tuple[int, int, int, int]
    """Top, left, height, width in pixels."""
    sure: float
    """Mean probability of the predicted class."""

    @property
    def order(self) -> tuple[float, str, tuple[int, int, int, int]]:
        """Sorts the largest first, always in the same way."""
        return -self.area, self.sample.name, self.box


@dataclass
class Findings:
    """What one pass over a split found."""

    images: ImageScores = field(default_factory=ImageScores)
    confusions: dict[tuple[int, int], list[Region]] = field(default_factory=dict)
    """(true, predicted) -> its largest regions, the largest first."""
    suspects: list[Region] = field(default_factory=list)
    """Suspected label errors, the largest first."""

    def largest(self, wanted: int) -> list[tuple[int, int, int]]:
        """The confusions with the most pixels: (true, predicted, pixels)."""
        matrix = self.images.total.copy()
        np.fill_diagonal(matrix, 0)
        order = np.argsort(-matrix, axis=None, kind="stable")[:wanted]
        pairs = [divmod(int(place), len(matrix)) for place in order]
        return [(true, found, int(matrix[true, found])) for true, found in pairs if matrix[true, found]]


def write_errors(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    *,
    worst: int = 8,
    by: str = "miou",
    suspects: int = 12,
    views: Views | None = None,
    allow_imports: bool = False,
) -> str:
    """Look for a checkpoint's errors on a split and write the page; returns a few lines about it.

    Args:
        path: of the checkpoint.
        out: the HTML file.
        overrides: key=value changes to the config.
        split: default the config's `data.val_split`.
        worst: how many images are shown.
        by: what makes an image bad: its `miou`, or its share of wrong `pixels`.
        suspects: how many suspected label errors are shown.
        views: what predictions are averaged over.
        allow_imports: permits the stored config to import its modules.

    Raises:
        UserError: bad data, a split without labels, a page that can't be written: before the work; or labels that are
            all ignored.
    """
    from engine.prepare import for_prediction, predicting
    from seg.html import write
    from seg.models import with_origin

    if by not in ("miou", "pixels"):
        raise UserError(f"--by: found {by!r}, expected miou or pixels")
    if min(worst, suspects) < 0:
        raise UserError(f"--worst, --suspects: found {min(worst, suspects)}, expected 0 or more")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; expected the name of a page, such as errors.html")
    model, cfg, meta, origin = with_origin(path, list(overrides), allow_imports=allow_imports)
    scored_table(cfg.data, meta, path)
    with predicting(cfg.runtime) as device:
        check_writable(out.parent)
        split = split or cfg.data.val_split
        samples = labelled(eval_batches(cfg, split).samples, cfg.data, split)
        predictor = predictor_of(for_prediction(model, path), cfg, device, views)
        found = search(predictor, cfg, samples)
        total = found.images.total
        if not total.any():
            raise nothing_scored(split_name(cfg.data, split))
        facts = describe(origin, model, cfg, split, samples, views)
        write(out, document(found, facts, _Pictures(predictor, cfg, samples), worst, by, suspects))
    return (
        f"{out}: {len(samples)} images, {total.sum() - np.trace(total)} wrong pixels, {len(found.confusions)} kinds of "
        f"confusion, {len(found.suspects)} suspected label errors"
    )


def search(predictor: Predictor | Averaged, cfg: SegConfig, samples: Sequence[Sample]) -> Findings:
    """One pass over the samples, all of which have labels."""
    known = labels.table(cfg.data)
    found = Findings(ImageScores(known.classes))
    batches = EvalBatches(samples, cfg, 1, 0)
    every = (item for items in batches for item in items)
    for item in told(every, len(samples), "images"):
        sample = item["sample"]
        truth = known.to_train_ids(item["label"], sample.label)
        best, ids = predictor.probabilities(item["image"]).max(0)
        prediction, sure = ids.to(torch.uint8).cpu().numpy(), best.cpu().numpy()
        matrix = found.images.update(prediction, truth, sample)
        for region in confused(prediction, truth, sure, sample, matrix, found.confusions):
            kept = found.confusions.setdefault((region.true, region.predicted), [])
            kept.append(region)
            kept.sort(key=lambda region: region.order)
            del kept[_CROPS:]
        found.suspects += suspected(prediction, truth, sure, sample)
    found.suspects.sort(key=lambda region: region.order)
    return found


def confused(
    prediction: Ids,
    truth: Ids,
    sure: NDArray[np.float32],
    sample: Sample,
    matrix: Matrix,
    known: Mapping[tuple[int, int], list[Region]],
) -> list[Region]:
    """The largest connected region of each confusion in an image.

    Args:
        prediction, truth: train ids, uint8 (H, W), 255 in the truth where void.
        sure: probability of the predicted class, float32 (H, W).
        sample: the image.
        matrix: its pixels by true and predicted class, int64 (C, C), which say what confusions there are.
        known: regions of each confusion in other images, the largest first; what cannot be larger is left out.
    """
    regions = []
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    for true, predicted in np.argwhere(wrong).tolist():
        kept = known.get((true, predicted), [])
        if len(kept) >= _CROPS and wrong[true, predicted] < kept[-1].area:
            continue
        mask = (truth == true) & (prediction == predicted)
        _, places, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
        regions.append(_region(sample, true, predicted, stats[best], float(sure[places == best].mean())))
    return regions


def suspected(prediction: Ids, truth: Ids, sure: NDArray[np.float32], sample: Sample) -> list[Region]:
    """Suspected label errors of an image; arguments as in `confused`."""
    height, width = truth.shape
    candidate = (truth != IGNORE) & (truth != prediction) & (sure >= SURE)
    pairs = truth.astype(np.int32) * 256 + prediction
    regions = []
    for pair, pixels in zip(*np.unique(pairs[candidate], return_counts=True), strict=True):
        if pixels < SMALLEST * height * width:
            continue
        mask = (candidate & (pairs == pair)).astype(np.uint8)
        # a border of zeros, so that a region at the edge of the image has its contour there
        radius = cv2.distanceTransform(cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT), cv2.DIST_L2, 5)
        radius = radius[1:-1, 1:-1]
        count, places, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        for i in range(1, count):
            if stats[i, cv2.CC_STAT_AREA] < SMALLEST * height * width:
                continue
            inside = places == i
            if radius[inside].max() >= THINNEST * math.hypot(height, width):
                regions.append(_region(sample, int(pair) // 256, int(pair) % 256, stats[i], float(sure[inside].mean())))
    return regions


class _Pictures:
    """Reads and predicts the images that are shown; keeps the last one."""

    def __init__(self, predictor: Predictor | Averaged, cfg: SegConfig, samples: Sequence[Sample]) -> None:
        self.predictor, self.labels = predictor, labels.table(cfg.data)
        self.samples = {(sample.city, sample.name): sample for sample in samples}
        self._last: tuple[Sample, tuple[Rgb, Ids, Ids]] | None = None

    def of(self, sample: Sample) -> tuple[Rgb, Ids, Ids]:
        """Image, truth and prediction."""
        if self._last is None or self._last[0] != sample:
            from seg.data import read_pair

            image, label = read_pair(sample)
            truth = self.labels.to_train_ids(label, str(sample.label))
            self._last = sample, (image, truth, self.predictor.predict(image))
        return self._last[1]


def document(found: Findings, facts: dict[str, str], pictures: _Pictures, worst: int, by: str, suspects: int) -> str:
    """The page."""
    largest, names = found.largest(_PAIRS), found.images.classes
    total = int(found.images.total.sum())
    rows = [
        [names[true], names[predicted], f"{pixels:,}", percent(pixels / max(1, total))]
        for true, predicted, pixels in largest
    ]
    shown = min(suspects, len(found.suspects))
    words = (
        f"Regions where the network gives another class than the label with a probability of at least {SURE:g} in each "
        f"pixel, of at least {100 * SMALLEST:g}% of the image and not thin; the largest first. Look at them: the label "
        f"may be wrong, or the network too sure. Found: {len(found.suspects)}, shown: {shown}."
    )
    return page(
        "Errors",
        table(["", ""], [[key, value] for key, value in facts.items()]),
        legend(names, pictures.labels.colors),
        section("Worst images", *_worst(found, pictures, worst, by)),
        section(
            "Largest confusions",
            paragraph("The pixels of the whole split, and the largest connected regions of each pair as crops."),
            table(["truth", "predicted", "pixels", "% of all pixels"], rows),
            *(_confusion(found, pictures, true, predicted) for true, predicted, _ in largest),
        ),
        section(
            "Suspected label errors", paragraph(words), *(_crop(pictures, one) for one in found.suspects[:suspects])
        ),
    )


def _worst(found: Findings, pictures: _Pictures, wanted: int, by: str) -> list[str]:
    scored = [one for one in found.images.images if one.pixels]
    key = (lambda one: one.mean_iou) if by == "miou" else (lambda one: -one.wrong)
    parts = []
    for one in sorted(scored, key=lambda one: (key(one), one.name))[:wanted]:
        image, truth, prediction = pictures.of(pictures.samples[one.city, one.name])
        title = f"{one.name}: mIoU {percent(one.mean_iou)}%, wrong pixels {percent(one.wrong)}%"
        parts.append(section(title, _beside(image, truth, prediction, pictures.labels.colors), level=3))
    return parts or [paragraph("No image has valid pixels." if not scored else "None asked for.")]


def _confusion(found: Findings, pictures: _Pictures, true: int, predicted: int) -> str:
    names = pictures.labels.classes
    crops = [_crop(pictures, region, level=4) for region in found.confusions[true, predicted]]
    return section(f"{names[true]} taken for {names[predicted]}", *crops, level=3)


def _crop(pictures: _Pictures, region: Region, level: int = 3) -> str:
    """Image, truth, prediction around a region, whose contour is drawn in the image."""
    names = pictures.labels.classes
    image, truth, prediction = pictures.of(region.sample)
    window = around(region.box, truth.shape[0], truth.shape[1])
    mask = ((truth == region.true) & (prediction == region.predicted)).astype(np.uint8)[window]
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    marked = cv2.drawContours(np.ascontiguousarray(image[window]), contours, -1, _RED, 1).astype(np.uint8, copy=False)
    title = (
        f"{region.sample.name}: label {names[region.true]}, predicted {names[region.predicted]}, "
        f"{region.area:,} pixels at row {region.box[0]}, column {region.box[1]}, mean probability {region.sure:.2f}"
    )
    return section(title, _beside(marked, truth[window], prediction[window], pictures.labels.colors), level=level)


def _beside(image: Rgb, truth: Ids, prediction: Ids, colors: Ids) -> str:
    width = 280
    wrong = np.zeros((*truth.shape, 3), np.uint8)
    wrong[truth == IGNORE] = 60
    wrong[truth == prediction] = 160
    wrong[(truth != prediction) & (truth != IGNORE)] = _RED
    return row(
        picture(_enlarged(image), "image", photo=True, max_width=width),
        picture(_enlarged(draw.colorize(truth, colors)), f"truth ({draw.void(colors)}: void)", max_width=width),
        picture(_enlarged(draw.colorize(prediction, colors)), "prediction", max_width=width),
        picture(_enlarged(wrong), "errors red, void dark", max_width=width),
    )


def around(box: tuple[int, int, int, int], height: int, width: int) -> tuple[slice, slice]:
    """A window around a box with half of its size, and at least 24 pixels, on each side, within the image."""
    top, left, tall, wide = box
    margin = max(24, tall // 2, wide // 2)
    rows = slice(max(0, top - margin), min(height, top + tall + margin))
    return rows, slice(max(0, left - margin), min(width, left + wide + margin))


def _enlarged(pixels: Rgb) -> Rgb:
    """A small crop in whole multiples, so that its pixels can be seen; a thin one not beyond what `picture` shows."""
    factor = max(1, min(280 // pixels.shape[1], MAX_ROWS // pixels.shape[0]))
    return np.repeat(np.repeat(pixels, factor, 0), factor, 1)


def _region(sample: Sample, true: int, predicted: int, stats: NDArray[np.int32], sure: float) -> Region:
    left, top, wide, tall, area = (int(value) for value in stats)
    return Region(sample, true, predicted, area, (top, left, tall, wide), sure)

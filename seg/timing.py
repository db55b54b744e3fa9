"""How fast the input, the scorer and the sliding window of segmentation are, each beside what it is measured against.

Times are taken by turns, A B A B ..., after one turn that warms up, and compared by their medians: other work on the
machine then slows both alike.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.images import write_png
from engine.optim import parameter_groups
from engine.prepare import prepare, session
from engine.steps import TrainingStep, endless
from seg import losses, models, sample
from seg.config import SegConfig
from seg.data import augment, normalize, read_pair, train_batches
from seg.datasets import samples
from seg.evaluate import evaluate_folder
from seg.labels import IGNORE, read_label_ids, table, to_label_ids, to_train_ids
from seg.predict import Predictor
from seg.rare import class_counts, shares_of

SIZE = (1024, 2048)
"""Height and width of Cityscapes' images."""
_SUFFIX = "_gtFine_labelIds.png"


@dataclass(frozen=True)
class Row:
    """A speed beside another one."""

    what: str
    value: float
    other: str
    other_value: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.value / self.other_value


class Stages(NamedTuple):
    """Seconds an image that the parts of the input take in one process."""

    decode: float
    augment: float
    collate: float


class Timed(NamedTuple):
    """Something to be timed, and what is done before without being timed."""

    call: Callable[[], Any]
    before: Callable[[], Any] = lambda: None


def in_turn(calls: Sequence[Timed], rounds: int) -> list[float]:
    """The median seconds of each call."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for timed, found in zip(calls, times, strict=True):
            timed.before()
            start = time.perf_counter()
            timed.call()
            if number:  # the first round warms up
                found.append(time.perf_counter() - start)
    return [median(found) for found in times]


def render_split(folder: Path, images: int, size: tuple[int, int] = SIZE) -> tuple[Path, Path]:
    """A rendered split with instance ids, and predictions for it as a fair network makes them: borders that are off by
    a few pixels, and patches of other classes.

    Returns:
        The folders of the predictions and of the label files.
    """
    root = sample.render(folder / "data", size=size, counts={"train": 0, "val": images, "test": 0})
    truth, predictions = root / "gtFine" / "val", folder / "predictions"
    for number, path in enumerate(sorted(truth.rglob(f"*{_SUFFIX}"))):
        rng = np.random.default_rng(number)
        ids = to_train_ids(read_label_ids(path), path)
        rows, columns = (
            np.clip(np.arange(side) + np.repeat(rng.integers(-4, 5, side // 16 + 1), 16)[:side], 0, side - 1)
            for side in ids.shape
        )
        ids = ids[rows][:, columns]
        other = rng.integers(0, 19, (ids.shape[0] // 32 + 1, ids.shape[1] // 32 + 1)).repeat(32, 0).repeat(32, 1)
        wrong = rng.random((ids.shape[0] // 32 + 1, ids.shape[1] // 32 + 1)).repeat(32, 0).repeat(32, 1) < 0.1
        other, wrong = other[: ids.shape[0], : ids.shape[1]], wrong[: ids.shape[0], : ids.shape[1]]
        ids = np.where(wrong | (ids == IGNORE), other, ids).astype(np.uint8)
        write_png(predictions / path.name.replace(_SUFFIX, "_pred.png"), to_label_ids(ids))
    return predictions, truth


def scorer(predictions: Path, truth: Path, rounds: int) -> list[Row]:
    """Images a second that `seg.evaluate.evaluate_folder` scores, by all cores and by one, against cityscapesscripts'
    evaluation (one process; in pure Python unless its extension is compiled), files and instance ids included."""
    official, compiled = _official(predictions, truth)
    count = len(list(truth.rglob(f"*{_SUFFIX}")))
    cores = os.cpu_count() or 1
    calls = [
        Timed(lambda: evaluate_folder(predictions, truth)),
        Timed(official),
        Timed(lambda: evaluate_folder(predictions, truth, workers=1)),
    ]
    every, other, one = in_turn(calls, rounds)
    name = f"cityscapesscripts, {'compiled' if compiled else 'pure Python'}"
    return [
        Row(f"scorer, {cores} cores", count / every, name, count / other, "images/s"),
        Row("scorer, 1 core", count / one, name, count / other, "images/s"),
    ]


def _official(predictions: Path, truth: Path) -> tuple[Callable[[], Any], bool]:
    """The official evaluation of the same files, and whether it is compiled."""
    before = os.environ.get("CITYSCAPES_DATASET")
    os.environ["CITYSCAPES_DATASET"] = str(truth.parent.parent)  # read when it is imported
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module: Any = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    finally:
        if before is None:
            del os.environ["CITYSCAPES_DATASET"]
        else:
            os.environ["CITYSCAPES_DATASET"] = before
    truths = sorted(map(str, truth.rglob(f"*{_SUFFIX}")))
    found = [str(predictions / Path(path).name.replace(_SUFFIX, "_pred.png")) for path in truths]

    def run() -> Any:
        args = module.args
        args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, True
        with contextlib.redirect_stdout(io.StringIO()):
            return module.evaluateImgLists(found, truths, args)

    return run, bool(module.CSUPPORT)


def loader(cfg: SegConfig, rounds: int) -> tuple[list[Row], Stages]:
    """Images a second of the training input against those of the training step, and the stages of the input.

    The input is that of a training: `runtime.workers` processes; the step works on a batch that is there already.

    Raises:
        UserError: as a training with this config.
    """
    with session(cfg.runtime) as device:
        batches = train_batches(cfg)
        stream = endless(batches)
        batch = next(stream)
        step = _step(cfg, batch["image"])
        size = len(batch["name"])
        several = max(4, 2 * cfg.runtime.workers)

        def load() -> None:
            for _ in range(several):
                next(stream)

        def use_up() -> None:  # what the workers have ready would count as made in no time
            for _ in range(2 * cfg.runtime.workers):
                next(stream)

        def train() -> None:
            for _ in range(step.cycle):
                step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        loading, training = in_turn([Timed(load, use_up), Timed(train)], rounds)
    row = Row(
        f"input, {cfg.runtime.workers} workers",
        several * size / loading,
        f"training step on {device.type}",
        step.cycle * size / training,
        "images/s",
    )
    return [row], stages(cfg, rounds)


def stages(cfg: SegConfig, rounds: int, images: int = 4) -> Stages:
    """What decoding, augmentation, and normalising with collating take an image, in this process alone."""
    found = samples(cfg.data, cfg.data.train_split)[:images]
    labels = table(cfg.data)
    pairs = [read_pair(one) for one in found]
    counts = class_counts(found, labels) if cfg.data.rare_crop else None
    shares = None if counts is None else shares_of(counts, cfg.data)

    def change() -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        masks = (labels.to_train_ids(ids, one.image) for (_, ids), one in zip(pairs, found, strict=True))
        numbered = enumerate(zip(pairs, masks, strict=True))
        return [augment(image, mask, cfg.data, (1, 0, 0, i), shares) for i, ((image, _), mask) in numbered]

    cut = change()
    calls = [
        Timed(lambda: [read_pair(one) for one in found]),
        Timed(change),
        Timed(lambda: torch.stack([normalize(image, cfg.data) for image, _ in cut])),
    ]
    return Stages(*(seconds / len(found) for seconds in in_turn(calls, rounds)))


def _step(cfg: SegConfig, images: Tensor) -> TrainingStep:
    model = models.build(cfg.model, table(cfg.data).num_classes, pretrained=False)
    groups = partial(parameter_groups, cfg=cfg.optim, is_backbone=models.is_backbone)
    prepared = prepare(model, cfg, groups=groups, images=[images])
    return TrainingStep(prepared, cfg, prepared.groups, losses.build(cfg))


class _Counter(nn.Module):
    """Counts the pixels that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = 0

    def forward(self, images: Tensor) -> Tensor:
        self.pixels += images.shape[0] * images.shape[2] * images.shape[3]
        return images[:, :1]


def computed_pixels(window: tuple[int, int] | None, overlap: float, size: tuple[int, int] = SIZE) -> int:
    """Pixels that go through the network for an image of `size`, those seen twice and padding counted."""
    counter = _Counter().eval()
    image: NDArray[np.uint8] = np.zeros((*size, 3), np.uint8)
    Predictor(counter, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), window=window, overlap=overlap).predict(image)
    return counter.pixels


def windows(cases: Sequence[tuple[tuple[int, int] | None, float]], size: tuple[int, int] = SIZE) -> list[Row]:
    """Pixels computed over those of the image, beside what the asked overlap costs on an endless image,
    1 / (1 - overlap) in each direction."""
    rows = []
    for window, overlap in cases:
        name = "whole image" if window is None else f"windows {window[0]} x {window[1]}, overlap {overlap:g}"
        share = computed_pixels(window, overlap, size) / (size[0] * size[1])
        asked = 1.0 if window is None else 1 / (1 - overlap) ** 2
        rows.append(Row(name, share, "asked overlap", asked, "pixels/pixel"))
    return rows


def text(rows: Sequence[Row]) -> str:
    """A line for each row."""
    lines = [("", "", "against", "", "ratio", "")]
    lines += [(r.what, f"{r.value:.2f}", r.other, f"{r.other_value:.2f}", f"{r.ratio:.2f}", r.unit) for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join(
            word.rjust(width) if i in (1, 3, 4) else word.ljust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

"""Several runs in one picture: curves, class IoUs, and predictions of each on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from engine.errors import UserError
from engine.prepare import predicting
from engine.report import METRICS
from engine.resume import BEST
from engine.runs import best_evaluation
from seg.config import SegConfig
from seg.data import Sample, read_pair
from seg.datasets import samples as samples_of
from seg.draw import Example, Run, plot_runs
from seg.labels import CITYSCAPES, LabelTable, scored_table
from seg.models import from_checkpoint
from seg.predict import Predictor


def compare(
    runs: Sequence[Path],
    names: Sequence[str],
    picture: Path,
    examples: int = 2,
    overrides: Sequence[str] = (),
    allow_imports: bool = False,
) -> str:
    """Draw `picture` and return a table: run, best mIoU, the step of it.

    The class IoUs are those of each run's best evaluation, the predictions those of its best.pt on validation images of
    the first run's data set, on the device of each run's config. `overrides` and `allow_imports` are those of
    `seg.models.from_checkpoint`.

    Raises:
        UserError: a folder that holds no run, or one without an evaluation; bad data; a picture that can't be written.
    """
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called the same, {', '.join(names)}; give each a name with --names")
    best = [best_evaluation(run) for run in runs]
    drawn = [
        Run(name, run / METRICS, {k.removeprefix("IoU/"): v for k, v in row["scalars"].items() if k.startswith("IoU/")})
        for run, name, row in zip(runs, names, best, strict=True)
    ]
    load = partial(from_checkpoint, overrides=overrides, allow_imports=allow_imports, folded=True)
    shown, labels = _examples(runs, names, examples, load)
    plot_runs(drawn, picture, shown, table=labels)
    width = max(len(name) for name in names)
    lines = [f"{'run':<{width}}  best mIoU  at step"]
    lines += [f"{n:<{width}}  {100 * r['score']:>8.2f}%  {r['step']:>7}" for n, r in zip(names, best, strict=True)]
    return "\n".join([*lines, f"drawn in {picture}"])


def _examples(
    runs: Sequence[Path], names: Sequence[str], wanted: int, load: Callable[[Path], tuple[nn.Module, SegConfig, Any]]
) -> tuple[list[Example], LabelTable]:
    """The examples, and the table of their ids: the first run's, whose classes all must have."""
    if wanted < 1:
        return [], CITYSCAPES
    samples: list[Sample] = []
    data, labels = None, CITYSCAPES
    predictions: list[dict[str, Any]] = []
    for run, name in zip(runs, names, strict=True):
        model, cfg, meta = load(run / BEST)
        data = data or cfg.data
        labels = scored_table(data, meta, run / BEST)
        if not samples:
            every = samples_of(data, data.val_split)
            places = np.linspace(0, len(every) - 1, min(wanted, len(every))).round()
            samples = [every[int(place)] for place in places]
            predictions = [{} for _ in samples]
        with predicting(cfg.runtime) as device:
            predictor = Predictor.from_config(model, cfg, device)
            for sample, found in zip(samples, predictions, strict=True):
                found[name] = predictor.predict(read_pair(sample)[0])
    pairs = [read_pair(sample) for sample in samples]
    examples = [
        Example(image, labels.to_train_ids(label, str(sample.label)), found)
        for sample, (image, label), found in zip(samples, pairs, predictions, strict=True)
    ]
    return examples, labels

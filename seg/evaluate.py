"""Scores of a model on a split, or of a folder of predicted label PNGs, and what is written about them."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from engine import distributed
from engine.errors import NotFiniteError, UserError
from engine.images import check_results_writable, show, write_bytes, write_png
from engine.score_files import described, scores_folder, written
from seg import draw
from seg.averaging import Views, predictor_of
from seg.config import DataConfig, SegConfig
from seg.data import EvalBatches, Rgb, Sample, eval_batches
from seg.datasets import instead_of_scores, split_name
from seg.datasets import samples as samples_of
from seg.html import counted
from seg.labels import (
    CITYSCAPES,
    IGNORE,
    TRAIN_LABEL_IDS,
    LabelTable,
    read_instance_ids,
    read_label_ids,
    scored_table,
    table,
)
from seg.metrics import ConfusionMatrix, Scores, mean, nothing_scored
from seg.pairing import pair_files, pair_samples


def evaluate_model(
    model: nn.Module,
    cfg: SegConfig,
    *,
    split: str | None = None,
    batches: EvalBatches | None = None,
    max_batches: int | None = None,
    pictures: int | None = None,
    views: Views | None = None,
) -> tuple[Scores, dict[str, Rgb]]:
    """Score a model on a split, every image on exactly one rank; all ranks get the same scores.

    Predictions are those of `seg.predict.Predictor`, as in tools/predict.py: the logits go up to the image size, which
    is the label's (labels are never resized), then argmax gives the class. Computed on the device of the
    model's parameters, in the precision of `runtime.amp`; the model is in eval mode meanwhile and gets its mode back.

    Args:
        model: see Predictor.
        cfg: data and predict sections, workers and number of pictures.
        split: default `data.val_split`.
        batches: those of `eval_batches` to use again, instead of making them from `split`.
        max_batches: stop after as many on each rank (a trial run); None takes all.
        pictures: how many panels to draw, default `report.images`.
        views: what predictions are averaged over; default one view.

    Returns:
        The scores, and panels image | label | prediction by sample name, uint8 RGB (H, W, 3); on rank 0 only.

    Raises:
        UserError: bad data (see seg.data), a split without labels, or one whose labels are all ignored (a trial run
            with `max_batches` may see ignored pixels only).
        NotFiniteError: an output is NaN or infinite, which in a trial run, before the first step, is no matter.
    """
    world, rank = distributed.world_size(), distributed.rank()
    batches = batches or eval_batches(cfg, split, world, rank)
    wanted = _spread(batches.samples, cfg.report.images if pictures is None else pictures) if rank == 0 else set()
    titles = _titles(wanted)
    device = next(model.parameters()).device
    labels = table(cfg.data)
    confusion, panels = ConfusionMatrix(device, labels), dict[str, Rgb]()
    training, unsound = model.training, ""
    model.eval()
    try:
        predictor = predictor_of(model, cfg, device, views)
        for items in islice(batches, max_batches):
            for item, ids in zip(items, predictor.predict_batch([item["image"] for item in items]), strict=True):
                sample, label = item["sample"], item["label"]
                if label is None:
                    raise _no_label(sample, cfg.data, split)
                confusion.update(labels.to_label_ids(ids), label, item["instance"], name=str(sample.label))
                if sample in wanted:
                    truth = labels.to_train_ids(label, sample.label)
                    panels[titles[sample]] = draw.panel(item["image"], truth, ids, table=labels)
    except NotFiniteError as error:
        unsound = str(error)
    finally:
        model.train(training)
    unsound = next(filter(None, distributed.gather(unsound)), "")  # what only one rank saw ends the others too
    if unsound and max_batches is None:
        raise NotFiniteError(f"{unsound} A lower optim.lr or optim.clip_norm=1 keeps a training from diverging.")
    scores = confusion.reduce().scores()
    if max_batches is None and math.isnan(scores.pixel_accuracy):
        raise nothing_scored(split_name(cfg.data, split))
    return scores, panels


def check_scorable(data: DataConfig, split: str | None = None) -> None:
    """Look for an evaluated pixel in a split's labels (default `data.val_split`); where all is well, one file is read.

    Raises:
        UserError: there is none, an image has no label, or a label file is bad.
    """
    labels, samples = table(data), samples_of(data, split or data.val_split)
    paths = [sample.label for sample in samples if sample.label is not None]
    if len(paths) < len(samples):
        raise _no_label(next(sample for sample in samples if sample.label is None), data, split)
    if all((labels.to_train_ids(read_label_ids(path), path) == IGNORE).all() for path in paths):
        raise nothing_scored(split_name(data, split))


def _no_label(sample: Sample, data: DataConfig, split: str | None) -> UserError:
    return UserError(
        f"{sample.image}: has no label to score against, the split {split or data.val_split!r} has no public ones. "
        f"Score another split, or {instead_of_scores(data)}."
    )


def evaluate_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    pictures: int | None = None,
    allow_imports: bool = False,
    views: Views | None = None,
) -> tuple[Scores, dict[str, Rgb], str] | None:
    """Score a checkpoint's model on the device, and among the processes, that its config and torchrun say.

    `overrides` (key=value) change the config, such as data.root or runtime.device; `allow_imports` permits the stored
    config to import its modules. The result is that of `evaluate_model` and the name of the split on rank 0, None on
    the others.
    """
    from engine.prepare import predicting
    from seg.models import from_checkpoint

    model, cfg, meta = from_checkpoint(path, list(overrides), allow_imports=allow_imports, folded=True)
    scored_table(cfg.data, meta, path)
    with predicting(cfg.runtime) as device:
        split = split or cfg.data.val_split
        scores, panels = evaluate_model(model.to(device), cfg, split=split, pictures=pictures, views=views)
        return (scores, panels, split) if distributed.is_main() else None


def evaluate_and_report(
    path: Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    *,
    json_file: Path | None = None,
    out: Path | None = None,
    allow_imports: bool = False,
    views: Views | None = None,
) -> None:
    """`evaluate_checkpoint`, printed and written: pictures to `out` (default `scores_SPLIT` beside the checkpoint), all
    scores to `json_file` (default `scores.json` in it). Raises UserError before the work if they can't be written."""
    check_results_writable(path, out, json_file)
    result = evaluate_checkpoint(path, overrides, split, allow_imports=allow_imports, views=views)
    if result is not None:  # None on all but the first of several processes
        scores, pictures, split = result
        out = out or scores_folder(path, split)
        json_file = json_file or out / "scores.json"
        report(scores, pictures, json_file, out, described(path, split, overrides, views))
        if views is not None:
            print(f"predictions averaged over: {views}")
        print(written(json_file, out))


def evaluate_folder(predictions: Path | str, ground_truth: Path | str, workers: int | None = None) -> Scores:
    """Score label PNGs as the official evaluation does.

    Args:
        predictions: searched recursively for `<city>_<sequence>_<frame>*.png`, one for each label file; label ids.
        ground_truth: searched recursively for `*_gtFine_labelIds.png`; the `_gtFine_instanceIds.png` beside them
            give the iIoU, which is nan without any.
        workers: threads, by default as many as there are cores.

    Raises:
        UserError: missing, ambiguous or unreadable files, other sizes, ids that are no label ids, labels that are all
            ignored.
    """
    pairs = pair_files(Path(predictions), Path(ground_truth))
    instances = [truth.with_name(truth.name.replace("labelIds", "instanceIds")) for _, truth in pairs]
    missing = [path for path in instances if not path.is_file()]
    if 0 < len(missing) < len(instances):
        raise UserError(
            f"{len(missing)} of {len(instances)} label files have no instance ids beside them; the first one missing "
            f"is {missing[0]}. Unpack them all for the iIoU, or remove all of them."
        )
    files = [(*pair, None if missing else path) for pair, path in zip(pairs, instances, strict=True)]
    return _score_files(Path(predictions), files, CITYSCAPES, workers, f"{ground_truth} (--ground-truth)")


def evaluate_predictions(
    predictions: Path | str, data: DataConfig, split: str | None = None, workers: int | None = None
) -> Scores:
    """Score label PNGs against the labels of any data set, with its own table.

    Args:
        predictions: searched recursively for one PNG of label ids for each image, see `seg.pairing.pair_samples`.
        data: the data set.
        split: default `data.val_split`.
        workers: threads, by default as many as there are cores.

    Raises:
        UserError: missing, surplus, ambiguous or unreadable files, a split without labels, or with ignored ones only,
            other sizes, ids that the table doesn't have.
    """
    split = split or data.val_split
    samples = samples_of(data, split)
    unlabelled = [sample for sample in samples if sample.label is None]
    if unlabelled:
        raise UserError(
            f"{unlabelled[0].image}: has no label to score against, the split {split!r} has no public ones. Score "
            "another split (--split)."
        )
    paths = pair_samples(Path(predictions), samples, data, split)
    files = [(path, one.label, one.instance) for path, one in zip(paths, samples, strict=True) if one.label is not None]
    return _score_files(Path(predictions), files, table(data), workers, split_name(data, split))


def _score_files(
    predictions: Path,
    files: Sequence[tuple[Path, Path, Path | None]],
    labels: LabelTable,
    workers: int | None,
    where: str,
) -> Scores:
    """Scores of (prediction, label file, instance file); `where` is what an error calls the label files."""

    def count(number: int) -> ConfusionMatrix:
        prediction, truth, instance = files[number]
        one = ConfusionMatrix(labels=labels)
        ids = None if instance is None else read_instance_ids(instance)
        one.update(read_label_ids(prediction), read_label_ids(truth), ids, name=f"{prediction} for {truth}")
        return one

    total = ConfusionMatrix(labels=labels)
    # decoding and most of the counting leave the interpreter's lock; adding up in order keeps the sums reproducible
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for one in pool.map(count, range(len(files))):
            total.merge(one)
    scores = total.scores()
    if math.isnan(scores.pixel_accuracy):
        raise nothing_scored(where)
    if labels.is_official:
        _refuse_train_ids(scores, predictions)
    return scores


def report(
    scores: Scores,
    pictures: Mapping[str, Rgb],
    json_file: Path | None = None,
    out: Path | None = None,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the files asked for, the JSON with what is told `about` it, and then print the table, and which pictures in
    `out` are others: an earlier evaluation there may have drawn more."""
    if json_file:
        write_json(scores, json_file, about)
    others = write_pictures(scores, pictures, out) if out else []
    print(scores.table())
    if others:
        found = counted(len(others), "picture")
        print(f"note: {out} also holds {found} not of this evaluation, such as {show(others[0])}")


def write_json(scores: Scores, path: Path | str, about: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write the scores (see Scores.to_json) as JSON, behind what is told `about` them.

    Raises UserError when the file can't be written.
    """
    write_bytes(path, (json.dumps({**about, **scores.to_json()}, indent=1, allow_nan=False) + "\n").encode())


def write_pictures(scores: Scores, pictures: Mapping[str, Rgb], out: Path | str) -> list[str]:
    """Write `confusion.png`, `class_iou.png` and the panels to a folder, that of an image of such a name as
    `image_NAME.png`. Returns the names of the other PNGs that it holds, sorted. Raises UserError when that can't be
    done.

    The matrix is drawn for the evaluated classes; what was predicted as void is left out, of the percents too, and that
    is said.
    """
    out = Path(out)
    matrix = scores.class_matrix()
    void = scores.matrix[[place for group in scores.labels.groups for place in group]].sum() - matrix.sum()
    title = "Confusion, % of the true class's pixels\nthat are predicted as a class" if void else ""
    plots = ("confusion", "class_iou")
    draw.plot_confusion(matrix, scores.labels.classes, out / f"{plots[0]}.png", title)
    draw.plot_class_iou(scores.class_iou, out / f"{plots[1]}.png")
    panels = {f"image_{name}.png" if name.casefold() in plots else f"{name}.png": one for name, one in pictures.items()}
    for name, picture in panels.items():
        write_png(out / name, picture)
    return sorted({path.name for path in out.glob("*.png")} - {*panels, *(f"{name}.png" for name in plots)})


def _spread(samples: Sequence[Sample], wanted: int) -> set[Sample]:
    """Up to `wanted` samples, evenly spread (neighbours show the same street)."""
    return {samples[i * len(samples) // wanted] for i in range(wanted)} if samples else set()


def _titles(samples: Collection[Sample]) -> dict[Sample, str]:
    """Names of the samples, with the city where two have the same."""
    often = Counter(sample.name for sample in samples)
    return {one: one.name if often[one.name] == 1 else f"{one.city}_{one.name}" for one in samples}


def _refuse_train_ids(scores: Scores, predictions: Path) -> None:
    """Train ids 0-18 are valid label ids too, but score much better when they are taken for what they are."""
    classes = len(TRAIN_LABEL_IDS)
    if scores.matrix[:, classes:].any():
        return
    as_train = scores.matrix[list(TRAIN_LABEL_IDS), :classes]
    hits = np.diagonal(as_train)
    union = as_train.sum(0) + as_train.sum(1) - hits
    other = mean(float(h) / float(u) if u else float("nan") for h, u in zip(hits, union, strict=True))
    if other > scores.mean_iou + 0.1:
        raise UserError(
            f"{predictions} (--predictions): the files hold train ids, not label ids: read as train ids they'd get a "
            f"mean IoU of {100 * other:.1f}%, as label ids {100 * scores.mean_iou:.1f}%. Convert them with "
            "seg.labels.to_label_ids."
        )

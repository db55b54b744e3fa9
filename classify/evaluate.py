"""Accuracies of a network on a split, and what is written about them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classify import losses, sets
from classify.config import ClassifyConfig
from classify.data import DataInfo, describe, eval_batches
from classify.draw import plot_class_accuracy, plot_mistakes
from classify.scores import MOST_CLASSES, Mistake, Scores, left_out
from engine import distributed
from engine.errors import NotFiniteError, UserError
from engine.images import check_results_writable, write_bytes
from engine.score_files import described, scores_folder, written


def evaluate_model(
    model: nn.Module,
    cfg: ClassifyConfig,
    info: DataInfo,
    batches: Iterable[dict[str, Any]],
    *,
    max_batches: int | None = None,
    mistakes: int = 0,
) -> Scores:
    """Count a network's right and wrong answers, every image on exactly one rank; all ranks get the same numbers.

    Args:
        model: images (N, C, H, W) -> logits (N, K); it is in eval mode meanwhile and gets its mode back.
        cfg: the loss.
        info: classes and normalisation.
        batches: those of `classify.data.eval_batches`.
        max_batches: stop after as many on each rank (a trial run); None takes all.
        mistakes: how many of the surest wrong answers to keep.

    Raises:
        UserError: bad data (see classify.data), no image that can be read.
        NotFiniteError: an output is NaN or infinite, which in a trial run, before the first step, is no matter.
    """
    device, count = next(model.parameters()).device, len(info.classes)
    each = losses.criterion(cfg.loss.model_copy(update={"label_smoothing": 0.0}))
    matrix = torch.zeros(count * count, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # among the first five, loss
    kept: list[Mistake] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in islice(batches, max_batches):
                image, target = batch["image"].to(device), batch["target"].to(device)
                logits = model(image).float()
                first = logits.topk(min(5, count), 1).indices
                matrix += torch.bincount(target * count + first[:, 0], minlength=count * count)
                sums += torch.stack([(first == target[:, None]).sum().double(), each(logits, target).double().sum()])
                if mistakes:
                    probable = losses.probabilities(logits, cfg.loss)
                    kept = _surest([*kept, *_mistakes(batch, image, target, probable, info, mistakes)], mistakes)
    finally:
        model.train(training)
    matrix, sums = distributed.all_reduce_sum(matrix), distributed.all_reduce_sum(sums)
    if max_batches is None and not torch.isfinite(sums).all():
        raise NotFiniteError(
            "the network's outputs on the split are not finite; a lower optim.lr or optim.clip_norm=1 keeps a training "
            "from diverging"
        )
    problems = {one for part in distributed.gather(list(getattr(batches, "problems", ()))) for one in part}
    if problems and not matrix.any():
        raise UserError(f"none of the images of the split can be read, so there is nothing to score: {min(problems)}")
    surest = _surest([one for part in distributed.gather(kept) for one in part], mistakes) if mistakes else []
    return Scores(
        info.classes, matrix.view(count, count).cpu(), int(sums[0]), float(sums[1]), surest, tuple(sorted(problems))
    )


def evaluate_checkpoint(
    path: Path, overrides: Sequence[str] = (), split: str | None = None, *, allow_imports: bool = False
) -> tuple[Scores, str] | None:
    """Score a checkpoint's model on the device, and among the processes, that its config and torchrun say.

    `overrides` (key=value) change the config, such as data.root; `allow_imports` permits the stored config to import
    its modules. The scores and the name of the split on rank 0, None on the others.

    Raises:
        UserError: see `classify.network.from_checkpoint`; a data set with other classes than the network's.
    """
    from classify.network import from_checkpoint
    from engine.prepare import session

    model, cfg, info = from_checkpoint(path, list(overrides), allow_imports=allow_imports, folded=True)
    split = split or cfg.data.val_split
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"val_split": split})})
    with session(cfg.runtime) as device:
        check_classes(info, describe(cfg.data), path)
        batches = eval_batches(cfg, device, split, distributed.world_size(), distributed.rank())
        if cfg.runtime.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scores = evaluate_model(model.to(device), cfg, info, batches, mistakes=24)
        return (scores, split) if distributed.is_main() else None


def check_classes(network: DataInfo, data: DataInfo, path: Path | str) -> None:
    """Raises UserError unless a network's classes and images are those of a data set."""
    if len(network.classes) != len(data.classes):
        raise UserError(
            f"{path}: the network tells {len(network.classes)} classes apart, the data set has {len(data.classes)}; "
            "choose the data set that it was trained on with data.name and data.root"
        )
    if network.classes != data.classes:
        here, there = next((a, b) for a, b in zip(network.classes, data.classes, strict=True) if a != b)
        raise UserError(
            f"{path}: the network's class {here!r} is {there!r} in the data set; the classes and their order must be "
            f"those of the training{_about_names(network, data)}"
        )
    if network.channels != data.channels:
        raise UserError(
            f"{path}: the network takes images of {network.channels} channels, the data set's have {data.channels}"
        )


def _about_names(network: DataInfo, data: DataInfo) -> str:
    """What to do where the one or the other may be of the same set without the file that names its classes."""
    if sets.UNNAMED not in (network.classes, data.classes):
        return ""
    what = f"put the {sets.NAMES_FILE} of the training into data.root"
    if network.classes == sets.UNNAMED:
        what = f"move {sets.NAMES_FILE}, which the training did not have, out of data.root"
    return f"; if both are the downsampled ImageNet, {what}"


def evaluate_and_report(
    path: Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    *,
    json_file: Path | None = None,
    out: Path | None = None,
    allow_imports: bool = False,
) -> None:
    """`evaluate_checkpoint`, printed and written: `confusion.png`, `class_accuracy.png` and `mistakes.png` to `out`
    (default `scores_SPLIT` beside the checkpoint), all scores to `json_file` (default `scores.json` in it).

    Raises:
        UserError: as `evaluate_checkpoint`; before the work, if the files can't be written.
    """
    check_results_writable(path, out, json_file)
    result = evaluate_checkpoint(path, overrides, split, allow_imports=allow_imports)
    if result is None:  # another process has them
        return
    scores, split = result
    print(scores.table() if len(scores.classes) <= MOST_CLASSES else scores.line())
    print("\n".join(left_out(scores.problems)), end="\n" if scores.problems else "")
    out = out or scores_folder(path, split)
    text = json.dumps({**described(path, split, overrides), **scores.to_json()}, indent=1, allow_nan=False) + "\n"
    json_file = json_file or out / "scores.json"
    write_bytes(json_file, text.encode())
    draw(scores, out)
    print(written(json_file, out))


def draw(scores: Scores, out: Path) -> None:
    """Draw the confusion matrix, the class accuracies (both up to MOST_CLASSES) and the mistakes into a folder."""
    from engine.plots import plot_confusion

    if len(scores.classes) <= MOST_CLASSES:
        title = "Confusion, % of the true class's images"
        plot_confusion(scores.matrix.numpy(), scores.classes, out / "confusion.png", title)
        plot_class_accuracy(scores.accuracies(), out / "class_accuracy.png")
    if scores.mistakes:
        plot_mistakes(scores.mistakes, scores.classes, out / "mistakes.png")
    else:  # an earlier evaluation may have left some
        (out / "mistakes.png").unlink(missing_ok=True)


def _mistakes(
    batch: dict[str, Any], image: Tensor, target: Tensor, probabilities: Tensor, info: DataInfo, most: int
) -> list[Mistake]:
    probability, predicted = probabilities.max(1)
    wrong = torch.nonzero(predicted != target)[:, 0]
    wrong = wrong[probability[wrong].argsort(descending=True)][:most]
    mean, std = (torch.tensor(values, device=image.device).view(-1, 1, 1) for values in (info.mean, info.std))
    return [
        Mistake(
            (image[i] * std + mean).clamp(0, 1).cpu(),
            str(batch["name"][i]),
            int(target[i]),
            int(predicted[i]),
            float(probability[i]),
        )
        for i in wrong.tolist()
    ]


def _surest(mistakes: list[Mistake], most: int) -> list[Mistake]:
    return sorted(mistakes, key=lambda one: one.probability, reverse=True)[:most]

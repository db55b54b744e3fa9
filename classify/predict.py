"""Classify a user's images with a trained network: `Predictor` on arrays, `classify_files` on files."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from classify.augment import Normalize, evaluation_steps, grey
from classify.config import ClassifyConfig, LossConfig
from classify.data import DataInfo
from classify.losses import probabilities
from engine.errors import UserError
from engine.images import MAX_PIXELS, Array, Found, check_writable, find_images, read_image, show, write_bytes

_PARTIAL = "predictions_partial"
MOST_BYTES = 1 << 28
"""A batch ends with the image with which its files hold so many bytes decoded."""


@dataclass(frozen=True)
class Predictor:
    """A network in eval mode with all that turns images into its inputs."""

    model: nn.Module
    """Normalised images (N, C, size, size) -> logits (N, K)."""
    transform: Callable[[Array], Tensor]
    """An image, RGB uint8 (H, W, 3) of any size -> float32 (C, size, size), as in the validation."""
    device: torch.device
    loss: LossConfig
    """What the network was trained with, which says what its outputs are."""
    channels_last: bool = False

    @classmethod
    def from_config(cls, model: nn.Module, cfg: ClassifyConfig, info: DataInfo, device: torch.device) -> Predictor:
        """The predictor of a trained network; moves it to `device`."""
        last = cfg.runtime.channels_last
        layout = torch.channels_last if last else torch.preserve_format
        model.to(device, memory_format=layout)  # type: ignore[call-overload]
        steps, normalize = evaluation_steps(cfg.data, info.size), Normalize(info.mean, info.std)

        def transform(image: Array) -> Tensor:
            pixels = torch.from_numpy(image).permute(2, 0, 1)
            return normalize(steps(grey(pixels) if info.channels == 1 else pixels))

        return cls(model.eval(), transform, device, cfg.loss, last)

    @torch.no_grad()
    def predict(self, images: Sequence[Array]) -> Tensor:
        """Class probabilities, float32 (N, K) on the CPU, of images RGB uint8 (H, W, 3) of any sizes.

        Raises:
            UserError: the network's output is not finite.
        """
        batch = torch.stack([self.transform(image) for image in images]).to(self.device)
        if self.channels_last:
            batch = batch.to(memory_format=torch.channels_last)
        outputs: Tensor = self.model(batch).float().cpu()
        if not torch.isfinite(outputs).all():
            raise UserError("the network's output is not finite")
        return probabilities(outputs, self.loss)


@dataclass
class Prediction:
    """The likeliest classes of an image, the likeliest first."""

    path: str
    classes: list[str]
    probabilities: list[float]

    def __str__(self) -> str:
        each = zip(self.classes, self.probabilities, strict=True)
        return f"{show(self.path)}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in each)


@dataclass
class Summary:
    """What `classify_files` did: the predictions, and what went wrong, one sentence each."""

    predictions: list[Prediction] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.predictions)
        done = f"{count} image{'s' if count != 1 else ''} classified"
        if not self.problems:
            return done
        wrong = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        return "\n".join([f"{done}, {wrong}:", *(f"  {problem}" for problem in self.problems)])


def classify_files(
    predict: Callable[[Sequence[Array]], Tensor],
    classes: Sequence[str],
    inputs: Sequence[str | Path],
    *,
    topk: int = 1,
    out: Path | None = None,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
    say: Callable[[str], None] = print,
) -> Summary:
    """The likeliest classes of every image that `inputs` (files, folders, globs) name; one bad file stops nothing.

    Args:
        predict: images RGB uint8 (H, W, 3) -> probabilities (N, K); see Predictor.predict.
        classes: the K names.
        inputs: files, folders (searched recursively) and globs.
        topk: classes told for each image.
        out: a folder that gets `predictions.csv` (a row for each image and rank) and `predictions.json`, or those of
            a work that did not come to its end as `predictions_partial`; None: none.
        batch_size: images predicted at once, fewer where they are large.
        max_pixels: larger images are refused.
        say: takes the line of each image.

    Raises:
        UserError: no image at all, `topk` out of range, or files that can't be written.
    """
    if not 1 <= topk <= len(classes):
        raise UserError(f"--topk: {topk}; expected 1 to {len(classes)}, the network's classes")
    found, problems = find_images(inputs)
    if not found:
        raise UserError("; ".join(problems))
    if out:
        check_writable(out)
    summary = Summary(problems=problems)
    try:
        for batch in _batches(found, batch_size, max_pixels, summary, say):
            best = predict([image for _, image in batch]).topk(topk, 1)
            for (item, _), values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
                one = Prediction(str(item.path), [classes[i] for i in indices], values)
                summary.predictions.append(one)
                say(str(one))
    except BaseException:  # a signal, a standard output that nobody reads: what was predicted is kept
        if out and summary.predictions:
            _write(out, summary.predictions, _PARTIAL)
            told = (
                f"{len(summary.predictions)} of {len(found)} images were classified: {show(out / _PARTIAL)}.csv, .json"
            )
            print(told, file=sys.stderr)
        raise
    if out:
        _write(out, summary.predictions, "predictions")
        for ending in (".csv", ".json"):
            (out / f"{_PARTIAL}{ending}").unlink(missing_ok=True)
    return summary


def _write(out: Path, predictions: Sequence[Prediction], name: str) -> None:
    write_bytes(out / f"{name}.csv", _csv(predictions).encode("utf-8", "surrogateescape"))
    write_bytes(out / f"{name}.json", (json.dumps([vars(one) for one in predictions], indent=1) + "\n").encode())


def _batches(
    found: Sequence[Found], size: int, max_pixels: int, summary: Summary, say: Callable[[str], None]
) -> Iterator[list[tuple[Found, Array]]]:
    """The images that can be read, at most `size` at a time and fewer large ones, which are here in full; what can't is
    noted in `summary`."""

    def readable() -> Iterator[tuple[Found, Array]]:
        for item in found:
            try:
                yield item, read_image(item.path, max_pixels)
            except UserError as error:
                summary.problems.append(str(error))
                say(f"{show(item.path)}: FAILED")

    batch: list[tuple[Found, Array]] = []
    for one in readable():
        batch.append(one)
        if len(batch) == size or sum(image.size for _, image in batch) >= MOST_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _csv(predictions: Sequence[Prediction]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "rank", "class", "probability"])
    for one in predictions:
        for rank, (name, probability) in enumerate(zip(one.classes, one.probabilities, strict=True), 1):
            rows.writerow([one.path, rank, name, f"{probability:.6f}"])
    return text.getvalue()

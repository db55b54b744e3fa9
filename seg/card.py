"""The reliability card of a trained network: one page, as HTML and JSON, of what was measured and on what.

Scores as in `seg.evaluate`, boundary IoU, calibration, the scores by city and by image, and if asked for the robustness
under corruptions. Every image goes through the network once for all of it (and once more for each corruption).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.errors import UserError
from seg.averaging import Averaged, Views
from seg.boundary import BoundaryIoU
from seg.calibration import Calibration, Calibrator, halves, pixels_of
from seg.config import DataConfig, SegConfig
from seg.data import EvalBatches, Rgb, Sample
from seg.datasets import instead_of_scores, split_name
from seg.html import counted
from seg.labels import table
from seg.metrics import ConfusionMatrix, Scores, mean, nothing_scored
from seg.models import Origin
from seg.per_image import Ids, ImageScores, told
from seg.predict import Predictor
from seg.robustness import Robustness

WORST = 4
"""Images that are shown, those with the lowest scores."""


@dataclass(frozen=True)
class Example:
    """An image with its true and predicted train ids (uint8), shown on the page."""

    name: str
    image: Rgb
    truth: Ids
    prediction: Ids


@dataclass(frozen=True)
class Card:
    """All that was measured."""

    facts: dict[str, str]
    """Checkpoint, config and data, for the head of the page."""
    config: str
    """The resolved config as YAML."""
    scores: Scores
    boundary: BoundaryIoU
    calibration: Calibration
    images: ImageScores
    examples: list[Example]
    """The worst images, the worst first."""
    robustness: Robustness | None

    def to_json(self) -> dict[str, Any]:
        """Plain containers; null for what there is nothing to score of."""
        boundary = self.boundary.class_iou()
        return {
            "facts": self.facts,
            "config": self.config,
            "scores": self.scores.to_json(),
            "boundaryIoU": {
                "ratio": self.boundary.ratio,
                "mean": _null(mean(boundary.values())),
                "classes": {name: _null(value) for name, value in boundary.items()},
            },
            "calibration": self.calibration.to_json(),
            "cities": [city.to_json() for city in self.images.cities()],
            "images": [one.to_json() for one in self.images.images],
            "robustness": None if self.robustness is None else self.robustness.to_json(),
        }


def measure_split(
    predictor: Predictor | Averaged, cfg: SegConfig, samples: Sequence[Sample], split: str | None = None
) -> tuple[Scores, BoundaryIoU, Calibration, ImageScores, list[Example]]:
    """Everything but the robustness, each image predicted once and the worst ones once more.

    `split` is what an error calls the samples, by default the config's `data.val_split`.

    Raises:
        UserError: bad data, fewer than two images, or no valid pixel in any of them.
    """
    labels = table(cfg.data)
    confusion, boundary = ConfusionMatrix(labels=labels), BoundaryIoU(labels.classes)
    images = ImageScores(labels.classes)
    if len(samples) < 2:
        raise UserError(
            f"{cfg.data.root}: the split has {len(samples)} image, a card needs at least 2: the temperature of the "
            "calibration is fitted to one half and reported on the other."
        )
    first, second = halves(len(samples))
    calibrator = Calibrator(sampled=pixels_of(len(first), labels.num_classes), seed=cfg.runtime.seed)
    order = [*first, *second]
    batches = EvalBatches([samples[i] for i in order], cfg, 1, 0)
    every = (item for items in batches for item in items)
    for number, item in zip(order, told(every, len(samples), "images"), strict=True):
        sample, label = item["sample"], item["label"]
        truth = labels.to_train_ids(label, sample.label)
        probabilities = predictor.probabilities(item["image"])
        ids = probabilities.max(0).indices.to(torch.uint8).cpu().numpy()
        confusion.update(labels.to_label_ids(ids), label, item["instance"], name=str(sample.label))
        boundary.update(ids, truth)
        images.update(ids, truth, sample)
        logs = probabilities.clamp_min_(torch.finfo(torch.float32).tiny).log_()  # a large image's exist once
        if number in first:
            calibrator.fit_on(logs, truth, number)
        else:
            calibrator.report_on(logs, truth)
    images.images.sort(key=lambda one: (one.city, one.name))
    scores = confusion.scores()
    if math.isnan(scores.pixel_accuracy):
        raise nothing_scored(split_name(cfg.data, split))
    worst = {(one.city, one.name): rank for rank, one in enumerate(images.worst(WORST))}
    shown = sorted((s for s in samples if (s.city, s.name) in worst), key=lambda s: worst[s.city, s.name])
    examples = [
        Example(sample.name, image, truth, predictor.predict(image)) for sample, image, truth in truths(shown, cfg)
    ]
    return scores, boundary, calibrator.result(), images, examples


def labelled(samples: Sequence[Sample], data: DataConfig, split: str) -> Sequence[Sample]:
    """The samples. Raises UserError when one of them has no label."""
    missing = [sample for sample in samples if sample.label is None]
    if missing:
        raise UserError(
            f"{missing[0].image}: has no label to score against; the split {split!r} has no public ones. Choose "
            f"another split, or {instead_of_scores(data)}."
        )
    return samples


def spread(samples: Sequence[Sample], wanted: int | None) -> list[Sample]:
    """Up to `wanted` of the samples, evenly spread (neighbours show the same street); all for None."""
    if wanted is None or wanted >= len(samples):
        return list(samples)
    if wanted < 1:
        raise UserError(f"--corruption-images: {wanted}, expected at least 1")
    return [samples[i * len(samples) // wanted] for i in range(wanted)]


def describe(
    origin: Origin, model: nn.Module, cfg: SegConfig, split: str, samples: Sequence[Sample], views: Views | None
) -> dict[str, str]:
    """What was measured, by which checkpoint, on what."""
    cities = len({sample.city for sample in samples} - {""})
    where = ", ".join([counted(len(samples), "image"), *[counted(cities, "city", "cities")] * (cities > 0)])
    weights = "the average of the weights" if origin.averaged else "the weights"
    return {
        "checkpoint": str(origin.path),
        "SHA-256": origin.sha256,
        "network": f"{cfg.model.name}, {sum(p.numel() for p in model.parameters()):,} parameters, norm {cfg.norm.name}",
        "trained for": f"{origin.step:,} steps; {weights} of that step",
        "data": f"{cfg.data.root}, split {split}: {where}",
        "prediction": str(views or Views()),
        "torch": torch.__version__,
    }


def config_text(cfg: SegConfig) -> str:
    """The resolved config as YAML."""
    import yaml

    text: str = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def truths(samples: Sequence[Sample], cfg: SegConfig) -> Iterator[tuple[Sample, Rgb, Ids]]:
    """Each sample with its image and true train ids."""
    labels = table(cfg.data)
    for items in EvalBatches(samples, cfg, 1, 0):
        for item in items:
            yield item["sample"], item["image"], labels.to_train_ids(item["label"], item["sample"].label)


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value

"""The losses that `loss.name` and `loss.terms` may name, each as a sum over pixels and what to divide it by.

    cross_entropy   - w(y) log p(y), with label smoothing if asked
    ohem            the same over hard pixels: p(y) up to a threshold, and always the hardest share of the labelled ones
    focal           - w(y) (1 - p(y))^gamma log p(y)                                (Lin et al., arXiv 1708.02002)
    boundary        cross entropy where pixels count 1 + a (1 - d / r), d pixels from the next border of two classes,
                    up to r (in the manner of U-Net, Ronneberger et al., arXiv 1505.04597, equation 2)
    dice            1 - soft Dice coefficient, the mean over the classes (0 for one that the labels do not hold)
    lovasz          Lovasz-Softmax, the mean over the classes that the labels hold  (Berman et al., arXiv 1705.08790)

p: softmax of the logits, y: the label, w: loss.class_weights. Dice and Lovasz are segmentation-models-pytorch's, and
are no sums over pixels: they rate a micro-batch as a whole. So that a step of several micro-batches and processes
weighs them by what they hold, their sum is their value times the number of labelled pixels. The library's FocalLoss is
a mean of binary losses, and not a number for an image without labels, hence ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg.config import LossConfig
from seg.labels import IGNORE

Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits float32 (N, C, H, W) and train ids int64 (N, H, W) -> sum over labelled pixels, sum of their weights; 0-d,
float32. Pixels of 255 count nothing; without any other both are 0, and the gradient is."""
ClassWeights = Sequence[float] | None


class Kind(NamedTuple):
    """A loss that can be named."""

    make: Callable[[LossConfig, ClassWeights], Criterion]
    options: tuple[str, ...]
    """Keys of the loss section that act on it."""


def _table(weights: ClassWeights, device: torch.device) -> Tensor | None:
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)


def _pixels(logits: Tensor, target: Tensor, weights: ClassWeights = None, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each pixel, (N, H, W); 0 where the label is 255."""
    table = _table(weights, logits.device)
    return F.cross_entropy(logits, target, table, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)


def _weights(target: Tensor, weights: ClassWeights) -> Tensor:
    """Weight of each pixel, float32 (N, H, W); 0 where the label is 255."""
    valid = target != IGNORE
    table = _table(weights, target.device)
    return valid.float() if table is None else table[target.where(valid, 0)] * valid


def _cross_entropy(cfg: LossConfig, weights: ClassWeights) -> Criterion:
    def criterion(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(
            logits,
            target,
            _table(weights, logits.device),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=cfg.label_smoothing,
        )
        return total, _weights(target, weights).sum()

    return criterion


def _ohem(cfg: LossConfig, weights: ClassWeights) -> Criterion:
    def criterion(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, counts = _pixels(logits, target), _weights(target, weights)
        with torch.no_grad():
            valid = target != IGNORE
            certainty = (-losses).exp().where(valid, torch.inf)
            ordered = certainty.flatten().sort().values
            most = (
                (valid.sum() * cfg.ohem_share).ceil().long().clamp(min=1)
            )  # a tensor, so the device is not waited for
            limit = ordered[most - 1].clamp(min=cfg.ohem_threshold)
            counts = counts * (valid & (certainty <= limit))
        return (losses * counts).sum(), counts.sum()

    return criterion


def _focal(cfg: LossConfig, weights: ClassWeights) -> Criterion:
    def criterion(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, counts = _pixels(logits, target), _weights(target, weights)
        missing = -torch.expm1(-losses)  # 1 - p without rounding
        return (missing.pow(cfg.focal_gamma) * losses * counts).sum(), counts.sum()

    return criterion


def _boundary(cfg: LossConfig, weights: ClassWeights) -> Criterion:
    def criterion(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        factor = 1 + cfg.boundary_weight * nearness(target, cfg.boundary_width)
        losses = _pixels(logits, target, weights, cfg.label_smoothing)
        return (losses * factor).sum(), (_weights(target, weights) * factor).sum()

    return criterion


def nearness(target: Tensor, width: int) -> Tensor:
    """1 - d / width, float32 (N, H, W), for train ids (N, H, W): d is how many pixels (the larger of both directions) a
    pixel is from the next one that has a neighbour of another class; 0 from `width` pixels on. 255 makes no border."""
    valid = target != IGNORE
    edge = torch.zeros_like(valid)
    for axis in (1, 2):
        size = target.shape[axis] - 1
        pairs = [(one.narrow(axis, 0, size), one.narrow(axis, 1, size)) for one in (target, valid, edge)]
        differ = (pairs[0][0] != pairs[0][1]) & pairs[1][0] & pairs[1][1]
        pairs[2][0].logical_or_(differ)
        pairs[2][1].logical_or_(differ)
    reached = edge.float()
    total = reached.clone()
    for _ in range(width - 1):  # each round reaches a pixel further
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
        total += reached
    return total / width


def _region(loss: nn.Module) -> Criterion:
    def criterion(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        valid = (target != IGNORE).sum().float()
        return loss(logits, target).sum() * valid, valid  # without labels, LovaszLoss gives an empty tensor

    return criterion


def _dice(cfg: LossConfig, weights: ClassWeights) -> Criterion:
    from segmentation_models_pytorch.losses import DiceLoss

    return _region(DiceLoss("multiclass", ignore_index=IGNORE))


def _lovasz(cfg: LossConfig, weights: ClassWeights) -> Criterion:
    from segmentation_models_pytorch.losses import LovaszLoss

    return _region(LovaszLoss("multiclass", ignore_index=IGNORE))


KINDS: dict[str, Kind] = {
    "cross_entropy": Kind(_cross_entropy, ("class_weights", "label_smoothing")),
    "ohem": Kind(_ohem, ("class_weights", "ohem_threshold", "ohem_share")),
    "focal": Kind(_focal, ("class_weights", "focal_gamma")),
    "boundary": Kind(_boundary, ("class_weights", "label_smoothing", "boundary_weight", "boundary_width")),
    "dice": Kind(_dice, ()),
    "lovasz": Kind(_lovasz, ()),
}
"""By name; to add a loss, write its function and enter it."""

"""Losses by name: sums over the valid pixels and the number (or weight) of those, so that the loop can divide once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from engine.loop import Batch, Loss
from seg.config import SegConfig
from seg.labels import IGNORE, table

Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits (N, C, H, W) and train ids (N, H, W) -> sum over valid pixels, sum of their weights; 0-d, float32."""


def available() -> list[str]:
    """Names that `loss.name` may have, sorted."""
    return sorted(_CRITERIA)


def build(cfg: SegConfig) -> Callable[[nn.Module, Batch], Loss]:
    """The loss of a network on a batch, for `engine.loop.fit`: main head plus `loss.aux_weight` times auxiliary head.

    Raises:
        UserError: an unknown name, or class weights that are not one for each class or all zero.
    """
    if cfg.loss.name not in _CRITERIA:
        raise UserError(f"loss.name: unknown loss {cfg.loss.name!r}; known: {', '.join(available())}")
    criterion = _CRITERIA[cfg.loss.name](cfg)

    def loss(model: nn.Module, batch: Batch) -> Loss:
        output = _forward(model, batch["image"])
        total, weight = criterion(output["out"], batch["target"])
        parts = {"main": total}
        if "aux" in output:
            parts["aux"] = criterion(output["aux"], batch["target"])[0]
            total = total + cfg.loss.aux_weight * parts["aux"]
        return Loss(total, weight, parts)

    return loss


def _forward(model: nn.Module, images: Tensor) -> Mapping[str, Tensor]:
    try:
        output: Mapping[str, Tensor] = model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"micro_batch: a batch norm sees one value a channel, since {len(images)} image a process is pooled to one "
            "pixel; use at least 2 images a process, or norm.name=deconv, gn or frozen_bn"
        ) from None
    return output


def _cross_entropy(cfg: SegConfig) -> Criterion:
    weights = cfg.loss.class_weights
    classes = () if weights is None else table(cfg.data).classes
    if weights is not None and (len(weights) != len(classes) or not any(weights)):
        raise UserError(
            f"loss.class_weights: found {len(weights)} weights{'' if any(weights) else ', all zero'}; expected "
            f"{len(classes)}, not all zero, in the order {', '.join(classes)}"
        )

    def criterion(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # Summed in float32: half precision overflows at the sum of a few thousand pixels.
        factors: Any = None if weights is None else torch.tensor(weights, device=logits.device)
        total = F.cross_entropy(logits.float(), target, factors, ignore_index=IGNORE, reduction="sum")
        valid = target != IGNORE
        return total, valid.sum().float() if factors is None else factors[target[valid]].sum()

    return criterion


_CRITERIA: dict[str, Callable[[SegConfig], Criterion]] = {"cross_entropy": _cross_entropy}

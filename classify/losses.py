"""The training loss: a sum over the images of a batch and their number, so that the loop can divide once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classify.config import LossConfig
from engine.loop import Batch, Loss


def criterion(cfg: LossConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of logits (N, K) and targets, classes (N,) or shares of the classes (N, K): the loss of each image,
    (N,) in float32."""

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, reduction="none", label_smoothing=cfg.label_smoothing)

    def l2(logits: Tensor, target: Tensor) -> Tensor:
        classes = logits.shape[1]
        shares = F.one_hot(target, classes).float() if target.ndim == 1 else target.float()
        shares = shares * (1 - cfg.label_smoothing) + cfg.label_smoothing / classes
        return (logits.float() - shares).square().sum(1) / 2

    return {"ce": cross_entropy, "l2": l2}[cfg.name]


def probabilities(logits: Tensor, cfg: LossConfig) -> Tensor:
    """Those of the classes, float32 (N, K), of the outputs of a network that was trained with this loss.

    With l2 the outputs are themselves estimates of them: their positive parts, over the sum; with ce a softmax.
    """
    shares = logits.float().softmax(1)
    if cfg.name == "ce":
        return shares
    positive = logits.float().clamp(min=0)
    total = positive.sum(1, keepdim=True)
    return torch.where(total > 0, positive / total, shares)  # whose largest is that of the outputs too


def build(cfg: LossConfig) -> Callable[[nn.Module, Batch], Loss]:
    """The loss of a network on a batch, for `engine.loop.fit`; reports the share of right answers beside it (of mixed
    images, the class with the greatest share is the right one)."""
    each = criterion(cfg)

    def loss(model: nn.Module, batch: Batch) -> Loss:
        logits, target = model(batch["image"]), batch["target"]
        total = each(logits, target).sum()
        classes = target if target.ndim == 1 else target.argmax(1)
        hits = (logits.detach().argmax(1) == classes).sum()
        return Loss(total, torch.tensor(float(len(logits)), device=logits.device), {"top1": hits.float()})

    return loss

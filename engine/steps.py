"""A training step on its own, without the loop around it, to be timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import ExperimentConfig
from engine.loop import Batch, LossFunction
from engine.optim import build_ema, build_optimizer
from engine.precision import autocast, dtype_of
from engine.prepare import Prepared
from norm.state import skip_fresh_steps


def endless(batches: Any) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


class TrainingStep:
    """Trains the network on one batch as `engine.loop` does: forward, backward, update of weights and averages.

    A training's first steps, in which `deconv_fast` does more (`fresh_steps`), are left out.
    """

    def __init__(
        self, prepared: Prepared, cfg: ExperimentConfig, groups: list[dict[str, Any]], loss: LossFunction
    ) -> None:
        """
        Args:
            prepared: the network, which is put into training mode.
            cfg: optimiser, precision and memory layout.
            groups: parameter groups of the optimiser.
            loss: see `engine.loop.fit`.
        """
        self.prepared, self.cfg, self.loss = prepared, cfg, loss
        self.optimizer = build_optimizer(groups, cfg.optim)
        self.average = build_ema(prepared.raw, cfg.optim)
        self.scaler = torch.amp.grad_scaler.GradScaler(prepared.device.type, enabled=cfg.runtime.amp == "fp16")
        self.moving = [one for group in self.optimizer.param_groups if group["lr"] for one in group["params"]]
        self.cycle = max(int(getattr(module, "every", 0)) or 1 for module in prepared.raw.modules())
        """Steps that hold all that a norm does: some compute in every few what they leave out in others."""
        skip_fresh_steps(prepared.raw)
        prepared.raw.train()

    def __call__(self, batch: Batch) -> None:
        device, cfg = self.prepared.device, self.cfg
        moved = {key: one.to(device) if isinstance(one, Tensor) else one for key, one in batch.items()}
        if cfg.runtime.channels_last and moved["image"].ndim == 4:
            moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype_of(cfg.runtime.amp)):
            found = self.loss(self.prepared.wrapped, moved)
        self.scaler.scale(found.total / found.weight).backward()
        self.scaler.unscale_(self.optimizer)
        if cfg.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.moving, cfg.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.prepared.raw)

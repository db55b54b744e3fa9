"""A training step on its own, without the loop around it, to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from engine.config import ExperimentConfig
from engine.loop import Batch, LossFunction
from engine.optim import build_optimizer
from engine.precision import autocast, dtype_of
from engine.prepare import Prepared


def endless(batches: Any) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def training_step(
    prepared: Prepared, cfg: ExperimentConfig, groups: list[dict[str, Any]], loss: LossFunction
) -> Callable[[Batch], None]:
    """A function that trains the network on one batch: forward, backward, update.

    Args:
        prepared: the network, which is put into training mode.
        cfg: optimiser and precision.
        groups: parameter groups of the optimiser.
        loss: see `engine.loop.fit`.
    """
    optimizer = build_optimizer(groups, cfg.optim)
    prepared.raw.train()
    dtype = dtype_of(cfg.runtime.amp)

    def step(batch: Batch) -> None:
        moved = {key: one.to(prepared.device) if isinstance(one, Tensor) else one for key, one in batch.items()}
        with autocast(prepared.device, dtype):
            found = loss(prepared.wrapped, moved)
        (found.total / found.weight).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step

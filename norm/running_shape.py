"""The running averages of the cheap method: mean and scale move in every training step, the leading directions of the
shape (see `norm.leading`) in every n-th.

The host counts the steps and decides; a compiled graph holds that decision as one operator, which runs as it is written
here, so that nothing is traced twice and the graph stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from norm import leading, processes

_FIRST_PASSES = 4
"""Steps towards the leading directions in the first training step, which starts from none."""


class Averages(NamedTuple):
    """A layer's buffers, which move in place: mean (F,) or (G F,), scale () or (G,), and the directions' basis
    (F, r) or (G, F, r), values and gains (r + 1,) or (G, r + 1)."""

    mean: Tensor
    scale: Tensor
    basis: Tensor
    values: Tensor
    gains: Tensor

    def lead(self, basis: Tensor, values: Tensor, rest: Tensor, n_iter: int) -> None:
        """Take these leading directions."""
        self.basis.copy_(basis)
        self.values.copy_(torch.cat([values, rest[..., None]], -1))
        self.gains.copy_(leading.gains(values, rest, basis.shape[-2], n_iter))


class Pace(NamedTuple):
    """How the averages move: options of the layer."""

    every: int
    momentum: float
    eps: float
    n_iter: int


@torch.no_grad()
def follow(
    held: Averages,
    pace: Pace,
    steps: int,
    mean: Tensor,
    scale: Tensor,
    gather: Callable[[], Tensor],
    joint: bool = False,
) -> None:
    """Move the averages by the statistics of the training step after `steps` others.

    An average starts as the mean of what it has seen, and is never slower than momentum.

    Args:
        mean, scale: the step's.
        gather: gives its patches (F, rows) or (G, F, rows); called in every `pace.every`-th step.
        joint: they are those of all processes, of which each gathers its own.
    """
    held.mean.lerp_(mean.to(held.mean.dtype), max(pace.momentum, 1 / (steps + 1)))
    held.scale.lerp_(scale.to(held.scale.dtype), max(pace.momentum, 1 / (steps + 1)))
    if steps % pace.every == 0:
        rate = max(1 - (1 - pace.momentum) ** pace.every, 1 / (steps // pace.every + 1))
        with torch.autocast(mean.device.type, enabled=False):
            _renew(held, pace, rate, mean, scale, gather(), joint)


def _renew(held: Averages, pace: Pace, rate: float, mean: Tensor, scale: Tensor, patches: Tensor, joint: bool) -> None:
    """Move the leading directions towards those of these patches."""
    dtype = held.basis.dtype
    patches = patches.to(dtype)  # perhaps a view of the layer's input
    centred = patches - mean.to(dtype).view(*patches.shape[:-1], 1)
    rows = torch.full_like(scale, patches.shape[-1], dtype=dtype)
    rows = processes.total_(rows) if joint else rows
    centred.mul_((scale.to(dtype) * rows).rsqrt()[..., None, None])
    passes = 1 if rate < 1 else _FIRST_PASSES
    before = (held.basis, held.values[..., :-1], held.values[..., -1])
    total = processes.total_ if joint else None
    found = leading.renew(*before, centred, pace.eps / scale.to(dtype), rate, passes, total)
    held.lead(*(_everywhere(*found) if joint else found), pace.n_iter)


def _everywhere(basis: Tensor, values: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank 0's: eigenvectors have no sign of their own, and products of unlike ones must not be summed."""
    parts = (basis, values, rest)
    found = processes.same_(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    basis, values, rest = (each.view_as(part) for each, part in zip(found, parts, strict=True))
    return basis, values, rest


@torch.library.custom_op(
    "network_deconvolution::follow",
    mutates_args=("held_mean", "held_scale", "basis", "values", "gains", "steps", "clock"),
)
def follow_in_a_graph(
    patches: Tensor,
    mean: Tensor,
    scale: Tensor,
    held_mean: Tensor,
    held_scale: Tensor,
    basis: Tensor,
    values: Tensor,
    gains: Tensor,
    steps: Tensor,
    clock: Tensor,
    every: int,
    momentum: float,
    eps: float,
    n_iter: int,
    cycle: int,
    moving: int,
) -> None:
    """`follow`, as an operator that the compiler puts into its graph. `clock` counts the steps on the host, `steps` on
    the device. With a `cycle`, nothing moves but in the first `moving` steps of it."""
    before = int(clock)
    clock.add_(1)
    steps.fill_(before + 1)
    if not cycle or before % cycle < moving:
        held = Averages(held_mean, held_scale, basis, values, gains)
        follow(held, Pace(every, momentum, eps, n_iter), before, mean, scale, lambda: patches)

"""The running averages of the cheap method: mean and scale move in every training step, the shape of D once in n;
in the first steps, when weights change fast, it is that of each batch.

One batch that overflows must not end a training, whose optimiser may have left its step out (`torch.amp.GradScaler`):
what is not finite does not move what later steps use, the shape and, in frozen layers, mean and scale.

The host counts the steps and decides; a compiled graph holds that decision as one operator, so that the graph stays
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norm import leading, processes, recorded, whitening
from norm.matmul import matmul
from norm.products import root_dtype, without_autocast
from norm.whitening import Statistics

_FIRST_PASSES = 4
"""Steps towards the leading directions in the first training step, which starts from none."""


class Averages(NamedTuple):
    """A layer's buffers, which move in place: mean (F,) or (M F,), scale () or (M,), and D's shape as `Statistics` has
    it, with the covariance `inner` that it comes from.

    With all directions: deconv and inner are (F, F) or (M, F, F). With few (`norm.leading`): deconv is their basis
    (F, r) or (M, F, r), like tilted; last is () or (M,), and inner (r + 1, r + 1) or (M, r + 1, r + 1).
    """

    mean: Tensor
    scale: Tensor
    inner: Tensor
    deconv: Tensor
    tilted: Tensor | None = None
    last: Tensor | None = None

    def statistics(self, mean: Tensor, scale: Tensor) -> Statistics:
        """The shape held, with these."""
        return Statistics(mean, self.deconv, self.tilted, self.last, scale)

    def copied(self) -> Averages:
        """With a copy of the shape, which the next call may move before the gradient of this one is taken."""
        tilted = None if self.tilted is None else self.tilted.clone()
        last = None if self.last is None else self.last.clone()
        return self._replace(deconv=self.deconv.clone(), tilted=tilted, last=last)

    def take(self, covariance: Tensor, n_iter: int) -> None:
        """Take the shape from a covariance over its scale, (F, F) or (M, F, F)."""
        if self.tilted is None:
            self._whole(covariance, n_iter)
        else:
            self._lead(*leading.directions(covariance, self.tilted.shape[-1]), n_iter)

    def renew(
        self, patches: Tensor, ridge: Tensor, rate: float | Tensor, passes: int, n_iter: int, joint: bool
    ) -> None:
        """Move the shape towards that of patches; arguments as `leading.renew` takes them."""
        if self.tilted is None:
            now = matmul(patches, patches.mT)
            if joint:
                now = processes.unpack(processes.total_(processes.pack(now)), now.shape[-1])
            now.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
            self._whole(torch.lerp(self.inner.to(now.dtype), now, rate), n_iter)
            return
        total = processes.total_ if joint else None
        basis, inner = self.deconv.to(patches.dtype), self.inner.to(patches.dtype)
        found = leading.renew(basis, inner, patches, ridge, rate, passes, total)
        self._lead(*(_everywhere(*found) if joint else found), n_iter)

    def _whole(self, covariance: Tensor, n_iter: int) -> None:
        self._hold((self.inner, covariance), (self.deconv, whitening.inverse_sqrt(covariance, n_iter)))

    def _lead(self, basis: Tensor, inner: Tensor, n_iter: int) -> None:
        assert self.tilted is not None and self.last is not None
        tilted, last = leading.respond(basis, inner, n_iter)
        self._hold((self.deconv, basis), (self.inner, inner), (self.tilted, tilted), (self.last, last))

    @staticmethod
    def _hold(*shape: tuple[Tensor, Tensor]) -> None:
        """Into each first tensor the second one, if all of these are finite there."""
        new = [found.to(held.dtype) for held, found in shape]
        fine = _finite(*new)
        for (held, _), found in zip(shape, new, strict=True):
            torch.where(fine, found, held, out=held)


def _finite(*found: Tensor) -> Tensor:
    """Whether all values are finite, (), bool: they are if their sum is. In few kernels."""
    total = torch.stack([each.sum() for each in found]).sum()
    return total - total == 0


@torch.no_grad()
def if_finite(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of pairs of what is held and what was found, what was found if all of it is finite, else what is held."""
    fine = _finite(*(found for _, found in pairs))
    return [torch.where(fine, found.to(held.dtype), held) for held, found in pairs]


class Pace(NamedTuple):
    """How the averages move: options of the layer."""

    every: int
    fresh_steps: int
    momentum: float
    eps: float
    n_iter: int

    def due(self, steps: int) -> bool:
        """Whether the shape is renewed in the training step after `steps` others.

        Once in `every` steps, each time one later: a layer that is called twice for each step of the optimiser (pairs
        of images, a discriminator) sees both inputs.
        """
        return steps < self.fresh_steps or steps % self.every == steps // self.every % self.every

    def rate(self, steps: int) -> float:
        """What the step's own covariance then counts. The average starts as the mean of what it has seen."""
        if steps < self.fresh_steps:
            return 1.0
        first = self.fresh_steps // self.every  # the run of `every` steps with the first renewal that is averaged
        if first * self.every + first % self.every < self.fresh_steps:
            first += 1
        return max(1 - (1 - self.momentum) ** self.every, 1 / (steps // self.every - first + 1))


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

    An average starts as the mean of what it has seen, and is never slower than momentum. That of the scale is taken of
    its inverse root (`_average_root`).

    Args:
        mean, scale: the step's.
        gather: gives its patches (F, rows) or (M, F, rows); called where the shape is renewed.
        joint: they are those of all processes, of which each gathers its own.
    """
    rate = max(pace.momentum, 1 / (steps + 1))
    held.mean.lerp_(mean.to(held.mean.dtype), rate)
    if rate < 1:
        torch.pow(_average_root(held.scale, scale, rate), -2, out=held.scale)
    else:  # what is held may be anything
        held.scale.copy_(scale)
    if pace.due(steps):
        _renew(held, pace, steps, mean, scale, gather(), joint)


def _average_root(held: Tensor, scale: Tensor, rate: float | Tensor) -> Tensor:
    """The average of the factors in D = S / sqrt(scale), as the exact method averages D: (1 - rate) times that of the
    scale held and `rate` times the new one's.

    The average of the scales themselves would be that of the few batches with an outlier, where activations have heavy
    tails, and D in evaluation far too small: an EfficientNet-B0 had 12% on test images where the batches' own
    statistics gave 49% (docs/experiments.md).
    """
    return torch.lerp(held.rsqrt(), scale.to(held.dtype).rsqrt(), rate)


def _renew(held: Averages, pace: Pace, steps: int, mean: Tensor, scale: Tensor, patches: Tensor, joint: bool) -> None:
    """Move the shape towards that of these patches."""
    if steps and patches.is_cuda and not joint:
        recorded.renew(move, held, (mean, scale, patches), pace.rate(steps), (pace.eps, pace.n_iter))
        return
    passes = _FIRST_PASSES if steps == 0 else 1
    move(held, mean, scale, patches, pace.rate(steps), pace.eps, pace.n_iter, passes, joint)


def move(
    held: Averages,
    mean: Tensor,
    scale: Tensor,
    patches: Tensor,
    rate: float | Tensor,
    eps: float,
    n_iter: int,
    passes: int = 1,
    joint: bool = False,
) -> None:
    """Move the shape at this rate towards that of patches (F, rows) or (M, F, rows) with this mean and scale."""
    dtype = root_dtype(held.deconv, held.inner.shape[-1], n_iter)
    mean, scale, patches = mean.to(dtype), scale.to(dtype), patches.to(dtype)  # perhaps a view of the layer's input
    rate = rate.to(dtype) if isinstance(rate, Tensor) else rate
    with without_autocast(mean.device):
        centred = patches - mean.view(*patches.shape[:-1], 1)
        rows = torch.full_like(scale, patches.shape[-1])
        rows = processes.total_(rows) if joint else rows
        centred.mul_((scale * rows).rsqrt()[..., None, None])
        held.renew(centred, eps / scale, rate, passes, n_iter, joint)


def _everywhere(basis: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Rank 0's, so that processes on unlike devices do not drift apart by rounding."""
    sizes = [basis.numel(), inner.numel()]
    basis_, inner_ = processes.same_(torch.cat([basis.flatten(), inner.flatten()])).split(sizes)
    return basis_.view_as(basis), inner_.view_as(inner)


def follow_in_a_graph(
    held: Averages,
    pace: Pace,
    steps: Tensor,
    clock: Tensor,
    mean: Tensor,
    scale: Tensor,
    patches: Tensor,
    still: Tensor | None = None,
    cycle: int = 0,
    moving: int = 0,
) -> None:
    """`follow`, for the compiler, whose graph a branch on the count would cut in two.

    Args:
        steps, clock: the steps before this one, (), int64, on the device and on the host; one is added.
        still: whether nothing moves in this step, (), bool: with a `cycle`, all but the first `moving` steps of it.
    """
    with torch.no_grad():
        rate = (steps + 1).to(held.mean.dtype).reciprocal().clamp_min(pace.momentum)
        if still is not None:
            rate = torch.where(still, 0.0, rate)
            mean, scale = if_finite((held.mean, mean), (held.scale, scale))
        held.mean.lerp_(mean.to(held.mean.dtype), rate)
        moved = _average_root(held.scale, scale, rate.to(held.scale.dtype)).pow(-2)
        # a view: torch 2.11 loses what is done to a number on a CPU
        held.scale.view(-1).copy_((moved if still is None else torch.where(still, held.scale, moved)).view(-1))
        steps.add_(1)
        _, _, *shape = held
        operator = torch.ops.network_deconvolution.renew_when_due
        operator(patches.detach(), mean.detach(), scale.detach(), *shape, clock, *pace, cycle, moving)


def renew_when_due(
    patches: Tensor,
    mean: Tensor,
    scale: Tensor,
    inner: Tensor,
    deconv: Tensor,
    tilted: Tensor | None,
    last: Tensor | None,
    clock: Tensor,
    every: int,
    fresh_steps: int,
    momentum: float,
    eps: float,
    n_iter: int,
    cycle: int,
    moving: int,
) -> None:
    """What `follow` does where the shape is renewed, as an operator, which runs as it is written here."""
    before, pace = int(clock), Pace(every, fresh_steps, momentum, eps, n_iter)
    clock.add_(1)
    if pace.due(before) and (not cycle or before % cycle < moving):
        held = Averages(mean, scale, inner, deconv, tilted, last)
        _renew(held, pace, before, mean, scale, patches, joint=False)


def _nothing(*_: Any) -> None:
    """What the compiler's tracer runs in place of the operator."""


_LIBRARY = torch.library.Library("network_deconvolution", "FRAGMENT")
"""Not `torch.library.custom_op`, whose wrappers in Python would run in every step, for each layer."""
_LIBRARY.define(
    torch.library.infer_schema(
        renew_when_due, mutates_args=("inner", "deconv", "tilted", "last", "clock"), op_name="renew_when_due"
    ),
    tags=(torch.Tag.cudagraph_unsafe,),  # the host decides, anew in each step
)
_LIBRARY.impl("renew_when_due", renew_when_due, "CompositeExplicitAutograd")
_LIBRARY.impl("renew_when_due", _nothing, "Meta")

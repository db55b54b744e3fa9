"""The statistics that whitening layers hold: in a training step those of the batch, in evaluation the running ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from norm import leading, processes, whitening
from norm.processes import Traffic
from norm.sampling import Grouping, Sampler
from norm.whitening import Statistics

_FIRST_PASSES = 4
"""Steps towards the leading directions in the first training step, which starts from none."""


_TINY = 1e-12
"""A filter of zeros has no direction; its output is zero."""


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


def _everywhere(basis: Tensor, values: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank 0's: eigenvectors have no sign of their own, and products of unlike ones must not be summed."""
    parts = (basis, values, rest)
    found = processes.same_(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    basis, values, rest = (each.view_as(part) for each, part in zip(found, parts, strict=True))
    return basis, values, rest


class NormError(ValueError):
    """A wrong option, an unknown name, or a model that a recipe cannot be applied to; the message says what to do."""


def check_options(block: int, n_iter: int, eps: float, momentum: float, sampling_stride: int = 1) -> None:
    """Raises NormError unless all are in range."""
    for name, value in (("block", block), ("n_iter", n_iter), ("sampling_stride", sampling_stride)):
        if value < 1:
            raise NormError(f"{name} is {value}; it must be at least 1")
    if n_iter > 30:
        raise NormError(f"n_iter is {n_iter}; it must be at most 30, beyond that float32 overflows")
    if not 0 < eps < math.inf:
        raise NormError(f"eps is {eps}; it must be greater than 0, else a covariance of few rows has no inverse root")
    if not 0 <= momentum <= 1:
        raise NormError(f"momentum is {momentum}; it must lie between 0 and 1")


class Whitening(nn.Module):
    """What the layers share: running statistics in at least float32."""

    running_mean: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = fn(self.running_mean[:0]).dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise NormError(
                f"{type(self).__name__} cannot be turned to {dtype}: its statistics and inverse roots need float32. "
                "Train under torch.autocast instead, or deploy norm.fold(model).half(). The layers before this one may "
                "have been turned already: build the model anew"
            )
        return super()._apply(fn, recurse)


class Deconvolving(Whitening):
    """What FastDeconv and Delinear share: the statistics of a training step, and those of evaluation.

    With `every` = 0, the method as published, D and its gradient are the batch's, and `running_deconv` averages D. With
    `every` = n, D = S / sqrt(s): mean and scale s are the batch's, with gradients; the shape S, without gradient, is
    the inverse root of a running covariance, whose `rank` leading directions move in every n-th step (see `leading`).
    """

    running_deconv: Tensor
    running_scale: Tensor
    basis: Tensor
    values: Tensor
    gains: Tensor
    steps: Tensor
    gain: nn.Parameter | None
    groups: int = 1
    grouping: Grouping = "channel"
    freeze: bool = False
    freeze_iter: int = 100
    sync: bool = False

    def _set_up(
        self, features: int, n_iter: int, eps: float, momentum: float, every: int, rank: int, gain: bool = False
    ) -> None:
        if every < 0:
            raise NormError(f"every is {every}; it must be 0 (the exact method) or the steps between two inverse roots")
        if rank < 1:
            raise NormError(f"rank is {rank}; it must be at least 1")
        self.features, self.n_iter, self.eps, self.momentum, self.every = features, n_iter, eps, momentum, every
        self.rank = min(rank, features)
        lead = () if self.groups == 1 else (self.groups,)
        self.register_buffer("running_mean", torch.zeros(features * self.groups))
        if every:
            self.register_buffer("running_scale", torch.ones(lead))
            self.register_buffer("basis", leading.first_basis(features, self.rank).repeat(*lead, 1, 1))
            self.register_buffer("values", torch.ones(*lead, self.rank + 1))
            self.register_buffer("gains", torch.ones(*lead, self.rank + 1))
        else:
            self.register_buffer("running_deconv", torch.eye(features).repeat(*lead, 1, 1))
        self._steps = 0
        if every or self.freeze:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_parameter("gain", None)
        if gain:
            self.gain = nn.Parameter(_norms(self.layer_weight.detach()))

    def deconv(self) -> Tensor:
        """D of evaluation, (F, F) or (groups, F, F)."""
        return self._held_statistics().matrix()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer that this one is in evaluation."""
        return self._fold(self._held_statistics())

    def set_statistics(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the statistics of evaluation from a mean (F,) or (groups F,) and a covariance, without eps."""
        with torch.no_grad():
            eye = torch.eye(self.features, dtype=covariance.dtype, device=covariance.device)
            covariance = covariance + self.eps * eye
            self.running_mean.copy_(mean)
            if not self.every:
                self.running_deconv.copy_(whitening.inverse_sqrt(covariance, self.n_iter))
                return
            self.running_scale.copy_(covariance.diagonal(dim1=-2, dim2=-1).mean(-1))
            self._lead(*leading.directions(covariance / self.running_scale[..., None, None], self.rank))
            if not self.freeze:  # the averages go on from here, they do not start anew
                self._steps = self.every * math.ceil(1 / max(self.momentum, 1e-3))
                self.steps.fill_(self._steps)

    @property
    def layer_weight(self) -> Tensor:
        layer: Any = self  # a Conv2d or a Linear
        weight: Tensor = layer.weight
        return weight

    def set_weight(self, weight: Tensor, rescale: bool = False) -> None:
        """Take a W; with a gain, its norms go there. `rescale` what is left to the norms of a fresh layer, so that the
        same learning rate suits both (the weights of torch's initialisation have variance 1 / (3 fan_in))."""
        with torch.no_grad():
            if self.gain is not None:
                norms = _norms(weight)
                self.gain.copy_(norms)
                if rescale:
                    weight = weight / norms.clamp_min(_TINY).mul(math.sqrt(3)).view(-1, *[1] * (weight.ndim - 1))
            self.layer_weight.copy_(weight)

    def effective_weight(self) -> Tensor:
        """The W that is folded: the weight, or gain times its direction for each output channel (Salimans and Kingma,
        "Weight Normalization", arXiv 1602.07868, equation 2)."""
        weight = self.layer_weight
        if self.gain is None:
            return weight
        factor = self.gain / _norms(weight).clamp_min(_TINY)
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))

    def _fold(self, found: Statistics) -> tuple[Tensor, Tensor]:
        layer: Any = self
        return whitening.fold_weight(self.effective_weight(), layer.bias, found, self.groups, self.grouping)

    def _held_statistics(self) -> Statistics:
        if self.every:
            return Statistics(self.running_mean, self.basis, self.gains, self.running_scale)
        return Statistics(self.running_mean, self.running_deconv)

    def _held_copies(self) -> Statistics:
        """Since the next call may move the averages before the gradient of this one is taken."""
        return Statistics(*(None if each is None else each.clone() for each in self._held_statistics()))  # type: ignore[arg-type]

    def _held(self, steps: Any) -> Any:
        """Whether the statistics of the training step after `steps` others are held; an int or a tensor."""
        limit = self.freeze_iter + 1 if self.grouping == "published" else self.freeze_iter
        return steps % (10 * self.freeze_iter) >= limit

    def _training_statistics(self, x: Tensor, sampler: Sampler) -> tuple[Tensor, Statistics]:
        """x, for the layer to go on with, and the statistics of this step, from its patches or held; the running
        averages move."""
        if torch.compiler.is_compiling() and (self.every or self._joint()):
            # it counts steps on the host, or waits for other processes: its own piece, which is not traced
            return torch.compiler.disable(Deconvolving._training_statistics)(self, x, sampler)
        if self.every:
            return self._running_shape(x, sampler)
        if self.freeze and not torch.compiler.is_compiling():
            held = self._held(self._count())
            if held:
                return x, self._held_copies()
        x, mean, deconv = whitening.statistics(x, sampler, self.eps, self.n_iter, self._joint())
        if self.freeze and torch.compiler.is_compiling():  # a branch on the count would cut the graph in two
            mask = self._held(self.steps)
            self.steps.add_(1)
            mean = torch.where(mask, self.running_mean, mean)
            deconv = torch.where(mask, self.running_deconv, deconv)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_deconv.lerp_(deconv.to(self.running_deconv.dtype), self.momentum)
        return x, Statistics(mean, deconv)

    def _running_shape(self, x: Tensor, sampler: Sampler) -> tuple[Tensor, Statistics]:
        steps = self._count()
        if self.freeze and self._held(steps):
            return x, self._held_copies()
        x, mean, scale = whitening.mean_and_scale(x, sampler, self.eps, self._joint())
        with torch.no_grad():  # an average that starts as the mean of what it has seen, and never slower than momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), max(self.momentum, 1 / (steps + 1)))
            self.running_scale.lerp_(scale.to(self.running_mean.dtype), max(self.momentum, 1 / (steps + 1)))
            if steps % self.every == 0:
                rate = max(1 - (1 - self.momentum) ** self.every, 1 / (steps // self.every + 1))
                self._renew(x, sampler, mean, scale, rate)
        return x, Statistics(mean, self.basis.clone(), self.gains.clone(), scale)

    def _renew(self, x: Tensor, sampler: Sampler, mean: Tensor, scale: Tensor, rate: float) -> None:
        """Move the leading directions towards those of this batch."""
        dtype = self.basis.dtype
        with torch.autocast(x.device.type, enabled=False):
            patches = sampler.gather(x).to(dtype)  # perhaps a view of x
            centred = patches - mean.to(dtype).view(*patches.shape[:-1], 1)
            rows, joint = torch.full_like(scale, patches.shape[-1], dtype=dtype), self._joint()
            rows = processes.total_(rows) if joint else rows
            centred.mul_((scale.to(dtype) * rows).rsqrt()[..., None, None])
            passes = 1 if rate < 1 else _FIRST_PASSES
            held = (self.basis, self.values[..., :-1], self.values[..., -1])
            found = leading.renew(
                *held, centred, self.eps / scale.to(dtype), rate, passes, processes.total_ if joint else None
            )
            self._lead(*(_everywhere(*found) if joint else found))

    def _joint(self) -> bool:
        """Whether the statistics are those of all processes."""
        return self.sync and processes.active()

    def traffic(self) -> Traffic:
        """What a training step sends with `sync`, forward and backward, on an average over the steps."""
        features, groups = self.features, self.groups
        mean, wide = features * groups, self.running_mean.element_size()
        if not self.every:
            triangles = groups * processes.triangle(features)
            return Traffic(3, wide * (2 * mean + 1 + 2 * triangles))
        moments = Traffic(2, 8 * (mean + groups + 1) + wide * (mean + groups))
        shape = groups * (features * self.rank + self.rank + 1)  # from rank 0
        passes = 1 if self.rank < features else 0
        sums = groups * (passes * features * self.rank + self.rank**2 + 1)
        return moments.plus(Traffic(3 + passes, wide * (shape + sums)), 1 / self.every)

    def _lead(self, basis: Tensor, values: Tensor, rest: Tensor) -> None:
        self.basis.copy_(basis)
        self.values.copy_(torch.cat([values, rest[..., None]], -1))
        self.gains.copy_(leading.gains(values, rest, self.features, self.n_iter))

    def _count(self) -> int:
        """The training steps before this one, counted on the host as well, so that no step waits for the device."""
        steps = self._steps
        self._steps += 1
        self.steps.fill_(self._steps)
        return steps

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.every or self.freeze:
            state_dict.setdefault(prefix + "steps", self.steps)  # the authors' weights have no count
            self._steps = int(state_dict[prefix + "steps"])
        super()._load_from_state_dict(state_dict, prefix, *args)

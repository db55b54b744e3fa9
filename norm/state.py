"""The statistics that whitening layers hold: in a training step those of the batch, in evaluation the running ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from norm import leading, processes, recorded, whitening
from norm.checks import NormError
from norm.processes import Traffic
from norm.products import autocasts, root_dtype
from norm.running_shape import Averages, Pace, follow, follow_in_a_graph, if_finite
from norm.sampling import Sampler
from norm.strides import Grouping
from norm.whitening import Statistics

_TINY = 1e-12
"""A filter of zeros has no direction; its output is zero."""


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


def _with_direction(weight: Tensor, norms: Tensor) -> Tensor:
    """The weight, with filters of a fresh layer in place of those of zeros, always the same ones: without a direction
    neither the filter nor its gain, which is zero, would have a gradient."""
    generator = torch.Generator("cpu").manual_seed(0)
    fresh = torch.randn(weight.shape, generator=generator, device="cpu").to(weight) / math.sqrt(3 * weight[0].numel())
    return torch.where((norms < _TINY).view(-1, *[1] * (weight.ndim - 1)), fresh, weight)


class Whitening(nn.Module):
    """What the layers share: running statistics in at least float32, which a second computation for the backward
    (`torch.utils.checkpoint`) does not move."""

    running_mean: Tensor
    n_iter: int
    root_size: int
    """Rows and columns of the matrices whose inverse roots are taken."""
    rewound: bool
    """Who computes again has put the statistics back to what the first computation found, so that they move as then."""
    _calls = 0
    """Since a call was last computed again."""
    _recomputed = False
    _latest: Tensor | None = None
    """The mean of the latest call's patches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rewound = False

    def _check_dtype(self, x: Tensor, expected: torch.dtype | None = None) -> None:
        """Raises NormError where a plain layer would refuse the input, of which a whitening one makes zeros: images in
        integers, or another float than `expected`, but not under autocast."""
        if not x.is_floating_point() or not (expected is None or x.dtype == expected or autocasts(x.device)):
            wanted = "a floating-point tensor" if expected is None else f"a tensor of {expected}"
            raise NormError(
                f"{type(self).__name__} got an input of {x.dtype}; expected {wanted}: convert it (images in integers: "
                "x.float() / 255), or train under torch.autocast"
            )

    def _check_wide(self, dtype: torch.dtype, what: str = "be made in", then: str = "") -> None:
        if dtype in (torch.float16, torch.bfloat16):
            raise NormError(
                f"{type(self).__name__} cannot {what} {dtype}: its statistics and inverse roots need float32. Train "
                f"under torch.autocast instead, or deploy norm.fold(model).half().{then}"
            )

    def root_dtype(self) -> torch.dtype:
        """What the inverse roots are computed in."""
        return root_dtype(self.running_mean, self.root_size, self.n_iter)

    def _again(self) -> bool:
        """Whether this call only computes for a backward what a call before it has computed.

        With `every`, or where a frozen layer begins to hold, that has to be the latest call (`_check_latest`).
        """
        return not self.rewound and torch._C._current_graph_task_id() != -1

    @torch.no_grad()
    def _check_latest(self, mean: Tensor, again: bool) -> None:
        """Raises NormError where a call is computed again that is not the latest one, by the mean of its patches: the
        shape that it had is gone. Looks only where there were several calls, since a GPU makes the host wait for it.
        """
        if not again:
            self._calls = 1 if self._recomputed else self._calls + 1
            self._recomputed, self._latest = False, mean.detach()
            return
        self._recomputed = True
        if self._calls > 1 and self._latest is not None and self._latest.shape == mean.shape:
            off, size = (torch.linalg.vector_norm(each) for each in (mean - self._latest, self._latest))
            if bool(off > 1e-3 * size):
                raise NormError(
                    f"{type(self).__name__} was called more than once, and torch.utils.checkpoint computes an earlier "
                    "call again: the cheap method (every, deconv_fast) holds what the latest one needs. Call backward "
                    "after each call, do not checkpoint this layer, or take deconv (every=0)"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._check_wide(
            fn(self.running_mean[:0]).dtype,
            "be turned to",
            " The layers before this one may have been turned already: build the model anew",
        )
        return super()._apply(fn, recurse)


class Deconvolving(Whitening):
    """What FastDeconv and Delinear share: the statistics of a training step, and those of evaluation.

    With `every` = 0, the method as published, D and its gradient are the batch's, and `running_deconv` averages D. With
    `every` = n, D = S / sqrt(s): mean and scale s are the batch's, with gradients; the shape S, without gradient, is
    the inverse root of a running covariance, renewed once in n steps; of more than 2 `rank` features it has only
    `rank` leading directions (see `leading`). In the first `fresh_steps` it is that of each batch alone, but not in a
    frozen layer, whose input does not change with the weights.
    """

    running_deconv: Tensor
    running_scale: Tensor
    inner: Tensor
    shape: Tensor
    basis: Tensor
    tilted: Tensor
    last: Tensor
    steps: Tensor
    gain: nn.Parameter | None
    matrices: int = 1
    """How many D's: 1, or of a grouped convolution one for each block of each group."""
    grouping: Grouping = "channel"
    freeze: bool = False
    freeze_iter: int = 100
    sync: bool = False
    _written = -1
    """The version of `steps` that this layer has written."""

    def _set_up(
        self,
        features: int,
        n_iter: int,
        eps: float,
        momentum: float,
        every: int,
        rank: int,
        fresh_steps: int,
        gain: bool,
    ) -> None:
        if min(every, fresh_steps) < 0:
            raise NormError(
                f"every is {every}, fresh_steps {fresh_steps}; they must be at least 0 (every=0: the exact method)"
            )
        if rank < 1:
            raise NormError(f"rank is {rank}; it must be at least 1")
        self.features, self.n_iter, self.eps, self.momentum = features, n_iter, eps, momentum
        self.every, self.fresh_steps = every, 0 if self.freeze else fresh_steps
        self.few = bool(every) and leading.few(rank, features)
        self.rank = rank if self.few else features
        self.root_size = rank + 1 if self.few else features
        weight = self.layer_weight
        self._check_wide(weight.dtype)
        for name, size in self._sizes().items():
            self.register_buffer(name, weight.new_empty(size))
        self._clock = torch.zeros((), dtype=torch.int64, device="cpu")
        if every or self.freeze:
            self.register_buffer("steps", weight.new_empty((), dtype=torch.int64))
        self.register_parameter("gain", nn.Parameter(_norms(weight.detach())) if gain else None)
        self.reset_running_stats()

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """Of the running averages."""
        lead = () if self.matrices == 1 else (self.matrices,)
        whole, thin = (*lead, self.features, self.features), (*lead, self.features, self.rank)
        mean: dict[str, tuple[int, ...]] = {"running_mean": (self.features * self.matrices,)}
        if not self.every:
            return {**mean, "running_deconv": whole}
        moments = {**mean, "running_scale": lead}
        if not self.few:
            return {**moments, "inner": whole, "shape": whole}
        return {**moments, "inner": (*lead, self.rank + 1, self.rank + 1), "basis": thin, "tilted": thin, "last": lead}

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Begin anew, as batch norms do."""
        self.running_mean.zero_()
        if self.every:
            self.running_scale.fill_(1)
        if self.few:
            basis, inner = leading.first(self.features, self.rank)
            self.basis.copy_(basis)
            self.inner.copy_(inner)
            self.tilted.zero_()
            self.last.fill_(1)
        else:
            for held in (self.inner, self.shape) if self.every else (self.running_deconv,):
                held.copy_(torch.eye(self.features, device=held.device))
        if "steps" in self._buffers:
            self.steps.zero_()
        self._steps = 0

    def reset_parameters(self) -> None:
        """Weight and bias as a plain layer's, gain and statistics to match: a new layer, also after `to_empty`."""
        super().reset_parameters()  # type: ignore[misc]
        if "running_mean" not in self._buffers:
            return  # the plain layer's own constructor
        self.reset_running_stats()
        if self.gain is not None:
            with torch.no_grad():
                self.gain.copy_(_norms(self.layer_weight))

    def deconv(self) -> Tensor:
        """D of evaluation, (F, F) or (matrices, F, F)."""
        return self._held_statistics().matrix()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer that this one is in evaluation."""
        layer: Any = self
        # a training step may come before the gradient of this evaluation is taken
        copied = torch.is_grad_enabled() or torch.jit.is_tracing()  # which looks at both, and wants them alike
        found = self._held_copies() if copied else self._held_statistics()
        return whitening.fold_weight(self.effective_weight(), layer.bias, found, self.matrices, self.grouping)

    def set_statistics(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the statistics of evaluation from a mean (F,) or (matrices F,) and a covariance, without eps."""
        with torch.no_grad():
            eye = torch.eye(self.features, dtype=covariance.dtype, device=covariance.device)
            covariance = covariance + self.eps * eye
            self.running_mean.copy_(mean)
            if not self.every:
                self.running_deconv.copy_(whitening.inverse_sqrt(covariance, self.n_iter))
                return
            self.running_scale.copy_(covariance.diagonal(dim1=-2, dim2=-1).mean(-1))
            self._averages().take(covariance / self.running_scale[..., None, None], self.n_iter)
            # the averages go on from here, they do not start anew, and a frozen layer's move on as from the start
            steps = self.fresh_steps + self.every * math.ceil(1 / max(self.momentum, 1e-3))
            self._steps = min(steps, self._cycle()[1] - 1) if self.freeze else steps
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
                weight = _with_direction(weight, norms)
                if rescale:
                    norms = _norms(weight)
                    weight = weight / norms.mul(math.sqrt(3)).view(-1, *[1] * (weight.ndim - 1))
            self.layer_weight.copy_(weight)

    def effective_weight(self) -> Tensor:
        """The W that is folded: the weight, or gain times its direction for each output channel (Salimans and Kingma,
        "Weight Normalization", arXiv 1602.07868, equation 2)."""
        weight = self.layer_weight
        if self.gain is None:
            return weight
        factor = self.gain / _norms(weight).clamp_min(_TINY)
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))

    def _held_statistics(self) -> Statistics:
        if self.every:
            return self._averages().statistics(self.running_mean, self.running_scale)
        return Statistics(self.running_mean, self.running_deconv)

    def _held_copies(self) -> Statistics:
        """Since the next call may move the averages before the gradient of this one is taken."""
        if self.every:
            return self._averages().copied().statistics(self.running_mean.clone(), self.running_scale.clone())
        return Statistics(self.running_mean.clone(), self.running_deconv.clone())

    def _cycle(self) -> tuple[int, int]:
        """Steps of a freeze cycle, and in how many of them, the first ones, the statistics move."""
        return 10 * self.freeze_iter, self.freeze_iter + 1 if self.grouping == "published" else self.freeze_iter

    def train(self, mode: bool = True) -> Any:
        if mode and "steps" in self._buffers and not self.steps.is_meta and not self._counted_last():
            self._steps = int(self.steps)  # somebody may have copied buffers: DistributedDataParallel, an average
        return super().train(mode)

    def _counted_last(self) -> bool:
        """Whether nobody has written to `steps` since this layer did: reading it would wait for a GPU."""
        return not self.steps.is_inference() and self.steps._version == self._written

    def _replicate_for_data_parallel(self) -> Any:
        """For torch.nn.DataParallel: every replica counts the step by itself, as one and the same. The buffers of the
        first one are this layer's, and with them its averages and count, as with batch norm."""
        if "steps" in self._buffers:
            self._steps = int(self.steps)
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._clock = self._clock.clone()
        return replica

    def _held(self, steps: Any) -> Any:
        """Whether the statistics of the training step after `steps` others are held; an int or a tensor."""
        cycle, moving = self._cycle()
        return self.freeze and steps % cycle >= moving

    def _training_statistics(self, x: Tensor, sampler: Sampler) -> tuple[Tensor, Statistics]:
        """x, for the layer to go on with, and the statistics of this step, from its patches or held; the running
        averages move."""
        if x.numel() == 0 and not self._joint():  # no image, no statistics: a detector's head without a proposal
            return x, self._held_copies()
        if torch.compiler.is_compiling():
            if self._joint():  # it waits for other processes: its own piece, which is not traced
                return torch.compiler.disable(Deconvolving._training_statistics)(self, x, sampler)
            return self._traced_statistics(x, sampler)
        again = self._again()
        if (self.every or self.freeze) and self._held(self._steps - 1 if again else self._count()):
            return x, self._held_copies()
        if self.every:
            x, mean, scale = whitening.mean_and_scale(x, sampler, self.eps, self._joint())
            self._check_latest(mean, again)
            if again:
                return x, self._averages().copied().statistics(mean, scale)
            pace, steps, move_mean, move_scale = self._pace(), self._steps - 1, mean, scale
            if self.freeze:
                move_mean, move_scale = if_finite((self.running_mean, mean), (self.running_scale, scale))
            follow(self._averages(), pace, steps, move_mean, move_scale, lambda: sampler.gather(x), self._joint())
            return x, self._averages().copied().statistics(mean, scale)
        x, mean, deconv = whitening.statistics(x, sampler, self.eps, self.n_iter, self._joint())
        if not again:
            self._average(mean, deconv)
        return x, Statistics(mean, deconv)

    def _traced_statistics(self, x: Tensor, sampler: Sampler) -> tuple[Tensor, Statistics]:
        """`_training_statistics` in a compiled graph, which a branch on the count would cut in two."""
        held = self._held(self.steps) if self.freeze else None
        if self.every:
            patches, mean, scale = whitening.traced_mean_and_scale(x, sampler, self.eps)
            cycle = self._cycle() if self.freeze else ()
            follow_in_a_graph(
                self._averages(), self._pace(), self.steps, self._clock, mean, scale, patches, held, *cycle
            )
            if held is not None:
                mean, scale = (
                    torch.where(held, *each) for each in ((self.running_mean, mean), (self.running_scale, scale))
                )
            return x, self._averages().copied().statistics(mean, scale)
        x, mean, deconv = whitening.statistics(x, sampler, self.eps, self.n_iter)
        if held is not None:
            self.steps.add_(1)
            self._clock.add_(1)
            mean = torch.where(held, self.running_mean, mean)
            deconv = torch.where(held, self.running_deconv, deconv)
        self._average(mean, deconv)
        return x, Statistics(mean, deconv)

    @torch.no_grad()
    def _average(self, mean: Tensor, deconv: Tensor) -> None:
        if self.freeze:
            mean, deconv = if_finite((self.running_mean, mean), (self.running_deconv, deconv))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_deconv.lerp_(deconv.to(self.running_deconv.dtype), self.momentum)

    def _averages(self) -> Averages:
        shape = (self.basis, self.tilted, self.last) if self.few else (self.shape,)
        return Averages(self.running_mean, self.running_scale, self.inner, *shape)

    def _pace(self) -> Pace:
        return Pace(self.every, self.fresh_steps, self.momentum, self.eps, self.n_iter)

    def _joint(self) -> bool:
        """Whether the statistics are those of all processes."""
        return self.sync and processes.active()

    def traffic(self) -> Traffic:
        """What a training step sends with `sync`, forward and backward, on an average over the steps that are not
        fresh."""
        features, matrices = self.features, self.matrices
        mean, wide = features * matrices, self.running_mean.element_size()
        if not self.every:
            triangles = matrices * processes.triangle(features)
            return Traffic(3, self.root_dtype().itemsize * (2 * mean + 1 + 2 * triangles))
        moments = Traffic(2, 8 * (mean + matrices + 1) + wide * (mean + matrices))
        wide = self.root_dtype().itemsize
        if not self.few:
            return moments.plus(Traffic(2, wide * matrices * (1 + processes.triangle(features))), 1 / self.every)
        sums = matrices * (1 + features * self.rank + self.rank**2)
        shape = matrices * (features * self.rank + (self.rank + 1) ** 2)  # from rank 0
        return moments.plus(Traffic(4, wide * (sums + shape)), 1 / self.every)

    def _count(self) -> int:
        """The training steps before this one, counted on the host as well, so that no step waits for a GPU."""
        if recorded.by_hand(self.steps):
            raise NormError(
                f"{type(self).__name__} with every={self.every}, freeze={self.freeze} cannot be trained in a CUDA "
                "graph that is recorded by hand: the host decides in each step what moves. Use torch.compile with "
                'mode="reduce-overhead", or every=0 and freeze=False'
            )
        steps = int(self.steps) if self.steps.device.type == "cpu" else self._steps
        self._steps = steps + 1
        self.steps.fill_(steps + 1)
        self._written = self.steps._version if not self.steps.is_inference() else -1
        return steps

    @property
    def _steps(self) -> int:
        return int(self._clock)

    @_steps.setter
    def _steps(self, steps: int) -> None:
        self._clock.fill_(steps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.every or self.freeze:
            state_dict.setdefault(prefix + "steps", self.steps)  # the authors' weights have no count
            self._steps = int(state_dict[prefix + "steps"])
        super()._load_from_state_dict(state_dict, prefix, *args)


def in_step(model: nn.Module, steps: int) -> bool:
    """Whether the next `steps` training steps, a multiple of each layer's `every`, renew each running shape equally
    often: once in each run of `every` steps from the first one on (`Pace.due`)."""
    return not any(int(one.steps) % steps for one in model.modules() if isinstance(one, Deconvolving) and one.every)


def skip_fresh_steps(model: nn.Module) -> None:
    """Begin with the steps that come after them, to measure what those take."""
    for layer in model.modules():
        if isinstance(layer, Deconvolving):
            layer.fresh_steps = 0

"""Layers that whiten their input by network deconvolution; the mathematics is in `norm.whitening`.

`FastDeconv` stands in for Conv2d, `Delinear` for Linear, `ChannelDeconv` whitens the channels of a feature map or
vector and leaves the layers around it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norm import whitening
from norm.whitening import Grouping, Pair

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


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


class _Whitening(nn.Module):
    """What the layers share: running statistics in at least float32."""

    running_mean: Tensor
    running_deconv: Tensor
    momentum: float

    def _track(self, mean: Tensor, deconv: Tensor) -> None:
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_deconv.lerp_(deconv.to(self.running_deconv.dtype), self.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = fn(self.running_mean[:0]).dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise NormError(
                f"{type(self).__name__} cannot be turned to {dtype}: its statistics and inverse roots need float32. "
                "Train under torch.autocast instead, or deploy norm.fold(model).half(). The layers before this one may "
                "have been turned already: build the model anew"
            )
        return super()._apply(fn, recurse)


class FastDeconv(_Whitening, nn.Conv2d):
    """A Conv2d that whitens the patches it sees (Ye et al. 2020, section 4, with the implicit form of section 4.4).

    Training: mean and D come from the batch (`whitening.sample`), gradients flow through both, and the running
    averages move by `momentum`. Evaluation: the running averages take their place. Padding pixels count as zeros, in
    the statistics and in the convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in Conv2d. Without a bias
            the mean is still subtracted.
        block: channels whitened together; more than in_channels become in_channels, and one that does not divide it
            becomes the greatest common divisor. A grouped convolution has one D a group, of all its channels.
        n_iter: Newton-Schulz steps.
        eps: added to the diagonal of the covariance.
        momentum: rate of the running averages.
        sampling_stride: the statistics use every `sampling_stride`-th window of the convolution in each direction.
        freeze: update the statistics only in the first `freeze_iter` of every 10 `freeze_iter` training steps, and use
            the running averages in between (for the first layer, whose input does not change). A step is a call of
            the layer in training mode: one a step of the optimiser, without accumulation.
        grouping: "channel": blocks of neighbouring channels, as in the paper. "published": the authors' code, whose
            blocks interleave features, and which updates one step more of every freeze cycle.
        dense_small_maps: take more windows where the output is at most 16 high or wide (`whitening.dense_strides`).
            The authors' code does not.
        padding_mode: as in Conv2d.

    Shape: (N, C_in, H, W) -> (N, C_out, H_out, W_out) as Conv2d. The dtype of the output is Conv2d's; statistics,
    inverse root and W D are computed in float32 under autocast (float64 for a float64 layer).

    Buffers: running_mean (F,) or (groups F,), zeros at first; running_deconv (F, F) or (groups, F, F), the identity at
    first; steps (), int64, with freeze only. F = block k_h k_w.

    Raises:
        NormError: an option out of range, an input that is not (N, C_in, H, W), or `.half()`.
    """

    steps: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        block: int = 64,
        n_iter: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
        sampling_stride: int = 3,
        freeze: bool = False,
        freeze_iter: int = 100,
        grouping: Grouping = "channel",
        dense_small_maps: bool = False,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        check_options(block, n_iter, eps, momentum, sampling_stride)
        if freeze_iter < 1:
            raise NormError(f"freeze_iter is {freeze_iter}; it must be at least 1")
        if grouping not in ("channel", "published"):
            raise NormError(f"grouping is {grouping!r}; it must be 'channel' or 'published'")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode=padding_mode
        )
        self.block = in_channels // groups if groups > 1 else whitening.resolve_block(in_channels, block)
        self.n_iter = n_iter
        self.eps = eps
        self.momentum = momentum
        self.sampling_stride = sampling_stride
        self.freeze = freeze
        self.freeze_iter = freeze_iter
        self.grouping: Grouping = grouping
        self.dense_small_maps = dense_small_maps
        features = self.block * self.kernel_size[0] * self.kernel_size[1]
        deconv = torch.eye(features)
        self.register_buffer("running_mean", torch.zeros(features * groups))
        self.register_buffer("running_deconv", deconv if groups == 1 else deconv.repeat(groups, 1, 1))
        self._steps = 0
        if freeze:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _held(self, steps: Any) -> Any:
        """Whether the statistics of the training step after `steps` others are held; an int or a tensor."""
        limit = self.freeze_iter + 1 if self.grouping == "published" else self.freeze_iter
        return steps % (10 * self.freeze_iter) >= limit

    def _training_statistics(self, x: Tensor, padding: Pair) -> tuple[Tensor, Tensor]:
        """Mean and D for this training step, from the batch or held; the running averages move."""
        if self.freeze and not torch.compiler.is_compiling():
            held = self._held(self._steps)  # counted on the host as well, so that no step waits for the device
            self._steps += 1
            self.steps.fill_(self._steps)
            if held:  # copies, since the next call may move the averages before the gradient of this one is taken
                return self.running_mean.clone(), self.running_deconv.clone()
        mean, deconv = whitening.statistics(x, partial(self.patches, padding=padding), self.eps, self.n_iter)
        if self.freeze and torch.compiler.is_compiling():  # a branch on the count would cut the graph in two
            mask = self._held(self.steps)
            self.steps.add_(1)
            mean = torch.where(mask, self.running_mean, mean)
            deconv = torch.where(mask, self.running_deconv, deconv)
        self._track(mean, deconv)
        return mean, deconv

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.freeze:
            state_dict.setdefault(prefix + "steps", self.steps)  # the authors' weights have no count
            self._steps = int(state_dict[prefix + "steps"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded where symmetric zeros do not say it all, and the padding left to do."""
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            amount = self._reversed_padding_repeated_twice
            if not any(amount):
                return x, (0, 0)
            return F.pad(x, amount, "constant" if self.padding_mode == "zeros" else self.padding_mode), (0, 0)
        return x, (self.padding[0], self.padding[1])

    def patches(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The sampled patches of the (padded) input, (F, rows) or (groups, F, rows), in the dtype of `x`."""
        kernel_size, stride, dilation = (cast(Pair, each) for each in (self.kernel_size, self.stride, self.dilation))
        every = (self.sampling_stride, self.sampling_stride)
        if self.dense_small_maps:
            size = (x.shape[-2], x.shape[-1])
            every = whitening.dense_strides(size, kernel_size, stride, padding, dilation, self.sampling_stride)
        sampled = whitening.sample(x, kernel_size, stride, padding, dilation, every)
        return whitening.group_patches(sampled, self.running_deconv.shape[-1], self.groups, self.grouping)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the Conv2d that this layer is in evaluation."""
        return whitening.fold_weight(
            self.weight, self.bias, self.running_mean, self.running_deconv, self.groups, self.grouping
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise NormError(f"FastDeconv expects an input (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        x, padding = self.pad(x)
        if self.training:
            mean, deconv = self._training_statistics(x, padding)
            weight, bias = whitening.fold_weight(self.weight, self.bias, mean, deconv, self.groups, self.grouping)
        else:
            weight, bias = self.folded()
        if not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, block={self.block}, n_iter={self.n_iter}, eps={self.eps}"
        text += f", sampling_stride={self.sampling_stride}, grouping={self.grouping}"
        text += ", dense_small_maps=True" if self.dense_small_maps else ""
        return text + (", freeze=True" if self.freeze else "")


class Delinear(_Whitening, nn.Linear):
    """A Linear layer that whitens its input in blocks of `block` features; the rules are FastDeconv's.

    Shape: (..., in_features) -> (..., out_features). Buffers: running_mean (block,), running_deconv (block, block).

    Raises:
        NormError: an option out of range, or `.half()`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: int = 512,
        n_iter: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        check_options(block, n_iter, eps, momentum)
        super().__init__(in_features, out_features, bias)
        self.block = whitening.resolve_block(in_features, block)
        self.n_iter = n_iter
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(self.block))
        self.register_buffer("running_deconv", torch.eye(self.block))

    def patches(self, x: Tensor) -> Tensor:
        """The input as (block, rows)."""
        return x.reshape(-1, self.block).t()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the Linear layer that this one is in evaluation."""
        return whitening.fold_weight(self.weight, self.bias, self.running_mean, self.running_deconv, 1, "channel")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, deconv = whitening.statistics(x, self.patches, self.eps, self.n_iter)
            self._track(mean, deconv)
            weight, bias = whitening.fold_weight(self.weight, self.bias, mean, deconv, 1, "channel")
        else:
            weight, bias = self.folded()
        if not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}, n_iter={self.n_iter}, eps={self.eps}"


class ChannelDeconv(_Whitening):
    """Whitens the channels of a feature map, or the features of a vector, in blocks; it has no weights.

    The first C - C % block channels are whitened with one D for all blocks; what is left is standardised with one mean
    and variance. Statistics come from every `sampling_stride`^2-th element of a block's flattened (blocks, N, H, W)
    list, from all where H or W is smaller than the stride. The first training batch sets the running averages.

    Args:
        block: channels whitened together, at most the channels of the input.
        n_iter, eps, momentum, sampling_stride: as in FastDeconv.
        grouping: "channel": blocks of neighbouring channels. "published": block j holds the channels whose index is j
            modulo C / block.

    Shape: (N, C, H, W) or (N, C), kept.

    Raises:
        NormError: an option out of range, an input of another rank or with fewer than `block` channels, or `.half()`.
    """

    rest_mean: Tensor
    rest_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        block: int = 64,
        *,
        n_iter: int = 5,
        eps: float = 1e-2,
        momentum: float = 0.1,
        sampling_stride: int = 3,
        grouping: Grouping = "channel",
    ) -> None:
        check_options(block, n_iter, eps, momentum, sampling_stride)
        super().__init__()
        self.block = block
        self.n_iter = n_iter
        self.eps = eps
        self.momentum = momentum
        self.sampling_stride = sampling_stride
        self.grouping: Grouping = grouping
        self.register_buffer("running_mean", torch.zeros(block))
        self.register_buffer("running_deconv", torch.eye(block))
        self.register_buffer("rest_mean", torch.zeros(()))
        self.register_buffer("rest_var", torch.ones(()))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self.seen: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (2, 4):
            raise NormError(f"ChannelDeconv got an input of shape {tuple(x.shape)}; it takes (N, C) or (N, C, H, W)")
        if x.shape[1] < self.block:
            raise NormError(f"ChannelDeconv has block {self.block} but an input of {x.shape[1]} channels")
        self.seen = (x.shape[1], x.ndim)
        whole = x.shape[1] - x.shape[1] % self.block
        with torch.autocast(device_type=x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            parts = [self._whiten(wide[:, :whole])]
            if whole < x.shape[1]:
                parts.append(self._standardise(wide[:, whole:]))
            if self.training:
                self.num_batches_tracked.add_(1)
            return torch.cat(parts, 1).to(x.dtype)

    def _every(self, x: Tensor) -> int:
        dense = x.ndim == 2 or min(x.shape[2:]) < self.sampling_stride
        return 1 if dense else self.sampling_stride**2

    def _rate(self) -> Tensor:
        first = (self.num_batches_tracked == 0).to(self.running_mean.dtype)
        return first * (1 - self.momentum) + self.momentum

    def _whiten(self, x: Tensor) -> Tensor:
        channels = x.transpose(0, 1)
        if self.grouping == "channel":
            blocks = channels.reshape(-1, self.block, channels[0].numel()).transpose(0, 1)
        else:
            blocks = channels.reshape(self.block, -1, channels[0].numel())
        rows = blocks.reshape(self.block, -1)
        mean, deconv = self.running_mean, self.running_deconv
        if self.training:
            every = self._every(x)
            mean, deconv = whitening.statistics(rows, lambda rows: rows[:, ::every], self.eps, self.n_iter)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self._rate())
                self.running_deconv.lerp_(deconv.to(self.running_mean.dtype), self._rate())
        white = (deconv @ (rows - mean[:, None])).view(blocks.shape)
        if self.grouping == "channel":
            white = white.transpose(0, 1)
        return white.reshape(channels.shape).transpose(0, 1)

    def _standardise(self, x: Tensor) -> Tensor:
        mean, var = self.rest_mean, self.rest_var
        if self.training:
            sampled = x.flatten(1)[:, :: self._every(x)]
            # The unbiased variance, as the authors' code; one element alone has none.
            mean, var = sampled.mean(), sampled.var(correction=min(1, sampled.numel() - 1))
            with torch.no_grad():
                self.rest_mean.lerp_(mean.to(self.running_mean.dtype), self._rate())
                self.rest_var.lerp_(var.to(self.running_mean.dtype), self._rate())
        return (x - mean) * (var + self.eps).rsqrt()

    def folded(self) -> tuple[Tensor, Tensor, int]:
        """Matrix (C, C) and offset (C,) of the map that this layer is in evaluation, and the rank of its input.

        Raises:
            NormError: the layer has seen no input since it was made, so that it does not know C.
        """
        if self.seen is None:
            raise NormError("a ChannelDeconv learns its channels from its input; run one batch before folding")
        channels, rank = self.seen
        eye = torch.eye(channels, dtype=self.running_deconv.dtype, device=self.running_deconv.device)
        whole = channels - channels % self.block
        training, self.training = self.training, False
        try:
            rows = torch.cat([torch.zeros_like(eye[:1]), eye])
            images = torch.cat([self._whiten(rows[:, :whole]), self._standardise(rows[:, whole:])], 1)
        finally:
            self.training = training
        return (images[1:] - images[0]).t().contiguous(), images[0], rank

    def extra_repr(self) -> str:
        return f"block={self.block}, n_iter={self.n_iter}, eps={self.eps}, sampling_stride={self.sampling_stride}"

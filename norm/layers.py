"""Layers that whiten their input by network deconvolution: `FastDeconv` for Conv2d, `Delinear` for Linear.

The mathematics is in `norm.whitening`, the statistics are in `norm.state`.
"""

from __future__ import annotations

import warnings
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norm import folded_conv, processes
from norm.checks import FRESH_STEPS, NormError, check_options
from norm.folded_conv import Geometry
from norm.processes import ALONE, Share
from norm.products import autocasts
from norm.sampling import Rows, Windows
from norm.state import Deconvolving
from norm.strides import (
    Grouping,
    Pair,
    dense_strides,
    largest_block,
    list_covers,
    middles,
    output_size,
    resolve_block,
    thin_out,
)

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class FastDeconv(Deconvolving, nn.Conv2d):
    """A Conv2d that whitens the patches it sees (Ye et al. 2020, section 4, with the implicit form of section 4.4).

    Training: mean and D come from the batch (`norm.sampling`), gradients flow through both, and the running
    averages move by `momentum`. Evaluation: the running averages take their place. Padding pixels count as zeros, in
    the statistics and in the convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in Conv2d. Without a bias
            the mean is still subtracted.
        block: channels whitened together; more than in_channels become in_channels, and one that does not divide it
            becomes the greatest common divisor. A grouped convolution has a D for each group, of its channels; where
            those are more than `block` one for each block of a group, of the most channels up to `block` that divide
            them (1 of a prime number); with grouping="published" always one a group, as in the authors' code.
        n_iter: Newton-Schulz steps; more than 20 are for float64, in float32 their rounding outgrows the result where
            patches are fewer than features.
        eps: added to the diagonal of the covariance.
        momentum: rate of the running averages.
        sampling_stride: the statistics use every `sampling_stride`-th window of the convolution in each direction; of
            a 1x1 kernel, as in the authors' code, every (sampling_stride x stride)^2-th pixel of the list of all,
            padded or not, unless dense_small_maps and max_rows make of it single columns (`strides.list_covers`).
        freeze: update the statistics only in the first `freeze_iter` of every 10 `freeze_iter` training steps, and use
            the running averages in between (for the first layer, whose input does not change). A step is a call of
            the layer in training mode: one a step of the optimiser, without accumulation.
        grouping: "channel": blocks of neighbouring channels, as in the paper. "published": the authors' code, whose
            blocks interleave features, and which updates one step more of every freeze cycle.
        dense_small_maps: take more windows where the output is at most 16 high or wide (`strides.dense_strides`).
            The authors' code does not.
        max_rows: leave out images, or make the grid of large maps coarser, until the statistics come from about so many
            patches (`strides.thin_out`); 0: take all that the strides leave.
        every: 0: the exact method. n: the shape of D comes from a running covariance, has no gradient, and is renewed
            once in n steps; mean and scale stay the batch's (`norm.state.Deconvolving`).
        fresh_steps: with `every`, in the first training steps the shape is that of each batch; a frozen layer has none.
        rank: with `every`, the leading directions that are whitened, all others get one gain (`norm.leading`); at most
            2 rank features are all whitened.
        gain: learn a gain (C_out,) for each output channel; of the weight only the direction counts
            (`norm.state.Deconvolving.effective_weight`).
        sync: in training, take the statistics from the patches of all processes (`norm.processes`): n processes with b
            images each compute what one computes with n b images. `max_rows` then counts the rows of all of them, so
            that a process may have none. All must have equally many images.
        padding_mode, device, dtype: as in Conv2d; float32 or float64.

    Shape: (N, C_in, H, W) -> (N, C_out, H_out, W_out) as Conv2d, and of its dtype. The statistics and the
    inverse root are computed in float32 under autocast (in float64 for a float64 layer, or with more than 8 steps of at
    most 256 features, see `norm.products.root_dtype`), W D in float32 or bfloat16.

    Buffers: running_mean (F,) or (M F,), zeros at first; running_deconv (F, F) or (M, F, F), the identity at first;
    with `every`, in its place, running_scale () or (M,), and shape, like inner, whose root it is, (F, F) or (M, F, F);
    with more than 2 rank features, in place of these (`norm.leading`), basis and tilted (F, rank) or (M, F, rank), last
    () or (M,), inner with rank + 1 rows and columns; steps (), int64, with freeze or every. F = block k_h k_w; of a
    grouped convolution M = C_in / block matrices.

    Raises:
        NormError: an option out of range, an input that is not (N, C_in, H, W), of another dtype than the weight's (but
            under autocast) or smaller than the kernel, or `.half()`.
    """

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
        max_rows: int = 0,
        every: int = 0,
        rank: int = 64,
        fresh_steps: int = FRESH_STEPS,
        gain: bool = False,
        sync: bool = False,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(block, n_iter, eps, momentum, sampling_stride)
        if freeze_iter < 1 or max_rows < 0:
            raise NormError(f"freeze_iter is {freeze_iter}, max_rows {max_rows}; they must be at least 1 and 0")
        if grouping not in ("channel", "published"):
            raise NormError(f"grouping is {grouping!r}; it must be 'channel' or 'published'")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        if groups == 1:
            self.block, self.matrices = resolve_block(in_channels, block), 1
        else:
            together = in_channels // groups
            self.block = together if grouping == "published" else largest_block(together, block)
            self.matrices = in_channels // self.block
        self.sampling_stride = sampling_stride
        self.freeze = freeze
        self.freeze_iter = freeze_iter
        self.grouping = grouping
        self.dense_small_maps = dense_small_maps
        self.max_rows = max_rows
        self.sync = sync
        features = self.block * self.kernel_size[0] * self.kernel_size[1]
        self._set_up(features, n_iter, eps, momentum, every, rank, fresh_steps, gain)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded where symmetric zeros do not say it all, and the padding left to do."""
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            amount = self._reversed_padding_repeated_twice
            if not any(amount):
                return x, (0, 0)
            return F.pad(x, amount, "constant" if self.padding_mode == "zeros" else self.padding_mode), (0, 0)
        return x, (self.padding[0], self.padding[1])

    def windows(self, shape: torch.Size, padding: Pair, share: Share = ALONE) -> Windows:
        """Which windows of (padded) images (N, C, H, W) of this shape the statistics are taken from; such images are
        this process's `share` of them all."""
        kernel_size, stride, dilation = (cast(Pair, each) for each in (self.kernel_size, self.stride, self.dilation))
        strides, images = (self.sampling_stride, self.sampling_stride), 1
        positions = output_size((shape[2], shape[3]), kernel_size, stride, padding, dilation)
        if min(positions) < 1:
            raise NormError(
                f"FastDeconv: a kernel of {kernel_size[0]}x{kernel_size[1]} with dilation {dilation} does not fit into "
                f"an input of {shape[2]}x{shape[3]} with padding {padding}; give larger images, or more padding"
            )
        if self.dense_small_maps:
            strides = dense_strides(positions, self.sampling_stride)
        if self.max_rows:
            total = shape[0] * share.processes
            images, strides = thin_out(total, self._blocks(), positions, strides, self.max_rows)
        step = (strides[0] * stride[0], strides[1] * stride[1])
        how = (kernel_size, step, padding, dilation, self.features, self.matrices, self.grouping)
        as_authors = not (self.dense_small_maps or self.max_rows)
        start, listed = (0, 0), False
        if kernel_size == (1, 1) and (step != (1, 1) or padding != (0, 0)):  # else the two are one
            listed = as_authors or list_covers(shape[3], step)
            if padding == (0, 0) and not listed:
                start = middles(positions, strides, stride)
        return Windows(*how, images, share.rank * shape[0], listed, start)

    def patches(self, x: Tensor, padding: Pair) -> Tensor:
        """The sampled patches of the (padded) input, (F, rows) or (matrices, F, rows), in the dtype of `x`."""
        return self.windows(x.shape, padding).gather(x)

    def _refolds(self, x: Tensor, how: Geometry) -> bool:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False  # it is the start of kernels that takes time there; the compiler decides what is kept
        size, kernel = (x.shape[-2], x.shape[-1]), cast(Pair, self.kernel_size)
        positions = output_size(size, kernel, how.stride, how.padding, how.dilation)
        products = 3 * self.rank if self.few else self.features  # two thin products take the time of three
        return folded_conv.worth_it(products, len(x), positions)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise NormError(f"FastDeconv expects an input (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        self._check_dtype(x, self.weight.dtype)
        x, padding = self.pad(x)
        if self.training and not self._single(x, padding):
            share = processes.share() if self.sync else ALONE
            windows = self.windows(x.shape, padding, share)
            if not torch.compiler.is_compiling():
                self._warn_of_few(x, windows, share)
            x, found = self._training_statistics(x, windows)
            how = self._geometry(padding)
            return folded_conv.conv(x, self.effective_weight(), self.bias, found, how, self._refolds(x, how))
        weight, bias = self.folded()
        dtype = weight.dtype if autocasts(x.device) else x.dtype
        weight, bias = folded_conv.like(self.weight, weight, dtype), bias.to(dtype)
        return folded_conv.plain(x, weight, bias, self._geometry(padding))

    def alone(self, x: Tensor) -> bool:
        """Whether x is one image with one patch a block, of all processes: the average of its covariance, of hardly any
        rank, with others would be far off."""
        return x.ndim == 4 and len(x) == 1 and self._one_window(*self.pad(x))

    def _blocks(self) -> int:
        """Blocks that one D serves."""
        return self.in_channels // self.block // self.matrices

    def _one_window(self, x: Tensor, padding: Pair) -> bool:
        if self._joint():
            return False
        return 0 < self.windows(x.shape, padding).rows(x.shape) <= self._blocks()

    def _single(self, x: Tensor, padding: Pair) -> bool:
        single = len(x) == 1 and self._one_window(x, padding)
        if single and not torch.compiler.is_compiling():
            warnings.warn(
                "FastDeconv: one image with one patch a block (a 1x1 map, a kernel as large as the map) has no "
                "covariance; it is taken with the averages, as in evaluation, and they stay. Give two images or more, "
                "in an epoch's last batch too: DataLoader(..., drop_last=True)",
                stacklevel=3,
            )
        return single

    def _geometry(self, padding: Pair) -> Geometry:
        stride, dilation = cast(Pair, self.stride), cast(Pair, self.dilation)
        return Geometry(stride, padding, dilation, self.groups, self.matrices, self.grouping)

    def _warn_of_few(self, x: Tensor, windows: Windows, share: Share) -> None:
        """Where the patches of x are too few, with `every` in the first step."""
        if self.every and x.requires_grad and self._steps == 0:
            rows = windows.rows(x.shape) * share.processes
            # without its shape's gradient, a layer that whitens few patches amplifies what goes back through it
            if 0 < 2 * rows < self.features:
                warnings.warn(
                    f"FastDeconv with every={self.every} (deconv_fast): a batch gives {rows} patches of "
                    f"{self.features} features; with fewer than half as many, gradients of deep networks grow from "
                    "layer to layer. Give a larger batch or images or a smaller block, or take deconv (every=0)",
                    stacklevel=2,
                )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, block={self.block}, n_iter={self.n_iter}, eps={self.eps}"
        text += f", sampling_stride={self.sampling_stride}, grouping={self.grouping}"
        text += ", dense_small_maps=True" if self.dense_small_maps else ""
        text += f", max_rows={self.max_rows}" if self.max_rows else ""
        text += f", every={self.every}, rank={self.rank}, fresh_steps={self.fresh_steps}" if self.every else ""
        text += ", gain=True" if self.gain is not None else ""
        text += ", sync=True" if self.sync else ""
        return text + (", freeze=True" if self.freeze else "")


class Delinear(Deconvolving, nn.Linear):
    """A Linear layer that whitens its input in blocks of `block` features; the rules are FastDeconv's.

    In training one vector alone is treated as in evaluation, with a warning: it has no covariance.

    Shape: (..., in_features) -> (..., out_features). Buffers: running_mean (block,), running_deconv (block, block).

    Raises:
        NormError: an option out of range, an input of another dtype than the weight's (but under autocast), or
            `.half()`.
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
        every: int = 0,
        rank: int = 64,
        fresh_steps: int = FRESH_STEPS,
        gain: bool = False,
        sync: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(block, n_iter, eps, momentum)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.block = resolve_block(in_features, block)
        self.sync = sync
        self._set_up(self.block, n_iter, eps, momentum, every, rank, fresh_steps, gain)

    def patches(self, x: Tensor) -> Tensor:
        """The input as (block, rows)."""
        return Rows(self.block).gather(x)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        self._check_dtype(x, self.weight.dtype)
        if self.training and not self._single(x):
            x, found = self._training_statistics(x, Rows(self.block))
            weight, bias = folded_conv.folded(x, self.effective_weight(), self.bias, found)
        else:
            weight, bias = self.folded()
        if not autocasts(x.device):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.linear(x, weight, bias)

    def alone(self, x: Tensor) -> bool:
        """Whether x is one vector, of all processes: the average of its covariance, 0, with others would be far off."""
        return x.numel() == self.in_features and not self._joint()

    def _single(self, x: Tensor) -> bool:
        single = self.alone(x)
        if single and not torch.compiler.is_compiling():
            warnings.warn(
                "Delinear: one vector alone has no covariance; it is taken with the averages, as in evaluation, and "
                "they stay. Give two images or more, in an epoch's last batch too: DataLoader(..., drop_last=True)",
                stacklevel=3,
            )
        return single

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, block={self.block}, n_iter={self.n_iter}, eps={self.eps}"
        text += f", every={self.every}, rank={self.rank}, fresh_steps={self.fresh_steps}" if self.every else ""
        text += ", gain=True" if self.gain is not None else ""
        return text + (", sync=True" if self.sync else "")

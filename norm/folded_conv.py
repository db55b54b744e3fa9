"""A convolution with the folded weight W D, which is not kept for the backward but folded anew there, if that is cheap.

A whitening layer's weight W D is a tensor of the weight's size for each layer, beside W itself: in a network with few
pixels and many weights it is most of what the method keeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from norm import whitening
from norm.products import autocasts, full_precision, without_autocast
from norm.strides import Grouping, Pair
from norm.whitening import Statistics

_SHARE = 0.3
"""Refold where that takes at most this share of the convolution's multiplications (which are a third of its step's)."""

_LOW = (torch.bfloat16, torch.float16)


class Geometry(NamedTuple):
    """How the convolution goes over its input, and how its channels are grouped for whitening."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    """Of the convolution."""
    matrices: int
    """D's, see `whitening.split_weight`."""
    grouping: Grouping


def worth_it(products: int, images: int, positions: Pair) -> bool:
    """Whether folding anew, so many `products` for each weight, is cheap: a convolution does one for each position."""
    return products <= _SHARE * images * positions[0] * positions[1]


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, found: Statistics, how: Geometry, anew: bool) -> Tensor:
    """The convolution of x (N, C, H, W) with the weight and bias of `whitening.fold_weight`, in the dtype that
    F.conv2d has under autocast; folded `anew` in the backward, or kept for it."""
    if _autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with without_autocast(x.device):
        y: Tensor = _FoldedConv.apply(x, weight, bias, *found, how, anew)  # type: ignore[no-untyped-call]
        return y


def _autocast(x: Tensor) -> bool:
    """Whether autocast has a say in what a layer computes with x: it leaves float64 as it is."""
    return autocasts(x.device) and x.dtype != torch.float64


def product_dtype(autocast: torch.dtype) -> torch.dtype | None:
    """That of the product W D and its gradients where the convolution has this dtype, None: that of the statistics.

    bfloat16, as products have it under autocast: it rounds W D, which the convolution rounds anyway, and its gradients,
    as the convolution rounds its own. Not float16, whose range is too small for the gradient of D.
    """
    return autocast if autocast == torch.bfloat16 else None


def like(weight: Tensor, folded: Tensor, dtype: torch.dtype) -> Tensor:
    """`folded` in this dtype and in the memory format of `weight`, which may decide on that of the convolution's output
    (that of a 1x1 map is in all formats)."""
    low = torch.compiler.is_compiling() and dtype != weight.dtype  # 2.14 fails on strides that such a backward looks at
    if not low and folded.dtype == dtype and folded.stride() == weight.stride():
        return folded
    return torch.empty_like(weight, dtype=dtype).copy_(folded)


def misled(
    dtype: torch.dtype, device: torch.device, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> bool:
    """Whether torch may compute wrong gradients of the weight (O, C, KH, KW) of a convolution in channels_last.

    In float32 on a CPU with AVX2 and no AVX-512, that of a 1x1 convolution with a stride and fewer than 8 channels, or
    of its bias, writes beyond its memory, and the process mostly crashes (torch 2.9.1 and 2.14.1;
    https://github.com/uxlfoundation/oneDNN/issues/6035).

    In bfloat16 on a CPU with AVX-512 BF16 they are noise, larger than the gradients themselves, where the convolution
    has a dilation and the channels of a group are no multiple of 16 (the same versions; docs/norm.md has a program).
    Where there is AMX as well only depthwise ones are. Outputs and gradients of inputs are right, and so is everything
    in torch's usual layout. float16, right on the one processor with instructions for it that was looked at, is
    treated alike.
    """
    channels, *kernel = weight.shape[1:]
    noise = dtype in _LOW and max(dilation) > 1 and channels % 16 != 0
    beyond = max(kernel) == 1 < max(stride) and channels < 8
    return device.type == "cpu" and (noise or beyond)


def plain(x: Tensor, weight: Tensor, bias: Tensor, how: Geometry) -> Tensor:
    """F.conv2d, whose gradient of the weight is right in channels_last too."""
    arguments = (bias, how.stride, how.padding, how.dilation, how.groups)
    dtype = torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype
    wrong = torch.is_grad_enabled() and misled(dtype, x.device, weight, how.stride, how.dilation)
    if not (wrong and x.is_contiguous(memory_format=torch.channels_last)):  # which torch.vmap cannot tell
        return F.conv2d(x, weight, *arguments)
    x, weight = (each.clone(memory_format=torch.contiguous_format) for each in (x, weight))  # see `_gradients`
    return F.conv2d(x, weight, *arguments).contiguous(memory_format=torch.channels_last)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, how: Geometry, wanted: list[bool]) -> list[Tensor]:
    """Of the convolution: to x, to its weight and to its bias, as far as they are wanted."""
    sizes, zero = [len(weight)], [0, 0]
    if any(wanted[1:]) and misled(x.dtype, x.device, weight, how.stride, how.dilation):
        to_x = _gradients(grad, x, weight, how, [wanted[0], False, False])[0]
        # not contiguous(): a filter of one channel counts as contiguous whatever its strides, which decide
        grad, x, weight = (each.clone(memory_format=torch.contiguous_format) for each in (grad, x, weight))
        arguments = (how.stride, how.padding, how.dilation, False, zero, how.groups, [False, *wanted[1:]])
        return [to_x, *torch.ops.aten.convolution_backward(grad, x, weight, sizes, *arguments)[1:]]
    return list(
        torch.ops.aten.convolution_backward(
            grad, x, weight, sizes, how.stride, how.padding, how.dilation, False, zero, how.groups, wanted
        )
    )


class _FoldedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        deconv: Tensor,
        tilted: Tensor | None,
        last: Tensor | None,
        scale: Tensor | None,
        how: Geometry,
        anew: bool,
    ) -> Tensor:
        found = Statistics(mean, deconv, tilted, last, scale)
        folded, new_bias = whitening.fold_weight(
            weight, bias, found, how.matrices, how.grouping, product_dtype(x.dtype)
        )
        ctx.save_for_backward(x, weight, None if anew else folded, *found)
        ctx.how, ctx.dtypes = how, (weight.dtype, None if bias is None else bias.dtype)
        return F.conv2d(
            x, like(weight, folded, x.dtype), new_bias.to(x.dtype), how.stride, how.padding, how.dilation, how.groups
        )

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, folded, *statistics = ctx.saved_tensors
        how, found = ctx.how, Statistics(*statistics)
        if folded is None:
            folded = whitening.times_deconv(weight, found, how.matrices, how.grouping, product_dtype(x.dtype))
        wanted = any(ctx.needs_input_grad[1:])
        to_x, to_folded, to_bias = _gradients(
            grad, x, like(weight, folded, x.dtype), how, [ctx.needs_input_grad[0], wanted, wanted]
        )
        if not wanted:
            return (to_x, *[None] * 9)
        dtype, bias_dtype = ctx.dtypes
        to = whitening.fold_gradient(to_folded, to_bias, weight, folded, found, how.matrices, how.grouping)
        bias_grad = None if bias_dtype is None else to_bias.to(bias_dtype)
        # in the strides of the weight, in which it would be copied once more if it had others
        to_weight = like(weight, to.weight, dtype)
        return to_x, to_weight, bias_grad, to.mean, to.deconv, None, None, to.scale, None, None


def folded(x: Tensor, weight: Tensor, bias: Tensor | None, found: Statistics) -> tuple[Tensor, Tensor]:
    """`whitening.fold_weight` of a linear layer with input x; as in `conv`, autocast decides on the dtype of W D."""
    low = product_dtype(torch.get_autocast_dtype(x.device.type)) if _autocast(x) else None
    new: tuple[Tensor, Tensor] = _Fold.apply(weight, bias, *found, low)  # type: ignore[no-untyped-call]
    return new


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        deconv: Tensor,
        tilted: Tensor | None,
        last: Tensor | None,
        scale: Tensor | None,
        low: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        found = Statistics(mean, deconv, tilted, last, scale)
        new, new_bias = whitening.fold_weight(weight, bias, found, 1, "channel", low)
        ctx.save_for_backward(weight, new, *found)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return new, new_bias

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, to_folded: Tensor, to_bias: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, folded, *statistics = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        to = whitening.fold_gradient(to_folded.clone(), to_bias, weight, folded, Statistics(*statistics), 1, "channel")
        bias_grad = None if bias_dtype is None else to_bias.to(bias_dtype)
        return to.weight.to(dtype), bias_grad, to.mean, to.deconv, None, None, to.scale, None

"""A convolution whose folded weight W D is not kept for the backward but folded anew there.

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
from norm.sampling import Grouping, Pair
from norm.whitening import Statistics

_SHARE = 0.3
"""Refold where that takes at most this share of the convolution's multiplications (which are a third of its step's)."""


class Geometry(NamedTuple):
    """How the convolution goes over its input, and how its channels are grouped for whitening."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    grouping: Grouping


def worth_it(products: int, images: int, positions: Pair) -> bool:
    """Whether folding anew, so many `products` for each weight, is cheap: the convolution does one for each position."""
    return products <= _SHARE * images * positions[0] * positions[1]


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, found: Statistics, how: Geometry) -> Tensor:
    """The convolution of x (N, C, H, W) with the weight and bias of `whitening.fold_weight`, in the dtype that
    F.conv2d has under autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        y: Tensor = _Refolded.apply(x, weight, bias, *found, how)  # type: ignore[no-untyped-call]
        return y


class _Refolded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        deconv: Tensor,
        gains: Tensor | None,
        scale: Tensor | None,
        how: Geometry,
    ) -> Tensor:
        found = Statistics(mean, deconv, gains, scale)
        folded = whitening.fold_weight(weight, bias, found, how.groups, how.grouping)
        ctx.save_for_backward(x, weight, bias, *found)
        ctx.how = how
        w, b = (each.to(x.dtype) for each in folded)
        return F.conv2d(x, w, b, how.stride, how.padding, how.dilation, how.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        how: Geometry = ctx.how
        wanted = ctx.needs_input_grad[1:7]
        with torch.enable_grad():
            inputs: list[Any] = [
                None if each is None else each.detach().requires_grad_(need)
                for each, need in zip(saved, wanted, strict=True)
            ]
            weight, bias, *found = inputs
            folded = whitening.fold_weight(weight, bias, Statistics(*found), how.groups, how.grouping)
        to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            folded[0].detach().to(x.dtype),
            [folded[1].shape[0]],
            how.stride,
            how.padding,
            how.dilation,
            False,
            [0, 0],
            how.groups,
            [ctx.needs_input_grad[0], any(wanted), any(wanted)],
        )
        sources = [each for each in inputs if each is not None and each.requires_grad]
        if not sources:
            return (to_x, *[None] * 7)
        ends = [(f, to.to(f.dtype)) for f, to in zip(folded, (to_weight, to_bias), strict=True) if f.requires_grad]
        grads = iter(torch.autograd.grad([f for f, _ in ends], sources, [to for _, to in ends]))
        return (to_x, *(next(grads) if each is not None and each.requires_grad else None for each in inputs), None)

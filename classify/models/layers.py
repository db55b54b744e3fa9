"""Pieces that several families share.

Every activation works out of place: where a norm has gone, its input may be read by another branch as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from engine.config import Positive

Width = Annotated[Positive, Field(allow_inf_nan=False)]
"""Factor on all channel numbers."""
Dropout = Annotated[float, Field(ge=0, lt=1)]
"""Probability that a feature is dropped in training."""


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest whole number, at least 1."""
    return max(1, round(channels * width))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps height and width, but for its stride; the kernel's side is odd."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution (`.conv`) and the batch norm after it (`.bn`)."""
    pair = [("conv", conv(inputs, outputs, kernel, stride, groups)), ("bn", nn.BatchNorm2d(outputs))]
    return nn.Sequential(OrderedDict(pair))


def shortcut(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """The input as it is, or a 1x1 convolution and norm where a block changes its shape."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return conv_norm(inputs, outputs, 1, stride)


def stages(
    block: Callable[[int, int, int], nn.Module], inputs: int, outputs: Sequence[int], depths: Sequence[int]
) -> list[nn.Sequential]:
    """Residual blocks, made by `block(inputs, outputs, stride)`, in stages of `depths` blocks with `outputs` channels.

    The first block of every stage but the first halves height and width.
    """
    result = []
    for number, (channels, depth) in enumerate(zip(outputs, depths, strict=True)):
        first = block(inputs, channels, 2 if number else 1)
        result.append(nn.Sequential(first, *(block(channels, channels, 1) for _ in range(depth - 1))))
        inputs = channels
    return result


def squeeze_excitation(channels: int) -> nn.Module:
    """A gate for each channel from the mean of all (Hu et al., arXiv 1709.01507), by way of a sixteenth of them."""
    from torchvision.ops import SqueezeExcitation  # slow to import

    return SqueezeExcitation(channels, max(1, channels // 16))


def pooled(features: Tensor) -> Tensor:
    """The mean over height and width: (N, C, H, W) -> (N, C)."""
    return features.mean((2, 3))

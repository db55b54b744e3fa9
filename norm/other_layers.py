"""Layers that recipes and conversion need besides the whitening ones."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SamePad2d(nn.Module):
    """Zero padding by input size as TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel right and below."""

    def __init__(self, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        axes = zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        for size, k, s, d in reversed(list(axes)):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads) if any(pads) else x


class Padded(nn.Sequential):
    """An explicit padding and the convolution behind it, standing for one layer that did both.

    kind: the class of that layer if it can be made again from a Conv2d's arguments (`norm.fold` does so), else None.
    """

    pad: nn.Module
    conv: nn.Module

    def __init__(self, pad: nn.Module, conv: nn.Module, kind: type[nn.Conv2d] | None = None) -> None:
        super().__init__(OrderedDict([("pad", pad), ("conv", conv)]))
        self.kind = kind


class WSConv2d(nn.Conv2d):
    """A Conv2d with weight standardisation (Qiao et al., arXiv 1903.10520): each filter has mean 0 and variance 1.

    The variance is the biased one plus `eps`. Shape as Conv2d.
    """

    eps = 1e-10

    def standardised(self) -> Tensor:
        """The weight that is convolved with, (out, in / groups, k_h, k_w)."""
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * (var + self.eps).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardised(), self.bias)


class ChannelNorm(nn.GroupNorm):
    """Instance norm, as a group norm of one channel a group. It takes a map of one pixel, whose output is the bias.

    nn.GroupNorm refuses one of a single image, in evaluation too, though not those of two.
    """

    def forward(self, input: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn.enabled
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, cudnn)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics, weight and bias: a per-channel scale and shift that does not learn."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class ChannelAffine(nn.Module):
    """A learned scale and shift a channel: what is left of a trained batch norm that no convolution can take in."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.view(1, -1, 1, 1), x, self.weight.view(1, -1, 1, 1))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"

"""What recipes make new layers with: arguments, weights and state of the old ones."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from norm.checks import NormError
from norm.layers import Delinear
from norm.other_layers import ChannelNorm
from norm.registry import Place

L = TypeVar("L", bound=nn.Module)


def copy_conv(old: nn.Conv2d, new: nn.Conv2d) -> nn.Conv2d:
    """`new` with the weight and bias of `old`, on its device; a bias that `old` lacks starts at zero."""
    new.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(old.weight)
        if new.bias is not None:
            new.bias.zero_() if old.bias is None else new.bias.copy_(old.bias)
    channels_last = torch.channels_last
    if old.weight.is_contiguous(memory_format=channels_last) and not old.weight.is_contiguous():
        new.to(memory_format=channels_last)  # type: ignore[call-overload]
    return in_state_of(old, new)


def copy_linear(old: nn.Linear, new: Delinear) -> Delinear:
    """`new` with the weight and bias of `old`, on its device; a bias that `old` lacks is zero."""
    new.to(old.weight.device, old.weight.dtype)
    new.set_weight(old.weight)
    with torch.no_grad():
        new.bias.zero_() if old.bias is None else new.bias.copy_(old.bias)
    return in_state_of(old, new)


def in_state_of(old: nn.Module, new: L) -> L:
    """`new` in the mode of `old`; parameters are frozen as theirs were, those that `old` lacks as its weight."""
    before = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        source = before.get(name, before.get("weight"))
        parameter.requires_grad_(source is None or source.requires_grad)
    return new.train(old.training)


def conv_arguments(old: nn.Conv2d) -> dict[str, Any]:
    """The arguments that make a convolution like `old`, but for its bias."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(old, name) for name in names}


def check_wide(weight: Tensor, at: Place) -> None:
    """Raises NormError unless the weight is wide enough to be whitened."""
    if weight.dtype in (torch.float32, torch.float64):
        return
    real = "convert the network in float32 and train it under torch.autocast"
    other = f"leave the layer alone with overrides={{{at.name!r}: {{'recipe': 'keep'}}}}"
    remedy = real if weight.is_floating_point() else other
    raise NormError(f"{at.name} has weights of {weight.dtype}; whitening needs float32: {remedy}")


def check_shape(old: nn.Conv2d | nn.Linear, at: Place) -> None:
    """Raises NormError where the weight is of other sizes than the layer says: torch computes with the weight's, a new
    layer would have the others."""
    if isinstance(old, nn.Linear):
        said: tuple[int, ...] = (old.out_features, old.in_features)
    else:
        said = (old.out_channels, old.in_channels // old.groups, *old.kernel_size)
    if tuple(old.weight.shape) != said:
        names = "out_features and in_features" if isinstance(old, nn.Linear) else "in_channels, out_channels and others"
        raise NormError(
            f"{at.name} has a weight of shape {tuple(old.weight.shape)}, but its {names} say {said}; set them to what "
            "its weight is, or make a new layer, before converting"
        )


def group_norm(old: nn.BatchNorm2d, groups: int, eps: float) -> nn.Module:
    """A group norm with the weight and bias of `old`."""
    kind = ChannelNorm if groups == old.num_features else nn.GroupNorm
    return copy_norm(old, kind(groups, old.num_features, eps, old.affine))


def copy_norm(old: nn.BatchNorm2d, new: nn.Module) -> nn.Module:
    """`new` with those parameters and buffers of `old` that it has too, on its device."""
    mine = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    with torch.no_grad():
        for name, value in {**dict(old.named_parameters()), **dict(old.named_buffers())}.items():
            if name in mine:
                mine[name].copy_(value)
    reference = next((t for t in (old.weight, old.running_mean) if t is not None), None)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    return in_state_of(old, new)

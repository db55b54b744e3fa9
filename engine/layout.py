"""Memory layouts on CPUs: where torch is faster in channels_last, and where its gradients are wrong in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import norm
from norm.folded_conv import misled


def leave_channels_last(model: nn.Module) -> int:
    """Have those convolutions of `model` compute in torch's usual memory layout whose gradients torch gets wrong in
    channels_last (`norm.folded_conv.misled`), where they compute in such a type on a CPU; returns how many.

    It is for networks in channels_last: outputs of these layers come in it. Call it after the layers are final and in
    their layout: it adds hooks, and gives the weights other strides. A second call changes nothing. Whitening layers
    see to it themselves.
    """
    found = [one for one in model.modules() if isinstance(one, nn.Conv2d) and _misled(one, torch.bfloat16)]
    for layer in found:
        # not contiguous(): a filter of one channel counts as contiguous whatever its strides, which decide
        layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
        if _before not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_before)
            layer.register_forward_hook(_after)
    return len(found)


def slow(model: nn.Module) -> str | None:
    """A sentence for the user where `model`, in torch's usual layout, may be faster in channels_last on a CPU, else
    None: depthwise convolutions larger than 1x1 are (docs/step_times.md has how much).
    """
    convs = [one for one in model.modules() if isinstance(one, nn.Conv2d)]
    depthwise = sum(1 < one.groups == one.in_channels and max(one.kernel_size) > 1 for one in convs)
    if not depthwise:
        return None
    return (
        f"{depthwise} of {len(convs)} convolutions are depthwise: on CPUs runtime.channels_last=true may be "
        "up to three times as fast (docs/step_times.md)"
    )


def _misled(layer: nn.Conv2d, dtype: torch.dtype) -> bool:
    if isinstance(layer, norm.FastDeconv):
        return False
    return misled(dtype, torch.device("cpu"), layer.weight, layer.stride, layer.dilation)


def _wrong(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether the layer computes x in such a type, on a CPU."""
    if x.device.type != "cpu":
        return False
    return _misled(layer, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)


def _before(layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (inputs[0].contiguous(), *inputs[1:]) if inputs and _wrong(layer, inputs[0]) else None


def _after(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    return output.contiguous(memory_format=torch.channels_last) if output.ndim == 4 and _wrong(layer, output) else None

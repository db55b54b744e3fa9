"""Grouped convolutions with dilation in bfloat16 on CPUs, of which torch computes wrong gradients in channels_last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from norm.folded_conv import misled


def leave_channels_last(model: nn.Module) -> int:
    """Have the grouped, dilated convolutions of `model` compute in torch's usual memory layout, where they would
    compute in bfloat16 or float16 on a CPU (`norm.folded_conv.misled`); returns how many there are.

    It is for networks in channels_last: outputs of these layers come in it. Call it after the layers are final and in
    their layout: it adds hooks, and gives the weights other strides. A second call changes nothing. Whitening layers
    see to it themselves.
    """
    found = [one for one in model.modules() if isinstance(one, nn.Conv2d) and _grouped_and_dilated(one)]
    for layer in found:
        # not contiguous(): a filter of one channel counts as contiguous whatever its strides, which decide
        layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
        if _before not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_before)
            layer.register_forward_hook(_after)
    return len(found)


def _grouped_and_dilated(layer: nn.Conv2d) -> bool:
    return layer.groups > 1 and max(layer.dilation) > 1


def _low(x: Tensor) -> bool:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return misled(dtype, x.device)


def _before(layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (inputs[0].contiguous(), *inputs[1:]) if inputs and _low(inputs[0]) else None


def _after(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    return output.contiguous(memory_format=torch.channels_last) if output.ndim == 4 and _low(output) else None

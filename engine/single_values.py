"""Norms where there is one value to normalise, such as batch norm behind an image pooling with one image a process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import norm
from engine import distributed


def allow_single_values(model: nn.Module) -> None:
    """Let the norms of `model` take inputs with one value a channel (or a group), for which torch raises a ValueError.

    Batch norm in training: one value has no variance, so the input is normalised by the running statistics, as in
    evaluation, and leaves them as they are; gradients flow to it, the weight and the bias. A norm that never sees more
    than one value keeps mean 0 and variance 1: it scales and shifts. SyncBatchNorm among several processes is left
    alone, it has the values of all of them.

    Whitening layers, where each block has a single patch (a 1x1 map of one image), do so by themselves, and warn; not
    here. D is the identity until something else was averaged or calibrated.

    Group norm, and instance norm as a group norm: the value less itself is 0, the output is the bias; so it is for two
    images, where torch raises nothing.

    Call it after the layers are final: it adds hooks, and leaves classes, names and all other inputs alone. A second
    call changes nothing.
    """
    for one in model.modules():
        if isinstance(one, (norm.FastDeconv, norm.Delinear, norm.ChannelDeconv)) or (
            isinstance(one, _BatchNorm) and one.running_mean is not None
        ):
            _add(one, _before_averaging, _after_averaging)
        elif type(one) is nn.GroupNorm:
            _add(one, _before_group_norm, _after_group_norm)


def _add(layer: nn.Module, before: Any, after: Any) -> None:
    if before not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, always_call=True)


def _first(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """The input of such a layer, given by place or by name; None: something that the layer refuses."""
    values = next(iter((*inputs, *named.values())), None)
    return values if isinstance(values, Tensor) and values.ndim >= 2 else None


def _before_averaging(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    values = _first(inputs, named)
    if values is None:
        return
    shared = (isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "sync", False)) and distributed.world_size() > 1
    last = isinstance(layer, norm.Delinear)
    if isinstance(layer, (norm.FastDeconv, norm.ChannelDeconv)):
        single = layer.alone(values)
    else:
        single = values.numel() == values.shape[-1 if last else 1]
    if layer.training and not shared and single:
        layer.training = False  # of this layer alone and for this call: what it holds keeps its mode
        layer._single_value = True  # type: ignore[assignment]


def _after_averaging(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
    if _was_single(layer):
        layer.training = True


def _was_single(layer: nn.Module) -> bool:
    if not getattr(layer, "_single_value", False):
        return False
    del layer._single_value  # not by vars(layer), which the compiler of torch 2.9 does not trace
    return True


def _before_group_norm(
    layer: nn.GroupNorm, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Tensor], dict[str, Any]] | None:
    values = _first(inputs, named)
    if values is None or values.numel() != layer.num_groups:
        return None
    layer._single_value = True  # type: ignore[assignment]
    return (torch.cat([values, values]),), {}


def _after_group_norm(layer: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Any) -> Any:
    return output[:1] if _was_single(layer) else None

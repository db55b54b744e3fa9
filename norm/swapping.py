"""Put layers in the place of others, wherever a network holds them."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from norm.adapters import class_name
from norm.channel_deconv import ChannelDeconv
from norm.checks import NormError
from norm.layers import Delinear, FastDeconv

_COMPUTED = "torch.nn.utils."
"""Where the hooks live that set a layer's weight before each call."""


_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_PLAIN = (nn.Conv2d, nn.Linear, FastDeconv, Delinear)
"""Layers without children, all of whose tensors are known: what else they hold is the user's."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""What torch keeps in each module: its children, parameters, hooks."""


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put `replacements[id(layer)]` wherever `layer` stands below `model`, in collections, partials and bound methods
    that its modules hold too.

    Raises:
        NormError: a layer that is compiled by itself.
    """
    for name, parent in model.named_modules():
        if class_name(parent) == _COMPILED and any(id(child) in replacements for child in parent.children()):
            raise NormError(
                f"{name or 'the network'}: torch.compile(layer) goes on with the layer that it was given; convert and "
                "fold layers before they are compiled"
            )
    for parent in [*model.modules(), *replacements.values()]:
        for key, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[key] = replacements[id(child)]
    for parent in [*model.modules(), *replacements.values()]:  # which have their old ones' attributes
        for key, value in list(vars(parent).items()):
            if key not in _OF_EVERY_MODULE:
                vars(parent)[key] = _replaced(value, replacements)


def _replaced(value: Any, replacements: Mapping[int, nn.Module], depth: int = 3) -> Any:
    """`value` with the layers in it replaced, not deeper than `depth`: collections that can be changed are, others are
    made anew where they hold such a layer."""
    if isinstance(value, nn.Module):
        return replacements.get(id(value), value)
    if isinstance(value, MethodType) and (new := replacements.get(id(value.__self__))) is not None:
        own = value.__func__ is getattr(type(value.__self__), value.__name__, None)
        return getattr(new, value.__name__, value) if own else MethodType(value.__func__, new)
    if not depth:
        return value
    if isinstance(value, (list, deque)):
        for index, each in enumerate(value):
            if (new := _replaced(each, replacements, depth - 1)) is not each:
                value[index] = new
    elif isinstance(value, dict):
        if any(isinstance(key, nn.Module) and id(key) in replacements for key in value):
            items = [(_replaced(key, replacements, 0), each) for key, each in value.items()]
            value.clear()
            value.update(items)
        for key, each in value.items():
            if (new := _replaced(each, replacements, depth - 1)) is not each:
                value[key] = new
    elif isinstance(value, set):
        for each in [each for each in value if isinstance(each, nn.Module) and id(each) in replacements]:
            value.remove(each)
            value.add(replacements[id(each)])
    elif isinstance(value, frozenset):
        if any(isinstance(each, nn.Module) and id(each) in replacements for each in value):
            return frozenset(_replaced(each, replacements, 0) for each in value)
    elif type(value) is tuple or hasattr(value, "_fields") and isinstance(value, tuple):
        parts = [_replaced(each, replacements, depth - 1) for each in value]
        if any(new is not each for new, each in zip(parts, value, strict=True)):
            return tuple(parts) if type(value) is tuple else type(value)(*parts)
    elif type(value) is functools.partial:
        parts = [_replaced(each, replacements, depth - 1) for each in (value.func, *value.args)]
        named = {key: _replaced(each, replacements, depth - 1) for key, each in value.keywords.items()}
        before = [value.func, *value.args, *value.keywords.values()]
        if any(new is not each for new, each in zip([*parts, *named.values()], before, strict=True)):
            return functools.partial(parts[0], *parts[1:], **named)
    return value


def take_over(old: nn.Module, new: nn.Module) -> None:
    """What the user has put on `old` is on `new`: hooks, attributes of the layer and of its parameters (a
    `no_weight_decay`, the indices that YOLO's networks read) that the new ones have not by themselves, and tensors and
    modules that were registered on a convolution or linear layer."""
    share_hooks(old, new)
    if type(old) in _PLAIN and not computing_hooks(old):  # what those registered has gone into the weight
        _share_registered(old, new)
    known = _of_layers()
    for name, value in list(vars(old).items()):
        if not (name.startswith("_") or name in known or name in _OF_EVERY_MODULE or hasattr(new, name)):
            setattr(new, name, value)
    theirs, mine = (_by_last_name(layer) for layer in (old, new))
    for name in theirs.keys() & mine.keys():
        for key, value in vars(theirs[name]).items():
            if key not in vars(mine[name]):
                setattr(mine[name], key, value)


def _share_registered(old: nn.Module, new: nn.Module) -> None:
    own = _registered_by_layers()
    for name, parameter in old._parameters.items():
        if name not in own and not hasattr(new, name):
            new.register_parameter(name, parameter)
    for name, buffer in old._buffers.items():
        if name not in own and not hasattr(new, name):
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, child in old._modules.items():
        if not hasattr(new, name):
            new.register_module(name, child)


def _by_last_name(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters, or those of the one layer in it that has such."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in layer.named_parameters():
        found.setdefault(name.rpartition(".")[2], []).append(parameter)
    return {name: those[0] for name, those in found.items() if len(those) == 1}


@functools.cache
def _of_layers() -> frozenset[str]:
    """Attributes that layers have from their classes' constructors."""
    return frozenset(name for layer in _fresh_layers() for name in vars(layer))


@functools.cache
def _registered_by_layers() -> frozenset[str]:
    """Names of the tensors that they have from there."""
    return frozenset(name for layer in _fresh_layers() for name in (*layer._parameters, *layer._buffers))


def _fresh_layers() -> list[nn.Module]:
    wide = torch.float32  # which the default need not be
    with torch.device("meta"):  # draws no random numbers
        plain: list[nn.Module] = [nn.Conv2d(1, 1, 1), nn.Linear(1, 1), nn.BatchNorm2d(1)]
        exact = [FastDeconv(1, 1, 1, dtype=wide), Delinear(1, 1, dtype=wide), ChannelDeconv(1, dtype=wide)]
        fast = [FastDeconv(4, 1, 1, every=1, rank=rank, dtype=wide) for rank in (1, 64)]  # few directions, and all
        return [*plain, *exact, *fast]


def computing_hooks(layer: nn.Module) -> dict[int, Callable[..., Any]]:
    """Those that compute a weight of the layer before each forward."""
    hooks = layer._forward_pre_hooks.items()
    return {key: hook for key, hook in hooks if type(hook).__module__.startswith(_COMPUTED)}


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hooks that something (a feature extractor, say) put on the old layer see the new one, and its handles work on.

    Not those that compute a weight of the old layer (`torch.nn.utils.prune`, the old `weight_norm`).
    """
    for name in vars(old):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name:
            setattr(new, name, getattr(old, name))
    if computing := computing_hooks(old):
        new._forward_pre_hooks = OrderedDict(
            (key, hook) for key, hook in old._forward_pre_hooks.items() if key not in computing
        )
    new._is_full_backward_hook = old._is_full_backward_hook

"""A trained network without its norm: every whitening layer becomes the plain layer that it is in evaluation."""

from __future__ import annotations

import copy
import inspect
from typing import TypeVar

import torch
from torch import Tensor, nn

from norm.channel_deconv import ChannelDeconv
from norm.checks import NormError
from norm.folded_conv import like
from norm.inputs import check_network
from norm.layers import Delinear, FastDeconv
from norm.other_layers import ChannelAffine, Padded, WSConv2d
from norm.replacements import conv_arguments
from norm.state import Whitening
from norm.swapping import computing_hooks, replace, take_over

L = TypeVar("L", nn.Conv2d, nn.Linear)


@torch.inference_mode(False)
def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode, with Conv2d and Linear in place of the layers of `norm`.

    FastDeconv and WSConv2d become Conv2d, Delinear Linear, ChannelDeconv a 1x1 Conv2d or a Linear, ChannelAffine a
    depthwise 1x1 Conv2d. The outputs equal those of `model.eval()` within float error; norms stay as they are.

    Raises:
        NormError: `model` is no network, or holds tensors of a forward with gradients; a ChannelDeconv that has seen no
            input, so that its number of channels is unknown; running statistics that are not finite.
    """
    check_network("norm.fold", model)
    try:
        plain = copy.deepcopy(model).eval()
    except RuntimeError as error:
        if "deepcopy" not in str(error):
            raise
        raise NormError(
            "norm.fold: the network cannot be copied, since it holds tensors of its last forward: activations that it "
            "keeps, or weights that pruning or the old weight_norm compute. Run it once under torch.no_grad() before"
        ) from error
    if (alone := _folded(plain, "the model")) is not None:
        return alone
    replacements: dict[int, nn.Module] = {}
    with torch.no_grad():
        for name, module in plain.named_modules():
            new = _folded(module, name)
            if new is not None:
                take_over(module, new)
                replacements[id(module)] = new
    replace(plain, replacements)
    return plain


@torch.no_grad()
def _folded(layer: nn.Module, name: str) -> nn.Module | None:
    """The plain layer; None for a layer that is not the norm's."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        for hook in computing_hooks(layer).values():  # weights loaded since the last forward are not in it yet
            hook(layer, ())
    if isinstance(layer, Whitening) and not all(bool(held.isfinite().all()) for held in layer.buffers(recurse=False)):
        raise NormError(
            f"{name}: its running statistics are not finite, since a batch overflowed in the training; "
            "norm.precise_statistics averages them anew"
        )
    if isinstance(layer, FastDeconv):
        return _conv(layer, *layer.folded())
    if isinstance(layer, Padded):
        inner = _folded(layer.conv, name) or layer.conv
        if layer.kind is None or not isinstance(inner, nn.Conv2d):
            return nn.Sequential(layer.pad, inner)
        return _conv(inner, inner.weight, inner.bias, layer.kind)
    if isinstance(layer, WSConv2d):
        return _conv(layer, layer.standardised(), layer.bias)
    if isinstance(layer, Delinear):
        return _linear(*layer.folded()).requires_grad_(_learns(layer))
    if isinstance(layer, ChannelAffine):
        scale = _pointwise(layer.weight.view(-1, 1), layer.bias, groups=layer.weight.numel())
        return scale.requires_grad_(layer.weight.requires_grad)
    if isinstance(layer, ChannelDeconv):
        try:
            matrix, offset, rank = layer.folded()
        except NormError as error:
            raise NormError(f"{name}: {error}") from None
        return _linear(matrix, offset) if rank == 2 else _pointwise(matrix, offset)
    return None


def _conv(old: nn.Conv2d, weight: Tensor, bias: Tensor | None, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    known = inspect.signature(kind).parameters  # layers that pad by themselves don't take all that a Conv2d does
    arguments = {name: value for name, value in conv_arguments(old).items() if name in known}
    new = kind(**arguments, bias=bias is not None)
    new = _filled(new, weight, bias)
    new.weight = nn.Parameter(like(old.weight, weight, weight.dtype))
    return new.requires_grad_(_learns(old))


def _learns(layer: nn.Module) -> bool:
    """Whether its weight does, or what that is computed from (`torch.nn.utils.parametrize`)."""
    weight = layer._parameters.get("weight")
    return any(each.requires_grad for each in layer.parameters()) if weight is None else weight.requires_grad


def _pointwise(matrix: Tensor, offset: Tensor, groups: int = 1) -> nn.Conv2d:
    new = nn.Conv2d(matrix.shape[1] * groups, matrix.shape[0], 1, groups=groups)
    return _filled(new, matrix[:, :, None, None], offset)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0]), weight, bias)


def _filled(new: L, weight: Tensor, bias: Tensor | None) -> L:
    new.to(weight.device, weight.dtype)
    new.weight.copy_(weight)
    if bias is not None:
        assert new.bias is not None
        new.bias.copy_(bias)
    return new.eval()

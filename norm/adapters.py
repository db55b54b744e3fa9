"""Layers of other libraries that do more than the plain layer they derive from, taken apart so that nothing is lost.

`take_apart` gives the plain layer (what a recipe may replace) and a function that puts a replacement back in its place.
Classes are recognised by name: no library is imported for it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from norm.channel_deconv import ChannelDeconv
from norm.checks import NormError
from norm.layers import Delinear, FastDeconv
from norm.other_layers import FrozenBatchNorm2d, Padded, SamePad2d
from norm.replacements import conv_arguments, copy_conv

Kind = Literal["norm", "conv", "linear"]
Rebuild = Callable[[nn.Module], nn.Module]

_FROZEN = {"torchvision.ops.misc.FrozenBatchNorm2d", f"{FrozenBatchNorm2d.__module__}.{FrozenBatchNorm2d.__qualname__}"}
_NORM_ACT = {
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
}
_NOT_OVER_IMAGES = (nn.Linear, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
_SMP_EFFICIENTNET = "segmentation_models_pytorch.encoders._efficientnet"
_SAME_CONV = {"timm.layers.conv2d_same.Conv2dSame", f"{_SMP_EFFICIENTNET}.Conv2dDynamicSamePadding"}
_STATIC_SAME_CONV = {f"{_SMP_EFFICIENTNET}.Conv2dStaticSamePadding"}
_STANDARDISED = {"timm.layers.std_conv.StdConv2d", "timm.layers.std_conv.ScaledStdConv2d"}
_STANDARDISED_SAME = {f"{name}Same" for name in _STANDARDISED}
"""Standardised, and padded as Conv2dSame where `same_pad` says so (DeepMind's NFNets, hybrid transformers)."""
_PLAIN_LINEAR = {"timm.layers.linear.Linear"}
"""They compute what torch's does, but when they are scripted under autocast."""
# Linear layers whose weight another module reads: replacing them would change nothing or break it.
_READ_BY_OTHERS = {"torch.nn.modules.linear.NonDynamicallyQuantizableLinear"}
_READERS = {
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d",
}
"""Modules that read the weights of linear layers of theirs, in one call of a function for several layers."""
_QKV_READERS = {
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
}
"""Modules that read the weight of their `qkv`, to give it a bias of parts, unless they add that separately."""


def class_name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def kind_of(layer: nn.Module) -> Kind | None:
    """Which method of a recipe a layer belongs to; None for one that no recipe touches."""
    name = class_name(layer)
    if name in _FROZEN | _NORM_ACT or isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return "norm"
    if isinstance(layer, nn.Conv2d):
        return "conv"
    if isinstance(layer, nn.Linear) and name not in _READ_BY_OTHERS:
        return "linear"
    return None


def not_over_images(model: nn.Module) -> set[int]:
    """The ids of SyncBatchNorms over vectors, sequences or volumes: those behind a layer for such in the same module,
    since they do not say it themselves, as the BatchNorm1d or 3d that they were made from did."""
    found: set[int] = set()
    for owner in model.modules():
        before: nn.Module | None = None
        for child in owner.children():
            if isinstance(child, nn.SyncBatchNorm) and isinstance(before, _NOT_OVER_IMAGES):
                found.add(id(child))
            if next(child.parameters(), None) is not None:  # no activation or the like
                before = child
    return found


def read_by_owner(model: nn.Module) -> set[int]:
    """The ids of linear layers that stay, since the module that owns them reads their weights."""
    found: set[int] = set()
    for owner in model.modules():
        names = {f"{base.__module__}.{base.__qualname__}" for base in type(owner).__mro__}
        if names & _READERS:
            found |= {id(child) for child in owner.children() if isinstance(child, nn.Linear)}
        apart = getattr(owner, "q_bias", None) is None or getattr(owner, "qkv_bias_separate", False)
        if names & _QKV_READERS and not apart:
            found.add(id(owner.qkv))
    return found


def take_apart(layer: nn.Module, kind: Kind) -> tuple[nn.Module, Rebuild]:
    """The plain layer, and how to build what takes the old layer's place around a new one.

    Raises:
        NormError: a class that this module does not know; its message ends in what the class is.
    """
    name = class_name(layer)
    if "forward" in vars(layer):
        raise NormError("has a forward of its own, set on the layer, which would be lost")
    if type(layer) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d) or name in _PLAIN_LINEAR:
        return layer, _as_it_is
    if type(layer) is nn.SyncBatchNorm:
        return _plain_norm(layer), _synchronised
    if name in _FROZEN:
        return _plain_norm(layer), _as_it_is
    if name in _NORM_ACT:
        return _plain_norm(layer), lambda new: _norm_act(new, layer)
    if name in _SAME_CONV and isinstance(layer, nn.Conv2d):
        pad = SamePad2d(layer.kernel_size, layer.stride, layer.dilation)
        return _plain_conv(layer, 0), lambda new: Padded(pad, new, type(layer))
    if name in _STATIC_SAME_CONV and isinstance(layer, nn.Conv2d):
        return _plain_conv(layer, layer.padding), lambda new: Padded(layer.get_submodule("static_padding"), new)
    if name in _STANDARDISED and isinstance(layer, nn.Conv2d):
        return _standardised_conv(layer), _as_it_is
    if name in _STANDARDISED_SAME and isinstance(layer, nn.Conv2d):
        if not vars(layer)["same_pad"]:
            return _standardised_conv(layer), _as_it_is
        pad = SamePad2d(layer.kernel_size, layer.stride, layer.dilation)
        timm = sys.modules.get("timm.layers.conv2d_same")  # where its class is, so is this one
        return _standardised_conv(layer), lambda new: Padded(pad, new, getattr(timm, "Conv2dSame", None))
    if isinstance(layer, (FastDeconv, Delinear, ChannelDeconv)):
        raise NormError(f"is already a {type(layer).__name__}; convert the network as it was built")
    raise NormError(f"is a {name}, a {kind} layer that may do more than the plain one")


def probe(layer: nn.Module, kind: Kind) -> nn.Module:
    """A plain layer of the same shape, without memory: for asking whether a recipe would replace one of this kind."""
    with torch.device("meta"):
        if kind == "conv":
            assert isinstance(layer, nn.Conv2d)
            return nn.Conv2d(**conv_arguments(layer), bias=layer.bias is not None)
        if kind == "linear":
            assert isinstance(layer, nn.Linear)
            return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        return nn.BatchNorm2d(int(layer.num_features))  # type: ignore[arg-type]


def _as_it_is(new: nn.Module) -> nn.Module:
    return new


def _synchronised(new: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(new) if type(new) is nn.BatchNorm2d else new


def _plain_norm(layer: nn.Module) -> nn.BatchNorm2d:
    """A BatchNorm2d with copies of the parameters and statistics of `layer`."""
    mean: torch.Tensor | None = layer.running_mean  # type: ignore[assignment]
    weight: torch.Tensor | None = layer.weight  # type: ignore[assignment]
    size = layer.num_features if hasattr(layer, "num_features") else weight.numel()  # type: ignore[union-attr]
    momentum = getattr(layer, "momentum", 0.1)
    plain = nn.BatchNorm2d(int(size), float(layer.eps), momentum, weight is not None, mean is not None)  # type: ignore
    reference = mean if mean is not None else weight
    if reference is not None:
        plain.to(reference.device, reference.dtype)
    mine = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    with torch.no_grad():
        for name, value in {**dict(plain.named_parameters()), **dict(plain.named_buffers())}.items():
            if name in mine:
                value.copy_(mine[name])
    if isinstance(weight, nn.Parameter):  # the buffer of a frozen norm says nothing of what a trained one wants
        plain.requires_grad_(weight.requires_grad)
    return plain.train(layer.training)


def _norm_act(new: nn.Module, old: nn.Module) -> nn.Module:
    """The new norm, followed by the dropout and activation that `old` held."""
    parts: list[tuple[str, nn.Module]] = [("norm", new)]
    parts += [(name, part) for name in ("drop", "act") if isinstance(part := getattr(old, name, None), nn.Module)]
    return nn.Sequential(OrderedDict(parts))


def _plain_conv(layer: nn.Conv2d, padding: object) -> nn.Conv2d:
    """A Conv2d with the weight and bias of `layer`, where `layer` pads by itself before."""
    plain = nn.Conv2d(**conv_arguments(layer) | {"padding": padding}, bias=layer.bias is not None)
    return copy_conv(layer, plain)


def _standardised_conv(layer: nn.Conv2d) -> nn.Conv2d:
    """A Conv2d with the weight that a weight-standardising `layer` convolves with at present."""
    plain = copy_conv(layer, nn.Conv2d(**conv_arguments(layer), bias=layer.bias is not None))
    eps, gain, scale = float(vars(layer)["eps"]), layer._parameters.get("gain"), vars(layer).get("scale", 1.0)
    with torch.no_grad():
        var, mean = torch.var_mean(layer.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        plain.weight.copy_((layer.weight - mean) * (var + eps).rsqrt() * (1.0 if gain is None else gain) * scale)
    return plain

"""Classification networks by name, with plain convolutions and batch norm; `norm.convert` changes the norm afterwards.

A network maps images (N, C, H, W) to logits (N, classes). Those here are made for small images such as CIFAR-10's of
32x32, as the network deconvolution paper used them, and end in a mean over height and width, so that larger images
work too. To add one, write a class of (num_classes, in_channels, *, options) in a file of its own and enter its
NETWORKS below; the annotations of the options say which values are valid.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from classify.models import (
    densenet,
    dpn,
    efficientnet,
    lenet,
    libraries,
    mlp,
    mobilenet_v2,
    pnasnet,
    preact_resnet,
    resnet,
    resnext,
    senet,
    vgg,
)
from engine.checkpoint import first_line
from engine.errors import UserError
from engine.state import isolated_rng

_FAMILIES = (
    vgg, resnet, preact_resnet, densenet, resnext, mobilenet_v2, dpn, pnasnet, senet, efficientnet, lenet, mlp
)  # fmt: skip
_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    name: make for family in _FAMILIES for name, make in family.NETWORKS.items()
}
_SIZES = (*range(8, 64, 8), *range(64, 256, 32), 256, 299, 384, 448, 512)
"""Sides of images that are tried, in this order, to tell the smallest that a network takes."""


def available() -> list[str]:
    """Names that `build` knows, sorted, without those of torchvision and timm."""
    return sorted(_NETWORKS)


def build(
    name: str, num_classes: int = 10, in_channels: int = 3, *, size: int | None = None, **options: Any
) -> nn.Module:
    """The network called `name`, untrained, in training mode.

    Args:
        name: one of `available()`, or torchvision/NAME or timm/NAME.
        num_classes: logits for each image.
        in_channels: channels of the images. Of torchvision's networks, which take three, the first Conv2d is replaced
            by one like it where there are more or fewer.
        size: height and width of the images; those that the network cannot take are an error here, not in the first
            step. mlp is built for it (28 if not given); the others take images of any size that is large enough.
        options: the network's own, such as width=0.5; see its class. Those of torchvision and timm go to the library.

    Returns:
        A network: float images (N, in_channels, H, W) -> float logits (N, num_classes).

    Raises:
        UserError: an unknown name or option, a value that an option does not take, images too small for the network,
            or timm is not installed.
    """
    library, _, rest = name.partition("/")
    if library == "torchvision" and rest:
        model = libraries.torchvision_network(rest, num_classes, in_channels, options)
    elif library == "timm" and rest:
        model = libraries.timm_network(rest, num_classes, in_channels, options)
    else:
        _check(name, options)
        if size is not None and "size" in inspect.signature(_NETWORKS[name]).parameters:
            return _NETWORKS[name](num_classes, in_channels, size=size, **options)
        model = _NETWORKS[name](num_classes, in_channels, **options)
    if size is not None:
        _try(model, name, num_classes, in_channels, size)
        if library in ("torchvision", "timm") and options:
            _try_training(model, name, options, in_channels, size)
    return model


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the layers that make the predictions, before `norm.convert` or after it.

    timm's networks tell; of others it is the last linear layer, or the last convolution where there is no linear one.
    """
    ask: Any = getattr(model, "get_classifier", lambda: None)
    told = ask()
    heads = [head for head in (told if isinstance(told, tuple) else (told,)) if isinstance(head, nn.Module)]
    if not heads:
        layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        heads = sorted(layers, key=lambda layer: isinstance(layer, nn.Linear))[-1:]
    mine = {id(parameter) for head in heads for parameter in head.parameters()}
    return tuple(key for key, parameter in model.named_parameters() if id(parameter) in mine)


def _check(name: str, options: dict[str, Any]) -> None:
    """Raises UserError unless `name` is a network here and has these options, with values of their kind."""
    if name not in _NETWORKS:
        near = difflib.get_close_matches(name, _NETWORKS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"model.name: unknown network {name!r}{hint}; known: {', '.join(available())}, "
            "and torchvision/NAME and timm/NAME"
        )
    parameters = inspect.signature(_NETWORKS[name], eval_str=True).parameters.values()
    known = {one.name: one.annotation for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "size"}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            listed = f"its options: {', '.join(known)}" if known else "it has none"
            raise UserError(f"model.options.{key}: {name} has no such option{hint}; {listed}")
        try:
            TypeAdapter(known[key]).validate_python(value, strict=True)
        except ValidationError as error:
            expected = error.errors()[0]["msg"].replace("Input should be", "expected")
            raise UserError(f"model.options.{key}: found {value!r}, {expected}") from None


def _try(model: nn.Module, name: str, num_classes: int, in_channels: int, size: int) -> None:
    """Run one blank image through the network; raises UserError if it cannot take one of this size."""
    found = _run(model, in_channels, size)
    if isinstance(found, Tensor) and found.shape == (1, num_classes):
        return
    if not isinstance(found, Exception):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"model.options: with them {name} gives {shape} for an image, expected (1, {num_classes})")
    smallest = _smallest(lambda side: not isinstance(_run(model, in_channels, side), Exception), size)
    if smallest is None:
        raise UserError(f"model.name: {name} cannot take images of {size}x{size}: {first_line(found)}")
    built_for = [key for key in ("img_size", "image_size") if key in inspect.signature(type(model)).parameters]
    ways = [f"data.size={smallest}", *(f"model.options.{key}={size}" for key in built_for)]
    raise UserError(
        f"model.name: {name} cannot take images of {size}x{size}; the smallest that it takes are "
        f"{smallest}x{smallest}: set {' or '.join(ways)}, or choose another network"
    )


def _try_training(model: nn.Module, name: str, options: dict[str, Any], in_channels: int, size: int) -> None:
    """Raises UserError for values of options that fail in training mode alone, such as a rate above 1."""
    with isolated_rng(0), torch.no_grad():
        try:
            copy.deepcopy(model)(torch.zeros(2, in_channels, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"model.options: with {options} {name} cannot be trained: {first_line(error)}; change them"
            ) from None


@torch.no_grad()
def _run(model: nn.Module, in_channels: int, size: int) -> Any:
    """What the network gives for a blank image, or the error that it ends in."""
    model.eval()
    try:
        return model(torch.zeros(1, in_channels, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        return error
    finally:
        model.train()


def _smallest(works: Callable[[int], bool], above: int) -> int | None:
    """The smallest side above `above` that works, if one up to 512 does: larger ones are taken to work as well."""
    fails = above
    for side in (one for one in _SIZES if one > above):
        if works(side):
            break
        fails = side
    else:
        return None
    while side - fails > 1:
        middle = (fails + side) // 2
        fails, side = (fails, middle) if works(middle) else (middle, side)
    return side

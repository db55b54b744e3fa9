"""Networks of torchvision and timm, by their names there."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from engine.errors import UserError

_NOT_OPTIONS = {
    "weights": "model.weights",
    "weights_backbone": "model.weights",
    "pretrained": "model.weights",
    "pretrained_cfg": "model.weights",
    "pretrained_cfg_overlay": "model.weights",
    "checkpoint_path": "model.weights",
    "num_classes": "the data set",
    "in_chans": "the data set",
}
"""Arguments of the libraries' constructors that something else decides."""


def torchvision_network(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """The classification network that torchvision calls `name`, untrained.

    Theirs take RGB images. For another number of channels the first Conv2d is replaced by one like it, with torch's
    initial weights; the rest of the network stays as it is. googlenet and inception_v3 come without auxiliary heads.

    Raises:
        UserError: an unknown name, an option that the network does not have, or a value that it does not take.
    """
    from torchvision import models

    _check_name(f"torchvision/{name}", models.list_models(module=models))
    fixed = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}

    def make(**chosen: Any) -> nn.Module:
        return models.get_model(name, weights=None, num_classes=num_classes, **fixed, **chosen)

    model = _made(f"torchvision/{name}", make, options)
    if in_channels != 3:
        _replace_first_conv(model, in_channels)
    return model


def timm_network(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """The network that timm calls `name`, untrained.

    Raises:
        UserError: timm is missing, an unknown name, an option that the network does not have, or a value that it does
            not take.
    """
    try:
        import timm
    except ImportError:
        raise UserError(
            f"model.name: timm/{name} is one of timm's networks, and timm is not installed; "
            "install it with pip install 'deconvseg[pretrained]'"
        ) from None
    if not timm.is_model(name):
        _check_name(f"timm/{name}", timm.list_models())

    def make(**chosen: Any) -> nn.Module:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **chosen)

    return _made(f"timm/{name}", make, options)


def _check_name(name: str, known: list[str]) -> None:
    library, _, word = name.partition("/")
    if word not in known:
        near = difflib.get_close_matches(word, known, n=3)
        hint = f"; did you mean {', '.join(f'{library}/{one}' for one in near)}?" if near else ""
        raise UserError(f"model.name: {library} has no classification network {word!r}{hint}")


def _made(name: str, make: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """`make(**options)`; what it has against the options is a UserError."""
    for key in options:
        if key in _NOT_OPTIONS:
            raise UserError(f"model.options.{key}: not an option of {name} here; {_NOT_OPTIONS[key]} decides it")
    try:
        return make(**options)
    except Exception as error:
        # Their constructors check little: a bad value may end in any error. Without options it is not the user's.
        if not options:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    known = _arguments(make())
    for key in options:
        if known and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"model.options.{key}: {name} has no such option{hint}; its options: {', '.join(sorted(known))}"
            )
    raise UserError(f"model.options: {name} cannot be built with {options}: {reason}")


def _arguments(model: nn.Module) -> set[str]:
    """The arguments of a network's class that have a default; none where it takes any."""
    parameters = inspect.signature(type(model)).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return set()
    return {one.name for one in parameters if one.default is not one.empty} - set(_NOT_OPTIONS)


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    name, old = next((name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        old.groups,
        old.bias is not None,
        old.padding_mode,
    )
    model.set_submodule(name, new)

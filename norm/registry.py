"""Recipes: what becomes of the layers of a network, by name.

A recipe is a frozen dataclass whose fields are its options. It has three methods, `norm`, `conv` and `linear`; each is
given an old layer and its place in the network and returns the new layer, or the old one to keep it. `norm.convert`
applies a recipe to a network, and moves what it returns to the old layer's device and dtype. To add one of your own:

    @norm.register("gn8")
    @dataclass(frozen=True, kw_only=True)
    class GroupNorm8(norm.Recipe):
        groups: int = 8

        def norm(self, old, at):
            return nn.GroupNorm(self.groups, old.num_features)
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from norm.checks import NormError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a layer stands in the network."""

    name: str
    """Dotted name, as in `named_modules`."""
    first: bool = False
    """It is the first convolution in the order in which the network's layers are registered."""
    last: bool = False
    """It makes the network's predictions: the last linear layer, or the last convolution and those of the same shape
    of output in other heads."""
    depthwise: bool = False
    """A convolution with as many groups as input channels, more than one, or a batch norm of its channels that is
    registered right behind it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Keeps every layer; recipes derive from it and override what they change.

    `norm` is given any batch norm over (N, C, H, W) as a plain nn.BatchNorm2d (adapters keep what subclasses do
    besides), `conv` any Conv2d, `linear` any Linear but those inside attention whose weights their owner reads.
    """

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        return old

    def conv(self, old: nn.Conv2d, at: Place) -> nn.Module:
        return old

    def linear(self, old: nn.Linear, at: Place) -> nn.Module:
        return old

    def override(self, options: dict[str, Any]) -> Recipe:
        """This recipe with other options for some layers, checked as `recipe` does."""
        check_options(type(self), options)
        return dataclasses.replace(self, **options)


R = TypeVar("R", bound=type[Recipe])
_RECIPES: dict[str, type[Recipe]] = {}


def register(name: str) -> Callable[[R], R]:
    """Class decorator that makes a recipe known as `name`.

    Raises:
        NormError: the name is taken by another class, or the class is no frozen dataclass derived from Recipe.
    """

    def add(cls: R) -> R:
        if not (isinstance(cls, type) and issubclass(cls, Recipe)):
            raise NormError(f"recipe {name!r}: {cls!r} does not derive from norm.Recipe")
        if "__dataclass_fields__" not in vars(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise NormError(f"recipe {name!r}: {cls} must have @dataclass(frozen=True, kw_only=True)")
        known = _RECIPES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise NormError(f"recipe {name!r} is already registered, by {known.__module__}.{known.__qualname__}")
        _RECIPES[name] = cls
        return cls

    return add


def available() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(_RECIPES)


def recipe(name: str, **options: Any) -> Recipe:
    """The recipe called `name` with `options`.

    Raises:
        NormError: an unknown name or option (the known ones are named), a value of a wrong type or out of range.
    """
    if not isinstance(name, str):
        raise NormError(f"a recipe is called by its name, such as 'deconv', and its options; found {name!r}")
    if name not in _RECIPES:
        raise NormError(f"unknown recipe {name!r}{_nearest(name, available())}; known: {', '.join(available())}")
    cls = _RECIPES[name]
    check_options(cls, options, name)
    return cls(**options)


def check_options(cls: type[Recipe], options: dict[str, Any], name: str | None = None) -> None:
    """Raises NormError unless every option is a field of the recipe and of its type."""
    name = name or next((n for n, c in _RECIPES.items() if c is cls), cls.__name__)
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in options.items():
        if key not in known:
            listed = f"its options: {', '.join(known)}" if known else "it has no options"
            raise NormError(f"recipe {name!r} has no option {key!r}{_nearest(key, known)}; {listed}")
        if not _fits(value, hints[key]):
            raise NormError(f"recipe {name!r}: {key} is {value!r}; expected {_describe(hints[key])}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("NoneType", "None")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

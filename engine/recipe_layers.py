"""Layers of a configuration in one, with what they say under `recipes` about the norm that is chosen.

What a layer's `recipes` says lies above the layers below, whose rates were written for another norm, and below what
the layer itself says under `norm` and `optim`.
"""

from __future__ import annotations

import functools
from typing import Any

from engine.yaml_layers import Instead, Layer, Leaf, merge, to_plain


def combine(layers: list[Layer], default: str) -> Layer:
    """All layers, the lowest one first; `default` is `norm.name` where none says it."""
    name = _name(functools.reduce(lambda below, above: _merge(below, above, default, {}), layers, {}), default)
    everything: Layer = {}
    chosen: Layer = {}
    owns = [_of_recipe(layer, name) for layer in layers]
    for place, layer in enumerate(layers):
        if emptied := _emptied(layer, name):
            owns[:place] = [{key: one for key, one in own.items() if key not in emptied} for own in owns[:place]]
    for own, layer in zip(owns, layers, strict=True):
        chosen = merge(chosen, own)
        everything = _merge(merge(everything, own), layer, default, chosen.get("norm", {}))
    return everything


def _merge(below: Layer, above: Layer, default: str, kept: Layer) -> Layer:
    """Merge; another `norm.name` drops what was said under `norm` so far, since it belongs to the other recipe, but for
    what is `kept`."""
    old, new = below.get("norm"), above.get("norm")
    named = isinstance(old, dict) and isinstance(new, dict) and "name" in new
    if named and _name(above, default) != _name(below, default):
        below = {**below, "norm": kept}
    return merge(below, above)


def _emptied(layer: Layer, name: Any) -> tuple[str, ...]:
    """The sections of which the layer takes back what those below say about the recipe of this name: `recipes={}`."""
    at: Any = layer
    for key, sections in (("recipes", ("norm", "optim")), (name, ("norm", "optim")), ("optim", ("optim",))):
        at = at.get(key) if isinstance(at, dict) and isinstance(key, str) else None
        if isinstance(at, Instead) or (isinstance(at, Leaf) and at.value == {}):
            return sections
    return ()


def _name(layer: Layer, default: str) -> Any:
    section = layer.get("norm")
    return to_plain(section).get("name", default) if isinstance(section, dict) else default


def _of_recipe(layer: Layer, name: Any) -> Layer:
    """What this layer's `recipes` says about the recipe of this name, as sections."""
    recipes = layer.get("recipes")
    said = recipes.get(name) if isinstance(recipes, dict) and isinstance(name, str) else None
    if not isinstance(said, dict):
        return {}
    norm = {"norm": {key: one for key, one in said.items() if key != "optim"}}
    return {**norm, "optim": said["optim"]} if isinstance(said.get("optim"), dict) else norm

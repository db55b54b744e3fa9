"""Which layer of a network becomes what: the plan that `convert` carries out when all of it is sound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from norm.adapters import Kind, Rebuild, class_name, kind_of, not_over_images, probe, read_by_owner, take_apart
from norm.checks import NormError
from norm.inputs import check_network
from norm.other_layers import Padded
from norm.recipes import Deconv
from norm.registry import Place, Recipe, recipe
from norm.state import Whitening

Overrides = Mapping[str, Mapping[str, Any]]

_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
}


@dataclass
class Swap:
    """One layer, and what is to take its place."""

    old: nn.Module
    kind: Kind
    at: Place
    names: list[str]
    plain: nn.Module
    core: nn.Module
    rebuild: Rebuild
    why: str = ""

    @property
    def new(self) -> nn.Module:
        return self.old if self.core is self.plain else self.rebuild(self.core)

    @property
    def lead(self) -> nn.Module:
        """What the new layer does to its input before `core` sees it: an explicit padding, or nothing."""
        new = self.new
        return new.pad if isinstance(new, Padded) else nn.Identity()


def plan(model: nn.Module, chosen: Recipe, overrides: Overrides) -> list[Swap]:
    check_network("norm.convert", model)
    for module in model.modules():
        if class_name(module) in _WRAPPERS:
            raise NormError(
                f"the model is in a {type(module).__name__}, which would not see the new parameters; convert before it "
                "is wrapped"
            )
    layers = list(layers_by_name(model).values())
    if not layers:
        raise NormError(f"{type(model).__name__} has no Conv2d, BatchNorm2d or Linear layer to convert")
    if any(name == "" for _, names in layers for name in names):
        raise NormError(f"the model is a bare {type(model).__name__}; put it into an nn.Sequential")
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise NormError(f"{name} has no weights yet; run one batch through the network before converting it")
    _check_patterns(overrides, layers)
    first, last = _first_and_last([layer for layer, _ in layers])
    swaps = []
    before: nn.Module | None = None
    for layer, names in layers:
        at = Place(names[0], layer is first, id(layer) in last, _depthwise(layer) or _follows_depthwise(layer, before))
        before = layer
        mine, why = _recipe_for(names, chosen, overrides)
        swaps.append(_plan_layer(layer, names, at, mine, why))
    _check_sharing(model, swaps)
    _check_whitens(chosen, swaps)
    _check_effect(chosen, overrides, swaps)
    return swaps


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels


def _follows_depthwise(layer: nn.Module, before: nn.Module | None) -> bool:
    """Whether a norm is registered right behind a depthwise convolution of as many channels."""
    if kind_of(layer) != "norm" or not isinstance(before, nn.Conv2d):
        return False
    return _depthwise(before) and getattr(layer, "num_features", None) == before.out_channels


def _plan_layer(layer: nn.Module, names: list[str], at: Place, mine: Recipe, why: list[str]) -> Swap:
    kind = kind_of(layer)
    assert kind is not None
    method = getattr(mine, kind)
    try:
        plain, rebuild = take_apart(layer, kind)
    except NormError as error:
        dummy = probe(layer, kind)
        with torch.device("meta"):
            kept = method(dummy, at) is dummy
        if not kept:
            raise NormError(
                f"{names[0]} {error}; leave it alone with overrides={{{names[0]!r}: {{'recipe': 'keep'}}}}, "
                "or build the network with the plain layer"
            ) from None
        return Swap(layer, kind, at, names, layer, layer, lambda new: new, "kept")
    core = method(plain, at)
    if kind != "norm" and "weight" not in plain._parameters and core is not plain:
        raise NormError(
            f"{names[0]}: its weight is computed (weight_norm or the like); remove that before converting, or leave "
            f"it alone with overrides={{{names[0]!r}: {{'recipe': 'keep'}}}}"
        )
    if not isinstance(core, nn.Module):
        raise NormError(f"recipe {type(mine).__name__}.{kind} returned {core!r} for {names[0]}, not a module")
    if core is not plain and (like := next(iter([*plain.parameters(), *plain.buffers()]), None)) is not None:
        core.to(like.device, like.dtype)
    swap = Swap(layer, kind, at, names, plain, core, rebuild)
    notes = [word for word, holds in (("first", at.first), ("last", at.last), ("depthwise", at.depthwise)) if holds]
    swap.why = ", ".join([*notes, *why, *([f"in {len(names)} places"] if len(names) > 1 else [])])
    return swap


def _match(pattern: str, names: Iterable[str]) -> bool:
    """Whether a name matches the pattern, or one of those that "|" separates."""
    return any(fnmatchcase(name, each) for each in pattern.split("|") for name in names)


def _recipe_for(names: list[str], chosen: Recipe, overrides: Overrides) -> tuple[Recipe, list[str]]:
    why = []
    for pattern, options in overrides.items():
        if _match(pattern, names):
            options = dict(options)
            other = options.pop("recipe", None)
            try:
                chosen = recipe(other, **options) if other is not None else chosen.override(options)
            except NormError as error:
                raise NormError(f"overrides[{pattern!r}]: {error}") from None
            why.append(f"override {pattern}")
    return chosen, why


def _check_patterns(overrides: Overrides, layers: list[tuple[nn.Module, list[str]]]) -> None:
    if not isinstance(overrides, Mapping):
        raise NormError(
            f"overrides is {overrides!r}; expected patterns and options, such as {{'layer4.*': {{'n_iter': 3}}}}"
        )
    all_names = [name for _, names in layers for name in names]
    for pattern, options in overrides.items():
        if not isinstance(options, Mapping) or not options:
            raise NormError(f"overrides[{pattern!r}] is {options!r}; expected options such as {{'n_iter': 3}}")
        if not _match(pattern, all_names):
            shown = ", ".join(all_names[:5])
            raise NormError(f"overrides[{pattern!r}] matches no layer; layers are named {shown}, ...")


def _first_and_last(layers: list[nn.Module]) -> tuple[nn.Module | None, set[int]]:
    """The first convolution; the layers that make predictions (see Place.last)."""
    weighted = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    first = next((layer for layer in weighted if isinstance(layer, nn.Conv2d)), None)
    if not weighted:
        return first, set()
    end = weighted[-1]
    if not isinstance(end, nn.Conv2d):
        return first, {id(end)}
    if end.bias is None:
        return first, set()
    heads = [
        layer
        for layer in weighted
        if isinstance(layer, nn.Conv2d)
        and layer.bias is not None
        and (layer.out_channels, layer.kernel_size) == (end.out_channels, end.kernel_size)
    ]
    return first, {id(layer) for layer in heads}


def _check_sharing(model: nn.Module, swaps: list[Swap]) -> None:
    """A layer that is replaced gets parameters of its own, which must not cut it off from another one's."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for swap in swaps:
        for key, parameter in swap.old._parameters.items():
            names = [] if parameter is None else owners[id(parameter)]
            if swap.core is not swap.plain and len(names) > 1:
                count = "two" if len(names) == 2 else len(names)
                raise NormError(
                    f"{' and '.join(names)} are {count} layers that share one {key}; "
                    "use one layer in all places, so that it can be converted once, or keep all of them (overrides)"
                )


def _check_whitens(chosen: Recipe, swaps: list[Swap]) -> None:
    """Raises NormError where nothing would whiten: the network would be left as it is, or without its batch norms."""
    if not isinstance(chosen, Deconv) or any(_whitens(swap) for swap in swaps):
        return
    gone = [swap.names[0] for swap in swaps if swap.kind == "norm" and isinstance(swap.core, nn.Identity)]
    more = f", but batch norms that would go ({gone[0]}, ...)" if gone else ""
    raise NormError(
        f"the network has no Conv2d that would become a whitening layer{more}. fc_block whitens linear layers; "
        "transposed, 1-d and 3-d convolutions are left alone, and what overrides or keep_depthwise keep: use another "
        "recipe for them, or 'none' to remove the norms"
    )


def _whitens(swap: Swap) -> bool:
    return any(isinstance(part, Whitening) for part in swap.core.modules())


def _check_effect(chosen: Recipe, overrides: Overrides, swaps: list[Swap]) -> None:
    """Raises NormError where options of whitening are given to layers of which none whitens: norms, which go, or linear
    layers without fc_block."""
    for pattern, options in overrides.items():
        if "recipe" in options:
            continue
        mine = [swap for swap in swaps if _match(pattern, swap.names)]
        recipes = [_recipe_for(swap.names, chosen, overrides)[0] for swap in mine]
        if all(isinstance(each, Deconv) for each in recipes) and not any(_whitens(swap) for swap in mine):
            names = ", ".join(swap.names[0] for swap in mine[:3]) + (", ..." if len(mine) > 3 else "")
            raise NormError(
                f"overrides[{pattern!r}] has no effect: it matches {names}, and nothing there whitens. Norms go, "
                "linear layers stay without fc_block, depthwise convolutions with keep_depthwise; name another "
                "convolution, keep a norm with {'recipe': 'keep'}, or leave the override out"
            )


def layers_by_name(model: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """Every layer that recipes act on, once, with all its names, in order of registration."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    kept = read_by_owner(model) | not_over_images(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if kind_of(module) is not None and id(module) not in kept:
            found.setdefault(id(module), (module, []))[1].append(name)
    return found

"""Apply a recipe to any network: plan everything, then swap, so that an error leaves the network as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from norm import calibration
from norm.adapters import Kind, Rebuild, class_name, kind_of, probe, take_apart
from norm.layers import NormError, Padded
from norm.registry import Place, Recipe, recipe

Overrides = Mapping[str, Mapping[str, Any]]
Batches = Tensor | Iterable[Tensor]


@dataclass(frozen=True)
class Row:
    """What became of one layer."""

    name: str
    old: str
    new: str
    why: str


@dataclass(frozen=True)
class Report:
    """What `convert` did; printed, a table: layer | from | to | why."""

    recipe: Recipe
    rows: list[Row]
    deviation: float | None = None
    """With `calibrate`: largest difference of the outputs before and after, relative to the largest output."""

    @property
    def changed(self) -> list[Row]:
        return [row for row in self.rows if row.old != row.new]

    def __str__(self) -> str:
        table = [("layer", "from", "to", "why"), *((r.name, r.old, r.new, r.why) for r in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        lines = [" | ".join(cell.ljust(w) for cell, w in zip(line, [*widths, 0], strict=True)) for line in table]
        end = f"{self.recipe}: {len(self.changed)} of {len(self.rows)} layers replaced"
        if self.deviation is not None:
            end += f"; outputs differ from before by {self.deviation:.1e} of the largest"
        return "\n".join([*(line.rstrip() for line in lines), end])


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


def convert(
    model: nn.Module, name: str, *, overrides: Overrides | None = None, calibrate: Batches | None = None, **options: Any
) -> Report:
    """Apply the recipe `name` to every layer of `model`, in place.

    Weights survive: a new layer takes those of the old one. A layer used in several places stays one layer.

    Args:
        model: any nn.Module; torchvision's, timm's and segmentation-models-pytorch's networks are tested.
        name: a recipe, see `norm.available()`.
        overrides: options for the layers whose name matches a pattern (as in fnmatch: "layer4.*"); later patterns
            win. The option "recipe" names another recipe for them, "keep" leaves them as they are.
        calibrate: inputs (N, C, H, W), or an iterable of such batches, for a *trained* network with batch norm: it is
            run on them in evaluation mode, and its weights are changed so that the converted network computes the
            same function (W = w_eff D^(-1), b = b_eff + w_eff mu, with w_eff and b_eff the convolution with its batch
            norm folded in). Without it the weights are kept, and the function changes.
        options: the recipe's own.

    Returns:
        A Report; print it.

    Raises:
        NormError: an unknown recipe or option, an override that matches no layer, a layer of an unknown subclass,
            layers that share a weight, or `calibrate` with a recipe that does not whiten. The model is then as it was.
    """
    chosen = recipe(name, **options)
    swaps = _plan(model, chosen, overrides or {})
    observed = None
    if calibrate is not None:
        observed = calibration.observe(model, swaps, calibrate)
        calibration.apply(swaps, observed)
    rows = []
    replacements: dict[int, nn.Module] = {}
    for swap in swaps:
        new = swap.new
        if new is not swap.old:
            new.train(swap.old.training)
            _move_hooks(swap.old, new)
            replacements[id(swap.old)] = new
        rows.append(Row(swap.names[0], _describe(swap.old), _describe(new), swap.why))
    exposed = _in_place_behind_norms(model, swaps)
    replace(model, replacements)
    for activation in exposed:
        activation.inplace = False  # type: ignore[assignment]
    deviation = None if observed is None else calibration.deviation(model, observed)
    return Report(chosen, rows, deviation)


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put `replacements[id(layer)]` wherever `layer` stands below `model`."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[key] = replacements[id(child)]


def layers_by_name(model: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """Every layer that recipes act on, once, with all its names, in order of registration."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if kind_of(module) is not None:
            found.setdefault(id(module), (module, []))[1].append(name)
    return found


def _plan(model: nn.Module, chosen: Recipe, overrides: Overrides) -> list[Swap]:
    layers = list(layers_by_name(model).values())
    if not layers:
        raise NormError(f"{type(model).__name__} has no Conv2d, BatchNorm2d or Linear layer to convert")
    if any(name == "" for _, names in layers for name in names):
        raise NormError(f"the model is a bare {type(model).__name__}; put it into an nn.Sequential")
    _check_patterns(overrides, layers)
    first, last = _first_and_last([layer for layer, _ in layers])
    swaps = []
    for layer, names in layers:
        depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        at = Place(names[0], layer is first, id(layer) in last, depthwise)
        mine, why = _recipe_for(names, chosen, overrides)
        swaps.append(_plan_layer(layer, names, at, mine, why))
    _check_sharing(swaps)
    return swaps


def _plan_layer(layer: nn.Module, names: list[str], at: Place, mine: Recipe, why: list[str]) -> Swap:
    kind = kind_of(layer)
    assert kind is not None
    method = getattr(mine, kind)
    try:
        plain, rebuild = take_apart(layer, kind)
    except NormError as error:
        dummy = probe(layer, kind)
        if method(dummy, at) is not dummy:
            raise NormError(
                f"{names[0]} {error}; leave it alone with overrides={{{names[0]!r}: {{'recipe': 'keep'}}}}, "
                "or build the network with the plain layer"
            ) from None
        return Swap(layer, kind, at, names, layer, layer, lambda new: new, "kept")
    if kind != "norm" and "weight" not in plain._parameters:
        raise NormError(f"{names[0]}: its weight is computed (weight_norm or the like); remove that before converting")
    core = method(plain, at)
    if not isinstance(core, nn.Module):
        raise NormError(f"recipe {type(mine).__name__}.{kind} returned {core!r} for {names[0]}, not a module")
    swap = Swap(layer, kind, at, names, plain, core, rebuild)
    notes = [word for word, holds in (("first", at.first), ("last", at.last), ("depthwise", at.depthwise)) if holds]
    swap.why = ", ".join([*notes, *why, *([f"in {len(names)} places"] if len(names) > 1 else [])])
    return swap


def _recipe_for(names: list[str], chosen: Recipe, overrides: Overrides) -> tuple[Recipe, list[str]]:
    why = []
    for pattern, options in overrides.items():
        if any(fnmatchcase(name, pattern) for name in names):
            options = dict(options)
            other = options.pop("recipe", None)
            try:
                chosen = recipe(other, **options) if other is not None else chosen.override(options)
            except NormError as error:
                raise NormError(f"overrides[{pattern!r}]: {error}") from None
            why.append(f"override {pattern}")
    return chosen, why


def _check_patterns(overrides: Overrides, layers: list[tuple[nn.Module, list[str]]]) -> None:
    all_names = [name for _, names in layers for name in names]
    for pattern, options in overrides.items():
        if not isinstance(options, Mapping) or not options:
            raise NormError(f"overrides[{pattern!r}] is {options!r}; expected options such as {{'n_iter': 3}}")
        if not any(fnmatchcase(name, pattern) for name in all_names):
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


def _check_sharing(swaps: list[Swap]) -> None:
    owners: dict[int, str] = {}
    for swap in swaps:
        weight = swap.old._parameters.get("weight")
        if weight is None or swap.core is swap.plain:
            continue
        if id(weight) in owners:
            raise NormError(
                f"{owners[id(weight)]} and {swap.names[0]} are two layers that share one weight; "
                "use one layer in both places, so that it can be converted once"
            )
        owners[id(weight)] = swap.names[0]


def _in_place_behind_norms(model: nn.Module, swaps: list[Swap]) -> list[nn.Module]:
    """In-place activations that may write into a tensor that others read, once the norm before them is gone.

    A norm makes a tensor of its own. Where it goes and no convolution beside it made its input (pre-activation
    networks), the in-place activation behind it would change the input of the shortcut too, and nothing would complain.
    """
    gone = {id(swap.old): swap for swap in swaps if swap.kind == "norm" and isinstance(swap.core, nn.Identity)}
    found: list[nn.Module] = []
    for parent in model.modules():
        made: set[int] = set()
        children = list(parent.children())
        for child in children:
            if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
                made.add(child.out_channels)
            swap = gone.get(id(child))
            if swap is not None and int(swap.plain.num_features) not in made:  # type: ignore[arg-type]
                found += [each for each in (*children, *child.children()) if getattr(each, "inplace", False)]
    return found


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hooks that something (a feature extractor, say) put on the old layer see the new one."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        for suffix in ("", "_with_kwargs"):
            getattr(new, kind + suffix).update(getattr(old, kind + suffix))


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.Sequential):
        return " + ".join(_describe(child) for child in layer.children() if not isinstance(child, nn.Identity))
    name = type(layer).__name__ if class_name(layer).startswith(("torch.", "norm.")) else class_name(layer)
    if hasattr(layer, "block"):
        return f"{name}(block={layer.block}, n_iter={layer.n_iter})"
    return name

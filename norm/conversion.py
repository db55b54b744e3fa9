"""Apply a recipe to any network: plan everything, then swap, so that an error leaves the network as it was."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from norm import calibration
from norm.adapters import class_name, kind_of, not_over_images
from norm.plan import Overrides, Swap, plan
from norm.products import FEW_STEPS
from norm.registry import Recipe, recipe
from norm.state import Whitening
from norm.swapping import replace, take_over

Batches = Tensor | Iterable[Tensor]


@dataclass(frozen=True)
class Row:
    """What became of one layer."""

    name: str
    old: str
    new: str
    why: str
    changed: bool


@dataclass(frozen=True)
class Report:
    """What `convert` did; printed, a table: layer | from | to | why."""

    recipe: Recipe
    rows: list[Row]
    deviation: float | None = None
    """With `calibrate`: largest difference of the outputs before and after, relative to the largest output."""
    left: Mapping[str, int] = field(default_factory=dict)
    """Convolutions and batch norms of other kinds than recipes act on: how many of each class."""

    @property
    def changed(self) -> list[Row]:
        return [row for row in self.rows if row.changed]

    def __str__(self) -> str:
        table = [("layer", "from", "to", "why"), *((r.name, r.old, r.new, r.why) for r in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        lines = [" | ".join(cell.ljust(w) for cell, w in zip(line, [*widths, 0], strict=True)) for line in table]
        end = f"{self.recipe}: {len(self.changed)} of {len(self.rows)} layers replaced"
        if self.deviation is not None:
            end += f"; outputs differ from before by {self.deviation:.1e} of the largest"
        if self.left:
            end += f"; left alone: {', '.join(f'{count} {kind}' for kind, count in self.left.items())}"
        return "\n".join([*(line.rstrip() for line in lines), end])


@torch.inference_mode(False)  # else the new parameters could never be trained
def convert(
    model: nn.Module, name: str, *, overrides: Overrides | None = None, calibrate: Batches | None = None, **options: Any
) -> Report:
    """Apply the recipe `name` to every layer of `model`, in place.

    Weights survive: a new layer takes those of the old one, in parameters of its own, so convert before you make the
    optimiser, wrap the network (DDP) or copy it (averages of weights). A layer used in several places stays one layer.
    Transposed, 1-d and 3-d convolutions stay, and so do batch norms over vectors and sequences. Where norms go,
    activation modules stop working in place; a functional one (`F.relu(bn(x), inplace=True)`) cannot be seen.

    `torch.fx` must be told not to trace into the whitening layers, by the tracer's `leaf_modules`; it can trace the
    network that `norm.fold` gives.

    Args:
        model: any nn.Module; torchvision's, timm's and segmentation-models-pytorch's networks are tested. The whole
            network: its first convolution is taken for the one that reads the images, whose statistics `deconv` holds
            for most of the time. For a part behind others give `stem_freeze=False`.
        name: a recipe, see `norm.available()`.
        overrides: options for the layers whose name matches a pattern (as in fnmatch: "layer4.*", or several with "|"
            between them); later patterns win. The option "recipe" names another recipe for them, "keep" leaves them as
            they are.
        calibrate: inputs (N, C, H, W), or an iterable of such batches, for a *trained* network with batch norm: it is
            run on them in evaluation mode, and its weights are changed so that the converted network computes the
            same function (W = w_eff D^(-1), b = b_eff + w_eff mu, with w_eff and b_eff the convolution with its batch
            norm folded in). Without it the weights are kept, and the function changes.
        options: the recipe's own.

    Returns:
        A Report; print it.

    Raises:
        NormError: `model` is no network, an unknown recipe or option, an override that matches no layer, a layer of an
            unknown subclass, layers that share a weight, a whitening recipe that finds nothing to whiten, or
            `calibrate` with a recipe that does not whiten. The model is then as it was.
    """
    chosen = recipe(name, **options)
    swaps = plan(model, chosen, overrides or {})
    _warn_of_rounded_products(swaps)
    others = not_over_images(model)
    left = Counter(type(one).__name__ for one in model.modules() if _is_left(one) or id(one) in others)
    observed = None
    if calibrate is not None:
        observed = calibration.observe(model, swaps, calibrate)
        calibration.apply(swaps, observed)
    rows = []
    replacements: dict[int, nn.Module] = {}
    undo: dict[int, nn.Module] = {}
    for swap in swaps:
        new = swap.new
        if new is not swap.old:
            new.train(swap.old.training)
            take_over(swap.old, new)
            replacements[id(swap.old)] = new
            undo[id(new)] = swap.old
        rows.append(Row(swap.names[0], _describe(swap.old), _describe(new), swap.why, new is not swap.old))
    replace(model, replacements)
    try:
        deviation = None if observed is None else calibration.deviation(model, observed)
    except BaseException:
        replace(model, undo)
        raise
    if any(swap.kind == "norm" and isinstance(swap.core, nn.Identity) for swap in swaps):
        _work_out_of_place(model)
    return Report(chosen, rows, deviation, left)


def _is_left(module: nn.Module) -> bool:
    """A convolution (whatever has filters over images) or batch norm that no recipe acts on."""
    if kind_of(module) is not None:
        return False
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    others = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, others) or (weight is not None and weight.ndim == 4)


def _warn_of_rounded_products(swaps: Iterable[Swap]) -> None:
    """Each Newton-Schulz step amplifies rounding (tests/norm/test_whitening.py: fifteen with TF32's 10 bits)."""
    parts = [part for swap in swaps for part in swap.core.modules() if isinstance(part, Whitening)]
    most = max((part.n_iter for part in parts if part.root_dtype() == torch.float32), default=0)
    precision = torch.get_float32_matmul_precision()
    if most > FEW_STEPS and precision != "highest":
        warnings.warn(
            f"torch.set_float32_matmul_precision({precision!r}) rounds the products of {most} Newton-Schulz steps: "
            'where the device does so (GPUs with TF32) their result may be far off; set it to "highest"',
            stacklevel=3,
        )


def _work_out_of_place(model: nn.Module) -> None:
    """A norm makes a tensor of its own. Where it has gone, an activation in place would write into the norm's input,
    which a shortcut may read as well (pre-activation networks), and nothing would complain."""
    for module in model.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.Sequential):
        return " + ".join(_describe(child) for child in layer.children() if not isinstance(child, nn.Identity))
    name = type(layer).__name__ if class_name(layer).startswith(("torch.", "norm.")) else class_name(layer)
    if hasattr(layer, "block"):
        return f"{name}(block={layer.block}, n_iter={layer.n_iter})"
    return name

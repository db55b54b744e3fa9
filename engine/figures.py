"""Pictures of what network deconvolution does in a trained network: its kernels, and a layer's input before and after.

They show the running averages, with which the layer works in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.errors import UserError
from engine.plots import figure
from norm import FastDeconv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_KERNELS = 4
"""Channels of the first layer whose kernels are drawn."""
_MOST_VALUES = 2_000_000
_MOST_ROWS = 100_000
_RGB = ("red", "green", "blue")
_BEFORE, _AFTER = "#1f77b4", "#d95f02"


def deconv_layers(model: nn.Module, source: Path | str) -> dict[str, FastDeconv]:
    """The FastDeconv layers by name, in the network's order. Raises UserError if `source` has none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FastDeconv)}
    if not found:
        raise UserError(
            f"{source}: the network has no deconvolution layer (FastDeconv), so there is nothing to draw; expected a "
            "checkpoint that was trained with norm.name=deconv"
        )
    return found


def choose(layers: dict[str, FastDeconv], name: str | None) -> str:
    """The name itself, or by default the one in the middle of the ungrouped layers with kernels larger than 1x1.

    Raises:
        UserError: there is no such layer; lists those that there are.
    """
    if name is None:
        spatial = [n for n, layer in layers.items() if layer.kernel_size != (1, 1) and layer.groups == 1]
        names = spatial or list(layers)
        return names[len(names) // 2]
    if name not in layers:
        raise UserError(f"--layer: no deconvolution layer {name!r}; there are: {', '.join(layers)}")
    return name


def caught(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """The input of `layer` when `run` is called; of several calls, that of the first."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not seen:
            seen.append(inputs[0].detach())

    handle = layer.register_forward_pre_hook(note)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    if not seen:
        raise UserError("--layer: the network does not use this layer in evaluation; choose another one")
    return seen[0]


def draw_kernels(layer: FastDeconv, name: str, path: Path | str) -> None:
    """The rows of D that belong to the middle pixel of each channel, as pictures of what they take from every channel.

    A row of D says how a whitened value is made from the patch: the pixel itself less what its neighbours and the other
    channels tell of it already, the center-surround shape of the paper's figure. Beside them the whole D.

    Raises:
        UserError: the layer's features are grouped so that they are no patches; the path cannot be written.
    """
    height, width = _size(layer)
    if layer.grouping == "published" and layer.groups == 1 and layer.block < layer.in_channels:
        raise UserError(
            f"{name}: with norm.grouping=published and fewer channels in a block ({layer.block}) than in its input "
            f"({layer.in_channels}) a row of its D is no patch of the image; there are no kernels to draw"
        )
    deconv = _deconv(layer)
    shown = min(layer.block, MOST_KERNELS)
    rows = deconv.reshape(layer.block, height, width, layer.block, height, width)
    kernels = rows[:shown, height // 2, width // 2, :shown]
    limit = float(np.abs(kernels).max())
    names = {1: ("grey",), 3: _RGB}.get(layer.block) or [f"channel {i}" for i in range(shown)]
    wide = max(4.2, 1.75 * shown + 0.8)
    with figure(path, (wide + 5.6, max(4.8, 1.75 * shown + 0.9))) as drawn:
        parts: Any = drawn.subfigures(1, 2, width_ratios=[wide, 5.6])
        left, right = parts
        grid = left.subplots(shown, shown, squeeze=False)
        for i, line in enumerate(grid):
            for j, axes in enumerate(line):
                picture = axes.imshow(kernels[i, j], cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.set(xticks=[], yticks=[])
                if i == 0:
                    axes.set_title(f"from {names[j]}", fontsize=9)
                if j == 0:
                    axes.set_ylabel(f"whitened {names[i]}", fontsize=9)
        left.colorbar(picture, ax=grid, fraction=0.045, pad=0.03)
        left.suptitle("Kernels of the whitened middle pixel", fontsize=11)
        whole = right.subplots()
        limit = float(np.abs(deconv).max())
        picture = whole.imshow(deconv, cmap="RdBu_r", vmin=-limit, vmax=limit)
        places = [height * width * (i + 0.5) - 0.5 for i in range(layer.block)] if layer.block <= MOST_KERNELS else []
        for edge in range(1, layer.block if places else 0):
            for line_at in (whole.axhline, whole.axvline):
                line_at(edge * height * width - 0.5, color="0.6", linewidth=0.6)
        whole.set_xticks(places, names[: len(places)])
        whole.set_yticks(places, names[: len(places)], rotation=90, va="center")
        whole.tick_params(length=0, labelsize=9)
        right.colorbar(picture, ax=whole, fraction=0.045, pad=0.03)
        right.suptitle(f"D, {deconv.shape[0]} x {deconv.shape[0]}: {name}, {height}x{width}", fontsize=11)


def draw_whitening(layer: FastDeconv, name: str, x: Tensor, path: Path | str, note: str = "") -> None:
    """A layer's input patches before and after whitening: values, correlations, eigenvalues of the covariance.

    Args:
        layer: of a grouped convolution the first block of the first group is shown.
        name: for the title.
        x: the layer's input (N, C, H, W).
        path: of the picture.
        note: more for the title, such as where the images come from.

    Raises:
        UserError: the path cannot be written.
    """
    before, after = whitened(layer, x)
    height, width = _size(layer)
    facts = f"{height}x{width}, {layer.in_channels} to {layer.out_channels} channels, block {layer.block}"
    size = f"{before.shape[1]:,} patches of {before.shape[0]} values"
    with figure(path, (14.5, 7.2)) as drawn:
        axes = drawn.subplot_mosaic([["values", "before", "spectrum"], ["white", "after", "spectrum"]])
        _histogram(axes["values"], before, "Values before", _BEFORE)
        _histogram(axes["white"], after, "Values after", _AFTER)
        first, second = _covariance(before), _covariance(after)
        for place, matrix in (("before", first), ("after", second)):
            picture = axes[place].imshow(_correlation(matrix), cmap="RdBu_r", vmin=-1, vmax=1)
            axes[place].set_facecolor("0.8")
            axes[place].set(title=f"Correlation {place}: {_strength(matrix)}", xticks=[], yticks=[])
        drawn.colorbar(picture, ax=[axes["before"], axes["after"]], fraction=0.05, pad=0.02)
        _spectrum(axes["spectrum"], first, second)
        drawn.suptitle(f"{name} ({facts}): {size}{f', {note}' if note else ''}", fontsize=11)


def whitened(layer: FastDeconv, x: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The layer's patches (F, rows) of an input (N, C, H, W), as they are and as (patch - mean) D, float64.

    Of a grouped convolution those of the first block. At most 100,000 rows, evenly spread.
    """
    padded, padding = layer.pad(x)
    found = layer.patches(padded, padding)
    found = found if found.ndim == 2 else found[0]
    patches = found[:, :: -(-found.shape[1] // _MOST_ROWS)].double().cpu().numpy()
    mean = layer.running_mean[: patches.shape[0]].double().cpu().numpy()
    return patches, _deconv(layer) @ (patches - mean[:, None])


def _deconv(layer: FastDeconv) -> NDArray[np.float64]:
    deconv = layer.deconv() if layer.deconv().ndim == 2 else layer.deconv()[0]
    found: NDArray[np.float64] = deconv.double().cpu().numpy()
    return found


def _size(layer: FastDeconv) -> tuple[int, int]:
    return int(layer.kernel_size[0]), int(layer.kernel_size[1])


def _covariance(patches: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.atleast_2d(np.cov(patches, bias=True))


def _correlation(covariance: NDArray[np.float64]) -> Any:
    """Correlations; those of a feature that does not vary are masked."""
    deviation = np.sqrt(np.diag(covariance))
    product = np.outer(deviation, deviation)
    known = product > 1e-12 * max(float(product.max()), 1e-300)
    return np.ma.masked_invalid(np.divide(covariance, product, out=np.full_like(product, np.nan), where=known))


def _strength(covariance: NDArray[np.float64]) -> str:
    """The mean size of the correlations of different features."""
    found = np.ma.abs(_correlation(covariance))
    np.fill_diagonal(found, np.ma.masked)
    return f"mean size {found.mean():.3f}" if found.count() else "a single feature"


def _histogram(axes: Axes, patches: NDArray[np.float64], title: str, color: str) -> None:
    values = patches.ravel()[:: -(-patches.size // _MOST_VALUES)]
    axes.hist(values, bins=120, density=True, color=color)
    axes.set_yscale("log")
    axes.set(title=f"{title}: mean {values.mean():.2g}, deviation {values.std():.2g}", ylabel="density")
    axes.grid(alpha=0.3)


def _spectrum(axes: Axes, before: NDArray[np.float64], after: NDArray[np.float64]) -> None:
    for matrix, name, color in ((before, "before", _BEFORE), (after, "after", _AFTER)):
        values = np.linalg.eigvalsh(matrix)[::-1]
        values = np.maximum(values, 1e-9 * values[0])  # below lies rounding
        label = f"{name}: largest / median {values[0] / np.median(values):.3g}"
        axes.plot(range(1, len(values) + 1), values, color=color, label=label, marker="." if len(values) < 60 else None)
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set(title="Eigenvalues of the covariance", xlabel="number, the largest first")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)

"""Plots that know no task: curves of several runs, bars of class scores, a confusion matrix.

Scores are 0 to 1 and shown in percent. What is drawn goes to a path, whole or not at all.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import glyphs
from engine.errors import UserError
from engine.images import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

Record = Mapping[str, Any]
"""A row of a metrics.jsonl: "step", and "loss" or "score" (0 to 1)."""

_RUN_COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#17becf")
_MOST_CELLS = 40
"""Classes up to which a confusion matrix has room for a number in each cell."""
_MOST_NAMES = 120
"""Classes up to which it has room for their names."""


@contextmanager
def figure(path: Path | str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` inches (width, height) that is saved to `path` on leaving; pyplot's state is not touched.

    Raises:
        UserError: a file ending that is no picture's, or a path that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.text import Text

    kind = Path(path).suffix.lstrip(".") or "png"
    if kind not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"{path}: cannot draw a .{kind} file; choose .png, .pdf or .svg")
    drawn = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    yield drawn
    every: list[Any] = drawn.findobj(Text)
    for text in every:  # a name of a file need not be text, which matplotlib can't draw then
        text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())
    legends: list[Any] = drawn.findobj(Legend)  # those below all axes, too
    for text in (*(axes.title for axes in drawn.axes), *(text for legend in legends for text in legend.get_texts())):
        text.set_parse_math(False)  # a name with dollar signs is no formula
    data = io.BytesIO()
    glyphs.save(drawn, data, format=kind)
    write_bytes(path, data.getvalue())


def curves(
    score: Axes | None,
    loss: Axes | None,
    runs: Sequence[tuple[str, Sequence[Record]]],
    title: str,
    *,
    x: str = "step",
    xlabel: str = "",
    colors: Sequence[str] = (),
    best: bool = True,
) -> None:
    """Scores and training losses of several runs.

    Args:
        score, loss: where to draw; None leaves that one out.
        runs: name and records of each; a run without a name gets no line in the legend.
        title: of the scores.
        x: key of the records for the horizontal axis; records without it are left out.
        xlabel: its label, `x` by default.
        colors: of each run; by default one after the other.
        best: write each run's highest score beside its name.
    """
    for (name, rows), color in zip(runs, colors or cycle(len(runs)), strict=True):
        shown = in_legend(name)
        points = [(r[x], 100 * r["score"]) for r in rows if finite(r.get("score")) and finite(r.get(x))]
        losses = [(r[x], r["loss"]) for r in rows if finite(r.get("loss")) and finite(r.get(x))]
        if score is not None:
            best_of_all = f", best {max(y for _, y in points):.1f}" if best and points else ""
            label = shown + best_of_all if name else None
            score.plot(*columns(points), color=color, marker="o", markersize=3, label=label)
        if loss is not None:
            dot = "o" if len(losses) < 3 else None  # a line of one point is invisible without a marker
            loss.plot(*columns(losses), color=color, linewidth=1.2, marker=dot, markersize=3, label=shown or None)
    if score is not None:
        score.set(ylabel="%", title=title)
    if loss is not None:
        loss.set(title="Training loss")
    for axes in (each for each in (score, loss) if each is not None):
        _finish(axes, x, xlabel, legend=any(name for name, _ in runs))


def whole_numbers() -> Locator:
    """Ticks for an axis of steps or epochs."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _finish(axes: Axes, x: str, xlabel: str, legend: bool) -> None:
    axes.set_xlabel(xlabel or x)
    axes.grid(alpha=0.3)
    axes.set_xlim(0, axes.get_xlim()[1] if axes.lines else None)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1] if axes.lines else None)
    if x == "step":
        axes.xaxis.set_major_locator(whole_numbers())
    if legend:
        axes.legend(fontsize=8)


def in_legend(name: str) -> str:
    """matplotlib leaves names that begin with an underscore out of its legends."""
    return f" {name}" if name.startswith("_") else name


def bars(axes: Axes, runs: Mapping[str, Mapping[str, float | None]], classes: Sequence[str], title: str) -> None:
    """Horizontal bars of class scores (None or nan: nothing to score), the first class and the first run on top."""
    height = 0.8 / max(1, len(runs))
    for i, ((name, scores), color) in enumerate(zip(runs.items(), cycle(len(runs)), strict=True)):
        values = [100 * (math.nan if (score := scores.get(c)) is None else score) for c in classes]
        known = [v for v in values if math.isfinite(v)]
        mean = f"mean {sum(known) / len(known):.1f}" if known else "no scores"
        places = np.arange(len(classes)) + (i - (len(runs) - 1) / 2) * height
        axes.barh(
            places,
            np.nan_to_num(values),
            height * 0.92,
            color=color,
            label=f"{in_legend(name)}: {mean}" if name else mean,
        )
        for y, value in zip(places, values, strict=True):
            words = f"{value:.1f}" if math.isfinite(value) else "–"
            axes.text((value if math.isfinite(value) else 0) + 1, y, words, va="center", fontsize=6.5, color="0.3")
    axes.set_yticks(range(len(classes)), classes, fontsize=8, parse_math=False)
    axes.set(xlim=(0, 108), ylim=(len(classes) - 0.4, -0.6), title=title)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    across = min(100 // (20 + max(map(len, runs), default=0)) or 1, len(runs) or 1)  # have room beside each other
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=across, frameon=False)


def plot_confusion(matrix: Any, names: Sequence[str], path: Path | str, title: str = "") -> None:
    """Confusion matrix (K, K) of counts, true class by row, each row as percent of it; a class without any is grey.

    With more than 40 classes no numbers are written and small shares are drawn darker than they are, with more than 120
    the classes are numbered. Raises ValueError if `names` are not K, UserError as `figure`.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"matrix {counts.shape} does not go with {len(names)} names")
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    numbers = len(names) <= _MOST_CELLS
    side = 2.2 + 0.38 * len(names) if numbers else 3.2 + 0.11 * min(len(names), _MOST_NAMES)
    with figure(path, (side + 0.6, side)) as drawn:
        axes = drawn.add_subplot()
        axes.set_facecolor("0.88")
        picture = axes.imshow(np.ma.masked_invalid(share), cmap="Blues", norm=_color_scale(numbers))
        for row, column in np.argwhere(share >= 0.005) if numbers else []:
            value = share[row, column]
            color = "white" if value > 0.5 else "0.15"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
        if len(names) <= _MOST_NAMES:
            axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
            axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.tick_params(length=0, labelsize=8 if numbers else 6)
        axes.set(xlabel="predicted", ylabel="true", title=title or "Confusion, % of the true class")
        drawn.colorbar(
            picture,
            ax=axes,
            fraction=0.045,
            pad=0.02,
            ticks=None if numbers else [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1],
            format=lambda x, _: f"{100 * x:.0f} %",
        )


def _color_scale(linear: bool) -> Any:
    """From 0 to 1. A few percent among thousands of cells are seen only where the scale rises faster at its start."""
    from matplotlib.colors import Normalize, PowerNorm

    return Normalize(0, 1) if linear else PowerNorm(0.5, 0, 1)


def records(metrics: Path | str | Sequence[Record]) -> list[Record]:
    """The records of a metrics.jsonl, or the given ones. Raises UserError if the file is missing or empty."""
    if not isinstance(metrics, (str, Path)):
        return list(metrics)
    from engine.report import read_metrics

    rows: list[Record] = [*read_metrics(metrics)]
    if not rows:
        raise UserError(f"{metrics}: missing or without records; the metrics.jsonl of a run is expected here.")
    return rows


def cycle(count: int) -> list[str]:
    """Colours of `count` runs, of up to 200 no two alike."""
    if count <= len(_RUN_COLORS):
        return list(_RUN_COLORS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(color) for color in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points as the lists x and y that `Axes.plot` takes."""
    return [x for x, _ in points], [y for _, y in points]


def finite(value: Any) -> bool:
    """Whether this is a number, and neither infinite nor nan."""
    return isinstance(value, (int, float)) and math.isfinite(value)

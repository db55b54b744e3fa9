"""Several classification runs in one picture: accuracy over steps and over training time, loss, class accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import plots, runs
from engine.errors import UserError
from engine.report import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 20
"""Classes up to which their accuracies are drawn."""

_UNITS = (("h", 3600), ("min", 60), ("s", 1))


def compare(folders: Sequence[Path], names: Sequence[str], picture: Path) -> str:
    """Draw `picture` and return a table: run, best top-1, the step of it, last top-1, training seconds.

    The class accuracies are those of each run's best evaluation. Training time is that of the steps, without
    evaluations and checkpoints.

    Raises:
        UserError: a folder that holds no run, or one without an evaluation; two runs of one name; a picture that can't
            be written.
    """
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called the same, {', '.join(names)}; give each a name with --names")
    best = [runs.best_evaluation(folder) for folder in folders]
    rows = [runs.timed(read_metrics(folder / METRICS), int(runs.config(folder)["batch_size"])) for folder in folders]
    _draw(
        picture, list(zip(names, rows, strict=True)), {n: _accuracies(row) for n, row in zip(names, best, strict=True)}
    )
    width = max(3, *(len(name) for name in names))
    lines = [f"{'run':<{width}}  best top-1  at step  last top-1  training"]
    for name, folder, top, found in zip(names, folders, best, rows, strict=True):
        score = runs.last_evaluation(folder)["score"]
        last = "not finite" if score is None else f"{100 * score:.2f}%"
        seconds = f"{found[-1]['seconds']:.0f} s" if "seconds" in found[-1] else "-"
        figures = f"{100 * top['score']:>9.2f}%  {top['step']:>7}  {last:>10}  {seconds:>8}"
        lines.append(f"{name:<{width}}  {figures}")
    return "\n".join([*lines, f"drawn in {picture}"])


def while_training(axes: Axes, rows: Sequence[runs.Row], color: str, x: str) -> None:
    """A thin line of the accuracy on the training batches, over the key `x` of the rows."""
    found = [(row[x], 100 * row["parts"]["top1"]) for row in rows if plots.finite(row.get("parts", {}).get("top1"))]
    axes.plot(*plots.columns(found), color=color, linewidth=0.8, alpha=0.5)


def _accuracies(row: dict[str, Any]) -> dict[str, float | None]:
    scalars = row.get("scalars", {})
    return {key.removeprefix("accuracy/"): value for key, value in scalars.items() if key.startswith("accuracy/")}


def _draw(
    picture: Path, shown: list[tuple[str, list[runs.Row]]], accuracies: dict[str, dict[str, float | None]]
) -> None:
    classes = list(dict.fromkeys(name for found in accuracies.values() for name in found))
    wide = not 0 < len(classes) <= MOST_BARS
    tall = 4.2 if wide else max(8.0, 1.2 + len(classes) * (0.12 + 0.1 * len(shown)))
    layout: list[Any] = [["steps", "time", "loss"]] if wide else [["steps", "bars"], ["time", "bars"], ["loss", "bars"]]
    longest = max((row["seconds"] for _, rows in shown for row in rows if "seconds" in row), default=0.0)
    unit, size = next((each for each in _UNITS if longest >= 2 * each[1]), _UNITS[-1])
    clocked = [
        (name, [{**row, "time": row["seconds"] / size} for row in rows if "seconds" in row]) for name, rows in shown
    ]
    with plots.figure(picture, (15, tall) if wide else (13, tall)) as figure:
        axes = figure.subplot_mosaic(layout)
        for (_, rows), (_, timed), color in zip(shown, clocked, plots.cycle(len(shown)), strict=True):
            while_training(axes["steps"], rows, color, "step")
            while_training(axes["time"], timed, color, "time")
        title = "Top-1 accuracy on the validation split\n(thin: on training batches)"
        plots.curves(axes["steps"], axes["loss"], shown, title)
        title = "The same over training time"
        plots.curves(axes["time"], None, clocked, title, x="time", xlabel=f"training time, {unit}")
        if not wide:
            plots.bars(axes["bars"], accuracies, classes, "Class accuracy, %")

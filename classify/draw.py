"""Pictures of a classifier's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from classify.scores import Mistake
from engine.plots import bars, figure


def plot_class_accuracy(accuracies: Mapping[str, float | None], path: Path | str) -> None:
    """Bars of the classes' accuracies (0 to 1; None: a class without images)."""
    with figure(path, (7, 1.4 + 0.29 * len(accuracies))) as drawing:
        bars(drawing.add_subplot(), {"": accuracies}, list(accuracies), "Class accuracy, %")


def plot_mistakes(mistakes: Sequence[Mistake], classes: Sequence[str], path: Path | str, columns: int = 6) -> None:
    """The images with the predicted class, its probability and the true class, the surest mistake first."""
    rows = -(-len(mistakes) // columns)
    with figure(path, (1.9 * columns, 2.25 * rows + 0.4)) as drawing:
        grid = drawing.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, one in zip(grid.flat, mistakes, strict=False):
            pixels = one.image.movedim(0, -1).numpy()
            axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
            predicted = f"{classes[one.predicted]} {100 * one.probability:.0f} %"
            axes.set_title(f"{predicted}\ntrue: {classes[one.true]}", fontsize=8)
        drawing.suptitle("The surest mistakes")

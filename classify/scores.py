"""What was counted on a split: accuracies, confusion, the surest mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

MOST_CLASSES = 100
"""Data sets with more classes get no confusion matrix and no bars drawn."""


@dataclass(frozen=True)
class Mistake:
    """A wrongly classified image."""

    image: Tensor
    """As the network saw it, without the normalisation: float32 (C, H, W) in [0, 1]."""
    name: str
    true: int
    predicted: int
    probability: float
    """Of the predicted class."""


@dataclass(frozen=True)
class Scores:
    """What was counted on a split."""

    classes: tuple[str, ...]
    matrix: Tensor
    """int64 (K, K): images of the true class (row) for which the predicted class (column) was first."""
    hits5: int
    """Images whose true class was among the first five."""
    loss_sum: float
    mistakes: list[Mistake] = field(default_factory=list)
    """The surest ones of all processes, the surest first."""
    problems: tuple[str, ...] = ()
    """Images that could not be read and were left out, as `path: why`."""

    @property
    def images(self) -> int:
        return int(self.matrix.sum())

    @property
    def top1(self) -> float:
        """Share of images whose first class is the true one."""
        return int(self.matrix.trace()) / max(self.images, 1)

    @property
    def top5(self) -> float | None:
        """Share of images with the true class among the first five; None for five classes or fewer."""
        return self.hits5 / max(self.images, 1) if len(self.classes) > 5 else None

    @property
    def loss(self) -> float:
        """Mean loss, without label smoothing."""
        return self.loss_sum / max(self.images, 1)

    def accuracies(self) -> dict[str, float | None]:
        """The share of right answers for each class; None for a class without images."""
        counts = self.matrix.sum(1).tolist()
        hits = self.matrix.diagonal().tolist()
        return {name: h / n if n else None for name, h, n in zip(self.classes, hits, counts, strict=True)}

    def scalars(self) -> dict[str, float]:
        """The numbers by TensorBoard tag; class accuracies where there are few classes."""
        found = {"top1": self.top1, "loss": self.loss, **({} if self.top5 is None else {"top5": self.top5})}
        if len(self.classes) <= MOST_CLASSES:
            found.update({f"accuracy/{k}": v for k, v in self.accuracies().items() if v is not None})
        return found

    def line(self) -> str:
        """One line: accuracies, loss, images, and how many were left out."""
        five = "" if self.top5 is None else f"  top-5 {100 * self.top5:.2f} %"
        left_out = f", {len(self.problems)} unreadable ones left out" if self.problems else ""
        return f"top-1 {100 * self.top1:.2f} %{five}  loss {self.loss:.4f}  ({self.images} images{left_out})"

    def table(self) -> str:
        """A line for each class, its accuracy and what it is most often taken for; then `line`."""
        width = max(len(name) for name in self.classes)
        rows = [f"{'class':<{width}}  accuracy  images  most often taken for"]
        off = self.matrix.clone().fill_diagonal_(0)
        for i, (name, share) in enumerate(self.accuracies().items()):
            worst = int(off[i].argmax())
            taken = f"{self.classes[worst]} ({int(off[i, worst])})" if off[i, worst] else "-"
            shown = "-" if share is None else f"{100 * share:.2f} %"
            rows.append(f"{name:<{width}}  {shown:>8}  {int(self.matrix[i].sum()):>6}  {taken}")
        return "\n".join([*rows, self.line()])

    def to_json(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images": self.images,
            "class_accuracy": self.accuracies(),
            "confusion": self.matrix.tolist(),
            "classes": list(self.classes),
            "unreadable": list(self.problems),
        }


def left_out(problems: Sequence[str], most: int = 10) -> list[str]:
    """The images that were left out, in a few lines; none without any."""
    if not problems:
        return []
    more = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    head = f"{len(problems)} unreadable image{'s' if len(problems) > 1 else ''} left out (data.on_error=skip):"
    return [head, *(f"  {problem}" for problem in problems[:most]), *more]

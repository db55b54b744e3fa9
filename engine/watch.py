"""Sums of the loss, kept on the device until the log is written, and the stop when they are not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import distributed
from engine.errors import UserError

NAN_FILE = "nan_batch.json"


class Seen(NamedTuple):
    """A step since the last check."""

    step: int
    names: list[list[str]]  # file names, for each micro-batch of this process
    local: list[Tensor]  # loss of each of them, on the device
    total: Tensor  # loss of the step over all processes, on the device


class Means(NamedTuple):
    loss: float
    parts: dict[str, float]
    empty: bool
    """Whether there was no valid element at all; the means are 0 then."""


class Watch:
    """Collects steps; `check` and `means` are the only places where the device is waited for."""

    def __init__(self, work_dir: str | Path) -> None:
        self._file = Path(work_dir) / NAN_FILE
        self._seen: list[Seen] = []
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | None = None

    def add(self, seen: Seen, weight: Tensor, parts: dict[str, Tensor]) -> None:
        """Add a step: sums over all processes, 0-d float64 on the device."""
        self._seen.append(seen)
        self._weight = weight if self._weight is None else self._weight + weight
        for name, value in {"": seen.total, **parts}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def check(self, *, advice: str) -> None:
        """Look at the losses so far.

        Raises:
            UserError: one was not finite; the names of its batch are then in `nan_batch.json`, and `advice` ends the
                message.
        """
        if self._seen and not math.isfinite(self._sums[""].item()):
            raise UserError(f"{self._report()}; {advice}")
        self._seen = []

    def means(self, *, advice: str) -> Means | None:
        """`check`, then mean loss and parts over the steps since the last call, or None if there were none."""
        self.check(advice=advice)
        if self._weight is None:
            return None
        weight, *values = torch.stack([self._weight, *self._sums.values()]).tolist()
        names = list(self._sums)
        means = [value / weight if weight else 0.0 for value in values]
        self._sums, self._weight = {}, None
        return Means(means[0], dict(zip(names[1:], means[1:], strict=True)), weight == 0)

    def unreported(self) -> dict[str, float] | None:
        """The sums since the last `means`, for `restore`: "weight" of the elements, "sum/" of the loss, "sum/NAME" of a
        part. Waits for the device."""
        if self._weight is None:
            return None
        return {"weight": self._weight.item(), **{f"sum/{name}": one.item() for name, one in self._sums.items()}}

    def restore(self, sums: Mapping[str, float] | None) -> None:
        """Go on from what `unreported` gave, so that a resumed run logs the mean that an uninterrupted one would."""
        if sums is not None:
            values = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
            self._weight = values.pop("weight")
            self._sums = {name.removeprefix("sum/"): value for name, value in values.items()}

    def _report(self) -> str:
        bad = next((one for one in self._seen if not math.isfinite(one.total.item())), self._seen[-1])
        mine = [
            {"rank": distributed.rank(), "names": names, "loss": str(loss.item()), "finite": math.isfinite(loss.item())}
            for names, loss in zip(bad.names, bad.local, strict=True)
        ]
        batches = [batch for batches in distributed.gather(mine) for batch in batches]
        told = f"the loss became {bad.total.item()} at step {bad.step}"
        if distributed.is_main():
            content = {
                "step": bad.step,
                "loss": str(bad.total.item()),
                "not_finite": [batch for batch in batches if not batch["finite"]],
                "batches": batches,
            }
            try:
                self._file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                return f"{told} (and its batch could not be written to {self._file}: {error.strerror})"
        return f"{told}; the files of its batch are listed in {self._file}"


def check_finite(model: nn.Module, what: str) -> None:
    """Wait for the device and look at all weights and buffers.

    Raises:
        UserError: one of them is not finite; it is named.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if not tensors:
        return
    flags = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    bad = [name for name, fine in zip(tensors, flags, strict=True) if not fine]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{what}: {bad[0]}{more} holds values that are not finite")

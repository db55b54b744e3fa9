"""What a work directory tells of its run, read back: configuration, evaluations, training time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine import checkpoint
from engine.errors import UserError
from engine.report import METRICS, read_metrics
from engine.resume import BEST, CONFIG, LAST

Row = dict[str, Any]


def config(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run as plain containers, with at least "task" and "batch_size".

    Taken from config.yaml, or from a checkpoint where that is missing.

    Raises:
        UserError: the folder holds no run, or its config is not one.
    """
    path = run / CONFIG
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        path = next((run / name for name in (BEST, LAST) if (run / name).exists()), path)
        if path.name == CONFIG:
            raise UserError(
                f"{run}: no run in this folder (no {CONFIG}, {BEST} or {LAST}); expected the work directory of "
                "tools/train.py"
            ) from None
        found = checkpoint.load(path)["config"]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read the config of this run: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not {"task", "batch_size"} <= found.keys():
        raise UserError(f"{path}: not the resolved config of a run (it has no task or no batch_size)")
    return found


def other_data(runs: Sequence[Path]) -> list[str]:
    """A sentence for each run whose config names other data to score than the first one's: a difference of scores may
    be one of the data."""
    lines = []
    first, *others = [config(run).get("data") or {} for run in runs]
    for run, here in zip(runs[1:], others, strict=True):
        keys = ("name", "root", "labels", "val_split")
        found = [f"data.{key}: {first.get(key)} and {here.get(key)}" for key in keys if first.get(key) != here.get(key)]
        if found:
            lines.append(f"note: {runs[0]} and {run} name different data to score ({'; '.join(found)})")
    return lines


def evaluations(run: Path) -> list[Row]:
    """The evaluations of a run, in order; those without a score are left out."""
    return [row for row in read_metrics(run / METRICS) if row.get("kind") == "eval" and row.get("score") is not None]


def last_evaluation(run: Path) -> Row:
    """The last one; without a score where the network's outputs were not finite. Raises UserError as `scored`."""
    scored(run)
    return [row for row in read_metrics(run / METRICS) if row.get("kind") == "eval"][-1]


def scored(run: Path) -> list[Row]:
    """As `evaluations`. Raises UserError if there is none."""
    rows = evaluations(run)
    if not rows:
        raise UserError(
            f"{run}: no evaluation in {run / METRICS}; expected the work directory of a run that was scored"
        )
    return rows


def best_evaluation(run: Path) -> Row:
    """The evaluation with the highest score, the first of equal ones. Raises UserError if there is none."""
    return max(scored(run), key=lambda row: float(row["score"]))


def timed(rows: Sequence[Row], images_per_step: int) -> list[Row]:
    """The rows with their training time as "seconds", from the speeds that were logged.

    Evaluations and checkpoints take no training time, and a break between two starts of a run none either. Between two
    logged speeds the time is interpolated. Rows that log no speed at all come back without "seconds".
    """
    steps, seconds = [0.0], [0.0]
    for row in rows:
        speed = row.get("images_per_second")
        if row.get("kind") == "train" and speed and row["step"] > steps[-1]:
            seconds.append(seconds[-1] + (row["step"] - steps[-1]) * images_per_step / speed)
            steps.append(row["step"])
    if len(steps) == 1:
        return list(rows)
    last = max(steps[-1], *(row["step"] for row in rows))  # an evaluation of a run that goes on while it is looked at
    pace = (seconds[-1] - seconds[-2]) / (steps[-1] - steps[-2])
    steps.append(last + 1)
    seconds.append(seconds[-1] + (last + 1 - steps[-2]) * pace)
    return [{**row, "seconds": float(np.interp(row["step"], steps, seconds))} for row in rows]

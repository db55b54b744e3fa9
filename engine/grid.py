"""A grid of trainings, each a run in a folder of its own: what is known of each, what is missing, and doing that.

What is finished is read from the work directories, what is not goes on there: a grid that was stopped goes on where it
was.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from engine import runs, yaml_layers
from engine.config import Length, Loaded
from engine.errors import UserError
from engine.optim import other_length
from engine.report import METRICS, read_metrics
from engine.resume import BEST, BOUND, ENDED, LAST, complete, differences

_LONGEST_REASON = 140


class Cell(Protocol):
    """One training of a grid."""

    @property
    def key(self) -> Hashable:
        """Tells it from the others."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def run(self) -> Path:
        """Its work directory."""

    @property
    def loaded(self) -> Loaded[Any]:
        """Its configuration."""


C = TypeVar("C", bound=Cell)


@dataclass(frozen=True)
class Variant:
    """A norm and further keys of the config."""

    text: str
    """As it was asked for: NAME, or NAME:key=value,key=value."""
    overrides: tuple[str, ...]
    slug: str
    """The text, fit for a folder's name."""


@dataclass(frozen=True)
class Outcome(Generic[C]):
    """What is known of a cell. Scores are shares (0 to 1)."""

    cell: C
    state: Literal["done", "partly", "open", "failed"]
    reason: str = ""
    """Why it failed."""
    epoch: float = 0.0
    """Epochs that are logged."""
    step: int = 0
    last: float | None = None
    """Score after the last step."""
    scalars: Mapping[str, Any] = field(default_factory=dict)
    """All that was scored then."""
    best: float | None = None
    """The highest score of all evaluations."""
    best_step: int | None = None
    seconds: float | None = None
    """Of training, without evaluations and checkpoints."""
    memory: int | None = None
    """Peak in bytes: of the GPU, or of the process without one."""
    parameters: int | None = None


def variant(text: str, option: str, check: Callable[[str, Sequence[str]], None]) -> Variant:
    """The variant that a text names; `check` looks at its keys.

    Raises:
        UserError: it is neither NAME nor NAME:key=value.
    """
    name, colon, rest = text.partition(":")
    keys = split_keys(rest) if colon else []
    if not name or any("=" not in key for key in keys):
        raise UserError(f"{option}: found {text!r}, expected NAME or NAME:key=value[,key=value], as bn:optim.lr=0.02")
    check(f"{option}: {text}", keys)
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")
    return Variant(text, (f"norm.name={name}", *(key.strip() for key in keys)), slug)


def split_keys(text: str) -> list[str]:
    """`key=value,key=value` at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def owned(overrides: Sequence[str], own: Mapping[str, str]) -> str | None:
    """The first of the keys `own` that a change to the config sets, by itself or with its whole section."""
    for path, _ in yaml_layers.leaves(yaml_layers.parse_overrides(overrides)):
        key = ".".join(path)
        if found := next((one for one in own if f"{one}.".startswith(f"{key}.")), None):
            return found
    return None


def refuse(overrides: Sequence[str], own: Mapping[str, str]) -> None:
    """Raises UserError if a change to the config sets one of the keys `own`, with the reason that stands there."""
    if key := owned(overrides, own):
        raise UserError(f"key=value: {key} cannot be set: {own[key]}; leave it out")


def check_distinct(option: str, given: Sequence[Any]) -> None:
    """Raises UserError if something is there twice."""
    if twice := [str(one) for one in dict.fromkeys(given) if list(given).count(one) > 1]:
        raise UserError(f"{option}: {', '.join(twice)} is there twice")


def look(cell: C) -> Outcome[C]:
    """What a cell's work directory says.

    Raises:
        UserError: it holds a run of another configuration.
    """
    length = cell.loaded.config.length
    scored = runs.evaluations(cell.run)
    key = length.unit.removesuffix("s")
    final = next((row for row in scored if row[key] >= length.value), None)
    if final is None and not any((cell.run / name).exists() for name in (LAST, BEST)):
        return Outcome(cell, "open")
    stored = runs.config(cell.run)
    asked = cell.loaded.config.model_dump(mode="json")
    wrong = differences(complete(stored, type(cell.loaded.config)), asked, BOUND if final is None else ENDED)
    if final is None and (note := _other_schedule(cell, Length.parse(stored["length"]))):
        wrong.append(note)
    if final is not None:
        was = Length.parse(stored["length"])
        if scored[-1]["step"] > final["step"] or (was.unit == length.unit and was.value > length.value):
            wrong.append(
                f"length: was {was}, now {length}, and the middle of a longer schedule is not the end of this one"
            )
    if wrong:
        raise UserError(
            f"{cell.run}: was trained with another configuration:\n  " + "\n  ".join(wrong) + "\n  give the same "
            "settings, or choose another --out"
        )
    everything = read_metrics(cell.run / METRICS)
    ended = [row for row in everything if row.get("kind") == "eval" and row[key] >= length.value]
    if final is None and ended:
        return Outcome(cell, "failed", reason="the outputs of its last evaluation are not finite, so it has no score")
    rows = runs.timed(everything, int(stored["batch_size"]))
    reached: dict[str, Any] = max(rows, key=lambda row: row["step"], default={})
    top = runs.best_evaluation(cell.run) if scored else None
    return Outcome(
        cell,
        "partly" if final is None else "done",
        epoch=reached.get("epoch", 0.0),
        step=reached.get("step", 0),
        last=None if final is None else float(final["score"]),
        scalars={} if final is None else final["scalars"],
        best=None if top is None else float(top["score"]),
        best_step=None if top is None else top["step"],
        seconds=reached.get("seconds"),
        memory=max((row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row), default=None),
    )


def _other_schedule(cell: Cell, was: Length) -> str | None:
    """What to say where a training that has begun with the length `was` would end with another schedule than a new one
    has; None if not, or if it has logged nothing yet."""
    row = next((row for row in read_metrics(cell.run / METRICS) if row.get("epoch")), None)
    per_epoch = 1 if row is None else round(row["step"] / row["epoch"])
    optim, now = cell.loaded.config.optim, cell.loaded.config.length
    if (row is None and was.unit != now.unit) or not other_length(optim, was, now, per_epoch):
        return None
    return f"length: was {was}, now {now}, and the {optim.schedule} schedule of a new one is another"


def listing(todo: Sequence[C]) -> str:
    """Every cell, whether it is done, and where it is. Raises UserError as `look`."""
    lines = []
    for cell in todo:
        found = look(cell)
        done = {"done": f"done, {100 * (found.last or 0):.2f} %", "partly": f"partly, epoch {found.epoch:.2f}"}
        lines.append(f"{cell.name}: {done.get(found.state, found.state)}  {cell.run}")
    return "\n".join(lines)


def train_missing(
    todo: Sequence[C],
    known: MutableMapping[Any, Outcome[C]],
    train: Callable[[C], tuple[Outcome[C], bool]],
    write: Callable[[], None],
    say: Callable[[str], None],
) -> bool:
    """Train the cells that are not done.

    Args:
        todo: all cells.
        known: their outcomes by `key`, changed in place.
        train: trains a cell, or goes on with it; the outcome and whether a signal stopped it.
        write: called before the first and after each cell.
        say: gets a line for each.

    Returns:
        Whether a signal stopped it.
    """
    write()
    for number, cell in enumerate(todo, 1):
        if known[cell.key].state == "done":
            continue
        say(f"\n[{number}/{len(todo)}] {cell.name}: {cell.run}")
        known[cell.key], stopped = train(cell)
        write()
        if stopped:
            return True
    return False


def summary(known: Mapping[Any, Outcome[C]], table: Path) -> str:
    """What a grid that was not stopped ends with, also when there was nothing left to train."""
    done = sum(one.state == "done" for one in known.values())
    return f"\n{done} of {len(known)} cells are trained: {table}"


def mean_and_deviation(shares: Sequence[float]) -> str:
    """Of scores, in percent."""
    mean = f"{100 * statistics.fmean(shares):.2f}"
    return mean if len(shares) < 2 else f"{mean} ± {100 * statistics.stdev(shares):.2f}"


def short(reason: str) -> str:
    """What happened, for a cell of a table, without the advice after it."""
    flat = reason.partition("; ")[0]
    return flat if len(flat) <= _LONGEST_REASON else flat[: _LONGEST_REASON - 3] + "..."


def table_row(words: Sequence[str]) -> str:
    """A line of a Markdown table; a bar in a word, such as that of a pattern with two layers, stays in its cell."""
    return "| " + " | ".join(word.replace("|", r"\|") for word in words) + " |"


def table_head(words: Sequence[str], left: int = 1) -> list[str]:
    """The first two lines of a Markdown table whose columns, but for the first `left`, hold numbers."""
    return [table_row(words), table_row(["---"] * left + ["---:"] * (len(words) - left))]

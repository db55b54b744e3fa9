"""The norm lab: one config trained with every norm and every micro-batch, and what that gives and costs.

By default the global batch, and with it the steps and the learning rate, stays the config's, and gradients are
accumulated: cells differ in nothing but what the norm sees at once. With `whole` the micro-batch is the global batch,
and optim.lr is scaled with it, linearly (Goyal et al., arXiv 1706.02677, section 2.1).
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from engine import grid, plots
from engine.config import Loaded, Schema, load
from engine.errors import UserError
from engine.grid import Variant, table_head, table_row
from engine.images import write_bytes
from engine.signals import StopRequest

Key = tuple[str, int, int]
"""The norm's slug, micro-batch, seed."""
_OWN = {"norm.name": "--norms", "micro_batch": "--batch", "runtime.seed": "--seeds"}
_COUNTED = ("precise_batches", "calibrate_batches")
"""Numbers of micro-batches, under norm."""
_LOOK = 0.2  # seconds between two looks for a signal


@dataclass(frozen=True)
class Request:
    """The grid that is wanted."""

    config: Path
    norms: tuple[Variant, ...]
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    """Changes to the config of all cells."""
    folder: Path
    """Holds the lab's files, and a folder for each cell."""
    whole: bool
    """Whether the micro-batch is the global batch."""
    command: str
    """What the user typed."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    norm: Variant
    batch: int
    """Images that the norm sees at once."""
    seed: int
    run: Path
    loaded: Loaded[Any]
    arguments: tuple[str, ...]
    """What tools/train.py is started with."""

    @property
    def key(self) -> Key:
        return self.norm.slug, self.batch, self.seed

    @property
    def name(self) -> str:
        return f"{self.norm.text}, micro-batch {self.batch}, seed {self.seed}"


Outcome = grid.Outcome[Cell]
Outcomes = dict[Key, Outcome]


def request(
    config: Path,
    out: Path,
    *,
    norms: Sequence[str],
    batches: Sequence[int],
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    whole: bool = False,
    command: str = "",
) -> Request:
    """A grid as the user names its parts.

    Raises:
        UserError: a thing named twice, a norm that is not NAME or NAME:key=value, a micro-batch below 1, or a key that
            the lab sets itself.
    """
    columns = tuple(grid.variant(text, "--norms", _check_keys) for text in norms)
    for option, given in (("--norms", [one.slug for one in columns]), ("--batch", batches), ("--seeds", seeds)):
        grid.check_distinct(option, given)
    if wrong := [one for one in batches if one < 1]:
        raise UserError(f"--batch: found {wrong[0]}, expected at least 1")
    _check_keys("key=value", overrides)
    return Request(config, columns, tuple(sorted(batches)), tuple(seeds), tuple(overrides), out, whole, command)


def _check_keys(where: str, overrides: Sequence[str]) -> None:
    if key := grid.owned(overrides, _OWN):
        raise UserError(f"{where}: {key} differs from cell to cell; set it with {_OWN[key]}")


def cells(wanted: Request, schema: Schema[Any]) -> list[Cell]:
    """All cells, with their configs.

    Raises:
        UserError: a wrong config, or a batch that a micro-batch does not divide.
    """
    found = []
    for one in wanted.norms:
        for batch in wanted.batches:
            for seed in wanted.seeds:
                keys = [*wanted.overrides, *one.overrides, f"runtime.seed={seed}"]
                keys += _batch_keys(wanted, keys, batch, schema)
                run = wanted.folder / (f"{one.slug}_b{batch}" + (f"_seed{seed}" if seed else ""))
                loaded = load(wanted.config, keys, schema)
                loaded.config.split(1)
                arguments = (str(wanted.config), *keys, "--work-dir", str(run), "--resume", "auto")
                found.append(Cell(one, batch, seed, run, loaded, arguments))
    return found


def _batch_keys(wanted: Request, keys: Sequence[str], batch: int, schema: Schema[Any]) -> list[str]:
    base = load(wanted.config, keys, schema).config
    own, counts = base.micro_batch or base.batch_size, base.norm.model_dump(include=set(_COUNTED))
    more = [f"norm.{key}={-(-count * own // batch)}" for key, count in counts.items() if count]  # as many images
    if not wanted.whole:
        return [f"micro_batch={batch}", *more]
    if base.length.unit == "steps" and len(wanted.batches) > 1:
        raise UserError(
            f"--whole: the length of {wanted.config} is {base.length}, in which larger batches see more images; give "
            "it in epochs, such as length='30 epochs'"
        )
    rate = base.optim.lr * batch / base.batch_size
    return ["micro_batch=null", f"batch_size={batch}", f"optim.lr={rate!r}", *more]


def make(wanted: Request, schema: Schema[Any], program: Sequence[str]) -> bool:
    """Train what is missing, each cell by a process of its own, and write the lab's files after each.

    A cell that fails, even for want of memory, is named in the table and the next one is trained.

    Args:
        wanted: the grid.
        schema: see `engine.config.load`.
        program: the command that trains a config, to which a cell's arguments are added.

    Returns:
        False if a signal stopped it or a cell failed.

    Raises:
        UserError: as `cells` and `grid.look`, before anything is trained; a file that cannot be written.
    """
    todo = cells(wanted, schema)
    known = {cell.key: grid.look(cell) for cell in todo}
    with StopRequest() as stop:
        stopped = grid.train_missing(
            todo, known, partial(_train, program, stop), partial(write, wanted, known), partial(print, flush=True)
        )
    place = wanted.folder / "lab.md"
    print(f"stopped by a signal; the same command goes on. So far: {place}" if stopped else grid.summary(known, place))
    return all(one.state == "done" for one in known.values())


def _train(program: Sequence[str], stop: StopRequest, cell: Cell) -> tuple[Outcome, bool]:
    status, said = run_program([*program, *cell.arguments], stop)
    if status == 0 or stop.requested:
        found = grid.look(cell)
        if found.state in ("done", "failed") or stop.requested:
            return found, stop.requested
    return Outcome(cell, "failed", reason=_reason(status, said)), stop.requested


def _reason(status: int, said: Sequence[str]) -> str:
    if status < 0:
        return f"ended by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    told = next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "")
    return told.removeprefix("error: ").strip() or f"ended with status {status}"


def run_program(words: Sequence[str], stop: StopRequest, stream: TextIO | None = None) -> tuple[int, list[str]]:
    """Run a program; a requested stop is passed on to it.

    Args:
        words: the program and its arguments.
        stop: looked at while it runs.
        stream: gets what it writes to stderr; default: this process's.

    Returns:
        Its exit status (minus the signal that ended it) and the last lines of its stderr.
    """
    last: deque[str] = deque(maxlen=20)
    child = subprocess.Popen(list(words), stderr=subprocess.PIPE, text=True, errors="replace")

    def listen() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            last.append(line.rstrip("\n"))
            print(line, end="", file=stream or sys.stderr, flush=True)

    listener = Thread(target=listen, daemon=True)
    listener.start()
    told = False
    try:
        while True:
            if stop.requested and not told:
                child.terminate()  # it finishes its step and saves
                told = True
            try:
                status = child.wait(_LOOK)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    listener.join()
    return status, list(last)


def write(wanted: Request, known: Outcomes) -> None:
    """Write lab.md, lab.json and, once there is something to draw, lab.png. Raises UserError if that can't be done."""
    write_bytes(wanted.folder / "lab.md", markdown(wanted, known).encode())
    write_bytes(wanted.folder / "lab.json", (json.dumps(as_json(wanted, known), indent=1) + "\n").encode())
    if any(one.state == "done" for one in known.values()):
        draw(wanted, known)


def markdown(wanted: Request, known: Outcomes) -> str:
    """Score, step time and memory by micro-batch and norm, and under them the single runs."""
    size = next(iter(known.values())).cell.loaded.config.batch_size
    what = "the micro-batch is the global batch, optim.lr scaled with it" if wanted.whole else f"global batch {size}"
    lines = [f"# Norm lab: {wanted.config.name}, {what}", ""]
    seeds = f", mean ± standard deviation of the seeds {', '.join(map(str, wanted.seeds))}" if wanted.seeds[1:] else ""
    parts: list[tuple[str, Callable[[list[Outcome]], str]]] = [
        (f"Score after the last step, %{seeds}", _score),
        ("Seconds of a step, without evaluation (median of the runs)", lambda done: _middle(done, step_seconds)),
        ("Peak memory, GiB: of the GPU, or of the process without one", lambda done: _middle(done, _gib)),
    ]
    for title, cell in parts:
        lines += [f"## {title}", "", *table_head(["micro-batch", *(one.text for one in wanted.norms)], left=0)]
        for batch in wanted.batches:
            lines.append(table_row([str(batch), *(cell(_of(known, one, batch)) for one in wanted.norms)]))
        lines.append("")
    lines += ["## Runs", "", *_runs(known)]
    if wanted.command:
        lines += ["", "Made by:", "", "```", wanted.command, "```"]
    return "\n".join(lines) + "\n"


def as_json(wanted: Request, known: Outcomes) -> dict[str, Any]:
    """Everything the tables say and the single figures behind it; scores are shares (0 to 1)."""
    runs = [
        {
            "norm": one.cell.norm.text,
            "micro_batch": one.cell.batch,
            "batch_size": one.cell.loaded.config.batch_size,
            "lr": one.cell.loaded.config.optim.lr,
            "seed": one.cell.seed,
            "state": one.state,
            "reason": one.reason or None,
            "last": one.last,
            "best": one.best,
            "best_step": one.best_step,
            "steps": one.step,
            "training_seconds": one.seconds,
            "step_seconds": step_seconds(one),
            "peak_memory_bytes": one.memory,
            "run": str(one.cell.run),
            "arguments": shlex.join(one.cell.arguments),
        }
        for one in known.values()
    ]
    return {
        "config": str(wanted.config),
        "micro_batch_is": "global batch, lr scaled" if wanted.whole else "part of a fixed global batch",
        "command": wanted.command,
        "runs": runs,
    }


def draw(wanted: Request, known: Outcomes) -> None:
    """lab.png: score, seconds of a step and memory against the micro-batch, a line for each norm."""
    from matplotlib.ticker import FixedLocator, NullLocator

    panels: list[tuple[str, Callable[[Outcome], float | None]]] = [
        ("Score after the last step, %", lambda one: None if one.last is None else 100 * one.last),
        ("Seconds of a step", step_seconds),
        ("Peak memory, GiB", _gib),
    ]
    with plots.figure(wanted.folder / "lab.png", (14.5, 4.4)) as figure:
        for axes, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
            for variant, color in zip(wanted.norms, plots.cycle(len(wanted.norms)), strict=True):
                points = [
                    (one.cell.batch, found)
                    for batch in wanted.batches
                    for one in _of(known, variant, batch)
                    if one.state == "done" and (found := value(one)) is not None
                ]
                means = [
                    (batch, statistics.fmean(y for x, y in points if x == batch))
                    for batch in sorted({x for x, _ in points})
                ]
                if len(wanted.seeds) > 1:
                    axes.plot(*plots.columns(points), color=color, marker=".", linestyle="", alpha=0.5)
                axes.plot(*plots.columns(means), color=color, marker="o", markersize=4, label=variant.text)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(list(wanted.batches)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set(title=title, xlabel="micro-batch")
            axes.grid(alpha=0.3)
            if title != panels[0][0]:
                highest = axes.dataLim.y1  # -inf without a point
                axes.set_ylim(0, 1.08 * highest if highest > 0 else None)
        figure.axes[0].legend(fontsize=8)


def step_seconds(one: Outcome) -> float | None:
    """Seconds of a training step; None where no speed was logged."""
    return one.seconds / one.step if one.seconds is not None and one.step else None


def _gib(one: Outcome) -> float | None:
    return None if one.memory is None else one.memory / 2**30


def _of(known: Outcomes, variant: Variant, batch: int) -> list[Outcome]:
    return [one for (slug, size, _), one in known.items() if (slug, size) == (variant.slug, batch)]


def _score(outcomes: list[Outcome]) -> str:
    """Mean and deviation over the seeds, or why there is no figure."""
    done = [one.last for one in outcomes if one.state == "done" and one.last is not None]
    failed = [one.reason for one in outcomes if one.state == "failed"]
    if not done:
        return f"failed: {grid.short(failed[0])}" if failed else "not measured"
    remark = f" ({len(done)} of {len(outcomes)} seeds)" if len(done) < len(outcomes) else ""
    return grid.mean_and_deviation(done) + remark


def _middle(outcomes: list[Outcome], value: Callable[[Outcome], float | None]) -> str:
    found = [x for one in outcomes if one.state == "done" and (x := value(one)) is not None and math.isfinite(x)]
    return f"{statistics.median(found):.3g}" if found else "–"


def _runs(known: Outcomes) -> list[str]:
    lines = table_head(["norm", "folder", "micro-batch", "seed", "state", "last", "best (step)", "steps", "lr"], left=2)
    for one in known.values():
        last = "–" if one.last is None else f"{100 * one.last:.2f}"
        best = "–" if one.best is None else f"{100 * one.best:.2f} ({one.best_step})"
        state = f"failed: {grid.short(one.reason)}" if one.state == "failed" else one.state
        cell = one.cell
        words = [cell.norm.text, cell.run.name, str(cell.batch), str(cell.seed), state, last, best, str(one.step)]
        lines.append(table_row([*words, f"{cell.loaded.config.optim.lr:g}"]))
    return lines

"""What a run tells: progress lines, `metrics.jsonl`, TensorBoard, and a picture of the curves at the end."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch

from engine import distributed, glyphs
from engine.config import ReportConfig
from engine.errors import UserError, silence
from engine.images import show

METRICS = "metrics.jsonl"
CURVES = "curves.png"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, in words that know no task."""

    score: float
    """The one number to compare by, higher is better."""
    scalars: dict[str, float] = field(default_factory=dict)
    """More numbers, by TensorBoard tag, such as `IoU/road`."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Pictures, uint8 H x W x 3."""
    text: str = ""
    """What to print, such as a table."""
    measure: str = ""
    """The name of the score where that is a share, such as "mIoU": it is then printed and drawn in percent."""


class Log:
    """The reports of one run; on all ranks but the first it does nothing.

    A `with` block around the training closes the files. `stream` takes the console lines. `resume` is the checkpoint
    from which the run goes on (of which "step", "score" and "elapsed", see `elapsed`, are read): what it will do
    again is taken out of the files.

    Raises:
        UserError: the work directory cannot be written.
    """

    def __init__(
        self,
        work_dir: str | Path,
        cfg: ReportConfig,
        *,
        resume: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._dir = Path(work_dir)
        self._on = distributed.is_main()
        self._stream = stream or sys.stdout
        self._total = self._per_epoch = self._images_per_step = 0
        resume_step = resume["step"] if resume else 0
        carried = (resume and resume.get("elapsed")) or {}  # older checkpoints lack it
        self._step, self._first_step = resume_step - int(carried.get("steps", 0)), resume_step
        self._carried = float(carried.get("seconds", 0.0))
        self._began = self._last = time.monotonic()
        self._paused = 0.0
        self._board: Any = None
        if not self._on:
            return
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            evaluated = bool(resume and resume["score"] is not None)
            _drop_rows_past(self._dir / METRICS, resume_step, evaluated=evaluated)
            self._metrics = open(self._dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UserError(f"{self._dir}: cannot write the work directory: {error.strerror}") from None
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._board = SummaryWriter(str(self._dir), purge_step=resume_step + evaluated)
            except UnicodeEncodeError:
                raise UserError(
                    f"{self._dir}: TensorBoard writes into no folder whose name is not UTF-8; choose another "
                    "--work-dir, or set report.tensorboard=false"
                ) from None
            if not evaluated:  # with an evaluation of this step, which comes again, its losses went
                for row in read_metrics(self._dir / METRICS):
                    if row["step"] == resume_step and row["kind"] == "train":
                        self._plot(resume_step, _scalars(row))

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def message(self, text: str) -> None:
        """Print lines. Where they cannot be printed any more (a pipe that nobody reads, a full disk), it goes on."""
        if not self._on:
            return
        try:
            print(text, file=self._stream, flush=True)
        except OSError as error:
            silence(self._stream)
            told = f"note: cannot print any more ({error.strerror}); {self._dir / METRICS} has what follows"
            with suppress(OSError):  # which may be the same file
                print(told, file=sys.stderr, flush=True)

    def attach(self, name: str, text: str) -> None:
        """Write a text file into the work directory."""
        if self._on:
            with _told(self._dir / name):
                (self._dir / name).write_text(text.rstrip() + "\n", encoding="utf-8")

    def begin(self, *, total_steps: int, steps_per_epoch: int, images_per_step: int) -> None:
        """Tell the size of the run and start the clock of the throughput and of the time left."""
        self._total, self._per_epoch, self._images_per_step = (total_steps, steps_per_epoch, images_per_step)
        self._began = self._last = time.monotonic()
        self._paused = -self._carried  # what the last start of this run had computed since its last row

    def elapsed(self, step: int) -> dict[str, float]:
        """Steps and seconds since the last row, for the checkpoint."""
        return {"steps": step - self._step, "seconds": time.monotonic() - self._last - self._paused}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count for the throughput (evaluation, checkpoints)."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def train(self, step: int, loss: float, parts: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Report on the steps since the last report: mean loss, its parts, the rates now."""
        if not self._on:
            return
        now = time.monotonic()
        seconds = max(now - self._last - self._paused, 1e-9)
        speed = (step - self._step) * self._images_per_step / seconds
        left = (now - self._began) / max(step - self._first_step, 1) * (self._total - step)
        memory = _peak_memory()
        width = len(str(self._total))
        words = [f"step {step:>{width}}/{self._total}", f"epoch {step / self._per_epoch:.2f}", f"loss {loss:.4f}"]
        if more := {name: value for name, value in parts.items() if len(parts) > 1 or value != loss}:
            words[-1] += " (" + " ".join(f"{name} {value:.4f}" for name, value in more.items()) + ")"
        words += [f"{name if name == 'lr' else 'lr ' + name} {rate:.3g}" for name, rate in rates.items()]
        words += [f"{speed:.1f} img/s", f"{memory / 2**30:.1f} GiB", f"left {_clock(left)}"]
        self.message("  ".join(words))
        row = {
            "kind": "train",
            "step": step,
            "epoch": step / self._per_epoch,
            "loss": loss,
            "parts": dict(parts),
            "rates": dict(rates),
            "images_per_second": speed,
            "peak_memory_bytes": memory,
        }
        self._write(row)
        self._plot(step, _scalars(row))
        self._step, self._last, self._paused = step, now, 0.0

    def evaluation(self, step: int, found: Evaluation, *, seconds: float, best: bool) -> None:
        """Report an evaluation; `best` says that it is the best one so far."""
        if not self._on:
            return
        if found.text:
            self.message(found.text.rstrip())
        star = "  (best so far)" if best else ""
        self.message(f"evaluated after step {step}: {_score(found.score, found.measure)}{star}  in {seconds:.1f} s")
        self._write(
            {
                "kind": "eval",
                "step": step,
                "epoch": step / self._per_epoch,
                "score": found.score,
                "measure": found.measure,
                "scalars": dict(found.scalars),
            }
        )
        self._plot(step, {"score": found.score, **found.scalars})
        if self._board is not None:
            with _told(self._dir):
                for name, image in found.images.items():
                    tag = show(name if "/" in name else f"images/{name}")
                    self._board.add_image(tag, image, step, dataformats="HWC")

    def curves(self) -> None:
        """Draw loss, rates and score over the steps, from all rows of the metrics file, into `curves.png`."""
        if self._on:
            rows = read_metrics(self._dir / METRICS)
            if rows:
                with _told(self._dir / CURVES):
                    plot_curves(rows, self._dir / CURVES, show(self._dir.resolve().name))

    def close(self) -> None:
        """Close the files; may be called twice."""
        if self._on:
            with _told(self._dir / METRICS):  # what a full disk did not take is tried again
                self._metrics.close()
            if self._board is not None:
                with _told(self._dir):
                    self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        with _told(self._dir / METRICS):
            self._metrics.write(json.dumps(_finite(row)) + "\n")
            self._metrics.flush()

    def _plot(self, step: int, scalars: Mapping[str, float | None]) -> None:
        if self._board is not None:
            with _told(self._dir):  # tensorboard's thread hands its errors to whoever writes next
                for name, value in scalars.items():
                    if value is not None:  # as a file of metrics says that it is not finite
                        self._board.add_scalar(name, value, step)


def _scalars(row: Mapping[str, Any]) -> dict[str, float | None]:
    """What TensorBoard gets of a row of the training."""
    return {
        "loss/total": row["loss"],
        "speed/images_per_second": row["images_per_second"],
        "memory/peak_GiB": row["peak_memory_bytes"] / 2**30,
        **{f"loss/{name}": value for name, value in row["parts"].items()},
        **{f"rate/{name}": value for name, value in row["rates"].items()},
    }


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}; check the free space and the permissions") from None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash has cut off is left out. No file: no rows."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _drop_rows_past(path: Path, step: int, *, evaluated: bool) -> None:
    """What a run did after its last checkpoint is done again: its rows would be there twice."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    kept = [row for row in rows if evaluated or row["step"] < step or row["kind"] != "eval"]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept if step), encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null says 'no number', as for a class that does not occur."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _peak_memory() -> int:
    """Bytes: the peak of the GPU, or of the process without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _score(value: float, measure: str) -> str:
    return f"{measure} {100 * value:.2f} %" if measure else f"score {value:.4f}"


def plot_curves(rows: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Draw the rows of a metrics file as panels of loss, learning rate and score over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [row for row in rows if row["kind"] == "train"]
    scores = [row for row in rows if row["kind"] == "eval" and row["score"] is not None]
    panels = [name for name, there in (("loss", train), ("learning rate", train), ("score", scores)) if there]
    figure = Figure(figsize=(4.6 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)
    for axis, name in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        if name == "loss":
            _draw_losses(axis, train)
        elif name == "learning rate":
            _draw_rates(axis, train)
        else:
            name = _draw_scores(axis, scores)
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1.03 * rows[-1]["step"])
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    glyphs.save(figure, path, dpi=130)


def _draw_losses(axis: Any, train: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in train]
    names = list(train[-1]["parts"]) if len(train[-1]["parts"]) > 1 else []
    curves = {"total": [row["loss"] for row in train]}
    curves.update({name: [row["parts"].get(name, math.nan) for row in train] for name in names})
    window = max(1, len(train) // 25)
    for number, (name, values) in enumerate(curves.items()):
        half = window // 2
        smooth = [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
        if window > 1:
            axis.plot(steps, values, color=f"C{number}", linewidth=0.7, alpha=0.3)
        axis.plot(steps, smooth, color=f"C{number}", linewidth=1.6, label=name, **_mark(steps))
    if names:
        axis.legend(frameon=False, fontsize=8)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])  # matplotlib's margin is of the curve's own height


def _draw_rates(axis: Any, train: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in train for name in row["rates"]))
    for name in names:
        points = [(row["step"], row["rates"][name]) for row in train if name in row["rates"]]
        axis.plot(*zip(*points, strict=True), linewidth=1.6, label=name, **_mark(points))
    if len(names) > 1:
        axis.legend(frameon=False, fontsize=8)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_scores(axis: Any, scores: list[dict[str, Any]]) -> str:
    """Returns the panel's title."""
    measure = scores[-1].get("measure", "")  # rows of earlier versions have none
    steps, values = [row["step"] for row in scores], [(100 if measure else 1) * row["score"] for row in scores]
    axis.plot(steps, values, color="C2", linewidth=1.6, marker="o", markersize=3.5)
    best = max(range(len(values)), key=lambda i: values[i])
    axis.plot(steps[best], values[best], color="C3", marker="o", markersize=6)
    middle = (steps[0] + steps[-1]) / 2
    axis.annotate(
        f"best {values[best]:.2f}" if measure else f"best {values[best]:.4f}",
        (steps[best], values[best]),
        textcoords="offset points",
        xytext=(0, 8),
        ha="left" if steps[best] < middle else "right" if steps[best] > middle else "center",
        fontsize=9,
        color="C3",
    )
    axis.margins(y=0.15)
    return f"{measure}, %" if measure else "score"


def _mark(points: list[Any]) -> dict[str, Any]:
    """A line of one point is invisible without a marker."""
    return {"marker": "o", "markersize": 3} if len(points) < 3 else {}

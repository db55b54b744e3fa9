"""Trainings that differ in their seed alone, compared as groups: mean and deviation of the score, and what a difference
of two groups is worth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import plots
from engine.errors import UserError
from engine.resume import ENDED, differences
from engine.runs import Row, config, last_evaluation, scored


@dataclass(frozen=True)
class Course:
    """The scores of a group, at the steps at which each of its runs was evaluated."""

    name: str
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    """Of each step, one score (0 to 1) for each run."""
    measure: str = "score"
    """What the score is, such as mIoU, where the runs say it."""

    @property
    def means(self) -> list[float]:
        return [float(np.mean(each)) for each in self.scores]

    @property
    def deviations(self) -> list[float]:
        """Standard deviations (of a sample, n - 1); nan for one run."""
        return [float(np.std(each, ddof=1)) if len(each) > 1 else math.nan for each in self.scores]

    def reaches(self, score: float) -> float | None:
        """The epoch of the first evaluation whose mean is at least `score`."""
        return next((epoch for epoch, mean in zip(self.epochs, self.means, strict=True) if mean >= score), None)


def groups(runs: Sequence[Path], names: Sequence[str]) -> dict[str, list[Path]]:
    """The runs by name, in the order of their first ones. Raises UserError for a folder that is given twice for one."""
    found: dict[str, list[Path]] = {}
    for run, name in zip(runs, names, strict=True):
        mine = found.setdefault(name, [])
        if any(run.resolve() == other.resolve() for other in mine):
            raise UserError(f"{run}: is given twice as a run of {name!r}; give it once, or under another name")
        mine.append(run)
    return found


def same_seeds(found: Mapping[str, Sequence[Path]]) -> list[str]:
    """A sentence for each name that several runs of one seed have: they are not independent."""
    lines = []
    for name, runs in found.items():
        seeds = Counter(config(run).get("runtime", {}).get("seed") for run in runs)
        twice = [str(seed) for seed, count in seeds.items() if count > 1]
        if twice:
            lines.append(
                f"note: {name} has several runs of seed {', '.join(twice)}; what they have in common makes the "
                "deviation too small and p too sure"
            )
    return lines


def unlike(found: Mapping[str, Sequence[Path]]) -> list[str]:
    """A sentence for each run that differs from the first one of its name in more than the seed."""
    lines = []
    for name, (first, *others) in found.items():
        then = config(first)
        for run in others:
            changed = differences(then, config(run), (*ENDED, "length"))
            more = [line for line in changed if not line.startswith("runtime.seed:")]
            if more:
                lines.append(f"note: {name}: from {first} to {run} more changes than the seed: {'; '.join(more)}")
    return lines


def cut_short(found: Mapping[str, Sequence[Path]]) -> list[str]:
    """A sentence for each run that is scored before its end: its last evaluation has no score, or others have none."""
    lines = []
    for name, runs in found.items():
        scored_at = course(name, runs).steps[-1]
        for run in runs:
            last = last_evaluation(run)
            step = int(last["step"])
            if last.get("score") is None:
                why = f"the evaluation of {run} after step {step} was not finite"
            elif step > scored_at:
                why = f"{run} goes on to step {step}"
            else:
                continue
            lines.append(f"note: {name}: {why}; the score is that of step {scored_at}, the last one of all its runs")
    return lines


def course(name: str, runs: Sequence[Path]) -> Course:
    """Raises UserError for a run without evaluations, or runs that were never evaluated at the same step."""
    rows: list[dict[int, Row]] = [{int(row["step"]): row for row in scored(run)} for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in rows)))
    if not steps:
        listed = ", ".join(str(run) for run in runs)
        raise UserError(
            f"{name}: {listed} were never evaluated at the same step, so they have no mean; compare runs "
            "of one length and report.eval_every"
        )
    measures = {str(row.get("measure", "score")) for each in rows for row in each.values()}
    return Course(
        name,
        tuple(steps),
        tuple(float(rows[0][step]["epoch"]) for step in steps),
        tuple(tuple(float(each[step]["score"]) for each in rows) for step in steps),
        measures.pop() if len(measures) == 1 else "score",
    )


def compare(found: Mapping[str, Sequence[Path]], picture: Path) -> str:
    """Draw `picture` (mean over epochs, a band from the lowest to the highest) and return a table.

    A group's score is that of its last common evaluation. The difference to the first group is at the last step that
    both have, with the p value of Welch's t test (two-sided, unequal variances).

    Raises:
        UserError: see `course`; a picture that can't be written.
    """
    courses = [course(name, runs) for name, runs in found.items()]
    with plots.figure(picture, (8, 4.6)) as figure:
        axes = figure.subplots()
        for each, color in zip(courses, plots.cycle(len(courses)), strict=True):
            percent = 100 * np.array(each.scores)
            label = f"{plots.in_legend(each.name)}, {_plural(percent.shape[1])}"
            axes.plot(each.epochs, percent.mean(1), color=color, marker="o", markersize=3, label=label)
            axes.fill_between(each.epochs, percent.min(1), percent.max(1), color=color, alpha=0.2, linewidth=0)
        (measure, *others) = {each.measure for each in courses}
        title = "Mean, lowest and highest of the seeds"
        axes.set(xlabel="epoch", ylabel=f"{'score' if others else measure}, %", title=title)
        if max(axes.get_xlim()) > 2:
            axes.xaxis.set_major_locator(plots.whole_numbers())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return "\n".join([*_table(courses), f"drawn in {picture}"])


def _plural(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _table(courses: Sequence[Course]) -> list[str]:
    first = courses[0]
    goal = first.means[-1]
    lines = [("run", "seeds", "epoch", "score", "difference", "p", f"reaches {100 * goal:.2f}% in epoch")]
    for each in courses:
        deviation = each.deviations[-1]
        spread = f" +- {100 * deviation:.2f}" if math.isfinite(deviation) else ""
        gap, p = _difference(first, each) if each is not first else ("", "")
        when = each.reaches(goal)
        score = f"{100 * each.means[-1]:.2f}%{spread}"
        lines.append(
            (
                each.name,
                str(len(each.scores[-1])),
                f"{each.epochs[-1]:g}",
                score,
                gap,
                p,
                "-" if when is None else f"{when:g}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _difference(first: Course, other: Course) -> tuple[str, str]:
    """Of the means, in points, at the last step that both have; and p."""
    from scipy.stats import ttest_ind

    common = sorted(set(first.steps) & set(other.steps))
    if not common:
        return "-", "-"
    a, b = (each.scores[each.steps.index(common[-1])] for each in (first, other))
    gap = f"{100 * (np.mean(b) - np.mean(a)):+.2f}"
    at = first.epochs[first.steps.index(common[-1])]
    gap += "" if common[-1] == first.steps[-1] == other.steps[-1] else f" (epoch {at:g})"
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:  # no deviation, nothing to hold the difference against
        return gap, "-"
    p = ttest_ind(a, b, equal_var=False).pvalue
    return gap, f"{p:.3f}" if p >= 0.0005 else "<0.001"  # no p is 0

"""The files of a table: table.md to read, table.json with every figure, curves.png."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from classify import paper
from classify.compare import while_training
from classify.table_cells import Outcome, Outcomes, Request
from engine import grid, plots
from engine.errors import UserError
from engine.grid import Variant
from engine.images import write_bytes
from engine.report import METRICS, read_metrics

DATA_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}


def write(wanted: Request, known: Outcomes) -> None:
    """Write table.md, table.json and, once there is something to draw, curves.png.

    Raises:
        UserError: a file cannot be written.
    """
    write_bytes(wanted.folder / "table.md", markdown(wanted, known).encode())
    content = json.dumps(as_json(wanted, known), indent=1, allow_nan=False) + "\n"
    write_bytes(wanted.folder / "table.json", content.encode())
    draw(wanted, known)


def other_variants(wanted: Request) -> list[Variant]:
    """The variants in the table.json of an earlier start that this one does not ask for.

    Raises:
        UserError: table.json is none of ours.
    """
    path = wanted.folder / "table.json"
    if not path.exists():
        return []
    try:
        texts = dict.fromkeys(text for one in json.loads(path.read_bytes())["rows"] for text in one["ours"])
        found = [grid.variant(text, str(path), lambda *_: None) for text in texts]
    except (ValueError, KeyError, TypeError, AttributeError, UserError):
        raise UserError(
            f"{path}: not a table that this program has written; move it away, or choose another --out"
        ) from None
    return [one for one in found if one.slug not in {mine.slug for mine in wanted.variants}]


def other_networks(wanted: Request) -> list[str]:
    """The networks in the table.json of an earlier start that this table would not have. Raises as `other_variants`."""
    path = wanted.folder / "table.json"
    try:
        there = [str(one["network"]) for one in json.loads(path.read_bytes())["rows"]] if path.exists() else []
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not a table that this program has written; move it away, or choose another --out"
        ) from None
    return [one for one in dict.fromkeys(there) if one not in rows(wanted)]


def rows(wanted: Request) -> list[str]:
    """The networks of the table: the paper's in its order, then others that were asked for."""
    return list(dict.fromkeys([*paper.networks(wanted.data), *wanted.networks]))


def markdown(wanted: Request, known: Outcomes) -> str:
    """The table, and under it the single runs."""
    data = DATA_NAMES.get(wanted.data, wanted.data)
    length = f"{wanted.epochs} epoch{'' if wanted.epochs == 1 else 's'}"
    both = wanted.data == "imagenet"
    published = _published_columns(wanted)
    head = ["network", *published, *(f"ours: {one.text}" for one in wanted.variants)]
    lines = [f"# {data}, {length}: {'top-1 / top-5' if both else 'top-1'} accuracy in %", ""]
    lines += grid.table_head(head)
    for network in rows(wanted):
        figures = paper.figures(network, wanted.data, wanted.epochs)
        cells = [_cell(_of(known, network, one), len(wanted.seeds), both) for one in wanted.variants]
        lines.append(grid.table_row([paper.NAMES.get(network, network), *_published(figures, published), *cells]))
    lines += ["", *_notes(wanted, both), "", "## Runs", "", *_runs(known)]
    if wanted.command:
        lines += ["", "Made by:", "", "```", wanted.command, "```"]
    return "\n".join(lines) + "\n"


def as_json(wanted: Request, known: Outcomes) -> dict[str, Any]:
    """Everything the table says and the single figures behind it; accuracies are shares (0 to 1)."""
    found = []
    for network in rows(wanted):
        published = paper.figures(network, wanted.data, wanted.epochs)
        variants = {one.text: _summary(_of(known, network, one)) for one in wanted.variants}
        found.append({"network": network, "paper_percent": published, "ours": variants})
    return {
        "data": wanted.data,
        "epochs": wanted.epochs,
        "seeds": list(wanted.seeds),
        "command": wanted.command,
        "paper": paper.SOURCE,
        "reproduction": paper.REPRODUCTION,
        "rows": found,
    }


def draw(wanted: Request, known: Outcomes) -> None:
    """curves.png: accuracy and loss over the epochs, two panels for each network that has been trained."""
    colors = plots.cycle(len(wanted.variants))
    shown: list[tuple[str, list[tuple[str, list[Any]]], list[str]]] = []
    for network in rows(wanted):
        lines, hues = [], []
        for variant, color in zip(wanted.variants, colors, strict=True):
            for number, one in enumerate(_of(known, network, variant)):
                lines.append(("" if number else variant.text, read_metrics(one.cell.run / METRICS)))
                hues.append(color)
        if any(found for _, found in lines):
            shown.append((paper.NAMES.get(network, network), lines, hues))
    if not shown:
        return
    across = min(2, len(shown))
    down = math.ceil(len(shown) / across)
    with plots.figure(wanted.folder / "curves.png", (7.2 * across, 3.0 * down + 0.3)) as figure:
        data = DATA_NAMES.get(wanted.data, wanted.data)
        figure.suptitle(f"{data}: accuracy on the validation split (thin lines: on the training batches)", fontsize=11)
        grid = figure.subplots(down, 2 * across, squeeze=False).reshape(-1, 2)
        for score, loss in grid[len(shown) :]:
            score.remove()
            loss.remove()
        for (score, loss), (name, lines, hues) in zip(grid, shown, strict=False):
            for (_, found), color in zip(lines, hues, strict=True):
                while_training(score, found, color, "epoch")
            plots.curves(score, loss, lines, f"{name}: top-1", x="epoch", colors=hues, best=False)
            loss.set_title(f"{name}: training loss")
            for axes in (score, loss):
                axes.set_xlim(0, 1.04 * wanted.epochs)


def _of(known: Outcomes, network: str, variant: Variant) -> list[Outcome]:
    return [one for (name, slug, _), one in known.items() if (name, slug) == (network, variant.slug)]


def _cell(outcomes: Sequence[Outcome], seeds: int, both: bool) -> str:
    """Mean and deviation over the seeds, or why there is no figure."""
    done = [one for one in outcomes if one.state == "done"]
    failed = [one.reason for one in outcomes if one.state == "failed"]
    reason = f"failed: {grid.short(failed[0])}" if failed else ""
    if not done:
        reached = max((one.epoch for one in outcomes), default=0.0)
        return reason or ("not measured" + (f" (stopped in epoch {reached:.2f})" if reached else ""))
    top1 = [one.last for one in done if one.last is not None]
    top5 = [one.scalars["top5"] for one in done if "top5" in one.scalars]
    text = grid.mean_and_deviation(top1) + (f" / {grid.mean_and_deviation(top5)}" if both and top5 else "")
    remarks = [f"{len(done)} of {seeds} seeds"] if len(done) < seeds else []
    remarks += [reason] if reason else []
    return text + (f" ({'; '.join(remarks)})" if remarks else "")


def _published_columns(wanted: Request) -> list[str]:
    if wanted.data == "imagenet":
        return ["paper: plain", "paper: BN → ND", "2024 reproduction: ND"]
    return ["paper: BN → ND"]


def _published(figures: dict[str, tuple[float, ...]], columns: Sequence[str]) -> list[str]:
    words = {key: " / ".join(f"{value:.2f}" for value in values) for key, values in figures.items()}
    pair = f"{words['bn']} → {words['deconv']}" if words else "–"
    return [pair] if len(columns) == 1 else [words.get("plain", "–"), pair, words.get("deconv, 2024", "–")]


def _notes(wanted: Request, both: bool) -> list[str]:
    notes = [f"Paper: {paper.SOURCE}, Table {2 if both else 1}; –: not in it."]
    if both:
        notes.append(f"Reproduction: {paper.REPRODUCTION}.")
    ours = "Ours: accuracy on the scored split (data.val_split) after the last step"
    if len(wanted.seeds) > 1:
        ours += f", mean ± standard deviation of the seeds {', '.join(map(str, wanted.seeds))}"
    return [*notes, ours + "."]


def _runs(known: Outcomes) -> list[str]:
    head = ["network", "variant", "seed", "last", "best (step)", "steps", "training", "parameters", "folder"]
    lines = grid.table_head(head, left=2)
    for one in known.values():
        if one.state == "open":
            continue
        cell = one.cell
        last = {"failed": "failed", "partly": "stopped"}.get(one.state) or f"{100 * (one.last or 0):.2f}"
        best = "–" if one.best is None else f"{100 * one.best:.2f} ({one.best_step})"
        seconds = "–" if one.seconds is None else f"{one.seconds:.0f} s"
        size = "–" if one.parameters is None else f"{one.parameters / 1e6:.2f}M"
        place = str(cell.run.name)
        words = [cell.network, cell.variant.text, str(cell.seed), last, best, str(one.step), seconds, size, place]
        lines.append(grid.table_row(words))
    return lines if len(lines) > 2 else ["None yet."]


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean, deviation and the single runs of a network with a variant."""
    found: dict[str, Any] = {}
    for key in ("last", "best"):
        shares = [value for one in outcomes if one.state == "done" and (value := getattr(one, key)) is not None]
        found[f"{key}_mean"] = statistics.fmean(shares) if shares else None
        found[f"{key}_deviation"] = statistics.stdev(shares) if len(shares) > 1 else None
    found["runs"] = [
        {
            "seed": one.cell.seed,
            "state": one.state,
            "reason": one.reason or None,
            "last": one.last,
            "last_top5": one.scalars.get("top5"),
            "best": one.best,
            "best_step": one.best_step,
            "epoch": one.epoch,
            "steps": one.step,
            "training_seconds": one.seconds,
            "parameters": one.parameters,
            "run": str(one.cell.run),
            "command": one.cell.command,
        }
        for one in outcomes
    ]
    return found

"""The cells of the paper's tables: a network with a variant (a norm and further keys) and a seed each.

Every cell has a work directory of its own, and what is there says what is known of it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from classify import paper
from classify.config import ClassifyConfig
from engine import runs
from engine.config import Loaded, load
from engine.errors import UserError
from engine.report import METRICS, read_metrics
from engine.resume import BEST, LAST, differences

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "classify"
Key = tuple[str, str, int]
"""Network, the variant's slug, seed."""
_OWN = {"length": "--epochs", "runtime.seed": "--seeds", "norm.name": "--variants"}


@dataclass(frozen=True)
class Variant:
    """A column of the table: a norm and further keys of the config."""

    text: str
    """As it was asked for: NAME, or NAME:key=value,key=value."""
    overrides: tuple[str, ...]
    slug: str
    """The text, fit for a folder's name."""


@dataclass(frozen=True)
class Request:
    """The table that is wanted."""

    data: str
    epochs: int
    networks: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    """Changes to the configs of all cells."""
    folder: Path
    """Holds the table's files, and a folder for each cell."""
    configs: Path
    """Holds the configs NETWORK_DATA.yaml."""
    command: str
    """What the user typed."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    network: str
    variant: Variant
    seed: int
    run: Path
    """Its work directory."""
    loaded: Loaded[ClassifyConfig]
    command: str
    """What trains it alone."""

    @property
    def key(self) -> Key:
        return self.network, self.variant.slug, self.seed

    @property
    def name(self) -> str:
        return f"{self.network}, {self.variant.text}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What is known of a cell. Accuracies are shares (0 to 1)."""

    cell: Cell
    state: Literal["done", "partly", "open", "failed"]
    reason: str = ""
    """Why it failed."""
    epoch: float = 0.0
    """Epochs that are logged."""
    step: int = 0
    last: float | None = None
    """Top-1 accuracy after the last step."""
    last_top5: float | None = None
    best: float | None = None
    """The highest top-1 accuracy of all evaluations."""
    best_step: int | None = None
    seconds: float | None = None
    """Of training, without evaluations and checkpoints."""
    parameters: int | None = None


Outcomes = dict[Key, Outcome]


def request(
    out: Path,
    *,
    data: str = "cifar10",
    epochs: int | None = None,
    networks: Sequence[str] = (),
    variants: Sequence[str] = ("bn", "deconv"),
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    configs: Path = CONFIGS,
    command: str = "",
) -> Request:
    """A table as the user names its parts; by default the paper's networks, 1 epoch (ImageNet: 90), one seed.

    Raises:
        UserError: a number of epochs below 1, no network, a thing named twice, a variant that is not NAME or
            NAME:key=value, or a key that the table sets itself.
    """
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs: found {epochs}, expected at least 1")
    length = epochs or (90 if data == "imagenet" else 1)
    columns = tuple(_variant(text) for text in variants)
    names = tuple(networks) or tuple(paper.networks(data))
    if not names:
        raise UserError(f"--networks: the paper has no table of {data}, so name the networks, such as --networks lenet")
    for option, given in (("networks", names), ("seeds", seeds), ("variants", [one.slug for one in columns])):
        if twice := [str(one) for one in dict.fromkeys(given) if list(given).count(one) > 1]:
            raise UserError(f"--{option}: {', '.join(twice)} is there twice")
    _check_keys("--set", overrides)
    folder = out / f"{data}_{length}ep"
    return Request(data, length, names, columns, tuple(seeds), tuple(overrides), folder, configs, command)


def _variant(text: str) -> Variant:
    name, colon, rest = text.partition(":")
    keys = re.split(r",(?![^\[{(]*[\]})])", rest) if colon else []  # not at a comma inside brackets
    if not name or any("=" not in key for key in keys):
        raise UserError(f"--variants: found {text!r}, expected NAME or NAME:key=value[,key=value], as bn:optim.lr=0.02")
    _check_keys(f"--variants: {text}", keys)
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")
    return Variant(text, (f"norm.name={name}", *(key.strip() for key in keys)), slug)


def _check_keys(where: str, overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in _OWN:
            raise UserError(f"{where}: {key} differs from cell to cell or names the table; set it with {_OWN[key]}")


def cells(wanted: Request, networks: Sequence[str]) -> list[Cell]:
    """The cells of some networks, with their configs.

    Raises:
        UserError: no config for a network on this data set, or a wrong one.
    """
    found = []
    for network in networks:
        ending = f"_{wanted.data}.yaml"
        path = wanted.configs / f"{network}{ending}"
        if not path.exists():
            there = sorted(one.name.removesuffix(ending) for one in wanted.configs.glob(f"*{ending}"))
            raise UserError(
                f"{path}: no such config, so {network} cannot be trained on {wanted.data}; there are "
                f"{', '.join(there) or 'none for this data set'}"
            )
        for variant in wanted.variants:
            for seed in wanted.seeds:
                run = wanted.folder / (f"{network}_{variant.slug}" + (f"_seed{seed}" if seed else ""))
                length = f"length={wanted.epochs} epochs"
                keys = [*wanted.overrides, *variant.overrides, length, f"runtime.seed={seed}"]
                words = ["python", "tools/train.py", str(path), *keys, "--work-dir", str(run), "--resume", "auto"]
                loaded = load(path, keys, ClassifyConfig)
                found.append(Cell(network, variant, seed, run, loaded, shlex.join(words)))
    return found


def look(cell: Cell) -> Outcome:
    """What a cell's work directory says.

    Raises:
        UserError: it holds a run of another configuration.
    """
    epochs = cell.loaded.config.length.value
    scored = runs.evaluations(cell.run)
    final = next((row for row in scored if row["epoch"] >= epochs), None)
    if final is None and not any((cell.run / name).exists() for name in (LAST, BEST)):
        return Outcome(cell, "open")
    stored = runs.config(cell.run)
    if wrong := differences(stored, cell.loaded.config.model_dump(mode="json")):
        raise UserError(
            f"{cell.run}: was trained with another configuration:\n  " + "\n  ".join(wrong) + "\n  give the same "
            "settings, or choose another --out"
        )
    rows = runs.timed(read_metrics(cell.run / METRICS), int(stored["batch_size"]))
    reached: dict[str, Any] = max(rows, key=lambda row: row["step"], default={})
    top = runs.best_evaluation(cell.run) if scored else None
    return Outcome(
        cell,
        "partly" if final is None else "done",
        epoch=reached.get("epoch", 0.0),
        step=reached.get("step", 0),
        last=None if final is None else float(final["score"]),
        last_top5=None if final is None else final["scalars"].get("top5"),
        best=None if top is None else float(top["score"]),
        best_step=None if top is None else top["step"],
        seconds=reached.get("seconds"),
    )


def parameters(cell: Cell) -> int | None:
    """Parameters of the trained network; None where no checkpoint is left."""
    from classify.network import from_checkpoint

    path = next((cell.run / name for name in (BEST, LAST) if (cell.run / name).exists()), None)
    if path is None:
        return None
    model, _, _ = from_checkpoint(path, allow_imports=True)  # the user's own config named those modules
    return sum(one.numel() for one in model.parameters())

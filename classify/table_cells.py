"""The cells of the paper's tables: a network with a variant (a norm and further keys) and a seed each.

Every cell has a work directory of its own, and what is there says what is known of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from classify import paper
from classify.config import ClassifyConfig
from engine import grid
from engine.config import Loaded, load
from engine.errors import UserError
from engine.grid import Variant
from engine.resume import BEST, LAST

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "classify"
Key = tuple[str, str, int]
"""Network, the variant's slug, seed."""
_OWN = {
    "length": "--epochs",
    "runtime.seed": "--seeds",
    "norm.name": "--variants",
    "data.name": "--data",
    "model.name": "--networks",
}


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


Outcome = grid.Outcome[Cell]
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
    columns = tuple(grid.variant(text, "--variants", _check_keys) for text in variants)
    names = tuple(networks) or tuple(paper.networks(data))
    if not names:
        raise UserError(f"--networks: the paper has no table of {data}, so name the networks, such as --networks lenet")
    for option, given in (("networks", names), ("seeds", seeds), ("variants", [one.slug for one in columns])):
        grid.check_distinct(f"--{option}", given)
    _check_keys("--set", overrides)
    folder = out / f"{data}_{length}ep"
    return Request(data, length, names, columns, tuple(seeds), tuple(overrides), folder, configs, command)


def _check_keys(where: str, overrides: Sequence[str]) -> None:
    if key := grid.owned(overrides, _OWN):
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
            if not wanted.configs.is_dir():
                raise UserError(f"{wanted.configs}: no such folder; start this from a checkout, which has the configs")
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


def parameters(cell: Cell) -> int | None:
    """Parameters of the trained network; None where no checkpoint is left."""
    from classify.network import from_checkpoint

    path = next((cell.run / name for name in (BEST, LAST) if (cell.run / name).exists()), None)
    if path is None:
        return None
    model, _, _ = from_checkpoint(path, allow_imports=True)  # the user's own config named those modules
    return sum(one.numel() for one in model.parameters())

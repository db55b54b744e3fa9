"""The files below the folders of a data set, by what an image and its mask have in common; shared by the layouts of
`seg.datasets` and `seg.own_data`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.images import SUFFIXES, walk
from seg.cityscapes import Key, Listing
from seg.config import DataConfig


def folder_in(cfg: DataConfig, path: Path, remedy: str) -> Path:
    """`path` if it is a folder, else an error that names the first part of it that is missing and what is beside it."""
    if not cfg.root.is_dir():
        raise UserError(
            f"{cfg.root} (data.root): no such folder; expected {path.relative_to(cfg.root)}/ in it. {remedy}"
            if path != cfg.root and path.is_relative_to(cfg.root)
            else f"{cfg.root} (data.root): no such folder. {remedy}"
        )
    if path.is_dir():
        return path
    above = next(parent for parent in path.parents if parent.is_dir())
    there = sorted(p.name + "/" * p.is_dir() for p in above.iterdir() if not p.name.startswith("."))
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    raise UserError(
        f"{path}: no such folder, which data.name={cfg.name} expects; {above} holds {shown or 'nothing'}. {remedy}"
    )


class Files(NamedTuple):
    """Files by what images and their masks have in common, and those that are one too many."""

    files: dict[str, Path]
    twice: list[tuple[Path, Path]]

    def add(self, other: Files, prefix: str) -> None:
        self.files.update({prefix + name: path for name, path in other.files.items()})
        self.twice.extend(other.twice)


def files_in(top: Path, suffixes: Iterable[str] = SUFFIXES, ending: str = "", without: str = "") -> Files:
    """Path below `top` without suffix and `ending` -> file, of the files that have both. Links to folders are
    followed; hidden files and folders, and names that end in `without`, are left out.

    Raises:
        UserError: a folder cannot be read.
    """
    found, problems = Files({}, []), list[str]()
    for path in sorted(walk(top, problems, frozenset(suffixes))):
        name = path.relative_to(top).with_suffix("").as_posix()
        if not name.endswith(ending) or (without and name.endswith(without)):
            continue
        key = name.removesuffix(ending)
        if key in found.files:
            found.twice.append((path, found.files[key]))
        found.files.setdefault(key, path)
    if problems:
        raise UserError(problems[0])
    return found


def listed(images: Files, masks: Files | None = None, city: Callable[[str], str] = lambda _: "") -> Listing:
    """Images with their masks; None for a split without labels."""

    def keyed(files: dict[str, Path]) -> dict[Key, Path]:
        return {(city(name), name): path for name, path in files.items()}

    labels = None if masks is None else keyed(masks.files)
    return Listing(keyed(images.files), labels, twice=images.twice + (masks.twice if masks else []))


def list_of(lists: Path, split: str, remedy: str) -> Path:
    """The list of a split in the folder `lists`. Raises UserError, with `remedy`, if there is none."""
    path = lists / f"{split}.txt"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in lists.glob("*.txt"))) or "none"
        raise UserError(f"{path}: no such list (lists there: {there}). {remedy}")
    return path


def lines_of(path: Path, expected: str) -> list[tuple[int, str]]:
    """Number and text of the lines of a list that are not blank.

    Raises:
        UserError: it cannot be read, or is not in UTF-8; `expected` says what each line should hold.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected {expected} in each line, in UTF-8.") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line]


def near(key: Key, others: Iterable[Key]) -> str:
    """A hint at a file that differs only by an ending such as _mask; '' if there is none."""
    stem = re.escape(key[1].rsplit("/", 1)[-1])
    found = next((name for _, name in others if re.fullmatch(rf"(.*/)?{stem}[_\-.].+", name)), None)
    return f" (there is {found!r}; names must be equal)" if found else ""

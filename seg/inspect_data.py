"""A look at a data set before training: what there is, class shares, and what is broken or odd. Nothing is changed.

Unlike `seg.data`, which stops at the first file that is wrong, this lists all of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from seg.data import GET_DATA, read_rgb
from seg.labels import LABEL_NAMES, TRAIN_LABEL_IDS, read_label_ids
from seg.per_image import told

UNLABELLED = "test"
"""The split whose labels are not public; what lies there is not read."""
RARE = 0.001
"""Share of the labelled pixels below which a class is called rare."""
_ENDINGS = {"image": r"_leftImg8bit\.(?:png|jpe?g)", "label": r"_gtFine_labelIds\.png"}
_INSTANCES = "_gtFine_instanceIds.png"


@dataclass(frozen=True)
class Problem:
    """Something broken or odd about one or several files."""

    kind: str
    text: str


@dataclass
class Entry:
    """One image, its label, and what was found in them."""

    split: str
    city: str
    name: str
    image: Path | None
    label: Path | None
    size: tuple[int, int] | None = None
    """Height and width of the image in pixels; None if it can't be read."""
    digest: str = ""
    """Of the decoded pixels, so that a copy in another file format is noticed too."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """Pixels by label id."""
    colour: NDArray[np.float64] = field(default_factory=lambda: np.zeros(7))
    """Pixels looked at, sums of R, G, B and of their squares, in [0, 1]."""
    problems: list[Problem] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Both files can be read and go together."""
        return self.size is not None and self.label is not None and not self.problems


@dataclass(frozen=True)
class Inspection:
    """All that was found."""

    root: Path
    entries: list[Entry]
    problems: list[Problem]
    names: tuple[str, ...]
    """Name of each label id."""
    evaluated: tuple[int, ...]
    """Label ids of the classes."""
    train_split: str
    val_split: str

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(entry.split for entry in self.entries))

    def of(self, split: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == split]

    def pixels(self, split: str) -> NDArray[np.int64]:
        """Pixels by label id, int64 (256,)."""
        return np.sum([entry.counts for entry in self.of(split)] or [np.zeros(256, np.int64)], axis=0)

    def images_with(self, split: str) -> NDArray[np.int64]:
        """Images that hold each label id, int64 (256,)."""
        return np.sum([entry.counts > 0 for entry in self.of(split)] or [np.zeros(256, bool)], axis=0)

    def shares(self, split: str) -> dict[str, float]:
        """Share of each class in the evaluated pixels; 0 for all where there are none."""
        pixels = self.pixels(split)[list(self.evaluated)]
        return {
            self.names[i]: float(n) / max(1, int(pixels.sum())) for i, n in zip(self.evaluated, pixels, strict=True)
        }

    def colours(self, split: str) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of R, G, B in [0, 1] (every fourth pixel); None without images."""
        sums = np.sum([entry.colour for entry in self.of(split)] or [np.zeros(7)], axis=0)
        if not sums[0]:
            return None
        mean = sums[1:4] / sums[0]
        return mean.tolist(), np.sqrt(np.maximum(0, sums[4:] / sums[0] - mean**2)).tolist()


def inspect(
    root: Path,
    *,
    train_split: str = "train",
    val_split: str = "val",
    names: Sequence[str] = LABEL_NAMES,
    evaluated: Sequence[int] = TRAIN_LABEL_IDS,
    say: Callable[[str], None] = print,
) -> Inspection:
    """Read every file of a data set in the Cityscapes layout.

    Args:
        root: folder that holds leftImg8bit/ and gtFine/.
        train_split, val_split: those of the experiment.
        names: of each label id.
        evaluated: label ids of the classes.
        say: takes a line of progress.

    Raises:
        UserError: no such folder, or not one image in it.
    """
    entries = find(root)
    if not any(entry.image for entry in entries):
        raise UserError(
            f"{root} (data.root): no image in it; expected leftImg8bit/<split>/<city>/*_leftImg8bit.png or .jpg. "
            f"{GET_DATA}"
        )

    def look(entry: Entry) -> Entry:
        return _look(entry, len(names))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        seen = list(told(pool.map(look, entries), len(entries), "files", say))
    found = Inspection(root, seen, [], tuple(names), tuple(evaluated), train_split, val_split)
    found.problems.extend(problem for entry in seen for problem in entry.problems)
    for check in (_splits, _duplicates, _instance_files, _sizes, _train_ids, _classes):
        found.problems.extend(check(found))
    return found


def find(root: Path) -> list[Entry]:
    """Images and labels of all splits, paired by city and name; one of the two may be missing. Nothing is read."""
    if not root.is_dir():
        raise UserError(f"{root} (data.root): no such folder; expected leftImg8bit/ and gtFine/ in it. {GET_DATA}")
    tops = {"image": root / "leftImg8bit", "label": root / "gtFine"}
    splits = sorted({p.name for top in tops.values() if top.is_dir() for p in top.iterdir() if p.is_dir()})
    order = {name: i for i, name in enumerate(("train", "val", "test"))}
    entries = []
    for split in sorted(splits, key=lambda name: (order.get(name, 3), name)):
        files: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
        twice = defaultdict(list)
        for kind, top in tops.items():
            if kind == "label" and split == UNLABELLED:
                continue
            for path in sorted((top / split).glob("[!.]*/[!.]*")):
                if match := re.fullmatch(f"(.+){_ENDINGS[kind]}", path.name):
                    key = path.parent.name, match[1]
                    if kind in files[key]:
                        twice[key].append(Problem("two files for one image", f"{path} and {files[key][kind].name}"))
                    files[key].setdefault(kind, path)
        for key in sorted(files):
            entry = Entry(split, *key, files[key].get("image"), files[key].get("label"))
            entry.problems.extend(twice[key])
            entries.append(entry)
    return entries


def _look(entry: Entry, ids: int) -> Entry:
    """Read the files of an entry and note what is wrong with them."""
    wrong = entry.problems
    if entry.image is None:
        wrong.append(Problem("label without image", str(entry.label)))
    else:
        try:
            image = read_rgb(entry.image)
        except UserError as error:
            wrong.append(Problem("unreadable image", str(error)))
        else:
            entry.size = (image.shape[0], image.shape[1])
            entry.digest = hashlib.blake2b(image.tobytes() + str(image.shape).encode(), digest_size=16).hexdigest()
            some = image[::4, ::4].reshape(-1, 3) / 255
            entry.colour = np.array([len(some), *some.sum(0), *(some**2).sum(0)])
            if (image == image[0, 0]).all():
                wrong.append(Problem("image of one colour", str(entry.image)))
    if entry.label is None:
        if entry.split != UNLABELLED:
            wrong.append(Problem("image without label", str(entry.image)))
        return entry
    try:
        label = read_label_ids(entry.label)
    except UserError as error:
        wrong.append(Problem("unreadable label", str(error)))
        return entry
    entry.counts = np.bincount(label.ravel(), minlength=256)
    if entry.size is not None and label.shape != entry.size:
        sizes = f"{label.shape[1]} x {label.shape[0]}, its image {entry.size[1]} x {entry.size[0]}"
        wrong.append(Problem("label of another size than its image", f"{entry.label}: {sizes}"))
    strange = np.flatnonzero(entry.counts[ids:]) + ids
    if len(strange):
        shown = ", ".join(f"{i} ({entry.counts[i]} pixels)" for i in strange[:5])
        wrong.append(Problem("unknown label ids", f"{entry.label}: {shown}; label ids are 0 to {ids - 1}"))
    return entry


def _splits(found: Inspection) -> Iterator[Problem]:
    for split, key in ((found.train_split, "data.train_split"), (found.val_split, "data.val_split")):
        if not any(entry.image for entry in found.of(split)):
            there = ", ".join(found.splits)
            yield Problem("empty split", f"{key}: {split!r} has no image (splits there: {there})")


def _duplicates(found: Inspection) -> Iterator[Problem]:
    same: Mapping[str, list[Entry]] = defaultdict(list)
    for entry in found.entries:
        if entry.digest:
            same[entry.digest].append(entry)
    for entries in same.values():
        if len(entries) < 2:
            continue
        across = len({entry.split for entry in entries}) > 1
        kind = "the same image in several splits" if across else "the same image twice"
        more = f" and {len(entries) - 2} more" if len(entries) > 2 else ""
        first = entries[0]
        other = next((e for e in entries if e.split != first.split), entries[1])
        yield Problem(kind, f"{first.image} = {other.image}{more}")


def _instance_files(found: Inspection) -> Iterator[Problem]:
    for split in found.splits:
        labels = [e.label for e in found.of(split) if e.label]
        missing = [p for p in labels if not p.with_name(p.name.replace("_gtFine_labelIds.png", _INSTANCES)).is_file()]
        if 0 < len(missing) < len(labels):
            text = f"split {split!r}: {len(missing)} of {len(labels)} labels, the first is {missing[0]}"
            yield Problem("no instance ids beside some labels", text)


def _sizes(found: Inspection) -> Iterator[Problem]:
    for split in found.splits:
        sizes = sorted({entry.size for entry in found.of(split) if entry.size})
        if len(sizes) > 1:
            shown = ", ".join(f"{w} x {h}" for h, w in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
            yield Problem("images of several sizes", f"split {split!r}: {shown}")


def _train_ids(found: Inspection) -> Iterator[Problem]:
    counts = np.sum([entry.counts for entry in found.entries], axis=0)
    classes = len(found.evaluated)
    if counts.any() and max(found.evaluated) >= classes and not counts[classes:255].any():
        text = f"no label id of {classes} to {len(found.names) - 1} in any file; convert with seg.labels.to_label_ids"
        yield Problem("labels look like train ids", text)


def _classes(found: Inspection) -> Iterator[Problem]:
    train, val = found.shares(found.train_split), found.shares(found.val_split)
    if not any(train.values()):
        return
    for name, share in train.items():
        if share == 0 and val[name] > 0:
            text = f"{name}: not one pixel in {found.train_split!r}, but in {found.val_split!r}"
            yield Problem("class that cannot be learned", text)
        elif share == 0:
            yield Problem(
                "class that never occurs", f"{name}: neither in {found.train_split!r} nor {found.val_split!r}"
            )
        elif share < RARE:
            images = int(found.images_with(found.train_split)[found.names.index(name)])
            yield Problem("rare class", f"{name}: {100 * share:.3f}% of the pixels, in {images} training images")

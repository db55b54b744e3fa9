"""A look at a data set before training: what there is, class shares, and what is broken or odd. Nothing is changed.

Unlike `seg.data`, which stops at the first file that is wrong, this lists all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.images import stored_orientation
from seg.cityscapes import Key, Listing
from seg.config import DataConfig
from seg.data import check_scales, read_rgb
from seg.dataset_files import near
from seg.datasets import listing, parts, splits
from seg.labels import LabelTable, read_instance_ids, read_label_ids, table
from seg.metrics import instance_label
from seg.own_data import suffix_hint
from seg.per_image import told

RARE = 0.001
"""Share of the labelled pixels below which a class is called rare."""


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
    instance: Path | None = None
    unlabelled: bool = False
    """Whether its split has no public labels."""
    size: tuple[int, int] | None = None
    """Height and width of the image in pixels; None if it can't be read."""
    orientation: int = 1
    """EXIF orientation by which the image was turned; 1 if it is as it is stored."""
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

    data: DataConfig
    labels: LabelTable
    entries: list[Entry]
    problems: list[Problem]

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(entry.split for entry in self.entries))

    def of(self, split: str) -> list[Entry]:
        """The files of a split, or of several joined by +."""
        return [entry for entry in self.entries if entry.split in parts(split)]

    def pixels(self, split: str) -> NDArray[np.int64]:
        """Pixels by label id, int64 (256,)."""
        return np.sum([entry.counts for entry in self.of(split)] or [np.zeros(256, np.int64)], axis=0)

    def class_pixels(self, split: str) -> list[int]:
        """Pixels of each class; labels that are merged count together."""
        pixels = self.pixels(split)
        return [int(pixels[ids].sum()) for ids in self.label_ids]

    def class_images(self, split: str) -> list[int]:
        """Images that hold each class."""
        present = np.array([entry.counts > 0 for entry in self.of(split)], bool).reshape(-1, 256)
        return [int(present[:, ids].any(1).sum()) for ids in self.label_ids]

    def shares(self, split: str) -> dict[str, float]:
        """Share of each class in the pixels of all classes; 0 for all where there are none."""
        pixels = self.class_pixels(split)
        return {name: n / max(1, sum(pixels)) for name, n in zip(self.labels.classes, pixels, strict=True)}

    @property
    def label_ids(self) -> list[list[int]]:
        """The label ids of each class."""
        return [[self.labels.labels[place].id for place in group] for group in self.labels.groups]

    def colours(self, split: str) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of R, G, B in [0, 1] (every fourth pixel); None without images."""
        sums = np.sum([entry.colour for entry in self.of(split)] or [np.zeros(7)], axis=0)
        if not sums[0]:
            return None
        mean = sums[1:4] / sums[0]
        return mean.tolist(), np.sqrt(np.maximum(0, sums[4:] / sums[0] - mean**2)).tolist()


def inspect(data: DataConfig, say: Callable[[str], None] = print) -> Inspection:
    """Read every file of the splits that an experiment uses, and of the split test if there is one.

    Args:
        data: says where which data set lies.
        say: takes a line of progress.

    Raises:
        UserError: neither the training nor the validation split is there, with what a training says of it; or the table
            of labels is wrong.
    """
    entries, problems = find(data)
    labels = table(data)

    def look(entry: Entry) -> Entry:
        _look(entry, labels)
        if entry.image is not None and entry.size is not None and entry.split in parts(data.train_split):
            try:
                check_scales(entry.image, entry.size, data)
            except UserError as error:
                entry.problems.append(Problem("image that cannot be scaled", str(error)))
        return entry

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        seen = list(told(pool.map(look, entries), len(entries), "files", say))
    found = Inspection(data, labels, seen, problems)
    found.problems.extend(problem for entry in seen for problem in entry.problems)
    for check in (_duplicates, _instance_files, _sizes, _turned, _train_ids, _one_class, _unlabelled_splits, _classes):
        found.problems.extend(check(found))
    return found


def find(data: DataConfig) -> tuple[list[Entry], list[Problem]]:
    """Images and labels of the splits, paired by city and name; one of the two may be missing. Nothing is read.

    A split that is not there is a problem, but for test, which need not be.

    Raises:
        UserError: none of those that are needed is there.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    first: UserError | None = None
    for split in splits(data):
        try:
            found = listing(data, split)
        except UserError as error:
            if split != "test" or split in (*parts(data.train_split), data.val_split):
                problems.append(Problem("split that cannot be used", f"{split}: {error}"))
                first = first or error
            continue
        entries += _entries(split, found)
        problems += [Problem("two files for one image", f"{a} and {b.name}") for a, b in found.twice]
        if hint := suffix_hint(data, found.images, found.labels or {}):
            problems.append(Problem("suffixes that are not given", f"{split}: {hint.strip()}"))
    if first is not None and all(entry.split == "test" for entry in entries):
        raise first
    return entries, list(dict.fromkeys(problems))


def _entries(split: str, found: Listing) -> list[Entry]:
    labels = found.labels or {}
    return [
        _paired(Entry(split, *key, found.images.get(key), labels.get(key), found.instances.get(key)), key, found)
        for key in sorted(found.images.keys() | labels.keys())
    ]


def _paired(entry: Entry, key: Key, found: Listing) -> Entry:
    """The entry, which notes that its image or its label is missing."""
    entry.unlabelled = found.labels is None
    if entry.image is None:
        lonely = f"{entry.label}{near(key, found.images)}"
        entry.problems.append(Problem("label without image", lonely))
    elif entry.label is None and found.labels is not None:
        entry.problems.append(Problem("image without label", f"{entry.image}{near(key, found.labels)}"))
    return entry


def _look(entry: Entry, labels: LabelTable) -> None:
    """Read the files of an entry and note what is wrong with them."""
    if entry.image is not None:
        _look_at_image(entry, entry.image)
    if entry.label is not None:
        _look_at_label(entry, entry.label, labels)
    if entry.instance is not None:
        _look_at_instances(entry, entry.instance)


def _look_at_image(entry: Entry, path: Path) -> None:
    try:
        image = read_rgb(path)
    except UserError as error:
        entry.problems.append(Problem("unreadable image", str(error)))
        return
    entry.size, entry.orientation = (image.shape[0], image.shape[1]), stored_orientation(path)
    entry.digest = hashlib.blake2b(image.tobytes() + str(image.shape).encode(), digest_size=16).hexdigest()
    some = image[::4, ::4].reshape(-1, 3) / 255
    entry.colour = np.array([len(some), *some.sum(0), *(some**2).sum(0)])
    if (image == image[0, 0]).all():
        entry.problems.append(Problem("image of one colour", str(path)))
    elif image.max() < 16:  # what 12 bits leave
        text = (
            f"{path}: its brightest value is {image.max()} of 255; of 16 bits the upper byte is read: scale values of "
            "10 or 12 bits to 16 before"
        )
        entry.problems.append(Problem("image that is almost black", text))


def _look_at_label(entry: Entry, path: Path, labels: LabelTable) -> None:
    try:
        label = read_label_ids(path)
    except UserError as error:
        entry.problems.append(Problem("unreadable label", str(error)))
        return
    entry.counts = np.bincount(label.ravel(), minlength=256)
    _compare_size(entry, "label", path, (label.shape[0], label.shape[1]))
    strange = {int(i): int(entry.counts[i]) for i in np.flatnonzero((entry.counts > 0) & (labels.places < 0))}
    if strange:
        entry.problems.append(Problem("unknown label ids", str(labels.unknown_ids(path, strange))))


def _look_at_instances(entry: Entry, path: Path) -> None:
    try:
        instances = read_instance_ids(path)
    except UserError as error:
        entry.problems.append(Problem("unreadable instance ids", str(error)))
        return
    _compare_size(entry, "instance ids", path, (instances.shape[0], instances.shape[1]))
    try:
        for instance in np.unique(instances[instances > 1000]).tolist():
            instance_label(instance, str(path))
    except UserError as error:
        entry.problems.append(Problem("wrong instance ids", str(error)))


def _compare_size(entry: Entry, what: str, path: Path, size: tuple[int, int]) -> None:
    if entry.size is not None and size != entry.size:
        sizes = f"{size[1]} x {size[0]}, its image {entry.size[1]} x {entry.size[0]}"
        entry.problems.append(Problem(f"{what} of another size than its image", f"{path}: {sizes}"))


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
        if first.image == other.image:  # two splits may share images, such as VOC's train and trainval
            text = f"{first.image} in {first.split!r} and {other.split!r}"
        else:
            text = f"{first.image} = {other.image}"
        yield Problem(kind, text + more)


def _instance_files(found: Inspection) -> Iterator[Problem]:
    for split in found.splits:
        labelled = [entry for entry in found.of(split) if entry.label]
        missing = [entry.label for entry in labelled if entry.instance is None]
        if 0 < len(missing) < len(labelled):
            text = f"split {split!r}: {len(missing)} of {len(labelled)} labels, the first is {missing[0]}"
            yield Problem("no instance ids beside some labels", text)


def _sizes(found: Inspection) -> Iterator[Problem]:
    for split in found.splits:
        sizes = sorted({entry.size for entry in found.of(split) if entry.size})
        if len(sizes) > 1:
            shown = ", ".join(f"{w} x {h}" for h, w in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
            yield Problem("images of several sizes", f"split {split!r}: {shown}")


def _turned(found: Inspection) -> Iterator[Problem]:
    """A label file has no orientation: one drawn on the pixels as they are stored lies elsewhere, and where the size
    stays the same (upside down, mirrored, square) nothing else tells."""
    for split in found.splits:
        turned = [entry for entry in found.of(split) if entry.orientation != 1 and entry.label is not None]
        if turned:
            text = (
                f"split {split!r}: {len(turned)}, the first is {turned[0].image}; see on the page of --out whether "
                "the labels lie on the upright images, or store these upright"
            )
            yield Problem("images turned by their EXIF orientation", text)


def _train_ids(found: Inspection) -> Iterator[Problem]:
    """Of Cityscapes' label ids alone: those of a table of one's own may be small by chance."""
    counts = np.sum([entry.counts for entry in found.entries], axis=0)
    classes = found.labels.num_classes
    if found.labels.is_official and counts.any() and not counts[classes:255].any():
        last = len(found.labels.labels) - 1
        text = f"no label id of {classes} to {last} in any file; convert with seg.labels.to_label_ids"
        yield Problem("labels look like train ids", text)


def _one_class(found: Inspection) -> Iterator[Problem]:
    if found.labels.num_classes == 1:
        text = f"{found.labels.classes[0]}: a training refuses it; give the rest a train_id in place of ignoring it"
        yield Problem("one class alone", text)


def _unlabelled_splits(found: Inspection) -> Iterator[Problem]:
    """Splits from which nothing is learned, or on which nothing is scored, though each of their files is sound."""
    for split in dict.fromkeys((*parts(found.data.train_split), found.data.val_split)):
        if any(entry.unlabelled for entry in found.of(split)):
            text = f"{split}: has no public labels, so nothing is trained or scored on it; name another split"
            yield Problem("split without labels", text)
    for split in dict.fromkeys((found.data.train_split, found.data.val_split)):
        pixels = int(found.pixels(split).sum())
        if pixels and not any(found.class_pixels(split)):
            text = f"{split}: none of its {pixels:,} label pixels has an evaluated class, all are ignored or unknown"
            yield Problem("split without labelled pixels", text)


def _classes(found: Inspection) -> Iterator[Problem]:
    train_split, val_split = found.data.train_split, found.data.val_split
    train, val = found.shares(train_split), found.shares(val_split)
    if not any(train.values()):
        return  # what there is to say of each class is said of the split
    images = dict(zip(found.labels.classes, found.class_images(train_split), strict=True))
    for name, share in train.items():
        if share == 0 and val[name] > 0:
            text = f"{name}: not one pixel in {train_split!r}, but in {val_split!r}"
            yield Problem("class that cannot be learned", text)
        elif share == 0:
            yield Problem("class that never occurs", f"{name}: neither in {train_split!r} nor {val_split!r}")
        elif share < RARE:
            text = f"{name}: {100 * share:.3f}% of the pixels, in {images[name]} training images"
            yield Problem("rare class", text)

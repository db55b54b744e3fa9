"""The files of Cityscapes, and what a sample of any data set is.

Files: `leftImg8bit/<split>/<city>/<name>_leftImg8bit.{png,jpg}` with `gtFine/<split>/<city>/<name>_gtFine_labelIds.png`
and, if there are any, `..._gtFine_instanceIds.png`; for the coarse labels `gtCoarse` in place of `gtFine`. The split
`test` has no public labels: what lies there is not read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError

GET_DATA = (
    "Download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (or "
    "with cityscapesscripts: `csDownload leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip`) and unpack both into "
    "this one folder; or render sample data: `python tools/make_sample.py data/sample`, then data.root=data/sample."
)
"""What to do when files of the data set are missing."""
GET_COARSE = (
    "Download leftImg8bit_trainextra.zip and gtCoarse.zip from https://www.cityscapes-dataset.com (or with "
    "cityscapesscripts: `csDownload leftImg8bit_trainextra.zip gtCoarse.zip`) and unpack both into the same folder as "
    "the fine labels; or set data.coarse_share=0."
)
"""The same for the coarse labels."""


@dataclass(frozen=True)
class Sample:
    """The files of one image; `name` is what they have in common, such as aachen_000000_000019."""

    image: Path
    label: Path | None
    instance: Path | None
    name: str
    city: str


Key = tuple[str, str]
"""City and name of an image; data sets without cities have '' there."""


@dataclass
class Listing:
    """The files of a split as they lie there, in a fixed order, whether or not each image has its label."""

    images: dict[Key, Path]
    labels: dict[Key, Path] | None
    """None: the split has no public labels, and what lies there is not read."""
    instances: dict[Key, Path] = field(default_factory=dict)
    twice: list[tuple[Path, Path]] = field(default_factory=list)
    """Files that are one too many, each with the one that came first."""
    source: Path | None = None
    """The list that names the files, which need not be there; None where they were found in folders."""

    def samples(self) -> list[Sample]:
        """Every image with what goes with it.

        Raises:
            UserError: two files for one image.
        """
        if self.twice:
            path, first = self.twice[0]
            raise UserError(f"{path} and {first.name} are two files for one image; remove one of them.")
        labels = self.labels or {}
        return [
            Sample(path, labels.get(key), self.instances.get(key), key[1], key[0]) for key, path in self.images.items()
        ]


class Cityscapes:
    """The files of one split, in a fixed order, with their fine labels or (`kind` gtCoarse) the coarse ones.

    Raises:
        UserError: folders or files are missing; the message says which and how to get them.
    """

    def __init__(self, root: Path | str, split: str, kind: str = "gtFine") -> None:
        self.root, self.split, self.kind = Path(root), split, kind
        found = listing(self.root, split, kind)
        self.samples = found.samples()
        if found.labels is not None:
            images, labels, instances = found.images, found.labels, found.instances
            self._complete(images, labels, f"_{kind}_labelIds.png", "images have no label file")
            self._complete(labels, images, "_leftImg8bit.png", "label files have no image")
            if instances:
                self._complete(
                    labels, instances, f"_{kind}_instanceIds.png", "label files have no instance ids, others do"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def _complete(self, have: dict[Key, Path], need: dict[Key, Path], ending: str, what: str) -> None:
        missing = sorted(have.keys() - need.keys())
        if missing:
            folder = "leftImg8bit" if "leftImg8bit" in ending else self.kind
            first = self.root / folder / self.split / missing[0][0] / (missing[0][1] + ending)
            raise UserError(
                f"{self.root} (data.root): half unpacked, in the split {self.split!r} {len(missing)} of {len(have)} "
                f"{what}; the first one missing is {first}. {_remedy(self.kind)}"
            )


def listing(root: Path, split: str, kind: str = "gtFine") -> Listing:
    """The files of one split with the labels of `kind`, gtFine or gtCoarse.

    Raises:
        UserError: a folder is missing, or there is no image in it; the message says which and how to get it.
    """
    if not root.is_dir():
        raise UserError(f"{root} (data.root): no such folder; expected leftImg8bit/ and {kind}/ in it. {_remedy(kind)}")
    twice: list[tuple[Path, Path]] = []

    def files(top: str, ending: str) -> dict[Key, Path]:
        return _files(_split_folder(root, top, split, kind), ending, twice)

    images = files("leftImg8bit", r"_leftImg8bit\.(?:png|jpe?g)")
    if not images:
        raise UserError(
            f"{root / 'leftImg8bit' / split}: the split is empty; expected <city>/*_leftImg8bit.png or .jpg. "
            + _remedy(kind)
        )
    if split == "test":
        return Listing(images, None, twice=twice)
    labels = files(kind, rf"_{kind}_labelIds\.png")
    return Listing(images, labels, files(kind, rf"_{kind}_instanceIds\.png"), twice)


def _split_folder(root: Path, top: str, split: str, kind: str) -> Path:
    if not (root / top).is_dir():
        archives = sorted(p.name for p in root.glob(f"{top}*.zip"))
        hint = f"{archives[0]} lies there and is not unpacked. " if archives else ""
        raise UserError(f"{root} (data.root): has no folder {top}/. {hint}{_remedy(kind)}")
    if not (root / top / split).is_dir():
        others = ", ".join(sorted(p.name for p in (root / top).iterdir() if p.is_dir())) or "none"
        raise UserError(f"{root / top}: has no split {split!r} (splits there: {others}). {_remedy(kind)}")
    return root / top / split


def _files(folder: Path, ending: str, twice: list[tuple[Path, Path]]) -> dict[Key, Path]:
    """The files of one kind in a split, sorted; `ending` is a regular expression. Second ones go to `twice`."""
    found: dict[Key, Path] = {}
    for path in sorted(folder.glob("[!.]*/[!.]*")):
        if match := re.fullmatch(f"(.+){ending}", path.name):
            key = path.parent.name, match[1]
            if key in found:
                twice.append((path, found[key]))
            found.setdefault(key, path)
    return dict(sorted(found.items()))


def _remedy(kind: str) -> str:
    return GET_DATA if kind == "gtFine" else GET_COARSE

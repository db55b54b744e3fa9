"""The files of Cityscapes, and what a sample of any data set is.

Files: `leftImg8bit/<split>/<city>/<name>_leftImg8bit.{png,jpg}` with `gtFine/<split>/<city>/<name>_gtFine_labelIds.png`
and, if there are any, `..._gtFine_instanceIds.png`; for the coarse labels `gtCoarse` in place of `gtFine`. The split
`test` has no public labels: what lies there is not read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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


class Cityscapes:
    """The files of one split, in a fixed order, with their fine labels or (`kind` gtCoarse) the coarse ones.

    Raises:
        UserError: folders or files are missing; the message says which and how to get them.
    """

    def __init__(self, root: Path | str, split: str, kind: str = "gtFine") -> None:
        self.root, self.split, self.kind = Path(root), split, kind
        self.remedy = GET_DATA if kind == "gtFine" else GET_COARSE
        if not self.root.is_dir():
            raise UserError(
                f"{self.root} (data.root): no such folder; expected leftImg8bit/ and {kind}/ in it. {self.remedy}"
            )
        found = self._files("leftImg8bit", r"_leftImg8bit\.(?:png|jpe?g)")
        if not found:
            raise UserError(
                f"{self.root / 'leftImg8bit' / split}: the split is empty; expected <city>/*_leftImg8bit.png or .jpg. "
                + self.remedy
            )
        labels: dict[tuple[str, str], Path] = {}
        instances: dict[tuple[str, str], Path] = {}
        if split != "test":
            labels = self._files(kind, rf"_{kind}_labelIds\.png")
            self._complete(found, labels, f"_{kind}_labelIds.png", "images have no label file")
            self._complete(labels, found, "_leftImg8bit.png", "label files have no image")
            instances = self._files(kind, rf"_{kind}_instanceIds\.png")
            if instances:
                self._complete(
                    labels, instances, f"_{kind}_instanceIds.png", "label files have no instance ids, others do"
                )
        self.samples: list[Sample] = [
            Sample(path, labels.get(key), instances.get(key), key[1], key[0]) for key, path in sorted(found.items())
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def _files(self, kind: str, ending: str) -> dict[tuple[str, str], Path]:
        """(city, name) -> path of the files of one kind in this split; `ending` is a regular expression."""
        top = self.root / kind
        if not top.is_dir():
            archives = sorted(p.name for p in self.root.glob(f"{kind}*.zip"))
            hint = f"{archives[0]} lies there and is not unpacked. " if archives else ""
            raise UserError(f"{self.root} (data.root): has no folder {kind}/. {hint}{self.remedy}")
        if not (top / self.split).is_dir():
            others = ", ".join(sorted(p.name for p in top.iterdir() if p.is_dir())) or "none"
            raise UserError(f"{top}: has no split {self.split!r} (splits there: {others}). {self.remedy}")
        files: dict[tuple[str, str], Path] = {}
        for path in sorted((top / self.split).glob("[!.]*/[!.]*")):
            match = re.fullmatch(f"(.+){ending}", path.name)
            if match is None:
                continue
            key = path.parent.name, match[1]
            if key in files:
                raise UserError(f"{path} and {files[key].name} are two files for one image; remove one of them.")
            files[key] = path
        return files

    def _complete(
        self, have: dict[tuple[str, str], Path], need: dict[tuple[str, str], Path], ending: str, what: str
    ) -> None:
        missing = sorted(have.keys() - need.keys())
        if missing:
            folder = "leftImg8bit" if "leftImg8bit" in ending else self.kind
            first = self.root / folder / self.split / missing[0][0] / (missing[0][1] + ending)
            raise UserError(
                f"{self.root} (data.root): half unpacked, in the split {self.split!r} {len(missing)} of {len(have)} "
                f"{what}; the first one missing is {first}. {self.remedy}"
            )

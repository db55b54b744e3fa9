"""The layouts of `data.name: folder`, one's own images and masks: a folder for each split, lists of the splits' files,
or one folder that is divided into train and val.

    images/<split>/**/<name><image_suffix>.<any image suffix>   masks/<split>/**/<name><mask_suffix>.png

Masks hold 8-bit label ids; `labels.yaml` (see `seg.label_yaml`; `data.labels` names another file) says what they mean.
`images` and `masks` may be called otherwise (`data.images`, `data.masks`).
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.images import SUFFIXES
from seg.cityscapes import Key, Listing
from seg.config import DataConfig
from seg.dataset_files import Files, files_in, folder_in, lines_of, list_of, listed, near

MAKE_FOLDER = (
    "Put images into images/train and images/val, and for each a PNG of label ids with the same name into masks/train "
    "and masks/val; labels.yaml beside them names the ids (see seg/label_yaml.py). Or say where the files lie: "
    "data.images, data.masks, data.image_suffix, data.mask_suffix, data.lists, data.val_share (docs/segmentation.md)."
)
_LINES = (
    "Expected in each line the name of an image below data.images, without data.image_suffix and extension, or the "
    "paths of image and mask in data.root with a blank or tab between them."
)


def folder(cfg: DataConfig, split: str) -> Listing:
    """Your own, as this module says; sizes may differ. A split without a folder below masks/ comes without labels if it
    is called test; so does a list of that name none of whose images has a mask."""
    if cfg.lists is not None:
        return _from_list(cfg, split, cfg.lists)
    if cfg.val_share and split != "test":
        return _divided(cfg, split)
    images = _required(cfg, cfg.root / cfg.images / split, False)
    place = cfg.root / cfg.masks / split
    if split == "test" and (not place.is_dir() or (_together(cfg) and not _files(cfg, place, True).files)):
        return listed(images)
    return listed(images, _required(cfg, place, True))


def division(cfg: DataConfig) -> str:
    """What `data.val_share` does, for a message; '' without it.

    Raises:
        UserError: as `folder`.
    """
    if not cfg.val_share:
        return ""
    names = _undivided(cfg, False).files
    val = sum(_is_val(name, cfg.val_share) for name in names)
    return (
        f"{val} of {len(names)} images are val (data.val_share={cfg.val_share:g}, by a hash of their names); "
        "neighbouring frames of a video on both sides make scores too good: list whole drives instead (data.lists)"
    )


def suffix_hint(cfg: DataConfig, images: Iterable[Key], masks: Iterable[Key]) -> str:
    """The suffixes with which every image would have its mask, as a sentence with a blank behind it; '' if there are no
    such ones, or none are needed."""
    image_names, mask_names = sorted({name for _, name in images}), {name for _, name in masks}
    if cfg.name != "folder" or len(image_names) < 2:  # of one pair any two names are the same but for their ends
        return ""
    for one in _ends(image_names):
        bases = [name.removesuffix(one) for name in image_names]
        ends = sorted(name.removeprefix(bases[0]) for name in mask_names if name.startswith(bases[0]))
        ends = [end for end in ends if all(base + end in mask_names for base in bases)]
        if not one and "" in ends:
            return ""
        if ends:
            image_key = f"data.image_suffix={one}{cfg.image_suffix}" if one else ""
            mask_key = f"data.mask_suffix={' or '.join(end + cfg.mask_suffix for end in ends)}" if any(ends) else ""
            return f"With {' '.join(filter(None, (image_key, mask_key)))} every image has its mask. "
    return ""


def _ends(names: Sequence[str]) -> list[str]:
    """'' and what all names end in, from each of its separators on."""
    common = os.path.commonprefix([name[::-1] for name in names])[::-1]
    return ["", *(common[found.start() :] for found in re.finditer(r"[_\-.]", common))]


# ---------------------------------------------------------------- folders


def _together(cfg: DataConfig) -> bool:
    return cfg.images == cfg.masks


def _files(cfg: DataConfig, top: Path, masks: bool) -> Files:
    """The images, or the masks, below `top`, by their names without suffix."""
    ending, other = (cfg.mask_suffix, cfg.image_suffix) if masks else (cfg.image_suffix, cfg.mask_suffix)
    # of two suffixes that both fit a name, such as _rgb and _mask_rgb, the longer one says what it is
    return files_in(top, ending=ending, without=other if _together(cfg) and len(other) > len(ending) else "")


def _required(cfg: DataConfig, top: Path, masks: bool) -> Files:
    """The same. Raises UserError: no such folder, or no name has the suffix."""
    found = _files(cfg, folder_in(cfg, top, MAKE_FOLDER), masks)
    key, ending = ("mask_suffix", cfg.mask_suffix) if masks else ("image_suffix", cfg.image_suffix)
    if ending and not found.files and (others := files_in(top).files):
        raise UserError(
            f"{top}: none of its {len(others)} image files has a name that ends in {ending!r} (data.{key}) before the "
            f"extension; the first is {next(iter(others.values())).relative_to(top)}."
        )
    return found


# ---------------------------------------------------------------- one folder that is divided


def _divided(cfg: DataConfig, split: str) -> Listing:
    """train or val of a folder that has neither."""
    if split not in ("train", "val"):
        raise UserError(
            f"{cfg.root} (data.root): data.val_share makes no split {split!r}; expected train, val, or test (a folder)."
        )
    images, masks = _undivided(cfg, False), _undivided(cfg, True)
    chosen = {name for name in images.files if _is_val(name, cfg.val_share) == (split == "val")}
    if images.files and not chosen:
        raise UserError(
            f"{cfg.root} (data.root): none of the {len(images.files)} images is {split} with "
            f"data.val_share={cfg.val_share:g}; choose another share, or list the splits' images (data.lists)."
        )
    kept = Files({name: path for name, path in images.files.items() if name in chosen}, images.twice)
    # a mask without an image is wrong in either split
    own = {name: path for name, path in masks.files.items() if name in chosen or name not in images.files}
    return listed(kept, Files(own, masks.twice))


def _undivided(cfg: DataConfig, masks: bool) -> Files:
    """The images, or the masks, of train and val together: all but those of a folder test."""
    place = cfg.masks if masks else cfg.images
    for split in ("train", "val"):
        if (top := cfg.root / place / split).is_dir():
            raise UserError(
                f"{top}: data.val_share={cfg.val_share:g} divides a folder that has no train and val in it; set it to "
                f"0, or to divide the images of one of them name it: data.images={cfg.images / split} "
                f"data.masks={cfg.masks / split}."
            )
    found = _required(cfg, cfg.root / place, masks)
    apart = [cfg.root / place / "test"]
    other = cfg.root / (cfg.images if masks else cfg.masks)
    if other != cfg.root / place and other.is_relative_to(cfg.root / place):
        apart.append(other)  # images/masks, say

    def own(path: Path) -> bool:
        return not any(path.is_relative_to(folder) for folder in apart)

    files = {name: path for name, path in found.files.items() if own(path)}
    return Files(files, [pair for pair in found.twice if all(map(own, pair))])


def _is_val(name: str, share: float) -> bool:
    """By the name alone: the same on each machine and whatever other images there are; a larger share keeps the val
    images of a smaller one. Unicode is normalised, since file systems differ in that."""
    data = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < share * 2**64


# ---------------------------------------------------------------- lists


class _Line(NamedTuple):
    """What a line of a list names."""

    image: Path
    mask: Path | None


class _Refused(Exception):
    """What is wrong with a line; `name` is what it has and `known` has not, but may have with an ending."""

    def __init__(self, reason: str, name: str = "", known: Iterable[str] = ()) -> None:
        self.reason, self.name, self.known = reason, name, known

    def __str__(self) -> str:
        return self.reason + near(("", self.name), (("", one) for one in self.known))


class _Reader:
    """Finds what the lines of the list of `split` name."""

    def __init__(self, cfg: DataConfig, split: str) -> None:
        self.cfg, self.split, self.top = cfg, split, cfg.root / cfg.images
        self.images, self.masks = self._there(self.top, False), self._there(cfg.root / cfg.masks, True)
        self.twice = {first: path for path, first in (*self.images.twice, *self.masks.twice)}

    def read(self, line: str) -> _Line:
        """Raises _Refused."""
        image = self._named(line, self.images)
        if image is None:
            for first, second in self._pairs(line):
                if isfile(first) and isfile(second):
                    return _Line(self._plain(first), second)
            places = (self.cfg.root / line, self.top / line, self.top / self.split / line)
            image = next(filter(isfile, places), None)
        if image is None:
            raise self._missing(line)
        image = self._plain(image)
        return _Line(image, self._named(self.name(image), self.masks))

    def _plain(self, image: Path) -> Path:
        """The same file by one spelling of its path, so that it does not train twice: in data.root, if it is there."""
        place, root = Path(os.path.abspath(image)), Path(os.path.abspath(self.cfg.root))
        return self.cfg.root / place.relative_to(root) if place.is_relative_to(root) else place

    def name(self, image: Path) -> str:
        """What an image is called: its path below data.images, or data.root, without suffix and extension."""
        top = next((top for top in (self.top, self.cfg.root) if image.is_relative_to(top)), Path(image.anchor))
        return image.relative_to(top).with_suffix("").as_posix().removesuffix(self.cfg.image_suffix)

    def _there(self, top: Path, masks: bool) -> Files:
        return _files(self.cfg, top, masks) if top.is_dir() else Files({}, [])

    def _named(self, name: str, known: Files) -> Path | None:
        """The file of a name, which may leave out the folder of its split or have it too much."""
        names = (name, f"{self.split}/{name}", name.removeprefix(f"{self.split}/"))
        hits = list(dict.fromkeys(known.files[one] for one in names if one in known.files))
        if hits and (others := [*hits[1:], *(path for path in [self.twice.get(hits[0])] if path)]):
            raise _Refused(f"{name!r} may be {hits[0]} or {others[0]}; remove or rename one of them")
        return hits[0] if hits else None

    def _pairs(self, line: str) -> list[tuple[Path, Path]]:
        """What image and mask may be: the parts of a line on both sides of its tab, or of each of its blanks."""
        at = [found.span() for found in re.finditer(r"\s*\t\s*" if "\t" in line else r"\s+", line)]
        return [(self.cfg.root / line[:start], self.cfg.root / line[end:]) for start, end in at]

    def _missing(self, line: str) -> _Refused:
        pair = next(iter(self._pairs(line)), None)
        if pair and pair[0].suffix.lower() in SUFFIXES:  # else a name may have a blank in it
            there = [f"{what} {path}" for what, path in zip(("image", "mask"), pair, strict=True) if not isfile(path)]
            return _Refused(f"no {' and no '.join(there)}")
        where = f"below {self.top}" if self.top.is_dir() else f"since there is no folder {self.top} (data.images)"
        return _Refused(f"no image {line + self.cfg.image_suffix!r} {where}", line, self.images.files)


def _from_list(cfg: DataConfig, split: str, lists: Path) -> Listing:
    """The files that the list of a split names, in its order.

    Raises:
        UserError: no such list; it is empty; a line of it names no image, a file that is not there, or an image that
            another line names too.
    """
    place = folder_in(cfg, cfg.root / lists, f"Put train.txt and val.txt into it. {_LINES}")
    path, reader = list_of(place, split, _LINES), _Reader(cfg, split)
    lines, first, wrong = dict[str, _Line](), dict[str, int](), list[tuple[int, _Refused]]()
    for number, text in lines_of(path, "an image's name, or the paths of image and mask,"):
        try:
            line = reader.read(text)
            name = reader.name(line.image)
            if name in lines:
                raise _Refused(f"names {line.image}, as line {first[name]} does; expected each image once")
            lines[name], first[name] = line, number
        except _Refused as error:
            wrong.append((number, error))
    unlabelled = split == "test" and not any(line.mask for line in lines.values())
    top = cfg.root / cfg.masks
    for name in (name for name, line in lines.items() if line.mask is None and not unlabelled):
        reason = f"no mask {name + cfg.mask_suffix!r} below {top}"
        wrong.append((first[name], _Refused(reason, name, reader.masks.files)))
    if wrong:
        number, refused = min(wrong, key=lambda one: one[0])
        more = f" ({len(wrong)} lines are wrong, this is the first)" if len(wrong) > 1 else ""
        raise UserError(f"{path}: line {number}: {refused}{more}. {_LINES}")
    if not lines:
        raise UserError(f"{path}: names no image. {_LINES}")
    masks = {("", name): line.mask for name, line in lines.items() if line.mask is not None}
    return Listing({("", name): line.image for name, line in lines.items()}, None if unlabelled else masks)

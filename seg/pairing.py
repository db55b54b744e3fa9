"""Which predicted PNG belongs to which label file: as the official evaluation of Cityscapes finds them, or by the names
of a data set's images.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.errors import UserError
from engine.images import show
from seg.cityscapes import Sample
from seg.config import DataConfig

TRUTH = "_gtFine_labelIds.png"
"""Ending of Cityscapes' label files."""
_WRITTEN = "_labelIds"
"""What tools/predict.py and tools/submit.py add to a name."""


def pair_files(predictions: Path, ground_truth: Path) -> list[tuple[Path, Path]]:
    """(prediction, label file) pairs: a prediction's name begins with its label file's, up to `_gtFine_labelIds.png`.

    Raises:
        UserError: no such folder, no label files, a label file without a prediction or with several.
    """
    for folder, option in ((predictions, "--predictions"), (ground_truth, "--ground-truth")):
        _folder(folder, option)
    truths = [path for path in _pngs(ground_truth) if path.name.endswith(TRUTH)]
    if not truths:
        raise UserError(
            f"{ground_truth} (--ground-truth): no *{TRUTH} in it; give a folder such as gtFine/val. For another data "
            "set give data.name=... and data.root=... in place of --ground-truth."
        )
    files = sorted(_pngs(predictions), key=lambda path: (path.name, path))
    names = [path.name for path in files]
    pairs, missing = [], []
    for truth in sorted(truths):
        prefix = truth.name.removesuffix(TRUTH)
        found = []
        for place in range(bisect_left(names, prefix), len(names)):
            if not names[place].startswith(prefix):
                break
            if not names[place][len(prefix)].isdigit():  # frame 10 begins with frame 1
                found.append(files[place])
        if len(found) > 1:
            raise _several(truth.name, found)
        pairs += [(path, truth) for path in found]
        missing += [] if found else [prefix]
    if missing:
        raise UserError(
            f"{predictions} (--predictions): no prediction for {len(missing)} of {len(truths)} label files in "
            f"{ground_truth}; the first one missing is {missing[0]}*.png."
        )
    return pairs


def pair_samples(predictions: Path, samples: Sequence[Sample], data: DataConfig, split: str) -> list[Path]:
    """The prediction of each sample, in their order: there must be exactly one for each, and no others.

    A prediction is called as the image or as its label file, with or without `_labelIds` behind it, in any folder below
    `predictions`. Where images in several folders have one name, a prediction lies in folders of the same names: below
    `night/GP010476` for an image in `rgb_anon/night/val/GP010476` or of the name `night/GP010476/...`.

    Args:
        predictions: searched recursively for PNGs.
        samples: those of `split`, as `seg.datasets` lists them.
        data: for the messages, and `data.root`.
        split: for the messages.

    Raises:
        UserError: no such folder; an image without a prediction, or with several; PNGs that belong to none, or that
            could belong to several.
    """
    _folder(predictions, "--predictions")
    owners: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        for name in _names(sample):
            owners[name].append(place)
    found: list[list[Path]] = [[] for _ in samples]
    surplus = []
    for path in sorted(_pngs(predictions)):
        possible = owners.get(path.stem, [])
        if len(possible) > 1:
            possible = _as_written(path.relative_to(predictions), possible, samples) or possible
        if len(possible) > 1:
            possible = _nearest(path.relative_to(predictions).parent, possible, samples, data.root)
        if len(possible) > 1:
            raise UserError(
                f"{show(path)} (--predictions): may belong to {samples[possible[0]].image} or to "
                f"{samples[possible[1]].image}, which have one name; put predictions into folders that are called as "
                "the images' (as tools/predict.py does when it is given the folder above)."
            )
        if possible:
            found[possible[0]].append(path)
        else:
            surplus.append(path)
    for sample, paths in zip(samples, found, strict=True):
        if len(paths) > 1:
            raise _several(sample.image, paths)
    missing = [sample for sample, paths in zip(samples, found, strict=True) if not paths]
    if missing or surplus:
        raise _do_not_fit(predictions, missing, surplus, samples, f"the split {split!r} of {data.name} in {data.root}")
    return [paths[0] for paths in found]


def _names(sample: Sample) -> set[str]:
    """What a prediction of the sample may be called, without suffix and folders."""
    files = [Path(sample.name).name, sample.image.stem, *([sample.label.stem] if sample.label else [])]
    return {name + ending for name in files for ending in ("", _WRITTEN)}


def _as_written(path: Path, possible: Sequence[int], samples: Sequence[Sample]) -> list[int]:
    """Those of the samples whose name with its folders is the prediction's, as tools/predict.py writes them, in its
    folder `labels` or as that folder."""
    name = path.with_suffix("").as_posix().removesuffix(_WRITTEN)
    return [place for place in possible if samples[place].name in (name, name.removeprefix("labels/"))]


def _nearest(folder: Path, possible: Sequence[int], samples: Sequence[Sample], root: Path) -> list[int]:
    """Those of the samples whose folders have the most names in common with the prediction's, from the last one up."""

    def common(place: int) -> int:
        sample = samples[place]
        own = sample.image.relative_to(root) if sample.image.is_relative_to(root) else sample.image
        return max(_shared_end(folder, own.parent), _shared_end(folder, Path(sample.name).parent))

    scores = [common(place) for place in possible]
    return [place for place, score in zip(possible, scores, strict=True) if score == max(scores)]


def _shared_end(one: Path, other: Path) -> int:
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.parts), len(other.parts)))


def _do_not_fit(
    predictions: Path, missing: Sequence[Sample], surplus: Sequence[Path], samples: Sequence[Sample], where: str
) -> UserError:
    told = []
    if missing:
        told.append(
            f"no prediction for {len(missing)} of the {len(samples)} images of {where}, the first is {missing[0].image}"
        )
    if surplus:
        of = "of them" if missing else f"of the {len(samples)} images of {where}"
        told.append(f"{len(surplus)} PNG{'s' * (len(surplus) != 1)} for none {of}, the first is {show(surplus[0])}")
    name = Path((missing or samples)[0].name).name
    return UserError(
        f"{predictions} (--predictions): {'; '.join(told)}. Expected one PNG of label ids for each image and no "
        f"others, called such as {name}.png or {name}{_WRITTEN}.png; add what is missing, move away what is too many."
    )


def _several(what: Path | str, found: Sequence[Path]) -> UserError:
    return UserError(
        f"{what}: {len(found)} predictions, {found[0]} and {found[1]}; expected one. "
        "Give a folder that holds the label PNGs only."
    )


def _folder(path: Path, option: str) -> None:
    if not path.is_dir():
        raise UserError(f"{path} ({option}): no such folder.")


def _pngs(folder: Path) -> Iterable[Path]:
    """PNG files below a folder; links to folders are followed, each real folder once."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(here, name) for name in files if name.endswith(".png") and not name.startswith("."))

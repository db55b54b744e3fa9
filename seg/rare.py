"""Classes that are rare: counting them, weighing them in the loss, showing images and places that have them more often.

    repeat factor   r(i) = max(1, max over the classes c of image i of sqrt(t / f(c)))    f: share of images with c
    median weight   w(c) = median of F / F(c)                   F(c): share of c in the pixels of images with c

The first from Gupta et al., LVIS, CVPR 2019, the second from Eigen & Fergus, ICCV 2015.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.images import write_bytes
from seg.cityscapes import Sample
from seg.config import DataConfig, SegConfig
from seg.datasets import samples as samples_of
from seg.datasets import split_name
from seg.labels import IGNORE, Ids, LabelTable, read_label_ids, table

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

CACHE = "class_counts.npz"
"""Name of the file that `class_counts` keeps."""


def class_counts(samples: Sequence[Sample], labels: LabelTable, cache: Path | None = None) -> Counts:
    """Pixels of each class in each label file, int64 (images, classes); ignored pixels are not counted.

    Args:
        samples: those to count, all with labels.
        labels: the table of their ids.
        cache: folder where the counts are kept as CACHE and found again as long as the table and the files' names,
            sizes and times are the same; None counts anew.

    Raises:
        UserError: a label file can't be read or holds an id that the table doesn't know.
    """
    key = _fingerprint(samples, labels)
    kept = None if cache is None else _kept(cache / CACHE, key)
    if kept is not None:
        return kept

    def count(sample: Sample) -> Counts:
        if sample.label is None:
            raise UserError(f"{sample.image}: has no label to count classes in; name a split with labels.")
        ids = labels.to_train_ids(read_label_ids(sample.label), sample.label)
        return np.bincount(ids.ravel(), minlength=256)[: labels.num_classes]

    # decoding leaves the interpreter's lock
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        counts = np.array(list(pool.map(count, samples)), np.int64).reshape(len(samples), labels.num_classes)
    if cache is not None:
        data = io.BytesIO()
        np.savez_compressed(data, counts=counts, key=np.array(key))
        write_bytes(cache / CACHE, data.getvalue())
    return counts


def class_shares(cfg: SegConfig, cache: Path | None = None, images: int | None = None) -> Shares:
    """Share of each class in the labelled pixels of the training split, float64 (classes,), sum 1.

    Args:
        cfg: its data section says what is counted.
        cache: as in `class_counts`.
        images: count as many, evenly spread, instead of all.

    Raises:
        UserError: as `class_counts`, or nothing is labelled.
    """
    return shares_of(_counts(cfg, cache, images), cfg.data)


def class_weights(cfg: SegConfig, cache: Path | None = None, images: int | None = None) -> tuple[float, ...]:
    """Median-frequency weight of each class for the loss; 1 for a class that does not occur. Arguments as
    `class_shares`."""
    counts = _counts(cfg, cache, images)
    shares_of(counts, cfg.data)
    return tuple(median_weights(counts).tolist())


def shares_of(counts: Counts, data: DataConfig) -> Shares:
    """Share of each class, from the training split's `class_counts`. Raises UserError if nothing is labelled."""
    total = counts.sum(0)
    if not total.any():
        raise UserError(
            f"{split_name(data, data.train_split)}: {len(counts)} label files: no pixel of any class, all are ignored; "
            "check data.name and the label table."
        )
    return total / total.sum()


def median_weights(counts: Counts) -> Shares:
    """Median-frequency weights, float64 (classes,), from `class_counts`; 1 where there is no pixel."""
    pixels = counts.sum(0)
    of_images = np.array([counts[row].sum() for row in (counts > 0).T], np.float64)
    weights = np.ones(len(pixels))
    present = pixels > 0
    frequency = pixels[present] / of_images[present]
    weights[present] = np.median(frequency) / frequency
    return weights


def repeat_factors(counts: Counts, threshold: float) -> Shares | None:
    """How often each image comes, float64 (images,), 1 and more; None if no class is rarer than `threshold`."""
    present = counts > 0
    share = present.mean(0)
    of_class = np.sqrt(threshold / np.maximum(share, 1e-12)).clip(min=1)
    factors: Shares = np.where(present, of_class, 1.0).max(1, initial=1.0)
    return factors if (factors > 1).any() else None


class Pool:
    """Which samples make up an epoch: `count` of them, a pure function of (seed, epoch).

    Without factors and coarse images each of the `count` once. With factors an image comes in proportion to its own,
    the fraction by lot. The share of coarse images goes through all of them in turn before one comes again.
    """

    def __init__(
        self, count: int, seed: int, factors: Shares | None = None, coarse: int = 0, coarse_share: float = 0.0
    ) -> None:
        self.count, self.seed, self.factors, self.coarse = count, seed, factors, coarse
        self.coarse_count = round(count * coarse_share) if coarse else 0
        if coarse and coarse_share and not self.coarse_count:
            raise UserError(
                f"data.coarse_share: {coarse_share:g} of an epoch of {count} images is less than one; set 0, or at "
                f"least {1 / count:.2g}"
            )

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Indices (count,) into the `count` samples followed by the coarse ones; n is the number of both, and i + k n
        stands for the repetition k of i."""
        fine_count = self.count - self.coarse_count
        if self.factors is None:
            fine = _in_turn(self.count, fine_count, epoch, (2, self.seed))
        else:
            random = np.random.default_rng([3, self.seed, epoch])
            copies = np.floor(self.factors + random.random(self.count)).astype(np.int64)
            fine = random.permutation(np.repeat(np.arange(self.count), copies))[:fine_count]
        if not self.coarse_count:
            return _numbered(fine, self.count + self.coarse)
        coarse = self.count + _in_turn(self.coarse, self.coarse_count, epoch, (4, self.seed))
        return _numbered(np.concatenate([fine, coarse]), self.count + self.coarse)


def window(mask: Ids, size: tuple[int, int], shares: Shares, random: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a crop around a pixel of one of the mask's classes, drawn by inverse share.

    Args:
        mask: train ids uint8 (H, W).
        size: height and width; what the mask has less of is taken whole.
        shares: pixel share of each train id in the data set.
        random: where the draws come from.
    """
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE])
    if not len(present):
        place = int(random.integers(mask.size))
    else:
        weights = 1 / np.maximum(shares[present], 1e-9)
        places = np.flatnonzero(mask.ravel() == random.choice(present, p=weights / weights.sum()))
        place = int(places[random.integers(len(places))])
    middle = divmod(place, mask.shape[1])
    starts = [min(max(0, at - s // 2), max(0, n - s)) for at, s, n in zip(middle, size, mask.shape, strict=True)]
    rows, columns = (slice(start, start + s) for start, s in zip(starts, size, strict=True))
    return rows, columns


def _in_turn(count: int, wanted: int, epoch: int, seed: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The part of `epoch` of an endless row of shuffles of 0 .. count - 1; all of them in order if all are wanted."""
    if wanted == count:
        return np.arange(count)
    first, last = epoch * wanted, (epoch + 1) * wanted
    rounds = range(first // max(1, count), -(-last // max(1, count)))
    row = [np.random.default_rng([*seed, turn]).permutation(count) for turn in rounds]
    start = first - rounds.start * count
    return np.concatenate([np.empty(0, np.int64), *row])[start : start + wanted]


def _numbered(indices: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Adds k * total to the k-th repetition of an index (k from 0)."""
    order = np.argsort(indices, kind="stable")
    ranked = indices[order]
    first = np.searchsorted(ranked, ranked)
    result = np.empty_like(indices)
    result[order] = ranked + (np.arange(len(ranked)) - first) * total
    return result


def _counts(cfg: SegConfig, cache: Path | None, images: int | None) -> Counts:
    samples = samples_of(cfg.data, cfg.data.train_split)
    if images is not None and images < len(samples):
        samples = [samples[i * len(samples) // images] for i in range(images)]
    return class_counts(samples, table(cfg.data), cache)


def _fingerprint(samples: Sequence[Sample], labels: LabelTable) -> str:
    found = hashlib.sha256(json.dumps(labels.to_plain()).encode())
    for sample in samples:
        try:
            info = os.stat(sample.label or sample.image)
        except OSError as error:
            raise UserError(f"{sample.label}: cannot be read ({error.strerror}).") from error
        found.update(f"{sample.label}\0{info.st_size}\0{info.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def _kept(path: Path, key: str) -> Counts | None:
    """Counts that were kept under `key`; None if there are none, or they are damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            counts: Counts = content["counts"]
            return counts if str(content["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None

"""The samples of a data set, augmented for training and whole for scoring, and the batches of both.

Which files make a data set is in `seg.datasets`. All randomness is a function of its arguments: a sample's augmentation
of (seed, epoch, index), an epoch's order of (seed, epoch), a rank's share of it of (rank, world size). Workers change
nothing but the speed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine import images, loading
from engine.errors import UserError
from seg import rare
from seg.cityscapes import GET_DATA as GET_DATA
from seg.cityscapes import Cityscapes as Cityscapes
from seg.cityscapes import Sample as Sample
from seg.config import DataConfig, SegConfig
from seg.datasets import coarse_samples
from seg.datasets import samples as samples_of
from seg.labels import (
    CITYSCAPES,
    IGNORE,
    Ids,
    LabelTable,
    damaged,
    png_header,
    read_bytes,
    read_instance_ids,
    read_label_ids,
    table,
)
from seg.rare import class_shares as class_shares
from seg.rare import class_weights as class_weights

Rgb = npt.NDArray[np.uint8]


_ORIENTED = (b"Raw profile type ", b"XML:com.adobe.xmp")
"""Names of texts in a PNG that may hold a camera's orientation; OpenCV knows that of eXIf alone."""


def read_rgb(path: Path) -> Rgb:
    """An image of the data set as RGB uint8 (H, W, 3), the same as from `engine.images.read_image`, but opaque RGB PNGs
    take a fast way.

    Raises:
        UserError: unreadable, empty, truncated, too many pixels, not an image.
    """
    if path.suffix.lower() == ".png":
        data = read_bytes(path)
        opaque = b"tRNS" not in data[: max(0, data.find(b"IDAT"))]  # which names the colour that is transparent
        if png_header(path, data) == (8, 2) and opaque and not any(word in data for word in _ORIENTED):
            bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if bgr is None:
                raise damaged(path)
            return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
    return images.read_image(path)


def read_pair(sample: Sample) -> tuple[Rgb, Ids]:
    """Image and label ids of a sample that has a label.

    Raises:
        UserError: a file can't be read, or the two differ in size.
    """
    if sample.label is None:
        raise UserError(f"{sample.image}: has no label; a test split has no public ones.")
    image, label = read_rgb(sample.image), read_label_ids(sample.label)
    if image.shape[:2] != label.shape:
        raise UserError(
            f"{sample.label}: label of {label.shape[1]} x {label.shape[0]} pixels for an image of "
            f"{image.shape[1]} x {image.shape[0]} ({sample.image}); the sizes must be equal, labels are never resized."
            f"{drawn_as_stored(sample.image)}"
        )
    return image, label


def drawn_as_stored(image: Path) -> str:
    """What an error adds where an image is turned by its EXIF orientation, which label files do not have; else ''."""
    orientation = images.stored_orientation(image)
    if orientation == 1:
        return ""
    return (
        f" The image has the EXIF orientation {orientation} and was turned by it: a label that was drawn on the pixels "
        "as they are stored does not fit; store the image upright, without the entry."
    )


def normalize(image: Rgb, cfg: DataConfig) -> Tensor:
    """RGB uint8 (H, W, 3) -> float32 (3, H, W), (image / 255 - mean) / std."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div_(255).sub_(mean).div_(std)


def check_scales(image: Path, size: tuple[int, ...], cfg: DataConfig) -> None:
    """Raises UserError for an image that the random scaling would reduce to nothing, or to more than can be held."""
    base = cfg.base_size / min(size) if cfg.base_size else 1.0
    thin, pixels = min(size) * base * cfg.scale[0] < 1, size[0] * size[1] * (base * cfg.scale[1]) ** 2
    if thin or pixels > images.MAX_PIXELS:
        raise UserError(
            f"{image}: has {size[1]} x {size[0]} pixels, too {'thin' if thin else 'many'} to be scaled to a "
            f"shorter side of {cfg.base_size or min(size)} times {cfg.scale[0]:g} to {cfg.scale[1]:g} (data.base_size, "
            "data.scale); change these, or take it out of the training split"
        )


def augment(
    image: Rgb, mask: Ids, cfg: DataConfig, seed: Sequence[int], shares: npt.NDArray[np.float64] | None = None
) -> tuple[Rgb, Ids]:
    """Random scale, crop (padded with the mean colour and 255), flip and colour jitter.

    A pure function of its arguments, and the only place that knows albumentations.

    Args:
        image: RGB uint8 (H, W, 3).
        mask: train ids uint8 (H, W).
        cfg: sizes and strengths.
        seed: integers that fix the random draws.
        shares: pixel share of each train id in the data set, float64 (C,); used when `cfg.rare_crop` is not 0.

    Returns:
        Image and mask of `cfg.crop` pixels, in the same types.
    """
    # albumentations asks the network for a newer version when it is imported, unless this says no
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    # RandomScale cuts off what is not whole, without the millionth a pixel of the shorter side where it is rounded down
    base = (cfg.base_size + 1e-6) / min(mask.shape) if cfg.base_size else 1.0
    scale = A.RandomScale(
        (base * cfg.scale[0] - 1, base * cfg.scale[1] - 1),
        cv2.INTER_LINEAR,
        cv2.INTER_NEAREST_EXACT,  # without EXACT OpenCV's labels lie up to half a pixel beside its images
        p=1,
    )
    steps: list[Any] = [
        A.RandomCrop(
            *cfg.crop,
            pad_if_needed=True,
            pad_position="random",
            fill=tuple(round(255 * value) for value in cfg.mean),
            fill_mask=IGNORE,
        ),
        A.HorizontalFlip(p=cfg.flip),
    ]
    if jitter := cfg.color_jitter:
        steps.append(A.ColorJitter(jitter, jitter, jitter, jitter / 10, p=1))
    # one stream for all steps: Compose(seed=) would give each step the same draws, so that flips go with large scales
    generator = np.random.default_rng(list(seed))
    twin = random.Random(int(generator.integers(2**63)))
    if shares is not None and cfg.rare_crop and generator.random() < cfg.rare_crop:
        image, mask = _apply(A.Compose([scale]), image, mask, generator, twin)
        rows, columns = rare.window(mask, cfg.crop, shares, generator)
        image, mask = image[rows, columns], mask[rows, columns]  # of the crop's size: RandomCrop has nothing to choose
        return _apply(A.Compose(steps), image, mask, generator, twin)
    return _apply(A.Compose([scale, *steps]), image, mask, generator, twin)


def _apply(
    pipeline: Any, image: Rgb, mask: Ids, generator: np.random.Generator, twin: random.Random
) -> tuple[Rgb, Ids]:
    pipeline.set_random_state(generator, twin)
    result = pipeline(image=image, mask=mask)
    return result["image"], result["mask"]


class SegDataset(Dataset[dict[str, Any]]):
    """Augmented training samples. The item (epoch, index) is a pure function of (seed, epoch, index):
    {"image": float32 (3, h, w), "target": train ids int64 (h, w), "name": the image file}.

    With n samples, the indices i, i + n, i + 2 n, ... are the same files, each time augmented in another way.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        cfg: DataConfig,
        seed: int,
        labels: LabelTable = CITYSCAPES,
        shares: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.samples, self.cfg, self.seed, self.labels, self.shares = samples, cfg, seed, labels, shares

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        sample = self.samples[index % len(self.samples)]
        image, label = read_pair(sample)
        target = self.labels.to_train_ids(label, str(sample.label))
        check_scales(sample.image, image.shape[:2], self.cfg)
        image, target = augment(image, target, self.cfg, (1, self.seed, epoch, index), self.shares)
        return {
            "image": normalize(image, self.cfg),
            "target": torch.from_numpy(target).long(),
            "name": str(sample.image),
        }


class EvalDataset(Dataset[dict[str, Any]]):
    """Whole images for scoring: {"image": RGB uint8 (H, W, 3), "label": label ids uint8 (H, W) or None,
    "instance": uint16 (H, W) or None, "sample": Sample}. Everything has the size of its file."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image, label = (read_rgb(sample.image), None) if sample.label is None else read_pair(sample)
        instance = None if sample.instance is None else read_instance_ids(sample.instance)
        if instance is not None and instance.shape != image.shape[:2]:
            raise UserError(f"{sample.instance}: instance ids of another size than the image {sample.image}.")
        return {"image": image, "label": label, "instance": instance, "sample": sample}


def _digest(samples: Sequence[Sample]) -> str:
    return loading.digest(len(samples), (os.fsencode(f"{one.city}/{one.name}") for one in samples))


class TrainBatches:
    """One rank's micro-batches of each epoch: {"image" (N, 3, h, w), "target" (N, h, w), "name" list[str]}.

    An epoch has as many images as `samples`; `seg.rare.Pool` says which, in their usual case each once. Step s is the
    s-th `batch_size` (global) of them, shuffled, whatever the number of ranks and micro-batches; the rest that fills no
    batch is left out and another one in each epoch.

    Args:
        samples: the training split.
        cfg: the experiment.
        world: number of ranks.
        rank: this one.
        coarse: further samples, of which an epoch takes the share `data.coarse_share`.
        cache: folder in which the counted classes are kept, see `seg.rare.class_counts`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        cfg: SegConfig,
        world: int,
        rank: int,
        coarse: Sequence[Sample] = (),
        cache: Path | None = None,
    ) -> None:
        where = f"the split {cfg.data.train_split!r} in {cfg.data.root}"
        self.samples, self.digest = samples, _digest([*samples, *coarse])
        self._order = loading.Order(len(samples), cfg, world, rank, where)
        self.accumulation = self._order.accumulation
        self._plan = loading.Plan()
        labels, counts = table(cfg.data), None
        if cfg.data.repeat_rare or cfg.data.rare_crop:
            counts = rare.class_counts(samples, labels, cache)
        factors = rare.repeat_factors(counts, cfg.data.repeat_rare) if counts is not None else None
        self._pool = rare.Pool(len(samples), cfg.runtime.seed, factors, len(coarse), cfg.data.coarse_share)
        shares = rare.shares_of(counts, cfg.data) if counts is not None and cfg.data.rare_crop else None
        dataset = loading.Reporting(SegDataset([*samples, *coarse], cfg.data, cfg.runtime.seed, labels, shares))
        self._loader = loading.loader(
            dataset, cfg, batch_sampler=self._plan, collate_fn=loading.stack, persistent_workers=True
        )

    def __len__(self) -> int:
        return len(self._order)

    def order(self, epoch: int) -> list[list[int]]:
        """Sample indices (see SegDataset) of each micro-batch of this rank in `epoch`."""
        order: list[list[int]] = self._pool.epoch(epoch)[self._order.epoch(epoch)].tolist()
        return order

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of `epoch` from micro-batch `start` on; those before are not decoded.

        One at a time: starting a new iterator ends the last one.
        """
        self._plan.batches = [[(epoch, index) for index in micro] for micro in self.order(epoch)[start:]]
        for batch in self._loader:
            yield loading.checked(batch)


class EvalBatches:
    """One rank's share of a split, each image on exactly one rank, nothing repeated; yields lists of at most
    `data.eval_batch_size` items of EvalDataset."""

    def __init__(self, samples: Sequence[Sample], cfg: SegConfig, world: int, rank: int) -> None:
        self.samples, self.digest = list(samples[rank::world]), _digest(samples)
        self._loader = loading.loader(
            loading.Reporting(EvalDataset(self.samples)),
            cfg,
            sampler=range(len(self.samples)),
            batch_size=cfg.data.eval_batch_size,
            collate_fn=loading.sound,
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for items in self._loader:
            yield loading.checked(items)


def train_batches(cfg: SegConfig, world: int = 1, rank: int = 0, cache: Path | None = None) -> TrainBatches:
    """Batches of the training split for `engine.loop.fit`; `cache` as in TrainBatches.

    Raises:
        UserError: missing or bad files, see `seg.datasets`, or images without labels; with repeat_rare or rare_crop
            every label file is read.
    """
    coarse, fine = coarse_samples(cfg.data), samples_of(cfg.data, cfg.data.train_split)
    if unlabelled := next((sample for sample in fine if sample.label is None), None):
        raise UserError(
            f"data.train_split: {cfg.data.train_split!r} has images without labels, the first is {unlabelled.image}; a "
            "test split has no public ones. Name splits with labels, such as train or train+val"
        )
    return TrainBatches(fine, cfg, world, rank, coarse, cache)


def eval_batches(cfg: SegConfig, split: str | None = None, world: int = 1, rank: int = 0) -> EvalBatches:
    """Batches of a split (default `data.val_split`) for scoring. Raises UserError for missing files."""
    return EvalBatches(samples_of(cfg.data, split or cfg.data.val_split), cfg, world, rank)

"""The Cityscapes folders, their samples, and the batches that training and validation see.

Files: `leftImg8bit/<split>/<city>/<name>_leftImg8bit.{png,jpg}` with `gtFine/<split>/<city>/<name>_gtFine_labelIds.png`
and, if there are any, `..._gtFine_instanceIds.png`. The split `test` has no public labels: what lies there is not read.

All randomness is a function of its arguments: a sample's augmentation of (seed, epoch, index), an epoch's order of
(seed, epoch), a rank's share of it of (rank, world size). Workers change nothing but the speed.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from seg.config import DataConfig, SegConfig
from seg.labels import IGNORE, Ids, damaged, png_header, read_bytes, read_instance_ids, read_label_ids, to_train_ids

Rgb = npt.NDArray[np.uint8]

GET_DATA = (
    "Download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (or "
    "with cityscapesscripts: `csDownload leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip`) and unpack both into "
    "this one folder; or render sample data: `python tools/make_sample.py data/sample`, then data.root=data/sample."
)
"""What to do when files of the data set are missing."""


@dataclass(frozen=True)
class Sample:
    """The files of one image; `name` is what they have in common, such as aachen_000000_000019."""

    image: Path
    label: Path | None
    instance: Path | None
    name: str
    city: str


class Cityscapes:
    """The files of one split, in a fixed order.

    Raises:
        UserError: folders or files are missing; the message says which and how to get them.
    """

    def __init__(self, root: Path | str, split: str) -> None:
        self.root, self.split = Path(root), split
        if not self.root.is_dir():
            raise UserError(
                f"{self.root} (data.root): no such folder; expected leftImg8bit/ and gtFine/ in it. {GET_DATA}"
            )
        found = self._files("leftImg8bit", r"_leftImg8bit\.(?:png|jpe?g)")
        if not found:
            raise UserError(
                f"{self.root / 'leftImg8bit' / split}: the split is empty; expected <city>/*_leftImg8bit.png or .jpg. "
                + GET_DATA
            )
        labels: dict[tuple[str, str], Path] = {}
        instances: dict[tuple[str, str], Path] = {}
        if split != "test":
            labels = self._files("gtFine", r"_gtFine_labelIds\.png")
            self._complete(found, labels, "_gtFine_labelIds.png", "images have no label file")
            self._complete(labels, found, "_leftImg8bit.png", "label files have no image")
            instances = self._files("gtFine", r"_gtFine_instanceIds\.png")
            if instances:
                self._complete(
                    labels, instances, "_gtFine_instanceIds.png", "label files have no instance ids, others do"
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
            raise UserError(f"{self.root} (data.root): has no folder {kind}/. {hint}{GET_DATA}")
        if not (top / self.split).is_dir():
            others = ", ".join(sorted(p.name for p in top.iterdir() if p.is_dir())) or "none"
            raise UserError(f"{top}: has no split {self.split!r} (splits there: {others}). {GET_DATA}")
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
            kind = "leftImg8bit" if "leftImg8bit" in ending else "gtFine"
            first = self.root / kind / self.split / missing[0][0] / (missing[0][1] + ending)
            raise UserError(
                f"{self.root} (data.root): half unpacked, in the split {self.split!r} {len(missing)} of {len(have)} "
                f"{what}; the first one missing is {first}. {GET_DATA}"
            )


def read_rgb(path: Path) -> Rgb:
    """An image of the data set as RGB uint8 (H, W, 3). RGB PNGs take a fast way, all else `engine.images.read_image`.

    Raises:
        UserError: unreadable, empty, truncated, too many pixels, not an image.
    """
    if path.suffix.lower() == ".png":
        data = read_bytes(path)
        if png_header(path, data) == (8, 2):
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
        raise UserError(f"{sample.image}: has no label; the split 'test' has no public labels.")
    image, label = read_rgb(sample.image), read_label_ids(sample.label)
    if image.shape[:2] != label.shape:
        raise UserError(
            f"{sample.label}: label of {label.shape[1]} x {label.shape[0]} pixels for an image of "
            f"{image.shape[1]} x {image.shape[0]} ({sample.image}); the sizes must be equal, labels are never resized."
        )
    return image, label


def normalize(image: Rgb, cfg: DataConfig) -> Tensor:
    """RGB uint8 (H, W, 3) -> float32 (3, H, W), (image / 255 - mean) / std."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div_(255).sub_(mean).div_(std)


def augment(image: Rgb, mask: Ids, cfg: DataConfig, seed: Sequence[int]) -> tuple[Rgb, Ids]:
    """Random scale, crop (padded with the mean colour and 255), flip and colour jitter.

    A pure function of its arguments, and the only place that knows albumentations.

    Args:
        image: RGB uint8 (H, W, 3).
        mask: train ids uint8 (H, W).
        cfg: sizes and strengths.
        seed: integers that fix the random draws.

    Returns:
        Image and mask of `cfg.crop` pixels, in the same types.
    """
    # albumentations asks the network for a newer version when it is imported, unless this says no
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    base = cfg.base_size / min(mask.shape) if cfg.base_size else 1.0
    steps: list[Any] = [
        A.RandomScale((base * cfg.scale[0] - 1, base * cfg.scale[1] - 1), cv2.INTER_LINEAR, cv2.INTER_NEAREST, p=1),
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
    pipeline = A.Compose(steps)
    # one stream for all steps: Compose(seed=) would give each step the same draws, so that flips go with large scales
    generator = np.random.default_rng(list(seed))
    pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    result = pipeline(image=image, mask=mask)
    return result["image"], result["mask"]


class SegDataset(Dataset[dict[str, Any]]):
    """Augmented training samples. The item (epoch, index) is a pure function of (seed, epoch, index):
    {"image": float32 (3, h, w), "target": train ids int64 (h, w), "name": the image file}."""

    def __init__(self, samples: Sequence[Sample], cfg: DataConfig, seed: int) -> None:
        self.samples, self.cfg, self.seed = samples, cfg, seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        sample = self.samples[index]
        image, label = read_pair(sample)
        target = to_train_ids(label, str(sample.label))
        image, target = augment(image, target, self.cfg, (1, self.seed, epoch, index))
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


class TrainBatches:
    """One rank's micro-batches of each epoch: {"image" (N, 3, h, w), "target" (N, h, w), "name" list[str]}.

    Step s of an epoch is the s-th `batch_size` (global) of the shuffled images, whatever the number of ranks and
    micro-batches; the rest that fills no batch is left out and another one in each epoch.
    """

    def __init__(self, samples: Sequence[Sample], cfg: SegConfig, world: int, rank: int) -> None:
        where = f"the split {cfg.data.train_split!r} in {cfg.data.root}"
        self._order = loading.Order(len(samples), cfg, world, rank, where)
        self.accumulation = self._order.accumulation
        self._plan = loading.Plan()
        dataset = loading.Reporting(SegDataset(samples, cfg.data, cfg.runtime.seed))
        self._loader = loading.loader(
            dataset, cfg, batch_sampler=self._plan, collate_fn=loading.stack, persistent_workers=True
        )

    def __len__(self) -> int:
        return len(self._order)

    def order(self, epoch: int) -> list[list[int]]:
        """Sample indices of each micro-batch of this rank in `epoch`."""
        return self._order.epoch(epoch).tolist()

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
        self.samples = list(samples[rank::world])
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


def train_batches(cfg: SegConfig, world: int = 1, rank: int = 0) -> TrainBatches:
    """Batches of the training split for `engine.loop.fit`. Raises UserError as `Cityscapes`."""
    return TrainBatches(Cityscapes(cfg.data.root, cfg.data.train_split).samples, cfg, world, rank)


def eval_batches(cfg: SegConfig, split: str | None = None, world: int = 1, rank: int = 0) -> EvalBatches:
    """Batches of a split (default `data.val_split`) for scoring. Raises UserError as `Cityscapes`."""
    return EvalBatches(Cityscapes(cfg.data.root, split or cfg.data.val_split).samples, cfg, world, rank)

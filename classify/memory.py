"""Data sets in memory: one uint8 tensor on the device, whose batches are augmented at once, each image by itself.

An image's crop, flip, RandAugment and erasing are pure functions of (seed, epoch, index), an epoch's order one of
(seed, epoch), and mixup or cutmix of a batch one of (seed, epoch, number of the micro-batch, rank).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from classify import augment, sets
from classify.config import ClassifyConfig
from classify.readers import Arrays
from engine.errors import UserError
from engine.loading import Order, digest
from engine.memory import show_bytes

Table = npt.NDArray[np.int64]
CHUNK = 1 << 22
"""On a GPU several micro-batches are augmented at once, with about so many values, as starting its kernels takes longer
than their work."""


def resized(data: Arrays, size: int | None) -> Arrays:
    """The images at `size` x `size` pixels (bilinear, antialiased), as uint8; None leaves them.

    Raises:
        UserError: there is not so much memory.
    """
    if size is None or data.images.shape[2:] == (size, size):
        return data
    shape = (*data.images.shape[:2], size, size)
    try:
        images = np.empty(shape, np.uint8)
    except (MemoryError, ValueError):  # numpy's word for more bytes than it can count
        raise UserError(
            f"data.size: {size}: {shape[0]} images of {size}x{size} take {show_bytes(math.prod(shape))}, more memory "
            "than there is; choose a smaller size"
        ) from None
    for start in range(0, len(images), 1024):
        part = torch.from_numpy(data.images[start : start + 1024])
        images[start : start + 1024] = v2.functional.resize(part, [size, size], antialias=True).numpy()
    return Arrays(images, data.labels)


def fingerprint(data: Arrays) -> str:
    """`loading.digest` of the labels, to which earlier versions kept, and a checksum of the pixels, such as
    "50000 images, 1f0c5a2b, 9a8b7c6d". Before resizing, which need not give the same pixels on every processor."""
    labels = digest(len(data.labels), [data.labels.tobytes()])
    return f"{labels}, {zlib.crc32(np.ascontiguousarray(data.images).data):08x}"


def draws(count: int, padding: int, flip: float, seed: int, epoch: int) -> Table:
    """For each of `count` images the crop's top and left in the padded image, and whether it is flipped: (3, count)."""
    random = np.random.default_rng([augment.CROPS, seed, epoch])
    corners = random.integers(0, 2 * padding + 1, size=(count, 2))
    return np.stack([*corners.T, random.random(count) < flip])


def crop_and_flip(padded: Tensor, index: Tensor, draw: Tensor, padding: int) -> Tensor:
    """The images number `index` of a set, each cropped and flipped by itself.

    Args:
        padded: uint8 (M, C, H + 2 padding, W + 2 padding), the images with black pixels around them.
        index: int64 (N,), on the same device.
        draw: int64 (3, N), see `draws`.
        padding: black pixels on each side.

    Returns:
        uint8 (N, C, H, W).
    """
    height, width = (side - 2 * padding for side in padded.shape[-2:])
    top, left, flip = draw
    if padded.is_cpu:  # numpy copies rows of a window, torch pixels: it takes four times as long
        if padding:
            view = np.lib.stride_tricks.sliding_window_view
            windows = view(padded.numpy(), (height, width), (2, 3))  # type: ignore[call-overload]  # no tuples in its stub
            images = windows[index.numpy(), :, top.numpy(), left.numpy()]
        else:
            images = padded.numpy()[index.numpy()]
        flipped = np.flatnonzero(flip.numpy())
        images[flipped] = images[flipped, :, :, ::-1]
        return torch.from_numpy(images)
    cropped = padded.unfold(2, height, 1).unfold(3, width, 1)[index, :, top, left]
    return torch.where(flip.bool().view(-1, 1, 1, 1), cropped.flip(-1), cropped)


class MemoryTrainBatches:
    """One rank's micro-batches of each epoch: {"image" float32 (N, C, H, W), "target" int64 (N,) or, with mixup or
    cutmix, float32 (N, classes), "name" list[str]}, the tensors on the device.

    Step s of an epoch is the s-th `batch_size` of the shuffled images whatever the number of ranks and micro-batches.
    `data` are the images as the set has them; they are resized to `data.size`.

    Raises:
        UserError: fewer images than a batch; see `resized`.
    """

    def __init__(
        self,
        data: Arrays,
        cfg: ClassifyConfig,
        normalize: augment.Normalize,
        mixing: augment.Mixing,
        device: torch.device,
        world: int,
        rank: int,
    ) -> None:
        self.problems: list[str] = []
        self.cfg, self.normalize, self.mixing, self.rank = cfg.data, normalize, mixing, rank
        self.seed = cfg.runtime.seed
        self.randaugment, self.erasing = augment.randaugment(cfg.data), augment.erasing(cfg.data)
        where = f"the split {cfg.data.train_split!r} of {cfg.data.name}"
        self.order = Order(len(data.labels), cfg, world, rank, where)
        self.digest = fingerprint(data)
        data = resized(data, cfg.data.size)
        self.padded = F.pad(torch.from_numpy(data.images), (cfg.data.crop_padding,) * 4).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        values = self.order.micro_batch * data.images[0].size
        self.together = 1 if device.type == "cpu" else max(1, CHUNK // values)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of `epoch` from micro-batch `start` on; those before cost nothing."""
        rows = self.order.epoch(epoch)
        drawn = draws(len(self.labels), self.cfg.crop_padding, sets.flip(self.cfg), self.seed, epoch)
        # (4, batches, N), on the device at once: no batch waits for a copy
        tables = torch.from_numpy(np.concatenate([rows[None], drawn[:, rows]])).to(self.labels.device)
        prefix = f"{self.cfg.name}/{self.cfg.train_split}/"
        for first in range(start, len(rows), self.together):
            part = tables[:, first : first + self.together]
            images = self._augmented(part.flatten(1), epoch, rows[first : first + self.together].ravel().tolist())
            labels = self.labels[part[0]]
            parts = zip(images.split(rows.shape[1]), labels, strict=True)
            for number, (image, target) in enumerate(parts, first):
                image, target = self.mixing(image, target, self.seed, epoch, number, self.rank)
                yield {"image": image, "target": target, "name": [f"{prefix}{i}" for i in rows[number].tolist()]}

    def _augmented(self, table: Tensor, epoch: int, numbers: list[int]) -> Tensor:
        """Images float32 (M, C, H, W) of a table (4, M) of their index and draws; `numbers` is the index as list."""
        images = crop_and_flip(self.padded, table[0], table[1:], self.cfg.crop_padding)
        if self.randaugment is not None:
            for one, number in zip(images, numbers, strict=True):
                with augment.seeded(augment.RANDAUGMENT, self.seed, epoch, number):
                    one.copy_(self.randaugment(one))
        images = self.normalize(images)
        if self.erasing is not None:
            for one, number in zip(images, numbers, strict=True):
                with augment.seeded(augment.ERASING, self.seed, epoch, number):
                    one.copy_(self.erasing(one))
        return images


class MemoryEvalBatches:
    """One rank's share of a split, each image on exactly one rank and once, in batches of `data.eval_batch_size`:
    {"image" float32 (N, C, H, W), "target" int64 (N,), "name" list[str]}, the tensors on the device.

    `data` are the images as the set has them; they are resized to `data.size`. Raises UserError as `resized`.
    """

    def __init__(
        self,
        data: Arrays,
        cfg: ClassifyConfig,
        normalize: augment.Normalize,
        device: torch.device,
        split: str,
        world: int,
        rank: int,
    ) -> None:
        self.problems: list[str] = []
        self.normalize, self.size, self.prefix = normalize, cfg.data.eval_batch_size, f"{cfg.data.name}/{split}/"
        self.numbers = range(len(data.labels))[rank::world]
        self.digest = fingerprint(data)
        data = resized(data, cfg.data.size)
        self.images, self.labels = (torch.from_numpy(array[rank::world]).to(device) for array in data)

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.numbers), self.size):
            part = slice(start, start + self.size)
            names = [f"{self.prefix}{i}" for i in self.numbers[part]]
            yield {"image": self.normalize(self.images[part]), "target": self.labels[part], "name": names}

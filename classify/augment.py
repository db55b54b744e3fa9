"""Random changes of the images, each a pure function of the numbers that seed it. The transforms are torchvision's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from classify.config import DataConfig

# The first number of a seed tells apart what is drawn from it; 0 is the order of an epoch (engine.loading.Order).
CROPS, RANDAUGMENT, ERASING, MIXING, FOLDER = 1, 2, 3, 4, 5


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, torch draws on the CPU what `numbers` (not negative) say; afterwards it goes on as if nothing was."""
    with torch.random.fork_rng(devices=[]):
        seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        yield


class Normalize:
    """uint8 (N, C, H, W) or (C, H, W) -> float32 of the same shape, (image / 255 - mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | None = None) -> None:
        centre, scale = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        self.factor = (1 / (255 * scale)).float().to(device)
        self.offset = (-centre / scale).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mul_(self.factor).add_(self.offset)


def grey(image: Tensor) -> Tensor:
    """RGB uint8 (3, H, W) -> uint8 (1, H, W), the nearest level of the luma (ITU-R BT.601); where all channels have the
    same value, that one. torchvision's weights sum to 0.9999 and it cuts off, so that all of these were a level darker.
    """
    red, green, blue = image
    return red.mul(0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114).round_().to(torch.uint8)[None]


def randaugment(cfg: DataConfig) -> v2.RandAugment | None:
    """RandAugment of one uint8 image (C, H, W), or None if it is off."""
    return v2.RandAugment(cfg.randaugment, cfg.randaugment_magnitude) if cfg.randaugment else None


def erasing(cfg: DataConfig) -> v2.RandomErasing | None:
    """Erasing of a rectangle in one normalised image (C, H, W), which gets the mean colour; None if it is off."""
    return v2.RandomErasing(cfg.erasing) if cfg.erasing else None


class Mixing:
    """Mixup and cutmix of a batch; one of both, drawn for each batch, when both are on."""

    def __init__(self, cfg: DataConfig, classes: int) -> None:
        steps: list[v2.Transform] = []
        if cfg.mixup:
            steps.append(v2.MixUp(alpha=cfg.mixup, num_classes=classes))
        if cfg.cutmix:
            steps.append(v2.CutMix(alpha=cfg.cutmix, num_classes=classes))
        self._step = v2.RandomChoice(steps) if len(steps) > 1 else (steps or [None])[0]

    def __call__(self, image: Tensor, target: Tensor, *seed: int) -> tuple[Tensor, Tensor]:
        """Image float32 (N, C, H, W), target int64 (N,) -> the same shape, float32 (N, classes); unchanged if off."""
        if self._step is None:
            return image, target
        with seeded(MIXING, *seed):
            mixed: tuple[Tensor, Tensor] = self._step(image, target)
        return mixed


MOST_STRETCHED = 8
"""Longer side over the shorter one. Of images beyond it the middle is taken first: 4 x 200,000 pixels would become
256 x 12,800,000 on the way to their central square, which is the same without the rest."""


def _middle(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    longest = MOST_STRETCHED * min(height, width)
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])


def evaluation_steps(cfg: DataConfig, size: int) -> v2.Compose:
    """A uint8 image (C, H, W) of any size -> (C, size, size): the central square, of `folder` without its rim."""
    shorter = (cfg.eval_resize or round(size / 0.875)) if cfg.name == "folder" else size
    return v2.Compose([_middle, v2.Resize(shorter, antialias=True), v2.CenterCrop(size)])

"""The data of a classification experiment: what a set holds, and the batches that training and validation see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from classify import folder, memory, sets
from classify.augment import Mixing, Normalize
from classify.config import ClassifyConfig, DataConfig
from classify.readers import Arrays
from engine.errors import UserError

TrainBatches = memory.MemoryTrainBatches | folder.FolderTrainBatches
EvalBatches = memory.MemoryEvalBatches | folder.FolderEvalBatches


@dataclass(frozen=True)
class DataInfo:
    """What is known of a data set before its images are read."""

    classes: tuple[str, ...]
    channels: int
    """1 (grey) or 3 (RGB)."""
    size: int
    """Height and width at which images enter the network."""
    mean: tuple[float, ...]
    """A number for each channel, of values in [0, 1]."""
    std: tuple[float, ...]


def describe(cfg: DataConfig) -> DataInfo:
    """The classes and the form of the images; of the files, only the names of a folder's class folders are read.

    Raises:
        UserError: an option has no effect on this kind of data set, mean and std don't fit the channels, or there are
            no class folders.
    """
    _check_options(cfg)
    if cfg.name == "folder":
        channels = len(cfg.mean or cfg.std or sets.IMAGENET_MEAN)
        mean, std = cfg.mean or sets.IMAGENET_MEAN, cfg.std or sets.IMAGENET_STD
        size = cfg.size or folder.DEFAULT_SIZE
        only_val = not (cfg.root / cfg.train_split).is_dir() and (cfg.root / cfg.val_split).is_dir()
        # a checkpoint can be scored where there are no training images
        classes = folder.class_folders(cfg.root, cfg.val_split if only_val else cfg.train_split)
    else:
        known = sets.SETS[cfg.name]
        channels, mean, std = known.shape[0], cfg.mean or known.mean, cfg.std or known.std
        size, classes = cfg.size or known.shape[1], sets.class_names(cfg)
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UserError(
                f"data.{key}: {len(values)} numbers for images of {channels} channel{'s' if channels > 1 else ''} "
                f"({cfg.name}); data.mean and data.std must have one for each channel."
            )
    return DataInfo(classes, channels, size, mean, std)


def as_trained(cfg: DataConfig, info: DataInfo, trained_on: str) -> DataConfig:
    """The data as a trained network is to see it, that may be of another data set than the one it was trained on.

    Args:
        cfg: the training's section with what is to be another; where it is silent on size, mean and std, those of the
            training are filled in. A network that was trained on whole images (`trained_on` a set in memory) gets whole
            images of a folder too. What has no effect on the new kind of data goes back to its default.
        info: what the network was trained with.
        trained_on: data.name of the training.
    """
    fills: dict[str, Any] = {"size": info.size}
    if cfg.name == "folder" or sets.SETS[cfg.name].shape[0] == info.channels:  # others are an error elsewhere
        fills |= {"mean": info.mean, "std": info.std}
    changes = {key: value for key, value in fills.items() if getattr(cfg, key) is None}
    if cfg.name != trained_on:
        changes |= {key: getattr(DataConfig(), key) for key in _without_effect(cfg)}
        if cfg.name == "folder" and cfg.eval_resize is None:
            changes["eval_resize"] = cfg.size or info.size
    return cfg.model_copy(update=changes)


def train_batches(cfg: ClassifyConfig, device: torch.device, world: int = 1, rank: int = 0) -> TrainBatches:
    """Batches of the training split for `engine.loop.fit`; sets in memory live on `device`.

    Raises:
        UserError: as `describe`; files are missing, damaged or others than the published ones; fewer images than a
            batch.
    """
    info, data = describe(cfg.data), cfg.data
    normalize, mixing = Normalize(info.mean, info.std, device), Mixing(data, len(info.classes))
    if (data.mixup or data.cutmix) and cfg.split(world).micro_batch == 1:
        raise UserError("data.mixup, data.cutmix: a micro-batch of 1 image has no other to mix with; give more.")
    if data.name == "folder":
        files = folder.find(data.root, data.train_split, info.classes)
        files = folder.Files(*_limited(files, data.train_limit))
        return folder.FolderTrainBatches(files, cfg, Normalize(info.mean, info.std), mixing, world, rank)
    arrays = Arrays(*_limited(sets.load(data, data.train_split), data.train_limit))
    return memory.MemoryTrainBatches(arrays, cfg, normalize, mixing, device, world, rank)


def eval_batches(
    cfg: ClassifyConfig, device: torch.device, split: str | None = None, world: int = 1, rank: int = 0
) -> EvalBatches:
    """Batches of a split (default `data.val_split`) for scoring. Raises UserError as `train_batches`."""
    info, data, split = describe(cfg.data), cfg.data, split or cfg.data.val_split
    if data.name == "folder":
        files = folder.find(data.root, split, info.classes)
        return folder.FolderEvalBatches(files, cfg, Normalize(info.mean, info.std), world, rank)
    arrays = sets.load(data, split)
    return memory.MemoryEvalBatches(arrays, cfg, Normalize(info.mean, info.std, device), device, split, world, rank)


def _limited(data: tuple[npt.NDArray[Any], npt.NDArray[np.int64]], limit: int | None) -> tuple[Any, Any]:
    """The first of each class in turn until there are `limit`, in their old order; None or too many: all."""
    items, labels = data
    if limit is None or limit >= len(labels):
        return items, labels
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], np.arange(labels.max() + 1))
    turn = np.empty(len(labels), np.int64)
    turn[by_class] = np.arange(len(labels)) - first[labels[by_class]]
    chosen = np.sort(np.lexsort((labels, turn))[:limit])
    return items[chosen], labels[chosen]


def _without_effect(cfg: DataConfig) -> tuple[str, ...]:
    """The options that are for the other kind of data set."""
    return ("crop_padding",) if cfg.name == "folder" else ("crop_scale", "eval_resize", "on_error")


def _check_options(cfg: DataConfig) -> None:
    """Raises UserError for an option that was set and would do nothing."""
    default = DataConfig()
    is_folder = cfg.name == "folder"
    for key in _without_effect(cfg):
        if getattr(cfg, key) != getattr(default, key):
            raise UserError(
                f"data.{key}: has no effect with data.name={cfg.name}, it is for "
                f"{'data sets in memory' if is_folder else 'data.name=folder'}; remove it."
            )
    if cfg.randaugment == 0 and cfg.randaugment_magnitude != default.randaugment_magnitude:
        raise UserError("data.randaugment_magnitude: has no effect without data.randaugment; set it, such as 2.")
    check_crop(cfg)


def check_crop(cfg: DataConfig) -> None:
    """Raises UserError where evaluation would crop more than there is, and pad it with black."""
    size = cfg.size or folder.DEFAULT_SIZE
    if cfg.name == "folder" and cfg.eval_resize is not None and cfg.eval_resize < size:
        raise UserError(
            f"data.eval_resize: {cfg.eval_resize} is less than data.size, the {size} pixels that are cropped from it."
        )

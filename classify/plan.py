"""The memory plan of a classifier; see `engine.probe`. No image is read."""

from __future__ import annotations

from functools import partial

import torch

from classify import losses, network, sets
from classify.config import ClassifyConfig, DataConfig
from classify.data import DataInfo, describe
from engine.config import Loaded
from engine.loop import Batch
from engine.plan import Plan
from engine.probe import Workload, make_plan


def workload(cfg: ClassifyConfig) -> Workload:
    """The experiment with random images and classes. Raises UserError as a training."""
    info = describe(cfg.data)

    def batch(count: int) -> Batch:
        images = torch.randn(count, info.channels, info.size, info.size)
        return {"image": images, "target": torch.randint(len(info.classes), (count,)), "name": ["random"] * count}

    def build() -> torch.nn.Module:
        return network.build(cfg.model, info, pretrained=False)[0]

    def evaluate(model: torch.nn.Module, count: int) -> None:
        model(batch(count)["image"].to(next(model.parameters()).device))

    return Workload(
        cfg,
        build,
        losses.build(cfg.loss),
        batch,
        partial(network.parameter_groups, cfg=cfg.optim),
        network.blank_images(info),
        _held(cfg.data, info),
        evaluate,
        cfg.data.eval_batch_size,
    )


def _held(data: DataConfig, info: DataInfo) -> int:
    """Bytes of the images that lie in memory: those of the training, padded, and those of the validation."""
    if data.name == "folder":
        return 0
    sides = {data.train_split: info.size + 2 * data.crop_padding, data.val_split: info.size}
    return sum(sets.count(data, split) * info.channels * side**2 for split, side in sides.items())


def plan(loaded: Loaded[ClassifyConfig], budget: int) -> Plan:
    """For `budget` bytes; see `engine.probe.make_plan`."""
    return make_plan(workload(loaded.config), budget)

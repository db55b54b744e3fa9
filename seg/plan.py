"""The memory plan of a segmentation experiment; see `engine.plan`. No image or label is read."""

from __future__ import annotations

import torch

from engine.config import Loaded
from engine.loop import Batch
from engine.optim import parameter_groups
from engine.plan import Plan, Workload, make_plan
from seg import losses, models
from seg.config import SegConfig
from seg.labels import table


def workload(cfg: SegConfig) -> Workload:
    """The experiment with random images and labels of the crop's size. Raises UserError as a training."""
    classes = table(cfg.data).num_classes

    def batch(count: int) -> Batch:
        target = torch.randint(classes, (count, *cfg.data.crop))
        return {"image": torch.randn(count, 3, *cfg.data.crop), "target": target, "name": ["random"] * count}

    return Workload(
        cfg,
        lambda: models.build(cfg.model, classes, pretrained=False),
        losses.build(cfg, count=False),  # weights of any value take the same memory
        batch,
        lambda model: parameter_groups(model, cfg.optim, models.is_backbone),
        models.blank_images(),
    )


def plan(loaded: Loaded[SegConfig], budget: int) -> Plan:
    """For `budget` bytes; see `engine.plan.make_plan`."""
    return make_plan(workload(loaded.config), budget)

"""The memory plan of a classifier; see `engine.plan`. No image is read."""

from __future__ import annotations

import torch

from classify import losses, models, network
from classify.config import ClassifyConfig
from classify.data import describe
from engine.config import Loaded
from engine.loop import Batch
from engine.optim import parameter_groups
from engine.plan import Plan, Workload, make_plan


def workload(cfg: ClassifyConfig) -> Workload:
    """The experiment with random images and classes. Raises UserError as a training."""
    info = describe(cfg.data)

    def batch(count: int) -> Batch:
        images = torch.randn(count, info.channels, info.size, info.size)
        return {"image": images, "target": torch.randint(len(info.classes), (count,)), "name": ["random"] * count}

    def build() -> torch.nn.Module:
        return network.build(cfg.model, info, pretrained=False)[0]

    def groups(model: torch.nn.Module) -> list[dict[str, object]]:
        head = set(models.classifier_names(model))
        return parameter_groups(model, cfg.optim, lambda name: name not in head)

    return Workload(cfg, build, losses.build(cfg.loss), batch, groups, network.blank_images(info))


def plan(loaded: Loaded[ClassifyConfig], budget: int) -> Plan:
    """For `budget` bytes; see `engine.plan.make_plan`."""
    return make_plan(workload(loaded.config), budget)

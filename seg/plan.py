"""The memory plan of a segmentation experiment; see `engine.probe`. Of the data only the size of an image is read, if
they are there.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn

from engine.config import Loaded
from engine.errors import NotFiniteError, UserError
from engine.loop import Batch
from engine.optim import parameter_groups
from engine.plan import Plan
from engine.probe import Workload, make_plan
from seg import datasets, losses, models
from seg.config import SegConfig
from seg.labels import table
from seg.predict import Predictor


def workload(cfg: SegConfig) -> Workload:
    """The experiment with random images and labels of the crop's size. Raises UserError as a training."""
    classes = table(cfg.data).num_classes

    def batch(count: int) -> Batch:
        target = torch.randint(classes, (count, *cfg.data.crop))
        return {"image": torch.randn(count, 3, *cfg.data.crop), "target": target, "name": ["random"] * count}

    height, width, remark = _validation_size(cfg)

    def evaluate(model: nn.Module, count: int) -> None:
        predictor = Predictor.from_config(model, cfg, next(model.parameters()).device)
        try:
            predictor.predict_batch([np.zeros((height, width, 3), np.uint8)] * count)
        except NotFiniteError:  # running statistics that are not settled may overflow, in as much memory
            pass
        except UserError as error:  # nothing else is left that a user could put right
            raise torch.OutOfMemoryError(str(error)) from error

    return Workload(
        cfg,
        lambda: models.build(cfg.model, classes, pretrained=False),
        losses.build(cfg, count=False),  # weights of any value take the same memory
        batch,
        partial(parameter_groups, cfg=cfg.optim, is_backbone=models.is_backbone),
        models.blank_images(),
        evaluate=evaluate,
        eval_batch=cfg.data.eval_batch_size,
        smaller="predict.window" if cfg.data.eval_batch_size == 1 else "data.eval_batch_size",
        remark=remark,
    )


def _validation_size(cfg: SegConfig) -> tuple[int, int, str]:
    """Height and width of the first image of the validation; where the data are not there, those of the crop, and a
    remark about it."""
    try:
        with Image.open(datasets.samples(cfg.data, cfg.data.val_split)[0].image) as image:
            return image.height, image.width, ""
    except (UserError, OSError, Image.DecompressionBombError):
        return *cfg.data.crop, "images of the validation were not found; they are taken for as large as data.crop"


def plan(loaded: Loaded[SegConfig], budget: int) -> Plan:
    """For `budget` bytes; see `engine.probe.make_plan`."""
    return make_plan(workload(loaded.config), budget)

"""What the cases stand on: a small network in a checkpoint, and a small data set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import checkpoint
from seg.config import SegConfig
from seg.labels import TRAIN_CLASSES
from seg.models import build, from_checkpoint
from seg.predict import Predictor

CONFIG = """\
task: seg
length: 1 steps
batch_size: 2
data:
  crop: [64, 64]
  scale: [0.5, 2.0]
  flip: 0.5
model:
  name: lraspp_mobilenet_v3_large
  output_stride: 16
norm:
  name: bn
loss:
  name: cross_entropy
optim:
  lr: 0.01
  momentum: 0.9
  weight_decay: 1e-4
  schedule: poly
runtime:
  workers: 0
  device: cpu
  threads: 1
  seed: 1
report:
  log_every: 1 step
  eval_every: 1 steps
  tensorboard: false
"""


def untrained_state(cfg: SegConfig, batch: Tensor) -> dict[str, Any]:
    """The content of a checkpoint of a network that was not trained but knows its statistics over `batch` (normalised
    images (N, 3, H, W)), so that its predictions differ from place to place."""
    torch.manual_seed(0)
    model = build(cfg.model, pretrained=False).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain means over what is shown
    with torch.no_grad():
        model(batch)
    state: dict[str, Any] = dict.fromkeys(checkpoint.KEYS)
    state |= {"format": checkpoint.FORMAT, "task": "seg", "config": cfg.model_dump(mode="json"), "step": 7}
    return state | {"meta": {"classes": list(TRAIN_CLASSES)}, "model": model.state_dict()}


@dataclass(frozen=True)
class Ground:
    """Folder with `best.pt` and the data set `data`; read only once it is laid."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "best.pt"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @cached_property
    def predictor(self) -> Predictor:
        """Of `weights`, as tools/predict.py uses it."""
        model, cfg, _ = from_checkpoint(self.weights)
        return Predictor.from_config(model, cfg, "cpu")

    def lay(self) -> Ground:
        """Make what is missing; returns itself."""
        import yaml

        from seg import sample

        if not self.data.is_dir():
            sample.render(self.data, size=(64, 128), counts={"train": 2, "val": 1, "test": 1})
        if not self.weights.is_file():
            # strict validation wants JSON: YAML 1.1 reads 1e-4 as text
            plain = yaml.safe_load(CONFIG.replace("1e-4", "1.0e-4"))
            cfg = SegConfig.model_validate({**plain, "data": {**plain["data"], "crop": (64, 64)}})
            coarse = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(np.float32))
            batch = nn.functional.interpolate(coarse, (96, 96), mode="bicubic")
            checkpoint.save(self.weights, untrained_state(cfg, batch))
        return self

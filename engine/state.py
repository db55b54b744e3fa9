"""Everything a run is made of, as one object that goes into a checkpoint and comes back bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from engine import checkpoint, distributed
from engine.config import ExperimentConfig
from engine.errors import UserError
from engine.prepare import seed_all


def rng_state() -> dict[str, Any]:
    """The random states of this process, as tensors and plain containers."""
    numpy_state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Random numbers inside start from `seed`, and those outside do not notice."""
    before = rng_state()
    try:
        seed_all(seed)
        yield
    finally:
        set_rng_state(before)


@dataclass
class TrainingState:
    """The parts of a run; `save` and `restore` are exact, the random states included."""

    cfg: ExperimentConfig
    meta: Mapping[str, Any]
    steps_per_epoch: int
    model: nn.Module
    ema: AveragedModel | None
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: GradScaler
    step: int = 0
    score: float | None = None
    best_score: float | None = None
    best_step: int = 0
    unreported: dict[str, float] | None = None
    """Sums over the steps since the last row of the log, see `engine.watch`."""
    elapsed: dict[str, float] | None = None
    """How many steps these are, and the seconds that they took, see `engine.report`."""
    saved: str = field(default="no checkpoint has been written yet")

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def save(self, *paths: Path) -> None:
        """Write a checkpoint to each path; all processes call it, the first one writes.

        Raises:
            UserError: it cannot be written.
        """
        rng = distributed.gather(rng_state())
        if not distributed.is_main():
            self.saved = f"the last good checkpoint is {paths[-1]} (step {self.step})"
            return
        epoch, step_in_epoch = divmod(self.step, self.steps_per_epoch)
        content = {
            "format": checkpoint.FORMAT,
            "task": self.cfg.task,
            "config": self.cfg.model_dump(mode="json"),
            "meta": dict(self.meta),
            "step": self.step,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "score": self.score,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "unreported": self.unreported,  # this and the next are not among the KEYS: older checkpoints lack them
            "elapsed": self.elapsed,
        }
        for path in paths:
            checkpoint.save(path, content)
            self.saved = f"the last good checkpoint is {path} (step {self.step})"

    def restore(self, content: Mapping[str, Any], path: str = "checkpoint") -> str:
        """Take everything from a loaded checkpoint; returns a remark for the log, or nothing.

        Raises:
            UserError: it is of another network or another training set.
        """
        if content["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(
                f"{path}: was trained with {content['steps_per_epoch']} steps an epoch, here an epoch has "
                f"{self.steps_per_epoch}: the training set has changed; start anew in another --work-dir"
            )
        checkpoint.load_weights(self.model, content["model"], path)
        if self.ema is not None:
            checkpoint.load_weights(self.ema.module, content["ema"], path)
            self.ema.n_averaged.fill_(content["ema_updates"])
        rates = list(self.scheduler.base_lrs)  # of this run, as is the length and so the schedule: both may be others
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict({**content["scheduler"], "base_lrs": rates})
        for group, rate, factor in zip(self.optimizer.param_groups, rates, self.scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(content["step"])
        if content["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.step, self.score = content["step"], content["score"]
        self.best_score, self.best_step = content["best_score"], content["best_step"]
        self.saved = f"the last good checkpoint is {path} (step {self.step})"
        if len(content["rng"]) == distributed.world_size():
            set_rng_state(content["rng"][distributed.rank()])
            return ""
        return (
            f"the checkpoint was written by {len(content['rng'])} processes, now there are {distributed.world_size()}: "
            "the training goes on, but not bit for bit as before"
        )

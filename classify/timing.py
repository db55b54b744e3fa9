"""How long a training step takes, and how much longer the input makes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from classify import data, losses, network
from classify.config import ClassifyConfig
from engine.prepare import prepare, session
from engine.steps import TrainingStep, endless


class Row(NamedTuple):
    network: str
    step: float
    """Seconds of a step: forward, loss, backward, update."""
    input: float
    """Seconds of its batch."""

    @property
    def share(self) -> float:
        """Of the step's time, what the input adds to it."""
        return self.input / self.step


def measure(cfg: ClassifyConfig, networks: Sequence[str], rounds: int, steps: int | None = None) -> list[Row]:
    """Medians over `rounds` of the mean of `steps` batches and steps, all networks in turn in each round.

    Args:
        cfg: the experiment; its batches are whole micro-batches, its recipe of normalization is applied.
        networks: names as in model.name; the options of the config's network are only for itself.
        rounds: how often each network is measured.
        steps: in a round; None: 1 on the CPU, 10 on a GPU, where several batches are made at once. More, where a norm
            does in every few steps what it leaves out in others.

    Raises:
        UserError: as a training with this config.
    """
    with session(cfg.runtime) as device:
        batches = endless(data.train_batches(cfg, device))
        works = {name: _step(cfg, name, next(batches)["image"]) for name in networks}
        steps, cycle = steps or (1 if device.type == "cpu" else 10), max(work.cycle for work in works.values())
        steps = -(-steps // cycle) * cycle
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
        for done in range(rounds + 1):
            for name, work in works.items():
                pairs = [_pair(batches, work, device) for _ in range(steps)]
                if done:  # the first round warms up
                    times[name].append((sum(p[0] for p in pairs) / steps, sum(p[1] for p in pairs) / steps))
        return [Row(name, median(s for _, s in pairs), median(i for i, _ in pairs)) for name, pairs in times.items()]


def _pair(
    batches: Iterator[dict[str, Any]], work: Callable[[dict[str, Any]], None], device: torch.device
) -> tuple[float, float]:
    start = _now(device)
    batch = next(batches)
    middle = _now(device)
    work(batch)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _step(cfg: ClassifyConfig, name: str, images: torch.Tensor) -> TrainingStep:
    options = cfg.model.options if name == cfg.model.name else {}
    section = cfg.model.model_copy(update={"name": name, "options": options})
    model, _ = network.build(section, data.describe(cfg.data), pretrained=False)
    prepared = prepare(model, cfg, groups=partial(network.parameter_groups, cfg=cfg.optim), images=[images])
    return TrainingStep(prepared, cfg, prepared.groups, losses.build(cfg.loss))

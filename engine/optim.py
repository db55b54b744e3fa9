"""Parameter groups, optimiser, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.config import Length, OptimConfig
from engine.errors import UserError


def parameter_groups(
    model: nn.Module, cfg: OptimConfig, is_backbone: Callable[[str], bool] = lambda name: False
) -> list[dict[str, Any]]:
    """Groups for the optimiser, each with its `name` (backbone or head), `lr` and `weight_decay`.

    `is_backbone` says of a parameter's name whether it belongs to the backbone. Frozen parameters are left out.

    Raises:
        UserError: nothing to train, or a rate factor for a part that the model does not have.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    factors = {"backbone": cfg.backbone_lr_factor, "head": cfg.head_lr_factor}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "backbone" if is_backbone(name) else "head"
        decayed = cfg.decay_norm_bias or parameter.ndim > 1
        group = groups.setdefault(
            (part, decayed),
            {
                "params": [],
                "name": part,
                "lr": cfg.lr * factors[part],
                "weight_decay": cfg.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise UserError(f"the model ({type(model).__name__}) has no parameters that can be trained")
    for part, factor in factors.items():
        if factor != 1 and not any(group["name"] == part for group in groups.values()):
            raise UserError(
                f"optim.{part}_lr_factor: {factor} has no effect, the model has no trainable {part} parameters"
            )
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], cfg: OptimConfig) -> Optimizer:
    """The optimiser that `cfg` names, over the groups of `parameter_groups`."""
    if cfg.name == "adamw":
        return AdamW(groups, lr=cfg.lr, betas=cfg.betas)
    if cfg.name in ("adam", "amsgrad"):
        return Adam(groups, lr=cfg.lr, betas=cfg.betas, amsgrad=cfg.name == "amsgrad")
    return SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The current rate of each part, by name; `{"lr": rate}` if all are equal."""
    return _named({group["name"]: float(group["lr"]) for group in optimizer.param_groups})


def rates_at(schedule: LambdaLR, step: int) -> dict[str, float]:
    """`learning_rates` in the step of this number, counted from 0."""
    groups = zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True)
    return _named({group["name"]: float(group["initial_lr"] * factor(step)) for group, factor in groups})


def _named(rates: dict[str, float]) -> dict[str, float]:
    return {"lr": next(iter(rates.values()))} if len(set(rates.values())) == 1 else rates


def schedule_factor(cfg: OptimConfig, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step, counted from 0.

    Raises:
        UserError: the warm-up is not shorter than the training.
    """
    warmup = cfg.warmup.steps(steps_per_epoch)
    if warmup >= total_steps:
        raise UserError(f"optim.warmup: {cfg.warmup} ({warmup} steps) is not shorter than the training ({total_steps})")
    milestones = [milestone.steps(steps_per_epoch) for milestone in cfg.milestones]

    def factor(step: int) -> float:
        if step < warmup:
            return cfg.warmup_factor + (1 - cfg.warmup_factor) * step / warmup
        progress = min(1.0, (step - warmup) / (total_steps - warmup))
        if cfg.schedule == "multistep":
            return float(cfg.gamma ** sum(step >= milestone for milestone in milestones))
        if cfg.schedule == "constant":
            return 1.0
        course = (1 - progress) ** cfg.power if cfg.schedule == "poly" else (1 + math.cos(math.pi * progress)) / 2
        return cfg.min_lr_factor + (1 - cfg.min_lr_factor) * course

    return factor


def late_milestones(cfg: OptimConfig, total_steps: int, steps_per_epoch: int) -> list[str]:
    """Those of a multistep schedule that the training does not come to."""
    return [str(one) for one in cfg.milestones if one.steps(steps_per_epoch) >= total_steps]


def other_length(cfg: OptimConfig, was: Length, now: Length, steps_per_epoch: int) -> str | None:
    """What to say of a training that goes on with another length than it began with; None if its rates stay."""
    if cfg.schedule not in ("poly", "cosine") or was.steps(steps_per_epoch) == now.steps(steps_per_epoch):
        return None
    return f"note: length was {was}, now {now}: optim.schedule: {cfg.schedule} goes by it, so the learning rate jumps"


def build_schedule(optimizer: Optimizer, cfg: OptimConfig, total_steps: int, steps_per_epoch: int) -> LambdaLR:
    """The schedule, to be stepped once after each step of the optimiser."""
    return LambdaLR(optimizer, schedule_factor(cfg, total_steps, steps_per_epoch))


def build_ema(model: nn.Module, cfg: OptimConfig) -> AveragedModel | None:
    """The exponential moving average of the weights, or None without `ema_decay`; buffers are copied, not averaged."""
    if cfg.ema_decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema_decay))

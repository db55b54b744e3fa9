from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from engine.config import Length, OptimConfig
from engine.errors import UserError
from engine.optim import (
    build_ema,
    build_optimizer,
    build_schedule,
    late_milestones,
    learning_rates,
    other_length,
    parameter_groups,
    schedule_factor,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)


def is_backbone(name: str) -> bool:
    return name.startswith("backbone.")


def test_one_rate_and_decay_for_all_by_default() -> None:
    groups = parameter_groups(Net(), OptimConfig(lr=0.1, weight_decay=0.01))
    assert [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("head", 0.1, 0.01, 6)
    ]


def test_rates_by_part_and_no_decay_of_vectors() -> None:
    cfg = OptimConfig(lr=0.1, backbone_lr_factor=0.5, head_lr_factor=10, decay_norm_bias=False, weight_decay=0.01)
    net = Net()
    groups = {(one["name"], one["weight_decay"]): one for one in parameter_groups(net, cfg, is_backbone)}
    assert set(groups) == {("backbone", 0.01), ("backbone", 0.0), ("head", 0.01), ("head", 0.0)}
    assert groups["backbone", 0.01]["params"] == [net.backbone[0].weight]
    assert [id(one) for one in groups["backbone", 0.0]["params"]] == [
        id(one) for one in (net.backbone[0].bias, net.backbone[1].weight, net.backbone[1].bias)
    ]
    assert {one["lr"] for one in groups.values() if one["name"] == "backbone"} == {0.05}
    assert {one["lr"] for one in groups.values() if one["name"] == "head"} == {1.0}
    assert learning_rates(build_optimizer(list(groups.values()), cfg)) == {"backbone": 0.05, "head": 1.0}


@pytest.mark.parametrize("name", ["sgd", "adam", "amsgrad", "adamw"])
def test_a_factor_of_0_freezes_the_backbone(name: Any) -> None:
    net, cfg = Net(), OptimConfig(name=name, lr=0.1, backbone_lr_factor=0, weight_decay=0.1)
    before = {key: value.clone() for key, value in net.named_parameters()}
    optimizer = build_optimizer(parameter_groups(net, cfg, is_backbone), cfg)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = {key for key, value in net.named_parameters() if torch.equal(value, before[key])}
    assert kept == {key for key in before if is_backbone(key)}


def test_frozen_parameters_are_left_out() -> None:
    net = Net()
    net.backbone.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(net, OptimConfig(), is_backbone)) == 2
    net.head.requires_grad_(False)
    with pytest.raises(UserError, match=r"the model \(Net\) has no parameters that can be trained"):
        parameter_groups(net, OptimConfig(), is_backbone)


def test_factor_for_a_part_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match="optim.backbone_lr_factor: 0.1 has no effect, the model has no trainable backbone"
    ):
        parameter_groups(Net(), OptimConfig(backbone_lr_factor=0.1))
    with pytest.raises(UserError, match="optim.head_lr_factor: 10.0 has no effect"):
        parameter_groups(Net(), OptimConfig(head_lr_factor=10), lambda name: True)


def test_options_reach_the_optimiser() -> None:
    sgd = build_optimizer(parameter_groups(Net(), OptimConfig()), OptimConfig(momentum=0.8, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["nesterov"]) == (0.8, True)
    cfg = OptimConfig(name="adamw", lr=0.2, betas=(0.7, 0.8), weight_decay=0.3)
    adamw = build_optimizer(parameter_groups(Net(), cfg), cfg)
    assert isinstance(adamw, torch.optim.AdamW)
    group = adamw.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.7, 0.8), 0.3)


def test_adam_and_amsgrad_add_the_decay_to_the_gradient():
    for name in ("adam", "amsgrad"):
        cfg = OptimConfig(name=name, lr=0.2, betas=(0.7, 0.8), weight_decay=0.3)
        adam = build_optimizer(parameter_groups(Net(), cfg), cfg)
        assert type(adam) is torch.optim.Adam
        group = adam.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.7, 0.8), 0.3)
        assert group["amsgrad"] is (name == "amsgrad")


def course(total: int = 10, per_epoch: int = 2, **options: Any) -> list[float]:
    factor = schedule_factor(OptimConfig(**options), total, per_epoch)
    return [factor(step) for step in range(total)]


def test_poly() -> None:
    assert course(schedule="poly", power=0.9) == pytest.approx([(1 - step / 10) ** 0.9 for step in range(10)])


def test_cosine_ends_at_its_minimum() -> None:
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert course(schedule="cosine", min_lr_factor=0.1) == pytest.approx(expected)
    assert schedule_factor(OptimConfig(schedule="cosine", min_lr_factor=0.1), 10, 1)(10) == pytest.approx(0.1)


def test_multistep_counts_epochs_and_steps() -> None:
    milestones = (Length(2, "epochs"), Length(7, "steps"))
    late = OptimConfig(schedule="multistep", milestones=milestones)
    assert [late_milestones(late, total, 2) for total in (4, 5, 8)] == [["2 epochs", "7 steps"], ["7 steps"], []]
    assert course(schedule="multistep", milestones=milestones, gamma=0.5) == [1] * 4 + [0.5] * 3 + [0.25] * 3


def test_another_length_is_told_where_it_is_another_number_of_steps() -> None:
    epochs, steps = Length(2, "epochs"), [Length(count, "steps") for count in (10, 11)]
    assert [other_length(OptimConfig(), epochs, one, 5) is None for one in steps] == [True, False]
    assert other_length(OptimConfig(schedule="constant"), epochs, steps[1], 5) is None


def test_constant_with_warmup() -> None:
    found = course(schedule="constant", warmup=Length(2, "epochs"), warmup_factor=0.2)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6)


def test_poly_begins_after_the_warmup() -> None:
    found = course(schedule="poly", power=1.0, warmup=Length(5, "steps"), warmup_factor=0.0)
    assert found == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_warmup_longer_than_the_training() -> None:
    with pytest.raises(UserError, match=r"optim.warmup: 5 epochs \(10 steps\) is not shorter than the training \(10\)"):
        schedule_factor(OptimConfig(warmup=Length(5, "epochs")), 10, 2)


def test_schedule_keeps_the_ratio_of_the_parts() -> None:
    cfg = OptimConfig(lr=0.1, head_lr_factor=10, schedule="poly", power=1.0)
    optimizer = build_optimizer(parameter_groups(Net(), cfg, is_backbone), cfg)
    schedule = build_schedule(optimizer, cfg, 10, 1)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert learning_rates(optimizer) == pytest.approx({"backbone": 0.05, "head": 0.5})


def test_moving_average() -> None:
    net = Net()
    assert build_ema(net, OptimConfig()) is None
    ema = build_ema(net, OptimConfig(ema_decay=0.75))
    assert ema is not None
    ema.update_parameters(net)
    before = net.head.weight.detach().clone()
    with torch.no_grad():
        net.head.weight.add_(1)
        net.backbone[1].running_mean.add_(2)  # type: ignore[operator, union-attr]
    ema.update_parameters(net)
    torch.testing.assert_close(ema.module.head.weight, before + 0.25)
    torch.testing.assert_close(ema.module.backbone[1].running_mean, net.backbone[1].running_mean)

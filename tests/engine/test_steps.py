"""The step that is timed is a training's."""

import pytest
import torch
from torch import nn

from engine.prepare import prepare, session
from engine.steps import TrainingStep
from tests.engine import toy


def made(**keys: object) -> tuple[TrainingStep, dict[str, object]]:
    cfg = toy.config(batch=4, **keys)
    with session(cfg.runtime):
        prepared = prepare(toy.Net(True), cfg)
    groups = [{"params": list(prepared.raw.parameters())}]
    return TrainingStep(prepared, cfg, groups, toy.loss), next(iter(toy.ToyBatches(cfg).epoch(0)))


def test_what_a_training_does_after_the_backward_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: norms.append(float(clip(*args))))
    step, batch = made(optim__clip_norm=1e-3, optim__ema_decay=0.9)
    assert step.average is not None
    before = [each.clone() for each in step.average.parameters()]
    step(batch)
    step(batch)
    assert len(norms) == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, step.average.parameters(), strict=True))


def test_a_cycle_holds_a_renewal_and_first_steps_are_left_out() -> None:
    step, _ = made(norm__name="deconv_fast")
    assert step.cycle == 4 and made()[0].cycle == 1
    fresh = [layer.fresh_steps for layer in step.prepared.raw.modules() if hasattr(layer, "fresh_steps")]
    assert fresh and not any(fresh)

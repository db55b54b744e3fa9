"""When a training is evaluated and what it keeps; see test_loop.py for its steps, resumes and signals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.checkpoint import differing
from engine.config import Length
from engine.errors import NotFiniteError, UserError
from engine.loop import Batch, Evaluation, Loss
from engine.report import read_metrics
from tests.engine import toy
from tests.engine.toy import config, train

FIRST = Length(1, "steps")


class Recorder:
    """Scores in a given order, and what the loop asked for."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)
        self.asked: list[int | None] = []
        self.states: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, max_batches: int | None) -> Evaluation:
        assert not model.training and not torch.is_grad_enabled()
        self.asked.append(max_batches)
        self.states.append({name: one.clone() for name, one in model.state_dict().items()})
        return Evaluation(score=0.0 if max_batches else next(self.scores))


def test_two_batches_are_evaluated_before_the_first_step(tmp_path: Path) -> None:
    def broken(model: nn.Module, max_batches: int | None) -> Evaluation:
        raise UserError(f"asked for {max_batches} batches")

    with pytest.raises(UserError, match="asked for 2 batches"):
        train(config(), tmp_path, evaluate=broken)


def test_best_and_last(tmp_path: Path) -> None:
    recorder = Recorder([0.2, float("nan"), 0.7, 0.5])
    result = train(config(steps=7, report__eval_every=Length(2, "steps")), tmp_path, evaluate=recorder, curves=True)
    assert recorder.asked == [2, None, None, None, None]  # after 2, 4, 6 steps and at the end
    assert (result.score, result.best_step, result.last_score, result.step) == (0.7, 6, 0.5, 7)
    best, last = checkpoint.load(tmp_path / "best.pt"), checkpoint.load(tmp_path / "last.pt")
    assert (best["step"], best["score"], last["step"], last["score"], last["best_score"]) == (6, 0.7, 7, 0.5, 0.7)
    assert not differing(best["model"], recorder.states[3])
    assert (last["task"], last["meta"], last["config"]["batch_size"]) == ("toy", {"classes": ["a", "b", "c"]}, 8)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["best.pt", "curves.png", "last.pt", "metrics.jsonl"]


def test_outputs_that_are_not_finite_in_an_evaluation_end_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = iter([None, 0.3, None])

    def overflowing(model: nn.Module, max_batches: int | None) -> Evaluation:
        score = 0.0 if max_batches else next(scores)
        if score is None:
            raise NotFiniteError("the outputs are not finite")
        return Evaluation(score)

    result = train(config(steps=6, report__eval_every=Length(2, "steps")), tmp_path, evaluate=overflowing)
    assert (result.score, result.best_step, result.step) == (0.3, 4, 6) and math.isnan(result.last_score or 0.0)
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 4
    assert capsys.readouterr().out.count("warning: nothing is scored: the outputs are not finite") == 2
    assert [row["score"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "eval"] == [
        None,
        0.3,
        None,
    ]


def test_running_statistics_are_averaged_anew_before_an_evaluation(tmp_path: Path) -> None:
    cfg = config(steps=5, dropout=True, norm__precise_batches=3)
    found: list[Tensor] = []

    def looking(model: nn.Module, max_batches: int | None) -> Evaluation:
        if max_batches is None:
            images = [batch["image"] for batch, _ in zip(toy.ToyBatches(cfg).epoch(0), range(3), strict=False)]
            with torch.no_grad():
                outputs = [model.backbone[0](image) for image in images]  # type: ignore[index, union-attr]
            means = torch.stack([one.mean((0, 2, 3)) for one in outputs]).mean(0)
            found.append(model.backbone[1].running_mean - means)  # type: ignore[index, union-attr]
        return toy.evaluate(model, max_batches)

    train(cfg, tmp_path, evaluate=looking)
    assert len(found) == 1 and found[0].abs().max() < 1e-6


def test_end_is_not_evaluated_twice(tmp_path: Path) -> None:
    recorder = Recorder([0.1, 0.2])
    train(config(steps=4, report__eval_every=Length(2, "steps")), tmp_path, evaluate=recorder)
    assert recorder.asked == [2, None, None]


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    result = train(config(steps=3), tmp_path, evaluate=None)
    assert (result.score, result.last_score) == (None, None)
    assert not (tmp_path / "best.pt").exists() and (tmp_path / "last.pt").exists()


def test_evaluated_network_is_the_moving_average(tmp_path: Path) -> None:
    recorder = Recorder([0.1])
    decay = 0.8
    snapshots: list[dict[str, Tensor]] = []

    def recording(model: nn.Module, batch: Batch) -> Loss:
        snapshots.append({name: one.detach().clone() for name, one in model.state_dict().items()})
        return toy.loss(model, batch)

    train(config(steps=3, optim__ema_decay=decay, dropout=True), tmp_path, loss=recording, evaluate=recorder)
    best = checkpoint.load(tmp_path / "best.pt")
    after = [*snapshots[1:], best["model"]]
    name = "head.weight"
    expected = after[0][name]
    for one in after[1:]:
        expected = decay * expected + (1 - decay) * one[name]
    torch.testing.assert_close(best["ema"][name], expected)
    assert not differing(best["ema"], recorder.states[-1])
    assert torch.equal(best["ema"]["backbone.1.running_mean"], best["model"]["backbone.1.running_mean"])
    assert best["ema_updates"] == 3


def test_periodic_checkpoints_are_kept_on_request(tmp_path: Path) -> None:
    train(config(steps=5, report__checkpoint_every=Length(2, "steps"), report__keep_all=True), tmp_path)
    assert sorted(one.name for one in tmp_path.glob("step-*.pt")) == ["step-00000002.pt", "step-00000004.pt"]

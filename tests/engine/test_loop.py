from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import checkpoint, distributed
from engine.checkpoint import differing
from engine.config import Length
from engine.errors import UserError
from engine.loop import Batch, Evaluation, Loss
from engine.report import read_metrics
from engine.resume import find_resume
from engine.signals import Interrupted
from tests.engine import toy
from tests.engine.toy import assert_close, config, learn, train, weights

Tree = dict[str, Any]
FIRST = Length(1, "steps")


# ---- the gradient is that of the whole step


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    train(config(steps=40, optim__lr=0.5), tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


def test_one_step_is_the_mean_over_valid_pixels(tmp_path: Path) -> None:
    cfg = config(steps=1, optim__lr=0.5, optim__momentum=0.0, optim__weight_decay=0.0, dtype="float64")
    before: dict[str, Tensor] = {}
    train(cfg, tmp_path, hook=lambda net: before.update({k: v.clone() for k, v in net.state_dict().items()}))
    net = toy.Net(False).double()
    net.load_state_dict(before)
    batch = next(toy.ToyBatches(cfg).epoch(0))
    nn.functional.cross_entropy(net(batch["image"]), batch["target"], ignore_index=255).backward()
    expected = {name: (one - 0.5 * one.grad).detach() for name, one in net.named_parameters()}
    assert_close(weights(tmp_path), expected, 1e-12)


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    more: Tree = {"dtype": "float64", "optim__clip_norm": 0.05, "optim__ema_decay": 0.9}
    big = learn(config(**more), tmp_path / "big")
    small = learn(config(micro=2, **more), tmp_path / "small")
    assert_close(small, big, 1e-10)
    assert (
        float((big["head.weight"] - learn(config(steps=1, **more), tmp_path / "one")["head.weight"]).abs().max()) > 1e-3
    )


def test_step_without_a_valid_pixel(tmp_path: Path) -> None:
    cfg = config(steps=3, void=True, optim__weight_decay=0.0)
    before: dict[str, Tensor] = {}
    train(cfg, tmp_path, hook=lambda net: before.update({k: v.clone() for k, v in net.state_dict().items()}))
    assert not differing(weights(tmp_path), before)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train"] == [0.0, 0.0]


def test_steps_without_a_valid_pixel_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "warning: every target since the last report is ignored, so nothing was learned"
    train(config(steps=3, void=True), tmp_path / "void")
    assert capsys.readouterr().out.count(told) == 2  # as often as the loss
    train(config(steps=3), tmp_path / "sound")
    assert told not in capsys.readouterr().out


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    cfg = config(steps=1, optim__lr=1.0, optim__clip_norm=0.01, optim__weight_decay=0.0)
    before: dict[str, Tensor] = {}
    train(cfg, tmp_path, hook=lambda net: before.update({k: v.clone() for k, v in net.state_dict().items()}))
    moved = torch.stack([(one - before[name]).norm() for name, one in weights(tmp_path).items()]).norm()
    assert 0.0099 < float(moved) < 0.0101


def test_a_rate_of_zero_does_not_count_in_the_clipping(tmp_path: Path) -> None:
    """As where the backbone asks for no gradient."""
    cfg = config(steps=1, optim__lr=1.0, optim__clip_norm=0.01, optim__weight_decay=0.0, optim__backbone_lr_factor=0.0)
    before: dict[str, Tensor] = {}
    train(cfg, tmp_path, hook=lambda net: before.update({k: v.clone() for k, v in net.state_dict().items()}))
    moved = {name: float((one - before[name]).norm()) for name, one in weights(tmp_path).items()}
    assert 0.0099 < sum(each**2 for name, each in moved.items() if name.startswith("head")) ** 0.5 < 0.0101
    assert not any(each for name, each in moved.items() if name.startswith("backbone"))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_frozen_backbone_gets_no_gradients_and_stays(tmp_path: Path, name: str) -> None:
    """Of weight decay and an average too; the statistics of its norms move. It goes on, also from a checkpoint of an
    earlier version, whose optimiser knew moments of all parameters."""
    net: list[toy.Net] = []
    cfg = config(
        steps=4,
        dropout=True,
        optim__name=name,
        optim__weight_decay=0.1,
        optim__ema_decay=0.9,
        optim__backbone_lr_factor=0.0,
        report__checkpoint_every=Length(2, "steps"),
        report__keep_all=True,
    )
    before: dict[str, Tensor] = {}

    def asked(model: nn.Module, batch: Batch) -> Loss:
        found = toy.loss(model, batch)
        found.total.register_hook(lambda grad: seen.append([key for key, one in named if one.requires_grad]))
        return found

    def keep(model: toy.Net) -> None:
        net.append(model)
        named.extend(model.named_parameters())
        before.update({k: v.clone() for k, v in model.state_dict().items()})

    named: list[tuple[str, Tensor]] = []
    seen: list[list[str]] = []
    train(cfg, tmp_path / "whole", hook=keep, loss=asked)
    assert seen == [["head.weight", "head.bias"]] * 4
    assert all(one.grad is None for one in net[0].backbone.parameters())
    whole = checkpoint.load(tmp_path / "whole/last.pt")
    for weights_of in (whole["model"], whole["ema"]):
        moved = {key for key, one in weights_of.items() if not torch.equal(one, before[key])}
        statistics = {f"backbone.1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
        assert moved == {"head.weight", "head.bias"} | statistics
    state = checkpoint.load(tmp_path / "whole/step-00000002.pt")
    head = next(iter(state["optimizer"]["state"].values()))
    numbers = [i for group in state["optimizer"]["param_groups"] for i in group["params"]]
    sizes = [one.shape for key, one in named if key.startswith("backbone")] + [(3, 6, 1, 1), (3,)]
    for i in set(numbers) - set(state["optimizer"]["state"]):
        state["optimizer"]["state"][i] = {k: torch.zeros(sizes[i]) if v.ndim else v for k, v in head.items()}
    assert len(state["optimizer"]["state"]) == len(numbers) == 6
    train(cfg, tmp_path / "resumed", resume=state)
    resumed = checkpoint.load(tmp_path / "resumed/last.pt")
    assert not differing(resumed["model"], whole["model"]) and not differing(resumed["ema"], whole["ema"])


def test_logged_loss_is_the_mean_over_the_interval(tmp_path: Path) -> None:
    cfg = config(steps=4, optim__lr=1e-12, report__log_every=Length(4, "steps"))
    net: list[nn.Module] = []
    train(cfg, tmp_path, hook=net.append)
    stream = toy.ToyBatches(cfg).epoch(0)
    with torch.no_grad():
        found = [toy.loss(net[0], next(stream)) for _ in range(4)]
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    expected = sum(float(one.total) for one in found) / sum(float(one.weight) for one in found)
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["parts"] == pytest.approx({"main": expected, "twice": 2 * expected}, rel=1e-5)


def test_the_last_steps_are_logged_before_their_evaluation(tmp_path: Path) -> None:
    train(config(steps=5, report__log_every=Length(2, "steps"), report__eval_every=Length(5, "steps")), tmp_path)
    rows = [(row["kind"], row["step"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows == [("train", 2), ("train", 4), ("train", 5), ("eval", 5)]


# ---- several processes


def test_two_processes_equal_one(two: Path, tmp_path: Path) -> None:
    one = learn(config(dtype="float64", optim__clip_norm=0.05), tmp_path)
    assert_close(weights(two / "2x4"), one, 1e-10)
    assert_close(weights(two / "2x2x2"), one, 1e-10)
    alone, both = (read_metrics(path / "metrics.jsonl") for path in (tmp_path, two / "2x4"))
    assert [row["loss"] for row in both if row["kind"] == "train"] == pytest.approx(
        [row["loss"] for row in alone if row["kind"] == "train"], rel=1e-10
    )


def test_names_are_plain_under_distributed_data_parallel(two: Path) -> None:
    assert set(weights(two / "2x4")) == {"backbone.0.weight", "backbone.0.bias", "head.weight", "head.bias"}


def test_two_processes_equal_one_with_a_frozen_backbone(two: Path, tmp_path: Path) -> None:
    more: Tree = {"dtype": "float64", "optim__clip_norm": 0.05, "optim__backbone_lr_factor": 0.0}
    assert_close(weights(two / "frozen"), learn(config(**more), tmp_path), 1e-10)


def test_two_processes_resume_bit_for_bit(two: Path) -> None:
    whole, resumed = (checkpoint.load(two / name / "last.pt") for name in ("whole", "resumed"))
    assert len(whole["rng"]) == 2
    assert differing(whole["rng"][0], whole["rng"][1])
    assert not differing(whole, resumed)


def test_nan_on_any_process_stops_all(two: Path) -> None:
    texts = [(two / f"nan_{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0].startswith("the loss became nan at step ") and texts[1].startswith("the loss became nan at step ")
    report = json.loads((two / "nan" / "nan_batch.json").read_text())
    assert len(report["batches"]) == 2
    (bad,) = report["not_finite"]
    assert "image_20.png" in bad["names"] and len(bad["names"]) == 4


def test_signal_to_one_process_stops_all_after_the_same_step(two: Path) -> None:
    assert [(two / f"stopped_{rank}.txt").read_text() for rank in (0, 1)] == ["True 4", "True 4"]
    assert checkpoint.load(two / "stopped" / "last.pt")["step"] == 4


def test_resume_with_another_number_of_processes_is_said(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(two / "whole" / "step-00000003.pt")
    train(config(steps=8, dropout=True), tmp_path, resume=state)
    assert (
        "resumed after step 3 of 8; the checkpoint was written by 2 processes, now there are 1"
        in capsys.readouterr().out
    )


# ---- resume


EVERYTHING: Tree = {
    "dropout": True,
    "optim__ema_decay": 0.9,
    "optim__clip_norm": 1.0,
    "optim__warmup": Length(2, "steps"),
    "optim__schedule": "cosine",
    "report__checkpoint_every": FIRST,
    "report__keep_all": True,
    "report__eval_every": Length(2, "steps"),
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optim__name": "adamw", "optim__lr": 0.01, "micro": 4},
        {"runtime__amp": "bf16"},
        {"runtime__amp": "fp16"},
        {"norm__name": "deconv"},
        {"norm__name": "deconv_fast", "norm__precise_batches": 2},
    ],
    ids=["sgd", "adamw", "bf16", "fp16", "deconv", "precise"],
)
def test_resume_is_bit_identical(tmp_path: Path, more: Tree) -> None:
    cfg = config(steps=8, **EVERYTHING, **more)
    train(cfg, tmp_path / "whole")
    whole = checkpoint.load(tmp_path / "whole" / "last.pt")
    assert whole["steps_per_epoch"] == 5
    for step in (3, 5, 6):  # within the first epoch, at its end, in the second
        folder = tmp_path / f"from_{step}"
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / f"step-{step:08}.pt", folder / "last.pt")
        shutil.copy(tmp_path / "whole" / "metrics.jsonl", folder / "metrics.jsonl")
        state = find_resume(folder, "auto", cfg)
        assert state is not None
        assert (state["step"], state["epoch"], state["step_in_epoch"]) == (step, step // 5, step % 5)
        result = train(cfg, folder, resume=state)
        assert not differing(whole, checkpoint.load(folder / "last.pt"))
        assert (result.score, result.best_step) == (whole["best_score"], whole["best_step"])
        rows = [
            [(row["kind"], row["step"]) for row in read_metrics(where / "metrics.jsonl")]
            for where in (tmp_path / "whole", folder)
        ]
        assert rows[1] == [row for row in rows[0] if row in rows[1]] and rows[1][-1] == rows[0][-1]
        assert len(set(rows[1])) == len(rows[1])


def test_resume_reads_no_batch_twice(tmp_path: Path) -> None:
    cfg = config(steps=5)
    batches = toy.ToyBatches(cfg)
    list(batches.epoch(0, 3))
    assert len(batches.read) == 16 and len(set(batches.read)) == 16


def test_resume_with_another_training_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(steps=5)
    train(cfg, tmp_path / "a")
    state = find_resume(tmp_path / "a", "auto", cfg)
    monkeypatch.setattr(toy, "IMAGES", 24)
    with pytest.raises(
        UserError, match=r"a/last.pt: was trained with 5 steps an epoch, here an epoch has 3: the training"
    ):
        train(cfg, tmp_path / "a", resume=state)


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    cfg = config(steps=5)
    first = train(cfg, tmp_path)
    before = weights(tmp_path)
    again = train(cfg, tmp_path, resume=find_resume(tmp_path, "auto", cfg))
    assert (again.score, again.step, again.stopped) == (first.score, 5, False)
    assert not differing(before, weights(tmp_path))


def test_a_finished_run_in_another_folder_is_scored_there(tmp_path: Path) -> None:
    first = train(config(steps=5), tmp_path / "a")
    cfg = config(steps=5)
    again = train(cfg, tmp_path / "b", resume=find_resume(tmp_path / "b", tmp_path / "a", cfg))
    assert again.score == first.score and again.step == 5
    assert (tmp_path / "b" / "best.pt").exists() and len((tmp_path / "b" / "metrics.jsonl").read_text()) > 0


def test_longer_length_goes_on_and_says_what_becomes_of_the_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(steps=5), tmp_path)
    for cfg, told in ((config(steps=7), True), (config(steps=9, optim__schedule="constant"), False)):
        state = find_resume(tmp_path, "auto", config(steps=5))
        capsys.readouterr()
        assert train(cfg, tmp_path, resume=state).step == cfg.length.value
        assert (
            "note: length was 5 steps, now 7 steps: optim.schedule: poly goes by it" in capsys.readouterr().out
        ) == told


def test_another_rate_is_that_of_the_schedule_from_there_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(steps=5), tmp_path)
    slower = config(steps=10, optim__lr=0.01, optim__schedule="constant")
    state = find_resume(tmp_path, "auto", config(steps=5, optim__lr=0.01), accept=True)
    assert train(slower, tmp_path, resume=state).step == 10
    assert "resumed after step 5 of 10; optim.lr: was 0.1, now 0.01\n" in capsys.readouterr().out
    content = checkpoint.load(tmp_path / "last.pt")
    assert [group["lr"] for group in content["optimizer"]["param_groups"]] == [0.01, 0.01]
    rates = [row["rates"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert set(rates[-1].values()) == {0.01}


# ---- not finite


def test_nan_stops_and_names_the_batch(tmp_path: Path) -> None:
    cfg = config(steps=20, report__checkpoint_every=FIRST)
    order = torch.randperm(toy.IMAGES, generator=torch.Generator().manual_seed(0)).tolist()
    cfg = cfg.model_copy(update={"bad": (order[21],)})  # the sixth image of the third step
    with pytest.raises(UserError) as caught:
        train(cfg, tmp_path)
    assert str(caught.value) == (
        f"the loss became nan at step 3; the files of its batch are listed in {tmp_path}/nan_batch.json; the last good "
        f"checkpoint is {tmp_path}/last.pt (step 2); try a lower optim.lr or optim.clip_norm=1 "
        "(--resume auto --accept-changes)"
    )
    report = json.loads((tmp_path / "nan_batch.json").read_text())
    assert (report["step"], report["loss"]) == (3, "nan")
    (bad,) = report["not_finite"]
    assert bad["names"] == [f"image_{index:02}.png" for index in order[16:24]]
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["step"] == 2
    assert all(bool(torch.isfinite(one).all()) for one in saved["model"].values())


def test_first_of_several_bad_steps_is_named(tmp_path: Path) -> None:
    order = torch.randperm(toy.IMAGES, generator=torch.Generator().manual_seed(0)).tolist()
    cfg = config(steps=20, micro=4, bad=(order[12],), report__log_every=Length(5, "steps"))
    with pytest.raises(UserError, match="the loss became nan at step 2; .*; no checkpoint has been written yet"):
        train(cfg, tmp_path)
    report = json.loads((tmp_path / "nan_batch.json").read_text())
    assert [batch["finite"] for batch in report["batches"]] == [True, False]
    assert report["not_finite"][0]["names"] == [f"image_{index:02}.png" for index in order[12:16]]
    assert not list(tmp_path.glob("*.pt"))


def test_spoilt_weights_are_never_saved(tmp_path: Path) -> None:
    """The loss of the step is still finite, the gradient is not."""
    calls: list[int] = []

    def spoil(net: toy.Net) -> None:
        def hook(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * (float("inf") if len(calls) == 4 else 1)

        net.head.weight.register_hook(hook)

    with pytest.raises(
        UserError, match=r"after step 4 the weights are spoilt \(the last good.*\(step 3\); try.*\): head.weight"
    ):
        train(config(report__checkpoint_every=FIRST, optim__lr=1e-3), tmp_path, hook=spoil)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_ends_and_the_rest_is_as_if_nothing_had_happened(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(steps=8, dropout=True, report__eval_every=Length(4, "steps"))
    train(cfg, tmp_path / "whole")
    calls: list[int] = []

    def interrupted(model: nn.Module, batch: Batch) -> Loss:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return toy.loss(model, batch)

    folder = tmp_path / "stopped"
    capsys.readouterr()
    handlers = signal.getsignal(number)
    result = train(cfg, folder, loss=interrupted)
    assert signal.getsignal(number) is handlers
    assert (result.signal, result.step, checkpoint.load(folder / "last.pt")["step"]) == (number, 4, 4)
    out = capsys.readouterr().out
    assert f"stopped by a signal after step 4; {folder}/last.pt is saved, --resume auto goes on" in out
    train(cfg, folder, resume=find_resume(folder, "auto", cfg))
    assert not differing(checkpoint.load(tmp_path / "whole" / "last.pt"), checkpoint.load(folder / "last.pt"))


def test_a_signal_in_the_last_step_costs_its_row_nothing(tmp_path: Path) -> None:
    cfg = config(steps=5)
    train(cfg, tmp_path / "whole")
    calls: list[int] = []

    def interrupted(model: nn.Module, batch: Batch) -> Loss:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.loss(model, batch)

    assert train(cfg, tmp_path / "stopped", loss=interrupted).step == 5
    train(cfg, tmp_path / "stopped", resume=find_resume(tmp_path / "stopped", "auto", cfg))
    whole, stopped = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    assert all(row.pop("images_per_second") > 1 and row.pop("peak_memory_bytes") for row in [*whole[:3], *stopped[:3]])
    assert whole == stopped and whole[2]["rates"] and [row["kind"] for row in whole[2:]] == ["train", "eval"]


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_signal_costs_no_checkpoint_that_is_to_be_kept(tmp_path: Path, where: str) -> None:
    every = Length(2, "steps")
    cfg = config(steps=6, report__eval_every=every, report__checkpoint_every=every, report__keep_all=True)
    train(cfg, tmp_path / "whole")
    calls: list[str] = []

    def call(name: str) -> None:
        calls.append(name)
        if name == where and calls.count(name) == (4 if where == "step" else 3):  # one before the first step
            os.kill(os.getpid(), signal.SIGTERM)

    def loss(model: nn.Module, batch: Batch) -> Loss:
        call("step")
        return toy.loss(model, batch)

    def evaluate(model: nn.Module, max_batches: int | None) -> Evaluation:
        call("evaluation")
        return toy.evaluate(model, max_batches)

    folder = tmp_path / "stopped"
    try:
        assert train(cfg, folder, loss=loss, evaluate=evaluate).step == 4
    except Interrupted:
        assert where == "evaluation"
    train(cfg, folder, resume=find_resume(folder, "auto", cfg))
    whole, stopped = (sorted(path.name for path in one.glob("*.pt")) for one in (tmp_path / "whole", folder))
    assert whole == stopped and len(whole) == 5
    for name in whole:
        assert not differing(checkpoint.load(tmp_path / "whole" / name), checkpoint.load(folder / name)), name


def test_third_signal_interrupts_at_once(tmp_path: Path) -> None:
    def impatient(model: nn.Module, batch: Batch) -> Loss:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        return toy.loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path, loss=impatient)


# ---- precision and layout


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(tmp_path: Path, amp: str) -> None:
    kinds: set[torch.dtype] = set()

    def looking(model: nn.Module, batch: Batch) -> Loss:
        kinds.add(model(batch["image"]).dtype)
        return toy.loss(model, batch)

    train(config(steps=30, optim__lr=0.5, runtime__amp=amp), tmp_path, loss=looking)
    assert kinds == {torch.bfloat16 if amp == "bf16" else torch.float16}
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.95 * losses[0]
    last = checkpoint.load(tmp_path / "last.pt")
    assert all(one.dtype == torch.float32 for one in last["model"].values())
    assert bool(last["scaler"]) == (amp == "fp16")


def test_fp16_overflow_skips_the_update_and_lowers_the_scale(tmp_path: Path) -> None:
    def huge(net: toy.Net) -> None:
        calls: list[int] = []

        def hook(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * (float("inf") if len(calls) == 1 else 1)

        net.head.weight.register_hook(hook)

    train(config(steps=2, runtime__amp="fp16"), tmp_path, hook=huge)
    last = checkpoint.load(tmp_path / "last.pt")
    assert last["scaler"]["scale"] == 2.0**15
    assert all(bool(torch.isfinite(one).all()) for one in last["model"].values())


def test_channels_last(tmp_path: Path) -> None:
    def looking(model: nn.Module, batch: Batch) -> Loss:
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)
        return toy.loss(model, batch)

    train(config(steps=2, runtime__channels_last=True), tmp_path, loss=looking)


def test_batch_larger_than_the_training_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size: 64 is more than the training set holds"):
        train(config(batch=64), tmp_path)


def test_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(steps=4, micro=2), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batch of 8 = 1 process x 4 accumulated x 2 images; 4 steps, 5 an epoch"
    assert lines[1].startswith("step 2/4  epoch 0.40  loss ") and "(main " in lines[1] and " img/s " in lines[1]
    assert lines[-1].startswith("evaluated after step 4: score 0.") and "(best so far)" in lines[-1]
    assert distributed.world_size() == 1

"""What may happen to a run from outside: signals at any moment, a full disk, a read-only folder, a loader that dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine import checkpoint
from engine.checkpoint import differing
from engine.config import Length, Loaded
from engine.errors import UserError
from engine.loop import Batch, Evaluation, Loss
from engine.report import read_metrics
from engine.resume import find_resume, open_work_dir
from engine.signals import Interrupted
from tests.engine import toy
from tests.engine.toy import ToyBatches, config, train

CFG: dict[str, Any] = {
    "dropout": True,
    "report__log_every": Length(3, "steps"),
    "report__eval_every": Length(4, "steps"),
    "report__checkpoint_every": Length(5, "steps"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    train(config(steps=8, **CFG), folder)
    return folder


def story(folder: Path) -> list[tuple[object, ...]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["kind"], row["step"], row.get("loss"), row.get("score")) for row in rows]


def signal_at(count: int, wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapped`, in whose call number `count` this process gets a SIGUSR1."""
    calls = [0]

    def run(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGUSR1)
        return wrapped(*arguments)

    return run


def as_if_nothing_had_happened(whole: Path, folder: Path) -> None:
    cfg = config(steps=8, **CFG)
    train(cfg, folder, resume=find_resume(folder, "auto", cfg))
    for name in ("last.pt", "best.pt"):
        assert differing(checkpoint.load(whole / name), checkpoint.load(folder / name)) == []
    assert story(whole) == story(folder) and len(story(folder)) == 5


@pytest.mark.parametrize(("moment", "step"), [("reading", 3), ("computing", 5), ("saving", 5)])
def test_a_signal_lets_the_step_end(
    whole: Path, tmp_path: Path, moment: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = toy.loss
    if moment == "reading":
        monkeypatch.setattr(ToyBatches, "collate", signal_at(3, ToyBatches.collate))
    elif moment == "saving":  # the save before the evaluation of step 4, that of its best.pt, and step 5 follows
        monkeypatch.setattr(torch, "save", signal_at(2, torch.save))
    else:
        loss = signal_at(5, toy.loss)
    result = train(config(steps=8, **CFG), tmp_path, loss=loss)
    monkeypatch.undo()
    assert (result.signal, result.step) == (signal.SIGUSR1, step)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == step
    as_if_nothing_had_happened(whole, tmp_path)


@pytest.mark.parametrize(("call", "step"), [(2, 4), (3, 8)])
def test_a_signal_breaks_an_evaluation_off(whole: Path, tmp_path: Path, call: int, step: int) -> None:
    """The first call is that before the training, the last one that at its end."""
    with pytest.raises(
        Interrupted, match=rf"stopped by SIGUSR1 while step {step} was evaluated; the last .* \(step {step}\)"
    ):
        train(config(steps=8, **CFG), tmp_path, evaluate=signal_at(call, toy.evaluate))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == step
    as_if_nothing_had_happened(whole, tmp_path)


def test_a_signal_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="while step 0 was evaluated; no checkpoint has been written yet") as caught:
        train(config(**CFG), tmp_path, evaluate=signal_at(1, toy.evaluate))
    assert caught.value.status == 138 and not list(tmp_path.glob("*.pt"))


def test_killed_after_an_evaluation_its_row_is_there_once(whole: Path, tmp_path: Path) -> None:
    """Step 4 is saved before its evaluation; the next checkpoint is that of step 5."""

    def dies(model: nn.Module, batch: Batch) -> Loss:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("gone")
        return toy.loss(model, batch)

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="gone"):
        train(config(steps=8, **CFG), tmp_path, loss=dies)
    assert story(tmp_path)[-1][:2] == ("eval", 4)
    as_if_nothing_had_happened(whole, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of its own in memory, with mount's options; only root may."""
    mounted = []

    def make(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system needs more rights")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=256k")
    cfg = config(steps=100, report__keep_all=True, report__checkpoint_every=Length(1, "steps"))
    with pytest.raises(
        UserError, match=r"disk/\S+\.pt: cannot write: No space left on device; check the .* free space"
    ):
        train(cfg, disk)
    assert checkpoint.load(disk / "last.pt")["step"] >= 1
    assert not list(disk.glob(".*.tmp"))


def test_a_disk_too_full_for_the_log(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=256k")

    def evaluate(model: nn.Module, max_batches: int | None) -> Evaluation:
        if max_batches is None and not (disk / "other").exists():
            with suppress(OSError), open(disk / "other", "wb", buffering=0) as file:  # somebody else's
                while True:
                    file.write(bytes(4096))
        found = toy.evaluate(model, max_batches)
        return Evaluation(found.score, {f"IoU/class {number}": 0.5 for number in range(500)})

    with pytest.raises(
        UserError, match=r"disk/metrics.jsonl: cannot write: No space left on device; check the free space"
    ):
        train(config(steps=100, report__eval_every=Length(3, "steps")), disk, evaluate=evaluate)
    assert checkpoint.load(disk / "last.pt")["step"] == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its own, in its thread
def test_a_disk_too_full_for_tensorboard(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=2m")
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)

    def evaluate(model: nn.Module, max_batches: int | None) -> Evaluation:
        found = toy.evaluate(model, max_batches)
        return Evaluation(found.score, images={f"picture {number}": noise for number in range(4)})

    cfg = config(steps=20, report__eval_every=Length(2, "steps"), report__tensorboard=True)
    with pytest.raises(UserError, match="disk(/.*)?: cannot write: No space left on device; check the free space"):
        train(cfg, disk, evaluate=evaluate)
    assert checkpoint.load(disk / "last.pt")["step"] >= 2


def test_a_read_only_folder(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("ro,size=256k")
    with (
        pytest.raises(UserError, match="disk: cannot write the work directory: Read-only file system; choose another"),
        open_work_dir(disk, Loaded(config(), {}, ""), None),
    ):
        pytest.fail("opened")


FRAGILE = """
import os, signal, sys
from pathlib import Path
from torch.utils.data import DataLoader
from engine.config import Length
from engine.errors import program
from tests.engine import toy

class Fragile(toy.ToyBatches):
    def epoch(self, epoch, start=0):
        keys = [(epoch, index) for index in range(8 * start, 40)]
        yield from DataLoader(keys, batch_size=8, collate_fn=self.collate, num_workers=1)

    def sample(self, epoch, index):
        if index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(epoch, index)

@program
def main():
    toy.ToyBatches = Fragile
    toy.train(toy.config(report__checkpoint_every=Length(1, "steps")), Path(sys.argv[1]))
    return 0

sys.exit(main())
"""


def test_a_loader_that_is_killed_as_when_memory_runs_out(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FRAGILE, str(tmp_path)]  # apart: torch's handler would go on to raise in here
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 75, done.stderr
    # torch's own word for it, or that of the connection to it, whichever is noticed first
    told = r"^error: runtime.workers: a process that loads data has died \(.+\); if memory is short"
    assert re.search(told, done.stderr, re.MULTILINE) and "Traceback" not in done.stderr, done.stderr
    assert checkpoint.load(tmp_path / "last.pt")["step"] >= 1


def test_a_killed_loader_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's handler of the news may interrupt anything."""

    def save(*arguments: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        checkpoint.save(tmp_path / "a.pt", {})

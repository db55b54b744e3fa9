"""The measurement of the input's share of a training step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from classify import timing
from classify.config import ClassifyConfig
from engine.errors import UserError
from tests import programs


def test_input_and_step_are_told_apart(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each batch moves on by 1 and each step by 4 says so."""
    now = [0.0]
    monkeypatch.setattr(timing, "_now", lambda device: now[0])
    real = timing.endless

    def endless(batches):
        for batch in real(batches):
            now[0] += 1
            yield batch

    class Step:
        cycle = 1

        def __init__(self, cfg, name, images):
            assert images.shape == (10, 3, 32, 32)
            self.seconds = 4 if name == "lenet" else 40

        def __call__(self, batch):
            now[0] += self.seconds

    monkeypatch.setattr(timing, "endless", endless)
    monkeypatch.setattr(timing, "_step", Step)
    cfg = ClassifyConfig.model_validate(
        {"length": "1 epoch", "batch_size": 10, "runtime": {"device": "cpu"},
         "data": {"root": cifar_root, "check_files": False, "download": False}}
    )  # fmt: skip
    rows = timing.measure(cfg, ["lenet", "vgg11"], rounds=3, steps=4)
    assert rows == [timing.Row("lenet", 4, 1), timing.Row("vgg11", 40, 1)]
    assert [row.share for row in rows] == [0.25, 0.025]


def test_a_step_trains(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = ClassifyConfig.model_validate(
        {"length": "1 epoch", "batch_size": 10, "model": {"name": "lenet"}, "runtime": {"device": "cpu"},
         "optim": {"lr": 0.1}, "data": {"root": cifar_root, "check_files": False, "download": False, "mixup": 0.2}}
    )  # fmt: skip
    batches = timing.endless(timing.data.train_batches(cfg, torch.device("cpu")))
    batch = next(batches)
    built = []
    real = timing.prepare
    monkeypatch.setattr(timing, "prepare", lambda model, *a, **k: built.append(model) or real(model, *a, **k))
    step = timing._step(cfg, "lenet", batch["image"])
    before = [parameter.detach().clone() for parameter in built[0].parameters()]
    step(batch)
    assert all(not torch.equal(a, b) for a, b in zip(before, built[0].parameters(), strict=True))
    assert len([next(batches) for _ in range(25)]) == 25, "epochs follow each other"
    with pytest.raises(UserError, match="nonet"):
        timing._step(cfg, "nonet", batch["image"])


def test_a_rate_of_the_classifiers_own_is_no_mistake() -> None:
    """A training takes it, so that the program must."""
    cfg = ClassifyConfig.model_validate(
        {"length": "1 epoch", "batch_size": 2, "runtime": {"device": "cpu"}, "optim": {"head_lr_factor": 10}}
    )
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([0, 1]), "name": ["a", "b"]}
    timing._step(cfg, "lenet", batch["image"])(batch)


def test_the_program_prints_a_row_for_each_network(cifar_root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        f"task: classify\nlength: 1 epoch\nbatch_size: 10\nmodel: {{name: lenet}}\nruntime: {{device: cpu}}\n"
        f"data: {{root: {cifar_root}, check_files: false, download: false}}\n"
    )
    networks = "--networks", "lenet", "mlp", "--rounds", "1"
    done = programs.run("benchmark_input", tmp_path / "x.yaml", "batch_size=20", *networks)
    assert done.returncode == 0, done.stderr
    head, *rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    assert head == ["network", "step ms", "input ms", "share"] and [row[0] for row in rows] == ["lenet", "mlp"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and row[3].endswith("%") for row in rows)

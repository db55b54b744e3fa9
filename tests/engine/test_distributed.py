from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine import distributed
from engine.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun() -> None:
    assert distributed.setup("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert not distributed.is_joined()
    tensor = torch.tensor([1.0, 2.0])
    total = distributed.all_reduce_sum(tensor)
    assert torch.equal(total, tensor) and total.data_ptr() != tensor.data_ptr()
    assert distributed.gather("a") == ["a"]
    distributed.broadcast_buffers(nn.BatchNorm2d(2))
    distributed.barrier()
    distributed.cleanup()


def test_addresses_alone_do_not_mean_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert distributed.setup("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"WORLD_SIZE": "2"},
            r"sets WORLD_SIZE but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start .* with torchrun",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "but not LOCAL_RANK"),
        (dict.fromkeys(NAMES, "1") | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a whole number"),
        (dict.fromkeys(NAMES, "1") | {"RANK": "4", "WORLD_SIZE": "4"}, "says RANK=4 of WORLD_SIZE=4 processes"),
    ],
)
def test_broken_environment(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        distributed.setup("cpu")
    assert not distributed.is_joined()


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("1", "2", "1", "127.0.0.1", "9"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"could not join the other processes at 127.0.0.1:9: "):
        distributed.setup("cpu", timeout_minutes=0.02)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.setup("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="runtime.device: cuda was asked for, but torch sees no GPU; use auto or cpu"):
        distributed.setup("cuda")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in zip(NAMES, ("1", "2", "1", "127.0.0.1", "9"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"process 1 of this machine has no GPU: torch sees 1; start at most that many"):
        distributed.setup("auto")


def test_two_processes(two: Path) -> None:
    assert (two / "collectives_0").exists() and (two / "collectives_1").exists()

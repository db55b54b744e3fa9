"""All that the tests need two processes for, done in one start of them, since a start takes seconds."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import checkpoint, distributed
from engine.config import Length
from engine.errors import UserError
from engine.loop import Batch, Loss
from engine.prepare import prepare
from engine.probe import make_plan
from tests.engine import synced, toy
from tests.engine.toy import config, small, train


def everything(folder: Path) -> None:
    """For the tests of distributed.py, prepare.py, plan.py and loop.py."""
    collectives(folder)
    wrapped(folder)
    planned(folder)
    training(folder)
    synced.everything(folder)


def collectives(folder: Path) -> None:
    rank = distributed.rank()
    assert (distributed.world_size(), distributed.is_main()) == (2, rank == 0)
    tensor = torch.tensor([rank + 1, 10], dtype=torch.int64)
    assert distributed.all_reduce_sum(tensor).tolist() == [3, 20]
    assert tensor.tolist() == [rank + 1, 10]
    assert distributed.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 5)  # type: ignore[union-attr]
    distributed.broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [5, 5]  # type: ignore[union-attr]
    distributed.barrier()
    (folder / f"collectives_{rank}").touch()


def wrapped(folder: Path) -> None:
    net = small()
    names = list(net.state_dict())
    prepared = prepare(net, config(norm__name="gn"))
    assert isinstance(prepared.wrapped, nn.parallel.DistributedDataParallel)
    assert prepared.raw is net and set(net.state_dict()) <= set(names)
    unused(small())
    try:
        prepare(small(), config(norm__name="sync_bn"))
    except UserError as error:
        (folder / "sync_bn.txt").write_text(str(error))
    (folder / f"wrapped_{distributed.rank()}").touch()


def planned(folder: Path) -> None:
    """One process has no time left and the other one has."""
    from tests.engine.test_plan import workload

    work = workload(config(batch=16), side=16)
    found = make_plan(work, 2**40, seconds=0 if distributed.rank() else 600)
    (folder / f"planned_{distributed.rank()}.txt").write_text(f"{found.process} {found.parts} {found.curves}")


def unused(net: nn.Sequential) -> None:
    """Without being told of parameters that no output depends on, DistributedDataParallel fails in the second step."""
    blank = torch.zeros(2, 3, 16, 16)
    assert not prepare(net, config(), blank=blank).wrapped.find_unused_parameters
    partly = nn.Sequential(*net)
    partly.register_module("spare", nn.Conv2d(3, 8, 3))
    partly.forward = nn.Sequential(*net).forward  # type: ignore[method-assign]
    before = {name: one.clone() for name, one in partly.state_dict().items()}
    prepared = prepare(partly, config(), blank=blank)
    assert "leaves 2 parameters unused, such as spare.weight" in prepared.report
    assert all(torch.equal(before[name], one) for name, one in partly.state_dict().items())
    for _ in range(3):
        prepared.wrapped(torch.randn(2, 3, 16, 16)).sum().backward()
    refused = prepare(small(), config(), blank=torch.zeros(2, 4, 16, 16))
    assert refused.wrapped.find_unused_parameters and "takes no blank image" in refused.report


def training(folder: Path) -> None:
    more: dict[str, Any] = {"dtype": "float64", "optim__clip_norm": 0.05}
    train(config(**more), folder / "2x4")
    train(config(micro=2, **more), folder / "2x2x2")
    train(config(optim__backbone_lr_factor=0.0, **more), folder / "frozen")
    exact: dict[str, Any] = {"dropout": True, "report__checkpoint_every": Length(3, "steps"), "report__keep_all": True}
    train(config(steps=8, **exact), folder / "whole")
    state = checkpoint.load(folder / "whole" / "step-00000003.pt")
    train(config(steps=8, **exact), folder / "resumed", resume=state)
    try:
        train(config(bad=(20,), report__checkpoint_every=Length(1, "steps")), folder / "nan")
    except UserError as error:
        (folder / f"nan_{os.environ['RANK']}.txt").write_text(str(error))

    def signal_one(model: nn.Module, batch: Batch) -> Loss:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.loss(model, batch)

    calls: list[int] = []
    result = train(config(), folder / "stopped", loss=signal_one)
    (folder / f"stopped_{os.environ['RANK']}.txt").write_text(f"{result.stopped} {result.step}")

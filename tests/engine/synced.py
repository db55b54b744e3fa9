"""Trainings with norm.sync for `two_processes`, and the same in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import distributed
from engine.config import Length
from engine.prepare import prepare
from engine.traffic import Counting, step
from tests.engine.toy import CLASSES, config, train

RUNS: dict[str, dict[str, Any]] = {
    "deconv": {"norm__name": "deconv"},
    "deconv from few rows": {"norm__name": "deconv", "norm__max_rows": 60, "norm__block": 3},
    "deconv_fast": {"norm__name": "deconv_fast", "norm__every": 2, "norm__rank": 5, "norm__fresh_steps": 1},
    "checkpointing": {"norm__name": "deconv", "runtime__checkpointing": True},
    "checkpointing, fast": {
        "norm__name": "deconv_fast",
        "norm__rank": 5,
        "norm__fresh_steps": 3,
        "runtime__checkpointing": True,
    },
    "accumulation": {"norm__name": "deconv", "accumulation": 2},
}
STEPS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x).relu()).relu()
        return nn.functional.interpolate(y, scale_factor=2.0)


def deepen(net: nn.Module) -> None:
    """Blocks whose activations can be computed again."""
    torch.manual_seed(5)
    dtype = next(net.parameters()).dtype
    net.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), Block(), Block()).to(dtype)
    net.head = nn.Conv2d(6, CLASSES, 1).to(dtype)


def run(folder: Path, name: str, dtype: str, **more: Any) -> None:
    """Images have unequal numbers of ignored pixels, see `toy.ToyBatches`."""
    options = {"norm__sync": True, "dtype": dtype, "optim__lr": 0.02, **RUNS[name], **more}
    micro = 8 // distributed.world_size() // options.pop("accumulation", 1)
    cfg = config(
        steps=STEPS, micro=micro, report__checkpoint_every=Length(1, "steps"), report__keep_all=True, **options
    )
    train(cfg, folder / f"{name} {dtype}", hook=deepen, evaluate=None)


def everything(folder: Path) -> None:
    for name in RUNS:
        run(folder, name, "float64")
    for name in ("deconv", "deconv_fast"):
        run(folder, name, "float32")
    run(folder / "apart", "deconv", "float64", norm__sync=False)
    traffic(folder)


def traffic(folder: Path) -> None:
    """What is sent in four steps, against what was said."""
    lines = []
    for name, sync in (("deconv", True), ("deconv_fast", True), ("deconv", False), ("bn", False)):
        options: dict[str, Any] = {"norm__sync": True} if sync else {}
        if name != "bn":
            options["norm__stem_freeze"] = False
        if name == "deconv_fast":
            options["norm__fresh_steps"] = 0  # what is said is of the steps that follow
        cfg = config(norm__name=name, **options)
        net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3))
        prepared = prepare(net, cfg)
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        for _ in range(4):  # the first steps are not like the others: buckets are made anew
            prepared.wrapped(x).sum().backward()
        with Counting() as counting:
            for _ in range(4):
                prepared.wrapped(x).sum().backward()
        said = step(prepared.raw, cfg, 2)
        total = said.gradients + said.buffers + said.statistics
        lines.append(f"{counting.size / 4} {total}\n{prepared.report.splitlines()[-1]}")
    (folder / f"traffic_{distributed.rank()}.txt").write_text("\n".join(lines))

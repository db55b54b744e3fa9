"""A tiny experiment for the tests of the loop; runs in one process or several."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from engine import checkpoint, distributed
from engine.config import ExperimentConfig, Length, NormConfig, OptimConfig, ReportConfig, RuntimeConfig
from engine.loop import Batch, Evaluation, Loss, Result, fit
from engine.optim import parameter_groups
from engine.prepare import prepare, session
from engine.report import Log

IMAGES = 40
CLASSES = 3


class ToyConfig(ExperimentConfig):
    task: Literal["toy"] = "toy"
    dtype: Literal["float32", "float64"] = "float32"
    dropout: bool = False
    bad: tuple[int, ...] = ()
    """Images that hold a NaN."""
    void: bool = False
    """No image holds a valid pixel."""


def config(steps: int = 10, batch: int = 8, micro: int | None = None, **more: Any) -> ToyConfig:
    """Keys with a dot (as optim__lr) go into the sections."""
    sections: dict[str, dict[str, Any]] = {"optim": {}, "norm": {}, "runtime": {"workers": 0}, "report": {}}
    plain = {}
    for key, value in more.items():
        section, _, name = key.partition("__")
        if name:
            sections[section][name] = value
        else:
            plain[key] = value
    report = {"tensorboard": False, "log_every": Length(2, "steps"), **sections["report"]}
    return ToyConfig(
        length=Length(steps, "steps"),
        batch_size=batch,
        micro_batch=micro,
        optim=OptimConfig(**{"lr": 0.1, **sections["optim"]}),
        norm=NormConfig(**sections["norm"]),
        runtime=RuntimeConfig(device="cpu", **sections["runtime"]),
        report=ReportConfig(**report),
        **plain,
    )


class Net(nn.Module):
    """`backbone` has a batch norm only with dropout: without both, a step does not depend on how a batch is split."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        extra = [nn.BatchNorm2d(6), nn.Dropout(0.3)] if dropout else []
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *extra, nn.ReLU())
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.backbone(image))  # type: ignore[no-any-return]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


class ToyBatches:
    """Images are a function of (epoch, index) alone; image i has 2 * (i % 5) of its 8 rows ignored."""

    def __init__(self, cfg: ToyConfig) -> None:
        self.cfg, self.world, self.rank = cfg, distributed.world_size(), distributed.rank()
        self.split = cfg.split(self.world)
        self.read: list[int] = []

    def __len__(self) -> int:
        return IMAGES // self.cfg.batch_size * self.split.accumulation

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch)).tolist()
        micro, whole = self.split.micro_batch, IMAGES // self.cfg.batch_size * self.cfg.batch_size
        chunks = [order[i : i + micro] for i in range(self.rank * micro, whole, self.world * micro)]
        loader = DataLoader(
            [(epoch, index) for chunk in chunks[start:] for index in chunk], batch_size=micro, collate_fn=self.collate
        )
        yield from loader

    def collate(self, keys: list[tuple[int, int]]) -> Batch:
        samples = [self.sample(epoch, index) for epoch, index in keys]
        self.read += [index for _, index in keys]
        return {
            "image": torch.stack([image for image, _ in samples]),
            "target": torch.stack([target for _, target in samples]),
            "name": [f"image_{index:02}.png" for _, index in keys],
        }

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        image = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64).to(getattr(torch, self.cfg.dtype))
        target = torch.bucketize(image.sum(0), torch.tensor([-0.7, 0.7]))
        target[: 8 if self.cfg.void else 2 * (index % 5)] = 255
        if index in self.cfg.bad:
            image[0, 0, 0] = float("nan")
        return image, target


def loss(model: nn.Module, batch: Batch) -> Loss:
    logits = model(batch["image"]).to(batch["image"].dtype)
    value = F.cross_entropy(logits, batch["target"], ignore_index=255, reduction="sum")
    return Loss(value, (batch["target"] != 255).sum(), {"main": value, "twice": 2 * value})


def evaluate(model: nn.Module, max_batches: int | None) -> Evaluation:
    """The score is a function of all weights and buffers; random numbers are drawn, as a loader may do."""
    torch.rand(3)
    total = sum(float(one.double().abs().sum()) for one in model.state_dict().values())
    return Evaluation(score=total % 1, scalars={"IoU/road": 0.5, "IoU/sky": float("nan")}, text="")


class LogWithoutCurves(Log):
    def curves(self) -> None:
        pass


def train(
    cfg: ToyConfig,
    work_dir: Path,
    *,
    loss: Any = loss,
    evaluate: Any = evaluate,
    resume: Any = None,
    hook: Any = None,
    curves: bool = False,
) -> Result:
    """`hook` gets the network before it is prepared; `curves` draws them, which takes longer than to train."""
    with session(cfg.runtime):
        net = Net(cfg.dropout).to(getattr(torch, cfg.dtype))
        if hook:
            hook(net)
        groups = partial(parameter_groups, cfg=cfg.optim, is_backbone=lambda name: name.startswith("backbone."))
        prepared = prepare(net, cfg, groups=groups)
        log = (Log if curves else LogWithoutCurves)(work_dir, cfg.report, resume=resume)
        return fit(
            prepared,
            cfg,
            ToyBatches(cfg),
            loss=loss,
            evaluate=evaluate,
            groups=prepared.groups,
            log=log,
            work_dir=work_dir,
            resume=resume,
            meta={"classes": ["a", "b", "c"]},
        )


def weights(work_dir: Path, name: str = "last.pt") -> dict[str, Tensor]:
    return checkpoint.load(work_dir / name)["model"]  # type: ignore[no-any-return]


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def learn(cfg: ToyConfig, work_dir: Path) -> dict[str, Tensor]:
    train(cfg, work_dir)
    return weights(work_dir)

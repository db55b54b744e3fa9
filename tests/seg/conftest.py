"""What several tests of segmentation use."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from engine import checkpoint
from seg.config import SegConfig


@pytest.fixture(autouse=True)
def _quick(no_curves: None) -> None:
    """For every test, but not for what tests of a module share."""


@pytest.fixture(scope="session")
def referee() -> ModuleType:
    """The official scorer; it reads the environment when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("CITYSCAPES_")]:
            patch.delenv(name)
        return importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


@pytest.fixture(scope="session")
def report_config(sample_root: Path) -> Callable[..., SegConfig]:
    """Makes the config of a small network on the sample data; arguments change the data section."""

    def make(**data: Any) -> SegConfig:
        return SegConfig.model_validate(
            {
                "length": "1 epochs",
                "batch_size": 1,
                "data": {"root": sample_root, "crop": (64, 64), **data},
                "model": {"name": "lraspp_mobilenet_v3_large", "output_stride": 16},
                "runtime": {"workers": 0, "device": "cpu", "threads": 1},
            }
        )

    return make


@pytest.fixture(scope="session")
def void_root(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> Path:
    """The sample data, but every pixel of the split val is 'unlabeled'; to be read only."""
    root = tmp_path_factory.mktemp("void") / "cityscapes"
    shutil.copytree(sample_root, root)
    for path in (root / "gtFine" / "val").glob("*/*Ids.png"):
        with Image.open(path) as label:
            size = label.size
        Image.new("L", size, 0).save(path)
    return root


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory, report_config: Callable[..., SegConfig]) -> Path:
    """best.pt of a network that was not trained but knows its statistics, so that its predictions differ from place to
    place; to be read only."""
    from seg.data import Cityscapes, normalize, read_rgb
    from seg.fuzz.ground import untrained_state

    cfg = report_config()
    samples = Cityscapes(cfg.data.root, "train").samples
    state = untrained_state(cfg, torch.stack([normalize(read_rgb(sample.image), cfg.data) for sample in samples]))
    path = tmp_path_factory.mktemp("run") / "best.pt"
    checkpoint.save(path, state)
    return path

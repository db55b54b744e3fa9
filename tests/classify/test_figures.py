"""Pictures of deconvolution from a trained classifier's checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import engine.figures
from classify import figures, train
from classify.config import ClassifyConfig
from engine.config import from_dict
from engine.errors import UserError
from tools import figures as tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cifar_root: Path) -> Path:
    """Holds the work directories deconv/ and bn/."""
    found = tmp_path_factory.mktemp("runs")
    for norm in ("deconv", "bn"):
        plain = {
            "task": "classify",
            "length": "1 epoch",
            "batch_size": 20,
            "data": {"name": "cifar10", "root": str(cifar_root), "check_files": False, "download": False},
            "model": {"name": "vgg11", "options": {"width": 0.125}},
            "norm": {"name": norm},
            "runtime": {"workers": 0, "device": "cpu", "threads": 1},
            "report": {"tensorboard": False},
        }
        train.run(from_dict(plain, [], ClassifyConfig, "test"), found / norm)
    return found


def test_both_pictures_are_drawn(folder: Path, tmp_path: Path):
    paths = figures.draw(folder / "deconv/best.pt", tmp_path / "new")
    assert [path.name for path in paths] == ["kernels.png", "whitening.png"]
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size)
    assert min(min(size) for size in sizes) > 500


def test_the_program_draws_another_layer(folder: Path, tmp_path: Path, monkeypatch, capsys):
    command = [
        str(folder / "deconv/best.pt"),
        "--out",
        str(tmp_path),
        "--layer",
        "features.0",
        "data.eval_batch_size=8",
    ]
    monkeypatch.setattr(sys, "argv", ["figures.py", *command])
    monkeypatch.setattr(
        engine.figures, "draw_whitening", lambda layer, name, x, path, note: shown.extend([name, x, note])
    )
    shown: list[Any] = []
    assert tool.main() == 0
    assert shown[0] == "features.0" and shown[1].shape == (8, 3, 32, 32) and shown[2] == "8 images of cifar10"
    assert capsys.readouterr().out.splitlines()[0] == f"drawn in {tmp_path / 'kernels.png'}"


def test_mistakes(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="bn/best.pt: the network has no deconvolution layer"):
        figures.draw(folder / "bn/best.pt", tmp_path)
    with pytest.raises(UserError, match="no deconvolution layer 'head'; there are: features.0, features.4"):
        figures.draw(folder / "deconv/best.pt", tmp_path, "head")
    with pytest.raises(UserError, match="/nowhere"):
        figures.draw(folder / "deconv/best.pt", tmp_path, None, ["data.root=/nowhere"])
    assert not list(tmp_path.iterdir())

"""Runs of segmentation side by side: where their predictions are computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from engine.errors import UserError
from seg import compare as module
from seg.compare import compare
from seg.predict import Predictor


@pytest.fixture
def run(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A run with one evaluation."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(small_checkpoint, folder / "best.pt")
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": 7, "loss": 1.0, "parts": {}, "images_per_second": 1.0},
        {"kind": "eval", "step": 7, "epoch": 1.0, "score": 0.25, "scalars": {"mIoU": 0.25, "IoU/road": 0.25}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_predictions_are_made_on_the_device_that_is_asked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def made(*given: Any) -> Predictor:
        devices.append(given[2])
        return from_config(*given)

    from_config = Predictor.from_config
    monkeypatch.setattr(module.Predictor, "from_config", made)
    text = compare([run], ["one"], tmp_path / "c.png", 1, ["runtime.device=cpu"])
    assert text.splitlines()[1].split() == ["one", "25.00%", "7"] and devices == [torch.device("cpu")]
    assert cv2.imread(str(tmp_path / "c.png")) is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="runtime.device: cuda was asked for, but torch sees no GPU; use auto or cpu"):
        compare([run], ["one"], tmp_path / "c.png", 1, ["runtime.device=cuda"])

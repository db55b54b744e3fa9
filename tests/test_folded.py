"""Programs that predict have plain layers in place of the norm's, which would compute W D anew for every image."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import norm
from classify import evaluate as classify_evaluate
from classify import network
from classify.config import ClassifyConfig
from classify.data import DataInfo
from engine import checkpoint
from engine.config import ExperimentConfig
from engine.prepare import convert_norm
from norm.state import Whitening
from seg import evaluate, models
from seg.card_page import write_card
from seg.config import SegConfig
from seg.errors_page import write_errors
from seg.labels import TRAIN_CLASSES
from seg.submission import submit

TOOL = Path(__file__).parents[1] / "tools/predict.py"


def predict_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predict_tool", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def saved(folder: Path, task: str, cfg: ExperimentConfig, meta: dict[str, Any], model: nn.Module) -> Path:
    state: dict[str, Any] = dict.fromkeys(checkpoint.KEYS)
    state |= {"format": checkpoint.FORMAT, "task": task, "config": cfg.model_dump(mode="json"), "step": 7}
    checkpoint.save(folder / "best.pt", state | {"meta": meta, "model": model.state_dict()})
    return folder / "best.pt"


@pytest.fixture(scope="module")
def deconvolved(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> Path:
    cfg = SegConfig.model_validate(
        {
            "length": "1 epochs",
            "batch_size": 1,
            "data": {"root": sample_root, "crop": (64, 64)},
            "model": {"name": "lraspp_mobilenet_v3_large", "output_stride": 16},
            "norm": {"name": "deconv", "keep_depthwise": True},
            "runtime": {"workers": 0, "device": "cpu", "threads": 1},
        }
    )
    model = models.build(cfg.model)
    convert_norm(model, cfg.norm)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 64))  # so that statistics are not those of a fresh layer
    return saved(tmp_path_factory.mktemp("run"), "seg", cfg, {"classes": list(TRAIN_CLASSES)}, model)


@pytest.fixture
def unfolded_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> None:
        raise AssertionError("a whitening layer was run")

    for kind in (norm.FastDeconv, norm.Delinear, norm.ChannelDeconv):
        monkeypatch.setattr(kind, "forward", forward)


def test_the_folded_network_of_a_checkpoint_computes_the_same(deconvolved: Path):
    (plain, _, _), (trained, _, _) = (models.from_checkpoint(deconvolved, folded=one) for one in (True, False))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        want = trained(x)["out"]
        assert (plain(x)["out"] - want).abs().max() < 1e-3 * want.abs().max()
    assert any(isinstance(one, Whitening) for one in trained.modules())
    assert not plain.training and not any(isinstance(one, Whitening) for one in plain.modules())


@pytest.mark.usefixtures("unfolded_fails")
@pytest.mark.parametrize(
    "work",
    [
        lambda path, out: evaluate.evaluate_checkpoint(path),
        lambda path, out: write_card(path, out=out),
        lambda path, out: write_errors(path, out / "errors.html"),
        lambda path, out: submit(path, out / "labels.zip"),
    ],
    ids=["evaluate", "card", "errors", "submit"],
)
def test_a_split_is_predicted_by_plain_layers(deconvolved: Path, tmp_path: Path, work: Callable[[Path, Path], Any]):
    work(deconvolved, tmp_path)


@pytest.mark.usefixtures("unfolded_fails")
def test_a_users_images_are_too(deconvolved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr("sys.argv", ["predict.py", str(deconvolved), str(tmp_path / "a.png"), "--out", str(tmp_path)])
    assert predict_tool().main() == 0
    assert len(list((tmp_path / "labels").iterdir())) == 1


def test_a_checkpoint_whose_statistics_overflowed_is_told_by_name(deconvolved: Path, tmp_path: Path):
    content = checkpoint.load(deconvolved)
    name = next(key for key in content["model"] if key.endswith("running_deconv"))
    content["model"][name].fill_(float("inf"))
    path = tmp_path / "best.pt"
    checkpoint.save(path, content)
    with pytest.raises(Exception, match=r"best\.pt: the network cannot be folded: .*not finite"):
        evaluate.evaluate_checkpoint(path)


@pytest.mark.usefixtures("unfolded_fails")
def test_classifiers_are_folded_too(tmp_path: Path, cifar_root: Path, monkeypatch: pytest.MonkeyPatch):
    cfg = ClassifyConfig.model_validate(
        {
            "task": "classify",
            "length": "1 epochs",
            "batch_size": 4,
            "data": {"name": "cifar10", "root": cifar_root, "check_files": False},
            "model": {"name": "lenet"},
            "norm": {"name": "deconv", "fc_block": 16},
            "runtime": {"workers": 0, "device": "cpu", "threads": 1},
        }
    )
    info = DataInfo(tuple(map(str, range(10))), 3, 32, (0.5,) * 3, (0.5,) * 3)
    model, _ = network.build(cfg.model, info)
    convert_norm(model, cfg.norm)
    path = saved(tmp_path, "classify", cfg, network.facts(info), model)
    monkeypatch.setattr(classify_evaluate, "check_classes", lambda *_: None)  # of names that this test made up
    assert classify_evaluate.evaluate_checkpoint(path) is not None
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr("sys.argv", ["predict.py", str(path), str(tmp_path / "a.png")])
    assert predict_tool().main() == 0

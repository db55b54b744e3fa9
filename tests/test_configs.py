"""Every config in the repository loads, and its network builds and converts."""

from pathlib import Path

import pytest
import torch

from engine.config import load, show
from engine.prepare import convert_norm
from seg import losses, models
from seg.config import SegConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs/seg").rglob("*.yaml"))
EXPERIMENTS = [path for path in CONFIGS if path.parent.name != "base"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_builds_and_converts(path):
    loaded = load(path, [], SegConfig)
    cfg = loaded.config
    with torch.device("meta"):
        model = models.build(cfg.model, pretrained=False)
        convert_norm(model, cfg.norm)
    losses.build(cfg)
    assert f"name: {cfg.model.name}" in show(loaded)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_head_says_what_how_and_what_to_expect(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert f"python tools/train.py configs/seg/{path.name}" in text
    assert "not measured" in text or "mIoU" in text


def test_the_named_networks_have_both_norms_in_both_recipes():
    stems = {path.stem for path in EXPERIMENTS}
    for network in ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50", "fcn_resnet101"):
        for norm in ("bn", "deconv"):
            assert {f"{network}_{norm}", f"{network}_40k_{norm}", f"{network}_80k_{norm}"} <= stems


def test_published_recipe():
    cfg = load(ROOT / "configs/seg/deeplabv3_resnet50_deconv.yaml", [], SegConfig).config
    assert (str(cfg.length), cfg.batch_size, cfg.optim.lr, cfg.optim.weight_decay) == ("30 epochs", 8, 0.1, 1e-4)
    assert (cfg.data.base_size, cfg.data.crop, cfg.data.scale) == (520, (480, 480), (0.5, 2.0))
    assert (cfg.optim.schedule, cfg.optim.power, cfg.norm.name) == ("poly", 0.9, "deconv")


def test_strong_recipe():
    cfg = load(ROOT / "configs/seg/fcn_resnet101_80k_bn.yaml", [], SegConfig).config
    assert (str(cfg.length), cfg.batch_size, cfg.optim.lr, cfg.optim.weight_decay) == ("80000 steps", 8, 0.01, 5e-4)
    assert cfg.data.crop == (512, 1024) and cfg.model.aux and cfg.model.backbone_weights == "torchvision"

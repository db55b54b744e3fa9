"""The Python that tools/export.py prints makes a network that takes the weights and computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

import classify.models
import norm
import seg.config
import seg.models
from classify import network
from classify.data import DataInfo
from engine.config import NormConfig
from engine.export import export, rebuilding
from engine.prepare import convert_norm

NAMES = {
    "torch": torch,
    "torchvision": torchvision,
    "segmentation_models_pytorch": segmentation_models_pytorch,
    "norm": norm,
    "seg": seg,
    "classify": classify,
}
KEEP = {"backbone.*|network.encoder.*": {"recipe": "keep"}}


def rebuild(model: nn.Module, call: str, section: NormConfig, path: Path, part: str = "") -> nn.Module:
    """What the line that is printed makes, with the weights; the network is trained a little before."""
    images = torch.randn(2, 3, 64, 64)
    convert_norm(model, section, [torch.zeros(2, 3, 64, 64)] if section.calibrate_batches else None)
    for _ in range(2):
        model(images)
    rebuilt = rebuilding(call, section, images, part)
    done = export(model.eval(), path, (64, 64), nn.Module.__call__, (), (), {}, part=part, rebuilt=rebuilt)
    names: dict[str, Any] = dict(NAMES)
    exec(str(done).splitlines()[1].strip(), names)
    names["network"].load_state_dict(load_file(path))
    found: nn.Module = names["network"].eval()
    return found


def logits(found: Any) -> Tensor:
    return found["out"] if isinstance(found, dict) else found


@pytest.mark.parametrize(
    "model, section",
    [
        ({"name": "smp/unet/resnet18"}, {"name": "deconv", "overrides": KEEP, "block": 32}),
        ({"name": "smp/deeplabv3plus/resnet18", "output_stride": 8}, {"name": "bn"}),
        ({"name": "smp/unet/resnet18", "options": {"decoder_channels": [64, 32, 16, 16, 8]}}, {"name": "gn"}),
        (
            {"name": "smp/unet/densenet121"},
            {"name": "deconv", "calibrate_batches": 1, "keep_depthwise": True, "block": 16},
        ),
        ({"name": "deeplabv3_resnet50", "output_stride": 16}, {"name": "deconv_fast", "overrides": KEEP}),
        ({"name": "fcn_resnet50", "output_stride": 8}, {"name": "bn", "eps": 0.1}),
        ({"name": "lraspp_mobilenet_v3_large", "output_stride": 16}, {"name": "bn"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fewer than half as many")
def test_a_segmentation_network(model: dict[str, Any], section: dict[str, Any], tmp_path: Path):
    cfg = seg.config.ModelConfig.model_validate(
        {"aux": False, "backbone_weights": None, "output_stride": None, **model}
    )
    torch.manual_seed(0)
    trained = seg.models.build(cfg, 5, pretrained=False)
    part = "network" if cfg.name.startswith("smp/") else ""
    line = seg.models.call(cfg, 5)
    found = rebuild(trained, line, NormConfig.model_validate(section), tmp_path / "x.safetensors", part)
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(logits(found(x)), logits(trained(x)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "model, section",
    [
        (
            {"name": "preact_resnet18", "options": {"width": 0.25}},
            {"name": "deconv", "calibrate_batches": 1, "fc_block": 64},
        ),
        ({"name": "torchvision/resnet18"}, {"name": "bn", "eps": 0.1}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fewer than half as many")
def test_a_classifier(model: dict[str, Any], section: dict[str, Any], tmp_path: Path):
    info = DataInfo(("a", "b", "c"), 3, 64, (0.5,) * 3, (0.5,) * 3)
    cfg = network.ModelConfig.model_validate(model)
    torch.manual_seed(0)
    trained, _ = network.build(cfg, info, pretrained=False)
    line = network.call(cfg, info)
    found = rebuild(trained, line, NormConfig.model_validate(section), tmp_path / "x.safetensors")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(found(x), trained(x), rtol=1e-3, atol=1e-4)

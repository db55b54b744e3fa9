"""Networks by name, with plain convolutions and batch norm; `norm.convert` changes the norm afterwards.

A network maps images (N, 3, H, W) to {"out": logits (N, classes, H, W)}, in training with "aux" beside it if it has the
auxiliary head. To add one, write a function of (ModelConfig, classes) and enter it in `_BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.config import from_dict
from engine.errors import UserError
from engine.prepare import convert_norm
from seg.config import ModelConfig, SegConfig
from seg.labels import TRAIN_CLASSES

Builder = Callable[[ModelConfig, int], nn.Module]
_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
"""Atrous rates of DeepLabV3's head by output stride (Chen et al., arXiv 1706.05587, section 4)."""


def available() -> list[str]:
    """Names that `build` knows, sorted."""
    return sorted(_BUILDERS)


def build(cfg: ModelConfig, classes: int = len(TRAIN_CLASSES), *, pretrained: bool = True) -> nn.Module:
    """The network that `cfg` names.

    Args:
        cfg: name, backbone weights, output stride, auxiliary head.
        classes: number of classes that are predicted.
        pretrained: load `cfg.backbone_weights`; False when a checkpoint will fill all weights anyway.

    Raises:
        UserError: an unknown name, an output stride or head that the network cannot have, or backbone weights that are
            missing, of another network, or cannot be downloaded.
    """
    if cfg.name not in _BUILDERS:
        raise UserError(f"model.name: unknown network {cfg.name!r}; known: {', '.join(available())}")
    model = _BUILDERS[cfg.name](cfg, classes)
    if pretrained and cfg.backbone_weights is not None:
        _load_backbone(model, cfg)
    return model


def is_backbone(parameter: str) -> bool:
    """Whether a parameter's name belongs to the backbone (for its own learning rate)."""
    return parameter.startswith("backbone.")


def blank_images() -> list[Tensor]:
    """Images to calibrate a network with whose weights and statistics a checkpoint replaces afterwards."""
    return [torch.zeros(2, 3, 64, 64)]


def from_checkpoint(
    path: Path | str, overrides: Sequence[str] = (), *, allow_imports: bool = False
) -> tuple[nn.Module, SegConfig, dict[str, Any]]:
    """The trained network (its average, where one was kept) in evaluation mode, its config, and what is stored with it.

    The auxiliary head is left out: it only serves training.

    Args:
        path: a file that tools/train.py wrote.
        overrides: `key=value` changes to the stored config.
        allow_imports: import the modules that the stored config names (they run code).

    Raises:
        UserError: no such file, damaged, of another task, or weights that do not fit the config.
    """
    content = checkpoint.load(path)
    if content["task"] != "seg":
        raise UserError(f"{path}: a checkpoint of the task {content['task']!r}, expected one of 'seg'")
    cfg = from_dict(content["config"], overrides, SegConfig, str(path), allow_imports).config
    classes = list(content["meta"].get("classes", TRAIN_CLASSES))
    if classes != list(TRAIN_CLASSES):
        raise UserError(
            f"{path}: predicts {len(classes)} classes ({', '.join(classes[:3])}, ...), this version scores the "
            f"{len(TRAIN_CLASSES)} of Cityscapes"
        )
    model = build(cfg.model, pretrained=False)
    convert_norm(model, cfg.norm, blank_images() if cfg.norm.calibrate_batches else None)
    weights = content["model"] if content["ema"] is None else content["ema"]
    checkpoint.load_weights(model, weights, path)
    if cfg.model.aux:
        model.aux_classifier = None  # type: ignore[assignment]
    return model.eval(), cfg, dict(content["meta"])


def _resnet(depth: str, head: str) -> Builder:
    def make(cfg: ModelConfig, classes: int) -> nn.Module:
        from torchvision.models import get_model
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation import FCN, DeepLabV3
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.models.segmentation.fcn import FCNHead

        stride = cfg.output_stride
        dilate = [False, stride <= 16, stride == 8]
        resnet = get_model(depth, weights=None, replace_stride_with_dilation=dilate)
        layers = {"layer4": "out", "layer3": "aux"} if cfg.aux else {"layer4": "out"}
        backbone = IntermediateLayerGetter(resnet, layers)
        aux = FCNHead(1024, classes) if cfg.aux else None
        if head == "fcn":
            return FCN(backbone, FCNHead(2048, classes), aux)
        return DeepLabV3(backbone, DeepLabHead(2048, classes, _RATES[stride]), aux)

    return make


def _mobilenet(name: str, aux_head: bool) -> Builder:
    def make(cfg: ModelConfig, classes: int) -> nn.Module:
        from torchvision.models import get_model

        if cfg.output_stride != 16:
            raise UserError(f"model.output_stride: {cfg.output_stride}, but {name} has 16; set model.output_stride=16")
        if cfg.aux and not aux_head:
            raise UserError(f"model.aux: {name} has no auxiliary head; set model.aux=false")
        options = {"aux_loss": cfg.aux} if aux_head else {}
        return get_model(name, weights=None, weights_backbone=None, num_classes=classes, **options)

    return make


_BUILDERS: dict[str, Builder] = {
    **{f"{head}_{depth}": _resnet(depth, head) for head in ("deeplabv3", "fcn") for depth in ("resnet50", "resnet101")},
    "deeplabv3_mobilenet_v3_large": _mobilenet("deeplabv3_mobilenet_v3_large", True),
    "lraspp_mobilenet_v3_large": _mobilenet("lraspp_mobilenet_v3_large", False),
}


def _load_backbone(model: nn.Module, cfg: ModelConfig) -> None:
    """Fill `model.backbone` from torchvision's weights or a file, leaving out the classifier that came with them."""
    source = str(cfg.backbone_weights)
    backbone = model.get_submodule("backbone")
    if source == "torchvision":
        state: Any = _download(cfg.name.split("_", 1)[1])
    else:
        state = checkpoint.read(Path(source))
        for key in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
    tensors = (
        {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    )
    checkpoint.load_weights(backbone, _backbone_names(tensors), source)


def _backbone_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the backbone alone: without wrappers' prefixes and without the classifier."""
    for prefix in ("module.", "backbone.", "features."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    heads = ("fc.", "classifier.", "aux_classifier.")
    return {key: value for key, value in state.items() if not key.startswith(heads)}


def _download(backbone: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(backbone)["IMAGENET1K_V1"]  # type: ignore[index]
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"model.backbone_weights: cannot download {weights.url}: {error}; fetch the file elsewhere and set "
            "model.backbone_weights=PATH"
        ) from None

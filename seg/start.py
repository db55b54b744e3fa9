"""A new training that starts from a whole trained network, heads included: `model.weights`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import norm
from engine import checkpoint, initial
from engine.errors import UserError
from seg import models
from seg.config import SegConfig
from seg.smp_models import AnySize
from seg.weights import WHITENED

_AUX, _COUNT = "aux_classifier.", "num_batches_tracked"
_WORDS = ("torchvision", "imagenet", "timm", "pretrained")


def check(source: str) -> None:
    """Whether `model.weights` is a file of weights, before anything else takes time.

    Raises:
        UserError: missing, damaged, with code in it, of another task, or without weights.
    """
    _read(source)


def _read(source: str) -> Any:
    if source in _WORDS or source.startswith("package:"):
        raise UserError(
            f"model.weights: found {source!r}, expected the path of a file with a whole trained network; pretrained "
            f"encoders are for model.backbone_weights={source}"
        )
    try:
        state = checkpoint.read(Path(source))
        if not initial.tensors_in(state, source):
            raise UserError(f"{source}: holds no tensors, expected the weights of a network")
    except UserError as error:  # a config has several files, and their errors may look alike
        raise UserError(f"model.weights: {error}") from None
    task = state.get("task", "seg") if initial.config_in(state) else "seg"
    if task != "seg":
        raise UserError(
            f"model.weights: {source}: a checkpoint of the task {task!r}, expected one of 'seg'; for the weights of an "
            "encoder set model.backbone_weights"
        )
    return state


class Start:
    """The weights that `cfg.model.weights` names, on their way into a network.

    Weights of a network with batch norm go into one before its norm is converted, those of another norm afterwards.
    The parameters whose number is that of the classes stay as they were built where the file has other classes, and so
    does an auxiliary head that the file lacks.

    Args:
        cfg: the experiment.
        classes: names of the classes that will be trained, in the order of their train ids.
        model: the network of `cfg.model` before the conversion.

    Raises:
        UserError: see `check`.
    """

    def __init__(self, cfg: SegConfig, classes: Sequence[str], model: nn.Module) -> None:
        self.cfg = cfg
        self.source = str(cfg.model.weights)
        state = _read(self.source)
        self.config = initial.config_in(state)
        self.tensors = initial.tensors_in(state, self.source)
        if isinstance(model, AnySize) and not any(name.startswith("network.") for name in self.tensors):
            self.tensors = {f"network.{name}": one for name, one in self.tensors.items()}  # the library's own names
        here = {name: one.detach().clone() for name, one in model.state_dict().items()}
        self.anew: list[str] = []
        """Layers that keep the weights they were built with."""
        self.notes = [*self._leave_aux(here), *self._leave_heads(here, initial.classes_in(state), classes)]
        self.built = {name: one for name, one in here.items() if self._is_anew(name)}
        self.same_norm = initial.fits_converted(self.config, cfg.norm)
        alike = self._stored("norm").get("name") == cfg.norm.name
        whitened = not self.config and any(name.endswith(WHITENED) for name in self.tensors)
        self.converted = self.same_norm or ((alike or whitened) and not self._fits(here))
        """Whether `fill` wants the network after the conversion of its norm."""

    def fill(self, model: nn.Module) -> None:
        """Load the weights.

        Raises:
            UserError: layers differ, apart from those that start anew; says what to set. The network is left as it was.
        """
        here, parameters = model.state_dict(), {name for name, _ in model.named_parameters()}
        tensors = _named_as(self.tensors, here)
        tensors = {name: one for name, one in tensors.items() if name in here or not name.endswith(_COUNT)}  # frozen_bn
        own = {
            name: one
            for name, one in here.items()
            if self._is_anew(name) and (name in parameters or name not in tensors)
        }
        try:
            checkpoint.load_weights(model, {**tensors, **own}, self.source, remedy=self._remedy(here))
        except UserError as error:
            norms = "" if self._options() else self._other_norm()
            raise UserError(f"model.weights: {self._other_network() or norms or error}") from None
        if self.converted:
            self._restore_built(model)

    def report(self, model: nn.Module) -> list[str]:
        """Lines for the log about what was done with this network, which is ready to train."""
        lines = ["; ".join([f"weights of {self.source}", *self.notes])]
        if self.cfg.model.backbone_weights is not None:
            lines[0] += f"; model.backbone_weights={self.cfg.model.backbone_weights} is not loaded beside them"
        data = self._stored("data")
        for key, ours in (("mean", self.cfg.data.mean), ("std", self.cfg.data.std)):
            if (theirs := data.get(key, list(ours))) != list(ours):
                lines.append(f"note: the file's network was trained with data.{key}={theirs}, here it is {list(ours)}")
        if self.converted and not self.same_norm:
            changes = initial.norm_changes(self.config, self.cfg.norm).items()
            lines += [
                f"note: {key}: {there} in the file, {here} here, of layers alike" for key, (there, here) in changes
            ]
        whitens = any(isinstance(one, norm.FastDeconv | norm.Delinear) for one in model.modules())
        if whitens and not self.converted and not self.cfg.norm.calibrate_batches:
            lines.append(
                f"note: with norm.name={self.cfg.norm.name} the layers that whiten compute something else than the "
                "file's network did; norm.calibrate_batches=4 keeps its function"
            )
        return lines

    def _leave_aux(self, here: Mapping[str, Tensor]) -> list[str]:
        """Where only one of file and network has an auxiliary head."""
        ours, theirs = (any(name.startswith(_AUX) for name in names) for names in (here, self.tensors))
        if ours and not theirs:
            self.anew.append(_AUX.rstrip("."))
            return ["the auxiliary head starts anew (the file has none)"]
        if theirs and not ours:
            self.tensors = {name: one for name, one in self.tensors.items() if not name.startswith(_AUX)}
            return ["the file's auxiliary head is left out (model.aux is false)"]
        return []

    def _leave_heads(self, here: Mapping[str, Tensor], theirs: Sequence[str] | None, ours: Sequence[str]) -> list[str]:
        """The last layers, where the file's are of other classes."""
        heads = [name for name in _layers_of_classes(self.cfg, here, len(ours)) if not self._is_anew(name)]
        numbers = [
            _other_number(one, self.tensors[name], len(ours))
            for name, one in here.items()
            if name.rpartition(".")[0] in heads and name in self.tensors
        ]
        if number := max(numbers, default=0):
            why = f"{number} classes in the file, {len(ours)} here"
        elif theirs is not None and len(theirs) == len(ours) and tuple(theirs) != tuple(ours):
            pair = next(pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1])
            why = f"other classes, such as {pair[0]!r} in the file and {pair[1]!r} here"
        else:
            return []
        self.anew += heads
        return [f"{' and '.join(heads)} start{'' if len(heads) > 1 else 's'} anew ({why})"]

    def _is_anew(self, name: str) -> bool:
        """Of a layer, or a tensor in it."""
        return f"{name}.".startswith(tuple(f"{layer}." for layer in self.anew))

    def _fits(self, here: Mapping[str, Tensor]) -> bool:
        """Whether the tensors are those of the network before its conversion."""
        ours, theirs = (
            {name: one.shape for name, one in each.items() if not self._is_anew(name) and not name.endswith(_COUNT)}
            for each in (here, _named_as(self.tensors, here))
        )
        return ours == theirs

    def _restore_built(self, model: nn.Module) -> None:
        """The conversion was shown blank images, which are no measure for the weights of a whitening layer."""
        for name, layer in model.named_modules():
            if f"{name}.weight" not in self.built or not isinstance(layer, norm.FastDeconv | norm.Delinear):
                continue
            layer.set_weight(self.built[f"{name}.weight"].to(layer.weight))
            if layer.bias is not None:
                with torch.no_grad():
                    layer.bias.copy_(self.built.get(f"{name}.bias", torch.zeros_like(layer.bias)))
            if f"{name}.running_mean" not in self.tensors:
                layer.reset_running_stats()

    def _remedy(self, here: Mapping[str, Tensor]) -> str:
        """What to do where the layers differ."""
        if self._options():
            return self._options()
        batches = [each.get("calibrate_batches", 0) for each in (self._stored("norm"), dict(self.cfg.norm))]
        if self.same_norm and bool(batches[0]) != bool(batches[1]):
            return (
                f"norm.calibrate_batches: {batches[0]} in the file, {batches[1]} here, which makes other layers; set "
                f"norm.calibrate_batches={batches[0]}"
            )
        folded = (name for name in self.tensors if name.endswith(".bias") and name not in here)
        whitened = any(name.endswith(WHITENED) for name in self.tensors)
        if whitened and not self.config:
            return "the file is of a deconvolved network; set norm.name and its options as that network had them"
        if not self.config and any(name.removesuffix("bias") + "weight" in here for name in folded):
            return (
                "convolutions of the file have a bias where the network has a norm: exported weights of a deconvolved "
                "network are folded, and cannot be trained on; give the best.pt that they were exported from"
            )
        return (
            "model.weights takes a whole network of the architecture that model.name, model.options and norm say; an "
            "encoder alone goes into model.backbone_weights"
        )

    def _options(self) -> str:
        """What to say where the file's network has other options; else nothing."""
        ours = self.cfg.model.options
        theirs = self._stored("model").get("options", ours)
        return "" if theirs == ours else f"model.options: {theirs} in the file, {ours} here; set what the file has"

    def _other_network(self) -> str:
        """What to say where the file is of another architecture, whose layers need not be listed; else nothing."""
        theirs, ours = self._stored("model").get("name", self.cfg.model.name), self.cfg.model.name
        if theirs == ours:
            return ""
        return (
            f"{self.source}: these weights are of another network: model.name: {theirs} in the file, {ours} here; set "
            "what the file has, or, if it has the same encoder, take that alone, by model.backbone_weights"
        )

    def _stored(self, section: str) -> dict[str, Any]:
        """A section of the configuration that the file holds."""
        found = self.config.get(section)
        return found if isinstance(found, dict) else {}

    def _other_norm(self) -> str:
        """What to say where the weights do not fit since the file's network has another norm; else nothing."""
        changes = initial.norm_changes(self.config, self.cfg.norm)
        if not changes:
            return ""
        found = [f"  {key}: {there} in the file, {here} here" for key, (there, here) in changes.items()]
        words = " ".join(shlex.quote(f"{key}={there}") for key, (there, _) in changes.items())
        return "\n".join(
            [
                f"{self.source}: was trained with another norm, whose weights do not fit this one:",
                *found,
                f"  set {words}, or start from a network that was trained with batch norm",
            ]
        )


def _named_as(tensors: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names that the norms have here: one of timm's, which activates too, holds what replaces it as `norm`,
    here or in the file."""
    others = {"{}.norm.{}".format(*name.rpartition(".")[::2]): name for name in here}
    wrapped = (name for name in here if name.rpartition(".")[0].endswith(".norm"))
    others |= {".".join(name.rsplit(".norm.", 1)): name for name in wrapped}
    return {name if name in here else others.get(name, name): one for name, one in tensors.items()}


def _layers_of_classes(cfg: SegConfig, here: Mapping[str, Tensor], classes: int) -> list[str]:
    """Names of the layers whose size is the number of classes: those that are another one with a class more."""
    with torch.random.fork_rng(devices=[]):  # the training draws as it would without this
        other = models.build(cfg.model, classes + 1, pretrained=False).state_dict()
    differing = (name for name, one in here.items() if one.shape != other[name].shape)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in differing))


def _other_number(here: Tensor, there: Tensor, classes: int) -> int:
    """The number of classes of the file's tensor, where nothing but that differs; else 0."""
    if here.ndim != there.ndim:
        return 0
    differing = [(a, b) for a, b in zip(here.shape, there.shape, strict=True) if a != b]
    return differing[0][1] if len(differing) == 1 and differing[0][0] == classes else 0

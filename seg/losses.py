"""The loss of an experiment: named losses, weighted and added, over the main and the auxiliary head.

The loop divides by a weight once for the whole step, so a loss is a sum over labelled pixels and the number (or weight)
of those. One loss keeps its own weight, exactly. Where several are added, each is first made a mean over its
micro-batch and then counts as many times as that has labelled pixels; for unweighted cross entropy this is the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.loop import Batch, Loss
from seg.config import LossConfig, SegConfig
from seg.labels import IGNORE, table
from seg.loss_terms import KINDS, ClassWeights, Criterion
from seg.rare import class_weights

Terms = list[tuple[str, float, Criterion]]


def available() -> list[str]:
    """Names that `loss.name` and `loss.terms` may have, sorted."""
    return sorted(KINDS)


def build(cfg: SegConfig, cache: Path | None = None, count: bool = True) -> Callable[[nn.Module, Batch], Loss]:
    """The loss of a network on a batch, for `engine.loop.fit`: main head plus `loss.aux_weight` times auxiliary head.

    Its parts are `main`, `aux` with an auxiliary head, and each of several terms (of the main head, not weighted).

    Args:
        cfg: the experiment.
        cache: folder for the counted classes of loss.class_weights=auto, see `seg.rare.class_counts`.
        count: False weighs all classes alike in place of loss.class_weights=auto, and reads no label file: for who
            needs the cost of the loss alone.

    Raises:
        UserError: an unknown name; an option that none of the losses uses; class weights that are not one for each
            class or all zero, or labels that cannot be counted.
    """
    scales = cfg.loss.terms or {cfg.loss.name: 1.0}
    _check(cfg, list(scales))
    weights = _class_weights(cfg, cache, count)
    terms: Terms = [(name, scale, KINDS[name].make(cfg.loss, weights)) for name, scale in scales.items()]

    def loss(model: nn.Module, batch: Batch) -> Loss:
        output: Mapping[str, Tensor] = model(batch["image"])
        total, weight, parts = _head(terms, output["out"], batch["target"])
        if "aux" in output:
            side, of_side, _ = _head(terms, output["aux"], batch["target"])
            parts["aux"] = _rescaled(side, of_side, weight)
            total = total + cfg.loss.aux_weight * parts["aux"]
        return Loss(total, weight, parts)

    return loss


def _head(terms: Terms, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # In float32: half precision overflows at the sum of a few thousand pixels.
    with torch.autocast(logits.device.type, enabled=False):
        found = {name: criterion(logits.float(), target) for name, _, criterion in terms}
        if len(terms) == 1:
            name, scale, _ = terms[0]
            total, weight = found[name]
            return scale * total, weight, {"main": scale * total}
        valid = (target != IGNORE).sum().float()
        parts = {name: _rescaled(*one, valid) for name, one in found.items()}
        total = torch.stack([scale * parts[name] for name, scale, _ in terms]).sum()
        return total, valid, {"main": total, **parts}


def _rescaled(total: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """The sum that, divided by `wanted`, gives what `total` does divided by `weight`; 0 without weight."""
    return total * torch.where(weight > 0, wanted / weight, 0.0)


def _check(cfg: SegConfig, names: list[str]) -> None:
    """Refuse unknown losses, and options that would do nothing."""
    for name in names:
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            raise UserError(
                f"loss.{'terms' if cfg.loss.terms else 'name'}: unknown loss {name!r}"
                f"{f'; did you mean {near[0]}?' if near else ''}; known: {', '.join(available())}"
            )
    used = {option for name in names for option in KINDS[name].options}
    for option in dict.fromkeys(option for kind in KINDS.values() for option in kind.options):
        value = getattr(cfg.loss, option)
        if option not in used and value != LossConfig.model_fields[option].default:
            owners = [name for name, kind in KINDS.items() if option in kind.options]
            raise UserError(
                f"loss.{option}: {value} has no effect with the loss {' + '.join(names)}; leave it out, or use "
                f"{' or '.join(owners)}"
            )
    default = LossConfig.model_fields["aux_weight"].default
    if cfg.loss.aux_weight != default and not cfg.model.aux:
        raise UserError(
            f"loss.aux_weight: {cfg.loss.aux_weight} has no effect without an auxiliary head; set model.aux=true, or "
            f"leave it at {default}"
        )


def _class_weights(cfg: SegConfig, cache: Path | None, count: bool) -> ClassWeights:
    weights = cfg.loss.class_weights
    if weights is None:
        return None
    if weights == "auto" and count:
        return class_weights(cfg, cache)
    classes = table(cfg.data).classes
    if weights == "auto":
        return (1.0,) * len(classes)
    if len(weights) != len(classes) or not any(weights):
        raise UserError(
            f"loss.class_weights: found {len(weights)} weights{'' if any(weights) else ', all zero'}; expected "
            f"{len(classes)}, not all zero, in the order {', '.join(classes)}"
        )
    return tuple(map(float, weights))

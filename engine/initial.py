"""Weights that a new training starts from: what a file says of the network that they are of, for all trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

import norm
from engine import checkpoint
from engine.config import NormConfig, recipe_defaults
from engine.errors import UserError
from engine.yaml_layers import dump_line


def tensors_in(state: Any, source: str) -> dict[str, Tensor]:
    """The weights in what `checkpoint.read` gave, the average where one was kept, by the names that they have without
    DistributedDataParallel (`module.`) and the compiler (`_orig_mod.`). Raises UserError where there are none."""
    found = checkpoint.weights_in(state)
    if found is None:
        raise UserError(f"{source}: found a {type(state).__name__}, expected a file of weights")
    return found if config_in(state) else {_unwrapped(key): value for key, value in found.items()}


def _unwrapped(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def config_in(state: Any) -> Mapping[str, Any]:
    """The configuration in a checkpoint of tools/train.py; of other files an empty one."""
    config = state.get("config") if isinstance(state, dict) else None
    return config if isinstance(config, dict) else {}


def classes_in(state: Any) -> tuple[str, ...] | None:
    """Those that a checkpoint of tools/train.py predicts, in its order; None of other files."""
    meta = state.get("meta") if config_in(state) else None
    return tuple(meta["classes"]) if isinstance(meta, dict) and isinstance(meta.get("classes"), list) else None


def fits_converted(config: Mapping[str, Any], section: NormConfig) -> bool:
    """Whether weights that were trained with `config` (see `config_in`) are of the network that `section` makes: they
    fit it after the conversion, not before it."""
    theirs = _section(config)
    if theirs is None:
        return False
    # the batches that are shown to it make no other network, nor does a default that is written out
    recipes = [norm.recipe(one.name, **one.options) for one in (theirs, section)]
    return recipes[0] == recipes[1] and theirs.overrides == section.overrides


def norm_changes(config: Mapping[str, Any], section: NormConfig) -> dict[str, tuple[str, str]]:
    """What the norm of `config` (see `config_in`) has otherwise than `section`: dotted key -> its value there and here,
    as a command line has it; nothing where `config` has no norm."""
    if "norm" not in config or fits_converted(config, section):
        return {}
    theirs, plain = _section(config), config["norm"]
    there = {"overrides": {}, **plain} if isinstance(plain, dict) else {}
    here = {"name": section.name, "overrides": section.overrides, **section.options}
    if theirs is not None and theirs.name == section.name:  # else what is default says nothing
        there, here = recipe_defaults(theirs) | there, recipe_defaults(section) | here
    keys = [key for key in there if key not in ("calibrate_batches", "precise_batches") and there[key] != here.get(key)]
    keys.sort(key=lambda key: key != "name")
    return {f"norm.{key}": (dump_line(there[key]), dump_line(here[key]) if key in here else "not set") for key in keys}


def _section(config: Mapping[str, Any]) -> NormConfig | None:
    try:
        return NormConfig.model_validate(config["norm"])
    except (KeyError, ValidationError):  # none, or a recipe that is not known here
        return None

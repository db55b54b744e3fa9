"""What a file says of the network that its weights are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import NormConfig
from engine.errors import UserError
from engine.initial import classes_in, config_in, fits_converted, norm_changes, tensors_in

STORED: dict[str, Any] = {"name": "deconv", "overrides": {}, "calibrate_batches": 0, "precise_batches": 4, "block": 32}


def section(**more: Any) -> NormConfig:
    return NormConfig.model_validate(more)


def test_tensors_have_the_names_of_the_plain_network():
    state = {"model": {"_orig_mod.module.w": torch.ones(2)}, "ema": None}
    assert list(tensors_in(state, "x.pt")) == ["w"]
    with pytest.raises(UserError, match="x.pt: found a list, expected a file of weights"):
        tensors_in([1], "x.pt")


def test_facts_of_a_checkpoint_and_of_other_files():
    stored = {"config": {"norm": STORED}, "meta": {"classes": ["a", "b"]}}
    assert config_in(stored) == {"norm": STORED} and classes_in(stored) == ("a", "b")
    for other in ({"model": {}}, {"config": 3, "meta": {"classes": ["a"]}}, [1]):
        assert config_in(other) == {} and classes_in(other) is None


def test_the_norm_is_the_same_where_it_makes_the_same_network():
    config = {"norm": STORED}
    for alike in (STORED, {"name": "deconv", "block": 32}, {"name": "deconv", "block": 32, "fc_block": 0}):
        assert fits_converted(config, section(**alike)) and norm_changes(config, section(**alike)) == {}
    for other in ({"name": "deconv"}, {"name": "bn"}, {**STORED, "overrides": {"fc": {"block": 8}}}):
        assert not fits_converted(config, section(**other))
    assert not fits_converted({}, section()) and norm_changes({}, section()) == {}


def test_what_is_otherwise_in_the_norm():
    config = {"norm": STORED}
    assert norm_changes(config, section(name="deconv", n_iter=7)) == {
        "norm.block": ("32", "64"),
        "norm.n_iter": ("5", "7"),
    }
    changes = norm_changes(config, section(name="gn", groups=8, overrides={"fc": {"recipe": "keep"}}))
    assert changes == {
        "norm.name": ("deconv", "gn"),
        "norm.overrides": ("{}", "{fc: {recipe: keep}}"),
        "norm.block": ("32", "not set"),
    }
    unknown = {"norm": {"name": "somebodys", "strength": 3}}
    assert not fits_converted(unknown, section())
    assert norm_changes(unknown, section()) == {"norm.name": ("somebodys", "bn"), "norm.strength": ("3", "not set")}

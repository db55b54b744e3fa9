"""Recipes by name, their options and their errors."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import norm
from norm import registry


@pytest.fixture
def own_registry(monkeypatch):
    """Recipes registered in a test are forgotten after it."""
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))


def test_the_named_recipes_are_there():
    assert set(norm.available()) >= {"bn", "sync_bn", "frozen_bn", "gn", "in", "ln", "none", "deconv"}
    assert norm.available() == sorted(norm.available())


def test_recipes_and_their_options_do_without_torch():
    """A config is checked and shown before the seconds that importing torch takes."""
    command = """
import sys, norm
for name in norm.available():
    norm.recipe(name)
norm.recipe("deconv", block=32).override({"n_iter": 3})
try:
    norm.recipe("deconv", rank=32)
except norm.NormError as error:
    assert "no effect with every=0" in str(error)
assert "torch" not in sys.modules
norm.FastDeconv(3, 8, 3)
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(norm.__file__).parent.parent)


def test_what_needs_torch_is_imported_when_it_is_asked_for():
    for name in norm.__all__:
        assert name in dir(norm) and getattr(norm, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'norm' has no attribute 'convrt'"):
        norm.convrt  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Deconv' from 'norm'"):
        from norm import Deconv  # noqa: F401


def test_a_recipe_of_ones_own(own_registry):
    @norm.register("gn8")
    @dataclass(frozen=True, kw_only=True)
    class GroupNorm8(norm.Recipe):
        groups: int = 8

        def norm(self, old, at):
            return nn.GroupNorm(self.groups, old.num_features)

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
    report = norm.convert(model, "gn8", groups=4)
    assert isinstance(model[1], nn.GroupNorm) and model[1].num_groups == 4
    assert "1 | BatchNorm2d | GroupNorm" in " ".join(str(report).split())
    with pytest.raises(norm.NormError, match=r"'gn8' has no option 'group' \(did you mean 'groups'\?\)"):
        norm.convert(model, "gn8", group=4)


def test_what_a_recipe_returns_goes_to_the_device_and_dtype_of_the_old_layer(own_registry):
    @norm.register("own")
    @dataclass(frozen=True, kw_only=True)
    class Own(norm.Recipe):
        def norm(self, old, at):
            return nn.GroupNorm(2, old.num_features)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    norm.convert(model, "own")
    assert model(torch.randn(2, 3, 9, 9, dtype=torch.float64)).dtype == torch.float64
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to("meta")
    norm.convert(model, "own")
    assert {each.device.type for each in model.parameters()} == {"meta"}


def test_registering_is_checked(own_registry):
    with pytest.raises(norm.NormError, match="does not derive from norm.Recipe"):
        norm.register("x")(nn.Module)  # type: ignore[type-var]
    with pytest.raises(norm.NormError, match="must have @dataclass"):

        @norm.register("x")
        class Plain(norm.Recipe):
            pass

    with pytest.raises(norm.NormError, match="'bn' is already registered, by norm.recipes.BatchNorm"):

        @norm.register("bn")
        @dataclass(frozen=True, kw_only=True)
        class Other(norm.Recipe):
            pass


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("deconvs", {}, r"unknown recipe 'deconvs' \(did you mean 'deconv'\?\); known: bn, deconv"),
        (
            "deconv",
            {"blok": 3},
            r"'deconv' has no option 'blok' \(did you mean 'block'\?\); its options: block, last_block",
        ),
        ("none", {"block": 3}, "'none' has no option 'block'; it has no options"),
        ("deconv", {"block": 3.5}, "'deconv': block is 3.5; expected int"),
        ("deconv", {"block": True}, "block is True; expected int"),
        ("deconv", {"eps": "small"}, "eps is 'small'; expected float"),
        ("deconv", {"stem_freeze": 1}, "stem_freeze is 1; expected bool"),
        ("deconv", {"grouping": "rows"}, "grouping is 'rows'; expected one of 'channel', 'published'"),
        ("deconv", {"block": 0}, "block is 0; it must be at least 1"),
        ("deconv", {"fc_block": -1}, "fc_block=-1 at least 0"),
        (
            "deconv",
            {"rank": 10},
            "rank=10 and fresh_steps=100 have no effect with every=0, the exact method; set every",
        ),
        ("deconv", {"fresh_steps": 3}, "rank=64 and fresh_steps=3 have no effect with every=0"),
        ("deconv_fast", {"stem_freeze": False, "freeze_iter": 7}, "freeze_iter=7 has no effect with stem_freeze=False"),
        ("deconv", {"n_iter": 21}, "n_iter=21 and stem_n_iter=5 must be at most 20: rounding in float32 outgrows"),
        ("deconv", {"stem_n_iter": 21}, "n_iter=5 and stem_n_iter=21 must be at most 20"),
        ("gn", {"groups": 0}, "groups is 0; it must be at least 1"),
        ("bn", {"eps": "x"}, r"eps is 'x'; expected float \| None"),
    ],
)
def test_options_are_checked(name, options, text):
    with pytest.raises(norm.NormError, match=text):
        norm.recipe(name, **options)


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    return model


@pytest.mark.parametrize("name", ["bn", "sync_bn", "frozen_bn", "keep"])
def test_batch_norms_keep_their_function(name):
    model, x = small(), torch.randn(2, 3, 8, 8)
    want = model.eval()(x)
    norm.convert(model, name)
    torch.testing.assert_close(model(x), want)


def test_bn_options_replace_the_networks_own():
    model = small()
    norm.convert(model, "bn", momentum=0.03, eps=1e-3)
    assert (model[1].momentum, model[1].eps) == (0.03, 1e-3)
    assert model[1].running_var.mean() != 1


def test_frozen_batch_norm_ignores_the_batch_and_does_not_learn():
    model = small()
    norm.convert(model, "frozen_bn")
    model.train()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), model.eval()(x))
    assert not list(model[1].parameters())


def test_group_layer_and_instance_norm_equal_their_definitions():
    x = torch.randn(3, 8, 6, 6)
    for name, options, groups in (("gn", {"groups": 4}, 4), ("gn", {"groups": 32}, 8), ("ln", {}, 1), ("in", {}, 8)):
        model = nn.Sequential(nn.Identity(), nn.BatchNorm2d(8))
        norm.convert(model, name, **options)
        parts = x.view(3, groups, -1)
        want = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(model(x), want.view_as(x), rtol=1e-4, atol=1e-5)


def test_weight_standardisation_spares_the_last_layer():
    model = small()
    report = norm.convert(model, "gn", groups=4, weight_standardisation=True)
    assert [row.new for row in report.rows] == ["WSConv2d", "GroupNorm", "Conv2d"]


def test_no_norm_gives_convolutions_a_bias():
    model = small()
    norm.convert(model, "none")
    assert isinstance(model[1], nn.Identity) and model[0].bias is not None and model[0].bias.abs().sum() == 0

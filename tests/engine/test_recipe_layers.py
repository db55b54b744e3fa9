"""What files, their bases and the command line say about a norm, and which of it wins."""

from pathlib import Path

import pytest

from engine.config import ExperimentConfig, Loaded, from_dict, load
from engine.config_help import passed_over
from engine.errors import UserError

BASE = """
task: t
length: 1 epoch
batch_size: 2
optim: {lr: 0.1, momentum: 0.8}
norm: {name: deconv, block: 16, n_iter: 3}
recipes:
  deconv: {fc_block: 8, eps: 0.001, optim: {weight_decay: 0.5}}
  gn: {groups: 4, optim: {lr: 0.3}}
"""


def read(folder: Path, text: str, *overrides: str) -> Loaded[ExperimentConfig]:
    (folder / "base.yaml").write_text(BASE)
    (folder / "x.yaml").write_text("base: base.yaml\n" + text)
    return load(folder / "x.yaml", overrides, ExperimentConfig)


def test_a_recipe_wins_over_what_base_files_write_for_every_norm(tmp_path):
    loaded = read(tmp_path, "recipes: {deconv: {n_iter: 2, optim: {lr: 0.02}}}\n")
    optim = loaded.config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay) == (0.02, 0.8, 0.5)
    assert loaded.config.norm.options == {"fc_block": 8, "eps": 0.001, "block": 16, "n_iter": 2}
    assert loaded.origins["optim.lr"] == f"{tmp_path / 'x.yaml'}:2"
    assert loaded.origins["optim.momentum"] == f"{tmp_path / 'base.yaml'}:5"


def test_the_file_itself_and_the_command_line_win_over_its_recipe(tmp_path):
    text = "optim: {lr: 0.05}\nnorm: {n_iter: 4}\nrecipes: {deconv: {n_iter: 2, optim: {lr: 0.02}}}\n"
    config = read(tmp_path, text).config
    assert config.optim.lr == 0.05 and config.norm.options["n_iter"] == 4
    config = read(tmp_path, text, "optim.lr=0.7", "recipes.deconv.optim.lr=0.9", "norm.n_iter=6").config
    assert config.optim.lr == 0.7 and config.norm.options["n_iter"] == 6
    assert read(tmp_path, text, "recipes.deconv.optim.lr=0.9").config.optim.lr == 0.9
    assert read(tmp_path, "optim: {weight_decay: 0.1}").config.optim.weight_decay == 0.1


@pytest.mark.parametrize("overrides", [["recipes={}"], ["recipes.deconv={}"], ["recipes={}", "recipes.gn.eps=0.1"]])
def test_recipes_can_be_emptied(tmp_path, overrides):
    config = read(tmp_path, "recipes: {deconv: {n_iter: 2}}\n", *overrides).config
    assert config.norm.options == {"block": 16, "n_iter": 3} and config.optim.weight_decay != 0.5
    assert read(tmp_path, "recipes: {}\n").config.norm.options == {"block": 16, "n_iter": 3}
    assert read(tmp_path, "", "recipes.deconv.optim={}").config.optim.weight_decay != 0.5
    assert read(tmp_path, "", "recipes.deconv.optim={}").config.norm.options["fc_block"] == 8
    filled = read(tmp_path, "", "recipes.deconv={}", "recipes.deconv.eps=0.1").config
    assert filled.norm.options == {"block": 16, "n_iter": 3, "eps": 0.1}


def test_places_of_recipes_are_those_of_what_is_in_force(tmp_path):
    loaded = read(tmp_path, "recipes: {deconv: {optim: {lr: 0.02}}}\n", "norm.eps=0.1", "optim.lr=0.3")
    recipe, where = loaded.config.recipes["deconv"], loaded.origins
    assert recipe["eps"] == 0.1 and where["recipes.deconv.eps"] == where["norm.eps"] == "override"
    assert recipe["optim"]["lr"] == 0.3 and where["recipes.deconv.optim.lr"] == "override"
    assert recipe["fc_block"] == 8 and where["recipes.deconv.fc_block"] == f"{tmp_path / 'base.yaml'}:8"


OVERRIDES = "recipes: {deconv: {overrides: {a*: {n_iter: 1}, b*: {n_iter: 2}}}}\n"


@pytest.mark.parametrize(
    "text, overrides",
    [
        (OVERRIDES, ["norm.overrides={}"]),
        (OVERRIDES, ["norm.overrides={}", "norm.overrides={b*: {n_iter: 4}, c*: {n_iter: 3}}"]),
        (OVERRIDES, ["norm={}", "norm.name=deconv"]),
        (OVERRIDES, ["norm.name=gn", "optim.lr=0.7"]),
        (OVERRIDES, ["norm.name=bn"]),
        (OVERRIDES + "norm: {overrides: {c*: {n_iter: 3}, a*: {n_iter: 5}}}\n", []),
        ("recipes: {deconv: {eps: 0.01, optim: {lr: 0.02}}}\nnorm: {eps: 0.1}\noptim: {lr: 0.3}\n", []),
    ],
)
def test_a_resolved_config_is_read_back_as_it_was(tmp_path, text, overrides):
    """From a checkpoint and from a run's config.yaml, in its order: of two patterns of layers the later one wins."""
    first = read(tmp_path, text, *overrides)
    (tmp_path / "config.yaml").write_text(first.text)
    plain = first.config.model_dump(mode="json")
    for again in (load(tmp_path / "config.yaml", [], ExperimentConfig), from_dict(plain, [], ExperimentConfig, "x.pt")):
        assert again.config == first.config and list(again.config.norm.overrides) == list(first.config.norm.overrides)
        assert again.text == first.text
    if first.config.norm.name == "deconv":
        changed = from_dict(plain, ["norm.n_iter=7"], ExperimentConfig, "x.pt").config.norm
        assert changed.options == first.config.norm.options | {"n_iter": 7}


def test_what_a_file_writes_in_vain_is_told(tmp_path):
    text = "optim: {lr: 0.05, momentum: 0.7}\nrecipes: {deconv: {optim: {lr: 0.02, momentum: 0.7, nesterov: true}}}\n"
    (note,) = passed_over(read(tmp_path, text))
    path = tmp_path / "x.yaml"
    assert note.startswith(f"note: optim.lr: 0.05 ({path}:2) is used, not the 0.02 of recipes.deconv.optim.lr: what")
    for fine in (read(tmp_path, text, "norm.name=bn"), read(tmp_path, text, "optim.lr=0.3")):
        assert passed_over(fine) == []
    assert passed_over(read(tmp_path, "recipes: {deconv: {optim: {lr: 0.02}}}\n")) == []  # above a base


def test_another_norm_drops_the_options_of_the_first_but_not_its_own_recipe(tmp_path):
    config = read(tmp_path, "recipes: {gn: {eps: 0.01}}\n", "norm.name=gn").config
    assert config.norm.options == {"groups": 4, "eps": 0.01} and config.optim.lr == 0.1  # as its own file writes
    config = read(tmp_path, "norm: {name: gn, groups: 2}\nrecipes: {gn: {optim: {lr: 0.3}}}\n").config
    assert config.norm.options == {"groups": 2} and config.optim.lr == 0.3
    config = read(tmp_path, "norm: {name: gn}\n", "norm.name=deconv").config
    assert config.norm.options == {"fc_block": 8, "eps": 0.001}


def test_what_was_resolved_reads_back_as_it_was(tmp_path):
    loaded = read(tmp_path, "recipes: {deconv: {n_iter: 2, optim: {lr: 0.02}}}\n", "optim.momentum=0.7")
    (tmp_path / "saved.yaml").write_text(loaded.text)
    assert load(tmp_path / "saved.yaml", [], ExperimentConfig).config == loaded.config


def test_numbers_without_end_in_options_are_saved_as_they_are(tmp_path):
    loaded = read(tmp_path, "norm: {overrides: {a: {eps: .inf}, b: {eps: -.inf}}}\n")
    (tmp_path / "saved.yaml").write_text(loaded.text)
    assert load(tmp_path / "saved.yaml", [], ExperimentConfig).config == loaded.config
    stored = loaded.config.model_dump(mode="json")
    assert from_dict(stored, [], ExperimentConfig, "x.pt").config == loaded.config


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("calibrate_batch", "calibrate_batches"), ("override", "overrides"), ("precise", "precise_batches")],
)
def test_a_key_of_the_section_written_wrongly(tmp_path, wrong, meant):
    with pytest.raises(UserError, match=rf"'gn' has no option '{wrong}'; its .*; did you mean norm.{meant}\?$"):
        read(tmp_path, "", "norm.name=gn", f"norm.{wrong}=4")


def test_an_option_of_the_recipe_written_wrongly(tmp_path):
    with pytest.raises(UserError, match=r"'deconv' has no option 'blok' \(did you mean 'block'\?\); its .*delinear$"):
        read(tmp_path, "", "norm.blok=4")

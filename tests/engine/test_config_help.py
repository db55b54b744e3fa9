from __future__ import annotations

from dataclasses import make_dataclass
from pathlib import Path
from typing import Literal

import pytest

import norm
from engine.config import ExperimentConfig, Loaded, Section, load
from engine.config_help import describe
from engine.errors import UserError
from norm import registry


class DataConfig(Section):
    kind: Literal["red", "green"] | None = "red"
    """Colour of
    the data."""


class ToyConfig(ExperimentConfig):
    task: Literal["toy"] = "toy"
    """The trainer."""
    data: DataConfig = DataConfig()


def read(folder: Path, *overrides: str) -> Loaded[ToyConfig]:
    (folder / "x.yaml").write_text("task: toy\nlength: 3 epochs\nbatch_size: 8\noptim: {lr: 0.2}\n")
    return load(folder / "x.yaml", overrides, ToyConfig)


def test_a_key_has_its_value_its_origin_and_its_meaning(tmp_path: Path) -> None:
    head, meaning = describe(read(tmp_path), "optim.lr").splitlines()
    assert head.split("# ")[0].split() == ["optim.lr:", "0.2"] and head.endswith("x.yaml:4")
    assert meaning == "    Learning rate after warm-up, for the global batch size."
    assert "Colour of the data. One of: red, green." in describe(read(tmp_path), "data.kind")
    assert "One of" not in describe(read(tmp_path), "task")
    assert describe(read(tmp_path, "data.kind=green"), "data.kind").splitlines()[0].split() == [
        *("data.kind:", "green", "#", "override")
    ]


def test_a_section_is_its_keys_alone(tmp_path: Path) -> None:
    lines = [line for line in describe(read(tmp_path), "optim").splitlines() if not line.startswith("  ")]
    assert len(lines) == len(type(read(tmp_path).config.optim).model_fields)
    assert all(line.startswith("optim.") for line in lines)


def test_options_of_the_recipe_and_of_its_bases(tmp_path: Path) -> None:
    text = describe(read(tmp_path, "norm.name=deconv_fast", "norm.block=32"), "norm")
    assert "norm.block: 32" in text and "Channels whitened together." in text
    assert text.count("norm.every: 4 ") == 1 and "default of the recipe deconv_fast" in text
    assert "0: the exact method. n: the shape of D comes from a running covariance" in text


def test_a_recipe_without_source_has_no_meaning_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    made = make_dataclass("Made", [("size", int, 3)], bases=(norm.Recipe,), frozen=True, kw_only=True)
    norm.register("made")(made)
    assert "norm.size: 3" in describe(read(tmp_path, "norm.name=made"), "norm.size")


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("optm", "did you mean optim?"),
        ("lr", "did you mean optim.lr?"),
        ("optim.lrr", "did you mean optim.lr?"),
        ("xyzzy", "known: task, length, batch_size"),
    ],
)
def test_an_unknown_key(tmp_path: Path, wanted: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"--explain: unknown key or section '{wanted}'; {hint}"):
        describe(read(tmp_path), wanted)

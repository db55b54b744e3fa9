"""Layers by themselves; test_config.py reads files through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import yaml_layers
from engine.errors import UserError
from engine.yaml_layers import Leaf


def test_an_empty_mapping_empties_what_is_below() -> None:
    below = {"norm": {"name": Leaf("deconv", "x"), "overrides": {"a*": {"block": Leaf(4, "x")}}}}

    def merged(*overrides: str) -> Any:
        return yaml_layers.to_plain(yaml_layers.merge(below, yaml_layers.parse_overrides(overrides)))["norm"]

    assert merged("norm.overrides={b*: {block: 8}}")["overrides"] == {"a*": {"block": 4}, "b*": {"block": 8}}
    assert merged("norm.overrides={}")["overrides"] == {}
    again = merged("norm.overrides={}", "norm.overrides={b*: {block: 8}}", "norm.overrides={c*: {block: 2}}")
    assert again == {"name": "deconv", "overrides": {"b*": {"block": 8}, "c*": {"block": 2}}}
    assert merged("norm.overrides={b*: {block: 8}}", "norm.overrides={}")["overrides"] == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1_000", 1000), ("0x10", 16), ("-3", -3), ("+7", 7), ("1.5e3", 1500.0), (".5", 0.5), ("3.", 3.0)],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    found = yaml_layers.load_plain(text, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["{}", "--- {}\n", "# nothing\n"])
def test_a_file_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x.yaml: the config is empty, expected keys such as 'task: seg'$"):
        yaml_layers.read_chain(tmp_path / "x.yaml")
    (tmp_path / "y.yaml").write_text("base: x.yaml\n")
    with pytest.raises(UserError, match=r"x.yaml: the config is empty, .* \(named by base: in .*y.yaml\)"):
        yaml_layers.read_chain(tmp_path / "y.yaml")


@pytest.mark.parametrize("text", ["norm.overrides.'layer4.*'.n_iter=3", 'norm.overrides."layer4.*".n_iter=3'])
def test_quotes_around_a_key_are_not_taken_for_a_part_of_it(text: str) -> None:
    with pytest.raises(UserError, match=r"keys are not quoted; one that holds a dot goes into braces, such as norm\."):
        yaml_layers.parse_overrides([text])
    assert yaml_layers.parse_overrides(["data.root='a b'"]) == {"data": {"root": Leaf("a b", "override")}}

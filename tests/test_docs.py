"""What the documents name exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from norm.recipes import Deconv, DeconvFast

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_programs_and_configs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    named = re.findall(r"(?<![\w/])(?:tools|tests|configs)/[a-z0-9_/]+\.(?:py|yaml)", text)
    assert not missing + [name for name in named if not (ROOT / name).is_file()]


def test_the_table_of_options_has_every_one_with_its_default() -> None:
    text = (ROOT / "docs/norm.md").read_text(encoding="utf-8")
    table = text.partition("## Options of deconvolution")[2].partition("\n## ")[0]
    found = {name: default.strip('"') for name, default in re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.M)}
    fields = {field.name: field.default for field in dataclasses.fields(Deconv)}
    assert found.keys() == fields.keys()
    for name, default in fields.items():
        assert type(default)(found[name]) == default if type(default) in (int, float) else found[name] == str(default)
    other = {field.name: field.default for field in dataclasses.fields(DeconvFast)}
    others = {name: value for name, value in other.items() if value != fields[name]}
    assert others == {"every": 4}
    assert all(f"`{name}` {value}" in table.partition("\n|")[0] for name, value in others.items())

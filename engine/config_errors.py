"""A validation error in the user's words: file and line, key, what was found, what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from engine import yaml_layers
from engine.yaml_layers import Layer


def explain(error: ErrorDetails, kind: type[BaseModel], layer: Layer, data: dict[str, Any], source: str) -> str:
    """One problem as `place: key: what was found, what was expected`; `source` is the place of what is missing."""
    missing = error["type"] == "missing"
    path: list[str] = []
    at: Any = data
    for part in error["loc"]:
        known = part in at if isinstance(at, dict) else isinstance(at, list) and part in range(len(at))
        if not known and not missing:
            break  # the tag of a union's member, not a key
        at = at[part] if known else None  # type: ignore[index, call-overload]
        path.append(f"[{part}]" if isinstance(part, int) else str(part))
    key = ".".join(path).replace(".[", "[")
    place = _place(tuple(part for part in path if not part.startswith("[")), layer, error["msg"]) or source
    if error["type"] == "extra_forbidden":
        near = nearest(key, list(_known_keys(kind)))
        if near == key:  # the form of the command line
            section, _, word = key.rpartition(".")
            near = f"{section.replace('.', ': {')}: {{{word}: ...{'}' * key.count('.')}"
        text = "unknown key" + (f"; did you mean {near}?" if near else "")
    elif missing:
        text = "missing, and it has no default"
    elif error["type"] == "value_error":
        text = error["msg"].removeprefix("Value error, ")
        option = re.search(r"has no option '(\w+)'", text) if key == "norm" else None
        near = option and nearest(f"norm.{option[1]}", [one for one in _known_keys(kind) if one.startswith("norm.")])
        text += f"; did you mean {near}?" if near else ""  # the recipe knows its options, not the section's own keys
    else:
        expected = error["msg"].replace("Input should be ", "expected ").replace("an object", "a section with keys")
        text = f"found {error['input']!r}, {expected}"
    return f"{place}: {key}: {text}" if key else f"{place}: {text}"


def _place(path: tuple[str, ...], layer: Layer, message: str) -> str:
    """Where a key stands, as `configs/x.yaml:12`. Of a section, the key that the message mentions."""
    under = [(at, leaf.origin) for at, leaf in yaml_layers.leaves(layer) if at[: len(path)] == path]
    words = re.findall(r"\w+", message)
    under.sort(key=lambda one: words.index(one[0][-1]) if one[0] != path and one[0][-1] in words else len(words))
    return under[0][1] if under else ""


def _known_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _known_keys(part, f"{prefix}{name}.")


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key that was probably meant: of the same section if one is near, else of any."""
    section, _, word = key.rpartition(".")
    siblings = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    anywhere = {one.rpartition(".")[2]: one for one in known}
    near = difflib.get_close_matches(word, siblings, n=1)
    if near:
        return siblings[near[0]]
    near = difflib.get_close_matches(word, anywhere, n=1, cutoff=0.8)
    return anywhere[near[0]] if near else None

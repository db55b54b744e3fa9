"""What the keys of a config mean: value, origin, choices and the sentence that stands under each field."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

import norm
from engine import yaml_layers
from engine.config import Loaded, recipe_defaults
from engine.config_errors import nearest
from engine.errors import UserError


@dataclass(frozen=True)
class Key:
    """A key of a config."""

    path: str
    value: Any
    """As plain containers."""
    origin: str
    meaning: str

    def __str__(self) -> str:
        head = f"{self.path}: {yaml_layers.dump_line(self.value)}"
        body = textwrap.fill(self.meaning, 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
        return f"{head:<50}  # {self.origin}\n{body}"


def describe(loaded: Loaded[Any], wanted: str = "") -> str:
    """Every key with its value, where that comes from, and what it means.

    Args:
        loaded: the resolved config.
        wanted: a key or a section, such as `optim.lr` or `optim`; "" takes all.

    Raises:
        UserError: a key or section that this kind of config does not have.
    """
    everything = list(_keys(loaded))
    chosen = [key for key in everything if not wanted or f"{key.path}.".startswith(f"{wanted}.")]
    if not chosen:
        top = list(dict.fromkeys(key.path.partition(".")[0] for key in everything))
        near = nearest(wanted, [*top, *(key.path for key in everything)])
        hint = f"did you mean {near}?" if near else f"known: {', '.join(top)}, and the keys in these"
        raise UserError(f"--explain: unknown key or section {wanted!r}; {hint}")
    return "".join(f"{key}\n" for key in chosen)


def _keys(loaded: Loaded[Any]) -> Iterator[Key]:
    yield from _of_section(loaded.config, loaded.config.model_dump(mode="json"), loaded.origins)


def _of_section(section: BaseModel, plain: dict[str, Any], origins: dict[str, str], prefix: str = "") -> Iterator[Key]:
    for name, field in type(section).model_fields.items():
        path, value = f"{prefix}{name}", getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _of_section(value, plain[name], origins, f"{path}.")
            if path == "norm":
                yield from _of_recipe(value, origins)
            continue
        meaning = " ".join((field.description or "").split())
        choices = [yaml_layers.dump_line(one) for one in _choices(field.annotation)]
        if len(choices) > 1:
            meaning = f"{meaning} One of: {', '.join(choices)}.".strip()
        written = {where for key, where in origins.items() if key == path or key.startswith(f"{path}.")}
        if len(written) > 1:  # of a mapping, whose lines --show tells
            written = {where.partition(":")[0] for where in written}
        yield Key(path, plain[name], ", ".join(sorted(written)) or "default", meaning)


def _choices(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _choices(part)


def _of_recipe(section: Any, origins: dict[str, str]) -> Iterator[Key]:
    documented = _docstrings(type(norm.recipe(section.name, **section.options)))
    for name, value in recipe_defaults(section).items():
        origin = origins.get(f"norm.{name}", f"default of the recipe {section.name}")
        yield Key(f"norm.{name}", value, origin, documented.get(name, ""))


def _docstrings(kind: type) -> dict[str, str]:
    """The strings under a dataclass's fields, its bases' too; Python itself does not keep them."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        try:
            source = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        except (OSError, TypeError, SyntaxError):  # a class that was typed in or built by a program has no source
            continue
        body = source.body if isinstance(source, ast.ClassDef) else []
        for field, text in zip(body, body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def passed_over(loaded: Loaded[Any]) -> list[str]:
    """A note for each key that `recipes` gives the chosen norm under `optim` in vain, since the same file has it in its
    own section `optim`, which wins."""
    plain, notes = loaded.config.model_dump(mode="json"), []
    recipe = f"recipes.{loaded.config.norm.name}"
    for key, (value, origin) in loaded.recipe_rates.items():
        places = [one.rpartition(":") for one in (origin, loaded.origins.get(f"optim.{key}", ""))]
        if plain["optim"][key] != value and places[0][0] and places[0][0] == places[1][0]:
            notes.append(
                f"note: optim.{key}: {plain['optim'][key]} ({''.join(places[1])}) is used, not the {value} of "
                f"{recipe}.optim.{key}: what a file says under optim wins over its own recipes; move it to a base "
                "file, or leave it out"
            )
    return notes

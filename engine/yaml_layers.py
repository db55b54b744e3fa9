"""YAML files and `key=value` overrides as layers of leaves that remember where they were written.

A layer is a nested dict whose leaves are `Leaf(value, origin)`. Mappings merge deep, everything else (a list and an
empty mapping too) replaces what was there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from engine.errors import UserError

DEEPEST_BASE = 2
DEEPEST_NESTING = 20
MOST_VALUES = 100_000


class Leaf(NamedTuple):
    value: Any
    origin: str  # "configs/seg/x.yaml:12" or "override"


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F_]+)$",
    "tag:yaml.org,2002:float": r"^[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
}
Layer = dict[str, Any]  # str -> Leaf | Layer
_WORDS: dict[type[yaml.Node], str] = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list"}


class _Loader(yaml.SafeLoader):
    """The safe loader, but with the numbers of YAML 1.2 and everybody's expectation: `1e-4` is one, `010` (8 in YAML
    1.1) and `1:30` (90) are not."""

    yaml_implicit_resolvers = {
        first: [(tag, found) for tag, found in pairs if tag not in _NUMBERS]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` or YAML 1.1 would take for a number."""


for _each in (_Loader, _Dumper):
    for _tag, _pattern in _NUMBERS.items():
        _each.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def read_chain(path: str | Path) -> list[Layer]:
    """Read a file and the files that its `base:` keys name; the deepest base comes first.

    Raises:
        UserError: missing or unreadable file, not YAML, empty, not a mapping, a key twice, `base:` in a circle or
            nested more than two deep.
    """
    layers: list[Layer] = []
    chain: list[str] = []
    current = os.path.normpath(path)
    while True:
        if any(os.path.realpath(current) == os.path.realpath(seen) for seen in chain):
            raise UserError(f"{chain[0]}: its base files go in a circle: {' -> '.join([*chain, current])}")
        chain.append(current)
        if len(chain) > DEEPEST_BASE + 1:
            raise UserError(
                f"{chain[0]}: base files may be nested {DEEPEST_BASE} deep, this goes deeper: {' -> '.join(chain)}"
            )
        layer = _read_file(current, chain)
        layers.insert(0, layer)
        base = layer.pop("base", None)
        if base is None:
            return layers
        if not isinstance(base, Leaf) or not isinstance(base.value, str) or not base.value:
            found = repr(base.value) if isinstance(base, Leaf) else "a mapping"
            raise UserError(f"{current}: base: found {found}, expected the path of one YAML file")
        current = os.path.normpath(os.path.join(os.path.dirname(current), base.value))


def _read_file(path: str, chain: Sequence[str]) -> Layer:
    asked = f" (named by base: in {chain[-2]})" if len(chain) > 1 else ""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{asked}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8, expected a YAML config{asked}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the config{asked}: {error.strerror}") from None
    node = _compose(text, path)
    if node is None or (isinstance(node, yaml.MappingNode) and not node.value):
        raise UserError(f"{path}: the config is empty, expected keys such as 'task: seg'{asked}")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: found {_WORDS[type(node)]}, expected a mapping of keys such as 'task: seg'")
    return dict(_build(node, path, lambda line: f"{path}:{line}"))


def parse_overrides(overrides: Sequence[str]) -> Layer:
    """Turn `["optim.lr=0.1", "data.crop=[96, 96]"]` into one layer; values are YAML, a later one wins. To replace a
    mapping, empty it first: `["loss.terms={}", "loss.terms.dice=1"]`.

    Raises:
        UserError: no `=`, an empty part of the key, a quoted one, or a value that is not YAML.
    """
    layer: Layer = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"override {text!r}: expected key=value, such as optim.lr=0.05")
        if any(quote in key for quote in "'\""):
            raise UserError(
                f"override {text!r}: keys are not quoted; one that holds a dot goes into braces, such as "
                "norm.overrides={layer4.*: {n_iter: 3}}"
            )
        if parts == ["base"]:
            raise UserError(f"override {text!r}: base can only be written in a config file")
        where = f"override {text!r}"
        node = _compose(value, where)
        one: Any = Leaf(None, "override") if node is None else _build(node, where, lambda _: "override")
        for part in reversed(parts):
            one = {part: one}
        layer = merge(layer, one)
    return layer


def from_plain(data: Any, origin: str) -> Any:
    """Wrap plain containers (a config stored in a checkpoint) as a layer whose leaves all come from `origin`."""
    if isinstance(data, dict) and data:
        return {str(key): from_plain(value, origin) for key, value in data.items()}
    return Leaf(data, origin)


def to_plain(layer: Any) -> Any:
    """The values of a layer, as plain containers."""
    return layer.value if isinstance(layer, Leaf) else {key: to_plain(value) for key, value in layer.items()}


def leaves(layer: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    """Every leaf with its path of keys."""
    if isinstance(layer, Leaf):
        yield path, layer
        return
    for key, value in layer.items():
        yield from leaves(value, (*path, key))


class Instead(dict[str, Any]):
    """A mapping over an empty one, which has emptied what lies below both."""


def merge(below: Layer, above: Layer) -> Layer:
    """`above` over `below`; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if not isinstance(value, dict) or isinstance(value, Instead):
            merged[key] = value
        elif isinstance(under, dict):
            merged[key] = type(under)(merge(under, value))
        else:
            merged[key] = Instead(value) if isinstance(under, Leaf) and under.value == {} else value
    return merged


def dump_line(value: Any) -> str:
    """A plain value as YAML on one line, which reads back as it was."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def load_plain(text: str, where: str) -> Any:
    """The plain containers in a YAML text; `where` names it in errors.

    Raises:
        UserError: not YAML, a value of another kind than plain ones, or a document that `_check` refuses.
    """
    node = _compose(text, where)
    loader = _Loader("")
    try:
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{where}: not a value that may stand here: {_reason(error)}") from None
    finally:
        loader.dispose()


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_reason(error)}") from None
    try:
        node = loader.get_single_node()
        if node is not None:
            _check(node, where, {})
        return node
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {_reason(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep to be read") from None
    finally:
        loader.dispose()


def _check(node: yaml.Node, where: str, sizes: dict[yaml.Node, int]) -> int:
    """How many values a node has once its anchors are unfolded. Raises UserError for one that holds itself, for more
    than MOST_VALUES (a few lines can stand for billions), and for a key that is written twice."""
    if node not in sizes:
        sizes[node] = 0  # being counted
        _check_keys(node, where)
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        sizes[node] = 1 + sum(_check(part, where, sizes) for part in parts)
    line = node.start_mark.line + 1
    if not sizes[node]:
        raise UserError(f"{where}: line {line}: this value holds itself through an anchor (&) of its own")
    if sizes[node] > MOST_VALUES:
        raise UserError(
            f"{where}: line {line}: stands for more than {MOST_VALUES} values, by anchors (&) within anchors"
        )
    return sizes[node]


def _check_keys(node: yaml.Node, where: str) -> None:
    seen: set[str] = set()
    for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        key = str(key_node.value)
        if key in seen and key != "<<":
            raise UserError(f"{where}: line {key_node.start_mark.line + 1}: the key {key!r} is written twice")
        seen.add(key)


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _build(node: yaml.Node, where: str, origin: Any, depth: int = 0) -> Any:
    """A layer from a YAML node; `origin` turns a line number (from 1) into the words a leaf carries."""
    line = node.start_mark.line + 1
    if depth > DEEPEST_NESTING:
        raise UserError(f"{where}: line {line}: nested more than {DEEPEST_NESTING} deep")
    loader = _Loader("")
    try:
        if not isinstance(node, yaml.MappingNode):
            return Leaf(loader.construct_document(node), origin(line))
        loader.flatten_mapping(node)  # resolves `<<: *anchor`
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{where}: line {line}: not a value this config may hold: {_reason(error)}") from None
    finally:
        loader.dispose()
    if not node.value:
        return Leaf({}, origin(line))
    layer: Layer = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}: line {key_node.start_mark.line + 1}: a key must be a word")
        layer[key_node.value] = _build(value_node, where, origin, depth + 1)
    return layer

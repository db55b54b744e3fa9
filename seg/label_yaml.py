"""Label tables from files: `labels.yaml` of a folder of one's own, and the configuration of Mapillary Vistas.

    # labels.yaml: an entry for each value that occurs in the masks
    - {id: 0, name: road, color: [128, 64, 128], train_id: 0}
    - {id: 1, name: curb, color: [196, 196, 196], train_id: 0}     # the same train_id: counted as road
    - {id: 7, name: car, color: [0, 0, 142], train_id: 1}
    - {id: 255, name: void, color: [0, 0, 0], ignore: true}        # neither trained nor scored

`train_id`s are 0, 1, 2, ... without gaps. `category` is optional: the group that category scores count a class in; of
several labels with one train_id the first category counts, in the order of the ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.yaml_layers import load_plain
from seg.label_tables import IGNORE, MAX_CLASSES, Label, LabelTable

_KEYS = ("id", "name", "color", "train_id", "ignore", "category")
_EXAMPLE = "such as `- {id: 0, name: road, color: [128, 64, 128], train_id: 0}`"

GET_MAPILLARY = (
    "Download Mapillary Vistas from https://www.mapillary.com/dataset/vistas (free registration) and unpack it into "
    "this folder."
)


def read_table(path: Path) -> LabelTable:
    """The table in a labels.yaml, named after its folder and file.

    Raises:
        UserError: no such file, no YAML list of entries, or the first thing wrong in one, with file and entry.
    """
    entries = load_plain(_text(path, f"expected a list of labels, {_EXAMPLE}"), str(path))
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of labels, {_EXAMPLE}; found {_kind(entries)}.")
    labels = [_label(path, number, entry) for number, entry in enumerate(entries, 1)]
    return LabelTable(f"{path.parent.name}/{path.name}", checked(path, labels))


def stored_table(plain: Any, source: Path | str) -> LabelTable:
    """The table that `LabelTable.to_plain` made, from the checkpoint `source`.

    Raises:
        UserError: it is not of that form.
    """
    where = f"{source}: its label table"
    if not isinstance(plain, dict) or not isinstance(plain.get("labels"), list):
        raise UserError(f"{where}: found {_kind(plain)}, expected a name and a list of labels.")
    labels = []
    for number, row in enumerate(plain["labels"], 1):
        if not isinstance(row, list) or [type(value) for value in row] != [int, str, list, int, str, bool]:
            raise UserError(f"{where}: entry {number}: found {_kind(row)}, expected id, name, colour, train id, ...")
        try:
            color = _rgb(row[2])
        except ValueError as error:
            raise UserError(f"{where}: entry {number}: colour: {error}.") from None
        ids = (_byte(f"{where}: entry {number}", key, value) for key, value in (("id", row[0]), ("train_id", row[3])))
        labels.append(Label(next(ids), row[1], color, next(ids), row[4], row[5]))
    return LabelTable(str(plain.get("name")), checked(where, labels))


def checked(path: Path | str, labels: Sequence[Label]) -> tuple[Label, ...]:
    """The labels in the order of their ids.

    Raises:
        UserError: an id or name that occurs twice, no class at all, too many, or train ids with gaps.
    """
    ids, names = dict[int, tuple[int, str]](), dict[str, int]()
    for number, label in enumerate(labels, 1):
        where = f"{path}: entry {number} ({label.name!r})"
        if label.id in ids:
            other, name = ids[label.id]
            raise UserError(
                f"{where}: id {label.id} is that of entry {other} ({name!r}) already; an id has one name. Remove one, "
                "or to count several ids as one class give them the same train_id."
            )
        if label.name in names:
            raise UserError(
                f"{where}: the name is that of entry {names[label.name]} already; give each label a name of its own."
            )
        ids[label.id], names[label.name] = (number, label.name), number
    trained = sorted({label.train_id for label in labels if label.train_id != IGNORE})
    if not trained:
        raise UserError(f"{path}: every label is ignored; give at least one a train_id.")
    missing = sorted(set(range(trained[-1] + 1)) - set(trained))
    if missing:
        last = next((n, x) for n, x in enumerate(labels, 1) if x.train_id == trained[-1])
        raise UserError(
            f"{path}: train ids have a gap: {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''} "
            f"missing below {trained[-1]} of entry {last[0]} ({last[1].name!r}); number the classes 0, 1, 2, ... "
            "without gaps."
        )
    if len(trained) > MAX_CLASSES:
        raise UserError(f"{path}: {len(trained)} classes; at most {MAX_CLASSES} fit in 8-bit masks.")
    return tuple(sorted(labels, key=lambda label: label.id))


def mapillary_config(root: Path, chosen: Path | None) -> Path:
    """The configuration of Mapillary Vistas: `chosen` (data.labels), else the newest there is in `root`.

    Raises:
        UserError: there is none.
    """
    names = ("config_v2.0.json", "config_v1.2.json", "config.json")
    found = [root / name for name in names if (root / name).is_file()]
    if chosen is not None:
        return chosen
    if not found:
        raise UserError(f"{root} (data.root): has none of {', '.join(names)}. {GET_MAPILLARY}")
    return found[0]


def read_mapillary(path: Path) -> LabelTable:
    """The table in a configuration of Mapillary Vistas: ids are the places in its list, and what has `evaluate: false`
    is ignored.

    Raises:
        UserError: no such file, or not of this form.
    """
    try:
        entries = json.loads(_text(path, GET_MAPILLARY))["labels"]
        trained = [bool(entry["evaluate"]) for entry in entries]
        labels = [
            Label(i, str(x["readable"]), _rgb(x["color"]), sum(trained[:i]) if trained[i] else IGNORE)
            for i, x in enumerate(entries)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no configuration of Mapillary Vistas ({type(error).__name__}: {error}); expected a list "
            f"`labels` of readable, color, evaluate. {GET_MAPILLARY}"
        ) from None
    return LabelTable(f"Mapillary Vistas ({path.name})", checked(path, labels))


def _label(path: Path, number: int, entry: Any) -> Label:
    where = f"{path}: entry {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: found {_kind(entry)}, expected keys and values, {_EXAMPLE}.")
    if isinstance(entry.get("name"), str):
        where += f" ({entry['name']!r})"
    for key in ("id", "name", "color"):
        if key not in entry:
            raise UserError(f"{where}: has no {key}; expected id, name, color, and train_id or ignore: true.")
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}.")
    name, ignore = entry["name"], entry.get("ignore", False)
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: name: found {name!r}, expected text (in quotes if it looks like something else).")
    if not isinstance(ignore, bool):
        raise UserError(f"{where}: ignore: found {ignore!r}, expected true or false.")
    train_id = _byte(where, "train_id", entry.get("train_id", IGNORE))
    if ignore and train_id != IGNORE:
        raise UserError(f"{where}: has both train_id {train_id} and ignore: true; remove one of them.")
    if not ignore and train_id == IGNORE and "train_id" in entry:
        raise UserError(f"{where}: train_id {IGNORE} is kept for ignored pixels; write ignore: true in its place.")
    if not ignore and train_id == IGNORE:
        raise UserError(f"{where}: has no train_id; give one from 0 on, or ignore: true.")
    category = entry.get("category", "")
    if not isinstance(category, str):
        raise UserError(f"{where}: category: found {category!r}, expected text.")
    try:
        color = _rgb(entry["color"])
    except ValueError as error:
        raise UserError(f"{where}: color: {error}.") from None
    return Label(_byte(where, "id", entry["id"]), name, color, train_id, category)


def _byte(where: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
        raise UserError(f"{where}: {key}: found {value!r}, expected a whole number from 0 to 255 (masks are 8 bit).")
    return value


def _rgb(value: Any) -> tuple[int, int, int]:
    good = isinstance(value, list) and len(value) == 3
    if not good or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in value):
        raise ValueError(f"found {value!r}, expected [red, green, blue], each 0 to 255")
    return value[0], value[1], value[2]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = "no such file" if path.parent.is_dir() else f"no such file, nor is there a folder {path.parent}"
        raise UserError(f"{path}: {found}; {remedy[0].lower() + remedy[1:]}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None

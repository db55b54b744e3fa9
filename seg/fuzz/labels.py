"""Labels: files of label and instance ids, colour masks, label tables, and a data set with bad files in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from seg.fuzz.case import Call, Ran, Wrong, damaged, pick
from seg.fuzz.configs import changed_text
from seg.fuzz.ground import Ground

Array = NDArray[Any]
TABLE = """\
- {id: 0, name: road, color: [128, 64, 128], train_id: 0}
- {id: 1, name: curb, color: [196, 196, 196], train_id: 0, category: flat}
- {id: 7, name: car, color: [0, 0, 142], train_id: 1, category: vehicle}
- {id: 255, name: void, color: [0, 0, 0], ignore: true}
"""
COLORS = {0: (128, 64, 128), 1: (196, 196, 196), 7: (0, 0, 142), 255: (0, 0, 0)}


def make(rng: Generator, folder: Path, count: int, ground: Ground) -> Call:
    """Score a folder of labels, convert masks, or inspect a data set."""
    kind: Callable[[Generator, Path, Ground], Call] = pick(rng, (_scored, _scored, _scored, _converted, _table, _set))
    return kind(rng, folder, ground)


def _scored(rng: Generator, folder: Path, ground: Ground) -> Call:
    """tools/evaluate.py on one prediction and its label, of which one file is odd or damaged."""
    size = pick(rng, ((1, 1), (3, 5), (16, 31)))
    truth = rng.integers(0, 34, size).astype(np.uint8)
    prediction = np.where(rng.random(size) < 0.5, truth, rng.integers(0, 34, size)).astype(np.uint8)
    instances = np.where(truth >= 24, truth.astype(np.uint16) * 1000 + 3, truth).astype(np.uint16)
    stem = folder / "in/truth/aachen_000000_000001_gtFine"
    paths = {
        "prediction": folder / "in/found/aachen_000000_000001_labelIds.png",
        "truth": stem.with_name(f"{stem.name}_labelIds.png"),
        "instances": stem.with_name(f"{stem.name}_instanceIds.png"),
    }
    content = {"prediction": prediction, "truth": truth, "instances": instances}
    for name, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(content[name]).save(path)
    bad, (how, change) = pick(rng, tuple(paths)), pick(rng, _LABELS)
    what = change(paths[bad], content[bad], rng)
    result = folder / "out/scores.json"

    def check(ran: Ran) -> None:
        _counted(paths, result)

    arguments = ["--predictions", str(folder / "in/found"), "--ground-truth", str(folder / "in/truth")]
    return Call(
        "evaluate",
        [*arguments, "--json", str(result)],
        f"{bad}: {what or how}",
        check,
        names=tuple(path.name for path in paths.values()) + (str(folder / "in/found"), str(folder / "in/truth")),
        good=how == "sound",
    )


def _counted(paths: dict[str, Path], result: Path) -> None:
    """The matrix holds the pixels as Pillow decodes them."""
    matrix = np.array(json.loads(result.read_text())["confMatrix"])
    true, found = (np.asarray(Image.open(paths[name])).astype(int) for name in ("truth", "prediction"))
    if true.shape != found.shape or true.ndim != 2:
        raise Wrong(f"scored labels of {true.shape} with a prediction of {found.shape}")
    expected = np.zeros((34, 34), int)
    np.add.at(expected, (true.ravel(), found.ravel()), 1)
    if not np.array_equal(matrix, expected):
        raise Wrong(f"the matrix is not that of the files: {matrix.sum()} of {expected.sum()} pixels")


def _save(path: Path, ids: Array, mode: str | None = None, **options: Any) -> None:
    image = Image.fromarray(ids)
    (image.convert(mode) if mode else image).save(path, "png", **options)


def _damage(path: Path, ids: Array, rng: Generator) -> str:
    data, how = damaged(path.read_bytes(), rng)
    path.write_bytes(data)
    return how


def _palette(path: Path, ids: Array, rng: Generator) -> None:
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette(rng.bytes(768))
    image.save(path)


def _strange(path: Path, ids: Array, rng: Generator) -> None:
    wrong = ids.copy()
    wrong.flat[int(rng.integers(wrong.size))] = pick(rng, (34, 99, 254, 255))
    _save(path, wrong)


def _empty(path: Path, ids: Array, rng: Generator) -> None:
    path.write_bytes(b"")


_LABELS: list[tuple[str, Callable[[Path, Array, Generator], str | None]]] = [
    ("sound", lambda path, ids, rng: None),
    ("damaged", _damage),
    ("damaged", _damage),
    ("damaged", _damage),
    ("unknown ids", _strange),
    ("another size", lambda path, ids, rng: _save(path, np.pad(ids, ((0, 1), (0, 0))))),
    ("turned", lambda path, ids, rng: _save(path, np.ascontiguousarray(ids.T))),
    ("colours", lambda path, ids, rng: _save(path, ids.astype(np.uint8), "RGB")),
    ("grey and alpha", lambda path, ids, rng: _save(path, ids.astype(np.uint8), "LA")),
    ("one bit", lambda path, ids, rng: _save(path, ids.astype(np.uint8), "1")),
    ("16 bits", lambda path, ids, rng: _save(path, ids.astype(np.uint16))),
    ("16 bits, large values", lambda path, ids, rng: _save(path, ids.astype(np.uint16) + 300)),
    ("a transparent id", lambda path, ids, rng: _save(path, ids.astype(np.uint8), transparency=7)),
    ("palette indices", _palette),
    ("JPEG", lambda path, ids, rng: Image.fromarray(ids.astype(np.uint8)).save(path, "jpeg")),
    ("empty", _empty),
    ("missing", lambda path, ids, rng: path.unlink()),
]


def _masks(folder: Path, rng: Generator) -> tuple[Path, Array]:
    """A mask of the table's colours, and its ids."""
    path = folder / "in/masks/a/b.png"
    path.parent.mkdir(parents=True)
    ids = rng.choice(list(COLORS), pick(rng, ((1, 1), (9, 14))))
    colors = np.zeros((*ids.shape, 3), np.uint8)
    for label, color in COLORS.items():
        colors[ids == label] = color
    Image.fromarray(colors).save(path)
    return path, ids


def _converted(rng: Generator, folder: Path, ground: Ground) -> Call:
    """tools/convert_masks.py on a mask that is sound, damaged, or of other colours."""
    path, ids = _masks(folder, rng)
    how = pick(rng, ("sound", "damaged", "damaged", "smooth"))
    what = how
    if how == "damaged":
        what = _damage(path, ids, rng)
    if how == "smooth":
        Image.open(path).resize((40, 30), Image.Resampling.BILINEAR).save(path, "jpeg")
    (folder / "in/labels.yaml").write_text(TABLE)
    result = folder / "out/ids/a/b.png"

    def check(ran: Ran) -> None:
        colors = np.asarray(Image.open(path).convert("RGB"))
        found = np.asarray(Image.open(result))
        shown = np.zeros_like(colors)
        for label, color in COLORS.items():
            shown[found == label] = color
        if not np.array_equal(shown, colors) or (how == "sound" and not np.array_equal(found, ids)):
            raise Wrong("the ids are not those of the mask's colours")

    arguments = [str(folder / "in/masks"), str(folder / "out/ids"), "--labels", str(folder / "in/labels.yaml")]
    # 30 x 40 pixels of one colour are still of that colour
    return Call("convert_masks", arguments, f"mask: {what}", check, names=("b.png",), good=how == "sound")


def _table(rng: Generator, folder: Path, ground: Ground) -> Call:
    """tools/convert_masks.py with a labels.yaml that was changed."""
    path, ids = _masks(folder, rng)
    data, what = changed_text(TABLE, rng, folder)
    table = folder / "in/labels.yaml"
    table.write_bytes(data)
    result = folder / "out/ids/a/b.png"

    def check(ran: Ran) -> None:
        found = np.asarray(Image.open(result))
        if found.shape != ids.shape:
            raise Wrong(f"ids of {found.shape} for a mask of {ids.shape}")

    arguments = [str(folder / "in/masks"), str(folder / "out/ids"), "--labels", str(table)]
    return Call("convert_masks", arguments, f"labels.yaml: {what}", check, names=("labels.yaml", "b.png"))


def _set(rng: Generator, folder: Path, ground: Ground) -> Call:
    """tools/inspect.py on a data set in which one file is damaged."""
    root = folder / "in/data"
    shutil.copytree(ground.data, root)
    path = pick(rng, sorted(path for path in root.rglob("*.png") if "/test/" not in str(path)))
    data, what = damaged(path.read_bytes(), rng)
    path.write_bytes(data)

    def check(ran: Ran) -> None:
        try:
            image = Image.open(path)
            image.load()
        except Exception as error:  # the decoders raise whatever they like on damaged files
            if path.name not in ran.out and "instanceIds" not in path.name and "color" not in path.name:
                raise Wrong(f"{path.name} is not told of, which Pillow can't read: {error}") from None

    return Call("inspect", [f"data.root={root}"], f"{path.relative_to(root)}: {what}", check, names=(str(root),))

"""Renders the sample data set: street scenes with all 19 classes in the full Cityscapes layout.

python tools/make_sample.py data/sample --size 256x512 --train 96 --val 24 --test 6 --seed 0

One list of polygons describes a scene. cityscapesscripts' own tools rasterise it into label and instance images, OpenCV
paints the picture, so that the JSON polygons, the labels and the picture belong together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cityscapesscripts.helpers.annotation import Annotation, CsPoly
from cityscapesscripts.helpers.labels import labels, name2label
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from numpy.random import Generator
from numpy.typing import NDArray

from engine.errors import UserError
from seg.sample_paint import paint
from seg.sample_scene import EVERYWHERE, TURNS, Scene, compose

Bytes = NDArray[np.uint8]

COUNTS: Mapping[str, int] = {"train": 96, "val": 24, "test": 6}
SIZE = (256, 512)
SMALLEST, LARGEST = (64, 128), (1024, 2048)
CITIES = {"train": ("alderby", "brookton", "corvale"), "val": ("dunmere", "eastwick"), "test": ("fallowham",)}
ATTEMPTS = 24
FORMAT = 1  # to be raised when the same parameters give other pictures
# Share of the picture from which on a class is taken as well seen; the others need 0.004.
SEEN = {
    "traffic light": 0.001, "traffic sign": 0.0015, "rider": 0.002, "pole": 0.003, "person": 0.003, "bicycle": 0.003,
    "motorcycle": 0.003, "wall": 0.003, "fence": 0.003, "car": 0.006, "terrain": 0.006,
}  # fmt: skip
NOTE = "Procedurally generated street scenes: synthetic data, no photographs. Rendered by tools/make_sample.py."


def parse_size(text: str) -> tuple[int, int]:
    """'256x512' -> (256, 512), height and width in pixels. Raises UserError for anything else."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"size {text!r} is not HEIGHTxWIDTH in pixels, for example 256x512")
    return int(parts[0]), int(parts[1])


def _check(size: tuple[int, int], counts: Mapping[str, int], seed: int) -> None:
    height, width = size
    if not (SMALLEST[0] <= height <= LARGEST[0] and SMALLEST[1] <= width <= LARGEST[1]) or not 1 <= width / height <= 4:
        raise UserError(
            f"size {height}x{width} can't be rendered: expected HEIGHTxWIDTH from {SMALLEST[0]}x{SMALLEST[1]} to "
            f"{LARGEST[0]}x{LARGEST[1]} with a width of one to four heights"
        )
    for split, count in counts.items():
        if split not in CITIES:
            raise UserError(f"no split {split!r} in the sample data set; it has train, val and test")
        if count < 0 or count > 99999:
            raise UserError(f"{count} {split} images were asked for; expected 0 to 99999")
    if seed < 0:
        raise UserError(f"seed {seed} is below 0; expected 0 or more")
    if not any(counts.values()):
        raise UserError("no images were asked for: set at least one of train, val and test above 0")


def _claim(root: Path, record: dict[str, Any]) -> None:
    """Take the folder: it is new, empty, or holds these very data; sample.json says so from now on."""
    path = root / "sample.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = json.loads(path.read_text())
            if found != record:
                keys = [key for key in record if not isinstance(found, dict) or found.get(key) != record[key]]
                raise UserError(
                    f"{root} holds sample data with other parameters ({', '.join(keys)} differ, see sample.json "
                    f"there): delete it or choose another folder"
                )
        elif any(root.iterdir()):
            raise UserError(f"{root} is not empty and holds no sample.json, so no sample data: choose a new folder")
        path.write_text(json.dumps(record, indent=2) + "\n")
    except FileExistsError:
        raise UserError(f"{root} is a file; a folder is needed to write the sample data into") from None
    except ValueError:
        raise UserError(f"{path} is not readable as JSON: delete the folder or choose another one") from None
    except OSError as error:
        raise UserError(f"can't write the sample data to {root}: {error.strerror or error}") from None


def annotation(scene: Scene, size: tuple[int, int]) -> dict[str, Any]:
    """The scene's labelled polygons as Cityscapes' JSON object, in whole pixels; those out of sight are left out."""
    height, width = size
    objects = []
    for shape in (*scene.ground, *scene.standing):
        if shape.label is None:
            continue
        for poly in shape.polys:
            points = np.round(_clipped(poly * width - 0.5, width, height)).astype(int)
            if len(points) > 2:
                objects.append({"label": shape.label, "polygon": points.tolist()})
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def _clipped(poly: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """The polygon (N, 2) cut to the picture and a margin of a tenth around it, where the cut doesn't show."""
    low, high = poly.min(0), poly.max(0)
    if high[0] < 0 or high[1] < 0 or low[0] >= width or low[1] >= height:
        return poly[:0]
    for axis, size in ((0, width), (1, height)):
        if low[axis] >= -0.1 * size and high[axis] <= 1.1 * size:
            continue
        for bound, sign in ((-0.1 * size, 1.0), (1.1 * size, -1.0)):
            inside = (poly[:, axis] - bound) * sign >= 0
            if inside.all():
                continue
            poly = _half(poly, inside, axis, bound)
            if not len(poly):
                return poly
    return poly


def _half(poly: NDArray[np.float64], inside: NDArray[np.bool_], axis: int, bound: float) -> NDArray[np.float64]:
    """The part of a polygon on the inner side of a line along an axis."""
    points = []
    for n, (point, kept) in enumerate(zip(poly, inside, strict=True)):
        before = poly[n - 1]
        if kept != inside[n - 1]:
            share = (bound - before[axis]) / (point[axis] - before[axis])
            points.append(before + share * (point - before))
        if kept:
            points.append(point)
    return np.array(points).reshape(-1, 2)


def rasterise(polygons: Mapping[str, Any]) -> tuple[Bytes, NDArray[np.uint16]]:
    """Label ids (height, width) uint8 and instance ids uint16 of a JSON object, by cityscapesscripts' own functions."""
    parsed = Annotation()
    parsed.imgHeight, parsed.imgWidth = polygons["imgHeight"], polygons["imgWidth"]
    for thing in polygons["objects"]:
        entry = CsPoly()
        entry.label, entry.polygon = thing["label"], [tuple(point) for point in thing["polygon"]]
        parsed.objects.append(entry)
    ids, instances = createLabelImage(parsed, "ids"), createInstanceImage(parsed, "ids")
    return np.asarray(ids, np.uint8), np.asarray(instances).astype(np.uint16)


def _shows(scene: Scene, wanted: frozenset[str]) -> float:
    """How many of the wanted classes can be seen well, from 0 to 1, judged at a small size."""
    size = (max(64, round(160 * scene.camera.aspect)), 160)
    ids, _ = rasterise(annotation(scene, size))
    share = np.bincount(ids.ravel(), minlength=len(labels)) / ids.size
    seen = [share[name2label[name].id] / SEEN.get(name, 0.004) for name in sorted(wanted)]
    return float(np.mean(np.minimum(seen, 1)))


def make_scene(seed: int, split: str, index: int, aspect: float) -> tuple[Scene, Generator]:
    """The scene of one image and the generator that paints it; depends on these arguments alone.

    Streets are drawn until one shows all the classes whose turn it is: any two neighbours of a split hold all 19.
    """
    wanted = EVERYWHERE | TURNS[index % len(TURNS)]
    drawn: list[tuple[float, Scene, Generator]] = []
    while len(drawn) < ATTEMPTS and not (drawn and drawn[-1][0] == 1):
        rng = np.random.default_rng([seed, list(CITIES).index(split), index, len(drawn)])
        scene = compose(rng, aspect, wanted)
        drawn.append((_shows(scene, wanted), scene, rng))
    _, scene, rng = max(drawn, key=lambda one: one[0])
    return scene, rng


def _hidden(size: tuple[int, int]) -> dict[str, Any]:
    """What the test split's ground truth says, as in Cityscapes: nothing but regions that are not scored."""
    height, width = size
    full = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    top = height * 15 // 16
    bonnet = [[0, height - 1], [width // 8, top], [width * 7 // 8, top], [width - 1, height - 1]]
    objects = [{"label": "out of roi", "polygon": full}, {"label": "ego vehicle", "polygon": bonnet}]
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def _write_png(path: Path, image: NDArray[Any]) -> None:
    """Write grey, RGB or RGBA pixels."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    _, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    path.write_bytes(data.tobytes())


def _render_one(root: Path, split: str, index: int, size: tuple[int, int], seed: int) -> None:
    """Write the picture and the four ground-truth files of one image."""
    scene, rng = make_scene(seed, split, index, size[0] / size[1])
    city = CITIES[split][index % len(CITIES[split])]
    stem = f"{city}_{index:06d}_000019"
    polygons = _hidden(size) if split == "test" else annotation(scene, size)
    ids, instances = rasterise(polygons)
    colours = np.zeros((256, 4), np.uint8)
    for label in labels:
        if label.id >= 0:
            colours[label.id] = (*label.color, 255)
    image, truth = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    for folder in (image, truth):
        folder.mkdir(parents=True, exist_ok=True)
    _write_png(image / f"{stem}_leftImg8bit.png", paint(scene, size, rng))
    _write_png(truth / f"{stem}_gtFine_labelIds.png", ids)
    _write_png(truth / f"{stem}_gtFine_instanceIds.png", instances)
    _write_png(truth / f"{stem}_gtFine_color.png", colours[ids])
    (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))


def render(
    root: Path | str, *, seed: int = 0, size: tuple[int, int] = SIZE, counts: Mapping[str, int] | None = None
) -> Path:
    """Render the sample data set into the folder `root`, and say so in its sample.json; returns the folder.

    seed: the same seed gives the same bytes; an image does not depend on how many others there are.
    size: height and width in pixels. counts: images of 'train', 'val' and 'test'; those not named get none.
    Rendering again into the same folder with the same arguments is fine.

    Raises UserError for a size or counts that can't be rendered, a folder that can't be written to, or one that holds
    anything else.
    """
    root, counts = Path(root), dict(COUNTS if counts is None else counts)
    _check(size, counts, seed)
    counts = {split: counts.get(split, 0) for split in CITIES}
    record = {"about": NOTE, "synthetic": True, "format": FORMAT, "seed": seed, "size": list(size), "counts": counts}
    _claim(root, record)
    try:
        for split, count in counts.items():
            for index in range(count):
                _render_one(root, split, index, size, seed)
    except OSError as error:
        raise UserError(f"can't write the sample data to {root}: {error.strerror or error}") from None
    return root

"""The label table of an experiment, and the PNGs that hold labels.

Three kinds of ids meet in this package: *label ids* (what a data set's masks hold, in predictions and in the scorer;
Cityscapes' are 0-33), *train ids* (0 .. C - 1 and 255 = ignored, what a network sees) and *instance ids* (Cityscapes'
`_instanceIds.png`, 16 bit: label id * 1000 + number for a single object, the plain label id elsewhere). The constants
and functions in capitals or without a table are Cityscapes'; `table` gives the experiment's.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.errors import UserError
from engine.images import checksums_hold
from seg.label_tables import CITYSCAPES, TABLES, Ids, LabelTable
from seg.label_tables import IGNORE as IGNORE
from seg.label_tables import Label as Label

if TYPE_CHECKING:
    from seg.config import DataConfig

NUM_LABELS = len(CITYSCAPES.labels)
"""Label ids are 0 .. NUM_LABELS - 1 (the license plate, -1, is in no image)."""
MAX_PIXELS = 100_000_000
"""Label files with more pixels are refused before they are decoded."""

LABEL_NAMES: tuple[str, ...] = tuple(label.name for label in CITYSCAPES.labels)
"""Name of each label id."""
LABEL_COLORS: Ids = np.array([label.color for label in CITYSCAPES.labels], np.uint8)
"""RGB colour of each label id, uint8 (34, 3)."""
TRAIN_CLASSES: tuple[str, ...] = CITYSCAPES.classes
"""Name of each of the 19 train ids."""
TRAIN_COLORS: Ids = CITYSCAPES.colors
"""RGB colour of each train id, uint8 (19, 3)."""
TRAIN_LABEL_IDS: tuple[int, ...] = CITYSCAPES.label_ids
"""Label id of each train id; these are the label ids that are evaluated."""
CATEGORIES: dict[str, tuple[int, ...]] = CITYSCAPES.categories
"""Category name -> all its label ids, in the official order (void first)."""
INSTANCE_LABEL_IDS: tuple[int, ...] = tuple(label.id for label in CITYSCAPES.labels if label.has_instances)
"""Label ids of which single objects are told apart."""


def table(cfg: DataConfig) -> LabelTable:
    """The label table of an experiment's data set; for `mapillary` and `folder` it is read from the file.

    Raises:
        UserError: the file is missing or wrong (see `seg.label_yaml`).
    """
    if cfg.name in TABLES:
        return TABLES[cfg.name]
    from seg import label_yaml

    if cfg.name == "mapillary":
        return label_yaml.read_mapillary(label_yaml.mapillary_config(cfg.root, cfg.labels))
    return label_yaml.read_table(cfg.labels or cfg.root / "labels.yaml")


def table_of(meta: Mapping[str, Any], source: Path | str = "checkpoint") -> LabelTable:
    """The table that a network was trained with, from the meta data of its checkpoint; Cityscapes' if there is none.

    Raises:
        UserError: what is stored is no table; `source` is named.
    """
    if "labels" not in meta:
        return CITYSCAPES
    from seg import label_yaml

    return label_yaml.stored_table(meta["labels"], source)


def scored_table(cfg: DataConfig, meta: Mapping[str, Any], source: Path | str) -> LabelTable:
    """The experiment's table, which scores the checkpoint `source` with this meta data.

    Raises:
        UserError: the network predicts other classes, or as `table`.
    """
    ours, its = table(cfg), table_of(meta)
    if ours.classes != its.classes:
        first = next((pair for pair in zip(its.classes, ours.classes, strict=False) if pair[0] != pair[1]), ("", ""))
        differ = f"; the first that differs is {first[0]!r}, here {first[1]!r}" if first[0] else ""
        raise UserError(
            f"{source}: predicts the {its.num_classes} classes of {its.name}, but data.name={cfg.name} at {cfg.root} "
            f"scores {ours.num_classes}{differ}; choose a data set with the same classes."
        )
    return ours


def check_unchanged(cfg: DataConfig, meta: Mapping[str, Any], source: Path | str) -> None:
    """Raises UserError where the training of the checkpoint `source`, with this meta data, would go on with other
    labels: other classes, or an id that is trained as another one (names and colours of single ids may change)."""
    tables = table_of(meta), scored_table(cfg, meta, source)
    then, now = ({one.id: one.train_id for one in each.labels} for each in tables)
    differing = [id for id in sorted({**then, **now}) if then.get(id, IGNORE) != now.get(id, IGNORE)]
    if differing:

        def told(train_id: int) -> str:
            return "ignored" if train_id == IGNORE else f"of {tables[0].classes[train_id]!r}"

        shown = [f"id {id} was {told(then.get(id, IGNORE))}, now {told(now.get(id, IGNORE))}" for id in differing[:5]]
        raise UserError(
            f"{source}: was trained with other labels: {', '.join(shown)}{', ...' if len(differing) > 5 else ''}; put "
            f"those of {tables[1].name} back as they were, or start anew in another --work-dir"
        )


def to_train_ids(label_ids: Ids, path: Path | str) -> Ids:
    """`LabelTable.to_train_ids` of Cityscapes."""
    return CITYSCAPES.to_train_ids(label_ids, path)


def to_label_ids(train_ids: Ids) -> Ids:
    """`LabelTable.to_label_ids` of Cityscapes: 255 becomes 0, 'unlabeled'."""
    return CITYSCAPES.to_label_ids(train_ids)


def unknown_ids(path: Path | str, counts: Mapping[int, int]) -> UserError:
    """`LabelTable.unknown_ids` of Cityscapes."""
    return CITYSCAPES.unknown_ids(path, counts)


def colors_to_ids(colors: npt.NDArray[np.uint8], table: LabelTable, path: Path | str) -> Ids:
    """Label ids, uint8 (H, W), of a mask that shows labels in the table's colours, RGB uint8 (H, W, 3).

    Raises:
        UserError: ids in place of colours, a colour that the table doesn't have, or that labels share which don't count
            as the same; `path` is named.
    """
    codes: dict[int, list[Label]] = {}
    for label in table.labels:
        code = (label.color[0] << 16) + (label.color[1] << 8) + label.color[2]
        codes.setdefault(code, []).append(label)
    packed = (colors.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(2)
    present, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    ids = np.zeros(len(present), np.uint8)
    for place, (code, count) in enumerate(zip(present.tolist(), counts.tolist(), strict=True)):
        found = codes.get(code, [])
        shown = f"({code >> 16}, {code >> 8 & 255}, {code & 255})"
        if not found:
            remedy = (
                "But the mask is grey and all of its values are ids of that table: it seems to hold label ids already. "
                "In a PNG of one channel they need no conversion; if it has several, add --ids to take one of them."
                if _like_ids(present, table)
                else "Enter it in the label table; colours between two others come from a mask that was resized "
                "smoothly or saved as JPEG."
            )
            raise UserError(
                f"{path}: {count} pixels have the colour {shown}, which no label of {table.name} has. {remedy}"
            )
        meant = _meant(found, table)
        if meant is None:
            raise UserError(
                f"{path}: the colour {shown} is that of both {found[0].name!r} and {found[1].name!r} in the labels of "
                f"{table.name}; give each label a colour of its own."
            )
        ids[place] = meant.id
    return ids[inverse].reshape(colors.shape[:2])


def channel_of_ids(channels: npt.NDArray[np.uint8], table: LabelTable, path: Path | str) -> Ids:
    """Label ids, uint8 (H, W), of a mask whose channels all hold them, uint8 (H, W, 3).

    Raises:
        UserError: channels that differ, or ids that the table doesn't have; `path` is named.
    """
    ids = np.ascontiguousarray(channels[..., 0])
    if (channels != ids[..., None]).any():
        raise UserError(f"{path}: has colours, so its channels do not all hold label ids; leave out --ids.")
    table.to_train_ids(ids, path)
    return ids


def _like_ids(codes: npt.NDArray[np.uint32], table: LabelTable) -> bool:
    """Whether colours (red, green, blue as the bytes of a number) are grey and each the id of a label."""
    grey = codes & 255
    return bool((codes == grey * 0x010101).all() and np.isin(grey, [label.id for label in table.labels]).all())


def _meant(found: Sequence[Label], table: LabelTable) -> Label | None:
    """The one of the labels with the same colour that a pixel of it gets; None where they do not count as the same.

    The tables of data sets are fixed: there a class goes before an ignored label (Cityscapes paints 'polegroup' as
    'pole').
    """
    fixed = table in TABLES.values()
    classes = [label for label in found if label.train_id != IGNORE]
    chosen = classes if classes and fixed else found
    return chosen[0] if len({label.train_id for label in chosen}) == 1 else None


def read_label_ids(path: Path) -> Ids:
    """The label ids of a one-channel PNG (grey or palette indices), uint8 (H, W); the ids themselves are not checked.

    Raises:
        UserError: unreadable, empty, truncated, too large, not a PNG, or a colour image.
    """
    ids = _read_png(path)
    if ids.dtype != np.uint8 and not 0 <= ids.min() <= ids.max() <= 255:
        raise UserError(f"{path}: holds values up to {ids.max()}, so these are no label ids (instance ids?).")
    return ids.astype(np.uint8, copy=False)


def read_instance_ids(path: Path) -> npt.NDArray[np.integer[Any]]:
    """The instance ids of an `_instanceIds.png` (16 bit grey), uint16 (H, W); uint8 from a file of 8 bits.

    Raises:
        UserError: as in `read_label_ids`.
    """
    return _read_png(path)


def read_bytes(path: Path) -> bytes:
    """A file's content; UserError when it cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if not data:
        raise UserError(f"{path}: is empty (zero bytes). Unpack or write it again.")
    return data


def png_header(path: Path, data: bytes) -> tuple[int, int] | None:
    """(bit depth, colour type) of a PNG, None when `data` is no PNG.

    Raises:
        UserError: a truncated header, or more than MAX_PIXELS pixels (checked before anything is decoded).
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    if len(data) < 33:
        raise damaged(path)
    width, height, depth, color = struct.unpack(">IIBB", data[16:26])
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path}: says that it has {width} x {height} pixels; more than {MAX_PIXELS} are refused "
            "(a decompression bomb?). Replace the file."
        )
    return depth, color


def damaged(path: Path) -> UserError:
    """The error for a file that doesn't decode."""
    return UserError(f"{path}: is truncated or damaged. Unpack or write it again.")


def _read_png(path: Path) -> npt.NDArray[Any]:
    """One-channel PNG as stored: uint8, uint16 or (rare modes) what PIL makes of it."""
    data = read_bytes(path)
    header = png_header(path, data)
    if header is None:
        raise UserError(f"{path}: is no PNG file; labels must be PNGs with one channel.")
    depth, color = header
    if color not in (0, 3):
        kind = {2: "RGB colours", 4: "grey and alpha", 6: "RGBA colours"}.get(color, "an unknown colour type")
        raise UserError(
            f"{path}: holds {kind}; expected one channel of label ids. Colour pictures (_color.png) can't be used "
            "here. Convert masks that show labels as colours: `python tools/convert_masks.py MASKS OUT --labels "
            "labels.yaml`, with --ids such whose channels all hold the label ids."
        )
    if color == 0 and depth >= 8:
        ids = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if ids is None:
            raise damaged(path)
        if ids.ndim == 2:
            return ids
    try:  # palette indices, fewer than 8 bits, grey with a transparent value: cv2 would turn them into something else
        with Image.open(io.BytesIO(data)) as image:
            ids = np.array(image)
            if color == 0 and depth < 8:  # PIL spreads grey of 2 and 4 bits over 0 to 255
                ids = ids.astype(np.uint8) // {1: 1, 2: 85, 4: 17}[depth]
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged(path) from error
    if not checksums_hold(io.BytesIO(data)):
        raise damaged(path)
    return ids

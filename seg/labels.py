"""The Cityscapes label tables, and the label PNGs that hold them.

Three kinds of ids meet in this package: *label ids* (0-33, in the `_labelIds.png` files, in predictions and in the
scorer), *train ids* (0-18 and 255 = ignored, what a network sees) and *instance ids* (`_instanceIds.png`, 16 bit:
label id * 1000 + number for a single object, the plain label id elsewhere). The tables are those of cityscapesscripts.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from cityscapesscripts.helpers.labels import labels as _TABLE
from PIL import Image

from engine.errors import UserError

Ids = npt.NDArray[np.uint8]

IGNORE = 255
"""Train id of pixels that count neither in the loss nor in the scores."""
NUM_LABELS = 34
"""Label ids are 0 .. NUM_LABELS - 1 (the license plate, -1, is in no image)."""
MAX_PIXELS = 100_000_000
"""Label files with more pixels are refused before they are decoded."""

_LABELS = sorted((label for label in _TABLE if label.id >= 0), key=lambda label: label.id)
_TRAINED = sorted((label for label in _LABELS if label.trainId != IGNORE), key=lambda label: label.trainId)

LABEL_NAMES: tuple[str, ...] = tuple(label.name for label in _LABELS)
"""Name of each label id."""
LABEL_COLORS: Ids = np.array([label.color for label in _LABELS], np.uint8)
"""RGB colour of each label id, uint8 (34, 3)."""
TRAIN_CLASSES: tuple[str, ...] = tuple(label.name for label in _TRAINED)
"""Name of each of the 19 train ids."""
TRAIN_COLORS: Ids = np.array([label.color for label in _TRAINED], np.uint8)
"""RGB colour of each train id, uint8 (19, 3)."""
TRAIN_LABEL_IDS: tuple[int, ...] = tuple(label.id for label in _TRAINED)
"""Label id of each train id; these are the label ids that are evaluated."""
CATEGORIES: dict[str, tuple[int, ...]] = {}
"""Category name -> all its label ids, in the official order (void first)."""
for _label in _LABELS:
    CATEGORIES[_label.category] = (*CATEGORIES.get(_label.category, ()), _label.id)
INSTANCE_LABEL_IDS: tuple[int, ...] = tuple(label.id for label in _LABELS if label.hasInstances)
"""Label ids of which single objects are told apart."""

_UNKNOWN = 254
_TO_TRAIN = np.full(256, _UNKNOWN, np.uint8)
_TO_TRAIN[: len(_LABELS)] = [label.trainId for label in _LABELS]
_TO_LABEL = np.full(256, _UNKNOWN, np.uint8)
_TO_LABEL[: len(TRAIN_LABEL_IDS)] = TRAIN_LABEL_IDS
_TO_LABEL[IGNORE] = 0


def to_train_ids(label_ids: Ids, path: Path | str) -> Ids:
    """Train ids (uint8, 255 where ignored) of a uint8 array of label ids.

    Raises:
        UserError: an id that the official table doesn't know; `path` is named in the message.
    """
    train_ids = _TO_TRAIN[label_ids]
    if (train_ids == _UNKNOWN).any():
        values, counts = np.unique(label_ids[train_ids == _UNKNOWN], return_counts=True)
        raise unknown_ids(path, dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return train_ids


def to_label_ids(train_ids: Ids) -> Ids:
    """Label ids (uint8) of a uint8 array of train ids; 255 becomes 0, 'unlabeled'.

    Raises:
        ValueError: a value that is neither one of the 19 train ids nor 255.
    """
    label_ids = _TO_LABEL[train_ids]
    if (label_ids == _UNKNOWN).any():
        raise ValueError(f"not train ids: {np.unique(train_ids[label_ids == _UNKNOWN]).tolist()}")
    return label_ids


def unknown_ids(path: Path | str, counts: Mapping[int, int]) -> UserError:
    """The error for label ids outside the table; `counts` gives the pixels of each such id."""
    shown = ", ".join(f"{i} ({n} pixels)" for i, n in list(counts.items())[:5]) + (", ..." if len(counts) > 5 else "")
    hint = " 255 is the ignored *train* id: this looks like a train-id PNG." if IGNORE in counts else ""
    return UserError(
        f"{path}: unknown label ids {shown}; Cityscapes label ids are 0 to {NUM_LABELS - 1}, without gaps.{hint} "
        "Write label ids (as in the _labelIds.png files, seg.labels.to_label_ids)."
    )


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
            f"{path}: holds {kind}; expected one channel of label ids. Colour pictures (_color.png) can't be used here."
        )
    if color == 0 and depth >= 8:
        ids = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if ids is None:
            raise damaged(path)
        if ids.ndim == 2:
            return ids
    try:  # palette indices, fewer than 8 bits, grey with a transparent value: cv2 would turn them into something else
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image).astype(np.uint8) if image.mode == "1" else np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged(path) from error

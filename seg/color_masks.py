"""Masks that show labels as colours, or hold label ids in each of several channels, turned into masks of label ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError
from engine.images import Found, check_writable, find_images, read_image, show, write_png
from seg.labels import Ids, LabelTable, channel_of_ids, colors_to_ids, png_header, read_bytes, read_label_ids

_SEVERAL = (2, 4, 6)
"""PNG's colour types with several channels: RGB, grey and alpha, RGBA."""


def convert_masks(masks: Path, out: Path, table: LabelTable, ids: bool = False) -> int:
    """Write a PNG of label ids for each colour image below `masks`, at the same place below `out`; how many there are.
    With `ids` their channels are no colours but hold the label ids.

    Raises:
        UserError: no images, a colour or id that the table doesn't have (its file is named), `out` can't be written or
            is the folder of the masks itself, or a mask would be overwritten.
    """
    if not masks.is_dir():
        raise UserError(f"{masks}: no such folder; expected one with colour masks.")
    if out.resolve() == masks.resolve():
        raise UserError(f"{out}: is the folder of the masks, which would be overwritten; name another one.")
    folder = Path(os.path.realpath(out))
    inside = Path(os.path.realpath(masks)).is_relative_to(folder)  # all masks are below `out`, and none is an output
    found, problems = find_images([masks], None if inside else lambda path, named: path.is_relative_to(folder))
    if problems or not found:
        raise UserError("; ".join(problems) or f"{masks}: no image in it.")
    _check_targets(found, out)
    check_writable(out)
    for item in found:
        if ids:
            converted = _channel(item.path, table)
        else:  # what lies below transparent pixels is their label, not white
            converted = colors_to_ids(read_image(item.path, opaque=True), table, item.path)
        write_png(_target(item, out), converted, inside=out)
    return len(found)


def _target(item: Found, out: Path) -> Path:
    return out / f"{item.name}.png"


def _check_targets(found: Sequence[Found], out: Path) -> None:
    """Raises UserError where a mask, or the file that a link among the masks leads to, would be overwritten."""
    masks = {place: item.path for item in found for place in (_place(item.path), Path(os.path.realpath(item.path)))}
    for item in found:
        target = _target(item, out)
        if (mask := masks.get(_place(target))) is not None:
            led = f", where the link {show(mask)} leads," * (_place(mask) != _place(target))
            raise UserError(
                f"{show(target)}{led} is one of the masks and would be overwritten by the ids of {show(item.path)}; "
                "name another folder to write to."
            )


def _place(path: Path) -> Path:
    """Where a file is written: a link there is replaced, not followed."""
    return Path(os.path.realpath(path.parent), path.name)


def _channel(path: Path, table: LabelTable) -> Ids:
    """The label ids of a PNG, which may hold them in each of its channels."""
    header = png_header(path, read_bytes(path))
    if header is None or (header[0] != 8 and header[1] in _SEVERAL):
        raise UserError(f"{path}: is no PNG of 8 bits a channel, as --ids wants it; save the ids in such a one.")
    if header[1] in _SEVERAL:
        return channel_of_ids(read_image(path, opaque=True), table, path)
    ids = read_label_ids(path)
    table.to_train_ids(ids, path)  # which looks for unknown ones
    return ids

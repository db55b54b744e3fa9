"""Masks that show labels as colours, turned into masks of label ids."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError
from engine.images import check_writable, find_images, read_image, write_png
from seg.labels import LabelTable, colors_to_ids


def convert_masks(masks: Path, out: Path, table: LabelTable) -> int:
    """Write a PNG of label ids for each colour image below `masks`, at the same place below `out`; how many there are.

    Raises:
        UserError: no images, a colour that the table doesn't have (its file is named), `out` can't be written or is the
            folder of the masks itself.
    """
    if not masks.is_dir():
        raise UserError(f"{masks}: no such folder; expected one with colour masks.")
    if out.resolve() == masks.resolve():
        raise UserError(f"{out}: is the folder of the masks, which would be overwritten; name another one.")
    found, problems = find_images([masks], own=[out])
    if problems or not found:
        raise UserError("; ".join(problems) or f"{masks}: no image in it.")
    check_writable(out)
    for item in found:
        colors = read_image(item.path, opaque=True)  # what lies below transparent pixels is their label, not white
        write_png(out / f"{item.name}.png", colors_to_ids(colors, table, item.path), inside=out)
    return len(found)

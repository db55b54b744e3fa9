"""What `seg.inspect_data` found, as text for a console and as a page with pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

from engine.images import show
from seg import draw
from seg.data import read_rgb
from seg.html import chart, listing, page, paragraph, picture, row, section, table
from seg.inspect_data import Entry, Inspection
from seg.labels import IGNORE, LabelTable, read_label_ids
from seg.own_data import division

NOTES = (
    "rare class",
    "class that never occurs",
    "images of several sizes",
    "image that is almost black",
    "images turned by their EXIF orientation",
)
"""Kinds of problems that are no mistakes."""
_SHOWN = 5
_SHOWN_ON_PAGE = 200
_SPREAD, _RAREST = 3, 3


def mistakes(found: Inspection) -> int:
    """How many problems there are that should be put right before training."""
    return sum(problem.kind not in NOTES for problem in found.problems)


def text(found: Inspection) -> str:
    """The whole report in plain text."""
    lines = [_title(found), "", *_aligned(*_split_rows(found)), "", *_aligned(*_class_rows(found))]
    lines[1:1] = filter(None, [division(found.data)])
    colours = found.colours(found.data.train_split)
    if colours:
        lines += ["", "RGB of the training images: mean {}, std {}".format(*map(_three, colours))]
    kinds = _by_kind(found)
    lines += ["", _counted(found)]
    for kind, texts in kinds.items():
        lines.append(f"  {kind} ({len(texts)})")
        lines += [f"    {one}" for one in texts[:_SHOWN]]
        lines += [f"    ... and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return "\n".join(map(show, lines))


def document(found: Inspection) -> str:
    """The page."""
    head = f"{_counted(found)}."
    problems = [
        section(
            f"{kind} ({len(texts)})",
            listing(texts[:_SHOWN_ON_PAGE]),
            *([paragraph(f"and {len(texts) - _SHOWN_ON_PAGE} more")] if len(texts) > _SHOWN_ON_PAGE else []),
            level=3,
        )
        for kind, texts in _by_kind(found).items()
    ]
    colours = found.colours(found.data.train_split)
    words = "Mean {} and standard deviation {} of R, G, B in the training images.".format(
        *map(_three, colours or ([], []))
    )
    remarks = [division(found.data), words if colours else ""]
    return page(
        f"Data set {_title(found)}",
        section("Splits", table(*_split_rows(found)), *map(paragraph, filter(None, remarks))),
        section("Problems and notes", paragraph(head, wrong=mistakes(found) > 0), *problems),
        section("Classes", table(*_class_rows(found)), _shares(found)),
        *([section("Cities", table(*_city_rows(found)))] if _has_cities(found) else []),
        section("Ids found", table(*_id_rows(found))),
        section("Images with their labels", *_pictures(found)),
    )


def _counted(found: Inspection) -> str:
    wrong, notes = mistakes(found), len(found.problems) - mistakes(found)
    return f"{wrong} problem{'s' * (wrong != 1)} and {notes} note{'s' * (notes != 1)}"


def _title(found: Inspection) -> str:
    return f"{found.data.root}: {found.labels.name}, {found.labels.num_classes} classes"


def _has_cities(found: Inspection) -> bool:
    return any(entry.city for entry in found.entries)


def _split_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    rows, cities = [], _has_cities(found)
    for split in found.splits:
        entries = found.of(split)
        pixels, valid = int(found.pixels(split).sum()), sum(found.class_pixels(split))
        sizes = sorted({entry.size for entry in entries if entry.size}, reverse=True)
        shown = ", ".join(f"{w}x{h}" for h, w in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
        unread = all(entry.unlabelled for entry in entries)
        labels = "not read" if unread else str(sum(entry.label is not None for entry in entries))
        images = str(sum(entry.image is not None for entry in entries))
        of_cities = [str(len({entry.city for entry in entries}))] * cities
        void = f"{100 * (1 - valid / pixels):.1f}" if pixels else "-"
        rows.append([split, images, labels, *of_cities, shown, void])
    return ["split", "images", "labels", *["cities"] * cities, "sizes", "void %"], rows


def _class_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    splits = [split for split in found.splits if found.pixels(split).any()]
    shares = {split: found.shares(split) for split in splits}
    images = {split: found.class_images(split) for split in splits}
    head = ["class", *(f"{split} {what}" for split in splits for what in ("pixels %", "images"))]
    rows = []
    for i, name in enumerate(found.labels.classes):
        cells = []
        for split in splits:
            share = shares[split][name]
            cells += [f"{100 * share:.3f}" if share else "-", str(images[split][i])]
        rows.append([name, *cells])
    return head, rows


def _city_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for entry in found.entries:
        counts[entry.split, entry.city] += entry.image is not None
    return ["split", "city", "images"], [[*key, str(n)] for key, n in counts.items()]


def _id_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    pixels = {split: found.pixels(split) for split in found.splits if found.pixels(split).any()}
    rows = []
    for i in range(256):
        if any(counts[i] for counts in pixels.values()):
            rows.append([str(i), *_meaning(found.labels, i), *(f"{counts[i]:,}" for counts in pixels.values())])
    return ["id", "name", "", *(f"{split} pixels" for split in pixels)], rows


def _meaning(labels: LabelTable, value: int) -> tuple[str, str]:
    """Name of a label id, and what it counts as."""
    place = int(labels.places[value])
    if place < 0:
        return "unknown", "not in the table"
    label = labels.labels[place]
    if label.train_id == IGNORE:
        return label.name, "void"
    merged = labels.classes[label.train_id]
    return label.name, "class" if merged == label.name else f"counts as {merged}"


def _shares(found: Inspection) -> str:
    used = dict.fromkeys((found.data.train_split, found.data.val_split))
    splits = [split for split in used if any(found.class_pixels(split))]
    if not splits:
        return paragraph("No labelled pixels, so no shares.")
    names, every = list(found.labels.classes), {split: found.shares(split) for split in splits}

    def bars(figure: Any) -> None:
        axes = figure.add_subplot()
        height = 0.8 / len(splits)
        for k, split in enumerate(splits):
            shares = [100 * every[split][name] for name in names]
            axes.barh(np.arange(len(names)) + (k - (len(splits) - 1) / 2) * height, shares, height * 0.9, label=split)
        least = min(share for shares in every.values() for share in shares.values() if share)
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(99 * least)), 100)  # a share of all too has a length
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set(xlabel="% of the evaluated pixels (logarithmic)", title="Class shares")
        axes.legend()

    return chart(bars, (8, 1.5 + 0.28 * len(names)))


def _pictures(found: Inspection) -> list[str]:
    """A few training images spread over the split, those with most of the rarest classes, and one that is turned."""
    entries = [e for e in found.of(found.data.train_split) if e.sound] or [e for e in found.entries if e.sound]
    if not entries:
        return [paragraph("No image has a label that goes with it.")]
    chosen = {i * len(entries) // _SPREAD: list[str]() for i in range(_SPREAD)}
    shares = found.shares(found.data.train_split)
    present = sorted((name for name in shares if shares[name] > 0), key=lambda name: shares[name])
    for name in present[:_RAREST]:
        ids = found.label_ids[found.labels.classes.index(name)]
        best = max(range(len(entries)), key=lambda i: int(entries[i].counts[ids].sum()))
        chosen.setdefault(best, []).append(f"most {name}")
    if (turned := next((i for i, e in enumerate(entries) if e.orientation != 1), None)) is not None:
        chosen.setdefault(turned, []).append("turned by its EXIF orientation")
    return [_overlay(entries[i], ", ".join(notes), found.labels) for i, notes in chosen.items()]


def _overlay(entry: Entry, note: str, labels: LabelTable) -> str:
    assert entry.image is not None and entry.label is not None
    image = read_rgb(entry.image)
    train_ids = labels.to_train_ids(read_label_ids(entry.label), entry.label)
    title = f"{entry.name} ({note})" if note else entry.name
    both = row(
        picture(image, "image", photo=True, max_width=560),
        picture(draw.overlay(image, train_ids, 0.55, table=labels), "with its label", photo=True, max_width=560),
    )
    return section(title, both, level=3)


def _by_kind(found: Inspection) -> dict[str, list[str]]:
    """Texts by kind, mistakes first."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for problem in sorted(found.problems, key=lambda one: one.kind in NOTES):
        kinds[problem.kind].append(problem.text)
    return kinds


def _three(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of one width, the first to the left, the others to the right."""
    every = [head, *rows]
    widths = [max(len(line[i]) for line in every) for i in range(len(head))]
    lines = []
    for first, *others in every:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines

"""What `seg.inspect_data` found, as text for a console and as a page with pictures."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from seg import draw
from seg.data import read_rgb
from seg.html import chart, listing, page, paragraph, picture, row, section, table
from seg.inspect_data import UNLABELLED, Entry, Inspection
from seg.labels import read_label_ids, to_train_ids

NOTES = ("rare class", "class that never occurs", "images of several sizes", "no instance ids beside some labels")
"""Kinds of problems that are no mistakes."""
_SHOWN = 5
_SHOWN_ON_PAGE = 200
_SPREAD, _RAREST = 3, 3


def mistakes(found: Inspection) -> int:
    """How many problems there are that should be put right before training."""
    return sum(problem.kind not in NOTES for problem in found.problems)


def text(found: Inspection) -> str:
    """The whole report in plain text."""
    lines = [str(found.root), "", *_aligned(*_split_rows(found)), "", *_aligned(*_class_rows(found))]
    colours = found.colours(found.train_split)
    if colours:
        lines += ["", "RGB of the training images: mean {}, std {}".format(*map(_three, colours))]
    kinds = _by_kind(found)
    lines += ["", f"{mistakes(found)} problems and {len(found.problems) - mistakes(found)} notes"]
    for kind, texts in kinds.items():
        lines.append(f"  {kind} ({len(texts)})")
        lines += [f"    {one}" for one in texts[:_SHOWN]]
        lines += [f"    ... and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return "\n".join(lines)


def document(found: Inspection) -> str:
    """The page."""
    head = f"{mistakes(found)} problems and {len(found.problems) - mistakes(found)} notes."
    problems = [
        section(
            f"{kind} ({len(texts)})",
            listing(texts[:_SHOWN_ON_PAGE]),
            *([paragraph(f"and {len(texts) - _SHOWN_ON_PAGE} more")] if len(texts) > _SHOWN_ON_PAGE else []),
            level=3,
        )
        for kind, texts in _by_kind(found).items()
    ]
    colours = found.colours(found.train_split)
    words = "Mean {} and standard deviation {} of R, G, B in the training images.".format(
        *map(_three, colours or ([], []))
    )
    return page(
        f"Data set {found.root}",
        section("Splits", table(*_split_rows(found)), *([paragraph(words)] if colours else [])),
        section("Problems and notes", paragraph(head, wrong=mistakes(found) > 0), *problems),
        section("Classes", table(*_class_rows(found)), _shares(found)),
        section("Cities", table(*_city_rows(found))),
        section("Ids found", table(*_id_rows(found))),
        section("Images with their labels", *_pictures(found)),
    )


def _split_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    rows = []
    for split in found.splits:
        entries = found.of(split)
        pixels = found.pixels(split)
        void = 1 - pixels[list(found.evaluated)].sum() / pixels.sum() if pixels.any() else None
        sizes = sorted({entry.size for entry in entries if entry.size}, reverse=True)
        shown = ", ".join(f"{w}x{h}" for h, w in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
        labels = "not read" if split == UNLABELLED else str(sum(entry.label is not None for entry in entries))
        images, cities = sum(e.image is not None for e in entries), len({e.city for e in entries})
        rows.append([split, str(images), labels, str(cities), shown, "-" if void is None else f"{100 * void:.1f}"])
    return ["split", "images", "labels", "cities", "sizes", "void %"], rows


def _class_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    splits = [split for split in found.splits if found.pixels(split).any()]
    shares = {split: found.shares(split) for split in splits}
    images = {split: found.images_with(split) for split in splits}
    head = ["class", *(f"{split} {what}" for split in splits for what in ("pixels %", "images"))]
    rows = []
    for i in found.evaluated:
        name, cells = found.names[i], []
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
            name = found.names[i] if i < len(found.names) else "unknown"
            kind = "class" if i in found.evaluated else "void" if i < len(found.names) else "not in the table"
            rows.append([str(i), name, kind, *(f"{counts[i]:,}" for counts in pixels.values())])
    return ["id", "name", "", *(f"{split} pixels" for split in pixels)], rows


def _shares(found: Inspection) -> str:
    splits = [split for split in (found.train_split, found.val_split) if found.pixels(split).any()]
    if not splits:
        return paragraph("No labels, so no shares.")
    names = [found.names[i] for i in found.evaluated]

    def bars(figure: Any) -> None:
        axes = figure.add_subplot()
        height = 0.8 / len(splits)
        for k, split in enumerate(splits):
            shares = [100 * found.shares(split)[name] for name in names]
            axes.barh(np.arange(len(names)) + (k - (len(splits) - 1) / 2) * height, shares, height * 0.9, label=split)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set(xlabel="% of the evaluated pixels (logarithmic)", title="Class shares")
        axes.legend()

    return chart(bars, (8, 1.5 + 0.28 * len(names)))


def _pictures(found: Inspection) -> list[str]:
    """A few training images spread over the split, and those with most of the rarest classes."""
    entries = [e for e in found.of(found.train_split) if e.sound] or [e for e in found.entries if e.sound]
    if not entries:
        return [paragraph("No image has a label that goes with it.")]
    chosen = {entries[i * len(entries) // _SPREAD].name: "" for i in range(_SPREAD)}
    shares = found.shares(found.train_split)
    present = sorted((name for name in shares if shares[name] > 0), key=lambda name: shares[name])
    for name in present[:_RAREST]:
        i = found.names.index(name)
        best = max(entries, key=lambda entry: int(entry.counts[i]))
        chosen[best.name] = ", ".join(filter(None, [chosen.get(best.name, ""), f"most {name}"]))
    by_name = {entry.name: entry for entry in entries}
    return [_overlay(by_name[name], note) for name, note in chosen.items()]


def _overlay(entry: Entry, note: str) -> str:
    assert entry.image is not None and entry.label is not None
    image = read_rgb(entry.image)
    train_ids = to_train_ids(read_label_ids(entry.label), entry.label)
    title = f"{entry.name} ({note})" if note else entry.name
    both = row(
        picture(image, "image", photo=True, max_width=560),
        picture(draw.overlay(image, train_ids, 0.55), "with its label", photo=True, max_width=560),
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

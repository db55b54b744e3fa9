"""A reliability card, measured and written: its HTML page, and the JSON beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.images import check_file, check_writable, write_bytes
from engine.score_files import scores_folder
from seg import draw
from seg.averaging import Views, predictor_of
from seg.card import Card, config_text, describe, labelled, measure_split, spread, truths
from seg.corruptions import CORRUPTIONS, corrupt
from seg.data import eval_batches
from seg.html import chart, counted, folded, legend, page, paragraph, percent, picture, row, saved, section, table
from seg.labels import scored_table
from seg.metrics import mean
from seg.per_image import told
from seg.robustness import Robustness, measure


def write_card(
    path: Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    *,
    json_file: Path | None = None,
    out: Path | None = None,
    views: Views | None = None,
    corruptions: bool = False,
    corruption_images: int | None = None,
    allow_imports: bool = False,
) -> str:
    """Measure a checkpoint and write `card.html` and `card.json` to `out` (default `scores_SPLIT` beside it).

    Returns the table of the scores and where the page is.

    Args:
        path: of the checkpoint.
        overrides: key=value changes to its config.
        split: default the config's `data.val_split`.
        json_file: file for the JSON, in place of `card.json`.
        out: folder to write to.
        views: what predictions are averaged over.
        corruptions: measure the robustness too: 65 more predictions an image.
        corruption_images: of that many images only, evenly spread over the split; all by default.
        allow_imports: permits the stored config to import its modules.

    Raises:
        UserError: bad data, a split without labels or with one image, a folder that can't be written: before the work.
    """
    from engine.prepare import for_prediction, predicting
    from seg.html import write
    from seg.models import with_origin

    model, cfg, meta, origin = with_origin(path, list(overrides), allow_imports=allow_imports)
    classes = scored_table(cfg.data, meta, path).num_classes
    with predicting(cfg.runtime) as device:
        split = split or cfg.data.val_split
        out = out or scores_folder(path, split)
        if json_file is not None:
            check_file(json_file)
        for folder in (out, json_file.parent if json_file else out):
            check_writable(folder)
        samples = labelled(eval_batches(cfg, split).samples, cfg.data, split)
        predictor = predictor_of(for_prediction(model, path), cfg, device, views)
        chosen = spread(samples, corruption_images)
        measured = measure_split(predictor, cfg, samples, split)
        robustness = None
        if corruptions:
            items = ((s.name, image, truth) for s, image, truth in truths(chosen, cfg))
            robustness = measure(
                predictor,
                items,
                classes,
                seed=cfg.runtime.seed,
                wrap=lambda found: told(found, len(chosen), "corrupted images"),
            )
    facts = describe(origin, model, cfg, split, samples, views)
    card = Card(facts, config_text(cfg), *measured, robustness)
    json_file = json_file or out / "card.json"
    write_bytes(json_file, (json.dumps(card.to_json(), indent=1, allow_nan=False) + "\n").encode())
    write(out / "card.html", document(card))
    return f"{card.scores.table()}\n\nreliability card: {out / 'card.html'}, {json_file}"


def document(card: Card) -> str:
    """The whole page."""
    parts = [
        table(["", ""], [[key, value] for key, value in card.facts.items()]),
        _summary(card),
        _classes(card),
        _calibration(card),
        _images(card),
    ]
    if card.robustness is not None:
        parts.append(_robustness(card, card.robustness))
    return page("Reliability card", *parts, section("Config", folded("the resolved config", card.config)))


def _summary(card: Card) -> str:
    boundary, calibration = mean(card.boundary.class_iou().values()), card.calibration
    rows = [[name, percent(value)] for name, value in card.scores.means().items()]
    rows.append([f"boundary IoU (band of {100 * card.boundary.ratio:g}% of the diagonal)", percent(boundary)])
    rows.append(["calibration error (ECE) as it is", percent(calibration.before.ece())])
    rows.append([f"calibration error with temperature {calibration.temperature:.3f}", percent(calibration.after.ece())])
    if card.robustness is not None:
        images = counted(card.robustness.images, "image")  # often fewer than those of the mIoU above
        rows.append([f"mIoU under corruptions, of {images}", percent(card.robustness.mean)])
        rows.append(["mIoU without corruption, of the same", percent(card.robustness.clean)])
    return section("Summary", table(["score", "%"], rows))


def _classes(card: Card) -> str:
    scores, boundary = card.scores, card.boundary.class_iou()
    instances = not math.isnan(scores.mean_iiou)
    rows = []
    for i, (name, iou) in enumerate(scores.class_iou.items()):
        iiou = [scores.class_iiou.get(name, math.nan)] * instances
        values = iou, boundary[name], *iiou, scores.class_accuracy[name]
        pixels = int(scores.matrix[list(scores.labels.groups[i])].sum())
        rows.append([name, *map(percent, values), f"{pixels:,}"])
    matrix = scores.class_matrix()
    both = {"IoU": scores.class_iou, "boundary IoU": boundary}

    def bars(figure: Any) -> None:
        draw.bars(figure.add_subplot(), both, list(scores.class_iou), "Class IoU and boundary IoU, %")

    notes = [f"{line[0].upper()}{line[1:]}." for line in scores.absent()]
    return section(
        "Classes",
        table(["class", "IoU", "boundary IoU", *["iIoU"] * instances, "accuracy", "true pixels"], rows),
        *map(paragraph, notes),
        chart(bars, (7.5, 1.4 + 0.32 * len(rows))),
        saved(lambda path: draw.plot_confusion(matrix, list(scores.class_iou), path)),
    )


def _calibration(card: Card) -> str:
    from seg.calibration import draw_reliability

    one = card.calibration
    words = (
        f"The temperature {one.temperature:.3f} was fitted to {one.fitted_pixels:,} pixels, drawn evenly from the "
        f"{counted(one.fitted_on, 'image')} with even numbers (in the order of the files, from 0). Everything below is "
        f"of the other {counted(one.reported_on, 'image')}, all {one.before.pixels:,} valid pixels. It changes no "
        "predicted class; above 1 it makes the network less sure of itself, below 1 surer."
    )
    if one.after.ece() > one.before.ece():
        words += " On these images it calibrates nothing: their error (ECE) is larger with it."
    if one.at_an_end:
        words += " This one is at an end of the range searched: no temperature calibrates this network well."
    rows = []
    for title, part in (("as it is", one.before), ("with the temperature", one.after)):
        found = part.to_json()
        nll = "-" if found["nll"] is None else f"{found['nll']:.4f}"
        rows.append([title, *(percent(found[k]) for k in ("ece", "confidence", "accuracy")), nll])

    def diagrams(figure: Any) -> None:
        axes = figure.subplots(1, 2)
        draw_reliability(axes[0], one.before, "As it is")
        draw_reliability(axes[1], one.after, f"With temperature {one.temperature:.3f}")

    head = ["", "ECE %", "mean confidence %", "accuracy %", "NLL"]
    return section("Calibration", paragraph(words), table(head, rows), chart(diagrams, (10, 4.4)))


def _images(card: Card) -> str:
    images, colors = card.images, card.scores.labels.colors
    values = [one.mean_iou for one in images.images if not math.isnan(one.mean_iou)]
    cities = [[c.name, c.images, percent(c.mean_iou), percent(c.wrong)] for c in images.cities()]
    worst = [[o.name, *[o.city] * bool(cities), percent(o.mean_iou), percent(o.wrong)] for o in images.worst(10)]
    quantiles = np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist() if values else []

    def histogram(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.hist([100 * value for value in values], bins=np.linspace(0, 100, 41).tolist(), color="#1f77b4")
        axes.set(xlabel="mIoU of an image, %", ylabel="images", title="Images by their mIoU")

    pictures = [
        section(
            one.name,
            row(
                picture(one.image, "image", photo=True, max_width=370),
                picture(draw.colorize(one.truth, colors), f"truth ({draw.void(colors)}: void)", max_width=370),
                picture(draw.colorize(one.prediction, colors), "prediction", max_width=370),
            ),
            level=3,
        )
        for one in card.examples
    ]
    words = (
        "The mIoU of an image is over the classes that its label or its prediction holds, so that one small region of "
        "a class can cost much; the mean over images is not the score of the split, whose pixels are added up first."
    )
    head = ["lowest", "5%", "25%", "median", "75%", "95%", "highest"]
    return section(
        "Images and cities" if cities else "Images",
        paragraph(words),
        *([table(["city", "images", "mIoU %", "wrong pixels %"], cities)] if cities else []),
        table(head, [[percent(q) for q in quantiles]]),
        chart(histogram, (8, 3)),
        section(
            "Worst images",
            table(["image", *["city"] * bool(cities), "mIoU %", "wrong pixels %"], worst),
            legend(card.scores.labels.classes, colors) if pictures else "",
            *pictures,
            level=3,
        ),
    )


def _robustness(card: Card, found: Robustness) -> str:
    words = (
        f"mIoU in percent of {counted(found.images, 'image')} with one corruption at a time; without any: "
        f"{percent(found.clean)}. Over all corruptions and severities: {percent(found.mean)}, which is "
        f"{percent(found.retained)}% of it. The parameters are those of seg/corruptions.py, so these numbers compare "
        "with cards of this program only. On small images neighbouring severities of a blur may be the same."
    )
    head = ["group", "corruption", *(f"severity {s}" for s in found.severities), "mean"]
    rows: list[list[object]] = [
        [CORRUPTIONS[name].group, name, *map(percent, values), percent(found.mean_of(name))]
        for name, values in found.scores.items()
    ]
    groups = [[name, percent(value)] for name, value in found.groups().items()]

    def curves(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, (name, values) in enumerate(found.scores.items()):
            style = ("-", "--", ":")[i // 7 % 3]
            axes.plot([0, *found.severities], [100 * v for v in (found.clean, *values)], style, marker="o", label=name)
        axes.set(xlabel="severity (0: none)", ylabel="mIoU, %", title="mIoU by severity")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    example = card.examples[-1]
    shown = [
        picture(corrupt(example.image, name, 3, example.name), f"{name}, severity 3", photo=True, max_width=270)
        for name in found.scores
    ]
    return section(
        "Robustness",
        paragraph(words),
        table(head, rows),
        table(["group", "mean mIoU %"], groups),
        chart(curves, (9, 4.6)),
        row(*shown),
    )

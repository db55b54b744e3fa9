"""A submission for the Cityscapes test server: label-id PNGs of the test split in one checked zip file.

The names are `<city>_<sequence>_<frame>_labelIds.png`, as cityscapesscripts' evaluation finds predictions. Each PNG is
written into the folder `OUT.parts` beside the zip first: what was interrupted goes on there when it is started again
with the same checkpoint and options. The zip appears under its name only when it is complete and has been checked.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.errors import UserError
from engine.images import check_writable, write_bytes, write_png
from seg.averaging import Averaged, Views, predictor_of
from seg.config import SegConfig
from seg.data import EvalBatches, Sample, eval_batches
from seg.labels import CITYSCAPES, TRAIN_LABEL_IDS, read_label_ids, table_of, to_label_ids
from seg.models import Origin
from seg.per_image import told
from seg.predict import Predictor

SPLIT = "test"
SERVER_SIZE = (1024, 2048)
"""Height and width of the images that the server scores."""
_NAME = re.compile(r"[^_\ud800-\udfff]+_\d+_\d+")  # bytes that are no text have no place in a zip
_MARK = "made_by.json"


def submit(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    views: Views | None = None,
    allow_imports: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Predict the test split with a checkpoint and write the zip; returns what was done, in a few lines.

    Args:
        path: of the checkpoint.
        out: the zip; an older one is replaced.
        overrides: key=value changes to the config.
        views: what predictions are averaged over.
        allow_imports: permits the stored config to import its modules.
        say: takes a line of progress.

    Raises:
        UserError: a network of other classes, no test images, names that the server would not find, a place that can't
            be written, a part of another checkpoint, or a check that failed.
    """
    from engine.prepare import predicting
    from seg.models import with_origin

    if out.suffix != ".zip":
        raise UserError(f"--out: {out}; expected a name that ends in .zip")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; expected the name of a zip file")
    model, cfg, meta, origin = with_origin(path, list(overrides), allow_imports=allow_imports, folded=True)
    if (its := table_of(meta)).classes != CITYSCAPES.classes:
        raise UserError(
            f"{path}: predicts the {its.num_classes} classes of {its.name}; the Cityscapes test server takes its own "
            f"{CITYSCAPES.num_classes}. Train with data.name=cityscapes, or write labels with tools/predict.py."
        )
    with predicting(cfg.runtime) as device:
        check_writable(out.parent)
        samples = named(eval_batches(cfg, SPLIT).samples)
        parts = out.with_name(f"{out.name}.parts")
        done = _open_parts(parts, _fingerprint(origin, cfg, views))
        if done:
            say(f"{parts}: goes on after {done} of {len(samples)} images")
        sizes = predict_missing(predictor_of(model, cfg, device, views), cfg, samples, parts, say)
    write_zip(samples, sizes, parts, out)
    return "\n".join([_report(out, sizes), *_remove(parts)])


def named(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples. Raises UserError for names that the server's evaluation does not find, or finds twice."""
    strange = [sample for sample in samples if not _NAME.fullmatch(sample.name)]
    if strange:
        raise UserError(
            f"{strange[0].image}: the test server looks for <city>_<sequence>_<frame>, such as "
            f"berlin_000000_000019_leftImg8bit.png; {len(strange)} of {len(samples)} images are called otherwise. "
            "Rename them, or label them with tools/predict.py."
        )
    names = [sample.name for sample in samples]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{SPLIT}: two images are called {twice[0]}; the test server needs each name once.")
    return samples


def predict_missing(
    predictor: Predictor | Averaged,
    cfg: SegConfig,
    samples: Sequence[Sample],
    parts: Path,
    say: Callable[[str], None] = print,
) -> dict[str, tuple[int, int]]:
    """Write the PNG of each image that has none yet; returns the size (height, width) of every image by its name."""
    sizes: dict[str, tuple[int, int]] = {}
    missing = []
    for sample in samples:
        size = _done(parts / png_name(sample))
        if size is None or size != _size(sample.image):
            missing.append(sample)
        else:
            sizes[sample.name] = size
    batches = EvalBatches(missing, cfg, 1, 0)
    for items in told(batches, -(-len(missing) // cfg.data.eval_batch_size), "batches of the test split", say):
        for item, ids in zip(items, predictor.predict_batch([item["image"] for item in items]), strict=True):
            write_png(parts / png_name(item["sample"]), to_label_ids(ids))
            sizes[item["sample"].name] = (ids.shape[0], ids.shape[1])
    return sizes


def write_zip(samples: Sequence[Sample], sizes: dict[str, tuple[int, int]], parts: Path, out: Path) -> None:
    """Pack the PNGs, read the zip again and check it, and only then give it its name.

    The same PNGs give the same bytes. Raises UserError when the disk is full or `check_zip` finds something.
    """
    unfinished = out.with_name(f".{out.name}.part")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
            for sample in samples:
                name = png_name(sample)
                archive.writestr(zipfile.ZipInfo(name), (parts / name).read_bytes())
        check_zip(unfinished, sizes)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}).") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_zip(path: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Raises UserError unless the zip holds one sound PNG for each image, of its size, with evaluated label ids only.

    Args:
        path: of the zip.
        sizes: height and width by the name of the image.
    """
    allowed = np.zeros(256, bool)
    allowed[list(TRAIN_LABEL_IDS)] = True
    expected = {f"{name}_labelIds.png": size for name, size in sizes.items()}
    with zipfile.ZipFile(path) as archive:
        found = archive.namelist()
        if sorted(found) != sorted(expected):
            odd = sorted(set(found) ^ set(expected))[:3] or [name for name in found if found.count(name) > 1][:1]
            raise UserError(f"{path}: {len(found)} files for {len(expected)} images; look at {', '.join(odd)}.")
        for name in found:
            try:
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    ids = np.asarray(image)
            except (OSError, SyntaxError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: {name} is damaged ({error}). Start tools/submit.py again.") from error
            if ids.dtype != np.uint8 or ids.shape != expected[name]:
                raise UserError(
                    f"{path}: {name} is {ids.dtype} {ids.shape}, expected uint8 {expected[name]}, the image's size"
                )
            if not allowed[ids].all():
                wrong = np.unique(ids[~allowed[ids]]).tolist()
                raise UserError(f"{path}: {name} holds the ids {wrong[:5]}, which are not evaluated classes")


def png_name(sample: Sample) -> str:
    """Name of a prediction, as the official evaluation finds it by `<city>_<sequence>_<frame>*.png`."""
    return f"{sample.name}_labelIds.png"


def _open_parts(parts: Path, fingerprint: str) -> int:
    """Make the folder, or find out whether what lies there may be gone on with; returns the PNGs in it."""
    mark = parts / _MARK
    if os.path.lexists(parts) and not parts.is_dir():
        found = "a link that leads to no folder" if parts.is_symlink() else "a file"
        raise UserError(
            f"{parts}: is {found}, where predictions are kept until the zip is written; remove it, or choose another "
            "--out."
        )
    # what was killed while it wrote its first file has left a part of it, or nothing at all
    if not parts.exists() or all(re.fullmatch(r"\.[0-9a-f]+\.part", path.name) for path in parts.iterdir()):
        write_bytes(mark, fingerprint.encode())
        return 0
    if not mark.is_file() or mark.read_bytes() != fingerprint.encode():
        raise UserError(
            f"{parts}: holds predictions of another checkpoint, data set or options, or other files, which must not be "
            "mixed; remove this folder, or choose another --out."
        )
    return sum(1 for _ in parts.glob("*_labelIds.png"))


def _remove(parts: Path) -> list[str]:
    """Remove the folder; of one that a link leads to, the files in it and the link. Returns what is to be said of it:
    the zip is written, and what cannot be removed is no error."""
    try:
        if parts.is_symlink():
            for path in parts.iterdir():
                path.unlink()
            parts.unlink()
        else:
            shutil.rmtree(parts)
    except OSError as error:
        return [f"note: {parts} is needed no more, but cannot be removed ({error.strerror or error})"]
    return []


def _fingerprint(origin: Origin, cfg: SegConfig, views: Views | None) -> str:
    """What a prediction depends on: weights, config, views."""
    config = cfg.model_dump(mode="json", exclude={"runtime", "report"})
    facts = {
        "checkpoint": origin.sha256,
        "views": str(views or Views()),
        "amp": cfg.runtime.amp,
        "config": config,
    }
    return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def _done(path: Path) -> tuple[int, int] | None:
    """Height and width of a prediction that is there already; None if it isn't, or is damaged."""
    try:
        ids = read_label_ids(path)
    except UserError:
        return None
    return ids.shape[0], ids.shape[1]


def _size(path: Path) -> tuple[int, int] | None:
    """Height and width in the header of an image file; None if there is no sound one."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return None


def _report(out: Path, sizes: dict[str, tuple[int, int]]) -> str:
    found = sorted(set(sizes.values()))
    shown = ", ".join(f"{width} x {height}" for height, width in found[:3]) + (", ..." if len(found) > 3 else "")
    lines = [
        f"{out}: {len(sizes)} images of {shown} pixels, each once, evaluated label ids only, "
        f"{out.stat().st_size / 1e6:.1f} MB"
    ]
    if found != [SERVER_SIZE]:
        height, width = SERVER_SIZE
        lines.append(f"note: the Cityscapes server scores images of {width} x {height} pixels; these are others")
    if len(sizes) != 1525:
        lines.append("note: the Cityscapes test split has 1525 images")
    return "\n".join(lines)

"""Videos: sound ones of every ending that can be written, damaged ones, and files that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from engine.video import CODECS, Reader, writing
from seg.fuzz.case import Call, Ran, Wrong, damaged, pick, texture
from seg.fuzz.ground import Ground
from seg.labels import to_label_ids

FRAMES = 4


def make(rng: Generator, folder: Path, count: int, ground: Ground) -> Call:
    """One video, labelled into a lossless one."""
    ending = pick(rng, sorted(CODECS))
    path = folder / "in" / f"drive{pick(rng, ('', ' ü', '%d'))}{ending}"
    size = pick(
        rng, ((64, 48), (130, 34), (16, 16) if ending == ".webm" else (2, 2))
    )  # its codec takes no smaller ones
    good = rng.random() < 0.15
    if rng.random() < 0.2 and not good:
        what, act = pick(rng, _ODD)
        act(path, rng)
    else:
        _write(path, size, rng)
        what = f"{ending} of {size[0]} x {size[1]}"
        if not good:
            data, how = damaged(path.read_bytes(), rng)
            path.write_bytes(data)
            what += f": {how}"
    out = folder / "out" / "labels.mkv"

    def check(ran: Ran) -> None:
        _check(path, out, ground, FRAMES if good else None)

    arguments = [str(ground.weights), str(path), "--out", str(out), "--save", "labels"]
    return Call("predict", arguments, what, check, names=(path.name,), good=good)


def _write(path: Path, size: tuple[int, int], rng: Generator) -> None:
    with writing(path, 10, size) as append:
        for _ in range(FRAMES):
            append(texture(rng, size[1], size[0]))


def _check(path: Path, out: Path, ground: Ground, frames: int | None) -> None:
    """Each frame that can be read has its labels, in order."""
    if not out.exists():
        raise Wrong("no video was written")
    with Reader(path) as source, Reader(out) as written:
        pictures, ids = list(source), list(written)
    if len(pictures) != len(ids) or (frames is not None and len(ids) != frames):
        raise Wrong(f"{len(ids)} frames were written of {len(pictures)}, {frames} expected")
    for number, (picture, found) in enumerate(zip(pictures, ids, strict=True), 1):
        expected = to_label_ids(ground.predictor.predict(picture))
        if not np.array_equal(found[..., 0], expected[: found.shape[0], : found.shape[1]]):
            raise Wrong(f"frame {number} has other labels than the network gives it")


def _image(path: Path, rng: Generator) -> None:
    from engine.images import write_png

    write_png(path, texture(rng, 20, 30))


def _one_size(path: Path, rng: Generator) -> None:
    """A stream of pictures that begins and ends within its first."""
    _write(path.with_suffix(".avi"), (64, 48), rng)
    data = path.with_suffix(".avi").read_bytes()
    path.with_suffix(".avi").unlink()
    path.write_bytes(data[: data.find(b"movi") + 4])


_ODD: list[tuple[str, Callable[[Path, Generator], Any]]] = [
    ("an empty file", lambda path, rng: path.touch()),
    ("a link to itself", lambda path, rng: path.symlink_to(path)),
    ("text", lambda path, rng: path.write_text("no video at all\n" * 40)),
    ("a playlist", lambda path, rng: path.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")),
    ("a list of files", lambda path, rng: path.write_text("ffconcat version 1.0\nfile /etc/hostname\n")),
    ("a still image", _image),
    ("a video without a frame", _one_size),
    ("zeros", lambda path, rng: path.write_bytes(bytes(5000))),
    ("noise", lambda path, rng: path.write_bytes(rng.bytes(5000))),
]

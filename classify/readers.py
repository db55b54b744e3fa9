"""The file formats of the data sets that live in memory: files -> uint8 images (N, C, H, W), int64 labels (N,).

All raise a UserError that names the file when one is damaged or holds something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torchvision.datasets import mnist

from classify import safe_pickle
from engine.errors import UserError


class Arrays(NamedTuple):
    images: npt.NDArray[np.uint8]
    """(N, C, H, W)"""
    labels: npt.NDArray[np.int64]
    """(N,), from 0."""


class Expected(NamedTuple):
    """What a file of the set must hold."""

    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    classes: int
    first_label: int = 0
    """The label that the files give to class 0."""


def batches(paths: Sequence[Path], expected: Expected) -> Arrays:
    """CIFAR's and the downsampled ImageNet's batches: dictionaries of `data` (N, C * H * W) and `labels` or
    `fine_labels`, pickled or as npz."""
    parts = []
    for path in paths:
        entry = _npz(path) if path.suffix == ".npz" else safe_pickle.load(path)
        if not isinstance(entry, dict):
            raise UserError(f"{path}: holds a {type(entry).__name__}, expected a dictionary of data and labels.")
        entry = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in entry.items()}
        labels = entry.get("fine_labels", entry.get("labels"))
        if labels is None or "data" not in entry:
            raise UserError(f"{path}: holds {_names(entry)}, expected data and labels (or fine_labels).")
        parts.append(_arrays(path, entry["data"], labels, expected))
    return _joined(parts)


def idx(paths: Sequence[Path], expected: Expected) -> Arrays:
    """MNIST's format: a file of images and one of labels."""
    found = []
    for path, read in zip(paths, (mnist.read_image_file, mnist.read_label_file), strict=True):
        try:
            found.append(read(str(path)).numpy())
        except Exception as error:  # torchvision asserts, torch complains of sizes, Python of missing bytes
            raise _damaged(path, error, "a file in MNIST's idx format") from None
    return _arrays(paths[0], found[0], found[1], expected)


def svhn(paths: Sequence[Path], expected: Expected) -> Arrays:
    """A MATLAB file of `X` (H, W, C, N) and `y` (N, 1), where the digit 0 is the label 10."""
    from scipy.io import loadmat

    (path,) = paths
    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = np.transpose(content["X"], (3, 2, 0, 1)), np.asarray(content["y"]).reshape(-1) % 10
    except Exception as error:  # scipy raises whatever it likes on damaged files
        raise _damaged(path, error, "a MATLAB file of X and y") from None
    return _arrays(path, np.ascontiguousarray(images), labels, expected)


def stl10(paths: Sequence[Path], expected: Expected) -> Arrays:
    """A file of images (N, C, W, H) and one of labels, one byte for each value, without any head."""
    try:
        pixels, labels = (np.fromfile(path, np.uint8) for path in paths)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from None
    channels, height, width = expected.shape
    if len(pixels) % (channels * height * width):
        raise UserError(
            f"{paths[0]}: {len(pixels)} bytes are no whole number of {channels} x {height} x {width} images; it is cut "
            "off, delete it and get it anew."
        )
    images = pixels.reshape(-1, channels, width, height).transpose(0, 1, 3, 2)
    return _arrays(paths[0], np.ascontiguousarray(images), labels, expected)


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged bytes
        raise _damaged(path, error, "an npz file of plain arrays") from None


def _arrays(path: Path, data: Any, labels: Any, expected: Expected) -> Arrays:
    """The two, checked against each other and against what is expected."""
    pixels = int(np.prod(expected.shape))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim < 2 or data[:1].size != pixels:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        shape = " x ".join(map(str, expected.shape))
        raise UserError(f"{path}: its images are {found}, expected uint8 (N, {pixels}), that is {shape} each.")
    try:
        numbers = np.asarray(labels)
        whole = numbers.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        numbers = whole = np.empty((0, 0), np.int64)
    if whole.shape != (len(data),) or not np.array_equal(whole, numbers):
        raise UserError(f"{path}: {len(data)} images, but its labels are not as many whole numbers.")
    whole = whole - expected.first_label
    outside = np.flatnonzero((whole < 0) | (whole >= expected.classes))
    if len(outside):
        low, high = expected.first_label, expected.first_label + expected.classes - 1
        raise UserError(
            f"{path}: the label {whole[outside[0]] + low} of image {outside[0]} is not in {low} ... {high}; "
            "the file is damaged or of another data set."
        )
    return Arrays(data.reshape(-1, *expected.shape), whole)


def _joined(parts: list[Arrays]) -> Arrays:
    """One after the other. Each part is let go once it is copied: the downsampled ImageNet has gigabytes."""
    images = np.empty((sum(len(part.labels) for part in parts), *parts[0].images.shape[1:]), np.uint8)
    labels = np.concatenate([part.labels for part in parts])
    end = len(images)
    while parts:
        part = parts.pop().images
        images[end - len(part) : end] = part
        end -= len(part)
    return Arrays(images, labels)


def _damaged(path: Path, error: Exception, expected: str) -> UserError:
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{path}: cannot be read ({error.strerror}).")
    return UserError(f"{path}: expected {expected}; damaged ({type(error).__name__}: {error}). Get it anew.")


def _names(entry: dict[Any, Any]) -> str:
    return ", ".join(sorted(map(str, entry))[:8]) or "nothing"

"""What several rooms' tests use."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import programs

programs.preload()


def pytest_collection_finish() -> None:
    """Spare the garbage collector the libraries' million objects: with them a collection takes a fourth of a second."""
    gc.freeze()


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def coloured(rng: np.random.Generator, label: int, size: int = 32) -> np.ndarray:
    """Noise around a colour of the class's own, uint8 (size, size, 3)."""
    colour = np.array([25 * label, 255 - 25 * label, 128 + 60 * (label % 3 - 1)])
    return np.clip(colour + rng.normal(0, 20, (size, size, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of the curves takes longer than a training of a few steps; test_report.py looks at it."""
    monkeypatch.setattr("engine.report.plot_curves", lambda *_: None)


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sample data set in the full Cityscapes layout, to be read only.

    64x128 pixels; 4 train, 2 val and 1 test image; all 19 classes occur in train and in val.
    """
    from seg import sample

    root = tmp_path_factory.mktemp("sample") / "cityscapes"
    return sample.render(root, size=(64, 128), counts={"train": 4, "val": 2, "test": 1})


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cifar-10-batches-py`: 5 x 20 training and 40 test images, with checksums of their own."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{i}", 20) for i in range(1, 6)), ("test_batch", 40)]:
        labels = [i % 10 for i in range(count)]
        pixels = np.stack([coloured(rng, label).transpose(2, 0, 1).reshape(-1) for label in labels])
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels, "batch_label": name}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10), "num_vis": 3072}))
    return root


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images for each class in train/ (6 each) and val/ (3 each); sizes differ."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("bus", "car", "tram")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(coloured(rng, 4 * label, 36 + 4 * i)).save(folder / f"{i}.png")
    return root

"""What several rooms' tests use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sample data set in the full Cityscapes layout, to be read only.

    64x128 pixels; 4 train, 2 val and 1 test image; all 19 classes occur in train and in val.
    """
    from seg import sample

    root = tmp_path_factory.mktemp("sample") / "cityscapes"
    return sample.render(root, size=(64, 128), counts={"train": 4, "val": 2, "test": 1})

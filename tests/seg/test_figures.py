"""Pictures of deconvolution from a segmentation checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import load
from engine.errors import UserError
from seg import figures, train
from seg.config import SegConfig
from tests.seg.test_train import TINY


def test_pictures_of_a_segmentation_network(tmp_path: Path, sample_root: Path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    train.run(load(tmp_path / "tiny.yaml", [f"data.root={sample_root}", "length=1 step"], SegConfig), tmp_path / "run")
    paths = figures.draw(tmp_path / "run/best.pt", tmp_path / "pictures")
    assert [path.name for path in paths] == ["kernels.png", "whitening.png"]
    assert all(path.stat().st_size > 20_000 for path in paths)
    with pytest.raises(UserError, match=r"no deconvolution layer 'x'; there are: backbone\."):
        figures.draw(tmp_path / "run/best.pt", tmp_path, "x")

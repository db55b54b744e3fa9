"""The page of errors: planted errors are found, thin or unsure ones are no suspects, crops show the right place."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import UserError
from seg import errors_page
from seg.config import SegConfig
from seg.data import Cityscapes, Sample, read_pair
from seg.labels import to_train_ids
from seg.per_image import ImageScores

TOOL = Path(errors_page.__file__).parents[1] / "tools" / "errors.py"
SAMPLE = Sample(Path("x.png"), Path("y.png"), None, "ulm_1", "ulm")
Make = Callable[..., SegConfig]


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, truth and confidence (200 x 300): one large sure error, one unsure, one thin, one small, one void."""
    truth = np.zeros((200, 300), np.uint8)
    prediction, sure = truth.copy(), np.full(truth.shape, 0.99, np.float32)
    prediction[50:90, 100:160] = 13
    prediction[120:160, 100:160] = 13
    sure[120:160, 100:160] = 0.7
    prediction[190:192, :] = 8
    prediction[10:14, 10:14] = 2
    prediction[50:90, 200:260] = 13
    truth[50:90, 200:260] = 255
    return prediction, truth, sure


def test_only_large_sure_thick_regions_are_suspects() -> None:
    (found,) = errors_page.suspected(*scene(), SAMPLE)
    assert (found.true, found.predicted, found.area, found.box) == (0, 13, 2400, (50, 100, 40, 60))
    assert found.sure == pytest.approx(0.99)


def test_a_region_at_the_edge_of_the_image_is_measured_to_the_edge() -> None:
    prediction, truth, sure = scene()
    prediction[:] = 0
    prediction[:2, :] = 13  # a line of two pixels along the edge
    assert errors_page.suspected(prediction, truth, sure, SAMPLE) == []
    prediction[:12, :100] = 13
    (found,) = errors_page.suspected(prediction, truth, sure, SAMPLE)
    assert found.box == (0, 0, 12, 300)


def test_each_confusion_gives_its_largest_region() -> None:
    prediction, truth, sure = scene()
    prediction[120:160, 100:110] = 0  # the second of the two becomes the smaller one
    matrix = ImageScores().update(prediction, truth, SAMPLE)
    found = {(r.true, r.predicted): r for r in errors_page.confused(prediction, truth, sure, SAMPLE, matrix, {})}
    assert set(found) == {(0, 13), (0, 8), (0, 2)}
    assert found[0, 13].area == 2400 and found[0, 13].box == (50, 100, 40, 60)
    assert found[0, 8].area == 600 and found[0, 2].sure == pytest.approx(0.99)
    three = {(0, 8): [found[0, 13]] * 3, (0, 13): [found[0, 13]] * 2}  # three larger ones of one confusion are known
    again = errors_page.confused(prediction, truth, sure, SAMPLE, matrix, three)
    assert {(r.true, r.predicted) for r in again} == {(0, 13), (0, 2)}


def test_the_window_around_a_region_stays_in_the_image() -> None:
    assert errors_page.around((50, 100, 40, 60), 200, 300) == (slice(20, 120), slice(70, 190))
    assert errors_page.around((0, 290, 4, 10), 200, 300) == (slice(0, 28), slice(266, 300))


def test_crops_are_enlarged_as_far_as_a_picture_goes() -> None:
    sizes = {(30, 50): (150, 250), (300, 400): (300, 400), (70000, 1): (70000, 1), (600, 2): (3600, 12)}
    for size, shown in sizes.items():
        assert errors_page._enlarged(np.zeros((*size, 3), np.uint8)).shape == (*shown, 3)


class Planted:
    """Predicts the truth, but 'car' in a square of one image; is sure of all of it."""

    def __init__(self, samples: list[Sample]) -> None:
        self.found = {}
        for i, sample in enumerate(samples):
            image, label = read_pair(sample)
            truth = to_train_ids(label, str(sample.label))
            truth[truth == 255] = 0
            if i == 1:
                truth[4:28, 40:80] = 13
            self.found[image.tobytes()] = truth

    def predict(self, image: np.ndarray) -> np.ndarray:
        return self.found[image.tobytes()]

    def probabilities(self, image: np.ndarray) -> Tensor:
        ids = torch.from_numpy(self.predict(image)).long()
        return torch.full((19, *ids.shape), 0.001).scatter_(0, ids[None], 0.982)


def test_a_planted_error_is_found_and_shown(report_config: Make) -> None:
    cfg = report_config()
    samples = Cityscapes(cfg.data.root, "train").samples
    predictor = Planted(samples)
    found = errors_page.search(predictor, cfg, samples)  # type: ignore[arg-type]
    assert {region.sample.name for region in found.suspects} == {samples[1].name}
    assert all(region.predicted == 13 for region in found.suspects)
    assert sum(region.area for region in found.suspects) > 0.5 * 24 * 40
    largest = found.largest(3)
    truth = to_train_ids(read_pair(samples[1])[1], "")[4:28, 40:80]
    true, predicted, pixels = largest[0]
    assert predicted == 13 and pixels == max(int((truth == i).sum()) for i in range(19) if i != 13)
    assert found.images.worst(1)[0].name == samples[1].name
    pictures = errors_page._Pictures(predictor, cfg, samples)  # type: ignore[arg-type]
    document = errors_page.document(found, {"checkpoint": "best.pt"}, pictures, 1, "miou", 2)
    assert samples[1].name in document and "taken for car" in document
    assert document.count(f"{samples[1].name}: mIoU") == 1 and "Found: " in document
    confusions = sum(len(found.confusions[pair[:2]]) for pair in found.largest(8))
    assert document.count("<img") == 4 * (1 + confusions + min(2, len(found.suspects)))


def test_perfect_predictions_leave_nothing_to_show(report_config: Make) -> None:
    cfg = report_config()
    samples = Cityscapes(cfg.data.root, "val").samples[:1]
    found = errors_page.search(Planted(samples), cfg, samples)  # type: ignore[arg-type]
    assert found.largest(8) == [] and found.suspects == [] and found.confusions == {}
    pictures = errors_page._Pictures(Planted(samples), cfg, samples)  # type: ignore[arg-type]
    assert "Found: 0, shown: 0" in errors_page.document(found, {}, pictures, 0, "pixels", 5)


def test_the_program(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("errors_tool", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    call = [
        "errors.py",
        str(small_checkpoint),
        "--out",
        str(tmp_path / "e.html"),
        "--worst",
        "1",
        "--by",
        "pixels",
        "--flip",
    ]
    monkeypatch.setattr(sys, "argv", call)
    assert tool.main() == 0
    assert f"{tmp_path / 'e.html'}: 2 images, " in capsys.readouterr().out
    document = (tmp_path / "e.html").read_text()
    assert "Worst images" in document and "mirrored" in document and document.count("<img") >= 4
    monkeypatch.setattr(sys, "argv", [*call, "--split", "test"])
    assert tool.main() == 2 and "has no label to score against" in capsys.readouterr().err


def test_labels_that_are_all_ignored(small_checkpoint: Path, void_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the split 'val' in {void_root}: no pixel has an evaluated class"):
        errors_page.write_errors(small_checkpoint, tmp_path / "e.html", [f"data.root={void_root}"])
    assert not (tmp_path / "e.html").exists()


def test_mistakes_come_before_the_work(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors_page, "search", lambda *args: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot write there"):
        errors_page.write_errors(small_checkpoint, tmp_path / "file" / "e.html")
    with pytest.raises(UserError, match="is a folder; expected the name of a page"):
        errors_page.write_errors(small_checkpoint, tmp_path)
    with pytest.raises(UserError, match="--by: found 'size', expected miou or pixels"):
        errors_page.write_errors(small_checkpoint, tmp_path / "e.html", by="size")
    with pytest.raises(UserError, match="found -1, expected 0 or more"):
        errors_page.write_errors(small_checkpoint, tmp_path / "e.html", worst=-1)

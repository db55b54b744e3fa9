"""A user's images classified: order, batches, files written, and that no bad input stops the rest."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from classify import predict
from classify.config import ClassifyConfig
from classify.data import DataInfo
from classify.predict import Predictor, Summary, classify_files
from engine.errors import UserError

CLASSES = ("red", "green", "blue")


def brightest(images: list[np.ndarray]) -> Tensor:
    """Probabilities: the share of each channel."""
    sums = torch.tensor(np.stack([image.reshape(-1, 3).sum(0) for image in images]).astype(np.float32))
    return sums / sums.sum(1, keepdim=True)


def save(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), colour).save(path)
    return path


def run(inputs: list[Path], **options: object) -> tuple[Summary, list[str]]:
    said: list[str] = []
    return classify_files(brightest, CLASSES, inputs, say=said.append, **options), said  # type: ignore[arg-type]


def test_the_likeliest_classes_in_order_whatever_the_batch(tmp_path: Path):
    save(tmp_path / "a.png", (200, 50, 0))
    save(tmp_path / "b.png", (0, 10, 90))
    save(tmp_path / "c.png", (0, 90, 10))
    for size in (1, 2, 5):
        summary, said = run([tmp_path], topk=2, batch_size=size)
        assert [one.classes for one in summary.predictions] == [["red", "green"], ["blue", "green"], ["green", "blue"]]
        assert said[0] == f"{tmp_path / 'a.png'}: red 80.0 %, green 20.0 %"
        assert str(summary) == "3 images classified"


def test_large_images_are_not_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in "abcd":
        save(tmp_path / f"{name}.png", (200, 50, 0))
    seen: list[int] = []

    def counted(images: list[np.ndarray]) -> Tensor:
        seen.append(len(images))
        return brightest(images)

    monkeypatch.setattr(predict, "MOST_BYTES", 3 * 9 * 7 * 3)
    summary = classify_files(counted, CLASSES, [tmp_path], say=lambda line: None)
    assert seen == [3, 1] and len(summary.predictions) == 4


def test_files_hold_what_is_printed(tmp_path: Path):
    save(tmp_path / "in/a, b.png", (200, 50, 0))
    run([tmp_path / "in"], topk=3, out=tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert [(r["rank"], r["class"], float(r["probability"])) for r in rows] == [
        ("1", "red", 0.8),
        ("2", "green", 0.2),
        ("3", "blue", 0.0),
    ]
    assert rows[0]["path"] == str(tmp_path / "in/a, b.png")
    stored = json.loads((tmp_path / "out/predictions.json").read_text())
    assert stored[0]["classes"] == ["red", "green", "blue"] and stored[0]["probabilities"][0] == pytest.approx(0.8)


def test_what_was_predicted_before_the_end_came_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "in/a.png", (200, 50, 0))
    save(tmp_path / "in/b.png", (0, 10, 90))

    def stop(line: str) -> None:
        raise KeyboardInterrupt if "b.png" in line else BrokenPipeError(32, "nobody reads")

    for size, kept in ((1, ["a.png"]), (2, ["a.png"])):
        with pytest.raises(BrokenPipeError):
            classify_files(brightest, CLASSES, [tmp_path / "in"], batch_size=size, out=tmp_path / "out", say=stop)
        for ending, rows in (("csv", csv.DictReader), ("json", json.load)):
            found = list(rows((tmp_path / f"out/predictions_partial.{ending}").open()))
            assert [Path(row["path"]).name for row in found] == kept
        told = f"1 of 2 images were classified: {tmp_path / 'out/predictions_partial'}.csv, .json\n"
        assert capsys.readouterr().err == told
        assert len(list((tmp_path / "out").iterdir())) == 2, "an earlier work's files stay as they are"
    run([tmp_path / "in"], out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.json"]


def test_one_bad_file_stops_nothing(tmp_path: Path):
    save(tmp_path / "a.png", (1, 2, 3))
    (tmp_path / "b.jpg").write_text("hello")
    summary, said = run([tmp_path, tmp_path / "typo.png"])
    assert len(summary.predictions) == 1 and len(summary.problems) == 2 and any("FAILED" in line for line in said)
    assert "1 image classified, 2 problems:" in str(summary)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path: Path):
    save(tmp_path / "a.png", (1, 2, 3))
    (tmp_path / "out").write_text("a file")

    def predict(images: object) -> torch.Tensor:
        raise AssertionError("began to work")

    with pytest.raises(UserError, match="out: cannot write there"):
        classify_files(predict, ("x", "y"), [tmp_path / "a.png"], out=tmp_path / "out")


def test_outputs_may_lie_above_the_images(tmp_path: Path):
    """There is no picture among them."""
    save(tmp_path / "a.png", (1, 2, 3))
    done = classify_files(lambda images: torch.ones(len(images), 2) / 2, ("x", "y"), [tmp_path], out=tmp_path)
    assert len(done.predictions) == 1 and (tmp_path / "predictions.csv").is_file()


def test_nothing_to_do_and_a_topk_out_of_range_are_errors(tmp_path: Path):
    with pytest.raises(UserError, match="typo.png: no such file"):
        run([tmp_path / "typo.png"])
    with pytest.raises(UserError, match="--topk: 4; expected 1 to 3"):
        run([save(tmp_path / "a.png", (1, 2, 3))], topk=4)


@pytest.mark.parametrize("name, channels, size", [("cifar10", 3, 32), ("mnist", 1, 28), ("folder", 3, 24)])
def test_images_enter_as_in_the_validation(name: str, channels: int, size: int):
    """Of any size and shape; a grey network gets grey images."""
    data = {"name": name, "size": size}
    cfg = ClassifyConfig.model_validate({"length": "1 epoch", "batch_size": 1, "data": data})
    info = DataInfo(CLASSES, channels, size, (0.5,) * channels, (0.25,) * channels)
    seen: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((2, 3))[:, :1] * torch.ones(3)

    predictor = Predictor.from_config(Net(), cfg, info, torch.device("cpu"))
    images = [np.full((h, w, 3), 255, np.uint8) for h, w in ((10, 40), (64, 64), (1, 1))]
    found = predictor.predict(images)
    assert seen[0].shape == (3, channels, size, size) and torch.allclose(seen[0], torch.tensor(2.0), atol=1e-5)
    torch.testing.assert_close(found, torch.full((3, 3), 1 / 3))
    cfg = ClassifyConfig.model_validate({"length": "1 epoch", "batch_size": 1, "data": data, "loss": {"name": "l2"}})

    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[0.9, 0.0, -0.1]])

    torch.testing.assert_close(
        Predictor.from_config(Sure(), cfg, info, torch.device("cpu")).predict(images[:1]), torch.eye(3)[:1]
    )

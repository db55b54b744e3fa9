"""Scores counted by hand, and what is written about them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from classify.config import ClassifyConfig, DataConfig
from classify.data import DataInfo, describe
from classify.evaluate import check_classes, draw, evaluate_and_report, evaluate_model
from classify.scores import Scores, left_out
from engine.errors import UserError

INFO = DataInfo(tuple("abcdefg"), 3, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def config(**sections: object) -> ClassifyConfig:
    return ClassifyConfig.model_validate({"task": "classify", "length": "1 epoch", "batch_size": 2, **sections})


class Table(nn.Module):
    """Its logits for image number i, which is the image's first pixel, are row i."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[images[:, 0, 0, 0].long()]


def batches(targets: list[int], size: int = 2) -> list[dict[str, object]]:
    images = torch.zeros(len(targets), 3, 4, 4)
    images[:, 0, 0, 0] = torch.arange(len(targets))
    parts = zip(images.split(size), torch.tensor(targets).split(size), strict=True)
    return [{"image": i, "target": t, "name": [f"n{int(k)}" for k in i[:, 0, 0, 0]]} for i, t in parts]


def test_counts_losses_and_mistakes():
    generator = torch.Generator().manual_seed(3)
    rows, targets = torch.randn(21, 7, generator=generator), [int(i) % 6 for i in range(21)]
    model = Table(rows).train()
    scores = evaluate_model(model, config(), INFO, batches(targets), mistakes=3)
    order = rows.argsort(1, descending=True)
    assert scores.images == 21 and model.training
    assert scores.top1 == sum(int(order[i, 0]) == t for i, t in enumerate(targets)) / 21
    assert scores.top5 == sum(t in order[i, :5].tolist() for i, t in enumerate(targets)) / 21
    expected = -sum(float(rows[i].log_softmax(0)[t]) for i, t in enumerate(targets)) / 21
    assert scores.loss == pytest.approx(expected, rel=1e-6)
    for i, t in enumerate(targets):
        assert scores.matrix[t, int(order[i, 0])] > 0
    assert scores.accuracies()["g"] is None and "accuracy/g" not in scores.scalars()
    wrong = [float(rows[i].softmax(0).max()) for i, t in enumerate(targets) if int(order[i, 0]) != t]
    assert [one.probability for one in scores.mistakes] == pytest.approx(sorted(wrong, reverse=True)[:3])
    assert scores.mistakes[0].image.shape == (3, 4, 4) and 0 <= scores.mistakes[0].image.min() <= 1


def test_no_mistakes_of_an_earlier_evaluation_stay(tmp_path: Path):
    scores = evaluate_model(Table(torch.eye(7)), config(), INFO, batches([1, 1, 2]), mistakes=3)
    for expected in (scores, dataclasses.replace(scores, mistakes=[])):
        draw(expected, tmp_path)
        assert (tmp_path / "mistakes.png").exists() == bool(expected.mistakes)


def test_smoothing_is_left_out_of_the_loss_and_l2_is_reported_as_such():
    rows = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0], [0, 3.0, 0, 0, 0, 0, 0]])
    smooth = config(loss={"label_smoothing": 0.2})
    assert (
        evaluate_model(Table(rows), smooth, INFO, batches([0, 0])).loss
        == evaluate_model(Table(rows), config(), INFO, batches([0, 0])).loss
    )
    assert evaluate_model(Table(rows), config(loss={"name": "l2"}), INFO, batches([0, 0])).loss == (0 + 5.0) / 2


def test_a_trial_run_and_few_classes():
    three = DataInfo(("a", "b", "c"), 3, 4, (0.5,) * 3, (0.5,) * 3)
    scores = evaluate_model(Table(torch.eye(3)), config(), three, batches([0, 1, 2], 1), max_batches=2)
    assert (
        scores.images == 2 and scores.top5 is None and "top-5" not in scores.line() and "top5" not in scores.scalars()
    )


def test_outputs_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        evaluate_model(Table(torch.full((2, 7), torch.nan)), config(), INFO, batches([0, 1]))


def test_before_the_training_outputs_need_not_be_finite():
    scores = evaluate_model(Table(torch.full((2, 7), torch.nan)), config(), INFO, batches([0, 1]), max_batches=1)
    assert scores.matrix.sum() == 2


def test_no_image_that_can_be_read_is_an_error():
    class Unreadable(list):  # type: ignore[type-arg]
        problems = ("b.png: broken", "a.png: empty")

    with pytest.raises(UserError, match="none of the images of the split can be read.*: a.png: empty"):
        evaluate_model(Table(torch.eye(7)), config(), INFO, Unreadable())


def test_what_is_printed_and_written(tmp_path: Path):
    matrix = torch.tensor([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    scores = Scores(("bus", "car", "tram"), matrix, 0, 4.0, problems=("x.png: broken",))
    lines = scores.table().splitlines()
    assert lines[1].split() == ["bus", "75.00", "%", "4", "car", "(1)"] and lines[3].split()[1] == "-"
    assert lines[-1] == "top-1 62.50 %  loss 0.5000  (8 images, 1 unreadable ones left out)"
    assert json.loads(json.dumps(scores.to_json(), allow_nan=False))["class_accuracy"]["tram"] is None
    draw(scores, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class_accuracy.png", "confusion.png"]
    assert np.asarray(Image.open(tmp_path / "confusion.png")).std() > 0
    assert left_out([]) == [] and left_out(["a: b"] * 12)[-1] == "  ... and 2 more"


def test_a_data_set_with_other_classes_is_an_error():
    two = DataInfo(("a", "b"), 3, 4, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match="x.pt: the network tells 7 classes apart, the data set has 2"):
        check_classes(INFO, two, "x.pt")
    with pytest.raises(UserError, match="class 'a' is 'b' in the data set"):
        check_classes(two, DataInfo(("b", "a"), 3, 4, (0.5,) * 3, (0.5,) * 3), "x.pt")
    with pytest.raises(UserError, match="takes images of 3 channels, the data set's have 1"):
        check_classes(two, DataInfo(("a", "b"), 1, 4, (0.5,), (0.5,)), "x.pt")


def test_the_file_that_names_classes_is_told_where_it_came_or_went(tmp_path: Path):
    cfg = DataConfig(name="imagenet32", root=tmp_path)
    unnamed = describe(cfg)
    lines = [f"n{i:08} {i} thing_{i}" for i in range(1, 1001)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines))
    named = describe(cfg)
    said = "x.pt: the network's class 'thing_1' is 'class 1' in the data set; .* if both are the downsampled ImageNet, "
    with pytest.raises(UserError, match=said + "put the map_clsloc.txt of the training into data.root$"):
        check_classes(named, unnamed, "x.pt")
    with pytest.raises(UserError, match="move map_clsloc.txt, which the training did not have, out of data.root$"):
        check_classes(unnamed, named, "x.pt")
    check_classes(named, describe(cfg), "x.pt")


def test_results_that_cannot_be_written_are_told_before_the_work(tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(b"no checkpoint, which would be found next")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="file: cannot write there"):
        evaluate_and_report(tmp_path / "x.pt", out=file)
    with pytest.raises(UserError, match="file: cannot write there"):
        evaluate_and_report(tmp_path / "x.pt", json_file=file / "scores.json")

"""The reliability card: what it says is what was measured, and mistakes come before the work."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import checkpoint
from engine.errors import UserError
from seg import card, card_page, errors_page, evaluate
from seg.averaging import Views, predictor_of
from seg.boundary import BoundaryIoU
from seg.config import SegConfig
from seg.data import Cityscapes, eval_batches, read_pair
from seg.labels import to_train_ids
from seg.models import from_checkpoint, with_origin
from seg.robustness import Robustness
from tests.seg import layouts

TOOL = Path(evaluate.__file__).parents[1] / "tools" / "evaluate.py"
Make = Callable[..., SegConfig]


class Half:
    """Right in the left half of an image and 'sky' in the right one; sure of everything to 80%."""

    def __init__(self, samples: list[Any]) -> None:
        self.truths = {}
        for sample in samples:
            image, label = read_pair(sample)
            truth = to_train_ids(label, sample.label)
            truth[:, 64:] = 10
            truth[truth == 255] = 0
            self.truths[image.tobytes()] = truth

    def predict(self, image: np.ndarray) -> np.ndarray:
        return self.truths[image.tobytes()]

    def probabilities(self, image: np.ndarray) -> Tensor:
        ids = torch.from_numpy(self.predict(image)).long()
        return torch.full((19, *ids.shape), 0.2 / 18).scatter_(0, ids[None], 0.8)


@pytest.fixture(scope="module")
def four(report_config: Make) -> tuple[SegConfig, list[Any]]:
    cfg = report_config()
    return cfg, Cityscapes(cfg.data.root, "train").samples


def test_everything_is_measured_on_all_images(four: tuple[SegConfig, list[Any]]) -> None:
    cfg, samples = four
    scores, boundary, calibration, images, examples = card.measure_split(Half(samples), cfg, samples)  # type: ignore[arg-type]
    expected, right, pixels = BoundaryIoU(), 0, 0
    for sample in samples:
        image, label = read_pair(sample)
        truth, prediction = to_train_ids(label, sample.label), Half([sample]).predict(image)
        expected.update(prediction, truth)
        right, pixels = right + int((truth == prediction).sum()), pixels + int((truth != 255).sum())
    assert scores.images == 4 and scores.pixel_accuracy == pytest.approx(right / pixels)
    assert boundary.class_iou() == pytest.approx(expected.class_iou(), nan_ok=True)
    assert (calibration.fitted_on, calibration.reported_on) == (2, 2)
    found = calibration.before.to_json()
    assert found["confidence"] == pytest.approx(0.8, abs=1e-6)
    assert found["ece"] == pytest.approx(abs(found["accuracy"] - 0.8), abs=1e-6)
    assert [one.name for one in images.images] == sorted(sample.name for sample in samples)
    assert [e.name for e in examples] == [one.name for one in images.worst(4)]
    assert images.total.sum() == sum(one.pixels for one in images.images) == pixels


def test_the_card_of_a_checkpoint(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def few(*args: Any, **options: Any) -> Robustness:
        from seg.robustness import measure

        asked.append(options["seed"])
        return measure(*args, **options, corruptions=("fog", "jpeg"), severities=(1, 5))

    monkeypatch.setattr(card_page, "measure", few)
    text = card_page.write_card(small_checkpoint, out=tmp_path, corruptions=True, corruption_images=1)
    stored = json.loads((tmp_path / "card.json").read_text())
    result = evaluate.evaluate_checkpoint(small_checkpoint, pictures=0)
    assert result is not None
    assert stored["scores"] == result[0].to_json() and result[0].table() in text
    assert (
        stored["facts"]["data"].endswith("split val: 2 images, 2 cities")
        and "7 steps" in stored["facts"]["trained for"]
    )
    assert stored["robustness"]["images"] == 1 and list(stored["robustness"]["corruptions"]) == ["fog", "jpeg"]
    assert asked == [0] and len(stored["images"]) == 2 and "name: lraspp_mobilenet_v3_large" in stored["config"]
    document = (tmp_path / "card.html").read_text()
    for words in ("Boundary", "Calibration", "Worst images", "Robustness", "fog, severity 3", str(small_checkpoint)):
        assert words.lower() in document.lower()
    assert document.count("<img") == 2 + 1 + 1 + 2 * 3 + 1 + 2  # classes, calibration, images, examples, robustness


@pytest.mark.parametrize("later", ["replaced", "deleted"])
def test_the_pages_name_the_checkpoint_that_was_measured(
    later: str, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = tmp_path / "best.pt", checkpoint.load(small_checkpoint)

    def meanwhile(work: Callable[..., Any], *given: Any) -> Any:
        path.unlink()
        if later == "replaced":
            checkpoint.save(path, {**state, "step": 8, "ema": state["model"]})
        return work(*given)

    monkeypatch.setattr(card_page, "measure_split", partial(meanwhile, card_page.measure_split))
    monkeypatch.setattr(errors_page, "search", partial(meanwhile, errors_page.search))
    expected = "<td>7 steps; the weights of that step<", hashlib.sha256(small_checkpoint.read_bytes()).hexdigest()
    shutil.copy(small_checkpoint, path)
    card_page.write_card(path, out=tmp_path)
    shutil.copy(small_checkpoint, path)
    errors_page.write_errors(path, tmp_path / "errors.html")
    for page in ("card.html", "errors.html"):
        document = (tmp_path / page).read_text()
        assert all(words in document for words in expected)


def test_views_reach_the_scores(small_checkpoint: Path, report_config: Make) -> None:
    views = Views((0.5, 1.0), flip=True, sliding_window=True)
    model, cfg, _ = from_checkpoint(small_checkpoint)
    scores, _ = evaluate.evaluate_model(model, cfg, views=views, pictures=0)
    predictor = predictor_of(model, cfg, "cpu", views)
    right = total = 0
    for sample in Cityscapes(cfg.data.root, "val").samples:
        image, label = read_pair(sample)
        truth = to_train_ids(label, str(sample.label))
        right += int((predictor.predict(image) == truth).sum())
        total += int((truth != 255).sum())
    assert scores.pixel_accuracy == right / total
    assert not np.array_equal(scores.matrix, evaluate.evaluate_model(model, cfg, pictures=0)[0].matrix)


def test_mistakes_come_before_the_work(
    small_checkpoint: Path, tmp_path: Path, report_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_page, "measure_split", lambda *args: pytest.fail("the work was begun"))
    with pytest.raises(UserError, match="has no label to score against; the split 'test' has no public ones"):
        card_page.write_card(small_checkpoint, split="test", out=tmp_path)
    with pytest.raises(UserError, match="has no split 'none'"):
        card_page.write_card(small_checkpoint, split="none", out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x: cannot write there"):
        card_page.write_card(small_checkpoint, out=tmp_path / "file" / "x")
    with pytest.raises(UserError, match="--corruption-images: 0, expected at least 1"):
        card_page.write_card(small_checkpoint, out=tmp_path, corruptions=True, corruption_images=0)
    with pytest.raises(UserError, match="file/x: cannot write there"):
        evaluate.evaluate_and_report(small_checkpoint, out=tmp_path / "file" / "x")


def test_one_image_is_too_few(report_config: Make) -> None:
    cfg = report_config()
    with pytest.raises(UserError, match="the split has 1 image, a card needs at least 2"):
        card.measure_split(Half([]), cfg, Cityscapes(cfg.data.root, "val").samples[:1])  # type: ignore[arg-type]


def test_labels_that_are_all_ignored(small_checkpoint: Path, void_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the split 'val' in {void_root}: no pixel has an evaluated class"):
        card_page.write_card(small_checkpoint, [f"data.root={void_root}"], out=tmp_path)
    assert not (tmp_path / "card.html").exists()


class Unicorns:
    """Says 'car' everywhere, and in the upper half what the data set of `layouts.folder` has no pixel of, or 'road'."""

    def __init__(self, upper: int) -> None:
        self.upper = upper

    def predict(self, image: np.ndarray) -> np.ndarray:
        ids = np.zeros(image.shape[:2], np.uint8)
        ids[: len(ids) // 2] = self.upper
        return ids

    def probabilities(self, image: np.ndarray) -> Tensor:
        ids = torch.from_numpy(self.predict(image)).long()
        return torch.full((3, *ids.shape), 0.1).scatter_(0, ids[None], 0.8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, report_config: Make) -> SegConfig:
    """Two images in no city, without instance ids."""
    root = tmp_path_factory.mktemp("folder")
    layouts.folder(root)
    return report_config(name="folder", root=root)


def page_of(cfg: SegConfig, path: Path, upper: int, robustness: Robustness | None = None) -> str:
    samples = eval_batches(cfg).samples
    facts = card.describe(with_origin(path)[3], torch.nn.Identity(), cfg, "val", samples, None)
    measured = card.measure_split(Unicorns(upper), cfg, samples)  # type: ignore[arg-type]
    return card_page.document(card.Card(facts, "", *measured, robustness))


def test_images_of_one_name_in_two_cities_are_two(
    tmp_path: Path,
    sample_root: Path,
    report_config: Make,
    small_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "twins"
    for city in ("a", "b"):
        for number, label in enumerate(sorted(sample_root.glob("gtFine/val/*/*_labelIds.png"))):
            image = Path(str(label).replace("gtFine_labelIds", "leftImg8bit").replace("gtFine", "leftImg8bit"))
            for source, kind, end in ((image, "leftImg8bit", "leftImg8bit"), (label, "gtFine", "gtFine_labelIds")):
                target = root / kind / "val" / city / f"{number}_{end}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    cfg = report_config(root=root)
    samples = eval_batches(cfg).samples
    assert len(samples) == 4
    monkeypatch.setattr(card, "WORST", 1)
    assert len(card.measure_split(Half(samples), cfg, samples)[-1]) == 1  # type: ignore[arg-type]
    model, _, _ = from_checkpoint(small_checkpoint)
    assert sorted(evaluate.evaluate_model(model, cfg, pictures=4)[1]) == ["a_0", "a_1", "b_0", "b_1"]


def test_classes_in_no_label_file_are_told_as_on_the_console(plain: SegConfig, small_checkpoint: Path) -> None:
    predicted, not_predicted = (page_of(plain, small_checkpoint, upper) for upper in (2, 1))
    wrong = "<p>In no label file, but predicted, so 0 in the mean IoU: unicorn.</p>"
    left_out = "<p>In no label file, so '-' and no part of the mean IoU: unicorn.</p>"
    assert wrong in predicted and left_out not in predicted
    assert left_out in not_predicted and wrong not in not_predicted


def test_a_data_set_without_cities_and_instances(plain: SegConfig, small_checkpoint: Path, four: Any) -> None:
    found = page_of(plain, small_checkpoint, 1)
    assert f"{plain.data.root}, split val: 2 images<" in found
    assert "<th>city" not in found and "cities" not in found and "<th>iIoU" not in found
    cfg, samples = four
    measured = card.measure_split(Half(samples), cfg, samples)  # type: ignore[arg-type]
    assert len(measured[3].cities()) == len({sample.city for sample in samples})
    whole = card_page.document(card.Card({}, "", *measured, None))
    assert whole.count("<th>city") == 2 and "Images and cities" in whole and "<th>iIoU" in whole


def test_the_summary_says_of_which_images_the_robustness_is(plain: SegConfig, small_checkpoint: Path) -> None:
    one, many = (Robustness(n, 0.4321, {"fog": (0.25,)}, (1,)) for n in (1, 1500))
    found = page_of(plain, small_checkpoint, 1, one)
    assert "mIoU under corruptions, of 1 image<" in found and "mIoU in percent of 1 image with one corruption" in found
    assert "mIoU without corruption, of the same</td><td class=number>43.21<" in found
    assert "the 1 image with even numbers" in found and "the other 1 image, all" in found and "1 images" not in found
    assert "mIoU under corruptions, of 1,500 images<" in page_of(plain, small_checkpoint, 1, many)


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return int(tool.main())


def test_the_program_writes_a_card_with_all_views(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scales", "0.75", "1.0", "--flip", "--sliding-window"]
    assert program(monkeypatch, small_checkpoint, "--card", *options, "--out", tmp_path) == 0
    assert "reliability card:" in capsys.readouterr().out
    facts = json.loads((tmp_path / "card.json").read_text())["facts"]
    assert facts["prediction"] == "scale 0.75, 1; mirrored; blended sliding window"
    assert program(monkeypatch, small_checkpoint, *options, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"predictions averaged over: {facts['prediction']}" in out
    scores = [json.loads((tmp_path / name).read_text()) for name in ("card.json", "scores.json")]
    assert scores[1].pop("of")["averaged_over"] == facts["prediction"]
    assert scores[0]["scores"] == scores[1]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["x.pt", "--corruptions"], "--corruptions goes with --card"),
        (["x.pt", "--card", "--corruption-images", "3"], "--corruption-images with --corruptions"),
        (
            ["--predictions", "a", "--ground-truth", "b", "--flip"],
            "--flip, --sliding-window and --card go with a checkpoint",
        ),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *arguments)
    assert stop.value.code == 2 and text in capsys.readouterr().err


def test_scales_that_make_no_sense(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(monkeypatch, small_checkpoint, "--scales", "0") == 2
    assert capsys.readouterr().err.startswith("error: --scales: found 0, expected factors above 0")

"""Scoring models and folders of predictions."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engine import checkpoint, distributed
from engine.errors import NotFiniteError, UserError
from seg import draw, evaluate
from seg.card import labelled
from seg.config import SegConfig
from seg.datasets import samples
from seg.labels import TRAIN_LABEL_IDS, read_label_ids, to_label_ids, to_train_ids
from seg.metrics import ConfusionMatrix
from tests import programs
from tests.seg import layouts

TOOL = Path(evaluate.__file__).parents[1] / "tools" / "evaluate.py"


def config(root: Path, **data: Any) -> SegConfig:
    return SegConfig.model_validate(
        {
            "length": "1 epochs",
            "batch_size": 1,
            "data": {"root": root, "mean": (0, 0, 0), "std": (1, 1, 1), **data},
            "runtime": {"workers": 0, "device": "cpu"},
        }
    )


def folders(root: Path, count: int = 3, instances: bool = True, size: tuple[int, int] = (40, 64)) -> tuple[Path, Path]:
    """Ground truth and predictions of a folder in the official layout, the predictions distorted."""
    rng = np.random.default_rng(count)
    truth, predictions = root / "gtFine" / "val", root / "results"
    for i in range(count):
        city = ("ulm", "jena")[i % 2]
        ids = np.kron(rng.integers(0, 34, (size[0] // 8, size[1] // 8)), np.ones((8, 8))).astype(np.uint8)
        pred = np.roll(ids, 3, axis=1)
        pred[rng.random(ids.shape) < 0.1] = rng.integers(0, 34)
        stem = truth / city / f"{city}_{i:06d}_000019_gtFine"
        stem.parent.mkdir(parents=True, exist_ok=True)
        (predictions / "deep" / city).mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(f"{stem}_labelIds.png")
        if instances:
            numbered = np.where(ids >= 24, ids.astype(np.int64) * 1000 + np.arange(size[1]) // 16, ids)
            Image.fromarray(numbered.astype(np.uint16)).save(f"{stem}_instanceIds.png")
        Image.fromarray(pred).save(predictions / "deep" / city / f"{city}_{i:06d}_000019_anything.png")
    return predictions, truth


@pytest.fixture
def referee(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in [name for name in os.environ if name.startswith("CITYSCAPES_")]:
        monkeypatch.delenv(name)
    return importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("instances", [True, False])
@pytest.mark.filterwarnings("ignore:.in1d.:DeprecationWarning")
def test_a_folder_scores_as_the_official_evaluation_does(
    tmp_path: Path, referee: ModuleType, monkeypatch: pytest.MonkeyPatch, instances: bool
) -> None:
    predictions, truth = folders(tmp_path, 5, instances)
    args = referee.args
    for key, value in {"quiet": True, "JSONOutput": False, "evalInstLevelScore": instances}.items():
        monkeypatch.setattr(args, key, value)
    monkeypatch.setattr(args, "predictionPath", str(predictions))
    monkeypatch.setattr(args, "predictionWalk", None)
    truths = [str(path) for path in truth.glob("*/*_gtFine_labelIds.png")]
    reference = referee.evaluateImgLists([referee.getPrediction(args, path) for path in truths], truths, args)
    for workers in (1, 3):
        scores = evaluate.evaluate_folder(predictions, truth, workers)
        path = tmp_path / "out" / "scores.json"
        evaluate.write_json(scores, path)
        ours = json.loads(path.read_text())
        assert ours["confMatrix"] == reference["confMatrix"]
        for key in (
            "classScores",
            "categoryScores",
            "priors",
            *(["classInstScores", "categoryInstScores"] * instances),
        ):
            for name, value in reference[key].items():
                mine = ours[key][name]
                assert math.isnan(value) if mine is None else abs(mine - value) < 1e-12, (key, name)
        for key in ("averageScoreClasses", "averageScoreCategories"):
            assert abs(ours[key] - reference[key]) < 1e-12
        if instances:
            assert abs(ours["averageScoreInstClasses"] - reference["averageScoreInstClasses"]) < 1e-12
            assert abs(ours["averageScoreInstCategories"] - reference["averageScoreInstCategories"]) < 1e-12
        else:
            assert ours["averageScoreInstClasses"] is None, "the official 0 of a run without instance ids says nothing"


def test_a_prediction_may_have_its_truths_name_and_frames_are_not_mixed_up(tmp_path: Path) -> None:
    predictions, truth = tmp_path / "p", tmp_path / "t"
    for folder in (predictions, truth):
        folder.mkdir()
        for frame in ("1", "10", "100"):
            Image.fromarray(np.full((4, 4), 7, np.uint8)).save(folder / f"ulm_0_{frame}_gtFine_labelIds.png")
    (truth / "linked").symlink_to(truth)
    pairs = evaluate.pair_files(predictions, truth)
    assert [(p.name, t.name) for p, t in pairs] == [(t.name, t.name) for _, t in pairs] and len(pairs) == 3
    assert evaluate.evaluate_folder(predictions, truth).mean_iou == 1


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    predictions, truth = folders(tmp_path)
    with pytest.raises(UserError, match=r"/none \(--predictions\): no such folder"):
        evaluate.evaluate_folder(tmp_path / "none", truth)
    with pytest.raises(UserError, match=r"\(--ground-truth\): no \*_gtFine_labelIds\.png in it"):
        evaluate.evaluate_folder(predictions, predictions)
    first = predictions / "deep" / "ulm" / "ulm_000000_000019_anything.png"
    twin = predictions / "ulm_000000_000019_color.png"
    shutil.copy(first, twin)
    with pytest.raises(UserError, match=r"ulm_000000_000019_gtFine_labelIds\.png: 2 predictions, .*anything\.png and"):
        evaluate.evaluate_folder(predictions, truth)
    twin.unlink()
    first.unlink()
    with pytest.raises(UserError, match=r"no prediction for 1 of 3 label files in .*ulm_000000_000019\*\.png"):
        evaluate.evaluate_folder(predictions, truth)


def test_instance_ids_of_some_label_files(tmp_path: Path) -> None:
    predictions, truth = folders(tmp_path)
    (truth / "ulm" / "ulm_000000_000019_gtFine_instanceIds.png").unlink()
    with pytest.raises(UserError, match="1 of 3 label files have no instance ids beside them.*ulm_000000"):
        evaluate.evaluate_folder(predictions, truth)


def one(tmp_path: Path, pixels: np.ndarray, truth: np.ndarray | None = None) -> tuple[Path, Path]:
    for name in ("p", "t"):
        (tmp_path / name).mkdir()
    Image.fromarray(pixels).save(tmp_path / "p" / "ulm_0_0.png")
    truth = np.full((8, 8), 26, np.uint8) if truth is None else truth
    Image.fromarray(truth).save(tmp_path / "t" / "ulm_0_0_gtFine_labelIds.png")
    return tmp_path / "p", tmp_path / "t"


@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"ulm_0_0\.png: holds RGB colours; expected one channel of label ids"),
        (np.full((8, 8), 255, np.uint8), r"ulm_0_0\.png for .*prediction\): unknown label ids 255 \(64 pixels\)"),
        (np.full((8, 9), 7, np.uint8), r"ulm_0_0\.png for .*: prediction of 9 x 8 pixels for a label of 8 x 8"),
        (np.full((8, 8), 26000, np.uint16), r"ulm_0_0\.png: holds values up to 26000"),
    ],
)
def test_predictions_that_are_no_label_ids(tmp_path: Path, pixels: np.ndarray, text: str) -> None:
    with pytest.raises(UserError, match=text):
        evaluate.evaluate_folder(*one(tmp_path, pixels))


def test_train_ids_taken_for_label_ids_are_noticed(tmp_path: Path) -> None:
    truth = np.kron(np.array([[7, 23], [26, 11]]), np.ones((4, 4))).astype(np.uint8)
    with pytest.raises(UserError, match=r"train ids, not label ids: .* mean IoU of 100\.0%, as label ids 0\.0%"):
        evaluate.evaluate_folder(*one(tmp_path, to_train_ids(truth, ""), truth))


def test_bad_but_honest_label_ids_are_scored(tmp_path: Path) -> None:
    truth = np.kron(np.array([[7, 23], [26, 11]]), np.ones((4, 4))).astype(np.uint8)
    assert evaluate.evaluate_folder(*one(tmp_path, np.full((8, 8), 7, np.uint8), truth)).mean_iou == 0.25 / 4


def test_unwritable_json(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x.json: cannot be written"):
        evaluate.write_json(ConfusionMatrix().scores(), tmp_path / "file" / "x.json")


# ---------------------------------------------------------------- models


class Coarse(nn.Module):
    """A network whose logits are the image's colours at an eighth of its size, for the first classes."""

    def __init__(self, as_dict: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.as_dict, self.modes = as_dict, list[bool]()

    def forward(self, images: Tensor) -> Any:
        self.modes.append(self.training)
        logits = images.new_full((len(images), 19, images.shape[2] // 8, images.shape[3] // 8), -1)
        logits[:, [0, 10, 13]] = nn.functional.avg_pool2d(images, 8) * self.scale
        return {"out": logits} if self.as_dict else logits


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_model_is_scored_at_the_labels_size(sample_root: Path, as_dict: bool) -> None:
    model = Coarse(as_dict).train()
    scores, pictures = evaluate.evaluate_model(model, config(sample_root))
    expected = ConfusionMatrix()
    for path in sorted((sample_root / "gtFine" / "val").glob("*/*_labelIds.png")):
        name = path.name.replace("gtFine_labelIds", "leftImg8bit")
        image = np.array(Image.open(sample_root / "leftImg8bit" / "val" / path.parent.name / name))
        logits = Coarse()(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
        up = nn.functional.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        ids = torch.tensor(TRAIN_LABEL_IDS)[up.argmax(1)[0]].byte()
        instances = np.array(Image.open(str(path).replace("labelIds", "instanceIds"))).astype(np.int32)
        expected.update(ids, read_label_ids(path), instances)
    assert np.array_equal(scores.matrix, expected.matrix.numpy()) and scores.images == 2
    assert scores.class_iiou == pytest.approx(expected.scores().class_iiou, abs=1e-12, nan_ok=True)
    assert scores.mean_iou > 0 and model.training and model.modes == [False, False]
    assert sorted(pictures) == sorted(p.name[: -len("_gtFine_labelIds.png")] for p in _label_files(sample_root))
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[1] > 3 * 128 for p in pictures.values())


def _label_files(root: Path) -> list[Path]:
    return sorted((root / "gtFine" / "val").glob("*/*_labelIds.png"))


def test_the_network_may_see_another_size(sample_root: Path) -> None:
    scores, _ = evaluate.evaluate_model(Coarse(), config(sample_root, eval_base_size=32))
    assert scores.matrix.sum() == 2 * 64 * 128


def test_trial_runs_and_numbers_of_pictures(sample_root: Path) -> None:
    scores, pictures = evaluate.evaluate_model(Coarse(), config(sample_root), max_batches=1, pictures=1)
    assert scores.images == 1 and len(pictures) == 1
    assert evaluate.evaluate_model(Coarse(), config(sample_root), pictures=0)[1] == {}


def test_before_the_training_outputs_need_not_be_finite(sample_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Coarse()
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    model.train()
    with pytest.raises(NotFiniteError, match="not finite"):
        evaluate.evaluate_model(model, config(sample_root))
    evaluate.evaluate_model(model, config(sample_root), max_batches=1)
    assert model.training
    monkeypatch.setattr(distributed, "gather", lambda one: [one, "the other rank's output is not finite"])
    with pytest.raises(NotFiniteError, match="the other rank"):  # or it would wait for the other one's counts
        evaluate.evaluate_model(Coarse(), config(sample_root))


def test_ranks_score_disjoint_images_and_only_the_first_draws(
    sample_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = evaluate.evaluate_model(Coarse(), config(sample_root))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(evaluate.evaluate_model(Coarse(), config(sample_root)))
    assert np.array_equal(parts[0][0].matrix + parts[1][0].matrix, whole.matrix)
    assert [len(pictures) for _, pictures in parts] == [1, 0]


def test_the_test_split_has_no_scores(sample_root: Path) -> None:
    model = Coarse().train()
    with pytest.raises(UserError, match="has no label to score against, the split 'test' has no public ones"):
        evaluate.evaluate_model(model, config(sample_root), split="test")
    assert model.training


@pytest.mark.parametrize(
    ("name", "told"),
    [("cityscapes", "pack predictions for the Cityscapes test"), ("kitti", "label its images with .*predict.py")],
)
def test_what_is_proposed_for_a_split_without_labels_works(
    sample_root: Path, tmp_path: Path, name: str, told: str
) -> None:
    root = sample_root
    if name == "kitti":
        layouts.kitti(root := tmp_path)
    with pytest.raises(UserError, match=f"the split 'test' has no public ones.*{told}"):
        evaluate.evaluate_model(Coarse(), config(root, name=name), split="test")
    with pytest.raises(UserError, match=f"the split 'test' has no public ones.*{told}"):
        labelled(samples(config(root, name=name).data, "test"), config(root, name=name).data, "test")


def test_unknown_ids_in_a_label_file_name_it(sample_root: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_root, tmp_path / "copy")
    path = _label_files(tmp_path / "copy")[1]
    ids = read_label_ids(path)
    ids[0, :3] = 99
    Image.fromarray(ids).save(path)
    with pytest.raises(UserError, match=rf"{path} \(ground truth\): unknown label ids 99 \(3 pixels\)"):
        evaluate.evaluate_model(Coarse(), config(tmp_path / "copy"))


def test_labels_that_are_all_ignored_have_no_score(void_root: Path, tmp_path: Path) -> None:
    told = rf"the split 'val' in {void_root}: no pixel has an evaluated class, so there is nothing to score"
    with pytest.raises(UserError, match=told):
        evaluate.evaluate_model(Coarse(), config(void_root))
    scores, _ = evaluate.evaluate_model(Coarse(), config(void_root), max_batches=1)  # a trial run sees but a part
    assert math.isnan(scores.mean_iou)
    void = np.zeros((8, 8), np.uint8)
    with pytest.raises(UserError, match=r"/t \(--ground-truth\): no pixel has an evaluated class"):
        evaluate.evaluate_folder(*one(tmp_path, void, void))


def test_pictures_are_written(sample_root: Path, tmp_path: Path) -> None:
    scores, pictures = evaluate.evaluate_model(Coarse(), config(sample_root))
    evaluate.write_pictures(scores, pictures, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"confusion.png", "class_iou.png", *(f"{name}.png" for name in pictures)}
    for name, picture in pictures.items():
        assert np.array_equal(np.array(Image.open(tmp_path / "out" / f"{name}.png")), picture)
    assert min(Image.open(tmp_path / "out" / "confusion.png").size) > 300
    own = {"Confusion": np.zeros((4, 4, 3), np.uint8)}  # a user's image of that name
    evaluate.write_pictures(scores, own, tmp_path / "out")
    assert Image.open(tmp_path / "out" / "image_Confusion.png").size == (4, 4)
    assert min(Image.open(tmp_path / "out" / "confusion.png").size) > 300


def test_pictures_of_an_earlier_evaluation_are_told_of(
    sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, pictures = evaluate.evaluate_model(Coarse(), config(sample_root))
    first, second = sorted(pictures)
    for found in (pictures, pictures, {second: pictures[second]}, {}):
        evaluate.report(scores, found, out=tmp_path / "out")
    table = scores.table()
    note = f"note: {tmp_path / 'out'} also holds"
    assert capsys.readouterr().out == (
        f"{table}\n{table}\n{table}\n{note} 1 picture not of this evaluation, such as {first}.png\n"
        f"{table}\n{note} 2 pictures not of this evaluation, such as {first}.png\n"
    )
    assert len(list((tmp_path / "out").iterdir())) == 4  # which are the user's


def test_a_drawn_matrix_says_that_void_predictions_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else half a class predicted as void, an accuracy of 50%, would stand there as 100% of its pixels."""
    titles = []
    monkeypatch.setattr(draw, "plot_confusion", lambda matrix, names, path, title: titles.append(title))
    for predicted in (7, 0):
        confusion = ConfusionMatrix()
        confusion.update(np.array([[7, predicted]], np.uint8), np.array([[7, 7]], np.uint8))
        evaluate.write_pictures(confusion.scores(), {}, tmp_path)
    assert titles == ["", "Confusion, % of the true class's pixels\nthat are predicted as a class"]


def test_a_checkpoint_is_scored_with_overrides(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def from_checkpoint(
        path: Path, overrides: list[str], allow_imports: bool, folded: bool
    ) -> tuple[nn.Module, SegConfig, dict[str, Any]]:
        assert folded and not allow_imports
        asked.append((path, overrides))
        return Coarse().eval(), config(sample_root), {}

    monkeypatch.setitem(sys.modules, "seg.models", SimpleNamespace(from_checkpoint=from_checkpoint))
    monkeypatch.setattr(checkpoint, "task", lambda path: "seg")
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    call = ["evaluate.py", "runs/x/best.pt", "--split", "val", "a.b=1", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", [*call, str(tmp_path / "s.json"), "c=2", "--out", str(tmp_path / "pictures")])
    assert tool.main() == 0
    assert asked == [(Path("runs/x/best.pt"), ["a.b=1", "c=2", "runtime.device=cpu"])]
    expected, _ = evaluate.evaluate_model(Coarse(), config(sample_root))
    assert json.loads((tmp_path / "s.json").read_text())["averageScoreClasses"] == expected.mean_iou
    assert expected.table() in capsys.readouterr().out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/x/best.pt", "--split", "test"])
    assert tool.main() == 2
    assert capsys.readouterr().err.startswith("error: ")


# ---------------------------------------------------------------- the program


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return programs.run("evaluate", *arguments, cwd="/")


def test_the_program_scores_a_folder(tmp_path: Path) -> None:
    predictions, truth = folders(tmp_path)
    done = run("--predictions", predictions, "--ground-truth", truth, "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    scores = evaluate.evaluate_folder(predictions, truth)
    assert done.stdout == scores.table() + "\n"
    assert json.loads((tmp_path / "s.json").read_text()) == scores.to_json()


def test_the_program_prints_errors_as_one_line(tmp_path: Path) -> None:
    done = run("--predictions", tmp_path / "none", "--ground-truth", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/none (--predictions): no such folder.\n"
    both = "with --predictions give either --ground-truth, or a data set"
    for wrong, text in (
        ([], "give a checkpoint, or --predictions with --ground-truth or with a data set"),
        (["x.pt", "--ground-truth", tmp_path], "give a checkpoint, or --predictions"),
        (["--predictions", tmp_path], both),
        (["data.name=voc", "--predictions", tmp_path, "--ground-truth", tmp_path], both),
        (["--predictions", tmp_path, "--ground-truth", tmp_path, "--split", "val"], "and --split not with"),
    ):
        done = run(*wrong)
        assert done.returncode == 2 and text in done.stderr


def test_predictions_of_our_own_writer_score_as_the_model(sample_root: Path, tmp_path: Path) -> None:
    """Ids that are written as label PNGs and scored as a folder give the model's scores."""
    from seg.data import eval_batches
    from seg.predict import Predictor

    cfg = config(sample_root)
    predictor = Predictor.from_config(Coarse().eval(), cfg)
    for items in eval_batches(cfg):
        for item in items:
            ids = to_label_ids(predictor.predict(item["image"]))
            Image.fromarray(ids).save(tmp_path / f"{item['sample'].name}.png")
    scores = evaluate.evaluate_folder(tmp_path, sample_root / "gtFine" / "val")
    assert np.array_equal(scores.matrix, evaluate.evaluate_model(Coarse(), cfg)[0].matrix)

"""Training end to end on the sample data set, through `seg.train.run`, and what is done with its checkpoint."""

import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine import checkpoint
from engine.config import load
from engine.errors import UserError
from seg import train
from seg.config import SegConfig
from seg.evaluate import evaluate_checkpoint
from seg.models import from_checkpoint
from tests.seg import layouts

TINY = """
task: seg
length: 4 steps
batch_size: 2
data: {crop: [64, 96]}
model: {name: lraspp_mobilenet_v3_large, output_stride: 16}
norm: {name: deconv, block: 16}
optim: {lr: 0.01}
runtime: {workers: 0, device: cpu}
report: {log_every: 1 step, eval_every: 2 steps, checkpoint_every: 1 step, images: 1}
"""


@pytest.fixture
def loaded(tmp_path: Path, sample_root: Path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return lambda *overrides: load(path, [f"data.root={sample_root}", *overrides], SegConfig)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, sample_root: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(TINY)
    train.run(load(folder / "tiny.yaml", [f"data.root={sample_root}"], SegConfig), folder / "work")
    return folder / "work"


def test_a_run_leaves_everything_a_user_expects(run_dir: Path):
    names = {path.name for path in run_dir.iterdir()}
    assert "FastDeconv(block=" in (run_dir / "norm.txt").read_text()
    assert {"best.pt", "last.pt", "config.yaml", "metrics.jsonl", "curves.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert "IoU/road" in last["scalars"] and 0 <= last["score"] <= 1
    assert cv2.imread(str(run_dir / "curves.png")) is not None


def test_tensorboard_holds_curves_and_pictures(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()
    assert {"loss/total", "score", "IoU/road", "speed/images_per_second", "memory/peak_GiB"} <= set(tags["scalars"])
    assert any(tag.startswith("rate/") for tag in tags["scalars"]) and tags["images"]


def test_resumed_run_equals_an_uninterrupted_one(loaded, run_dir: Path, tmp_path: Path):
    work = tmp_path / "half"
    train.run(loaded("length=4 steps", "report.keep_all=true"), work)
    halfway = checkpoint.load(work / "step-00000002.pt")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    checkpoint.save(fresh / "last.pt", halfway)
    train.run(loaded(), fresh, "auto")
    a, b = (checkpoint.load(path / "last.pt")["model"] for path in (run_dir, fresh))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_scores_of_the_checkpoint_are_those_of_the_run(run_dir: Path):
    stored = checkpoint.load(run_dir / "best.pt")
    result = evaluate_checkpoint(run_dir / "best.pt", ["runtime.workers=0"])
    assert result is not None
    scores, pictures, split = result
    assert split == "val" and scores.mean_iou == pytest.approx(stored["best_score"], abs=1e-9) and len(pictures) == 1
    assert math.isfinite(scores.mean_iiou)


def test_the_network_that_comes_back_is_ready_to_use(run_dir: Path):
    model, cfg, meta = from_checkpoint(run_dir / "best.pt", ["predict.overlap=0.5"])
    assert not model.training and cfg.predict.overlap == 0.5 and meta["classes"][0] == "road"
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 64, 64))["out"]).all()


def test_moving_average_is_what_comes_back(loaded, tmp_path: Path):
    train.run(loaded("optim.ema_decay=0.5", "length=2 steps"), tmp_path / "ema")
    content = checkpoint.load(tmp_path / "ema/last.pt")
    model, _, _ = from_checkpoint(tmp_path / "ema/last.pt")
    key = "classifier.low_classifier.weight"
    assert torch.equal(model.state_dict()[key], content["ema"][key])
    assert not torch.equal(content["ema"][key], content["model"][key])


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen_bn", "none", "sync_bn", "in", "ln"])
def test_every_norm_trains(loaded, norm: str, tmp_path: Path):
    result = train.run(loaded(f"norm.name={norm}", "length=1 step", "report.tensorboard=false"), tmp_path / norm)
    assert result.step == 1 and result.score is not None


def test_calibrated_conversion_trains_resumes_and_comes_back(loaded, tmp_path: Path):
    options = ["norm.calibrate_batches=1", "length=1 step", "report.eval_every=1 step"]
    train.run(loaded(*options), tmp_path / "run")
    train.run(loaded(*options, "length=2 steps"), tmp_path / "run", "auto")
    model, _, _ = from_checkpoint(tmp_path / "run/last.pt")
    assert checkpoint.load(tmp_path / "run/last.pt")["step"] == 2 and not model.training


def test_auxiliary_head_serves_training_only(loaded, tmp_path: Path):
    options = ["model.name=deeplabv3_mobilenet_v3_large", "model.aux=true", "length=1 step"]
    train.run(loaded(*options), tmp_path / "aux")
    rows = [json.loads(line) for line in (tmp_path / "aux/metrics.jsonl").read_text().splitlines()]
    assert set(rows[0]["parts"]) == {"main", "aux"}
    model, _, _ = from_checkpoint(tmp_path / "aux/last.pt")
    assert set(model(torch.randn(1, 3, 64, 64))) == {"out"}


def test_another_network_in_the_checkpoint_is_named(run_dir: Path):
    with pytest.raises(UserError, match=r"best.pt: these weights are of another network(.|\n)*check norm.name"):
        from_checkpoint(run_dir / "best.pt", ["norm.name=bn"])
    with pytest.raises(UserError, match="another network"):
        from_checkpoint(run_dir / "best.pt", ["model.name=fcn_resnet50", "model.output_stride=32"])


def test_other_classes_and_other_tasks_are_named(run_dir: Path, tmp_path: Path):
    content = checkpoint.load(run_dir / "best.pt")
    checkpoint.save(tmp_path / "other.pt", {**content, "meta": {"classes": ["a", "b"]}})
    with pytest.raises(UserError, match=r"other.pt: predicts 2 classes \(a, b, ...\)"):
        from_checkpoint(tmp_path / "other.pt")
    checkpoint.save(tmp_path / "task.pt", {**content, "task": "classify"})
    with pytest.raises(UserError, match="a checkpoint of the task 'classify', expected one of 'seg'"):
        from_checkpoint(tmp_path / "task.pt")
    head = {
        k: v[:5] if k.startswith("classifier.") and "low_classifier" in k else v for k, v in content["model"].items()
    }
    checkpoint.save(tmp_path / "classes.pt", {**content, "model": head})
    with pytest.raises(
        UserError, match=r"low_classifier.bias: here \(19,\), in the file \(5,\)(.|\n)*number of classes"
    ):
        from_checkpoint(tmp_path / "classes.pt")


def test_work_directory_of_another_config_is_refused(loaded, run_dir: Path):
    with pytest.raises(UserError, match=r"was trained with another configuration:\n  optim.lr: was 0.01, now 0.5"):
        train.run(loaded("optim.lr=0.5"), run_dir, "auto")
    with pytest.raises(UserError, match="holds the checkpoints of a run.*--resume auto, or choose another --work-dir"):
        train.run(loaded(), run_dir)


def test_loss_that_is_not_finite_stops_and_names_the_images(loaded, run_dir: Path, tmp_path: Path):
    work = tmp_path / "nan"
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step \d+.*nan_batch.json") as caught:
        train.run(loaded("optim.lr=1e30", "norm.name=none", "optim.momentum=0.9"), work)
    assert "lower optim.lr" in str(caught.value)
    batch = json.loads((work / "nan_batch.json").read_text())
    assert all(
        name.endswith("_leftImg8bit.png") for one in batch["batches"] for names in [one["names"]] for name in names
    )
    if (work / "last.pt").exists():
        good = checkpoint.load(work / "last.pt")
        assert all(torch.isfinite(value).all() for value in good["model"].values() if value.is_floating_point())


def test_missing_data_is_one_clear_error_before_anything_is_written(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = load(tmp_path / "tiny.yaml", [f"data.root={tmp_path}/none"], SegConfig)
    with pytest.raises(UserError, match=r"none.*make_sample.py"):
        train.run(config, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_files_that_vanish_meanwhile_are_named_and_the_checkpoint_stays(
    loaded, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, save = tmp_path / "data", checkpoint.save
    shutil.copytree(sample_root, root)

    def save_and_remove(path: Path, state: dict) -> None:
        save(path, state)
        shutil.rmtree(root / "leftImg8bit/train", ignore_errors=True)

    monkeypatch.setattr(checkpoint, "save", save_and_remove)
    with pytest.raises(UserError, match=r"leftImg8bit/train/\S+\.png: (?!.*Traceback)"):
        train.run(loaded(f"data.root={root}", "runtime.workers=1"), tmp_path / "run")
    assert checkpoint.load(tmp_path / "run/last.pt")["step"] >= 1


def test_broken_label_in_validation_shows_before_the_first_step(loaded, sample_root: Path, tmp_path: Path):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(sample_root, root)
    label = sorted(root.glob("gtFine/val/*/*_labelIds.png"))[0]
    cv2.imwrite(str(label), np.full((64, 128), 77, np.uint8))
    with pytest.raises(UserError, match=rf"{label.name}.*77"):
        train.run(loaded(f"data.root={root}"), tmp_path / "work")
    assert not (tmp_path / "work/last.pt").exists()


def test_validation_labels_that_are_all_ignored_end_the_run(loaded, void_root: Path, tmp_path: Path):
    with pytest.raises(UserError, match=f"the split 'val' in {void_root}: no pixel has an evaluated class"):
        train.run(loaded(f"data.root={void_root}", "length=2 steps"), tmp_path / "work")
    assert not (tmp_path / "work" / "metrics.jsonl").exists()  # before anything was trained


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.train_split=train+test", "data.train_split: 'train.test' has images without labels, .* is .*/test/"),
        ("data.val_split=val+test", "/test/.*: has no label to score against, the split 'val.test' has no public ones"),
    ],
)
def test_splits_without_labels_are_refused_before_anything_is_written(loaded, override: str, told: str, tmp_path: Path):
    with pytest.raises(UserError, match=told):
        train.run(loaded(override, "length=2 steps"), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_one_class_is_nothing_to_learn(loaded, tmp_path: Path):
    root = tmp_path / "data"
    layouts.folder(root)
    entries = [
        "{id: 0, name: rest, color: [0, 0, 0], ignore: true}",
        "{id: 1, name: road, color: [9, 9, 9], train_id: 0}",
    ]
    (root / "labels.yaml").write_text("".join(f"- {entry}\n" for entry in entries))
    with pytest.raises(UserError, match="labels.yaml.*: has the class 'road' alone, .* give the rest a train_id"):
        train.run(loaded(f"data.root={root}", "data.name=folder"), tmp_path / "work")


def test_a_longer_schedule_takes_effect_at_once(loaded, tmp_path: Path):
    work = tmp_path / "longer"
    train.run(loaded("length=2 steps"), work)
    train.run(loaded("length=4 steps"), work, "auto")
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: next(iter(row["rates"].values())) for row in rows if row["kind"] == "train"}
    assert rates[3] == pytest.approx(0.01 * (1 - 2 / 4) ** 0.9)


def test_a_run_that_starts_from_anothers_checkpoint_gets_its_own_best(loaded, run_dir: Path, tmp_path: Path):
    result = train.run(loaded("length=6 steps"), tmp_path / "new", str(run_dir / "last.pt"))
    assert result.step == 6 and (tmp_path / "new/best.pt").exists()


def test_weights_that_blow_up_are_found_before_the_evaluation(loaded, tmp_path: Path):
    options = ["optim.lr=1e18", "report.log_every=100 steps", "report.eval_every=2 steps", "length=2 steps"]
    with pytest.raises(UserError, match=r"after step 2 the weights are spoilt|the loss became"):
        train.run(loaded(*options), tmp_path / "work")


def test_statistics_of_an_image_are_validated():
    from seg.config import DataConfig

    for key, value, text in (
        ("scale", (2, 0.5), "expected the smaller factor first"),
        ("std", (0, 1, 1), "greater than 0"),
        ("mean", (100, 0, 0), "less than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=text):
            DataConfig(**{key: value})


@pytest.mark.filterwarnings("error:runtime.amp")
def test_slow_bfloat16_is_told_once_by_a_training_and_once_by_a_program(
    loaded, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    train.run(loaded("length=2 steps", "report.eval_every=1 step", "runtime.amp=bf16", "norm.name=bn"), tmp_path / "x")
    told = "".join(capfd.readouterr())
    assert told.count("this processor has no instructions for bfloat16") == 1
    evaluate_checkpoint(run_dir / "best.pt", ["runtime.workers=0", "runtime.amp=bf16"])
    assert capfd.readouterr().err.startswith("warning: runtime.amp=bf16: this processor has no instructions")
    evaluate_checkpoint(run_dir / "best.pt", ["runtime.workers=0"])
    assert "instructions" not in capfd.readouterr().err


def test_a_training_starts_from_a_whole_network_once(
    loaded, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A second stage; the file may be gone when the run is resumed or used."""
    first = Path(shutil.copy(run_dir / "best.pt", tmp_path / "first.pt"))
    options = [f"model.weights={first}", "model.backbone_weights=torchvision", "optim.lr=1.0e-9", "length=2 steps"]
    train.run(loaded(*options), tmp_path / "second")
    said = capsys.readouterr().out
    assert f"weights of {first}; model.backbone_weights=torchvision is not loaded beside them\n" in said
    a, b = (checkpoint.load(path)["model"] for path in (first, tmp_path / "second/last.pt"))
    assert a.keys() == b.keys()
    weights = [name for name in a if name.endswith("weight")]
    assert weights and all(torch.allclose(a[name], b[name], atol=1e-6) for name in weights)
    first.unlink()
    train.run(loaded(*options[:3], "length=3 steps"), tmp_path / "second", "auto")
    assert "weights of" not in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "second/last.pt")["step"] == 3
    assert from_checkpoint(tmp_path / "second/best.pt")[1].model.weights == str(first)
    with pytest.raises(UserError, match="model.weights: .*first.pt: cannot read the checkpoint: No such file"):
        train.run(loaded(*options, "data.root=/nowhere"), tmp_path / "third", "auto")
    assert not (tmp_path / "third").exists(), "told before the data"


def test_a_network_of_other_classes_starts_from_one_with_batch_norm(
    loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train.run(loaded("norm={name: bn}", "length=2 steps"), tmp_path / "first")
    stored = checkpoint.load(tmp_path / "first/last.pt")
    for key in ("classifier.low_classifier", "classifier.high_classifier"):
        for part in ("weight", "bias"):
            stored["model"][f"{key}.{part}"] = stored["model"][f"{key}.{part}"][:7]
    checkpoint.save(tmp_path / "seven.pt", {**stored, "meta": {**stored["meta"], "classes": list("abcdefg")}})
    options = [f"model.weights={tmp_path / 'seven.pt'}", "norm.calibrate_batches=1", "length=1 step"]
    capsys.readouterr()
    train.run(loaded(*options), tmp_path / "second")
    said = capsys.readouterr().out
    heads = "classifier.low_classifier and classifier.high_classifier"
    assert f"weights of {tmp_path / 'seven.pt'}; {heads} start anew (7 classes in the file, 19 here)\n" in said
    assert "outputs differ from before by" in said


def test_a_backbone_from_a_whole_network_is_told(loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train.run(loaded("norm={name: bn}", "length=1 step"), tmp_path / "first")
    capsys.readouterr()
    train.run(loaded(f"model.backbone_weights={tmp_path / 'first/last.pt'}", "length=1 step"), tmp_path / "second")
    assert "the encoder alone was taken (not classifier); to take all, set model.weights" in capsys.readouterr().out

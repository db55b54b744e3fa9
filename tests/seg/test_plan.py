"""The memory plan of a segmentation config, and the program that prints it."""

import math
import sys
from pathlib import Path

import pytest

from engine.config import load
from engine.errors import UserError
from seg import predict
from seg.config import SegConfig
from seg.plan import plan, workload
from tools import train as program

CONFIG = """
task: seg
length: 2 steps
batch_size: 4
data: {crop: [64, 96]}
model: {name: lraspp_mobilenet_v3_large, output_stride: 16}
norm: {name: deconv, block: 16}
runtime: {workers: 0, device: cpu, threads: 1}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path / "tiny.yaml"


def test_a_batch_has_the_crops_size_and_the_tables_classes(config: Path):
    work = workload(load(config, [], SegConfig).config)
    batch = work.batch(3)
    assert work.smaller == "predict.window"  # one image at a time already
    two = workload(load(config, ["data.eval_batch_size=2"], SegConfig).config)
    assert two.smaller == "data.eval_batch_size"
    assert batch["image"].shape == (3, 3, 64, 96) and batch["target"].shape == (3, 64, 96)
    assert int(batch["target"].max()) == 18 and len(batch["name"]) == 3


def test_an_evaluation_takes_images_of_the_validations_size(config: Path, sample_root: Path):
    keys = ["batch_size=1", "norm.name=bn", "data.base_size=null", "data.eval_base_size=null"]
    there = plan(load(config, [*keys, f"data.root={sample_root}"], SegConfig), 2**40)
    missing = plan(load(config, [*keys, "data.root=nowhere"], SegConfig), 2**40)
    assert there.evaluation > missing.evaluation > 0 and there.curves == missing.curves
    assert "taken for as large as data.crop" in str(missing) and "as large as" not in str(there)


def test_a_larger_crop_takes_more(config: Path):
    keys = ["batch_size=1", "norm.name=bn"]
    small = plan(load(config, keys, SegConfig), 2**40)
    large = plan(load(config, [*keys, "data.crop=[128,192]"], SegConfig), 2**40)
    assert large.parts == small.parts
    assert large.curves[False].step(1, 1) > 1.5 * small.curves[False].step(1, 1)


def test_no_label_is_read_and_automatic_weights_take_what_given_ones_do(config: Path, tmp_path: Path):
    """There is no data at all."""
    keys = ["batch_size=1", "norm.name=bn", f"data.root={tmp_path}/none"]
    auto, plain = (
        plan(load(config, [*keys, f"loss.class_weights={weights}"], SegConfig), 2**40)
        for weights in ("auto", str([2.0] * 19))
    )
    assert auto.parts == plain.parts and auto.curves == plain.curves
    with pytest.raises(UserError, match="class_weights: auto has no effect with the loss dice"):
        workload(load(config, [*keys, "loss.class_weights=auto", "loss.name=dice"], SegConfig).config)


@pytest.mark.parametrize("size, status, text", [("4GiB", 0, "micro_batch=2"), ("1MiB", 1, "nothing fits into 1.0 MiB")])
def test_the_program_prints_the_plan_and_trains_nothing(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: str,
    status: int,
    text: str,
):
    monkeypatch.chdir(config.parent)
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.yaml", "batch_size=2", "norm.name=bn", "--plan", size])
    assert program.main() == status
    out = capsys.readouterr().out
    assert out.startswith("memory of a training step, images of 3 x 64 x 96, norm bn, on cpu:") and text in out
    assert [path.name for path in config.parent.iterdir()] == ["tiny.yaml"]


def test_a_wrong_size_is_one_line(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--plan", "much"])
    assert program.main() == 2
    assert capsys.readouterr().err == (
        "error: --plan: found 'much', expected a size of memory with its unit, such as 11GiB or 900MiB\n"
    )


def test_an_evaluation_that_overflows_is_measured_and_one_without_memory_is_told(
    config: Path, monkeypatch: pytest.MonkeyPatch
):
    """Running statistics are not settled yet; a GPU's own error, or a CPU's words, are one of ours in the predictor."""
    loaded = load(config, ["batch_size=1", "norm.name=bn", "data.root=nowhere"], SegConfig)
    want = plan(loaded, 2**40).evaluation
    whole = predict.logits_of
    monkeypatch.setattr(predict, "logits_of", lambda *args: whole(*args) * math.nan)
    assert plan(loaded, 2**40).evaluation == pytest.approx(want, rel=0.5)

    def fails(*args: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(predict, "logits_of", fails)
    with pytest.raises(
        UserError, match="--plan: not even an evaluation of 1 image fits into the memory .* smaller predict.window"
    ):
        plan(loaded, 2**40)


def test_a_validation_image_of_any_size_is_no_hindrance(
    config: Path, sample_root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    work = workload(load(config, [f"data.root={sample_root}"], SegConfig).config)
    assert "taken for as large as data.crop" in work.remark


def test_weights_to_start_from_are_not_read(config: Path, sample_root: Path):
    overrides = [f"data.root={sample_root}", "model.weights=nowhere.pt"]
    assert workload(load(config, overrides, SegConfig).config).build()

"""The memory plan of a classifier; no image is read."""

from pathlib import Path

from classify.config import ClassifyConfig
from classify.plan import plan, workload
from engine.config import load

CONFIG = """
task: classify
length: 2 steps
batch_size: 8
data: {name: mnist, root: ROOT}
model: {name: lenet}
runtime: {workers: 0, device: cpu, threads: 1}
"""


def test_a_classifier_is_planned_without_its_data(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path / "nowhere")))
    loaded = load(tmp_path / "tiny.yaml", [], ClassifyConfig)
    batch = workload(loaded.config).batch(3)
    info = batch["image"].shape
    assert info[:2] == (3, 1) and batch["target"].shape == (3,)
    found = plan(loaded, 2**40)
    choice = found.choice()
    assert choice is not None and (choice.micro_batch, choice.accumulation) == (8, 1)
    assert found.parts.optimizer == found.parts.parameters  # one momentum
    assert sorted(found.curves[False].measured) == [1, 2, 4, 8]
    assert found.data == 60_000 * 36**2 + 10_000 * 28**2, "padded by 4 for the training"
    assert found.evaluation > found.curves[False].step(8, 1), "of 256 images"
    assert choice.memory == found.process + found.data + found.parts.lasting + found.evaluation
    small = plan(load(tmp_path / "tiny.yaml", ["data.eval_batch_size=2"], ClassifyConfig), 2**40)
    assert small.evaluation < found.evaluation / 100 and small.curves == found.curves
    assert small.options()[0].memory == small.process + small.data + small.parts.lasting + small.curves[False].step(
        8, 1
    )
    assert "the data set " in str(found)


def test_a_frozen_backbone_takes_no_gradients(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path / "nowhere")))
    whole, frozen = (
        plan(load(tmp_path / "tiny.yaml", [f"optim.backbone_lr_factor={factor}"], ClassifyConfig), 2**40)
        for factor in (1, 0)
    )
    assert whole.parts.gradients == whole.parts.parameters == frozen.parts.parameters
    head = 4 * (84 * 10 + 10)
    assert frozen.parts.gradients == frozen.parts.optimizer == head
    assert frozen.curves[False].step(8, 1) < whole.curves[False].step(8, 1)

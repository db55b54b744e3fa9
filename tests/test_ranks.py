"""Scores of one, two and three processes, of numbers of images that divide among none of them, and of fewer images than
processes. One start serves all, since it takes seconds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import distributed
from engine.processes import free_port, in_processes

CASES = ("street, 4 images", "street, 2 images", "classifier, 40 images", "classifier, 2 images")


def street(root: Path, split: str, count: int) -> dict[str, Any]:
    from seg.config import SegConfig
    from seg.data import samples_of
    from seg.evaluate import evaluate_model

    cfg = SegConfig.model_validate(
        {
            "length": "1 epoch",
            "batch_size": 1,
            "data": {"root": root, "eval_batch_size": 2},
            "runtime": {"workers": 0, "device": "cpu"},
        }
    )
    assert len(samples_of(cfg.data, split)) == count
    torch.manual_seed(0)
    return evaluate_model(nn.Conv2d(3, 19, 3, padding=1), cfg, split=split, pictures=0)[0].to_json()


def classifier(count: int, **data: Any) -> dict[str, Any]:
    from classify.config import ClassifyConfig
    from classify.data import describe, eval_batches
    from classify.evaluate import evaluate_model

    cfg = ClassifyConfig.model_validate(
        {
            "task": "classify",
            "length": "1 epoch",
            "batch_size": 2,
            "data": {"eval_batch_size": 3, "size": 32, **data},
            "runtime": {"workers": 0, "device": "cpu"},
        }
    )
    info, cpu = describe(cfg.data), torch.device("cpu")
    batches = eval_batches(cfg, cpu, cfg.data.val_split, distributed.world_size(), distributed.rank())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(len(info.classes)))
    model(torch.zeros(1, 3, 32, 32))
    scores = evaluate_model(model, cfg, info, batches, mistakes=5)
    assert scores.images == count
    mistakes = [(one.name, one.predicted, one.probability) for one in scores.mistakes]
    return {**scores.to_json(), "matrix": scores.matrix.tolist(), "surest": mistakes}


def scores(streets: Path, cifar: Path, pair: Path) -> dict[str, dict[str, Any]]:
    found = (
        street(streets, "train", 4),
        street(streets, "val", 2),
        classifier(40, name="cifar10", root=str(cifar), check_files=False),
        classifier(2, name="folder", root=str(pair), val_split="val"),
    )
    return dict(zip(CASES, found, strict=True))


def two_and_three(out: Path, *roots: Path) -> None:
    """Called in three processes, of which two start anew."""
    rank, port = distributed.rank(), distributed.gather(free_port())[0]
    (out / f"3_{rank}.json").write_text(json.dumps(scores(*roots)))
    distributed.cleanup()
    if rank < 2:
        os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(port))
        distributed.setup("cpu", timeout_minutes=5)
        (out / f"2_{rank}.json").write_text(json.dumps(scores(*roots)))


@pytest.fixture(scope="module")
def roots(
    sample_root: Path, cifar_root: Path, image_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    pair = tmp_path_factory.mktemp("pair")
    for name in ("bus", "car"):
        (pair / "val" / name).mkdir(parents=True)
        shutil.copy(image_root / "val" / name / "0.png", pair / "val" / name)
    return [sample_root, cifar_root, pair]


@pytest.fixture(scope="module")
def several(roots: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores")
    in_processes(two_and_three, out, *roots, world=3)
    return out


def test_scores_do_not_depend_on_the_number_of_processes(several: Path, roots: list[Path]) -> None:
    alone = json.loads(json.dumps(scores(*roots)))
    assert len(list(several.iterdir())) == 5
    for path in several.iterdir():
        found = json.loads(path.read_text())
        for case in CASES:
            assert found[case] == close(alone[case]), (path.name, case)
    assert 0 < alone["street, 4 images"]["averageScoreClasses"] < 1
    assert [alone[case]["images"] for case in CASES] == [4, 2, 40, 2]


def close(value: Any) -> Any:
    """To compare with: sums of floats (losses, weights of instances) are added up in another order."""
    if isinstance(value, dict):
        return {key: close(one) for key, one in value.items()}
    if isinstance(value, list):
        return [close(one) for one in value]
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value

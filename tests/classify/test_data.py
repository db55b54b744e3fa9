"""What is known of a data set, how a config picks from it, and options that would do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from classify import data
from classify.config import ClassifyConfig, DataConfig
from classify.sets import SETS
from engine.errors import UserError

CPU = torch.device("cpu")


def config(root: Path, batch_size: int = 10, micro_batch: int | None = None, **options: Any) -> ClassifyConfig:
    section = {"root": root, "check_files": False, "download": False, **options}
    return ClassifyConfig.model_validate(
        {
            "length": "1 epoch",
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "data": section,
            "runtime": {"workers": 0},
        }
    )


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size"),
    [
        ("cifar10", 10, 3, 32),
        ("cifar100", 100, 3, 32),
        ("mnist", 10, 1, 28),
        ("fashion_mnist", 10, 1, 28),
        ("svhn", 10, 3, 32),
        ("stl10", 10, 3, 96),
        ("imagenet16", 1000, 3, 16),
        ("imagenet32", 1000, 3, 32),
    ],
)
def test_describe_needs_no_files(name: str, classes: int, channels: int, size: int) -> None:
    info = data.describe(DataConfig(name=name, root=Path("/no/place")))
    assert (len(info.classes), info.channels, info.size) == (classes, channels, size)
    assert len(set(info.classes)) == classes
    assert len(info.mean) == len(info.std) == channels and 0.1 < min(info.mean + info.std) < 0.51
    assert data.describe(DataConfig(name=name, size=20)).size == 20


def test_describe_a_folder(image_root: Path) -> None:
    info = data.describe(DataConfig(name="folder", root=image_root, val_split="val"))
    assert info == data.DataInfo(("bus", "car", "tram"), 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    own = data.describe(DataConfig(name="folder", root=image_root, mean=(0.1,), std=(0.2,), size=32))
    assert (own.channels, own.size, own.mean, own.std) == (1, 32, (0.1,), (0.2,))


def test_mean_and_std_have_a_number_for_each_channel(image_root: Path) -> None:
    own = data.describe(DataConfig(mean=(0.5, 0.5, 0.5)))
    assert own.mean == (0.5, 0.5, 0.5) and own.std == SETS["cifar10"].std
    with pytest.raises(UserError, match=r"data.mean: 1 numbers for images of 3 channels \(cifar10\)"):
        data.describe(DataConfig(mean=(0.5,)))
    with pytest.raises(UserError, match=r"data.std: 3 numbers for images of 1 channel \(mnist\)"):
        data.describe(DataConfig(name="mnist", std=(0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match=r"data.std: 3 numbers for images of 1 channel \(folder\)"):
        data.describe(DataConfig(name="folder", root=image_root, mean=(0.5,)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"crop_scale": (0.5, 1.0)},
            "data.crop_scale: has no effect with data.name=cifar10, it is for data.name=folder",
        ),
        ({"eval_resize": 40}, "data.eval_resize: has no effect with data.name=cifar10"),
        ({"on_error": "skip", "name": "mnist"}, "data.on_error: has no effect with data.name=mnist"),
        (
            {"name": "folder", "crop_padding": 2},
            "data.crop_padding: has no effect with data.name=folder, it is for data",
        ),
        ({"randaugment_magnitude": 5}, "data.randaugment_magnitude: has no effect without data.randaugment"),
        ({"name": "folder", "eval_resize": 200}, "data.eval_resize: 200 is less than data.size, the 224 pixels"),
    ],
)
def test_options_that_would_do_nothing(image_root: Path, options: dict[str, Any], text: str) -> None:
    cfg = config(image_root, **options)
    for call in (lambda: data.describe(cfg.data), lambda: data.train_batches(cfg, CPU)):
        with pytest.raises(UserError, match=text):
            call()


def test_defaults_may_be_written_out(image_root: Path) -> None:
    for name in ("cifar10", "folder"):
        section = DataConfig(name=name, root=image_root).model_dump()
        assert data.describe(DataConfig.model_validate(section)).channels == 3


def test_batches_of_cifar(cifar_root: Path) -> None:
    cfg = config(cifar_root, eval_batch_size=16)
    training = data.train_batches(cfg, CPU)
    batch = next(training.epoch(0))
    assert len(training) == 10 and batch["image"].shape == (10, 3, 32, 32)
    sizes = [len(batch["name"]) for batch in data.eval_batches(cfg, CPU)]
    assert sizes == [16, 16, 8]
    (first, *_) = data.eval_batches(cfg, CPU, "train")
    assert first["name"][0] == "cifar10/train/0"
    with pytest.raises(UserError, match="cifar10 has no split 'dev'; there are: train, test, val"):
        data.eval_batches(cfg, CPU, "dev")


@pytest.mark.parametrize("size", [10**7, 10**10])
def test_a_size_beyond_the_memory_is_told(cifar_root: Path, size: int) -> None:
    with pytest.raises(UserError, match=rf"data.size: {size}: 40 images of {size}x{size} take \d+.* GiB, more memory"):
        data.eval_batches(config(cifar_root, size=size), CPU)


def test_a_size_of_one_pixel_is_refused(cifar_root: Path) -> None:
    """torch's resizing of uint8 fails on it."""
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        config(cifar_root, size=1)


def test_size(cifar_root: Path) -> None:
    cfg = config(cifar_root, size=20)
    assert next(data.train_batches(cfg, CPU).epoch(0))["image"].shape == (10, 3, 20, 20)
    assert next(iter(data.eval_batches(cfg, CPU)))["image"].shape[1:] == (3, 20, 20)


def test_a_limit_takes_the_first_of_each_class_in_turn(cifar_root: Path, image_root: Path) -> None:
    for limit, most in ((20, 2), (25, 3)):
        batches = data.train_batches(config(cifar_root, train_limit=limit, batch_size=5), CPU)
        labels = torch.cat([batch["target"] for batch in batches.epoch(0)])
        counts = labels.bincount(minlength=10)
        assert len(labels) == limit and counts.max() == most and counts.min() == 2
        assert counts[:5].tolist() == [most] * 5
    cfg = config(image_root, name="folder", train_limit=4, batch_size=4, size=16)
    batch = next(data.train_batches(cfg, CPU).epoch(0))
    names = sorted(str(Path(name).relative_to(image_root / "train")) for name in batch["name"])
    assert names == ["bus/0.png", "bus/1.png", "car/0.png", "tram/0.png"]
    everything = data.train_batches(config(cifar_root, train_limit=10**6, batch_size=100), CPU)
    assert len(everything) == 1
    with pytest.raises(UserError, match="has 20 images, fewer than batch_size 64"):
        data.train_batches(config(cifar_root, train_limit=20, batch_size=64), CPU)


def test_limited_is_right_for_any_order_of_labels() -> None:
    labels = np.array([2, 2, 0, 2, 4, 0, 4])
    for limit, chosen in ((1, [2]), (3, [0, 2, 4]), (5, [0, 1, 2, 4, 5]), (6, [0, 1, 2, 4, 5, 6])):
        items, kept = data._limited((np.arange(7), labels), limit)
        assert items.tolist() == chosen and kept.tolist() == labels[chosen].tolist()


def test_mixing_needs_a_second_image(cifar_root: Path) -> None:
    with pytest.raises(UserError, match="data.mixup, data.cutmix: a micro-batch of 1 image has no other to mix with"):
        data.train_batches(config(cifar_root, mixup=0.5, micro_batch=1), CPU)

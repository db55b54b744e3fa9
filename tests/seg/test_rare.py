"""Counting classes, weights, repeated images, rare crops and coarse labels: plain formulas, and exact resuming."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import UserError
from seg import data, rare
from seg.config import SegConfig
from seg.label_tables import CITYSCAPES

ROAD, CAR, TRAIN = 7, 26, 31


def write(root: Path, masks: list[np.ndarray], split: str = "train", kind: str = "gtFine") -> None:
    rng = np.random.default_rng(0)
    for i, mask in enumerate(masks):
        name = f"ulm_{i:06d}_000019"
        image, label = root / "leftImg8bit" / split / "ulm", root / kind / split / "ulm"
        image.mkdir(parents=True, exist_ok=True)
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)).save(image / f"{name}_leftImg8bit.png")
        Image.fromarray(mask).save(label / f"{name}_{kind}_labelIds.png")


def mask(*ids: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Stripes of the ids; the first takes what is left."""
    pixels = np.full(size, ids[0], np.uint8)
    for i, value in enumerate(ids[1:]):
        pixels[:, i] = value
    return pixels


def config(root: Path, **options: Any) -> SegConfig:
    settings = {"root": root, "crop": (16, 16), **options}
    return SegConfig.model_validate(
        {"length": "1 epochs", "batch_size": 2, "data": settings, "runtime": {"workers": 0, "device": "cpu"}}
    )


def flat(batches: Any) -> list[tuple[list[str], bytes]]:
    return [(batch["name"], batch["image"].numpy().tobytes()) for batch in batches]


# ---------------------------------------------------------------- counting and weights


def test_shares_and_median_weights(tmp_path: Path) -> None:
    write(tmp_path, [mask(ROAD), mask(ROAD, CAR, 0), mask(ROAD, CAR, TRAIN)])
    cfg = config(tmp_path)
    shares = data.class_shares(cfg)
    pixels = {"road": 32 * (48 + 46 + 46), "car": 64, "train": 32}
    total = sum(pixels.values())
    assert shares.sum() == pytest.approx(1)
    for name, share in zip(CITYSCAPES.classes, shares, strict=True):
        assert share == pytest.approx(pixels.get(name, 0) / total)
    size = 32 * 48
    frequency = {"road": pixels["road"] / (3 * size - 32), "car": 64 / (2 * size - 32), "train": 32 / size}
    middle = np.median(list(frequency.values()))
    weights = data.class_weights(cfg)
    for name, weight in zip(CITYSCAPES.classes, weights, strict=True):
        assert weight == pytest.approx(middle / frequency[name] if name in frequency else 1.0)
    only = data.class_shares(cfg, images=1)
    assert only[0] == 1 and only.sum() == 1


def test_counts_are_kept_until_a_file_or_the_table_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [mask(ROAD), mask(ROAD, CAR)])
    samples = data.Cityscapes(tmp_path, "train").samples
    work = tmp_path / "work"
    counts = rare.class_counts(samples, CITYSCAPES, work)
    read: list[Path] = []
    real = rare.read_label_ids
    monkeypatch.setattr(rare, "read_label_ids", lambda path: read.append(path) or real(path))
    assert np.array_equal(rare.class_counts(samples, CITYSCAPES, work), counts) and not read
    assert samples[1].label is not None
    Image.fromarray(mask(CAR)).save(samples[1].label)
    os.utime(samples[1].label, (1, 1))
    again = rare.class_counts(samples, CITYSCAPES, work)
    assert again[1].sum() == again[1, CITYSCAPES.classes.index("car")] == 32 * 48 and len(read) == 2
    (work / rare.CACHE).write_bytes(b"spoilt")
    assert np.array_equal(rare.class_counts(samples, CITYSCAPES, work), again) and len(read) == 4
    (work / rare.CACHE).write_bytes((work / rare.CACHE).read_bytes()[:100])  # cut off
    assert np.array_equal(rare.class_counts(samples, CITYSCAPES, work), again) and len(read) == 6


def test_nothing_labelled(tmp_path: Path) -> None:
    write(tmp_path, [mask(0), mask(0)])
    with pytest.raises(
        UserError, match="2 label files: no pixel of any class, all are ignored; check data.name"
    ) as told:
        data.class_shares(config(tmp_path))
    assert str(told.value).startswith(f"the split 'train' in {tmp_path}: ")  # which files is half of what to look for
    with pytest.raises(UserError, match="has no label to count classes in"):
        rare.class_counts([data.Sample(tmp_path / "leftImg8bit", None, None, "x", "")], CITYSCAPES)


# ---------------------------------------------------------------- repeated images


def test_repeat_factors_are_those_of_the_paper() -> None:
    counts = np.zeros((100, 3), np.int64)
    counts[:, 0] = 5
    counts[:4, 1] = 1
    counts[3:4, 2] = 1
    factors = rare.repeat_factors(counts, 0.16)
    assert factors is not None
    assert factors.tolist() == pytest.approx([2, 2, 2, 4] + [1] * 96)
    assert rare.repeat_factors(counts, 0.01) is None and rare.repeat_factors(counts, 0.0) is None


def test_images_come_in_proportion_to_their_factors_in_an_epoch_of_the_same_length() -> None:
    factors = np.array([4.0, 2.5] + [1.0] * 48)
    pool = rare.Pool(50, 3, factors)
    seen: Counter[int] = Counter()
    for epoch in range(400):
        indices = pool.epoch(epoch)
        assert len(indices) == 50 and len(set(indices.tolist())) == 50
        seen.update((indices % 50).tolist())
    each = np.array([seen[i] for i in range(50)]) / 400
    assert each == pytest.approx(factors * 50 / factors.sum(), abs=0.25)
    assert each[0] == pytest.approx(4 * 50 / factors.sum(), rel=0.05) and each[2:].std() < 0.03
    assert np.array_equal(rare.Pool(50, 3, factors).epoch(7), pool.epoch(7))
    assert not np.array_equal(rare.Pool(50, 4, factors).epoch(7), pool.epoch(7))


def test_repetitions_have_crops_of_their_own_and_resume_exactly(tmp_path: Path) -> None:
    write(tmp_path, [mask(ROAD, TRAIN), *[mask(ROAD)] * 7])
    cfg = config(tmp_path, repeat_rare=1.0)
    batches = data.train_batches(cfg, cache=tmp_path / "work")
    assert len(batches) == 4 and (tmp_path / "work" / rare.CACHE).exists()
    orders = [[i for step in batches.order(epoch) for i in step] for epoch in range(20)]
    repeated = next(e for e, order in enumerate(orders) if sum(i % 8 == 0 for i in order) > 1)
    first, second = [i for i in orders[repeated] if i % 8 == 0][:2]
    dataset = data.SegDataset(data.Cityscapes(tmp_path, "train").samples, cfg.data, 0)
    one, other = dataset[repeated, first], dataset[repeated, second]
    assert one["name"] == other["name"] and not torch.equal(one["image"], other["image"])
    whole = flat(batches.epoch(repeated))
    fresh = data.train_batches(cfg, cache=tmp_path / "work")
    assert flat(fresh.epoch(repeated, start=2)) == whole[2:]
    two = [data.train_batches(cfg.model_copy(update={"micro_batch": 1}), 2, rank) for rank in (0, 1)]
    for step, images in enumerate(batches.order(repeated)):
        assert sorted(images) == sorted(i for part in two for i in part.order(repeated)[step])


# ---------------------------------------------------------------- coarse labels


def coarse_root(tmp_path: Path) -> Path:
    write(tmp_path, [mask(ROAD)] * 10)
    write(tmp_path, [mask(CAR)] * 30, "train_extra", "gtCoarse")
    return tmp_path


def test_coarse_images_take_their_share_and_the_epoch_keeps_its_length(tmp_path: Path) -> None:
    cfg = config(coarse_root(tmp_path), coarse_share=0.4)
    batches = data.train_batches(cfg)
    assert len(batches) == 5
    seen: Counter[int] = Counter()
    for epoch in range(15):
        order = [i for step in batches.order(epoch) for i in step]
        assert len(order) == 10 and sum(i % 40 >= 10 for i in order) == 4
        seen.update(i % 40 for i in order)
    assert {seen[i] for i in range(10)} == {9} and {seen[i] for i in range(10, 40)} == {2}
    names = [name for batch in batches.epoch(0) for name in batch["name"]]
    assert sum("train_extra" in name for name in names) == 4
    assert flat(data.train_batches(cfg).epoch(3, start=1)) == flat(batches.epoch(3))[1:]


def test_a_share_of_less_than_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.coarse_share: 0.04 of an epoch of 10 images is less than one; .* 0.1$"):
        data.train_batches(config(coarse_root(tmp_path), coarse_share=0.04))


def test_without_a_share_nothing_coarse_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, [mask(ROAD)] * 2)
    assert len(data.train_batches(config(tmp_path))) == 1
    with pytest.raises(UserError, match=r"has no split 'train_extra'.*leftImg8bit_trainextra\.zip and gtCoarse\.zip"):
        data.train_batches(config(tmp_path, coarse_share=0.5))
    write(tmp_path, [mask(CAR)], "train_extra", "gtFine")
    with pytest.raises(UserError, match=r"has no folder gtCoarse/.*or set data\.coarse_share=0"):
        data.train_batches(config(tmp_path, coarse_share=0.5))


# ---------------------------------------------------------------- rare crops


def test_a_window_lies_around_a_pixel_of_a_class_drawn_by_inverse_share() -> None:
    ids = np.zeros((60, 90), np.uint8)
    ids[2, 3] = 1
    ids[50:, 80:] = 2
    shares = np.array([0.9, 0.02, 0.08])
    drawn: Counter[str] = Counter()
    for seed in range(600):
        rows, columns = rare.window(ids, (20, 30), shares, np.random.default_rng(seed))
        part = ids[rows, columns]
        assert part.shape == (20, 30)
        drawn["one"] += int((part == 1).any())
        drawn["two"] += int((part == 2).any())
    odds = 1 / shares / (1 / shares).sum()
    assert drawn["one"] / 600 == pytest.approx(odds[1], abs=0.08)
    assert drawn["two"] / 600 == pytest.approx(odds[2], abs=0.08)


def test_windows_of_small_and_of_ignored_masks() -> None:
    rows, columns = rare.window(np.full((10, 100), 255, np.uint8), (20, 30), np.ones(3), np.random.default_rng(0))
    assert np.zeros((10, 100))[rows, columns].shape == (10, 30)


def test_rare_crops_show_the_rare_class_and_stay_pure(tmp_path: Path) -> None:
    rare_mask = mask(ROAD, size=(96, 160))
    rare_mask[70:74, 130:134] = TRAIN
    write(tmp_path, [rare_mask] * 2)
    shown = {}
    for chance in (0.0, 1.0):
        cfg = config(tmp_path, rare_crop=chance, scale=(0.9, 1.1))
        batches = data.train_batches(cfg)
        targets = [batch["target"] for epoch in range(30) for batch in batches.epoch(epoch)]
        assert all(target.shape == (2, 16, 16) for target in targets)
        shown[chance] = torch.cat([(target == 16).flatten(1).any(1) for target in targets]).float().mean().item()
    assert shown[0.0] < 0.2 and shown[1.0] > 0.9
    assert flat(batches.epoch(5)) == flat(data.train_batches(cfg).epoch(5))


def test_without_rare_crops_the_draws_are_as_ever(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    ids = np.random.default_rng(1).integers(0, 19, (40, 60), dtype=np.uint8)
    cfg = config(tmp_path).data
    plain = data.augment(image, ids, cfg, (1, 2, 3))
    same = data.augment(image, ids, cfg, (1, 2, 3), np.full(19, 1 / 19))
    assert all(np.array_equal(a, b) for a, b in zip(plain, same, strict=True))

"""Batches of sets in memory: what crop, flip and normalization do, and what each of them depends on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from classify import augment, memory
from classify.config import ClassifyConfig
from classify.memory import MemoryEvalBatches, MemoryTrainBatches
from classify.readers import Arrays
from engine.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def arrays(count: int = 40, channels: int = 3, size: int = 12) -> Arrays:
    rng = np.random.default_rng(count)
    images = rng.integers(1, 256, (count, channels, size, size), dtype=np.uint8)
    return Arrays(images, np.arange(count) % 10)


def config(batch_size: int = 8, micro_batch: int | None = None, seed: int = 0, **data: Any) -> ClassifyConfig:
    return ClassifyConfig.model_validate(
        {
            "length": "1 epoch",
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "data": {"crop_padding": 2, **data},
            "runtime": {"seed": seed},
        }
    )


def training(cfg: ClassifyConfig, data: Arrays | None = None, world: int = 1, rank: int = 0) -> MemoryTrainBatches:
    normalize, mixing = augment.Normalize(MEAN, STD), augment.Mixing(cfg.data, 10)
    return MemoryTrainBatches(data or arrays(), cfg, normalize, mixing, CPU, world, rank)


def by_name(batches: Any) -> dict[str, torch.Tensor]:
    return {name: image for batch in batches for name, image in zip(batch["name"], batch["image"], strict=True)}


def same(first: Any, second: Any) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        a["name"] == b["name"] and torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])
        for a, b in pairs
    )


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def test_a_batch() -> None:
    data = arrays()
    batches = training(config(), data)
    batch = next(batches.epoch(0))
    assert batch["image"].shape == (8, 3, 12, 12) and batch["image"].dtype == torch.float32
    assert batch["target"].dtype == torch.int64 and len(batches) == 5 == len(list(batches.epoch(0)))
    numbers = [int(name.removeprefix("cifar10/train/")) for name in batch["name"]]
    assert batch["target"].tolist() == data.labels[numbers].tolist() and batches.problems == []


def test_each_image_is_one_crop_with_black_around_and_perhaps_flipped() -> None:
    data = arrays()
    seen, flips = set(), 0
    for epoch in range(3):
        for name, image in by_name(training(config(), data).epoch(epoch)).items():
            original = torch.from_numpy(data.images[int(name.split("/")[-1])])
            padded = F.pad(original, (2, 2, 2, 2))
            pixels = to_uint8(image)
            found = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if torch.equal(
                    pixels,
                    (lambda crop, flip: crop.flip(-1) if flip else crop)(
                        padded[:, top : top + 12, left : left + 12], flip
                    ),
                )
            ]
            assert len(found) == 1
            seen.add(found[0][:2])
            flips += found[0][2]
    assert len(seen) > 20 and 40 < flips < 80, "all 25 places and both sides come up in 120 draws"


@pytest.mark.parametrize(
    ("name", "flip", "flipped"),
    [("mnist", None, 0), ("svhn", None, 0), ("svhn", 1.0, 40), ("fashion_mnist", None, 20), ("folder", None, 20)],
)
def test_digits_are_not_mirrored_unless_asked(name: str, flip: float | None, flipped: int) -> None:
    batches = training(config(name=name, flip=flip, crop_padding=0), arrays())
    found = by_name(batches.epoch(0))
    turned = [
        not torch.equal(to_uint8(one), torch.from_numpy(arrays().images[int(n.split("/")[-1])]))
        for n, one in found.items()
    ]
    assert abs(sum(turned) - flipped) < (10 if 0 < flipped < 40 else 1)


def test_draws_are_uniform_and_independent() -> None:
    top, left, flip = memory.draws(20000, 4, 0.25, 0, 0)
    assert set(top) == set(left) == set(range(9)) and set(flip) == {0, 1}
    assert abs(flip.mean() - 0.25) < 0.02 and abs(top.mean() - 4) < 0.1
    assert np.abs(np.corrcoef(np.stack([top, left, flip])) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_ways_of_the_cpu_and_of_gpus_are_one(channels: int, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = F.pad(torch.from_numpy(arrays(30, channels).images), (padding,) * 4)
    index = torch.randperm(30)[:16]
    draw = torch.from_numpy(memory.draws(30, padding, 0.5, 1, 2))[:, index]
    here = memory.crop_and_flip(padded, index, draw, padding)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    there = memory.crop_and_flip(padded, index, draw, padding)
    assert here.shape == (16, channels, 12, 12) and torch.equal(here, there)
    assert not torch.equal(here, torch.from_numpy(arrays(30, channels).images)[index])


def test_normalization() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    result = augment.Normalize(MEAN, STD)(images)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    assert result.dtype == torch.float32 and images.dtype == torch.uint8
    torch.testing.assert_close(result.double(), (images.double() / 255 - mean) / std, atol=1e-6, rtol=1e-6)
    assert torch.equal(augment.Normalize(MEAN, STD)(images[0]), result[0])


ALL: dict[str, Any] = {"randaugment": 2, "erasing": 0.5, "mixup": 0.3, "cutmix": 1.0}


@pytest.mark.parametrize("options", [{}, {"randaugment": 2}, {"erasing": 0.7}, {"mixup": 0.3}, {"cutmix": 1.0}, ALL])
def test_batches_are_a_function_of_seed_and_epoch_from_any_start(options: dict[str, Any]) -> None:
    cfg = config(**options)
    batches = training(cfg)
    whole = list(batches.epoch(1))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert same(training(cfg).epoch(1), whole)
    assert torch.equal(torch.random.get_rng_state(), before), "the training's own numbers go on undisturbed"
    assert same(batches.epoch(1, start=3), whole[3:]) and list(batches.epoch(1, start=5)) == []
    assert not same(batches.epoch(2), whole)
    assert not same(training(config(seed=1, **options)).epoch(1), whole)


@pytest.mark.parametrize("options", [{}, {"randaugment": 2, "erasing": 0.7}])
def test_an_image_does_not_depend_on_ranks_and_micro_batches(options: dict[str, Any]) -> None:
    alone = by_name(training(config(**options)).epoch(4))
    cfg = config(micro_batch=2, **options)
    ranks = [training(cfg, world=2, rank=rank) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [10, 10]
    both = by_name(batch for rank in ranks for batch in rank.epoch(4))
    assert both.keys() == alone.keys() and len(both) == 40
    assert all(torch.equal(both[name], alone[name]) for name in alone)


@pytest.mark.parametrize("options", [{}, ALL])
def test_batches_made_together_are_those_made_alone(options: dict[str, Any]) -> None:
    cfg = config(**options)
    alone, together = training(cfg), training(cfg)
    together.together = 3
    for start in (0, 1):
        assert same(alone.epoch(0, start), together.epoch(0, start))


def test_randaugment_changes_each_image_by_itself() -> None:
    cfg = {"crop_padding": 0, "flip": 0.0}
    plain = by_name(training(config(**cfg)).epoch(0))
    changed = by_name(training(config(randaugment=2, randaugment_magnitude=15, **cfg)).epoch(0))
    different = [name for name in plain if not torch.equal(plain[name], changed[name])]
    assert 20 < len(different) <= 40, "Identity is one of the operations"
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(3, 1, 1)
    white = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(3, 1, 1)
    for image in changed.values():
        assert (image >= black - 1e-5).all() and (image <= white + 1e-5).all()


def test_erasing_leaves_a_rectangle_of_the_mean_colour_in_a_share_of_the_images() -> None:
    data = arrays(200)
    plain = by_name(training(config(), data).epoch(0))
    erased = by_name(training(config(erasing=0.5), data).epoch(0))
    changed = [name for name in plain if not torch.equal(plain[name], erased[name])]
    assert 70 < len(changed) < 130
    for name in changed:
        mask = (plain[name] != erased[name]).any(0)
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert (erased[name][:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 0).all()
        assert torch.equal(erased[name].where(mask, plain[name]), erased[name])


def test_mixup_mixes_images_and_targets_alike() -> None:
    plain = next(training(config()).epoch(0))
    mixed = next(training(config(mixup=1.0)).epoch(0))
    target = mixed["target"]
    assert target.shape == (8, 10) and target.dtype == torch.float32
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    one_hot = F.one_hot(plain["target"], 10).float()
    share = target[0, plain["target"][0]]
    other = plain["image"].roll(1, 0)
    assert 0 < share < 1 and plain["target"][0] != plain["target"][-1]
    torch.testing.assert_close(target, share * one_hot + (1 - share) * one_hot.roll(1, 0))
    torch.testing.assert_close(mixed["image"], share * plain["image"] + (1 - share) * other, atol=1e-5, rtol=1e-4)


def test_cutmix_pastes_a_box_of_the_size_that_the_targets_say() -> None:
    pairs = zip(
        training(config(crop_padding=0)).epoch(0), training(config(crop_padding=0, cutmix=1.0)).epoch(0), strict=True
    )
    for plain, mixed in pairs:
        other = plain["image"].roll(1, 0)
        pasted = (mixed["image"] != plain["image"]).flatten(0, 1).any(0)
        assert torch.equal(mixed["image"], torch.where(pasted, other, plain["image"]))
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns), "a rectangle"
        one_hot, share = F.one_hot(plain["target"], 10).float(), pasted.float().mean()
        torch.testing.assert_close(mixed["target"], (1 - share) * one_hot + share * one_hot.roll(1, 0))


def test_with_both_each_batch_gets_one_of_them_and_ranks_differ() -> None:
    data = arrays(320)
    cfg = config(mixup=1.0, cutmix=1.0, crop_padding=0)
    plain = list(training(config(crop_padding=0), data).epoch(0))
    mixed = list(training(cfg, data).epoch(0))
    kept = [(p["image"] == m["image"]).all(1).float().mean().item() for p, m in zip(plain, mixed, strict=True)]
    cut = sum(share > 0.01 for share in kept)
    assert 8 < cut < 32, "about half of the 40 batches keep pixels as they were"
    shares = [
        next(training(cfg, data, world=2, rank=rank).epoch(0))["target"].max(1).values.tolist() for rank in range(2)
    ]
    assert shares[0] != shares[1]


def test_each_validation_image_is_on_one_rank_as_it_is() -> None:
    data = arrays(23)
    cfg = config(eval_batch_size=4)
    found: dict[str, torch.Tensor] = {}
    for rank in range(3):
        batches = MemoryEvalBatches(data, cfg, augment.Normalize(MEAN, STD), CPU, "test", 3, rank)
        once, again = list(batches), list(batches)
        assert same(once, again) and len(once) == len(batches) == 2
        assert all(len(batch["name"]) <= 4 for batch in once)
        for batch in once:
            assert batch["target"].dtype == torch.int64
            for name, image, target in zip(batch["name"], batch["image"], batch["target"], strict=True):
                number = int(name.removeprefix("cifar10/test/"))
                assert name not in found and target == data.labels[number]
                assert torch.equal(to_uint8(image), torch.from_numpy(data.images[number]))
                found[name] = image
    assert len(found) == 23


def test_the_digest_is_of_labels_and_of_pixels_before_resizing() -> None:
    data = arrays()
    other = Arrays(data.images.copy(), data.labels)
    other.images[7, 1, 3, 4] ^= 1
    found = {name: memory.fingerprint(one) for name, one in (("as", data), ("other", other))}
    assert found["as"].startswith("40 images, ") and found["as"] != found["other"]
    assert found["as"].rpartition(", ")[0] == found["other"].rpartition(", ")[0], "that of the labels alone"
    turned = Arrays(np.ascontiguousarray(data.images.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2), data.labels)
    assert not turned.images.flags.c_contiguous and memory.fingerprint(turned) == found["as"]
    for size in (None, 6):
        batches = MemoryEvalBatches(data, config(size=size), augment.Normalize(MEAN, STD), CPU, "test", 2, 1)
        assert batches.digest == training(config(size=size), data).digest == found["as"]
        assert next(iter(batches))["image"].shape[2:] == (size or 12, size or 12)


def test_resized() -> None:
    data = arrays(3)
    assert memory.resized(data, None) is data and memory.resized(data, 12) is data
    flat = Arrays(np.full((2, 3, 12, 12), 77, np.uint8), np.arange(2))
    assert (memory.resized(flat, 30).images == 77).all()
    small = memory.resized(data, 6)
    assert small.images.shape == (3, 3, 6, 6) and small.images.dtype == np.uint8 and small.labels is data.labels
    exact = F.interpolate(torch.from_numpy(data.images).double(), (6, 6), mode="bilinear", antialias=True)
    assert (torch.from_numpy(small.images).double() - exact).abs().max() <= 1


def test_a_set_smaller_than_a_batch() -> None:
    with pytest.raises(UserError, match="the split 'train' of cifar10 has 40 images, fewer than batch_size 64"):
        training(config(64))

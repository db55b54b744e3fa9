"""The order of an epoch, and errors that come out of a DataLoader's workers as they went in."""

from __future__ import annotations

import signal
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from engine import loading
from engine.config import ExperimentConfig
from engine.errors import UserError


def config(batch_size: int = 8, micro_batch: int | None = None, **runtime: Any) -> ExperimentConfig:
    section = {"device": "cpu", "workers": 0, **runtime}
    return ExperimentConfig.model_validate(
        {"task": "x", "length": "1 epoch", "batch_size": batch_size, "micro_batch": micro_batch, "runtime": section}
    )


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (2, 2), (4, 1), (1, 2)])
def test_a_step_holds_the_same_images_on_any_number_of_ranks(world: int, micro: int) -> None:
    whole = loading.Order(19, config(), 1, 0, "the set").epoch(5)
    assert whole.shape == (2, 8) and len(set(whole.ravel().tolist())) == 16, "the rest is left out"
    ranks = [loading.Order(19, config(micro_batch=micro), world, rank, "the set") for rank in range(world)]
    accumulation = 8 // (world * micro)
    for order in ranks:
        assert len(order) == 2 * accumulation == len(order.epoch(5))
        assert (order.micro_batch, order.accumulation) == (micro, accumulation)
    for step in range(2):
        seen = [order.epoch(5)[step * accumulation : (step + 1) * accumulation] for order in ranks]
        # a micro-batch of all ranks is one of a rank alone, for statistics that are taken over all ranks
        assert np.stack(seen, 1).ravel().tolist() == whole[step].tolist()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    order = loading.Order(100, config(), 1, 0, "the set")
    first = order.epoch(0)
    assert not np.array_equal(first, order.epoch(1))
    assert np.array_equal(first, loading.Order(100, config(), 1, 0, "the set").epoch(0))
    assert not np.array_equal(first, loading.Order(100, config(seed=1), 1, 0, "the set").epoch(0))
    left_out = [set(range(100)) - set(order.epoch(epoch).ravel().tolist()) for epoch in range(5)]
    assert all(len(one) == 4 for one in left_out) and len(set.union(*left_out)) > 4


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(UserError, match="batch_size: the set has 7 images, fewer than batch_size 8; give a smaller"):
        loading.Order(7, config(), 1, 0, "the set")
    with pytest.raises(UserError, match="cannot be divided evenly among 3 processes"):
        loading.Order(70, config(), 3, 0, "the set")


class Items(Dataset[Any]):
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        if index == 13:
            raise UserError("x.png: damaged.")
        return {"image": torch.tensor([float(index)]), "target": torch.tensor(epoch), "name": str(index)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plan_is_loaded_and_an_error_is_raised_as_it_was(workers: int) -> None:
    plan = loading.Plan()
    loader = loading.loader(
        loading.Reporting(Items()),
        config(workers=workers),
        batch_sampler=plan,
        collate_fn=loading.stack,
        persistent_workers=True,
    )
    for epoch in range(2):
        plan.batches = [[(epoch, 3), (epoch, 4)], [(epoch, 5)]]
        first, second = (loading.checked(batch) for batch in loader)
        assert first["image"].tolist() == [[3.0], [4.0]] and first["target"].tolist() == [epoch] * 2
        assert first["name"] == ["3", "4"] and second["name"] == ["5"]
    plan.batches = [[(0, 1), (0, 13)]]
    with pytest.raises(UserError) as error:
        loading.checked(next(iter(loader)))
    message = str(error.value)
    del error  # its frames hold the workers
    assert message == "x.png: damaged."


def test_sound_gives_the_first_error() -> None:
    first, second = UserError("a"), UserError("b")
    assert loading.sound([1, first, second]) is first and loading.sound([1, 2]) == [1, 2]
    assert loading.stack([{"image": torch.zeros(1)}, first]) is first


class Told(Dataset[list[Any]]):
    """What the process that reads an item has set."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: int) -> list[Any]:
        ignored = [signal.getsignal(one) is signal.SIG_IGN for one in (signal.SIGINT, signal.SIGUSR1)]
        return [*ignored, signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []), cv2.getNumThreads()]


def test_a_worker_leaves_signals_to_the_loop_and_has_one_thread() -> None:
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        (told,) = loading.loader(Told(), config(workers=1), batch_size=None)
        assert told == [True, True, True, 1]
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        cv2.setNumThreads(threads)


class Large(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: int) -> dict[str, Any]:
        return {"image": torch.zeros(3, 8, 8), "target": torch.zeros(8, 8), "name": str(key)}


def test_a_batch_that_shared_memory_does_not_hold_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would fail in a thread of the worker, and the training wait for ever."""

    def full(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    assert len(list(loading.loader(Large(), config(workers=1), batch_size=2, collate_fn=loading.stack))) == 2
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    for workers in (0, 1):
        batches = iter(loading.loader(Large(), config(workers=workers), batch_size=2, collate_fn=loading.stack))
        if workers:
            with pytest.raises(UserError, match=r"/dev/shm: no room for a batch of 0 MiB .* runtime.workers=0"):
                loading.checked(next(batches))
        else:  # nothing is shared
            assert loading.checked(next(batches))["image"].shape == (2, 3, 8, 8)

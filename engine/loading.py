"""What the input of all trainers has in common: the order of an epoch, and a DataLoader whose errors stay readable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from engine.config import ExperimentConfig
from engine.errors import UserError
from engine.signals import shield_worker


class Order:
    """Which images this rank sees in an epoch, a pure function of (seed, epoch, rank, world size).

    Step s of an epoch is the s-th `batch_size` (global) of the shuffled images, whatever the number of ranks and
    micro-batches, and its m-th micro-batches of all ranks, one after the other, are the m-th micro-batch of one rank
    that takes as many images at once. The rest that fills no batch is left out and another one in each epoch.

    Args:
        count: images of the training set.
        cfg: gives batch_size, micro_batch and runtime.seed.
        world: number of ranks.
        rank: this one.
        where: names the training set in messages, such as "the split 'train' in data/x".

    Raises:
        UserError: the set is smaller than a batch, or the batch can't be divided evenly.
    """

    def __init__(self, count: int, cfg: ExperimentConfig, world: int, rank: int, where: str) -> None:
        self.micro_batch, self.accumulation = cfg.split(world)
        self.batch_size, self.count, self.seed, self.rank = cfg.batch_size, count, cfg.runtime.seed, rank
        self.world = world
        if count < cfg.batch_size:
            raise UserError(
                f"batch_size: {where} has {count} image{'s' if count != 1 else ''}, fewer than batch_size "
                f"{cfg.batch_size}; give a smaller one."
            )

    def __len__(self) -> int:
        """Micro-batches of an epoch on this rank."""
        return self.count // self.batch_size * self.accumulation

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Indices of the images, a row for each micro-batch of this rank."""
        shuffled = np.random.default_rng([0, self.seed, epoch]).permutation(self.count)
        whole = shuffled[: self.count // self.batch_size * self.batch_size]
        return whole.reshape(-1, self.world, self.micro_batch)[:, self.rank]


def digest(count: int, content: Iterable[bytes]) -> str:
    """What tells one data set from another, such as "42 images, 1f0c5a2b", by the names of its files, say."""
    told = hashlib.blake2b(digest_size=4)
    for one in content:
        told.update(one + b"\0")
    return f"{count} images, {told.hexdigest()}"


class Plan:
    """The (epoch, index) keys of the batches to load next, read by a DataLoader whose workers outlive an epoch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class Reporting(Dataset[Any]):
    """Returns a UserError instead of raising it: a DataLoader would wrap it in the traceback of its worker."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def sound(items: list[Any]) -> list[Any] | UserError:
    """The items, or the first error among them."""
    return next((item for item in items if isinstance(item, UserError)), items)


def stack(items: list[Any]) -> dict[str, Any] | UserError:
    """A batch of items with `image`, `target` and `name`, or the first error among them."""
    good = sound(items)
    if isinstance(good, UserError):
        return good
    batch: dict[str, Any] = {key: torch.stack([item[key] for item in good]) for key in ("image", "target")}
    if get_worker_info() is not None and (error := _shared(batch)) is not None:
        return error
    return {**batch, "name": [item["name"] for item in good]}


def _shared(batch: dict[str, torch.Tensor]) -> UserError | None:
    """Move a batch to shared memory, as its way to another process does in a thread whose errors nobody sees: the
    training would wait for ever."""
    size = sum(tensor.nbytes for tensor in batch.values())
    try:
        for tensor in batch.values():
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        return UserError(
            f"/dev/shm: no room for a batch of {size / 2**20:.0f} MiB from a loader ({error}); give it more "
            "(docker run --shm-size=8g), take fewer runtime.workers, or runtime.workers=0"
        )
    return None


def checked(result: Any) -> Any:
    """What a DataLoader over `Reporting` gave, or the error that it found, raised here."""
    if isinstance(result, UserError):
        raise UserError(*result.args)  # a new one: an error that its own frames hold would keep the workers alive
    return result


def loader(
    dataset: Dataset[Any], cfg: ExperimentConfig, persistent_workers: bool = False, **options: Any
) -> DataLoader[Any]:
    """A DataLoader as `runtime` says (workers, pinned memory for a GPU); `options` are those of DataLoader."""
    return DataLoader(
        dataset,
        num_workers=cfg.runtime.workers,
        pin_memory=cfg.runtime.device != "cpu" and torch.cuda.is_available(),
        persistent_workers=persistent_workers and cfg.runtime.workers > 0,
        worker_init_fn=start_worker,
        **options,
    )


def start_worker(worker: int) -> None:
    """Workers are the parallelism; more threads in each would fight for the cores."""
    shield_worker()
    cv2.setNumThreads(0)

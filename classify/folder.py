"""A folder of images for each class in each split, as ImageNet is usually unpacked: root/split/class/*.jpg.

Each training image's augmentation is a pure function of (seed, epoch, index), so that workers change nothing but the
speed. Images of any kind become RGB, or grey where the config's mean has one number.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from classify import augment, sets
from classify.config import ClassifyConfig, DataConfig
from engine import images, loading
from engine.errors import UserError

DEFAULT_SIZE = 224


class Files(NamedTuple):
    """The images of a split, in a fixed order."""

    paths: npt.NDArray[np.bytes_]
    """(N,); one array and not a million objects, which each worker would end up copying."""
    labels: npt.NDArray[np.int64]
    """(N,)"""


def class_folders(root: Path, split: str) -> tuple[str, ...]:
    """The classes of a split, sorted: the folders in root/split that are not hidden.

    Raises:
        UserError: root or the split's folder is missing, or has no folders in it, or one with a name that cannot be
            written into tables and pictures.
    """
    place = root / split
    if not place.is_dir():
        if not root.is_dir():
            raise UserError(f"{root} (data.root): no such folder; expected {split}/<class>/<images> in it.")
        found = ", ".join(_folders(root)) or "none"
        raise UserError(
            f"{place}: no such folder, so there is no split {split!r} (folders in {root}: {found}); set "
            "data.train_split and data.val_split to two of them, or data.root to the folder that holds the splits."
        )
    classes = tuple(_folders(place))
    if not classes:
        raise UserError(f"{place}: no class folders in it; expected {place.name}/<class>/<images>, a folder for each.")
    for name in classes:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise UserError(
                f"{place}: the class folder {images.show(name)}: its name holds control characters, or bytes that are "
                "no UTF-8, and stands in tables and pictures; rename it."
            )
    return classes


def _folders(place: Path) -> list[str]:
    try:
        with os.scandir(place) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror}).") from None


def find(root: Path, split: str, classes: tuple[str, ...]) -> Files:
    """The images of a split, also those in folders below a class's, but not hidden ones; class i is `classes[i]`.

    Links to folders are followed, but not to one that they lie in or that the way to them has been through.

    Raises:
        UserError: as `class_folders`; the split has other classes, or a class has no image.
    """
    place, found = root / split, class_folders(root, split)
    if found != classes:
        more, less = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
        parts = [f"{_some(names)} {what}" for names, what in ((more, "too many"), (less, "missing")) if names]
        raise UserError(
            f"{place}: its class folders are not the {len(classes)} of the training split: {'; '.join(parts)}. The "
            "splits must have the same class folders."
        )
    by_class = [_images_below(os.path.join(place, name), os.path.realpath(place)) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(paths) for paths in by_class])
    empty = [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if empty:
        raise UserError(
            f"{place}: no image in {len(empty)} of {len(classes)} class folders: {_some(empty)}. Fill or remove them, "
            f"in all splits; an image's name ends in one of {' '.join(sorted(images.SUFFIXES))}."
        )
    return Files(np.array([os.fsencode(path) for paths in by_class for path in paths]), labels)


def _images_below(top: str, place: str) -> list[str]:
    """The images of a class's folder `top` in the order of torchvision's make_dataset, which would enter links in a
    circle: images come forty times then, those of other classes as this one's, and two such links make 2 ** 40 folders.

    `place` is the real path of the split's folder.
    """
    first = _way(top, (place,))
    if first is None:
        return []
    ways, found = {top: first}, list[tuple[str, list[str]]]()
    for folder, below, names in os.walk(top, followlinks=True):
        shown = [os.path.join(folder, name) for name in below if not name.startswith(".")]
        entered = {path: way for path in shown if (way := _way(path, ways[folder])) is not None}
        ways.update(entered)
        below[:] = map(os.path.basename, entered)
        found.append((folder, sorted(names)))
    return [os.path.join(folder, name) for folder, names in sorted(found) for name in names if _is_image(name)]


def _way(folder: str, above: tuple[str, ...]) -> tuple[str, ...] | None:
    """The real folders in which the way down to `folder` leaves off for a link, and its own, from those of the folder
    it lies in; None for a link back to one of them, or to one that they lie in."""
    if not os.path.islink(folder):
        return (*above[:-1], os.path.join(above[-1], os.path.basename(folder)))
    real = os.path.realpath(folder)
    return None if any(Path(one).is_relative_to(real) for one in above) else (*above, real)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in images.SUFFIXES and not name.startswith(".")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


class FolderDataset(Dataset[dict[str, Any]]):
    """The item (epoch, index) is {"image": float32 (C, size, size), "target": int64 (), "name": path}: augmented for
    training, a pure function of (seed, epoch, index); for evaluation the same in all epochs."""

    def __init__(self, files: Files, cfg: DataConfig, normalize: augment.Normalize, seed: int, train: bool) -> None:
        self.files, self.seed, self.normalize = files, seed, normalize
        self.grey = len(normalize.factor) == 1
        size = cfg.size or DEFAULT_SIZE
        if train:
            crop = v2.RandomResizedCrop(size, scale=cfg.crop_scale, antialias=True)
            steps = [crop, v2.RandomHorizontalFlip(sets.flip(cfg)), augment.randaugment(cfg)]
        else:
            steps = [augment.evaluation_steps(cfg, size)]
        self.steps = v2.Compose([step for step in steps if step is not None])
        self.erasing = augment.erasing(cfg) if train else None

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        path = Path(os.fsdecode(self.files.paths[index]))
        image = torch.from_numpy(images.read_image(path)).permute(2, 0, 1)
        if self.grey:
            image = augment.grey(image)
        with augment.seeded(augment.FOLDER, self.seed, epoch, index):
            image = self.normalize(self.steps(image))
            if self.erasing is not None:
                image = self.erasing(image)
        return {"image": image.contiguous(), "target": torch.tensor(self.files.labels[index]), "name": str(path)}


class _Problems:
    """What to do with unreadable images: end, or note each once and leave it out."""

    def __init__(self, cfg: DataConfig) -> None:
        self.skip = cfg.on_error == "skip"
        self.found: dict[str, None] = {}

    def batch(self, loaded: tuple[dict[str, Any] | None, list[UserError]]) -> dict[str, Any] | None:
        """The batch of the readable images, None if there is none. Raises UserError if the config says stop."""
        batch, errors = loaded
        for error in errors:
            if not self.skip:
                raise UserError(
                    f"{error} Repair it; data.on_error=skip goes on without such images. To remove it makes another "
                    "data set: do that only where no training on it has begun, which would not go on."
                )
            self.found[str(error)] = None
        return batch


def _collate(items: list[Any]) -> tuple[Any, list[UserError]]:
    good = [item for item in items if not isinstance(item, UserError)]
    return loading.stack(good) if good else None, [item for item in items if isinstance(item, UserError)]


def _digest(files: Files, data: DataConfig) -> str:
    start = len(os.fsencode(data.root / "x")) - 1  # of "." and "/" too, whose length says nothing of a path's start
    return loading.digest(len(files.labels), (b"/" + path[start:] for path in files.paths.tolist()))


class FolderTrainBatches:
    """One rank's micro-batches of each epoch: {"image" float32 (N, C, size, size), "target" int64 (N,) or, with mixup
    or cutmix, float32 (N, classes), "name" list[str]}, on the CPU.

    With on_error: skip, a batch with unreadable images is smaller, and `problems` names them. Order: see
    `engine.loading.Order`.

    Raises:
        UserError: fewer images than a batch; while iterating, an unreadable image, or a micro-batch without a readable
            one.
    """

    def __init__(
        self,
        files: Files,
        cfg: ClassifyConfig,
        normalize: augment.Normalize,
        mixing: augment.Mixing,
        world: int,
        rank: int,
    ) -> None:
        where = f"the split {cfg.data.train_split!r} in {cfg.data.root}"
        self.order = loading.Order(len(files.labels), cfg, world, rank, where)
        self.digest = _digest(files, cfg.data)
        self.seed, self.mixing, self.rank = cfg.runtime.seed, mixing, rank
        self._problems, self._plan = _Problems(cfg.data), loading.Plan()
        dataset = loading.Reporting(FolderDataset(files, cfg.data, normalize, self.seed, train=True))
        self._loader = loading.loader(
            dataset, cfg, batch_sampler=self._plan, collate_fn=_collate, persistent_workers=True
        )

    @property
    def problems(self) -> list[str]:
        """The unreadable images left out so far, each once, as 'path: why'."""
        return list(self._problems.found)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of `epoch` from micro-batch `start` on; those before are not decoded.

        One at a time: starting a new iterator ends the last one.
        """
        rows = self.order.epoch(epoch)[start:]
        self._plan.batches = [[(epoch, index) for index in row] for row in rows.tolist()]
        for number, loaded in enumerate(self._loader, start):
            batch = self._problems.batch(loaded)
            if batch is None:
                raise UserError(
                    f"none of the {rows.shape[1]} images of a micro-batch can be read, so there is nothing to train "
                    "on; repair such files, or remove them and start anew. The last one: "
                    f"{self.problems[-1]}"
                )
            image, target = self.mixing(batch["image"], batch["target"], self.seed, epoch, number, self.rank)
            yield {**batch, "image": image, "target": target}


class FolderEvalBatches:
    """One rank's share of a split, each image on exactly one rank and once, in batches of `data.eval_batch_size`:
    {"image" float32 (N, C, size, size), "target" int64 (N,), "name" list[str]}, on the CPU.

    With on_error: skip, unreadable images are left out and named in `problems`; else they are a UserError.
    """

    def __init__(self, files: Files, cfg: ClassifyConfig, normalize: augment.Normalize, world: int, rank: int) -> None:
        numbers = range(len(files.labels))[rank::world]
        self.digest = _digest(files, cfg.data)
        self._problems = _Problems(cfg.data)
        self._loader = loading.loader(
            loading.Reporting(FolderDataset(files, cfg.data, normalize, cfg.runtime.seed, train=False)),
            cfg,
            sampler=[(0, number) for number in numbers],
            batch_size=cfg.data.eval_batch_size,
            collate_fn=_collate,
        )

    @property
    def problems(self) -> list[str]:
        """The unreadable images left out so far, each once, as 'path: why'."""
        return list(self._problems.found)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for loaded in self._loader:
            batch = self._problems.batch(loaded)
            if batch is not None:
                yield batch

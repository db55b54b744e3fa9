"""The data sets that live in memory: facts, files, and their splits as arrays.

A split may be named `val` where the set has a test split and no validation split, and `test` where it is the other
way round. SVHN also has `extra`. The means and standard deviations are those of the training images' pixels; CIFAR's
deviations are the published code's, averages of each image's own.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchvision import datasets

from classify import readers
from classify.config import DataConfig
from classify.readers import Arrays, Expected
from engine import distributed
from engine.errors import UserError

Numbers = tuple[float, ...]
IMAGENET_MEAN: Numbers = (0.485, 0.456, 0.406)
IMAGENET_STD: Numbers = (0.229, 0.224, 0.225)


UNNAMED = tuple(f"class {i}" for i in range(1, 1001))
"""The classes of the downsampled ImageNet, whose files do not name them ..."""
NAMES_FILE = "map_clsloc.txt"
"""... where data.root has no such file."""


class File(NamedTuple):
    path: Path
    md5: str | None = None
    """The checksum of the published file, None if there is none."""


@dataclass(frozen=True)
class KnownSet:
    """What is known of a data set."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    mean: Numbers
    std: Numbers
    splits: Mapping[str, str]
    """What a config may call a split -> its own name."""
    images: Mapping[str, int]
    """How many a split has, by its own name."""
    files: Callable[[Path, str], list[File]]
    """(data.root, split) -> the files that the split is in."""
    read: Callable[[Sequence[Path], Expected], Arrays]
    page: str
    """Where the files are published."""
    download: Callable[[Path, str], object] | None = None
    """(data.root, split) -> the files are there; None where torchvision can't."""
    first_label: int = 0
    mirrors: bool = True
    """Whether a mirrored image shows what it showed before."""


def load(cfg: DataConfig, split: str) -> Arrays:
    """A split of a data set, after a download if it is missing and `data.download` allows it.

    All processes must call this together: the first one downloads, the others wait for it.

    Raises:
        UserError: there is no such split; files are missing and can't be downloaded, differ from the published ones
            (`data.check_files`), are damaged or hold something else. The message says what to do.
    """
    known, own = SETS[cfg.name], _own(cfg, split)
    _complete(cfg, known, own)
    files = known.files(cfg.root, own)
    if cfg.check_files:
        for file in files:
            _check_md5(file)
    expected = Expected(known.shape, len(known.classes), known.first_label)
    return known.read([file.path for file in files], expected)


def _complete(cfg: DataConfig, known: KnownSet, split: str) -> None:
    """Downloads what is missing. Raises UserError if something is still missing."""

    def missing(own: str = split) -> list[Path]:
        return [file.path for file in known.files(cfg.root, own) if not file.path.is_file()]

    said = ""
    if distributed.is_main() and cfg.download and known.download and missing():
        try:
            if not cfg.check_files and any(not missing(own) for own in known.splits.values()):
                # unpacking an archive would put the published files over those of the other split
                said = " Nothing was downloaded, since with data.check_files=false the other split is a copy to keep."
            else:
                known.download(cfg.root, split)
        except Exception as error:  # of the network, the disk, an archive: torchvision raises many kinds
            said = f" The download failed ({type(error).__name__}: {error})."
    said = distributed.gather(said)[0]
    if paths := missing():
        names = ", ".join(path.name for path in paths)
        how = f"get the files from {known.page} and unpack them there, or set data.root to a folder that has them"
        if known.download and not cfg.download:
            how += ", or set data.download=true"
        raise UserError(
            f"{paths[0].parent}: no {names}, which the split {split!r} of {cfg.name} is in.{said} What to do: {how}."
        )


def count(cfg: DataConfig, split: str) -> int:
    """The images of a split as it is published, which is not read. Raises UserError for a split that there is not."""
    return SETS[cfg.name].images[_own(cfg, split)]


def flip(cfg: DataConfig) -> float:
    """The probability of a horizontal flip: `data.flip`, or the data set's."""
    if cfg.flip is not None:
        return cfg.flip
    return 0.5 if cfg.name not in SETS or SETS[cfg.name].mirrors else 0.0


def _own(cfg: DataConfig, split: str) -> str:
    splits = SETS[cfg.name].splits
    if split not in splits:
        raise UserError(f"{cfg.name} has no split {split!r}; there are: {', '.join(splits)}.")
    return splits[split]


def _check_md5(file: File) -> None:
    if file.md5 is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with file.path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror}).") from None
    if digest.hexdigest() != file.md5:
        raise UserError(
            f"{file.path}: its MD5 sum is {digest.hexdigest()}, that of the published file is {file.md5}. If the file "
            "is damaged, delete it and get it anew; data.check_files=false accepts a copy that was encoded anew."
        )


def _cifar(kind: type[datasets.CIFAR10], classes: tuple[str, ...], mean: Numbers, std: Numbers) -> KnownSet:
    def files(root: Path, split: str) -> list[File]:
        listed = kind.train_list if split == "train" else kind.test_list
        return [File(root / kind.base_folder / name, md5) for name, md5 in listed]

    return KnownSet(
        classes,
        (3, 32, 32),
        mean,
        std,
        {"train": "train", "test": "test", "val": "test"},
        {"train": 50_000, "test": 10_000},
        files,
        readers.batches,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        lambda root, split: kind(root, split == "train", download=True),
    )


def _mnist(kind: type[datasets.MNIST], page: str, md5: tuple[str, ...], mean: float, std: float) -> KnownSet:
    """`md5` of the unpacked files; torchvision's are those of the archives, which may be gone."""
    names = [name.removesuffix(".gz") for name, _ in kind.resources]
    files = {"train": list(zip(names[:2], md5[:2], strict=True)), "test": list(zip(names[2:], md5[2:], strict=True))}
    digits = kind is datasets.MNIST
    return KnownSet(
        tuple("0123456789") if digits else tuple(kind.classes),
        (1, 28, 28),
        (mean,),
        (std,),
        {"train": "train", "test": "test", "val": "test"},
        {"train": 60_000, "test": 10_000},
        lambda root, split: [File(root / kind.__name__ / "raw" / name, md5) for name, md5 in files[split]],
        readers.idx,
        page,
        lambda root, split: kind(root, split == "train", download=True),
        mirrors=not digits,
    )


def _stl10_files(root: Path, split: str) -> list[File]:
    kind = datasets.STL10
    listed = kind.train_list[:2] if split == "train" else kind.test_list
    return [File(root / kind.base_folder / name, md5) for name, md5 in listed]


def _imagenet_files(size: int, root: Path, split: str) -> list[File]:
    """The batches in `root` or in the folder that the archive makes there."""
    stems = [f"train_data_batch_{i}" for i in range(1, 11)] if split == "train" else ["val_data"]
    places = [root, *(root / f"Imagenet{size}_{split}{kind}" for kind in ("", "_npz")), root / f"imagenet{size}"]
    candidates = [[place / (stem + suffix) for stem in stems] for place in places for suffix in ("", ".npz")]
    return [File(path) for path in max(candidates, key=lambda paths: sum(path.is_file() for path in paths))]


def _imagenet(size: int) -> KnownSet:
    return KnownSet(
        UNNAMED,
        (3, size, size),
        IMAGENET_MEAN,
        IMAGENET_STD,
        {"train": "train", "val": "val", "test": "val"},
        {"train": 1_281_167, "val": 50_000},
        functools.partial(_imagenet_files, size),
        readers.batches,
        "https://image-net.org/download-images (downsampled images; free, after a registration)",
        first_label=1,
    )


def class_names(cfg: DataConfig) -> tuple[str, ...]:
    """The names of the classes. For the downsampled ImageNet those of a `map_clsloc.txt` (lines such as
    `n02119789 1 kit_fox`) in data.root, if there is one.

    Raises:
        UserError: map_clsloc.txt doesn't name each of the classes 1 ... 1000 once.
    """
    classes = SETS[cfg.name].classes
    path = cfg.root / NAMES_FILE
    if not cfg.name.startswith("imagenet") or not path.is_file():
        return classes
    try:
        rows: list[Any] = [line.split(maxsplit=2) for line in path.read_text("utf-8").splitlines() if line.strip()]
        names = {int(number): name.strip() for _, number, name in rows}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected lines such as 'n02119789 1 kit_fox'.") from None
    if sorted(names) != list(range(1, len(classes) + 1)) or len(rows) != len(classes):
        raise UserError(f"{path}: expected each of the classes 1 ... {len(classes)} once; correct or remove it.")
    often = Counter(names.values())  # two classes are a crane, a bird and a machine
    return tuple(f"{name} ({number})" if often[name] > 1 else name for number, name in sorted(names.items()))


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
CIFAR100_CLASSES = tuple(_CIFAR100.split())
SETS: Mapping[str, KnownSet] = {
    "cifar10": _cifar(datasets.CIFAR10, CIFAR10_CLASSES, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": _cifar(datasets.CIFAR100, CIFAR100_CLASSES, (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    "mnist": _mnist(
        datasets.MNIST,
        "https://github.com/pytorch/vision/blob/main/torchvision/datasets/mnist.py (addresses of mirrors)",
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
        0.1307,
        0.3081,
    ),
    "fashion_mnist": _mnist(
        datasets.FashionMNIST,
        "https://github.com/zalandoresearch/fashion-mnist",
        (
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
        0.2860,
        0.3530,
    ),
    "svhn": KnownSet(
        tuple("0123456789"),
        (3, 32, 32),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        {"train": "train", "test": "test", "val": "test", "extra": "extra"},
        {"train": 73_257, "test": 26_032, "extra": 531_131},
        lambda root, split: [File(root / name, md5) for _, name, md5 in [datasets.SVHN.split_list[split]]],
        readers.svhn,
        "http://ufldl.stanford.edu/housenumbers",
        lambda root, split: datasets.SVHN(root, split, download=True),
        mirrors=False,
    ),
    "stl10": KnownSet(
        STL10_CLASSES,
        (3, 96, 96),
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
        {"train": "train", "test": "test", "val": "test"},
        {"train": 5_000, "test": 8_000},
        _stl10_files,
        readers.stl10,
        "https://cs.stanford.edu/~acoates/stl10",
        lambda root, split: datasets.STL10(root, split, download=True),
        first_label=1,
    ),
    "imagenet16": _imagenet(16),
    "imagenet32": _imagenet(32),
}

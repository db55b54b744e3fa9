"""The files of the sets in memory: read, checked, fetched, and refused with one sentence."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from torchvision import datasets

from classify import safe_pickle, sets
from classify.config import DataConfig
from engine import distributed
from engine.errors import UserError

RNG = np.random.default_rng(3)


def section(root: Path, name: str, **options: Any) -> DataConfig:
    return DataConfig.model_validate({"root": root, "name": name, "check_files": False, "download": False, **options})


def pixels(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def put(path: Path, value: Any, protocol: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


# ---------------------------------------------------------------- the sets, as their files are published


def test_cifar10_in_the_order_of_its_batches(tmp_path: Path) -> None:
    parts = [pixels(4, 3072) for _ in range(5)]
    for i, part in enumerate(parts):
        put(tmp_path / f"cifar-10-batches-py/data_batch_{i + 1}", {"data": part, "labels": [i, 9, 0, i]})
    data = sets.load(section(tmp_path, "cifar10"), "train")
    assert data.images.shape == (20, 3, 32, 32) and data.images.dtype == np.uint8
    assert np.array_equal(data.images.reshape(20, 3072), np.concatenate(parts))
    assert data.labels.dtype == np.int64 and data.labels[4:8].tolist() == [1, 9, 0, 1]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("key", ["labels", b"labels"])
def test_val_is_another_name_of_test_and_keys_may_be_bytes(tmp_path: Path, key: Any, protocol: int) -> None:
    put(tmp_path / "cifar-10-batches-py/test_batch", {b"data": pixels(3, 3072), key: np.arange(3)}, protocol)
    for split in ("test", "val"):
        assert sets.load(section(tmp_path, "cifar10"), split).labels.tolist() == [0, 1, 2]


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    # protocol 0 with byte strings, as cPickle wrote the published files
    path = put(tmp_path / "x", b"(dp1\nS'labels'\np2\n(lp3\nI7\nasS'name'\nS'\\xe9'\ns.")
    assert safe_pickle.load(path) == {"labels": [7], "name": "\xe9"}


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    entry = {"data": pixels(2, 3072), "fine_labels": [99, 3], "coarse_labels": [1, 1]}
    put(tmp_path / "cifar-100-python/train", entry)
    assert sets.load(section(tmp_path, "cifar100"), "train").labels.tolist() == [99, 3]
    names = sets.SETS["cifar100"].classes
    assert len(names) == 100 and list(names) == sorted(names) and names[3] == "bear"


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist(tmp_path: Path, name: str, folder: str) -> None:
    images = pixels(5, 28, 28)
    put(tmp_path / folder / "raw/t10k-images-idx3-ubyte", idx(images))
    put(tmp_path / folder / "raw/t10k-labels-idx1-ubyte", idx(np.array([9, 0, 1, 2, 3], np.uint8)))
    data = sets.load(section(tmp_path, name), "test")
    assert np.array_equal(data.images, images[:, None]) and data.labels.tolist() == [9, 0, 1, 2, 3]
    assert sets.SETS["fashion_mnist"].classes[9] == "Ankle boot" and sets.SETS["mnist"].classes[9] == "9"


def test_svhn(tmp_path: Path) -> None:
    from scipy.io import savemat

    images = pixels(3, 32, 32, 3)
    savemat(tmp_path / "extra_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9]])})
    data = sets.load(section(tmp_path, "svhn"), "extra")
    assert np.array_equal(data.images, images.transpose(0, 3, 1, 2)) and data.labels.tolist() == [0, 1, 9]


def test_stl10(tmp_path: Path) -> None:
    images = pixels(2, 3, 96, 96)
    put(tmp_path / "stl10_binary/train_X.bin", images.transpose(0, 1, 3, 2).tobytes())
    put(tmp_path / "stl10_binary/train_y.bin", bytes([10, 1]))
    data = sets.load(section(tmp_path, "stl10"), "train")
    assert np.array_equal(data.images, images) and data.labels.tolist() == [9, 0]


@pytest.mark.parametrize("place", ["", "Imagenet16_train", "Imagenet16_train_npz", "imagenet16"])
@pytest.mark.parametrize("npz", [False, True])
def test_downsampled_imagenet(tmp_path: Path, place: str, npz: bool) -> None:
    parts = [{"data": pixels(2, 768), "labels": [i, 1000], "mean": np.zeros(768)} for i in range(1, 11)]
    for i, part in enumerate(parts, 1):
        path = tmp_path / place / f"train_data_batch_{i}"
        if npz:
            path.parent.mkdir(exist_ok=True)
            np.savez(path.with_suffix(".npz"), **part)
        else:
            put(path, part)
    data = sets.load(section(tmp_path, "imagenet16"), "train")
    assert data.images.shape == (20, 3, 16, 16)
    assert np.array_equal(data.images[2].ravel(), parts[1]["data"][0])
    assert data.labels[:4].tolist() == [0, 999, 1, 999], "labels count from 1 in the files"


def test_names_of_the_downsampled_imagenet(tmp_path: Path) -> None:
    cfg = section(tmp_path, "imagenet32")
    assert sets.class_names(cfg)[:2] == ("class 1", "class 2")
    lines = [f"n{i:08} {i} thing_{i}" for i in range(1, 1001)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(reversed(lines)))
    assert sets.class_names(cfg)[999] == "thing_1000"
    assert sets.class_names(section(tmp_path, "cifar10"))[0] == "airplane"
    cranes = [line.replace("thing_429", "crane").replace("thing_518", "crane") for line in lines]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(cranes))
    names = sets.class_names(cfg)
    assert (names[428], names[517]) == ("crane (429)", "crane (518)") and len(set(names)) == 1000
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match=r"map_clsloc.txt: expected each of the classes 1 ... 1000 once"):
        sets.class_names(cfg)
    (tmp_path / "map_clsloc.txt").write_text("kit_fox\n")
    with pytest.raises(
        UserError, match="map_clsloc.txt: cannot be read .*expected lines such as 'n02119789 1 kit_fox'"
    ):
        sets.class_names(cfg)


def test_unknown_split_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="svhn has no split 'trian'; there are: train, test, val, extra"):
        sets.load(section(tmp_path, "svhn"), "trian")
    with pytest.raises(UserError, match="cifar10 has no split 'extra'; there are: train, test, val"):
        sets.load(section(tmp_path, "cifar10"), "extra")


# ---------------------------------------------------------------- bad files


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch stolen",)


@pytest.mark.parametrize("value", [Evil(), {"data": [Evil()], "labels": [1]}, pickle.dumps, RNG])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path / "cifar-10-batches-py/test_batch", value)
    with pytest.raises(UserError, match="has code: it asks for [a-z_.]+.*was not loaded") as error:
        sets.load(section(tmp_path, "cifar10"), "test")
    assert str(path) in str(error.value) and not (tmp_path / "stolen").exists()


GOOD = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", r"empty \(zero bytes\); delete it and get it anew"),
        (GOOD[:-400], "damaged or not a pickle"),
        (b"<html>404</html>", "damaged or not a pickle"),
        (b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.", "damaged or not a pickle .*bytes written as zlib"),
        ([1, 2], "holds a list, expected a dictionary of data and labels"),
        ({"data": 1}, r"holds data, expected data and labels \(or fine_labels\)"),
        (
            {"data": np.zeros((2, 3072)), "labels": [0, 1]},
            r"its images are float64 \(2, 3072\), expected uint8 \(N, 3072",
        ),
        ({"data": pixels(2, 768), "labels": [0, 1]}, r"its images are uint8 \(2, 768\).*3 x 32 x 32 each"),
        ({"data": "text", "labels": [0, 1]}, "its images are str, expected uint8"),
        ({"data": pixels(2, 3072), "labels": [0, 1, 2]}, "2 images, but its labels are not as many whole numbers"),
        ({"data": pixels(2, 3072), "labels": [0, 0.5]}, "2 images, but its labels are not as many whole numbers"),
        ({"data": pixels(2, 3072), "labels": ["cat", None]}, "2 images, but its labels are not as many whole numbers"),
        (
            {"data": pixels(2, 3072), "labels": [0, 10]},
            "the label 10 of image 1 is not in 0 ... 9; the file is damaged",
        ),
    ],
)
def test_bad_batches(tmp_path: Path, content: Any, text: str) -> None:
    path = put(tmp_path / "cifar-10-batches-py/test_batch", content)
    with pytest.raises(UserError, match=text) as error:
        sets.load(section(tmp_path, "cifar10"), "test")
    assert str(error.value).startswith(f"{path}: ")


def test_bad_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "val_data.npz", data=np.array([Evil()], object), labels=[1])
    with pytest.raises(UserError, match="val_data.npz: expected an npz file of plain arrays; damaged .*allow_pickle"):
        sets.load(section(tmp_path, "imagenet32"), "val")
    np.savez(tmp_path / "val_data.npz", data=pixels(1, 3072), labels=[0])
    with pytest.raises(UserError, match=r"val_data.npz: the label 0 of image 0 is not in 1 ... 1000"):
        sets.load(section(tmp_path, "imagenet32"), "val")
    whole = (tmp_path / "val_data.npz").read_bytes()
    for part in (whole[:100], whole[:-50], b"x"):
        (tmp_path / "val_data.npz").write_bytes(part)
        with pytest.raises(UserError, match="val_data.npz: expected an npz file of plain arrays; damaged"):
            sets.load(section(tmp_path, "imagenet32"), "val")
    np.savez_compressed(tmp_path / "val_data.npz", data=pixels(4, 3072), labels=[1, 2, 3, 4])
    whole = (tmp_path / "val_data.npz").read_bytes()
    for place in range(80, 600, 40):  # in the packed data, where it ends in zlib
        (tmp_path / "val_data.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(UserError, match="val_data.npz: expected an npz file of plain arrays; damaged"):
            sets.load(section(tmp_path, "imagenet32"), "val")


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (b"", idx(np.zeros(2, np.uint8)), "images-idx3-ubyte: expected a file in MNIST's idx format; damaged"),
        (idx(pixels(2, 28, 28))[:-9], idx(np.zeros(2, np.uint8)), "images-idx3-ubyte: expected a file in MNIST's"),
        (idx(pixels(2, 28, 28)), b"<html>", "labels-idx1-ubyte: expected a file in MNIST's idx format; damaged"),
        (idx(pixels(2, 28, 28)), idx(np.zeros(3, np.uint8)), "images-idx3-ubyte: 2 images, but its labels are not"),
        (idx(pixels(2, 20, 28)), idx(np.zeros(2, np.uint8)), r"images-idx3-ubyte: its images are uint8 \(2, 20, 28\)"),
    ],
)
def test_bad_idx_files(tmp_path: Path, images: bytes, labels: bytes, text: str) -> None:
    put(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", images)
    put(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", labels)
    with pytest.raises(UserError, match=text):
        sets.load(section(tmp_path, "mnist"), "test")


def test_bad_mat_and_bin_files(tmp_path: Path) -> None:
    put(tmp_path / "test_32x32.mat", b"no matlab" * 50)
    with pytest.raises(UserError, match="test_32x32.mat: expected a MATLAB file of X and y; damaged"):
        sets.load(section(tmp_path, "svhn"), "test")
    put(tmp_path / "stl10_binary/test_X.bin", bytes(27000))
    put(tmp_path / "stl10_binary/test_y.bin", bytes([1]))
    with pytest.raises(UserError, match="test_X.bin: 27000 bytes are no whole number of 3 x 96 x 96 images"):
        sets.load(section(tmp_path, "stl10"), "test")


def test_another_checksum_names_both_and_the_way_out(tmp_path: Path) -> None:
    path = put(tmp_path / "cifar-10-batches-py/test_batch", {"data": pixels(2, 3072), "labels": [0, 1]})
    found = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"its MD5 sum is {found}, that of the published file is 40351d58") as error:
        sets.load(section(tmp_path, "cifar10", check_files=True), "test")
    assert str(path) in str(error.value) and "data.check_files=false accepts a copy" in str(error.value)
    assert len(sets.load(section(tmp_path, "cifar10"), "test").labels) == 2


def test_the_published_checksums_are_used_for_all_downloadable_sets() -> None:
    for name, known in sets.SETS.items():
        for split in set(known.splits.values()):
            files = known.files(Path("x"), split)
            assert all((file.md5 is None) == name.startswith("imagenet") for file in files), name
            assert all(file.md5 is None or len(file.md5) == 32 for file in files)


# ---------------------------------------------------------------- missing files and downloads


@pytest.mark.parametrize("name", list(sets.SETS))
def test_missing_files_say_what_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"which the split 'test' of {name} is in|'val' of {name}") as error:
        sets.load(section(tmp_path, name), "test")
    message = str(error.value)
    assert str(tmp_path) in message and "http" in message and "data.root" in message
    assert ("data.download=true" in message) == (not name.startswith("imagenet"))


def test_a_failed_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, *args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(UserError, match=r"no test_batch.*download failed \(URLError: .*no route to host") as error:
        sets.load(section(tmp_path, "cifar10", download=True), "test")
    message = str(error.value)
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message and str(tmp_path) in message


def test_a_download_fills_what_is_missing_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps({"data": pixels(2, 3072), "labels": [4, 5]})
    meta = pickle.dumps({"label_names": ["x"]})
    names = [f"data_batch_{i}" for i in range(1, 6)]
    calls: list[str] = []

    def download(url: str, root: Path, **kwargs: Any) -> None:
        calls.append(url)
        for name in [*names, "test_batch"]:
            put(Path(root) / "cifar-10-batches-py" / name, content)
        put(Path(root) / "cifar-10-batches-py/batches.meta", meta)

    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, md5] for name in names])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5]])
    monkeypatch.setattr(
        datasets.CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()},
    )
    cfg = section(tmp_path, "cifar10", download=True, check_files=True)
    assert sets.load(cfg, "test").labels.tolist() == [4, 5]
    assert sets.load(cfg, "train").labels.tolist() == [4, 5] * 5
    assert len(calls) == 1


def test_present_files_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *a, **k: pytest.fail("asked"))
    put(tmp_path / "cifar-10-batches-py/test_batch", {"data": pixels(1, 3072), "labels": [3]})
    assert sets.load(section(tmp_path, "cifar10", download=True), "test").labels.tolist() == [3]
    with pytest.raises(UserError, match="its MD5 sum is"):
        sets.load(section(tmp_path, "cifar10", download=True, check_files=True), "test")


def test_a_download_does_not_go_over_a_copy_of_the_other_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *a, **k: pytest.fail("asked"))
    put(tmp_path / "cifar-100-python/train", {"data": pixels(1, 3072), "fine_labels": [3]})
    with pytest.raises(UserError, match="no test, which .* Nothing was downloaded.*the other split is a copy to keep"):
        sets.load(section(tmp_path, "cifar100", download=True), "test")


def test_other_processes_wait_for_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "gather", lambda mine: [" The download failed (of the first).", mine])
    with pytest.raises(UserError, match=r"no test_batch.*The download failed \(of the first\)"):
        sets.load(section(tmp_path, "cifar10", download=True), "test")

    def first_has_downloaded(mine: str) -> list[str]:
        put(tmp_path / "cifar-10-batches-py/test_batch", {"data": pixels(1, 3072), "labels": [6]})
        return ["", mine]

    monkeypatch.setattr(distributed, "gather", first_has_downloaded)
    assert sets.load(section(tmp_path, "cifar10", download=True), "test").labels.tolist() == [6]

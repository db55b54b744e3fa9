"""Folders of images: how they are found, read by workers, augmented, and what bad ones say."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import make_dataset
from torchvision.transforms import v2

from classify import augment, data, folder
from classify.config import ClassifyConfig
from engine import loading
from engine.errors import UserError

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ has 4 images of each of 3 classes, val/ 2; JPEG and PNG."""
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(CLASSES):
            for i in range(count):
                picture(tmp_path / split / name / f"{i}.{'jpg' if i % 2 else 'png'}", 10 * number + i)
    return tmp_path


def config(root: Path, workers: int = 0, batch_size: int = 4, seed: int = 0, **options: Any) -> ClassifyConfig:
    section = {"name": "folder", "root": root, "val_split": "val", "size": 16, **options}
    return ClassifyConfig.model_validate(
        {
            "length": "1 epoch",
            "batch_size": batch_size,
            "data": section,
            "runtime": {"workers": workers, "device": "cpu", "seed": seed},
        }
    )


def flat(batches: Any) -> list[tuple[list[str], bytes, bytes]]:
    return [(b["name"], b["image"].numpy().tobytes(), b["target"].numpy().tobytes()) for b in batches]


# ---------------------------------------------------------------- finding


def test_files_and_classes_in_a_fixed_order(root: Path) -> None:
    picture(root / "train/bee/below/x.JPEG", 1)
    (root / "train/bee/._0.png").write_bytes(b"resource fork")
    (root / "train/bee/notes.txt").write_text("x")
    (root / "train/.cache").mkdir()
    (root / "train/README").write_text("x")
    assert folder.class_folders(root, "train") == CLASSES
    files = folder.find(root, "train", CLASSES)
    assert files.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    names = [Path(path.decode()).relative_to(root / "train").as_posix() for path in files.paths]
    assert names[:5] == ["ant/0.png", "ant/1.jpg", "ant/2.png", "ant/3.jpg", "bee/0.png"]
    assert names[8] == "bee/below/x.JPEG"


def test_missing_folders(root: Path) -> None:
    with pytest.raises(UserError, match=r"/no/place \(data.root\): no such folder; expected train/<class>/<images>"):
        folder.class_folders(Path("/no/place"), "train")
    with pytest.raises(
        UserError, match=r"test: no such folder, so there is no split 'test' \(folders in .*: train, val"
    ):
        list(data.eval_batches(config(root), CPU, "test"))
    (root / "flat").mkdir()
    picture(root / "flat/x.png", 1)
    with pytest.raises(UserError, match="flat: no class folders in it; expected flat/<class>/<images>"):
        folder.class_folders(root, "flat")


def test_hidden_folders_are_left_out_at_any_depth(root: Path) -> None:
    before = len(folder.find(root, "train", CLASSES).labels)
    picture(root / "train/cat/.ipynb_checkpoints/0-checkpoint.png", 1)
    picture(root / "train/cat/below/.thumbnails/0.png", 1)
    picture(root / "train/cat/below/1.png", 1)
    assert len(folder.find(root, "train", CLASSES).labels) == before + 1
    hidden = root.rename(root.parent / ".hidden")  # what lies above is the user's choice
    assert len(folder.find(hidden, "train", CLASSES).labels) == before + 1


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_links_in_a_circle_add_no_images(tmp_path: Path, target: str) -> None:
    for place in ("elsewhere", "train/a", "train/b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.png").touch()
    (tmp_path / "train/a/circle").symlink_to(target)
    (tmp_path / "train/a/more").symlink_to(tmp_path / "elsewhere")
    files = folder.find(tmp_path, "train", ("a", "b"))
    names = [os.path.relpath(os.fsdecode(path), tmp_path / "train") for path in files.paths]
    assert names == ["a/x.png", "a/more/x.png", "b/x.png"]
    assert files.labels.tolist() == [0, 0, 1]


def test_many_links_in_a_circle_are_not_walked(tmp_path: Path) -> None:
    """Each doubles the folders of a walk that enters them, at forty levels."""
    for place in ("train/a/below", "train/b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.png").touch()
    for name in ("one", "two"):
        (tmp_path / "train/a" / name).symlink_to("..")
        (tmp_path / "train/a/below" / name).symlink_to(tmp_path / "train/a")
        (tmp_path / "train/b" / name).symlink_to("../a/below")
    (tmp_path / "train/a/below/b").symlink_to("../../b")  # and from there back to below
    files = folder.find(tmp_path, "train", ("a", "b"))
    names = [os.path.relpath(os.fsdecode(path), tmp_path / "train") for path in files.paths]
    assert names == ["a/below/x.png", "a/below/b/x.png", "b/x.png", "b/one/x.png", "b/two/x.png"]
    (tmp_path / "train/c").symlink_to(".")
    with pytest.raises(UserError, match="train: no image in 1 of 3 class folders: c."):
        folder.find(tmp_path, "train", ("a", "b", "c"))


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    """A run that began with an earlier version goes on with the same order."""
    for i, name in enumerate(("a/b", "a-b", "a/b-c", "a/b/c", "a/b c", "a/B", "a/b.png", "é/\udce9", "é")):
        for suffix in ("2.png", "10.JPG", "b.webp", "x.txt"):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / name / f"{i}{suffix}").touch()
    (tmp_path / "elsewhere/below").mkdir(parents=True)
    (tmp_path / "elsewhere/below/y.png").touch()
    (tmp_path / "train/a/a link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/b/z.png").symlink_to("nothing")
    place, classes = str(tmp_path / "train"), folder.class_folders(tmp_path, "train")
    which = {name: i for i, name in enumerate(classes)}
    expected = make_dataset(place, which, None, lambda path: not path.endswith("txt"))
    files = folder.find(tmp_path, "train", classes)
    assert [os.fsdecode(path) for path in files.paths] == [path for path, _ in expected]
    assert files.labels.tolist() == [label for _, label in expected] and len(expected) == 9 * 3 + 2
    assert files.labels.dtype == np.int64


def test_empty_class_folders_are_named(root: Path) -> None:
    shutil.rmtree(root / "train/bee")
    (root / "train/bee").mkdir()
    (root / "train/bee/label.txt").write_text("x")
    with pytest.raises(UserError, match=r"train: no image in 1 of 3 class folders: bee. Fill or remove.*\.jpeg"):
        data.train_batches(config(root), CPU)


@pytest.mark.parametrize("name", [b"z\xe9", b"a\tb"])
def test_class_folders_whose_names_are_no_text_are_an_error(root: Path, name: bytes) -> None:
    for split in ("train", "val"):
        os.rename(root / split / "bee", os.fsencode(root / split) + b"/" + name)
    with pytest.raises(UserError, match=r"train: the class folder (z\\udce9|a\\tb): its name .* rename it"):
        data.train_batches(config(root), CPU)


def test_class_folders_may_have_names_in_any_script(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "\u871c\u3000\u8702 \u00e9")
    assert len(data.train_batches(config(root), CPU)) == 3


def test_splits_with_other_classes(root: Path) -> None:
    (root / "val/bee").rename(root / "val/eel")
    with pytest.raises(
        UserError, match="val: its class folders are not the 3 of the training split: eel too many; bee"
    ):
        data.eval_batches(config(root), CPU)
    for i in range(9):
        (root / f"val/x{i}").mkdir()
    with pytest.raises(UserError, match=r"eel, x0, x1, x2, x3, ... \(10\) too many; bee missing"):
        data.eval_batches(config(root), CPU)


def test_a_validation_split_alone_can_be_scored(root: Path) -> None:
    shutil.rmtree(root / "train")
    assert data.describe(config(root).data).classes == CLASSES
    assert sum(len(batch["name"]) for batch in data.eval_batches(config(root), CPU)) == 6
    with pytest.raises(UserError, match=r"train: no such folder, so there is no split 'train' \(folders in .*: val\)"):
        data.train_batches(config(root), CPU)


def test_fewer_images_than_a_batch(root: Path) -> None:
    with pytest.raises(UserError, match="the split 'train' in .* has 12 images, fewer than batch_size 16"):
        data.train_batches(config(root, batch_size=16), CPU)


# ---------------------------------------------------------------- batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_training_batches_do_not_depend_on_workers_or_history(root: Path) -> None:
    options = {"randaugment": 2, "erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}
    alone = data.train_batches(config(root, **options), CPU)
    epochs = [flat(alone.epoch(e)) for e in (0, 1)]
    assert len(alone) == 3 == len(epochs[0])
    assert epochs[0] != epochs[1]
    many = data.train_batches(config(root, workers=2, **options), CPU)
    stopped = many.epoch(1)
    next(stopped)
    assert flat(many.epoch(1)) == epochs[1], "also after an iterator that was left half way"
    assert flat(many.epoch(0, start=2)) == epochs[0][2:]
    assert flat(data.train_batches(config(root, seed=1, **options), CPU).epoch(0)) != epochs[0]


def test_a_batch(root: Path) -> None:
    batch = next(data.train_batches(config(root), CPU).epoch(0))
    assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["target"].dtype == torch.int64
    assert [CLASSES[i] for i in batch["target"]] == [Path(name).parent.name for name in batch["name"]]
    mixed = next(data.train_batches(config(root, cutmix=1.0), CPU).epoch(0))
    assert mixed["target"].shape == (4, 3) and mixed["target"].dtype == torch.float32


def test_an_image_does_not_depend_on_ranks(root: Path) -> None:
    def images(cfg: ClassifyConfig, world: int) -> dict[str, bytes]:
        batches = [data.train_batches(cfg, CPU, world, rank) for rank in range(world)]
        return {
            name: image.numpy().tobytes()
            for one in batches
            for batch in one.epoch(2)
            for name, image in zip(batch["name"], batch["image"], strict=True)
        }

    alone = images(config(root), 1)
    assert images(config(root), 2) == alone and len(set(alone.values())) == 12


def test_crop_scale_and_flip(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3))
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(ramp).save(tmp_path / "train" / name / f"{i}.png")
    options: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "batch_size": 60}

    def spans(**more: Any) -> torch.Tensor:
        images = next(data.train_batches(config(tmp_path, **options, **more), CPU).epoch(0))["image"]
        return images[:, 0, 0, -1] - images[:, 0, 0, 0]

    whole, small = spans(crop_scale=(0.9, 1.0), flip=0.0), spans(crop_scale=(0.04, 0.05), flip=0.0)
    assert whole.min() > 0.7 and small.min() > 0 and small.max() < 0.4
    assert 15 < (spans(flip=0.5) > 0).sum() < 45


def test_evaluation_takes_the_middle(tmp_path: Path) -> None:
    for name in CLASSES:
        pixels = np.zeros((40, 80, 3), np.uint8)
        pixels[:, 24:56] = 255
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "val" / name / "x.png")

    def white_columns(**options: Any) -> float:
        cfg = config(tmp_path, size=32, mean=(0.0,) * 3, std=(1.0,) * 3, **options)
        (batch,) = data.eval_batches(cfg, CPU)
        assert batch["image"].shape == (3, 3, 32, 32)
        torch.testing.assert_close(batch["image"], batch["image"].flip(-1), atol=0.05, rtol=0)
        return float(batch["image"].mean()) * 32

    assert white_columns() == pytest.approx(32 * 37 / 40, abs=0.3), "37 = round(32 / 0.875) high"
    assert white_columns(eval_resize=32) == pytest.approx(32 * 32 / 40, abs=0.3)


@pytest.mark.parametrize("size", [(10, 200), (200, 10)])
def test_of_stretched_images_the_middle_is_the_same_at_less_cost(size: tuple[int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    steps = augment.evaluation_steps(config(Path(), size=16).data, 16)
    whole = v2.functional.center_crop(v2.functional.resize(image, [18], antialias=True), [16, 16])
    assert torch.equal(steps(image), whole)
    assert steps.transforms[0](torch.zeros(3, 4, 200_000)).shape == (3, 4, 32)


def test_each_validation_image_is_on_one_rank(root: Path) -> None:
    cfg = config(root, eval_batch_size=2)
    ranks = [data.eval_batches(cfg, CPU, world=4, rank=rank) for rank in range(4)]
    names = [name for rank in ranks for batch in rank for name in batch["name"]]
    assert len(names) == 6 == len(set(names)) and [len(rank) for rank in ranks] == [1, 1, 1, 1]
    assert flat(ranks[0]) == flat(ranks[0])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_all_modes_become_rgb_or_grey(root: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    for name in CLASSES:
        picture(root / f"val/{name}/z.{suffix}", 5, mode=mode)
    (batch,) = data.eval_batches(config(root), CPU)
    assert batch["image"].shape == (9, 3, 16, 16)
    (grey,) = data.eval_batches(config(root, mean=(0.5,), std=(0.5,)), CPU)
    assert grey["image"].shape == (9, 1, 16, 16)
    assert data.describe(config(root, mean=(0.5,), std=(0.5,)).data).channels == 1


def test_grey_images_keep_their_values_in_a_grey_network(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in CLASSES:
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(levels).save(tmp_path / "val" / name / "x.png")
    (batch,) = data.eval_batches(config(tmp_path, mean=(0.0,), std=(1.0,), eval_resize=16), CPU)
    torch.testing.assert_close(batch["image"] * 255, torch.from_numpy(levels).float().expand(3, 1, 16, 16))


def test_the_grey_of_colours_is_that_of_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    found = augment.grey(torch.from_numpy(pixels).permute(2, 0, 1))
    assert found.shape == (1, 50, 60) and found.dtype == torch.uint8
    theirs = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))).int()
    assert (found.int() - theirs).abs().max() <= 1 and (found != theirs).float().mean() < 0.01


# ---------------------------------------------------------------- unreadable images


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_run(root: Path, workers: int) -> None:
    path = root / "train/bee/1.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as error:
        list(data.train_batches(config(root, workers=workers), CPU).epoch(0))
    message = str(error.value)
    del error  # its frames hold the workers
    assert message.startswith(f"{path}: ") and "Traceback" not in message
    (root / "val/cat/0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"val/cat/0.png: the file is empty"):
        list(data.eval_batches(config(root), CPU))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_once_and_left_out(root: Path, workers: int) -> None:
    for path in (root / "train/bee/1.jpg", root / "val/bee/1.jpg"):
        path.write_bytes(b"no image")
    cfg = config(root, workers=workers, on_error="skip")
    training, validation = data.train_batches(cfg, CPU), data.eval_batches(cfg, CPU)
    assert training.problems == []
    for epoch in (0, 1):
        batches = list(training.epoch(epoch))
        assert sorted(len(batch["name"]) for batch in batches) == [3, 4, 4]
        assert all(len(batch["image"]) == len(batch["target"]) == len(batch["name"]) for batch in batches)
    (batch,) = validation
    assert len(batch["name"]) == 5 and len(list(validation)) == 1
    for found, split in ((training.problems, "train"), (validation.problems, "val")):
        assert len(found) == 1 and found[0].startswith(f"{root / split / 'bee/1.jpg'}: not an image")


def test_a_micro_batch_without_a_readable_image(root: Path) -> None:
    for path in root.glob("*/*/*"):
        path.write_bytes(b"no image")
    cfg = config(root, on_error="skip")
    with pytest.raises(
        UserError,
        match="none of the 4 images of a micro-batch can be read.*repair such files, or.*The last one: /.*/train/",
    ):
        list(data.train_batches(cfg, CPU).epoch(0))
    validation = data.eval_batches(cfg, CPU)
    assert list(validation) == [] and len(validation.problems) == 6


def test_the_digest_is_of_the_same_names_wherever_they_lie(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from the folder itself, whose paths do not begin with "./"."""
    names = (f"/train/{name}/{i}.{'jpg' if i % 2 else 'png'}".encode() for name in CLASSES for i in range(4))
    expected = loading.digest(12, names)
    for here, place in ((root, "."), (root, ""), (root.parent, root.name), (root / "val", ".."), (root, str(root))):
        monkeypatch.chdir(here)
        assert data.train_batches(config(Path(place)), CPU).digest == expected, place
    top = [path.replace(os.fsencode(root), b"") for path in folder.find(root, "train", CLASSES).paths.tolist()]
    at_top = folder.Files(np.array(top), np.zeros(12, np.int64))
    assert folder._digest(at_top, config(Path("/")).data) == expected


def test_datasets_go_to_processes_that_are_not_forked(root: Path) -> None:
    cfg = config(root, randaugment=1, erasing=1.0).data
    files = folder.find(root, "train", CLASSES)
    dataset = folder.FolderDataset(files, cfg, augment.Normalize((0.5,) * 3, (0.5,) * 3), 3, train=True)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[(2, 1)]["image"], dataset[(2, 1)]["image"])
    assert not torch.equal(dataset[(2, 1)]["image"], dataset[(3, 1)]["image"])

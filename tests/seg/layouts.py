"""Small data sets of noise and blocks in each layout but Cityscapes' (that is `seg.sample`'s)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 56)


def put(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    image.save(path)


def scene(rng: np.random.Generator, ids: list[int], size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An image and a mask of blocks with these ids, all of which occur."""
    small = rng.choice(ids, (size[0] // 8, size[1] // 8)).astype(np.uint8)
    small.ravel()[: len(ids)] = ids[: small.size]
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), np.kron(small, np.ones((8, 8), np.uint8))


def camvid(root: Path) -> list[int]:
    rng, ids = np.random.default_rng(0), list(range(12))
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for i in range(count):
            image, mask = scene(rng, ids)
            put(root / split / f"0001TP_{i:06d}.png", image)
            put(root / f"{split}annot" / f"0001TP_{i:06d}.png", mask)
    return ids


def bdd100k(root: Path) -> list[int]:
    rng, ids = np.random.default_rng(0), [*range(19), 255]
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for i in range(count):
            image, mask = scene(rng, ids)
            put(root / "images/10k" / split / f"{i:04x}-a.jpg", image)
            if split != "test":
                put(root / "labels/sem_seg/masks" / split / f"{i:04x}-a.png", mask)
    return ids


def mapillary(root: Path, version: str = "v2.0") -> list[int]:
    rng = np.random.default_rng(0)
    names = ["Bird", "Curb", "Road", "Unlabeled"]
    labels = [
        {"readable": n, "name": f"x--{n}", "color": [i, 2, 3], "evaluate": n not in ("Curb", "Unlabeled")}
        for i, n in enumerate(names)
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / f"config_{version}.json").write_text(json.dumps({"labels": labels}))
    folder = "labels" if version == "v1.2" else f"{version}/labels"
    for split, count in (("training", 4), ("validation", 2), ("testing", 1)):
        for i in range(count):
            image, mask = scene(rng, [0, 1, 2, 3], (SIZE[0] + 8 * i, SIZE[1]))
            put(root / split / "images" / f"{i}_x.jpg", image)
            if split != "testing":
                put(root / split / folder / f"{i}_x.png", mask, palette=True)
    return [0, 1, 2, 3]


def kitti(root: Path) -> list[int]:
    rng, ids = np.random.default_rng(0), [0, 7, 8, 11, 21, 23, 26]
    for i in range(10):
        image, mask = scene(rng, ids)
        put(root / "training/image_2" / f"{i:06d}_10.png", image)
        put(root / "training/semantic" / f"{i:06d}_10.png", mask)
        put(root / "testing/image_2" / f"{i:06d}_10.png", image[::-1])
    return ids


def acdc(root: Path) -> list[int]:
    rng, ids = np.random.default_rng(0), [0, 4, 7, 8, 23, 26]
    for condition in ("fog", "night", "rain", "snow"):
        for split, count in (("train", 2), ("val", 1), ("test", 1)):
            for i in range(count):
                image, mask = scene(rng, ids)
                name = f"{split}/GP010476/GP010476_frame_{i:06d}"
                put(root / "rgb_anon" / condition / f"{name}_rgb_anon.png", image)
                if split != "test":
                    put(root / "gt" / condition / f"{name}_gt_labelIds.png", mask)
                    put(root / "gt" / condition / f"{name}_gt_labelColor.png", image)
    return ids


def voc(root: Path) -> list[int]:
    rng, ids = np.random.default_rng(0), [*range(21), 255]
    top = root / "VOCdevkit/VOC2012"
    for split, count in (("train", 4), ("val", 2)):
        names = [f"2007_{split}{i}" for i in range(count)]
        for i, name in enumerate(names):
            image, mask = scene(rng, ids, (SIZE[0], SIZE[1] + 8 * i))
            put(top / "JPEGImages" / f"{name}.jpg", image)
            put(top / "SegmentationClass" / f"{name}.png", mask, palette=True)
        lists = top / "ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    (top / "ImageSets/Segmentation/test.txt").write_text("2007_val0\n")
    return ids


LABELS = """
- {id: 40, name: road, color: [128, 64, 128], train_id: 1}
- {id: 3, name: car, color: [0, 0, 142], train_id: 0, category: moving}
- {id: 4, name: truck, color: [0, 0, 70], train_id: 0}
- {id: 9, name: unicorn, color: [1, 1, 1], train_id: 2}
- {id: 200, name: void, color: [0, 0, 0], ignore: true}
"""


def folder(root: Path) -> list[int]:
    rng, ids = np.random.default_rng(0), [3, 4, 40, 200]
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for i in range(count):
            image, mask = scene(rng, ids, (SIZE[0], SIZE[1] + 16 * i))
            suffix = ("jpg", "png", "webp", "bmp")[i]
            put(root / "images" / split / f"day{i % 2}" / f"shot {i}.{suffix}", image)
            if split != "test":
                put(root / "masks" / split / f"day{i % 2}" / f"shot {i}.png", mask)
    (root / "labels.yaml").write_text(LABELS)
    return ids


def hide(root: Path, split: str) -> None:
    """Every pixel of a split that `folder` wrote becomes one that is ignored."""
    for path in (root / "masks" / split).rglob("*.png"):
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size, 200).save(path)


WRITERS: dict[str, Callable[[Path], list[int]]] = {
    "camvid": camvid,
    "bdd100k": bdd100k,
    "mapillary": mapillary,
    "kitti": kitti,
    "acdc": acdc,
    "voc": voc,
    "folder": folder,
}

"""Each data set's layout: files found, ids understood, scores and training on it, and what is said when parts miss."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from engine import checkpoint
from engine.config import load
from engine.errors import UserError
from seg import card_page, data, datasets, errors_page, evaluate, losses, train
from seg.compare import compare
from seg.config import SegConfig
from seg.labels import table, table_of
from seg.models import from_checkpoint
from tests.seg.layouts import SIZE, WRITERS, acdc, bdd100k, folder, kitti, mapillary, put, voc

COUNTS = {"kitti": (8, 2, 10), "acdc": (8, 4, 4)}


def config(name: str, root: Path, **options: Any) -> SegConfig:
    settings = {"name": name, "root": root, "crop": (32, 32), "mean": (0, 0, 0), "std": (1, 1, 1), **options}
    return SegConfig.model_validate(
        {"length": "1 epochs", "batch_size": 2, "data": settings, "runtime": {"workers": 0, "device": "cpu"}}
    )


class Stripes(nn.Module):
    """Predicts class (column // 8) mod the number of classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.classes = classes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        wanted = torch.arange(images.shape[3]) // 8 % self.classes
        logits = nn.functional.one_hot(wanted, self.classes).T[None, :, None].float() * self.weight
        return {"out": logits.expand(len(images), -1, images.shape[2], -1)}


@pytest.mark.parametrize("name", WRITERS)
def test_a_layout_is_found_read_trained_on_and_scored(tmp_path: Path, name: str) -> None:
    ids = WRITERS[name](tmp_path)
    cfg = config(name, tmp_path)
    labels = table(cfg.data)
    train, val, test = (datasets.samples(cfg.data, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == COUNTS.get(name, (4, 2, 1))
    assert [s.name for s in train] == [s.name for s in datasets.samples(cfg.data, "train")]
    assert not {s.image for s in train} & {s.image for s in val} and len({s.name for s in train}) == len(train)
    if name != "camvid":
        assert all(sample.label is None for sample in test)
    for sample in train + val:
        image, label = data.read_pair(sample)
        assert image.shape[:2] == label.shape and set(np.unique(label)) <= set(ids)
    batch = next(data.train_batches(cfg).epoch(0))
    assert batch["image"].shape == (2, 3, 32, 32)
    assert int(batch["target"][batch["target"] != 255].max()) < labels.num_classes
    scores, pictures = evaluate.evaluate_model(Stripes(labels.num_classes), cfg)
    assert_scores_are_right(scores, val, labels)
    assert len(pictures) == len(val) and 0 < scores.mean_iou < 1
    evaluate.write_json(scores, tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["labels"] == {x.name: x.id for x in labels.labels}
    evaluate.write_pictures(scores, pictures, tmp_path / "out")


def assert_scores_are_right(scores: Any, samples: list[data.Sample], labels: Any) -> None:
    """IoU and pixel accuracy against plain sums over all valid pixels."""
    pred, true = [], []
    for sample in samples:
        ids = np.array(Image.open(sample.label))
        wanted = {label.id: label.train_id for label in labels.labels}
        true.append(np.vectorize(wanted.get)(ids).ravel())
        pred.append(np.broadcast_to(np.arange(ids.shape[1]) // 8 % labels.num_classes, ids.shape).ravel())
    p, t = np.concatenate(pred), np.concatenate(true)
    p, t = p[t != 255], t[t != 255]
    for i, (name, iou) in enumerate(scores.class_iou.items()):
        assert name == labels.classes[i]
        union = ((p == i) | (t == i)).sum()
        expected = ((p == i) & (t == i)).sum() / union if union else math.nan
        assert iou == pytest.approx(expected, nan_ok=True)
    assert scores.pixel_accuracy == pytest.approx((p == t).mean())
    assert scores.class_matrix().sum() == len(t)


def test_iiou_and_categories_are_shown_only_where_the_table_has_them(tmp_path: Path) -> None:
    voc(tmp_path / "voc")
    scores, _ = evaluate.evaluate_model(Stripes(21), config("voc", tmp_path / "voc"))
    assert "iIoU" not in scores.table() and "category" not in scores.table()
    assert set(scores.means()) == {"mIoU", "pixel accuracy", "mean accuracy", "frequency-weighted IoU"}
    bdd100k(tmp_path / "bdd")
    scores, _ = evaluate.evaluate_model(Stripes(19), config("bdd100k", tmp_path / "bdd"))
    assert "iIoU" not in scores.table() and list(scores.category_iou)[:2] == ["flat", "construction"]
    assert "void" not in scores.category_iou


def test_a_class_that_never_occurs_is_a_dash_and_said(tmp_path: Path) -> None:
    folder(tmp_path)
    scores, _ = evaluate.evaluate_model(Stripes(2), config("folder", tmp_path))
    assert math.isnan(scores.class_iou["unicorn"])
    assert scores.mean_iou == pytest.approx((scores.class_iou["car"] + scores.class_iou["road"]) / 2)
    text = scores.table()
    assert "unicorn               -      -" in text
    assert "in no label file, so '-' and no part of the mean IoU: unicorn" in text
    wrong, _ = evaluate.evaluate_model(Stripes(3), config("folder", tmp_path))
    assert wrong.class_iou["unicorn"] == 0
    assert "in no label file, but predicted, so 0 in the mean IoU: unicorn" in wrong.table()


def test_merged_labels_are_one_class(tmp_path: Path) -> None:
    folder(tmp_path)
    labels = table(config("folder", tmp_path).data)
    assert labels.classes == ("car", "road", "unicorn") and labels.label_ids == (3, 40, 9)
    train_ids = labels.to_train_ids(np.array([[3, 4, 40, 200]], np.uint8), "x.png")
    assert train_ids.tolist() == [[0, 0, 1, 255]]
    assert labels.to_label_ids(train_ids).tolist() == [[3, 3, 40, 200]]


def test_mapillarys_versions_and_ignored_labels(tmp_path: Path) -> None:
    mapillary(tmp_path, "v1.2")
    assert "v2.0" not in str(datasets.samples(config("mapillary", tmp_path).data, "train")[0].label)
    mapillary(tmp_path, "v2.0")
    new = config("mapillary", tmp_path).data
    assert "v2.0/labels" in str(datasets.samples(new, "train")[0].label)
    old = config("mapillary", tmp_path, labels=tmp_path / "config_v1.2.json").data
    assert datasets.samples(old, "train")[0].label == tmp_path / "training/labels/0_x.png"
    assert table(new).classes == ("Bird", "Road") and table(new).label_ids == (0, 2)
    assert table(new).to_train_ids(np.array([[0, 1, 2, 3]], np.uint8), "x").tolist() == [[0, 255, 1, 255]]


def test_kittis_split_is_every_fifth_image(tmp_path: Path) -> None:
    kitti(tmp_path)
    cfg = config("kitti", tmp_path).data
    assert [s.name for s in datasets.samples(cfg, "val")] == ["000004_10", "000009_10"]
    assert len(datasets.samples(cfg, "trainval")) == 10
    with pytest.raises(UserError, match="KITTI has no split 'dev'; expected train, val, trainval or test"):
        datasets.samples(cfg, "dev")


@pytest.mark.parametrize("name", ["kitti", "cityscapes"])
def test_a_training_on_several_splits(name: str, tmp_path: Path, sample_root: Path) -> None:
    root = sample_root if name == "cityscapes" else tmp_path
    if name == "kitti":
        kitti(root)
    data = config(name, root, train_split="val+train").data
    assert datasets.samples(data, data.train_split) == [
        *datasets.samples(data, "val"),
        *datasets.samples(data, "train"),
    ]
    assert datasets.splits(data) == ["val", "train", "test"]
    with pytest.raises(UserError, match="nowhere"):
        datasets.samples(data, "train+nowhere")
    for wrong in ("train+", "train+train", ""):
        with pytest.raises(ValidationError, match=r"expected a split, or different ones with \+ between"):
            config(name, root, train_split=wrong)


def test_images_of_one_name_in_joined_splits_are_told_apart(tmp_path: Path) -> None:
    folder(tmp_path)
    data = config("folder", tmp_path).data
    first = datasets.samples(data, "train")[0]
    assert first.label is not None
    for path in (first.image, first.label):
        shutil.copy(path, Path(str(path).replace("/train/", "/val/")))
    names = [one.name for one in datasets.samples(data, "train+val")]
    assert {f"train/{first.name}", f"val/{first.name}"} <= set(names) and len(set(names)) == len(names)
    assert first.name in {one.name for one in datasets.samples(data, "train")} & {
        one.name for one in datasets.samples(data, "val")
    }
    for one in datasets.samples(data, "train+val"):
        assert one.name.removeprefix("train/").removeprefix("val/") in str(one.image)


def test_splits_that_have_images_in_common(tmp_path: Path) -> None:
    kitti(tmp_path)
    with pytest.raises(UserError, match=r"the splits train\+trainval of kitti have \d+ of their images in common"):
        datasets.samples(config("kitti", tmp_path, train_split="train+trainval").data, "train+trainval")


@pytest.mark.parametrize("split, seen", [("train", False), ("trainval", True), ("val+train", True)])
def test_a_split_may_hold_the_images_of_another(tmp_path: Path, split: str, seen: bool, monkeypatch: Any) -> None:
    """A training says that its scores are not those of other images; it went by the names of the splits."""
    kitti(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    changes = ["data.name=kitti", f"data.root={tmp_path}", f"data.train_split={split}", "loss.class_weights=null"]
    said: list[str] = []
    monkeypatch.setattr(train.Log, "message", lambda self, text: said.append(text))
    monkeypatch.setattr(train, "fit", lambda *args, **options: None)
    train.run(load(tmp_path / "tiny.yaml", changes, SegConfig), tmp_path / "run")
    assert ("note: 'val' is trained on too" in "".join(said)) == seen


def test_bdd100ks_archives_are_taken_as_they_unpack(tmp_path: Path) -> None:
    bdd100k(tmp_path / "bdd100k")
    found = [datasets.samples(config("bdd100k", root).data, "val") for root in (tmp_path, tmp_path / "bdd100k")]
    assert found[0] == found[1] and len(found[0]) == 2


def test_acdcs_condition_is_the_city_and_may_be_left_out(tmp_path: Path) -> None:
    acdc(tmp_path)
    cfg = config("acdc", tmp_path).data
    assert [s.city for s in datasets.samples(cfg, "val")] == ["fog", "night", "rain", "snow"]
    shutil.rmtree(tmp_path / "rgb_anon/fog")
    assert [s.city for s in datasets.samples(cfg, "val")] == ["night", "rain", "snow"]
    assert datasets.samples(cfg, "val")[0].name == "night/GP010476/GP010476_frame_000000"


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_root_says_where_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"none.*data\.root\)") as error:
        datasets.samples(config(name, tmp_path / "none").data, "train")
    assert any(word in str(error.value) for word in ("Download", "Get CamVid", "Put images"))


MISSING = {
    "camvid": "trainannot",
    "bdd100k": "labels/sem_seg/masks/train",
    "mapillary": "training/v2.0/labels",
    "kitti": "training/semantic",
    "acdc": "gt/night/train",
    "voc": "VOCdevkit/VOC2012/SegmentationClass",
    "folder": "masks/train",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_folder_is_named_with_what_is_there(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    gone = tmp_path / MISSING[name]
    shutil.rmtree(gone)
    with pytest.raises(UserError, match="no such folder, which data.name=") as error:
        datasets.samples(config(name, tmp_path).data, "train")
    assert MISSING[name].split("/")[0] in str(error.value) and " holds " in str(error.value)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "voc"])
def test_an_image_without_its_mask_is_named(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    sample = datasets.samples(config(name, tmp_path).data, "train")[1]
    assert sample.label is not None
    sample.label.rename(sample.label.with_name(f"{sample.image.stem}_mask_gt_labelIds.png"))
    with pytest.raises(UserError, match=r"in the split 'train' of .* 1 of \d+ images have no mask") as error:
        datasets.samples(config(name, tmp_path).data, "train")
    assert str(sample.image) in str(error.value)
    assert name in ("acdc",) or "names must be equal" in str(error.value)


def test_lists_of_voc(tmp_path: Path) -> None:
    voc(tmp_path)
    cfg = config("voc", tmp_path).data
    with pytest.raises(UserError, match=r"trainaug\.txt: no such list \(lists there: test, train, val\)"):
        datasets.samples(cfg, "trainaug")
    own = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/own.txt"
    own.write_text("2007_train1\n2007_train0\n2007_train1\n")
    with pytest.raises(UserError, match=r"own\.txt: names 2007_train1 2 times; expected each image once"):
        datasets.samples(cfg, "own")
    for line in (b"2007_train1 1", b"/JPEGImages/2007_train1.jpg /SegmentationClass/2007_train1.png"):
        own.write_bytes(b"2007_train0\n" + line + b"\n")
        with pytest.raises(UserError, match=r"own\.txt: line 2: found '.*', expected the name of one image, such as"):
            datasets.samples(cfg, "own")
    own.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"own\.txt: cannot be read \(.*\); expected a name in each line, in UTF-8"):
        datasets.samples(cfg, "own")
    own.unlink()
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_train1.png").unlink()
    with pytest.raises(UserError, match=r"names 4 images; 1 files are missing, the first .*2007_train1\.png"):
        datasets.samples(cfg, "train")


def test_a_list_of_voc_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    voc(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(datasets.samples(config("voc", tmp_path).data, "train")) == 4


def test_two_images_of_one_name_and_an_empty_split(tmp_path: Path) -> None:
    folder(tmp_path)
    image = next((tmp_path / "images/train/day0").iterdir())
    Image.open(image).save(image.with_suffix(".tif"))
    with pytest.raises(UserError, match="are two files for one image; remove one"):
        datasets.samples(config("folder", tmp_path).data, "train")
    for kind in ("images", "masks"):
        (tmp_path / kind / "night").mkdir()
    with pytest.raises(UserError, match="the split 'night' of folder is empty"):
        datasets.samples(config("folder", tmp_path).data, "night")


def test_links_to_folders_are_followed_and_hidden_folders_are_not_read(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder(root)
    for kind in ("images", "masks"):
        (root / kind / "train/day1").rename(elsewhere.with_name(kind))
        (root / kind / "train/day1").symlink_to(elsewhere.with_name(kind))
    image = next((root / "images/train/day0").iterdir())
    put(image.parent / ".ipynb_checkpoints/shot-checkpoint.png", np.zeros((*SIZE, 3), np.uint8))
    found = [sample.name for sample in datasets.samples(config("folder", root).data, "train")]
    assert found == ["day0/shot 0", "day0/shot 2", "day1/shot 1", "day1/shot 3"]


def test_a_link_to_nothing_is_no_image_less(tmp_path: Path) -> None:
    folder(tmp_path)
    for kind in ("images", "masks"):
        path = next((tmp_path / kind / "train/day0").glob("shot 0.*"))
        path.unlink()
        path.symlink_to(tmp_path / "not mounted")
    samples = datasets.samples(config("folder", tmp_path).data, "train")
    with pytest.raises(UserError, match=r"shot 0\.jpg: cannot be read"):
        data.read_pair(samples[0])


def test_an_id_that_the_table_does_not_know_names_file_and_table(tmp_path: Path) -> None:
    folder(tmp_path)
    sample = datasets.samples(config("folder", tmp_path).data, "train")[0]
    put(sample.label, np.full(SIZE, 77, np.uint8))
    with pytest.raises(UserError, match=rf"{sample.label}: unknown label ids 77 \(2240 pixels\)") as error:
        data.SegDataset([sample], config("folder", tmp_path).data, 0, table(config("folder", tmp_path).data))[0, 0]
    assert "ids 3 to 4, 9, 40, 200" in str(error.value) and "ignore: true" in str(error.value)


def test_colour_masks_say_how_to_convert(tmp_path: Path) -> None:
    folder(tmp_path)
    sample = datasets.samples(config("folder", tmp_path).data, "train")[0]
    put(sample.label, np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(UserError, match="holds RGB colours; expected one channel.*python tools/convert_masks.py"):
        data.read_pair(sample)


def test_keys_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels has no effect with name: voc"):
        config("voc", tmp_path, labels=tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="coarse_share needs name: cityscapes"):
        config("voc", tmp_path, coarse_share=0.5)


# ---------------------------------------------------------------- a run from beginning to end

TINY = """
task: seg
length: 2 steps
batch_size: 2
data: {name: folder, crop: [32, 48], repeat_rare: 0.6, rare_crop: 0.5}
model: {name: lraspp_mobilenet_v3_large, output_stride: 16}
loss: {class_weights: [1, 2, 3]}
optim: {lr: 0.01}
runtime: {workers: 0, device: cpu}
report: {log_every: 1 step, eval_every: 2 steps, checkpoint_every: 1 step, images: 1, tensorboard: false}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of own data at `data`, the config `own.yaml`, and a finished run of it at `work`."""
    root = tmp_path_factory.mktemp("own")
    folder(root / "data")
    (root / "own.yaml").write_text(TINY)
    train.run(load(root / "own.yaml", [f"data.root={root}/data"], SegConfig), root / "work")
    return root


def test_a_run_knows_its_table_and_is_scored_with_it(own: Path) -> None:
    content = checkpoint.load(own / "work/best.pt")
    assert content["meta"]["classes"] == ["car", "road", "unicorn"]
    model, cfg, meta = from_checkpoint(own / "work/best.pt")
    assert model.eval()(torch.zeros(1, 3, 64, 64))["out"].shape[1] == 3
    assert table_of(meta) == table(cfg.data)
    result = evaluate.evaluate_checkpoint(own / "work/best.pt")
    assert result is not None and list(result[0].class_iou) == ["car", "road", "unicorn"]
    assert result[0].mean_iou == pytest.approx(content["best_score"], abs=1e-9)
    rows = [json.loads(line) for line in (own / "work/metrics.jsonl").read_text().splitlines()]
    scalars = next(row["scalars"] for row in rows if row["kind"] == "eval")
    assert {"IoU/car", "IoU/road", "mIoU"} <= set(scalars) and "iIoU" not in scalars


def test_predictions_are_written_with_the_runs_own_ids_even_without_the_data(own: Path, tmp_path: Path) -> None:
    from tools import predict

    image = next((own / "data/images/test").rglob("*.jpg"))
    call = [
        str(own / "work/best.pt"),
        str(image),
        "data.root=/gone",
        "--out",
        str(tmp_path),
        "--save",
        "labels",
        "color",
    ]
    assert predict.main([*call, "color", "overlay"]) == 0
    ids = np.array(Image.open(next((tmp_path / "labels").glob("*.png"))))
    assert set(np.unique(ids)) <= {3, 40, 9}
    colors = np.array(Image.open(next((tmp_path / "color").glob("*.png"))))
    assert {tuple(c) for c in colors.reshape(-1, 3).tolist()} <= {(0, 0, 142), (128, 64, 128), (1, 1, 1)}


def test_runs_on_one_table_are_compared(own: Path, tmp_path: Path) -> None:
    text = compare([own / "work", own / "work"], ["a", "b"], tmp_path / "c.png", examples=2)
    assert "best mIoU" in text and min(Image.open(tmp_path / "c.png").size) > 300


def test_the_pages_name_the_runs_own_classes(own: Path, tmp_path: Path) -> None:
    path, scores = own / "work/best.pt", evaluate.evaluate_checkpoint(own / "work/best.pt")
    assert scores is not None
    card_page.write_card(path, out=tmp_path)
    found = json.loads((tmp_path / "card.json").read_text())
    assert list(found["boundaryIoU"]["classes"]) == ["car", "road", "unicorn"]
    assert found["scores"] == json.loads(json.dumps(scores[0].to_json()))
    errors_page.write_errors(path, tmp_path / "errors.html")
    assert "unicorn" in (tmp_path / "card.html").read_text()
    pairs = re.findall(r">(\w+) taken for (\w+)<", (tmp_path / "errors.html").read_text())
    assert pairs and {name for pair in pairs for name in pair} <= {"car", "road", "unicorn"}


def test_another_table_than_the_runs_is_refused(own: Path, tmp_path: Path) -> None:
    voc(tmp_path / "voc")
    with pytest.raises(UserError, match=r"best\.pt: predicts the 3 classes of data/labels\.yaml, but data\.name=voc"):
        evaluate.evaluate_checkpoint(own / "work/best.pt", ["data.name=voc", f"data.root={tmp_path}/voc"])
    shutil.copytree(own / "data", tmp_path / "data")
    labels = tmp_path / "data/labels.yaml"
    labels.write_text(labels.read_text().replace("unicorn", "horse"))
    with pytest.raises(UserError, match="the first that differs is 'unicorn', here 'horse'"):
        evaluate.evaluate_checkpoint(own / "work/best.pt", [f"data.root={tmp_path}/data"])
    shutil.copytree(own / "work", tmp_path / "work")
    again = load(own / "own.yaml", [f"data.root={tmp_path}/data", "length=4 steps"], SegConfig)
    with pytest.raises(UserError, match=r"last\.pt: predicts the 3 classes.*'unicorn', here 'horse'"):
        train.run(again, tmp_path / "work", "auto")


def test_class_weights_are_one_for_each_class_of_the_table(own: Path) -> None:
    cfg = load(own / "own.yaml", [f"data.root={own}/data", "loss.class_weights=[1, 2]"], SegConfig).config
    with pytest.raises(UserError, match="found 2 weights; expected 3, not all zero, in the order car, road, unicorn"):
        losses.build(cfg)

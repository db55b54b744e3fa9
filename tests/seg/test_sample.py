"""seg/sample.py: the rendered data set, and how cityscapesscripts sees it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import id2label, labels, name2label
from cityscapesscripts.preparation.createTrainIdLabelImgs import main as create_train_id_images
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage, json2labelImg

from engine.errors import UserError
from seg import sample
from tests import programs

SCORED = {label.id for label in labels if not label.ignoreInEval}
KINDS = ("polygons.json", "labelIds.png", "instanceIds.png", "color.png")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation images of 128x256 pixels."""
    root = tmp_path_factory.mktemp("larger") / "sample"
    return sample.render(root, size=(128, 256), counts={"train": 24, "val": 8})


def read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


def truths(root: Path, kind: str, split: str = "*") -> list[Path]:
    return sorted((root / "gtFine").glob(f"{split}/*/*_gtFine_{kind}"))


def hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "sample.json")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout(sample_root: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        images = sorted((sample_root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        assert len(images) == count
        for image in images:
            city, sequence, frame, _ = image.stem.split("_")
            assert image.parent.name == city and len(sequence) == len(frame) == 6
            assert read(image).shape == (64, 128, 3)
            folder = sample_root / "gtFine" / split / city
            for kind in KINDS:
                assert (folder / f"{city}_{sequence}_{frame}_gtFine_{kind}").is_file()
    assert len(list(sample_root.rglob("*.*"))) == 7 * 5 + 1


def test_record_says_synthetic(sample_root: Path) -> None:
    record = json.loads((sample_root / "sample.json").read_text())
    assert record["synthetic"] is True and "synthetic" in record["about"]
    assert record["size"] == [64, 128] and record["seed"] == 0
    assert record["counts"] == {"train": 4, "val": 2, "test": 1}


def test_official_tools_rasterise_the_polygons_to_the_same_pixels(larger: Path, tmp_path: Path) -> None:
    for path in truths(larger, "polygons.json")[::4]:
        stem = str(path)[: -len("polygons.json")]
        ids, instances, colour = (read(Path(stem + kind)) for kind in KINDS[1:])
        assert ids.dtype == np.uint8 and instances.dtype == np.uint16 and colour.shape == (*ids.shape, 4)
        json2labelImg(str(path), str(tmp_path / "ids.png"))
        np.testing.assert_array_equal(ids, read(tmp_path / "ids.png"))
        annotation = Annotation()
        annotation.fromJsonFile(str(path))
        np.testing.assert_array_equal(instances, np.asarray(createInstanceImage(annotation, "ids")))
        rgba = np.asarray(createLabelImage(annotation, "color"))
        np.testing.assert_array_equal(cv2.cvtColor(colour, cv2.COLOR_BGRA2RGBA), rgba)


def test_instances_agree_with_labels(larger: Path) -> None:
    several = 0
    for path in truths(larger, "instanceIds.png"):
        instances = read(path)
        ids = read(Path(str(path).replace("instanceIds", "labelIds")))
        np.testing.assert_array_equal(np.where(instances < 1000, instances, instances // 1000), ids)
        countable = np.array([id2label[int(i)].hasInstances for i in np.unique(ids)])
        np.testing.assert_array_equal(np.isin(ids, np.unique(ids)[countable]), instances >= 1000)
        several += len(np.unique(instances[ids == name2label["car"].id])) > 1
    assert several >= 8  # images with more than one car


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_classes_occur_in_few_images(sample_root: Path, larger: Path, split: str) -> None:
    for root in (sample_root, larger):
        pixels = np.concatenate([read(path).ravel() for path in truths(root, "labelIds.png", split)])
        share = np.bincount(pixels, minlength=34) / pixels.size
        rare = {id2label[i].name: round(float(share[i]), 5) for i in SCORED if share[i] < 0.0005}
        assert not rare


def test_every_second_image_holds_the_rare_classes(larger: Path) -> None:
    pictures = [read(path) for split in ("train", "val") for path in truths(larger, "labelIds.png", split)]
    for name in ("bus", "truck", "train", "motorcycle", "bicycle", "rider", "wall", "fence", "terrain"):
        held = np.mean([(picture == name2label[name].id).sum() > 30 for picture in pictures])
        assert held >= 0.4, name


def test_void_is_there_but_rare(larger: Path) -> None:
    pixels = np.concatenate([read(path).ravel() for path in truths(larger, "labelIds.png")])
    assert set(np.unique(pixels)) > SCORED
    assert 0.005 < 1 - np.isin(pixels, list(SCORED)).mean() < 0.15


def test_test_split_has_no_scored_label(sample_root: Path) -> None:
    for path in truths(sample_root, "labelIds.png", "test"):
        assert set(np.unique(read(path))) <= {1, 2, 3}


def test_same_seed_same_bytes_whatever_the_number(sample_root: Path, tmp_path: Path) -> None:
    again = sample.render(tmp_path / "again", size=(64, 128), counts={"train": 2, "val": 1, "test": 1})
    few, many = hashes(again), hashes(sample_root)
    assert len(few) == 4 * 5
    assert few == {name: many[name] for name in few}
    other = hashes(sample.render(tmp_path / "other", size=(64, 128), counts={"train": 1}, seed=1))
    assert all(few[name] != digest for name, digest in other.items())


@pytest.mark.parametrize("size", [(64, 128), (120, 130), (120, 480), (1024, 2048)])
def test_any_size(size: tuple[int, int], tmp_path: Path) -> None:
    root = sample.render(tmp_path / "x", size=size, counts={"val": 1})
    ids = read(truths(root, "labelIds.png")[0])
    assert ids.shape == size and len(np.unique(ids)) > 10
    assert read(next((root / "leftImg8bit").rglob("*.png"))).shape == (*size, 3)


def test_sizes_show_the_same_street(tmp_path: Path) -> None:
    ids = []
    for size in ((64, 128), (256, 512)):
        root = sample.render(tmp_path / str(size[0]), size=size, counts={"train": 1})
        ids.append(read(truths(root, "labelIds.png")[0]))
    small = cv2.resize(ids[1], (128, 64), interpolation=cv2.INTER_NEAREST)
    assert (small == ids[0]).mean() > 0.85  # borders are a pixel off, thin poles a pixel wider


def pairs(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Blurred colours (N, 3) and train ids (N,) of a split's valid pixels."""
    table = np.array([id2label[i].trainId if i in SCORED else 255 for i in range(34)])
    colours, classes = [], []
    for path in truths(root, "labelIds.png", split):
        image = Path(str(path).replace("gtFine/", "leftImg8bit/").replace("_gtFine_labelIds", "_leftImg8bit"))
        train_ids = table[read(path)]
        colours.append(cv2.GaussianBlur(read(image), (0, 0), 1)[train_ids < 255])
        classes.append(train_ids[train_ids < 255])
    return np.concatenate(colours).astype(np.float32), np.concatenate(classes)


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    matrix = np.bincount(truth * 19 + predicted, minlength=361).reshape(19, 19)
    return float(np.mean(np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))))


def test_colour_alone_does_not_solve_it(larger: Path) -> None:
    colours, classes = pairs(larger, "train")
    val_colours, val_classes = pairs(larger, "val")
    centroids = np.stack([colours[classes == c].mean(0) for c in range(19)])
    parts = np.array_split(val_colours, 8)
    nearest = np.concatenate([((part[:, None] - centroids) ** 2).sum(2).argmin(1) for part in parts])
    assert mean_iou(nearest, val_classes) < 0.12
    votes = np.zeros((4096, 19), np.int64)  # most frequent class of each of 16 x 16 x 16 colours
    np.add.at(votes, ((colours.astype(int) // 16) @ [256, 16, 1], classes), 1)
    likeliest = votes.argmax(1)[(val_colours.astype(int) // 16) @ [256, 16, 1]]
    assert mean_iou(likeliest, val_classes) < 0.2


def test_official_evaluation_of_perfect_predictions_is_one(larger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    monkeypatch.setattr(official.args, "quiet", True)
    monkeypatch.setattr(official.args, "JSONOutput", False)
    files = [str(path) for path in truths(larger, "labelIds.png", "val")]
    scores = official.evaluateImgLists(files, files, official.args)
    assert scores["averageScoreClasses"] == 1.0 and scores["averageScoreCategories"] == 1.0
    assert scores["averageScoreInstClasses"] == 1.0
    assert not np.isnan(list(scores["classScores"][label.name] for label in labels if label.id in SCORED)).any()


def test_official_train_id_tool(larger: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "gtFine" / "val" / "city"
    folder.mkdir(parents=True)
    source = truths(larger, "polygons.json", "val")[0]
    (folder / source.name).write_bytes(source.read_bytes())
    monkeypatch.setenv("CITYSCAPES_DATASET", str(tmp_path))
    create_train_id_images()
    made = read(folder / source.name.replace("polygons.json", "labelTrainIds.png"))
    ids = read(Path(str(source).replace("polygons.json", "labelIds.png")))
    table = np.array([id2label[i].trainId for i in range(34)], np.uint8)
    np.testing.assert_array_equal(made, table[ids])


def test_polygons_stay_near_the_picture(larger: Path) -> None:
    for path in truths(larger, "polygons.json"):
        content = json.loads(path.read_text())
        assert (content["imgHeight"], content["imgWidth"]) == (128, 256)
        points = np.concatenate([thing["polygon"] for thing in content["objects"]])
        assert points.dtype.kind == "i"
        assert (points >= (-26, -13)).all() and (points <= (282, 141)).all()


def test_rendering_again_is_fine(tmp_path: Path) -> None:
    first = hashes(sample.render(tmp_path / "x", size=(64, 128), counts={"train": 1}))
    next((tmp_path / "x" / "leftImg8bit").rglob("*.png")).unlink()
    assert hashes(sample.render(tmp_path / "x", size=(64, 128), counts={"train": 1})) == first


@pytest.mark.parametrize("text", ["256", "256x", "256x512x3", "axb", "-1x5", "2.5x5"])
def test_size_that_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=f"size '{text}' is not HEIGHTxWIDTH in pixels, for example 256x512"):
        sample.parse_size(text)


def test_size_is_height_and_width() -> None:
    assert sample.parse_size("256x512") == (256, 512)


@pytest.mark.parametrize("size", [(32, 64), (64, 100), (4096, 8192), (512, 256), (64, 1024)])
def test_size_that_cannot_be_rendered(size: tuple[int, int], tmp_path: Path) -> None:
    message = f"size {size[0]}x{size[1]} can't be rendered: expected HEIGHTxWIDTH from 64x128 to 1024x2048"
    with pytest.raises(UserError, match=message):
        sample.render(tmp_path / "x", size=size)
    assert not (tmp_path / "x").exists()


def test_counts_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="-1 train images were asked for"):
        sample.render(tmp_path / "x", counts={"train": -1})
    with pytest.raises(UserError, match="no split 'trian' in the sample data set; it has train, val and test"):
        sample.render(tmp_path / "x", counts={"trian": 1})
    with pytest.raises(UserError, match="no images were asked for"):
        sample.render(tmp_path / "x", counts={"train": 0})


def test_seed_below_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed -3 is below 0"):
        sample.render(tmp_path / "x", seed=-3)


def test_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no sample.json, so no sample data"):
        sample.render(tmp_path, counts={"train": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_folder_with_other_parameters(tmp_path: Path) -> None:
    sample.render(tmp_path / "x", size=(64, 128), counts={"train": 1})
    before = hashes(tmp_path / "x")
    with pytest.raises(UserError, match=r"other parameters \(seed, counts differ"):
        sample.render(tmp_path / "x", size=(64, 128), counts={"train": 2}, seed=7)
    assert hashes(tmp_path / "x") == before


@pytest.mark.parametrize("content", ["{", "[1]", "\x00\xff"])
def test_folder_with_a_foreign_sample_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="sample.json"):
        sample.render(tmp_path, size=(64, 128), counts={"train": 1})


def test_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="x is a file; a folder is needed"):
        sample.render(tmp_path / "x", counts={"train": 1})
    with pytest.raises(UserError, match="can't write the sample data to"):
        sample.render(tmp_path / "x" / "y", counts={"train": 1})


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # modes would not stop root
    with pytest.raises(UserError, match="can't write the sample data to .*: Permission denied"):
        sample.render(tmp_path / "x", counts={"train": 1})


def test_write_error_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="can't write the sample data to .*: No space left on device"):
        sample.render(tmp_path / "x", size=(64, 128), counts={"train": 1})


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run("make_sample", *arguments)


def test_tool(tmp_path: Path) -> None:
    root = tmp_path / "data" / "sample"
    done = make(str(root), "--size", "64x128", "--train", "1", "--val", "1", "--test", "0", "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert "2 synthetic street scenes" in done.stdout
    assert json.loads((root / "sample.json").read_text())["seed"] == 5
    assert len(truths(root, "labelIds.png", "train")) == len(truths(root, "labelIds.png", "val")) == 1


def test_tool_says_what_is_wrong(tmp_path: Path) -> None:
    done = make(str(tmp_path / "x"), "--size", "large")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: size 'large' is not HEIGHTxWIDTH in pixels, for example 256x512\n"

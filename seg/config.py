"""The configuration of a segmentation experiment: what `configs/seg/*.yaml` may say.

`ExperimentConfig` (engine) brings the sections that both trainers share; here are those of segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from engine.config import (
    Count,
    ExperimentConfig,
    Fraction,
    HomePath,
    HomeText,
    NotNegative,
    Positive,
    Section,
    from_dict,
    load,
)
from engine.errors import UserError
from engine.images import SUFFIXES

Side = Annotated[int, Field(ge=16)]


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"found {list(pair)}, expected the smaller factor first")
    return pair


def _joined(splits: str) -> str:
    names = splits.split("+")
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"found {splits!r}, expected a split, or different ones with + between them, such as train+val"
        )
    return splits


def _end_of_name(text: str) -> str:
    if "/" in text or Path(f"name{text}").suffix.lower() in SUFFIXES:
        raise ValueError(
            f"found {text!r}, expected what names end in before the extension, such as _mask (not _mask.png)"
        )
    return text


NameEnd = Annotated[str, AfterValidator(_end_of_name)]
"""The end of a file's name before its extension."""
OF_FOLDER = ("images", "masks", "image_suffix", "mask_suffix", "lists", "val_share")
"""Keys of the data section that say where the files of `folder` lie."""


class DataConfig(Section):
    name: Literal["cityscapes", "camvid", "bdd100k", "mapillary", "kitti", "acdc", "voc", "folder"] = "cityscapes"
    """The data set and its label table: see seg/datasets.py for the layout of each; `folder` is your own images, masks
    and labels.yaml."""
    root: HomePath = Path("data/cityscapes")
    """Folder of the data set: for cityscapes the one that holds leftImg8bit/ and gtFine/."""
    labels: HomePath | None = None
    """The table of labels for `folder` (null: labels.yaml in data.root) and `mapillary` (null: its newest config)."""
    images: HomePath = Path("images")
    """Folder of the images of `folder`, in data.root; in it the splits are folders."""
    masks: HomePath = Path("masks")
    """Folder of their masks, in data.root; it may be that of the images if the suffixes tell them apart."""
    image_suffix: NameEnd = ""
    """What the names of images in `folder` end in before the extension and their masks' do not, such as _leftImg8bit;
    files without it are left out."""
    mask_suffix: NameEnd = ""
    """The same for the names of masks, such as _mask or _gtFine_labelIds."""
    lists: HomePath | None = None
    """Folder in data.root with a list of each split of `folder`, train.txt and val.txt: in each line an image's name
    below data.images, without suffix and extension, or the paths of image and mask in data.root. null: the splits are
    folders."""
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images of `folder` that are val, and the rest train, where data.images has no folders train and val:
    those whose name's hash is below it, so about as many. Neighbouring frames of a video in both splits make scores too
    good: list whole drives under `lists` instead. 0: off."""
    train_split: Annotated[str, AfterValidator(_joined)] = "train"
    """Split that is trained on, or several: train+val, as for a submission."""
    val_split: str = "val"
    """Split that is scored during training and by default in tools/evaluate.py."""
    coarse_share: Fraction = 0.0
    """Share of an epoch's images that come from cityscapes' coarsely labelled train_extra; the epoch keeps the number
    of images of train_split."""
    repeat_rare: Fraction = 0.0
    """Repeat images with classes that fewer than this share of the images have: those of a class in a share f of them
    come sqrt(repeat_rare / f) times as often (Gupta et al., LVIS, CVPR 2019). The epoch keeps its length. 0: off."""
    rare_crop: Fraction = 0.0
    """Chance that a training crop is laid around a pixel of a class, drawn among the image's by inverse frequency."""
    base_size: Side | None = None
    """Length in pixels to which the shorter side is brought before random scaling; null keeps the image's own size."""
    crop: tuple[Side, Side] = (512, 1024)
    """Height and width of a training crop in pixels; a smaller scaled image is padded (label 255)."""
    scale: Annotated[tuple[Positive, Positive], AfterValidator(_rising)] = (0.5, 2.0)
    """Range of the random scale factor; it is drawn uniformly."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Fraction = 0.0
    """Strength of random brightness, contrast and saturation, and a tenth of it as hue; 0 turns it off."""
    mean: tuple[Fraction, Fraction, Fraction] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels in [0, 1] that is subtracted."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels in [0, 1] that is divided by."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 1
    """Validation images a process handles at once; images of another size than their neighbours go alone, and all do
    where several views are averaged."""
    eval_base_size: Side | None = None
    """Shorter side in pixels at which validation images enter the network; null: their own size. Ground truth is never
    resized: the logits go up to its size."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.labels is not None and self.name not in ("folder", "mapillary"):
            raise ValueError(f"labels has no effect with name: {self.name}, whose table is fixed; set name: folder")
        if self.coarse_share and self.name != "cityscapes":
            raise ValueError(f"coarse_share needs name: cityscapes, which has coarse labels; found {self.name}")
        for key in OF_FOLDER:
            if self.name != "folder" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with name: {self.name}, whose layout is fixed; set name: folder")
        if self.lists is not None and self.val_share:
            raise ValueError("val_share has no effect with lists, which say what is val; remove one of them")
        if self.images == self.masks and self.image_suffix == self.mask_suffix:
            raise ValueError(
                f"images and masks are one folder, {str(self.images)!r}; give image_suffix or mask_suffix, which tell "
                "the files apart"
            )
        return self


class ModelConfig(Section):
    name: str = "deeplabv3_resnet50"
    """Name of the network: fcn_resnet50, fcn_resnet101, deeplabv3_resnet50, deeplabv3_resnet101,
    deeplabv3_mobilenet_v3_large or lraspp_mobilenet_v3_large of torchvision, or smp/ARCHITECTURE/ENCODER, such as
    smp/deeplabv3plus/resnet50, of segmentation-models-pytorch; ENCODER may be 'tu-' and a name of timm's. Or one that
    a module under `imports` has registered by seg.models.register."""
    options: dict[str, Any] = {}
    """Further arguments of the architecture of segmentation-models-pytorch, such as decoder_channels, of timm's
    encoder, such as drop_path_rate, or of a network of your own."""
    weights: HomeText | None = None
    """Start from a whole trained network: null, or a path to a checkpoint of tools/train.py (its average, where one was
    kept) or another file of weights (.pt, .pth, .safetensors) of the same architecture. The last layer starts anew
    where the file has other classes. A checkpoint fits if it was trained with batch norm (norm.calibrate_batches keeps
    its function where layers whiten), or with the norm of this config. backbone_weights is then not loaded."""
    backbone_weights: HomeText | None = None
    """Pretrained backbone: null (random); 'torchvision', 'timm' or 'imagenet' (downloaded by the library that the
    network is from); 'package:efficientnet-lite0' (the extra `pretrained`; its inputs are normalised with data.mean and
    data.std of 0.5); or a path to a file of weights (.pt, .pth, .safetensors)."""
    output_stride: Literal[8, 16, 32] | None = None
    """Pixels of the input for a pixel of the backbone's output, where the network leaves a choice; null: the network's
    own (8 for deeplabv3 and fcn, 16 for smp/deeplabv3plus and smp/pan)."""
    aux: bool = False
    """Add the auxiliary FCN head on the backbone's third stage (training only)."""


class LossConfig(Section):
    name: str = "cross_entropy"
    """Name of the loss: cross_entropy, ohem, focal, boundary, dice or lovasz; seg/loss_terms.py has the formulas."""
    terms: dict[str, Positive] = {}
    """Several losses, added: name -> factor, such as {cross_entropy: 1, dice: 0.5}; empty: `name` alone."""
    class_weights: tuple[NotNegative, ...] | Literal["auto"] | None = None
    """A weight for each class, in the order of the train ids, for the losses that are sums over pixels (not dice and
    lovasz); 'auto': median frequency in the training split (Eigen and Fergus, ICCV 2015); null weighs all alike."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that goes to all classes alike, in cross_entropy and boundary."""
    ohem_threshold: Fraction = 0.7
    """ohem trains on pixels whose label has at most this probability ..."""
    ohem_share: Fraction = 0.0625
    """... and at least on this share of a micro-batch's labelled pixels, the hardest ones."""
    focal_gamma: Annotated[float, Field(ge=1)] = 2.0
    """Exponent of focal: how little easy pixels count."""
    boundary_weight: Positive = 4.0
    """How much more a pixel at the border of two classes counts in boundary than one far from it."""
    boundary_width: Count = 8
    """Pixels from a border within which that falls to nothing."""
    aux_weight: NotNegative = 0.5
    """Factor on the auxiliary head's loss; needs model.aux."""

    @model_validator(mode="after")
    def _one_way(self) -> LossConfig:
        if self.terms and self.name != "cross_entropy":
            raise ValueError(f"name: {self.name} has no effect beside terms; name it there, with its factor")
        return self


class PredictConfig(Section):
    window: tuple[Side, Side] | None = None
    """Height and width of the sliding window in pixels; null: the whole image at once, and windows of 1024x2048 for
    images of more than 8 megapixels."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a window that overlaps its neighbour."""
    smoothing: Annotated[float, Field(gt=0, le=1)] | None = None
    """Videos only: weight of the newest frame in an average of the probabilities over the frames, which makes labels
    flicker less; null: each frame for itself."""


class SegConfig(ExperimentConfig):
    task: Literal["seg"] = "seg"
    """Which trainer the experiment is for: seg or classify."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    predict: PredictConfig = PredictConfig()


def data_config(words: Sequence[str]) -> DataConfig:
    """The data section of the config among `words`, if there is one, with the key=value among them as changes to it.

    Raises:
        UserError: more than one config, or anything wrong in it; see `engine.config.load`.
    """
    configs = [word for word in words if "=" not in word]
    changes = [word for word in words if "=" in word]
    if len(configs) > 1:
        raise UserError(f"{', '.join(configs)}: more than one config; give one, and changes as key=value")
    if configs:
        return load(configs[0], changes, SegConfig).config.data
    blank = {"task": "seg", "length": "1 epochs", "batch_size": 1}
    return from_dict(blank, changes, SegConfig, "command line").config.data

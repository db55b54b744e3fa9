"""The configuration of a classification experiment: what `configs/classify/*.yaml` may say.

`ExperimentConfig` (engine) brings the sections that both trainers share; here are those of classification.
"""

from __future__ import annotations

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
    ReportConfig,
    Section,
)


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"found {list(pair)}, expected the smaller number first")
    return pair


def _grey_or_rgb(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise ValueError(f"found {len(values)} numbers, expected 1 (grey) or 3 (RGB)")
    return values


class DataConfig(Section):
    name: Literal[
        "cifar10", "cifar100", "mnist", "fashion_mnist", "svhn", "stl10", "imagenet16", "imagenet32", "folder"
    ] = "cifar10"
    """Data set. imagenet16 and imagenet32 are the downsampled ImageNet's batches; folder holds a folder of images for
    each class in each split, as ImageNet is usually unpacked."""
    root: HomePath = Path("data")
    """Folder that holds the data set's files; of folder, the one with the splits in it."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "test"
    """Split that is scored during training and by default in tools/evaluate.py."""
    download: bool = True
    """Download what is missing, where torchvision can."""
    check_files: bool = True
    """Compare the files with the checksums of the published ones; false for a copy that was encoded anew."""
    train_limit: Count | None = None
    """Train on so many images only, the first of each class in turn; null: all."""
    size: Annotated[int, Field(ge=2)] | None = None
    """Height and width at which images enter the network. null: those of the data set, 224 for folder."""
    eval_resize: Count | None = None
    """folder: the shorter side before the central crop of `size` in evaluation; null: size / 0.875."""
    crop_padding: Annotated[int, Field(ge=0)] = 4
    """Black pixels around an image before a random crop of its size; not for folder."""
    crop_scale: Annotated[tuple[Positive, Fraction], AfterValidator(_rising)] = (0.08, 1.0)
    """folder: range of the share of the image's area that a random crop takes; it is resized to `size`."""
    flip: Fraction | None = None
    """Probability of a horizontal flip. null: 0.5, and 0 for the digits of mnist and svhn."""
    randaugment: Annotated[int, Field(ge=0)] = 0
    """RandAugment operations for each image; 0 turns it off."""
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of RandAugment."""
    erasing: Fraction = 0.0
    """Probability that a random rectangle is erased."""
    mixup: NotNegative = 0.0
    """Alpha of mixup's Beta distribution; 0 turns it off."""
    cutmix: NotNegative = 0.0
    """Alpha of cutmix's Beta distribution; 0 turns it off. With mixup, one of both is drawn for each batch."""
    mean: Annotated[tuple[Fraction, ...], AfterValidator(_grey_or_rgb)] | None = None
    """Mean of the channels in [0, 1] that is subtracted; null: the data set's."""
    std: Annotated[tuple[Positive, ...], AfterValidator(_grey_or_rgb)] | None = None
    """Standard deviation of the channels in [0, 1] that is divided by; null: the data set's."""
    on_error: Literal["stop", "skip"] = "stop"
    """What an unreadable image does: end the run, or be named, counted and left out."""
    eval_batch_size: Count = 256
    """Validation images a process handles at once."""


class ModelConfig(Section):
    name: str = "resnet18"
    """Name of the network, one of classify.models.available(), or torchvision/NAME or timm/NAME."""
    options: dict[str, Any] = {}
    """Arguments of the network besides its classes and channels, such as width: 0.5."""
    weights: HomeText | None = None
    """Weights to start from: null (random), 'pretrained' (torchvision's or timm's, downloaded), or a path to a file. A
    classifier of other classes starts anew. A checkpoint of tools/train.py fits if it was trained with
    batch norm, or with the very `norm` section of this config, but for precise_batches and calibrate_batches."""
    init: Literal["default", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal"] = (
        "default"
    )
    """Initial weights of convolutions and linear layers; default: the network's own."""


class LossConfig(Section):
    name: Literal["ce", "l2"] = "ce"
    """ce: cross entropy; l2: half the squared distance of the outputs from the one-hot class."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes."""


class ClassifyConfig(ExperimentConfig):
    task: Literal["classify"] = "classify"
    """Which trainer the experiment is for: seg or classify."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _no_pictures(self) -> ClassifyConfig:
        if self.report.images not in (0, ReportConfig().images):
            raise ValueError(
                "report.images has no effect with task: classify, whose pictures tools/evaluate.py draws; remove it"
            )
        return self

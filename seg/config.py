"""The configuration of a segmentation experiment: what `configs/seg/*.yaml` may say.

`ExperimentConfig` (engine) brings the sections that both trainers share; here are those of segmentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from engine.config import ExperimentConfig, Fraction, Positive, Section

Side = Annotated[int, Field(ge=16)]


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"found {list(pair)}, expected the smaller factor first")
    return pair


class DataConfig(Section):
    root: Path = Path("data/cityscapes")
    """Folder that holds leftImg8bit/ and gtFine/."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split that is scored during training and by default in tools/evaluate.py."""
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
    """Validation images a process handles at once; images of another size than their neighbours go alone."""
    eval_base_size: Side | None = None
    """Shorter side in pixels at which validation images enter the network; null: their own size. Ground truth is never
    resized: the logits go up to its size."""


class ModelConfig(Section):
    name: str = "deeplabv3_resnet50"
    """Name of the network: fcn_resnet50, fcn_resnet101, deeplabv3_resnet50, deeplabv3_resnet101,
    deeplabv3_mobilenet_v3_large or lraspp_mobilenet_v3_large."""
    backbone_weights: str | None = None
    """Pretrained backbone: null (random), 'torchvision' (downloaded), or a path to a file of weights."""
    output_stride: Literal[8, 16, 32] = 8
    """Pixels of the input for a pixel of the backbone's output."""
    aux: bool = False
    """Add the auxiliary FCN head on the backbone's third stage (training only)."""


class LossConfig(Section):
    name: str = "cross_entropy"
    """Name of the loss: cross_entropy."""
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """A weight for each of the 19 classes, in the order of the train ids; null weighs all pixels alike."""
    aux_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the auxiliary head's loss; used when model.aux is true."""


class PredictConfig(Section):
    window: tuple[Side, Side] | None = None
    """Height and width of the sliding window in pixels; null: the whole image at once, and windows of 1024x2048 for
    images of more than 8 megapixels."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a window that overlaps its neighbour."""


class SegConfig(ExperimentConfig):
    task: Literal["seg"] = "seg"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    predict: PredictConfig = PredictConfig()

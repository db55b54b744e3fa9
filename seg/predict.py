"""From images to train ids with a trained network: tensors and arrays only, no files, no state.

An image that fits goes through the network whole. A larger one goes through in windows that overlap: each pixel is
taken from the window in which it lies farthest from a cut edge, so that no more than one batch of windows is ever in
memory beside the ids, however large the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine import precision
from engine.errors import NotFiniteError, UserError
from engine.images import MAX_PIXELS
from seg import models
from seg.config import SegConfig

Array = NDArray[np.uint8]

WHOLE_LIMIT = 8_000_000
"""Pixels up to which an image goes through whole if no window is set."""
LARGE_WINDOW = (1024, 2048)
"""Height and width of the windows of images beyond that."""
_SMALLEST_SIDE = 32
_STRIP_VALUES = 32_000_000


class _Window(NamedTuple):
    """A part of image `image` that the network sees, and the part of the image that is taken from it."""

    image: int
    seen: tuple[slice, slice]
    kept: tuple[slice, slice]

    @property
    def size(self) -> tuple[int, int]:
        return self.seen[0].stop - self.seen[0].start, self.seen[1].stop - self.seen[1].start


@dataclass(frozen=True)
class Predictor:
    """A network in eval mode with all that turns images into its inputs.

    Images are RGB, uint8 (H, W, 3), of any size from 1 x 1 up.
    """

    model: nn.Module
    """Maps normalised images (N, 3, h, w) to logits (N, C, any, any), or to a dict that holds them as "out"."""
    mean: tuple[float, float, float]
    """Mean of the RGB channels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of the RGB channels in [0, 1]."""
    device: torch.device | str = "cpu"
    """Where the model is and the inputs go."""
    multiple: int = 32
    """Sides of the network's input are padded up to a multiple of it and to 32 pixels (at the right and the bottom,
    cropped again)."""
    base_size: int | None = None
    """Shorter side at which images enter the network; None: their own size. The ids always have the image's size."""
    window: tuple[int, int] | None = None
    """Height and width of the windows; None: whole images up to `WHOLE_LIMIT` pixels, `LARGE_WINDOW` beyond."""
    overlap: float = 0.25
    """Share of a window that it has in common with its neighbour, at least; from 0 to below 1."""
    batch_size: int = 1
    """Windows, or whole images of one size, that go through the network together."""
    amp: torch.dtype | None = None
    """Type for autocast; None computes in full precision."""

    def __post_init__(self) -> None:
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        if not 0 <= self.overlap < 1 or self.batch_size < 1 or self.multiple < 1 or min(self.window or (1,)) < 1:
            raise ValueError("expected 0 <= overlap < 1, and batch_size, multiple and window of at least 1")

    @classmethod
    def from_config(cls, model: nn.Module, cfg: SegConfig, device: torch.device | str = "cpu") -> Predictor:
        """The predictor of an experiment; the model is moved to `device`."""
        amp = precision.dtype_of(cfg.runtime.amp)
        return cls(
            model.to(device),
            cfg.data.mean,
            cfg.data.std,
            device,
            multiple=models.multiple(cfg.model),
            base_size=cfg.data.eval_base_size,
            window=cfg.predict.window,
            overlap=cfg.predict.overlap,
            batch_size=cfg.data.eval_batch_size,
            amp=amp,
        )

    def predict(self, image: Array) -> Array:
        """Train ids, uint8 (H, W). Raises UserError if the network gives NaN or the device's memory does not do."""
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Array]) -> list[Array]:
        """Train ids of each image, which may differ in size; neighbours of one size share a batch."""
        ids = [np.empty(image.shape[:2], np.uint8) for image in images]
        for i, part, logits in self._tiles(images):
            ids[i][part] = _best(logits)
        return ids

    def predict_confident(self, image: Array) -> tuple[Array, Array]:
        """Train ids as `predict` gives them, and their probabilities (softmax) as `in_255ths`, both uint8 (H, W)."""
        ids, confidence = (np.empty(image.shape[:2], np.uint8) for _ in range(2))
        for _, part, logits in self._tiles([image]):
            ids[part] = _best(logits)
            with enough_memory(self.device, "the probabilities of a window; set a smaller predict.window"):
                confidence[part] = in_255ths(logits.softmax(0).amax(0))
        return ids, confidence

    def probabilities(self, image: Array) -> Tensor:
        """Softmax over the classes, float32 (C, H, W) on `device`: 4 C bytes a pixel, whatever the window."""
        return self.probabilities_batch([image])[0]

    def probabilities_batch(self, images: Sequence[Array]) -> list[Tensor]:
        """`probabilities` of each image; neighbours of one size share a batch."""
        inputs = [self._input(image) for image in images]
        wholes: dict[int, Tensor] = {}
        for part, logits in self._windows(inputs):
            _place(wholes, part, logits, inputs[part.image])
        return [_softmax(wholes.pop(i), image.shape[:2]) for i, image in enumerate(images)]

    def _tiles(self, images: Sequence[Array]) -> Iterator[tuple[int, Any, Tensor]]:
        """Of each image, by its number, the parts (an index into it) that it consists of, with their logits, float32
        (C, h, w)."""
        inputs = [self._input(image) for image in images]
        scaled: dict[int, Tensor] = {}
        for part, logits in self._windows(inputs):
            if inputs[part.image].shape == images[part.image].shape:
                yield part.image, part.kept, logits
            else:
                _place(scaled, part, logits, inputs[part.image])
        for i, whole in scaled.items():
            for rows, logits in _enlarged(whole, images[i].shape[:2]):
                yield i, rows, logits

    def _input(self, image: Array) -> Array:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"expected an image uint8 (H, W, 3), got {image.dtype} {image.shape}")
        if self.base_size is None:
            return image
        return scaled(image, self.base_size / min(image.shape[:2]))

    def _windows(self, images: Sequence[Array]) -> Iterator[tuple[_Window, Tensor]]:
        """Each window of each image with the logits of its kept part, float32 (C, h, w)."""
        parts = [part for i, image in enumerate(images) for part in self._split(i, image.shape[0], image.shape[1])]
        for _, group in groupby(parts, key=lambda part: part.size):
            same = list(group)
            for start in range(0, len(same), self.batch_size):
                batch = same[start : start + self.batch_size]
                logits = self._forward(np.stack([images[part.image][part.seen] for part in batch]))
                for part, one in zip(batch, logits, strict=True):
                    rows, columns = (
                        slice(kept.start - seen.start, kept.stop - seen.start)
                        for kept, seen in zip(part.kept, part.seen, strict=True)
                    )
                    yield part, one[:, rows, columns]

    def _split(self, image: int, height: int, width: int) -> Iterator[_Window]:
        window = self.window or ((height, width) if height * width <= WHOLE_LIMIT else LARGE_WINDOW)
        for seen_rows, rows in _cuts(height, window[0], self.overlap):
            for seen_columns, columns in _cuts(width, window[1], self.overlap):
                yield _Window(image, (seen_rows, seen_columns), (rows, columns))

    @torch.no_grad()
    def _forward(self, pixels: Array) -> Tensor:
        """Logits float32 (N, C, H, W) of images uint8 (N, H, W, 3)."""
        device = torch.device(self.device)
        size = f"{pixels.shape[0]} x {pixels.shape[1]} x {pixels.shape[2]} pixels"
        with enough_memory(device, f"{size} at once; set a smaller predict.window"):
            mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))
            inputs = (torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std
            with precision.autocast(device, self.amp):
                logits = logits_of(self.model, inputs, self.multiple)
        if not torch.isfinite(logits.sum()):  # a sum is much faster than a look at each value
            raise NotFiniteError(
                "The network's output is not finite (NaN or infinity) on this image; are its weights sound?"
            )
        return logits


@contextmanager
def enough_memory(device: torch.device | str, what: str) -> Iterator[None]:
    """Where the device's memory does not do, the error is a UserError that says with `what`."""
    try:
        yield
    except RuntimeError as error:
        # a GPU has its own exception for it, a CPU has only the words
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"Out of memory on {device} with {what}.") from error


def scaled(image: Array, factor: float) -> Array:
    """The image uint8 (H, W, 3) at this multiple of its size, at least a pixel, bilinearly.

    Raises:
        UserError: more than 128 megapixels would come out.
    """
    height, width = image.shape[:2]
    size = _times(height, width, factor)
    if size == (height, width):
        return image
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(
            f"An image of {width} x {height} pixels is too long to be brought to a shorter side of {min(size)}."
        )
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def _times(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, round(height * factor)), max(1, round(width * factor))


def at_shorter_side(images: Tensor, base_size: int) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] as a `Predictor` of this `base_size` has them enter the network: scaled bilinearly,
    their values rounded to 255ths, as whitening weighs so little a difference too."""
    height, width = images.shape[-2:]
    size = _times(height, width, base_size / min(height, width))
    return images if size == (height, width) else (_resized(images, size) * 255 + 0.5).floor() / 255


def logits_of(model: nn.Module, images: Tensor, multiple: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """Logits float32 (N, C, H, W) of normalised images (N, 3, h, w), at `size` (default: h, w).

    Sides are padded up to a multiple and to 32 pixels by reflection at the right and the bottom; the network's output
    is enlarged bilinearly (align_corners=False) to the padded input, cropped, and brought to `size` if that is another.
    """
    height, width = images.shape[-2:]
    rows, columns = (
        _reflected(side, math.ceil(max(side, _SMALLEST_SIDE) / multiple) * multiple, images.device)
        for side in (height, width)
    )
    padded = images if len(rows) == height and len(columns) == width else images[..., rows, :][..., columns]
    output: Tensor | Mapping[str, Any] = model(padded)
    logits: Tensor = (output if isinstance(output, Tensor) else output["out"]).float()
    logits = _resized(logits, (len(rows), len(columns)))[..., :height, :width]
    return logits if size is None else _resized(logits, size)


def in_255ths(probabilities: Tensor) -> Array:
    """Probabilities (H, W) as round(255 p), uint8."""
    return (255 * probabilities).round().to(torch.uint8).cpu().numpy()


def _best(logits: Tensor) -> Array:
    """The class of each pixel, uint8 (H, W), of logits (C, H, W); `max` is a multiple faster than `argmax` on a CPU."""
    return logits.max(0).indices.to(torch.uint8).cpu().numpy()


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _reflected(length: int, wanted: int, device: torch.device) -> Tensor:
    """Indices 0 .. length - 1 continued by reflection, back and forth if need be; of one pixel there is only itself."""
    period = max(1, 2 * length - 2)
    places = torch.arange(wanted, device=device) % period
    return torch.where(places < length, places, period - places)


def _cuts(length: int, window: int, overlap: float) -> list[tuple[slice, slice]]:
    """Windows along one side: what each sees and what is kept of it. The kept parts tile the side."""
    if window >= length:
        return [(slice(0, length), slice(0, length))]
    count = math.ceil((length - window) / max(1, math.floor(window * (1 - overlap)))) + 1
    starts = [round(i * (length - window) / (count - 1)) for i in range(count)]
    middles = [(left + window + right) // 2 for left, right in zip(starts, starts[1:], strict=False)]
    edges = [0, *middles, length]
    return [(slice(start, start + window), slice(a, b)) for start, a, b in zip(starts, edges, edges[1:], strict=False)]


def _place(wholes: dict[int, Tensor], part: _Window, logits: Tensor, image: Array) -> None:
    """Writes a window's logits into those of the whole image, float32 (C, H, W)."""
    if part.image not in wholes:
        wholes[part.image] = logits.new_empty(logits.shape[0], *image.shape[:2])
    rows, columns = part.kept
    wholes[part.image][:, rows, columns] = logits


def _softmax(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Probabilities at `size` of logits (C, h, w), which they replace where that is their size; strip by strip, so that
    no further copy of all exists."""
    result = logits if logits.shape[1:] == size else logits.new_empty(logits.shape[0], *size)
    for rows, strip in _enlarged(logits, size):
        result[:, rows] = strip.softmax(0)
    return result


def _enlarged(logits: Tensor, size: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Logits (C, h, w) bilinearly at `size`, in strips of rows so that a large image's logits never exist as a whole.

    Equal to `F.interpolate(..., mode="bilinear", align_corners=False)` within rounding.
    """
    channels, rows, _ = logits.shape
    height, width = size
    step = max(1, _STRIP_VALUES // (channels * width))
    for start in range(0, height, step):
        strip = slice(start, min(start + step, height))
        places = (torch.arange(strip.start, strip.stop, device=logits.device) + 0.5) * (rows / height) - 0.5
        places = places.clamp(0, rows - 1)
        above = places.floor().long()
        share = (places - above)[:, None]
        lines = torch.lerp(logits[:, above], logits[:, (above + 1).clamp(max=rows - 1)], share)
        yield strip, _resized(lines[None], (lines.shape[1], width))[0]

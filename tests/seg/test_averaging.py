"""Averages over views against a slow reference, and what must not change them."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import UserError
from seg.averaging import Averaged, Views, predictor_of, starts_of
from seg.config import SegConfig
from seg.predict import Predictor

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class Net(nn.Module):
    """A small network that looks around itself and is not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 7, padding=3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": 10 * self.conv(images)}


def predictor(**options: object) -> Predictor:
    return Predictor(Net().eval(), MEAN, STD, multiple=1, **options)  # type: ignore[arg-type]


@pytest.fixture
def image() -> np.ndarray:
    rng = np.random.default_rng(0)
    return cv2.GaussianBlur(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8), (0, 0), 2)


def plain(image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
        return Net().eval()(pixels)["out"].double().softmax(1)[0].numpy()


def blended(image: np.ndarray, window: tuple[int, int], overlap: float) -> np.ndarray:
    """Pixel by pixel: the mean over the windows that hold it, weighted by the distance to their edges."""
    height, width = image.shape[:2]
    total, weights = np.zeros((5, height, width)), np.zeros((height, width))
    places = itertools.product(starts_of(height, window[0], overlap), starts_of(width, window[1], overlap))
    for top, left in places:
        crop = image[top : top + window[0], left : left + window[1]]
        found = plain(crop)
        for y, x in np.ndindex(*crop.shape[:2]):
            weight = min(y + 1, crop.shape[0] - y) * min(x + 1, crop.shape[1] - x)
            total[:, top + y, left + x] += weight * found[:, y, x]
            weights[top + y, left + x] += weight
    return total / weights


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.0, 1.5)])
def test_all_combinations_equal_the_reference(
    image: np.ndarray, scales: tuple[float, ...], flip: bool, sliding: bool
) -> None:
    window = (40, 48)
    average = Averaged(predictor(overlap=0.3), Views(scales, flip, sliding), window)
    found = average.probabilities(image)
    views = []
    for scale in scales:
        size = (round(80 * scale), round(60 * scale))
        pixels = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR) if scale != 1 else image
        for mirrored in [False, True][: 1 + flip]:
            seen = pixels[:, ::-1] if mirrored else pixels
            one = blended(seen, window, 0.3) if sliding else plain(seen)
            one = torch.from_numpy((one[..., ::-1] if mirrored else one).copy())
            views.append(F.interpolate(one[None], (60, 80), mode="bilinear", align_corners=False)[0].numpy())
    expected = np.mean(views, axis=0)
    assert found.dtype == torch.float32 and found.shape == (5, 60, 80)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(found.sum(0).numpy(), 1, atol=1e-5)
    assert np.array_equal(average.predict(image), found.argmax(0).numpy())
    assert np.array_equal(average.predict_batch([image, image])[1], average.predict(image))
    assert torch.equal(average.probabilities_batch([image[:30], image])[1], found)


def test_a_mirrored_average_commutes_with_mirroring(image: np.ndarray) -> None:
    average = Averaged(predictor(), Views((1.0,), flip=True))
    mirrored = average.probabilities(np.ascontiguousarray(image[:, ::-1])).flip(-1)
    torch.testing.assert_close(mirrored, average.probabilities(image))


def test_windows_over_the_whole_side_change_nothing(image: np.ndarray) -> None:
    average = Averaged(predictor(), Views(sliding_window=True), (100, 100))
    torch.testing.assert_close(average.probabilities(image), predictor().probabilities(image))


def test_base_size_is_the_size_that_is_scaled(image: np.ndarray) -> None:
    found = Averaged(predictor(base_size=30), Views((2.0,))).probabilities(image)
    torch.testing.assert_close(found, predictor().probabilities(image))


def test_an_image_that_becomes_too_large_is_refused_as_without_views() -> None:
    with pytest.raises(UserError, match="An image of 300000 x 1 pixels is too long to be brought to .* of 1024"):
        Averaged(predictor(base_size=512), Views((2.0,))).predict(np.zeros((1, 300000, 3), np.uint8))


def test_out_of_memory_says_what_needs_it(image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(Predictor, "probabilities", full)
    with pytest.raises(UserError, match="Out of memory on cpu with the views of 80 x 60 pixels; average over fewer"):
        Averaged(predictor(), Views(flip=True)).predict(image)


def test_the_config_chooses() -> None:
    cfg = SegConfig.model_validate({"length": "1 epochs", "batch_size": 1, "data": {"crop": (32, 64)}})
    assert isinstance(predictor_of(Net().eval(), cfg, "cpu"), Predictor)
    assert isinstance(predictor_of(Net().eval(), cfg, "cpu", Views()), Predictor)
    found = predictor_of(Net().eval(), cfg, "cpu", Views(sliding_window=True))
    assert isinstance(found, Averaged) and found.window == (32, 64)


@pytest.mark.parametrize(
    "scales, text", [((0.0, 1.0), "found 0, expected"), ((9.0,), "found 9,"), ((), "none given"), ((1.0, 1.0), "twice")]
)
def test_scales_that_make_no_sense(scales: tuple[float, ...], text: str) -> None:
    with pytest.raises(UserError, match=f"--scales: .*{text}"):
        Views(scales)


def test_views_in_words() -> None:
    assert str(Views()) == "one view"
    assert str(Views((0.75, 1.0), True, True)) == "scale 0.75, 1; mirrored; blended sliding window"

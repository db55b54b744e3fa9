"""Calibration against the formulas in float64, and temperatures that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import UserError
from seg import calibration
from seg.calibration import (
    MOST_VALUES,
    SAMPLED,
    Calibrator,
    Reliability,
    draw_reliability,
    fit_temperature,
    halves,
    pixels_of,
)


def drawn(temperature: float, seed: int, shape: tuple[int, int] = (60, 80)) -> tuple[Tensor, np.ndarray]:
    """Logits whose true classes were drawn from softmax(logits / temperature), a tenth of them void."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, *shape, generator=generator)
    chances = (logits / temperature).softmax(0).flatten(1).T
    truth = torch.multinomial(chances, 1, generator=generator).view(shape).byte().numpy()
    truth[: shape[0] // 10] = 255
    return logits, truth


def reference_ece(probabilities: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """From the formula, pixel by pixel sorted into (a, b] bins, float64."""
    sure, right = probabilities.max(0), probabilities.argmax(0) == truth
    total = 0.0
    for i in range(bins):
        inside = (sure > i / bins) & (sure <= (i + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    return total


def test_streamed_ece_is_that_of_the_formula() -> None:
    one, values, truths = Reliability(), [], []
    for seed in range(3):
        logits, truth = drawn(1.7, seed)
        valid = torch.from_numpy(truth.ravel() != 255)
        part = logits.flatten(1)[:, valid].double().log_softmax(0)
        true = torch.from_numpy(truth.ravel())[valid].long()
        one.update(part, true)
        values.append(part.exp().numpy())
        truths.append(true.numpy())
    probabilities, truth = np.concatenate(values, 1), np.concatenate(truths)
    assert one.pixels == truth.size == 3 * 54 * 80
    assert one.ece() == pytest.approx(reference_ece(probabilities, truth), abs=1e-12) and one.ece() > 0.05
    nll = -np.log(probabilities[truth, np.arange(truth.size)]).mean()
    stored = one.to_json()
    assert stored["nll"] == pytest.approx(nll, abs=1e-9)
    assert stored["accuracy"] == pytest.approx((probabilities.argmax(0) == truth).mean())
    assert sum(stored["bins"]["pixels"]) == truth.size and stored["bins"]["accuracy"][0] is None


def test_certain_pixels_lie_in_the_last_bin_and_edges_in_the_lower_one() -> None:
    one = Reliability(bins=4)
    one.update(torch.tensor([[1.0, 0.5], [0.0, 0.5]]).log(), torch.tensor([0, 0]))
    assert one.counts[0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_fit_finds_the_temperature_that_the_truth_was_drawn_with(temperature: float) -> None:
    logits, truth = drawn(temperature, 0, (200, 200))
    valid = torch.from_numpy(truth.ravel() != 255)
    values, true = logits.flatten(1)[:, valid], torch.from_numpy(truth.ravel())[valid].long()
    found = fit_temperature(values, true)
    assert found == pytest.approx(temperature, rel=0.05)
    # probabilities do as well as logits, which they are up to a constant
    assert fit_temperature(values.log_softmax(0), true) == pytest.approx(found, rel=1e-3)

    def nll(t: float) -> float:
        return float(torch.nn.functional.cross_entropy((values / t).T.double(), true))

    assert nll(found) <= min(nll(found * 1.02), nll(found / 1.02))


def test_many_classes_and_images_take_fewer_pixels_of_each() -> None:
    assert pixels_of(250, 19) == SAMPLED  # Cityscapes
    assert pixels_of(1000, 124) == 403 and MOST_VALUES < 1000 * 124 * 404  # Mapillary Vistas
    assert pixels_of(10**9, 254) == 1


def test_fitted_on_one_half_and_reported_on_the_other() -> None:
    calibrator, images = Calibrator(sampled=1000), [drawn(2.5, seed) for seed in range(5)]
    first, second = halves(5)
    for i in first:
        calibrator.fit_on(*images[i], i)
    for i in second:
        calibrator.report_on(*images[i])
    found = calibrator.result()
    assert found.temperature == pytest.approx(2.5, rel=0.1)
    assert (found.fitted_on, found.fitted_pixels, found.reported_on) == (3, 3000, 2)
    assert found.after.ece() < 0.03 < 0.15 < found.before.ece()
    assert found.before.pixels == found.after.pixels == 2 * 54 * 80
    expected = np.concatenate([images[i][0].double().softmax(0).numpy()[:, 6:].reshape(5, -1) for i in second], 1)
    truth = np.concatenate([images[i][1][6:].ravel() for i in second])
    assert found.before.ece() == pytest.approx(reference_ece(expected, truth), abs=1e-6)
    again = Calibrator(sampled=1000)
    for i in first:
        again.fit_on(*images[i], i)
    again.report_on(*images[1])
    assert again.temperature == found.temperature
    assert "3 images with even numbers, 3000 pixels" in found.to_json()["fitted on"]
    assert found.to_json()["temperature at an end of its range"] is False


def test_an_image_counted_in_parts_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for values in (2**24, 1000):  # 5 classes: the image whole, or 200 pixels at a time, some of them all void
        monkeypatch.setattr(calibration, "_PART", values)
        calibrator = Calibrator()
        calibrator.fit_on(*drawn(2.5, 0), 0)
        calibrator.report_on(*drawn(2.5, 1))
        found.append(calibrator.result())
    for whole, parts in ((found[0].before, found[1].before), (found[0].after, found[1].after)):
        np.testing.assert_allclose(parts.counts, whole.counts, rtol=1e-8)
        assert parts.nll == pytest.approx(whole.nll, rel=1e-9)


def test_a_network_that_no_temperature_calibrates_is_called_that() -> None:
    """Sure of the wrong class everywhere: the flatter, the better."""
    truth = np.zeros((8, 8), np.uint8)
    logits = torch.zeros(3, 8, 8)
    logits[1] = 50
    calibrator = Calibrator()
    calibrator.fit_on(logits, truth, 0)
    calibrator.report_on(logits, truth)
    found = calibrator.result()
    assert found.at_an_end and found.temperature == pytest.approx(20, rel=1e-3)


def test_too_little_to_fit_is_an_error() -> None:
    logits, truth = drawn(1, 0)
    calibrator = Calibrator()
    calibrator.fit_on(logits, truth, 0)
    with pytest.raises(UserError, match=r"calibration: 1 image\(s\); at least 2 are needed"):
        calibrator.result()
    calibrator = Calibrator()
    calibrator.fit_on(logits, np.full_like(truth, 255), 0)
    with pytest.raises(UserError, match="have no valid pixel"):
        calibrator.report_on(logits, truth)
    assert math.isnan(Reliability().ece()) and Reliability().to_json()["ece"] is None


def test_the_diagram_shows_each_bin() -> None:
    from matplotlib.figure import Figure

    one = Reliability(bins=5)
    logits, truth = drawn(2, 0)
    one.update(logits[:, 10:].flatten(1).log_softmax(0), torch.from_numpy(truth[10:].ravel()).long())
    axes = Figure().add_subplot()
    draw_reliability(axes, one, "before")
    heights = [patch.get_height() for patch in axes.patches[:5]]
    pixels, _, correct = one.counts
    assert heights == pytest.approx(np.divide(correct, pixels, out=np.zeros(5), where=pixels > 0).tolist())
    assert axes.get_title() == f"before, ECE {100 * one.ece():.2f}%"

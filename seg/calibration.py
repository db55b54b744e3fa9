"""Calibration: whether a network that says 90% is right in 90% of the pixels.

The expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599) is

    ECE = sum over bins of  n_bin / n * |accuracy_bin - mean confidence_bin|

over the confidences (largest probabilities) of all valid pixels, in 15 bins of equal width. Temperature scaling divides
the logits by one number T, fitted to the smallest negative log-likelihood (NLL). It is fitted on the images with even
numbers and everything is reported on those with odd numbers: a temperature is no better than on images that it has not
seen. Only histograms are kept, and of each image of the first half at most `SAMPLED` pixels for the fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import UserError
from seg.html import counted
from seg.labels import IGNORE

Ids = NDArray[np.uint8]
Floats = NDArray[np.float64]

BINS = 15
SAMPLED = 4000
"""Pixels of an image, drawn evenly with a fixed seed, that the temperature is fitted to."""
MOST_VALUES = 50_000_000
"""Numbers, one for each class, of the pixels of all images together, which are kept in memory."""
_PART = 2**24
"""Numbers of an image that are counted at a time."""
_RANGE = (0.05, 20.0)
"""Temperatures that are tried."""


@dataclass
class Reliability:
    """Histograms of confidence and correctness over all valid pixels."""

    bins: int = BINS
    counts: Floats = field(init=False)
    """(3, bins): pixels, sum of their confidences, correct ones among them."""
    nll: float = 0.0
    """Sum of -log(probability of the true class)."""

    def __post_init__(self) -> None:
        self.counts = np.zeros((3, self.bins))

    def update(self, log_probabilities: Tensor, truth: Tensor) -> None:
        """Add pixels: logarithms of probabilities, float (C, N), and true classes, int64 (N,), none of them void."""
        if truth.numel() == 0:
            return
        confidence, found = log_probabilities.max(0)
        confidence = confidence.double().exp().clamp(0, 1)
        place = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1  # bins are (a, b], as in the paper
        weights = (torch.ones_like(confidence), confidence, (found == truth).double())
        rows = [torch.bincount(place, weight, minlength=self.bins) for weight in weights]
        self.counts += torch.stack(rows).cpu().numpy()
        self.nll -= float(log_probabilities.gather(0, truth[None]).double().sum())

    @property
    def pixels(self) -> int:
        return int(self.counts[0].sum())

    def ece(self) -> float:
        """Expected calibration error in [0, 1]; nan without pixels."""
        pixels = self.counts[0].sum()
        return float(np.abs(self.counts[2] - self.counts[1]).sum() / pixels) if pixels else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values; null where there are no pixels."""
        pixels, confidence, correct = self.counts
        total = self.pixels

        def shares(part: Floats) -> list[float | None]:
            return [float(p / n) if n else None for p, n in zip(part, pixels, strict=True)]

        return {
            "ece": self.ece() if total else None,
            "nll": self.nll / total if total else None,
            "accuracy": float(correct.sum() / total) if total else None,
            "confidence": float(confidence.sum() / total) if total else None,
            "pixels": total,
            "bins": {
                "pixels": [int(n) for n in pixels],
                "confidence": shares(confidence),
                "accuracy": shares(correct),
            },
        }


@dataclass(frozen=True)
class Calibration:
    """What was found; `before` and `after` are over the valid pixels of the second half of the images."""

    temperature: float
    before: Reliability
    after: Reliability
    fitted_on: int
    """Images that the temperature was fitted to."""
    fitted_pixels: int
    reported_on: int
    """Images that the errors are of."""

    @property
    def at_an_end(self) -> bool:
        """Whether the best temperature lies at an end of the range that was searched, or beyond it."""
        return any(abs(math.log(self.temperature / end)) < 1e-3 for end in _RANGE)

    def to_json(self) -> dict[str, Any]:
        fitted, reported = counted(self.fitted_on, "image"), counted(self.reported_on, "image")
        return {
            "temperature": self.temperature,
            "temperature at an end of its range": self.at_an_end,
            "fitted on": f"{fitted} with even numbers, {self.fitted_pixels} pixels drawn evenly",
            "reported on": f"{reported} with odd numbers, all valid pixels",
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }


def pixels_of(images: int, classes: int) -> int:
    """How many pixels of each image the temperature is fitted to: SAMPLED, or fewer where those of all together would
    be more than MOST_VALUES numbers."""
    return max(1, min(SAMPLED, MOST_VALUES // (images * classes)))


class Calibrator:
    """Takes the images in two rounds: first all those with even numbers (`fit_on`), then the others (`report_on`).

    A fit is a function of the images, their numbers and `seed` alone.
    """

    def __init__(self, bins: int = BINS, sampled: int = SAMPLED, seed: int = 0) -> None:
        self.before, self.after = Reliability(bins), Reliability(bins)
        self.sampled, self.seed = sampled, seed
        self.temperature: float | None = None
        self._log_probabilities: list[Tensor] = []
        self._truths: list[Tensor] = []
        self._images = [0, 0]

    def fit_on(self, log_probabilities: Tensor, truth: Ids, number: int) -> None:
        """Draw pixels of an image of the first half.

        Args:
            log_probabilities: float (C, H, W), on any device.
            truth: train ids, uint8 (H, W), 255 where void.
            number: of the image; fixes the pixels that are drawn.
        """
        if self.temperature is not None:
            raise ValueError("the temperature is fitted already")
        valid = np.flatnonzero(truth.ravel() != IGNORE)
        if len(valid) > self.sampled:
            valid = np.random.default_rng([self.seed, number]).choice(valid, self.sampled, replace=False)
        chosen = torch.from_numpy(np.sort(valid)).to(log_probabilities.device)
        self._log_probabilities.append(log_probabilities.flatten(1)[:, chosen].cpu())
        self._truths.append(torch.from_numpy(truth.ravel())[chosen.cpu()].long())
        self._images[0] += 1

    def report_on(self, log_probabilities: Tensor, truth: Ids) -> None:
        """Count all valid pixels of an image of the second half, without and with the temperature."""
        self._images[1] += 1
        if (truth == IGNORE).all():
            return  # and no reason to fit: of a split of such images alone the scores say what is wrong
        if self.temperature is None:
            self.temperature = self._fit()
        values = log_probabilities.flatten(1)
        pixels = max(1, _PART // len(values))  # a large image's numbers exist once
        for part, true in zip(values.split(pixels, 1), torch.from_numpy(truth.ravel()).split(pixels), strict=True):
            true = true.to(part.device)
            valid = true != IGNORE
            part, true = part[:, valid], true[valid].long()
            self.before.update(part.log_softmax(0), true)
            self.after.update((part / self.temperature).log_softmax(0), true)

    def result(self) -> Calibration:
        """Raises UserError with fewer than two images, or without a valid pixel to fit the temperature to."""
        if min(self._images) == 0:
            raise UserError(
                f"calibration: {sum(self._images)} image(s); at least 2 are needed, one to fit the temperature to and "
                "one to report it on."
            )
        if self.temperature is None:
            self.temperature = self._fit()
        pixels = sum(len(truth) for truth in self._truths)
        return Calibration(self.temperature, self.before, self.after, self._images[0], pixels, self._images[1])

    def _fit(self) -> float:
        if not sum(len(truth) for truth in self._truths):
            raise UserError(
                "calibration: the images with even numbers have no valid pixel (all of them are void), so no "
                "temperature can be fitted; check the labels with tools/inspect.py."
            )
        return fit_temperature(torch.cat(self._log_probabilities, 1), torch.cat(self._truths))


def fit_temperature(logits: Tensor, truth: Tensor) -> float:
    """The T with the smallest NLL of softmax(logits / T), between 0.05 and 20.

    Args:
        logits: float (C, N), or logarithms of probabilities.
        truth: int64 (N,).
    """
    from scipy.optimize import minimize_scalar

    values = logits.double()
    right = values.gather(0, truth[None])[0].mean()

    def nll(log_beta: float) -> float:
        # convex in 1 / T: log(sum(exp(logits / T))) - logits of the true class / T
        beta = math.exp(log_beta)
        return float(torch.logsumexp(values * beta, 0).mean() - right * beta)

    low, high = (-math.log(t) for t in reversed(_RANGE))
    found = minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return math.exp(-float(found.x))


def draw_reliability(axes: Any, one: Reliability, title: str) -> None:
    """A reliability diagram on matplotlib axes: accuracy by confidence, and the share of pixels in each bin."""
    pixels, confidence, correct = one.counts
    width = 1 / one.bins
    middles = (np.arange(one.bins) + 0.5) * width
    share = pixels / max(1, pixels.sum())
    accuracy = np.divide(correct, pixels, out=np.zeros(one.bins), where=pixels > 0)
    sure = np.divide(confidence, pixels, out=middles.copy(), where=pixels > 0)
    axes.bar(middles, accuracy, width * 0.92, color="#1f77b4", label="accuracy")
    gaps = np.where(pixels > 0, sure - accuracy, 0)
    axes.bar(
        middles,
        gaps,
        width * 0.92,
        accuracy,
        color="none",
        edgecolor="#d95f02",
        hatch="////",
        label="gap to confidence",
    )
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle="--")
    axes.step(np.linspace(0, 1, one.bins + 1), [*share, share[-1]], where="post", color="0.2", linewidth=1)
    axes.plot([], [], color="0.2", linewidth=1, label="share of pixels")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=f"{title}, ECE {100 * one.ece():.2f}%")
    axes.legend(fontsize=7, loc="upper left")


def halves(count: int) -> tuple[Sequence[int], Sequence[int]]:
    """Numbers of the images that the temperature is fitted to, and of those that it is reported on."""
    return range(0, count, 2), range(1, count, 2)

"""Each loss against its formula in plain numpy, in float64, pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from seg.config import LossConfig
from seg.loss_terms import KINDS, nearness

CLASSES = 5
WEIGHTS = (0.5, 1.0, 2.0, 0.25, 3.0)
PIXELWISE = ["cross_entropy", "ohem", "focal", "boundary"]


def make(name: str, weights=None, **options):
    return KINDS[name].make(LossConfig(**options), weights)


@pytest.fixture
def scene() -> tuple[Tensor, Tensor]:
    """Logits (2, 5, 6, 7) and labels with void pixels; class 4 does not occur."""
    torch.manual_seed(0)
    target = torch.randint(0, 4, (2, 6, 7))
    target[0, :2] = 255
    target[1, 3, 3:] = 255
    return 2 * torch.randn(2, CLASSES, 6, 7), target


def probabilities(logits: Tensor) -> np.ndarray:
    raw = logits.double().numpy()
    return np.exp(raw) / np.exp(raw).sum(1, keepdims=True)


def labelled(target: Tensor) -> list[tuple[int, int, int, int]]:
    """(n, y, x, label) of each pixel that counts."""
    return [(*place, label) for place, label in np.ndenumerate(target.numpy()) if label != 255]  # type: ignore[misc]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_with_label_smoothing(scene, weights):
    logits, target = scene
    total, weight = make("cross_entropy", weights, label_smoothing=0.1)(logits, target)
    w, p = weights or [1.0] * CLASSES, probabilities(logits)
    want = 0.0
    for n, y, x, label in labelled(target):
        want -= 0.9 * w[label] * math.log(p[n, label, y, x])
        want -= sum(0.1 / CLASSES * w[c] * math.log(p[n, c, y, x]) for c in range(CLASSES))
    assert total.item() == pytest.approx(want, rel=1e-5)
    assert weight.item() == pytest.approx(sum(w[label] for *_, label in labelled(target)))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("threshold, share", [(0.3, 0.0), (0.0, 0.25), (0.2, 0.5), (1.0, 0.1)])
def test_ohem_keeps_the_hard_pixels(scene, weights, threshold, share):
    logits, target = scene
    total, weight = make("ohem", weights, ohem_threshold=threshold, ohem_share=share)(logits, target)
    w, p = weights or [1.0] * CLASSES, probabilities(logits)
    pixels = sorted((p[n, label, y, x], label) for n, y, x, label in labelled(target))
    least = max(1, math.ceil(share * len(pixels)))
    kept = [one for i, one in enumerate(pixels) if i < least or one[0] <= threshold]
    assert 0 < len(kept) <= len(pixels)
    assert total.item() == pytest.approx(-sum(w[label] * math.log(q) for q, label in kept), rel=1e-5)
    assert weight.item() == pytest.approx(sum(w[label] for _, label in kept))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
def test_focal(scene, weights, gamma):
    logits, target = scene
    total, weight = make("focal", weights, focal_gamma=gamma)(logits, target)
    w, p = weights or [1.0] * CLASSES, probabilities(logits)
    own = [(p[n, label, y, x], w[label]) for n, y, x, label in labelled(target)]
    assert total.item() == pytest.approx(-sum(v * (1 - q) ** gamma * math.log(q) for q, v in own), rel=1e-5)
    assert weight.item() == pytest.approx(sum(v for _, v in own))


def test_focal_of_a_certain_pixel_has_a_finite_gradient():
    logits = torch.zeros(1, CLASSES, 1, 1)
    logits[:, 0] = 200
    logits.requires_grad_()
    make("focal", focal_gamma=1.0)(logits, torch.zeros(1, 1, 1, dtype=torch.long))[0].backward()
    assert logits.grad.isfinite().all()


def distance_to_a_border(target: Tensor, n: int, y: int, x: int) -> float:
    labels = target.numpy()
    height, width = labels.shape[1:]
    best = math.inf
    for i in range(height):
        for j in range(width):
            around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
            inside = [labels[n, a, b] for a, b in around if 0 <= a < height and 0 <= b < width]
            if labels[n, i, j] != 255 and any(one not in (255, labels[n, i, j]) for one in inside):
                best = min(best, max(abs(i - y), abs(j - x)))
    return best


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_boundary_counts_pixels_by_their_distance_to_a_border(weights, smoothing):
    torch.manual_seed(1)
    logits, target = torch.randn(2, CLASSES, 9, 10), torch.full((2, 9, 10), 2)
    target[0, :, 7:] = 1
    target[0, 8] = 255  # void makes no border
    target[1, :, 4] = 255
    options = {"boundary_weight": 3.0, "boundary_width": 4, "label_smoothing": smoothing}
    total, weight = make("boundary", weights, **options)(logits, target)
    w, p = weights or [1.0] * CLASSES, probabilities(logits)
    near = {
        (n, y, x, label): 1 + 3 * max(0.0, 1 - distance_to_a_border(target, n, y, x) / 4)
        for n, y, x, label in labelled(target)
    }
    assert len({w[label] * factor for (*_, label), factor in near.items()}) > 4

    def loss(n: int, y: int, x: int, label: int) -> float:  # smoothing as in torch: each class by its own weight
        all_classes = sum(w[c] * math.log(p[n, c, y, x]) for c in range(CLASSES)) / CLASSES
        return -(1 - smoothing) * w[label] * math.log(p[n, label, y, x]) - smoothing * all_classes

    assert total.item() == pytest.approx(sum(factor * loss(*place) for place, factor in near.items()), rel=1e-5)
    assert weight.item() == pytest.approx(sum(factor * w[label] for (*_, label), factor in near.items()))
    assert nearness(target, 4)[1].max() == 0


def test_dice(scene):
    logits, target = scene
    total, weight = make("dice")(logits, target)
    p, pixels = probabilities(logits), labelled(target)
    losses = []
    for c in range(CLASSES):
        both = sum(p[n, c, y, x] for n, y, x, label in pixels if label == c)
        sizes = sum(p[n, c, y, x] for n, y, x, _ in pixels) + sum(label == c for *_, label in pixels)
        losses.append(1 - 2 * both / sizes if any(label == c for *_, label in pixels) else 0.0)
    assert weight.item() == len(pixels)
    assert total.item() / len(pixels) == pytest.approx(np.mean(losses), rel=1e-4)


def test_lovasz(scene):
    """By the definition: the Lovasz extension of the Jaccard loss over the sorted errors."""
    logits, target = scene
    total, weight = make("lovasz")(logits, target)
    p, pixels = probabilities(logits), labelled(target)
    losses = []
    for c in range(4):
        own = [(abs((label == c) - p[n, c, y, x]), label == c) for n, y, x, label in pixels]
        own.sort(key=lambda one: -one[0])
        size, before, value = sum(is_c for _, is_c in own), 0.0, 0.0
        for i in range(len(own)):
            missed = sum(is_c for _, is_c in own[: i + 1])
            jaccard = 1 - (size - missed) / (size + (i + 1 - missed))
            value, before = value + own[i][0] * (jaccard - before), jaccard
        losses.append(value)
    assert weight.item() == len(pixels)
    assert total.item() / len(pixels) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_void_pixels_have_no_say(scene, name):
    """Other logits in void pixels change nothing, and get no gradient."""
    logits, target = scene
    other = logits + 50 * torch.randn_like(logits) * (target == 255)[:, None]
    for one in (logits, other):
        one.requires_grad_()
    found, changed = (make(name)(one, target) for one in (logits, other))
    torch.testing.assert_close(found, changed)
    found[0].backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert logits.grad.abs().sum(1)[target == 255].max() < 1e-6 * logits.grad.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_void_is_a_finite_zero(name):
    logits = torch.randn(2, CLASSES, 4, 4, requires_grad=True)
    weights = WEIGHTS if name in PIXELWISE else None
    total, weight = make(name, weights)(logits, torch.full((2, 4, 4), 255))
    total.backward()
    assert total.shape == weight.shape == () and total.item() == weight.item() == 0
    assert logits.grad is not None and logits.grad.abs().sum() == 0

"""Sums and weights of the losses against plain loops."""

import pytest
import torch
from torch import nn

from engine.errors import UserError
from seg import losses
from seg.config import LossConfig, SegConfig


class Fixed(nn.Module):
    """A network whose heads' logits are given."""

    def __init__(self, **heads):
        super().__init__()
        self.heads = heads

    def forward(self, images):
        return self.heads


def config(**options) -> SegConfig:
    return SegConfig(length="1 steps", batch_size=1, loss=LossConfig(**options))


def batch(target):
    return {"image": torch.zeros(len(target), 3, 4, 4), "target": target, "name": ["a"]}


def plain(logits, target, weights):
    total = count = 0.0
    for n, y, x in torch.cartesian_prod(*(torch.arange(s) for s in target.shape)).tolist():
        label = int(target[n, y, x])
        if label != 255:
            total -= float(logits[n, :, y, x].log_softmax(0)[label]) * weights[label]
            count += weights[label]
    return total, count


@pytest.mark.parametrize("weights", [None, tuple(0.5 + 0.1 * i for i in range(19))])
def test_cross_entropy_is_a_sum_over_valid_pixels(weights):
    torch.manual_seed(0)
    logits, aux = torch.randn(2, 19, 4, 5), torch.randn(2, 19, 4, 5)
    target = torch.randint(0, 19, (2, 4, 5))
    target[0, :2] = 255
    found = losses.build(config(class_weights=weights, aux_weight=0.4))(Fixed(out=logits, aux=aux), batch(target))
    main, count = plain(logits, target, weights or [1.0] * 19)
    side, _ = plain(aux, target, weights or [1.0] * 19)
    assert found.total.item() == pytest.approx(main + 0.4 * side, rel=1e-5)
    assert found.weight.item() == pytest.approx(count)
    assert {k: v.item() for k, v in found.parts.items()} == pytest.approx({"main": main, "aux": side}, rel=1e-5)


@pytest.mark.parametrize("weights", [None, (1.0,) * 19])
def test_a_crop_without_labels_gives_a_finite_zero(weights):
    logits = torch.randn(1, 19, 4, 4, requires_grad=True)
    found = losses.build(config(class_weights=weights))(Fixed(out=logits), batch(torch.full((1, 4, 4), 255)))
    found.total.backward()
    assert found.total.item() == 0 and found.weight.item() == 0 and logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.full((1, 19, 200, 200), 0.0, dtype=torch.float16)
    found = losses.build(config())(Fixed(out=logits), batch(torch.zeros(1, 200, 200, dtype=torch.long)))
    assert found.total.item() == pytest.approx(40000 * 2.94444, rel=1e-3)  # beyond float16's largest number


def test_errors():
    with pytest.raises(UserError, match="loss.name: unknown loss 'dice'; known: cross_entropy"):
        losses.build(config(name="dice"))
    with pytest.raises(UserError, match="found 2 weights; expected 19, .* in the order road, sidewalk"):
        losses.build(config(class_weights=(1.0, 2.0)))
    with pytest.raises(UserError, match="found 19 weights, all zero"):
        losses.build(config(class_weights=(0.0,) * 19))


def test_batch_norm_over_one_value_is_explained():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    with pytest.raises(
        UserError, match="micro_batch: a batch norm sees one value a channel.*at least 2 images a process"
    ):
        losses.build(config())(pooled.train(), batch(torch.zeros(1, 4, 4, dtype=torch.long)))

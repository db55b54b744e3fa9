import pytest
import torch
from torch import nn
from torch.nn import functional as F

from classify import losses
from classify.config import LossConfig
from classify.losses import build, criterion

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
TARGET = torch.tensor([0, 1])
SHARES = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])


def test_cross_entropy_of_classes_and_of_shares():
    each = criterion(LossConfig())
    log = LOGITS.log_softmax(1)
    torch.testing.assert_close(each(LOGITS, TARGET), -log[[0, 1], [0, 1]])
    torch.testing.assert_close(each(LOGITS, SHARES), -(log * SHARES).sum(1))


def test_l2_is_half_the_squared_distance_from_the_one_hot_class():
    each = criterion(LossConfig(name="l2"))
    torch.testing.assert_close(each(LOGITS, TARGET)[0], torch.tensor((1.0**2 + 1.0**2 + 0.5**2) / 2))
    torch.testing.assert_close(each(LOGITS, SHARES)[1], torch.tensor((0.1**2 + 0.3**2 + 0.2**2) / 2))


@pytest.mark.parametrize("name", ["ce", "l2"])
def test_label_smoothing_spreads_a_share_over_all_classes(name: str):
    smooth = F.one_hot(TARGET, 3) * 0.7 + 0.1
    found = criterion(LossConfig(name=name, label_smoothing=0.3))(LOGITS, TARGET)
    torch.testing.assert_close(found, criterion(LossConfig(name=name))(LOGITS, smooth))


def test_the_loss_sums_and_counts():
    loss = build(LossConfig())(nn.Identity(), {"image": LOGITS, "target": TARGET})
    assert float(loss.weight) == 2 and float(loss.parts["top1"]) == 1
    torch.testing.assert_close(loss.total, criterion(LossConfig())(LOGITS, TARGET).sum())
    mixed = build(LossConfig())(nn.Identity(), {"image": LOGITS, "target": SHARES})
    assert float(mixed.parts["top1"]) == 1


def test_the_loss_is_computed_in_float32():
    loss = build(LossConfig())(nn.Identity(), {"image": LOGITS.bfloat16(), "target": TARGET})
    assert loss.total.dtype is torch.float32


def test_probabilities_are_what_the_loss_trains():
    outputs = torch.tensor([[1.03, -0.07, -0.01], [0.3, 0.0, 0.1], [-0.5, -0.2, -0.9]])
    found = losses.probabilities(outputs, LossConfig(name="l2"))
    torch.testing.assert_close(found[:2], torch.tensor([[1.0, 0, 0], [0.75, 0, 0.25]]))
    assert found[2].argmax() == 1 and found[2].sum() == pytest.approx(1), "none is positive: as good as any"
    torch.testing.assert_close(losses.probabilities(outputs, LossConfig()), outputs.softmax(1))

"""Operations are counted against the sums of the formulas, written out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine import benchmark, flops
from engine.benchmark import Case, Settings, Variant
from engine.config import NormConfig


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 2), (8, 1)])
def test_a_convolution_and_its_gradients(groups, stride):
    """Every output value is a product of k x k x C / groups pairs, forward and in both gradients."""
    x, weight = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(16, 8 // groups, 3, 3, requires_grad=True)
    y = F.conv2d(x, weight, padding=1, stride=stride, groups=groups)
    forward = 2 * y.numel() * 9 * 8 // groups
    assert flops.count(lambda: F.conv2d(x, weight, padding=1, stride=stride, groups=groups).sum().backward()) == (
        3 * forward
    )
    assert flops.count(lambda: y.sum().backward(inputs=[weight])) == forward


def test_a_transposed_convolution():
    x, weight = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(8, 3, 3, 3, requires_grad=True)
    every = 2 * x.numel() * 3 * 9
    assert flops.count(lambda: F.conv_transpose2d(x, weight, stride=2, groups=2).sum().backward()) == 3 * every


def test_products_that_are_added_in_place():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    assert flops.count(lambda: torch.zeros(3, 4, 6).baddbmm_(a, b)) == 2 * 3 * 4 * 5 * 6
    assert flops.count(lambda: torch.zeros(4, 6).addmm_(a[0], b[0])) == 2 * 4 * 5 * 6


def test_a_norm_that_skips_steps_counts_with_its_mean():
    """A step that renews the shape of D takes more; one of four does."""

    def layer() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))

    case = Case("x", layer, (2, 16, 8, 8))
    variant = Variant("fast", NormConfig(name="deconv_fast", stem_freeze=False))
    settings = Settings(rounds=1, evaluation=False)
    work = benchmark._Work(case, variant, settings)
    single = [flops.count(work.step) for _ in range(4)]
    assert single[0] > single[1] == single[2] == single[3]
    assert benchmark._Work(case, variant, settings).flops() == round(sum(single) / 4)

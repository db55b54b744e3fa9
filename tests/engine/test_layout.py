"""Gradients of convolutions in channels_last that torch gets wrong on some CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import norm
from engine.layout import leave_channels_last

SHAPES = [
    (48, 48, 5, 2),
    (48, 24, 3, 2),
    (48, 48, 3, 6),
    (37, 37, 3, 2),
    (64, 8, 3, 2),
    (24, 1, 3, 2),
]  # channels, groups, kernel, dilation


def network(channels: int, groups: int, kernel: int, dilation: int) -> nn.Sequential:
    torch.manual_seed(0)
    around = dilation * (kernel // 2)
    conv = nn.Conv2d(channels, channels, kernel, padding=around, dilation=dilation, groups=groups)
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(channels, 5, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_that_of_float64(shape):
    model = network(*shape).to(memory_format=torch.channels_last)
    conv: Any = model[2]
    assert leave_channels_last(model) == 1
    assert leave_channels_last(model) == 1 and len(conv._forward_hooks) == 1
    seen: dict[str, torch.Tensor] = {}
    conv.register_forward_hook(lambda layer, inputs, y: seen.update(x=inputs[0].detach()))
    conv.register_full_backward_hook(lambda layer, to_inputs, to_y: seen.update(y=to_y[0]))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 23, 30).to(memory_format=torch.channels_last))
    y.double().sin().sum().backward()
    x, to_y = seen["x"].double(), seen["y"].double()
    want = torch.nn.grad.conv2d_weight(x, conv.weight.shape, to_y, 1, conv.padding, conv.dilation, conv.groups)
    assert (conv.weight.grad - want).norm() < 0.01 * want.norm()


NARROW = """
import copy, sys
import torch
from torch import nn
import norm
from engine.layout import leave_channels_last

torch.manual_seed(0)
torch.set_num_threads(1)
layer = {"plain": nn.Conv2d, "whitening": norm.FastDeconv}[sys.argv[1]]
model = nn.Sequential(layer(3, 32, 1, stride=2))
reference = copy.deepcopy(model).double()
model.to(memory_format=torch.channels_last)
leave_channels_last(model)
x = torch.randn(32, 3, 16, 16).to(memory_format=torch.channels_last)
for step in range(10):
    for each in (model, reference):
        each.zero_grad()
        each(x.to(each[0].weight.dtype)).sin().sum().backward()
    found, want = model[0].weight.grad, reference[0].weight.grad
    assert (found - want).norm() < 1e-4 * want.norm()
"""


@pytest.mark.parametrize("kind", ["plain", "whitening"])
def test_no_narrow_convolution_writes_beyond_its_memory(kind):
    """Where a processor has AVX2: torch's own ends the process."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", NARROW, kind], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_rest_of_the_network_stays_in_channels_last():
    model = network(48, 48, 3, 2).to(memory_format=torch.channels_last)
    leave_channels_last(model)
    seen = []
    model[2].register_forward_hook(lambda layer, inputs, y: seen.append((inputs[0].is_contiguous(), y)))
    x = torch.randn(2, 3, 23, 30).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    model(x)
    assert [contiguous for contiguous, _ in seen] == [True, False]  # in float32 nothing is copied
    assert all(y.is_contiguous(memory_format=torch.channels_last) for _, y in seen)


def test_other_convolutions_are_left_alone():
    others = [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(16, 8, 3, dilation=2), nn.ConvTranspose2d(8, 8, 3, dilation=2)]
    model = nn.Sequential(*others, norm.FastDeconv(8, 8, 3, dilation=2))
    assert leave_channels_last(model) == 0
    assert not any(layer._forward_pre_hooks for layer in model)

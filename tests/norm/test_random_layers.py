"""Layers with options drawn at random against the formulas, in float64: patches picked by index, no library unfolds."""

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import norm
from norm import FastDeconv
from norm.strides import dense_strides, thin_out
from tests.norm.reference import inverse_root

D64 = torch.float64
Statistics = tuple[Tensor, Tensor]


def draw(chance: random.Random) -> tuple[dict[str, Any], tuple[int, int, int, int]]:
    """Options of a layer, and the size of its input."""
    groups = chance.choice([1, 1, 1, 2, 3, 4])
    channels = groups * chance.choice([1, 2, 3, 5, 8, 16])
    groups = channels if chance.random() < 0.15 else groups
    stride: Any = chance.choice([1, 1, 2, 3, (1, 2), (3, 1)])
    options: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": groups * chance.choice([1, 2, 3]),
        "kernel_size": chance.choice([1, 3, 3, 2, 5, 7, (1, 3), (3, 1), (2, 3), (4, 1)]),
        "stride": stride,
        "padding": chance.choice([0, 1, 2, (0, 1), (2, 1), 5, "valid", *(["same"] if stride == 1 else [])]),
        "dilation": chance.choice([1, 1, 2, 3, (1, 2), (2, 1)]),
        "groups": groups,
        "bias": chance.random() < 0.7,
        "block": chance.choice([1, 2, 3, 4, 8, 64]),
        "n_iter": chance.choice([1, 2, 5, 5, 8, 15]),
        "eps": chance.choice([1e-5, 1e-2]),
        "sampling_stride": chance.choice([1, 2, 3, 4]),
        "grouping": chance.choice(["channel", "published"]),
        "dense_small_maps": chance.random() < 0.5,
        "max_rows": chance.choice([0, 0, 10, 50, 400]),
        "padding_mode": chance.choice(["zeros", "zeros", "reflect", "replicate", "circular"]),
    }
    size = [chance.choice([1, 2, 3, 5, 8, 9, 13, 16, 17, 24]) for _ in range(2)]
    return options, (chance.choice([1, 2, 3, 7]), channels, size[0], size[1])


def laid_out(x: Tensor, chance: random.Random) -> Tensor:
    """The same values, or some of them, at other places of the memory."""
    ways = {
        "as it is": lambda: x,
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.mT.contiguous().mT,
        "one image for all": lambda: x[:1].expand(x.shape),
        "part of more channels": lambda: torch.cat([x, x], 1)[:, : x.shape[1]],
    }
    return ways[chance.choice(list(ways))]()


def padded(layer: FastDeconv, x: Tensor) -> Tensor:
    pads = [0] * 4
    for axis in (0, 1):  # F.pad begins with the last axis
        before = after = 0 if layer.padding == "valid" else layer.padding[axis]
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            before, after = total // 2, total - total // 2
        pads[2 - 2 * axis : 4 - 2 * axis] = [before, after]  # type: ignore[list-item]
    return F.pad(x, pads, "constant" if layer.padding_mode == "zeros" else layer.padding_mode) if any(pads) else x


def windows(layer: FastDeconv, x: Tensor) -> Tensor:
    """All windows of a padded input, (N, down, across, C, k_h, k_w)."""
    places = []
    for side, k, s, d in zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True):
        starts = torch.arange(0, max(0, side - d * (k - 1)), s)
        places.append(starts[:, None] + d * torch.arange(k))
    return x[:, :, places[0]][..., places[1]].permute(0, 2, 4, 1, 3, 5)


def sampled(layer: FastDeconv, x: Tensor, everything: Tensor) -> Tensor:
    """The windows that the statistics are taken from, (rows, C, k_h, k_w)."""
    positions = (everything.shape[1], everything.shape[2])
    strides, images = (layer.sampling_stride,) * 2, 1
    if layer.dense_small_maps:
        strides = dense_strides(positions, layer.sampling_stride)
    if layer.max_rows:
        blocks = layer.in_channels // layer.block if layer.groups == 1 else 1  # that one D serves
        images, strides = thin_out(len(x), blocks, positions, strides, layer.max_rows)
    plain = not layer.dense_small_maps and not layer.max_rows
    every = strides[0] * strides[1] * layer.stride[0] * layer.stride[1]
    explicit = layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    width = padded(layer, x).shape[3] if explicit else x.shape[3]
    down, across = 0, 0
    if layer.kernel_size == (1, 1) and (plain or math.gcd(every, width) ** 2 <= every):
        pixels = (padded(layer, x) if explicit else x)[::images].permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1)
        return pixels[::every]
    if layer.kernel_size == (1, 1) and (explicit or layer.padding == (0, 0)):
        down, across = ((min(each) - 1) // 2 for each in zip(strides, positions, strict=True))
    return everything[::images, down :: strides[0], across :: strides[1]].flatten(0, 2)


def formulas(layer: FastDeconv, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and D of a training step."""
    everything = windows(layer, padded(layer, x))
    features, count = layer.features, layer.in_channels // layer.block

    def blocks(patches: Tensor) -> Tensor:
        """(..., C, k_h, k_w) -> (blocks, ..., F)"""
        flat = patches.flatten(-3)
        if layer.groups == 1 and layer.grouping == "published":
            return flat.unflatten(-1, (features, count)).movedim(-1, 0)
        return flat.unflatten(-1, (-1, features)).movedim(-2, 0)

    def statistics(rows: Tensor) -> Statistics:
        mean = rows.mean(0)
        centred = rows - mean
        covariance = centred.T @ centred / len(rows) + layer.eps * torch.eye(features, dtype=D64)
        return mean, inverse_root(covariance, layer.n_iter)

    taken = blocks(sampled(layer, x, everything))
    if layer.groups > 1:
        means, roots = zip(*(statistics(rows) for rows in taken), strict=True)
        weights = [part for rows in layer.weight.flatten(1).chunk(layer.groups) for part in rows.split(features, 1)]
        pieces = zip(blocks(everything), means, roots, weights, strict=True)
        each = [(patches - mean) @ root @ weight.T for patches, mean, root, weight in pieces]
        y = torch.cat([sum(each[i : i + count // layer.groups]) for i in range(0, count, count // layer.groups)], -1)
        mean, root = torch.cat(means), torch.stack(roots)
    else:
        mean, root = statistics(taken.flatten(0, 1))
        white = (blocks(everything) - mean) @ root
        y = torch.einsum("bnhwf,bof->nhwo", white, blocks(layer.weight))
    return (y if layer.bias is None else y + layer.bias).permute(0, 3, 1, 2), mean, root


@pytest.mark.parametrize("seed", range(80))
def test_outputs_statistics_and_gradients_equal_the_formulas(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    options, size = draw(chance)
    layer = FastDeconv(**options, dtype=D64)
    x = laid_out(torch.randn(size, dtype=D64).cumsum(-1) / 3 + torch.randn(size[1], 1, 1, dtype=D64), chance)
    x.requires_grad_()
    try:
        want, mean, root = formulas(layer, x)
    except RuntimeError as error:  # a padding or a kernel that is too large for the map
        with pytest.raises((RuntimeError, norm.NormError)):
            layer(x)
        pytest.skip(str(error))
    if want.numel() == 0:
        with pytest.raises(norm.NormError, match="does not fit into an input"):
            layer(x)
        return
    upstream, inputs = torch.randn_like(want), [x, *layer.parameters()]
    got = layer(x)
    eye = torch.eye(layer.features, dtype=D64)
    pairs = [(got, want), (layer.running_mean, 0.1 * mean), (layer.running_deconv, 0.9 * eye + 0.1 * root)]
    pairs += zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True)
    for found, wanted in pairs:
        assert (found - wanted).abs().max() < 1e-8 * wanted.abs().max() + 1e-9

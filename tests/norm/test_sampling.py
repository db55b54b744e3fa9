"""Which patches are taken, and that a gradient goes back to where they came from."""

import math

import pytest
import torch
from torch import Tensor

from norm import FastDeconv, strides
from norm.sampling import Rows, Windows, group_patches, ungroup_patches


def windows(x: Tensor, kernel: tuple[int, int], step: tuple[int, int], padding: int, dilation: int) -> Tensor:
    """Zero-padded windows by loops: (N, windows, C, k_h, k_w)."""
    n, c, h, w = x.shape
    padded = x.new_zeros(n, c, h + 2 * padding, w + 2 * padding)
    padded[:, :, padding : padding + h, padding : padding + w] = x
    reach = (dilation * (kernel[0] - 1), dilation * (kernel[1] - 1))
    found = []
    for top in range(0, padded.shape[2] - reach[0], step[0]):
        for left in range(0, padded.shape[3] - reach[1], step[1]):
            found.append(padded[:, :, top : top + reach[0] + 1 : dilation, left : left + reach[1] + 1 : dilation])
    return torch.stack(found, 1)


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [((3, 3), 1, 1, 1), ((3, 3), 2, 2, 2), ((1, 5), 1, 0, 1), ((1, 1), 1, 0, 1), ((1, 1), 2, 1, 1)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_windows_are_those_at_the_sampling_stride(kernel, stride, padding, dilation, memory_format):
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64).to(memory_format=memory_format)
    step = (3 * stride, 3 * stride)
    got = Windows(kernel, step, (padding, padding), (dilation, dilation), 3 * math.prod(kernel)).gather(x)
    want = windows(x, kernel, step, padding, dilation).flatten(0, 1).flatten(1).t()
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 1), (9, 4)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_every_ninth_of_the_flattened_list(size, stride, memory_format):
    x = torch.randn(5, 4, *size).to(memory_format=memory_format)
    got = Windows((1, 1), (3 * stride, 3 * stride), (3, 3), (1, 1), 4, listed=True).gather(x)
    want = x.permute(0, 2, 3, 1).reshape(-1, 4)[:: (3 * stride) ** 2]
    assert torch.equal(got.t(), want)


def test_a_grid_of_pixels_lies_in_the_middle_of_its_cells():
    """Where the list would be columns; a convolution with a stride sees no others than those."""
    for side, stride, want in ((64, 1, 3), (128, 2, 6)):
        layer = FastDeconv(8, 8, 1, stride, dense_small_maps=True, max_rows=600)  # eight positions apart
        windows = layer.windows(torch.Size((8, 8, side, side)), (0, 0))
        assert windows.strides == (8 * stride,) * 2 and windows.start == (want, want) and not windows.listed
        for last in (False, True):
            x = torch.arange(float(side)).expand(8, 8, side, side)
            patches = windows.gather(x.contiguous(memory_format=torch.channels_last) if last else x)
            assert patches.shape == (8, 512) and patches[0].unique().tolist() == list(range(want, side, 8 * stride))
        assert layer.windows(torch.Size((8, 8, side - 1, side - 1)), (0, 0)).listed
    assert strides.middles((92, 1), (18, 2), (1, 1)) == (8, 0) and strides.middles((5, 9), (3, 2), (2, 3)) == (2, 0)


def test_dense_strides_take_every_window_of_small_maps():
    def dense(size, kernel=3, stride=1, padding=1, dilation=1, most=3):
        pairs = ((each,) * 2 for each in (kernel, stride, padding, dilation))
        return strides.dense_strides(strides.output_size(size, *pairs), most)

    assert dense((8, 17)) == (1, 3) and dense((9, 16)) == (2, 2) and dense((32, 33), stride=2) == (2, 3)
    assert dense((1, 1), kernel=1, padding=0) == (1, 1) and dense((10, 20), padding=0) == (1, 3)
    assert dense((12, 40), most=1) == (1, 1) and dense((12, 40), padding=0, dilation=2) == (1, 3)


def test_blocks_follow_the_gcd_rule():
    pairs = {(64, 64): 64, (3, 64): 3, (128, 64): 64, (80, 64): 16, (112, 64): 16, (100, 7): 1}
    assert {key: strides.resolve_block(*key) for key in pairs} == pairs


def test_channel_blocks_are_neighbours_and_published_blocks_interleave_features():
    patches = torch.arange(2 * 8 * 3.0).view(2, 8, 3)  # two channels blocks of 4 features, three rows
    channel = group_patches(patches, 4, 1, "channel")
    assert torch.equal(channel[:, :3], patches[0, :4]) and torch.equal(channel[:, 3:6], patches[0, 4:])
    published = group_patches(patches, 4, 1, "published")
    columns = {tuple(column.tolist()) for column in published.t()}
    assert tuple(patches[0, ::2, 0].tolist()) in columns and tuple(patches[1, 1::2, 2].tolist()) in columns


def test_rows_are_saved_by_images_on_small_maps_and_by_the_grid_on_large_ones():
    assert strides.thin_out(128, 8, (4, 4), (1, 1), 4000) == (5, (1, 1))
    assert strides.thin_out(32, 1, (4, 4), (1, 1), 4000) == (1, (1, 1))
    assert strides.thin_out(128, 1, (16, 16), (2, 2), 4000) == (3, (2, 2))
    assert strides.thin_out(128, 1, (32, 32), (3, 3), 4000) == (1, (6, 6))  # 36 windows stay
    assert strides.thin_out(2, 4, (64, 128), (3, 3), 4000) == (1, (5, 5))
    layer = FastDeconv(8, 4, 3, padding=1, block=4, dense_small_maps=True, max_rows=40)
    assert layer.patches(torch.randn(6, 8, 4, 4), (1, 1)).shape == (36, 2 * 16 * 2)


@pytest.mark.parametrize("most_rows", [1, 4, 50, 400])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 7, 8, 32, 128])
def test_images_are_an_odd_number_apart_and_at_least_two(images, most_rows):
    """Of batches in pairs or clips of frames an even number apart would all be of one kind."""
    apart, same = strides.thin_out(images, 4, (2, 3), (1, 1), most_rows)
    taken = range(0, images, apart)
    assert apart % 2 == 1 and same == (1, 1) and len(taken) >= min(images, 2)
    assert apart == 1 or len({image % 2 for image in taken}) == 2
    few = len(taken) <= 3  # then what is missing is whole images
    assert apart == 1 or few or 2 / 3 * most_rows - 24 <= len(taken) * 24 < 2 * most_rows + 24


@pytest.mark.parametrize("side", [8, 16, 32, 36, 48, 64, 90, 128])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("images", [2, 4, 6, 8, 64, 128])
def test_windows_lie_all_over_the_map(side, stride, kernel, images):
    """A list's every 64th pixel would be one column of a map 64 wide, and the first one has the padding beside it."""
    options = {"dense_small_maps": True, "max_rows": 4000}
    layer = FastDeconv(4, 4, kernel, stride, padding=kernel // 2, **options)
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    x = place.expand(images, 2, side, side).repeat(1, 2, 1, 1).float()
    pixels = layer.patches(x, (kernel // 2, kernel // 2)).view(4, kernel**2, -1)[:2, kernel**2 // 2].unique(dim=1)
    step = layer.windows(x.shape, (kernel // 2, kernel // 2)).strides[0]
    for places in (each.unique() for each in pixels):
        assert places.diff().max() <= step and places[0] < step and places[-1] >= side - step
        assert len(places) >= 4 and (kernel == 3 or not set(places.tolist()) <= {0, side - stride})


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("grouping", ["channel", "published"])
def test_ungrouping_inverts_grouping(matrices, grouping):
    patches = torch.randn(3, 8 * 9, 5)
    grouped = group_patches(patches, 36, matrices, grouping)
    assert torch.equal(ungroup_patches(grouped, 3, 72, matrices, grouping), patches)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(11, 12), (3, 9), (1, 1), (6, 6), (20, 7)])
@pytest.mark.parametrize(
    "windows",
    [
        Windows((3, 3), (3, 3), (1, 1), (1, 1), 36),
        Windows((3, 3), (1, 1), (1, 1), (1, 1), 36, images=2),
        Windows((3, 3), (2, 5), (2, 3), (2, 1), 18, grouping="published"),
        Windows((3, 3), (1, 2), (6, 6), (6, 6), 18),
        Windows((7, 7), (6, 6), (3, 3), (1, 1), 49, matrices=4),
        Windows((1, 5), (3, 3), (0, 2), (1, 1), 20, matrices=1),
        Windows((1, 1), (3, 3), (0, 0), (1, 1), 2),
        Windows((1, 1), (3, 3), (0, 0), (1, 1), 2, listed=True),
        Windows((1, 1), (2, 2), (0, 0), (1, 1), 4, images=3),
        Windows((1, 1), (1, 1), (1, 1), (1, 1), 4, images=2),
        Windows((1, 1), (2, 2), (1, 1), (1, 1), 4, images=3, listed=True),
        Windows((1, 1), (4, 4), (0, 0), (1, 1), 2, matrices=2),
        Windows((1, 1), (4, 3), (0, 0), (1, 1), 4, images=2, start=(1, 0)),
        Windows((1, 1), (3, 3), (0, 0), (1, 1), 2, matrices=2, listed=True),
    ],
    ids=str,
)
def test_scattering_is_the_adjoint_of_gathering(windows, size, memory_format):
    """Against autograd's own gradient of the gathering, added to what was there before."""
    if min(size) <= max(windows.start):
        pytest.skip("the grid begins behind the map")
    x = torch.randn(5, 4, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    try:
        patches = windows.gather(x)
    except RuntimeError:
        pytest.skip("the kernel is larger than the padded map")
    upstream = torch.randn_like(patches)
    (want,) = torch.autograd.grad(patches, x, upstream)
    torch.testing.assert_close(windows.spread(upstream, x.shape), want, rtol=1e-12, atol=1e-12)
    for layout in (torch.contiguous_format, torch.channels_last):
        before = torch.randn(5, 4, *size, dtype=torch.float64).to(memory_format=layout)
        got = before.clone()
        windows.scatter_add_(got, upstream)
        torch.testing.assert_close(got, before + want, rtol=1e-12, atol=1e-12)


def test_rows_of_a_linear_layer():
    x = torch.randn(3, 2, 8, dtype=torch.float64).requires_grad_()
    patches = Rows(4).gather(x)
    upstream = torch.randn_like(patches)
    (want,) = torch.autograd.grad(patches, x, upstream)
    got = torch.ones_like(x).detach()
    Rows(4).scatter_add_(got, upstream)
    assert patches.shape == (4, 12) and torch.equal(got, 1 + want)

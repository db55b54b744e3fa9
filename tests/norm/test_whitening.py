"""The pure functions against the formulas of the paper, written plainly in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from norm import whitening


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


@pytest.mark.parametrize("kernel, stride, padding, dilation", [((3, 3), 1, 1, 1), ((3, 3), 2, 2, 2), ((1, 5), 1, 0, 1)])
def test_windows_are_those_at_the_sampling_stride(kernel, stride, padding, dilation):
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64)
    got = whitening.sample(x, kernel, (stride, stride), (padding, padding), (dilation, dilation), (3, 3))
    want = windows(x, kernel, (3 * stride, 3 * stride), padding, dilation).flatten(2).transpose(1, 2)
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 1), (9, 4)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_every_ninth_of_the_flattened_list(size, stride, memory_format):
    x = torch.randn(5, 4, *size).to(memory_format=memory_format)
    got = whitening.sample(x, (1, 1), (stride, stride), (3, 3), (1, 1), (3, 3))
    want = x.permute(0, 2, 3, 1).reshape(-1, 4)[:: (3 * stride) ** 2]
    assert torch.equal(got.permute(0, 2, 1).reshape(-1, 4), want)


def test_dense_strides_take_every_window_of_small_maps():
    def strides(size, kernel=3, stride=1, padding=1, dilation=1, most=3):
        pairs = ((each,) * 2 for each in (kernel, stride, padding, dilation))
        return whitening.dense_strides(whitening.output_size(size, *pairs), most)

    assert strides((8, 17)) == (1, 3) and strides((9, 16)) == (2, 2) and strides((32, 33), stride=2) == (2, 3)
    assert strides((1, 1), kernel=1, padding=0) == (1, 1) and strides((10, 20), padding=0) == (1, 3)
    assert strides((12, 40), most=1) == (1, 1) and strides((12, 40), padding=0, dilation=2) == (1, 3)


def test_blocks_follow_the_gcd_rule():
    pairs = {(64, 64): 64, (3, 64): 3, (128, 64): 64, (80, 64): 16, (112, 64): 16, (100, 7): 1}
    assert {key: whitening.resolve_block(*key) for key in pairs} == pairs


def test_channel_blocks_are_neighbours_and_published_blocks_interleave_features():
    patches = torch.arange(2 * 8 * 3.0).view(2, 8, 3)  # two channels blocks of 4 features, three rows
    channel = whitening.group_patches(patches, 4, 1, "channel")
    assert torch.equal(channel[:, :3], patches[0, :4]) and torch.equal(channel[:, 3:6], patches[0, 4:])
    published = whitening.group_patches(patches, 4, 1, "published")
    columns = {tuple(column.tolist()) for column in published.t()}
    assert tuple(patches[0, ::2, 0].tolist()) in columns and tuple(patches[1, 1::2, 2].tolist()) in columns


@pytest.mark.parametrize("groups, grouping", list(itertools.product([1, 2], ["channel", "published"])))
def test_weights_are_split_as_patches_are(groups, grouping):
    """Rows of the weight times columns of the patches, summed over blocks, is the convolution's product."""
    weight = torch.randn(6, 8 // groups, 3, 3, dtype=torch.float64)
    patches = torch.randn(1, 72, 5, dtype=torch.float64)
    features = 36
    rows = whitening.split_weight(weight, features, groups, grouping)
    columns = whitening.group_patches(patches, features, groups, grouping)
    assert torch.equal(whitening.merge_weight(rows, weight.shape, groups, grouping), weight)
    if groups == 1:
        got = torch.einsum("obf,fbr->or", rows.view(6, 2, features), columns.view(features, 2, 5))
        want = weight.flatten(1) @ patches[0]
    else:
        got = (rows @ columns).flatten(0, 1)
        want = torch.cat([weight.flatten(1)[:3] @ patches[0, :36], weight.flatten(1)[3:] @ patches[0, 36:]])
    torch.testing.assert_close(got, want)


def test_mean_and_covariance():
    patches = torch.randn(5, 40, dtype=torch.float64) * 3 + 7
    mean, covariance = whitening.mean_and_covariance(patches, 1e-2)
    torch.testing.assert_close(mean, sum(patches[:, r] for r in range(40)) / 40)
    want = torch.cov(patches, correction=0) + 1e-2 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(covariance, want)


@pytest.mark.parametrize("n_iter", [1, 2, 5, 15])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_newton_schulz_is_the_published_recursion_with_gradient(n_iter, batch):
    root = torch.randn(*batch, 6, 6, dtype=torch.float64)
    matrix = (root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(*batch, 6, 6, dtype=torch.float64)

    norm = matrix.square().sum((-2, -1), keepdim=True).sqrt()
    eye = torch.eye(6, dtype=torch.float64).expand(*batch, 6, 6)
    y, z = matrix / norm, eye
    for _ in range(n_iter):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    want = z / norm.sqrt()
    (want_grad,) = torch.autograd.grad((want * weight).sum(), matrix)

    got = whitening.inverse_sqrt(matrix, n_iter)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), matrix)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_iter", [1, 5, 15])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_eigenvalue_form_equals_the_products(n_iter, batch, monkeypatch):
    """As many features as rows, so that the eigenvalues span ten orders of magnitude and some coincide."""
    rows = torch.randn(*batch, 130, 100, dtype=torch.float64).cumsum(-2)
    matrix = (rows @ rows.mT / 100 + 1e-5 * torch.eye(130, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(*batch, 130, 130, dtype=torch.float64)
    got = whitening.inverse_sqrt(matrix, n_iter)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), matrix)
    monkeypatch.setattr(whitening, "_SPECTRAL_SIZE", 1000)
    want = whitening.inverse_sqrt(matrix, n_iter)
    (want_grad,) = torch.autograd.grad((want * weight).sum(), matrix)
    assert (got - want).abs().max() < 1e-9 * want.abs().max()
    assert (got_grad - want_grad).abs().max() < 1e-8 * want_grad.abs().max()


def test_a_covariance_that_is_not_finite_gives_nan_and_no_exception():
    matrix = torch.eye(200)
    matrix[3, 3] = float("nan")
    assert whitening.inverse_sqrt(matrix, 5).isnan().any()


def test_many_steps_converge_to_the_inverse_root():
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(8, dtype=torch.float64)
    d = whitening.inverse_sqrt(matrix, 40)
    torch.testing.assert_close(d @ matrix @ d, torch.eye(8, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_gain_is_bounded_for_fewer_rows_than_features():
    patches = torch.randn(50, 3, dtype=torch.float64)
    _, deconv = whitening.statistics(patches, lambda p: p, 1e-5, 5)
    _, covariance = whitening.mean_and_covariance(patches, 1e-5)
    bound = 1.5**5 / covariance.norm().sqrt()
    assert torch.linalg.eigvalsh(deconv).max() <= bound * (1 + 1e-9)


def test_statistics_are_float32_under_autocast():
    patches = torch.randn(4, 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mean, deconv = whitening.statistics(patches, lambda p: p, 1e-5, 5)
    assert mean.dtype == deconv.dtype == torch.float32
    want = whitening.statistics(patches.float(), lambda p: p, 1e-5, 5)
    assert torch.equal(deconv, want[1])


@pytest.mark.parametrize("groups, grouping", list(itertools.product([1, 4], ["channel", "published"])))
def test_unfold_inverts_fold(groups, grouping):
    weight = torch.randn(8, 8 // groups, 3, 3, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    features = 18 if groups == 4 else 36
    patches = torch.randn(*((4,) if groups == 4 else ()), features, 200, dtype=torch.float64)
    mean, deconv = whitening.statistics(patches, lambda p: p, 1e-5, 5)
    inner = whitening.unfold_weight(weight, bias, mean, deconv, groups, grouping)
    back = whitening.fold_weight(*inner, mean, deconv, groups, grouping)
    torch.testing.assert_close(back[0], weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back[1], bias, rtol=1e-9, atol=1e-9)

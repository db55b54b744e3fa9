"""The leading directions of a covariance: what they converge to, the D that they stand for, and a layer of them."""

import pytest
import torch
from torch import Tensor

from norm import FastDeconv, leading, whitening

D64 = torch.float64


def covariance(features: int = 20, groups: int | None = None) -> Tensor:
    """Over its scale (trace = features), with eigenvalues that fall by a quarter from one to the next."""
    torch.manual_seed(1)
    shape = (features, features) if groups is None else (groups, features, features)
    vectors = torch.linalg.qr(torch.randn(*shape, dtype=D64))[0]
    values = 0.75 ** torch.arange(features, dtype=D64)
    found = (vectors * values) @ vectors.mT
    return found * features / values.sum()


def patches_of(matrix: Tensor) -> Tensor:
    """Patches whose product with themselves is the matrix."""
    return torch.linalg.cholesky(matrix)


def start(features: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return leading.first_basis(features, rank).to(D64), torch.ones(rank, dtype=D64), torch.ones((), dtype=D64)


def matrix_of(basis: Tensor, gains: Tensor, scale: Tensor) -> Tensor:
    """(rest's gain I + V diag(gains - rest's gain) V^T) / sqrt(scale), written out and as the module has it."""
    last = gains[..., -1:, None]
    plain = last * torch.eye(basis.shape[-2]).to(basis) + (basis * (gains[..., None, :-1] - last)) @ basis.mT
    want = plain / scale.sqrt()[..., None, None]
    tilted, rest = leading.tilt(basis, gains)
    torch.testing.assert_close(leading.matrix(basis, tilted, rest * scale.rsqrt()), want)
    return want


def test_all_directions_are_the_running_average_itself():
    basis, values, rest = start(20, 20)
    held, now = torch.eye(20, dtype=D64), covariance()
    for rate in (1.0, 0.3, 0.3):
        held = (1 - rate) * held + rate * now
        basis, values, rest = leading.renew(basis, values, rest, patches_of(now), torch.zeros((), dtype=D64), rate)
        torch.testing.assert_close((basis * values) @ basis.mT, held)
        now = now.flip(0, 1)


def test_few_directions_turn_towards_the_largest_eigenvalues():
    want, vectors = torch.linalg.eigh(covariance())
    found = start(20, 5)
    for _ in range(300):
        found = leading.renew(*found, patches_of(covariance()), torch.zeros((), dtype=D64), 0.5)
    basis, values, rest = found
    torch.testing.assert_close(values, want[-5:], rtol=1e-6, atol=0)
    torch.testing.assert_close(rest, want[:-5].mean())
    torch.testing.assert_close(basis @ basis.mT, vectors[:, -5:] @ vectors[:, -5:].mT, rtol=0, atol=1e-6)


def test_the_ridge_is_added_to_the_diagonal():
    ridge = torch.tensor(0.25, dtype=D64)
    basis, values, _ = leading.renew(*start(20, 20), patches_of(covariance()), ridge, 1.0)
    torch.testing.assert_close((basis * values) @ basis.mT, covariance() + 0.25 * torch.eye(20, dtype=D64))


@pytest.mark.parametrize("n_iter", [1, 5])
def test_gains_are_those_of_the_inverse_root(n_iter: int):
    matrix = covariance()
    basis, values, rest = leading.directions(matrix, 20)
    gains = leading.gains(values, rest, 20, n_iter)
    found = matrix_of(basis, gains, torch.ones((), dtype=D64))
    torch.testing.assert_close(found, whitening.inverse_sqrt(matrix, n_iter), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("groups", [None, 3])
def test_the_thin_products_are_the_product_with_d(groups: int | None, in_place: bool):
    basis, values, rest = leading.directions(covariance(groups=groups), 6)
    gains = leading.gains(values, rest, 20, 5)
    scale = torch.tensor(4.0, dtype=D64) if groups is None else torch.tensor([4.0, 1.0, 0.5], dtype=D64)
    rows = torch.randn(*basis.shape[:-2], 7, 20, dtype=D64)
    want = rows @ matrix_of(basis, gains, scale)
    tilted, last = leading.tilt(basis, gains)
    found = leading.times(rows, basis, tilted, last * scale.rsqrt(), in_place)
    torch.testing.assert_close(found, want)
    assert (found.data_ptr() == rows.data_ptr()) == in_place


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_of_few_directions_is_the_plain_convolution_with_its_d(
    groups: int, anew: bool, monkeypatch: pytest.MonkeyPatch
):
    """Output and gradients of x, weight and bias, with the shape held and mean and scale written out."""
    monkeypatch.setattr("norm.folded_conv.worth_it", lambda *_: anew)
    torch.manual_seed(0)
    layer = FastDeconv(8, 6, 3, padding=1, groups=groups, block=4, every=2, rank=5).to(D64)
    layer(torch.randn(3, 8, 9, 9, dtype=D64))  # the next step renews nothing
    x = torch.randn(3, 8, 9, 9, dtype=D64).cumsum(-1).requires_grad_()
    patches = layer.patches(x, (1, 1)).view(groups, layer.features, -1)
    mean = patches.mean(-1)
    scale = (patches - mean[..., None]).square().mean((-2, -1)) + layer.eps
    shape = matrix_of(layer.basis, layer.gains, torch.ones_like(layer.running_scale))
    deconv = shape.view(groups, layer.features, -1) * scale.rsqrt()[:, None, None]
    rows = layer.weight.view(groups, -1, layer.features) @ deconv
    bias = layer.bias - (rows @ mean[..., None]).view(6, -1).sum(1)
    want = torch.nn.functional.conv2d(x, rows.view_as(layer.weight), bias, padding=1, groups=groups)
    inputs, upstream = [x, layer.weight, layer.bias], torch.randn_like(want)
    want_grads = torch.autograd.grad(want, inputs, upstream)
    got = layer(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), want_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_has_the_d_of_the_running_averages():
    torch.manual_seed(0)
    layer = FastDeconv(8, 6, 3, padding=1, every=1, rank=5).to(D64)
    for _ in range(3):
        layer(torch.randn(3, 8, 9, 9, dtype=D64))
    layer.eval()
    assert torch.linalg.matrix_rank(layer.deconv() - layer.deconv().diagonal().min() * torch.eye(72, dtype=D64)) > 5
    gains = torch.linalg.eigvalsh(layer.deconv()) * layer.running_scale.sqrt()
    torch.testing.assert_close(gains, layer.gains[[0, 1, 2, 3, 4] + [5] * 67].sort().values)


def test_a_rank_below_one_is_refused():
    from norm import NormError

    with pytest.raises(NormError, match="rank is 0; it must be at least 1"):
        FastDeconv(3, 3, 3, every=1, rank=0)

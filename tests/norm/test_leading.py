"""The leading directions of a covariance: what they converge to, the D that they stand for, and a layer of them."""

import math

import pytest
import torch
from torch import Tensor

from norm import FastDeconv, leading, whitening
from tests.norm.reference import inverse_root

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


def start(features: int, rank: int) -> tuple[Tensor, Tensor]:
    basis, inner = leading.first(features, rank)
    return basis.to(D64), inner.to(D64)


def covariance_of(basis: Tensor, inner: Tensor) -> Tensor:
    """V H V^T + rest (I - V V^T), written out."""
    rest = inner[..., -1:, -1:]
    eye = torch.eye(basis.shape[-2], dtype=basis.dtype)
    return basis @ inner[..., :-1, :-1] @ basis.mT + rest * (eye - basis @ basis.mT)


def few_of(features: int, rank: int, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Directions that are no eigenvectors: those of a covariance, turned."""
    basis, inner = leading.directions(covariance(features, groups), rank)
    turn = torch.linalg.qr(torch.randn(*basis.shape[:-2], rank, rank, dtype=D64))[0]
    inner[..., :-1, :-1] = turn.mT @ inner[..., :-1, :-1] @ turn
    return basis @ turn, inner


def shape_of(basis: Tensor, tilted: Tensor, last: Tensor) -> Tensor:
    return last[..., None, None] * (torch.eye(basis.shape[-2], dtype=basis.dtype) + tilted @ basis.mT)


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_a_step_keeps_what_the_new_directions_see_of_the_average(rate: float, groups: int | None):
    """V is an orthonormal basis of C V_before, with C the average, and H = V^T C V; the trace stays."""
    torch.manual_seed(0)
    before, inner = few_of(20, 6, groups)
    now = covariance(20, groups).flip(-1, -2)
    ridge = torch.tensor(0.25, dtype=D64) if groups is None else torch.tensor([0.25, 0.5, 0.0], dtype=D64)
    ridged = now + ridge[..., None, None] * torch.eye(20, dtype=D64)
    average = (1 - rate) * covariance_of(before, inner) + rate * ridged
    basis, found = leading.renew(before, inner, patches_of(now), ridge, rate)
    want = torch.linalg.qr(average @ before)[0]
    torch.testing.assert_close(basis @ basis.mT, want @ want.mT)
    torch.testing.assert_close(found[..., :-1, :-1], basis.mT @ average @ basis)
    trace = found[..., :-1, :-1].diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(found[..., -1, -1], (20 - trace) / 14)
    assert not found[..., :-1, -1].any() and not found[..., -1, :-1].any()


def test_few_directions_turn_towards_the_largest_eigenvalues():
    want, vectors = torch.linalg.eigh(covariance())
    found = start(20, 5)
    for _ in range(300):
        found = leading.renew(*found, patches_of(covariance()), torch.zeros((), dtype=D64), 0.5)
    basis, inner = found
    torch.testing.assert_close(torch.linalg.eigvalsh(inner[:-1, :-1]), want[-5:], rtol=1e-6, atol=0)
    torch.testing.assert_close(inner[-1, -1], want[:-5].mean())
    torch.testing.assert_close(basis @ basis.mT, vectors[:, -5:] @ vectors[:, -5:].mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("smallest", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_columns_become_orthonormal_however_unlike_they_are(dtype: torch.dtype, smallest: float):
    """As steep as the columns of a covariance's product get: 1e-8 is beyond float32's rounding."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(*size, dtype=D64))[0] for size in ((200, 16), (16, 16)))
    values = torch.logspace(0, math.log10(smallest), 16, dtype=D64)
    columns = ((left * values) @ right).to(dtype)
    basis = leading.orthonormal(columns, leading.first(200, 16)[0].to(dtype))
    assert basis.dtype is dtype
    tiny = 1e-12 if dtype is D64 else 1e-6
    torch.testing.assert_close(basis.mT @ basis, torch.eye(16, dtype=dtype), rtol=0, atol=tiny)
    torch.testing.assert_close(basis @ (basis.mT @ columns), columns, rtol=0, atol=tiny)


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("dimensions", [1, 5, 15])
def test_columns_of_fewer_dimensions_are_filled_up(dtype: torch.dtype, dimensions: int):
    """Columns of which some are exactly others."""
    torch.manual_seed(0)
    columns = torch.randn(200, dimensions, dtype=dtype)[:, torch.arange(16) % dimensions]
    basis = leading.orthonormal(columns, leading.first(200, 16)[0].to(dtype))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(16, dtype=dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis @ (basis.mT @ columns), columns, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("value", [1.0, 255.0, -1000.0])
def test_images_in_black_and_white_leave_directions_to_whiten_by(seed: int, value: float):
    """Rectangles, then noise: what was held after the first batch once amplified all after it by 1e13."""
    torch.manual_seed(seed)
    layer = FastDeconv(3, 16, 7, stride=2, padding=3, every=4, dense_small_maps=True, max_rows=4000)

    def rectangles() -> Tensor:
        x = torch.zeros(4, 3, 64, 64)
        for image in x:
            top, left = torch.randint(0, 32, (2,)).tolist()
            image[:, top : top + 24, left : left + 24] = value
        return x

    with torch.no_grad():
        for _ in range(3):
            layer(rectangles())
            torch.testing.assert_close(layer.basis.mT @ layer.basis, torch.eye(64), rtol=0, atol=1e-5)
            blank = layer(torch.full((4, 3, 64, 64), value))
            assert blank.abs().max() < 100
        for _ in range(10):
            out = layer(torch.rand(4, 3, 64, 64) * value)
    assert out.abs().max() < 100
    torch.testing.assert_close(layer.basis.mT @ layer.basis, torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("n_iter", [1, 5])
def test_the_shape_is_the_inverse_root(n_iter: int, groups: int | None):
    torch.manual_seed(0)
    basis, inner = few_of(20, 6, groups)
    want = whitening.inverse_sqrt(covariance_of(basis, inner), n_iter)
    torch.testing.assert_close(shape_of(basis, *leading.respond(basis, inner, n_iter)), want, rtol=1e-9, atol=1e-9)


def test_many_steps_do_not_amplify_the_rounding_of_float32():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(147, 64))[0]
    turn = torch.linalg.qr(torch.randn(64, 64))[0]
    inner = torch.zeros(65, 65)
    inner[:64, :64] = turn * torch.logspace(-4, 1.3, 64) @ turn.mT
    inner[64, 64] = 1e-4
    found, want = leading.respond(basis, inner, 15), leading.respond(basis.double(), inner.double(), 15)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("groups", [None, 3])
def test_the_thin_products_are_the_product_with_d(groups: int | None, in_place: bool):
    basis, inner = few_of(20, 6, groups)
    tilted, last = leading.respond(basis, inner, 5)
    scale = torch.tensor(4.0, dtype=D64) if groups is None else torch.tensor([4.0, 1.0, 0.5], dtype=D64)
    want = shape_of(basis, tilted, last) / scale.sqrt()[..., None, None]
    torch.testing.assert_close(leading.matrix(basis, tilted, last * scale.rsqrt()), want)
    rows = torch.randn(*basis.shape[:-2], 7, 20, dtype=D64)
    want = rows @ want
    found = leading.times(rows, basis, tilted, last * scale.rsqrt(), in_place)
    torch.testing.assert_close(found, want)
    assert (found.data_ptr() == rows.data_ptr()) == in_place


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("groups, block", [(1, 4), (2, 4), (2, 2)])
def test_a_layer_of_few_directions_is_the_plain_convolution_with_its_d(
    groups: int, block: int, anew: bool, monkeypatch: pytest.MonkeyPatch
):
    """Output and gradients of x, weight and bias, with the shape held and mean and scale written out."""
    monkeypatch.setattr("norm.folded_conv.worth_it", lambda *_: anew)
    torch.manual_seed(0)
    layer = FastDeconv(8, 6, 3, padding=1, groups=groups, block=block, every=2, rank=5, fresh_steps=0).to(D64)
    layer(torch.randn(3, 8, 9, 9, dtype=D64))  # the next step renews nothing
    x = torch.randn(3, 8, 9, 9, dtype=D64).cumsum(-1).requires_grad_()
    patches = layer.patches(x, (1, 1)).view(layer.matrices, layer.features, -1)
    mean = patches.mean(-1)
    scale = (patches - mean[..., None]).square().mean((-2, -1)) + layer.eps
    shape = shape_of(layer.basis, layer.tilted, layer.last)
    deconv = shape.view(layer.matrices, layer.features, -1) * scale.rsqrt()[:, None, None]
    blocks = 8 // groups // block  # of a group; without groups all have the same D
    parts = deconv.unflatten(0, (groups, -1)).expand(-1, blocks, -1, -1)
    whole = torch.stack([torch.block_diag(*each) for each in parts])
    rows = layer.weight.view(groups, 6 // groups, -1) @ whole
    bias = layer.bias - (rows @ mean.unflatten(0, (groups, -1)).expand(-1, blocks, -1).reshape(groups, -1, 1)).flatten()
    want = torch.nn.functional.conv2d(x, rows.view_as(layer.weight), bias, padding=1, groups=groups)
    inputs, upstream = [x, layer.weight, layer.bias], torch.randn_like(want)
    want_grads = torch.autograd.grad(want, inputs, upstream)
    got = layer(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), want_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_has_the_d_of_the_running_averages():
    torch.manual_seed(0)
    layer = FastDeconv(8, 6, 3, padding=1, every=1, rank=5, fresh_steps=1).to(D64)
    for _ in range(3):
        layer(torch.randn(3, 8, 9, 9, dtype=D64))
    layer.eval()
    root = inverse_root(covariance_of(layer.basis, layer.inner), layer.n_iter)
    torch.testing.assert_close(layer.deconv(), root / layer.running_scale.sqrt())


def test_a_rank_below_one_is_refused():
    from norm import NormError

    with pytest.raises(NormError, match="rank is 0; it must be at least 1"):
        FastDeconv(3, 3, 3, every=1, rank=0)

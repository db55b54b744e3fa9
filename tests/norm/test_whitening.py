"""The pure functions against the formulas of the paper, written plainly in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from norm import FastDeconv, whitening
from norm.sampling import Rows, group_patches


@pytest.mark.parametrize("groups, grouping", list(itertools.product([1, 2], ["channel", "published"])))
def test_weights_are_split_as_patches_are(groups, grouping):
    """Rows of the weight times columns of the patches, summed over blocks, is the convolution's product."""
    weight = torch.randn(6, 8 // groups, 3, 3, dtype=torch.float64)
    patches = torch.randn(1, 72, 5, dtype=torch.float64)
    features = 36
    rows = whitening.split_weight(weight, features, groups, grouping)
    columns = group_patches(patches, features, groups, grouping)
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


@pytest.mark.parametrize("n_iter", [1, 5, 8])
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


@pytest.mark.parametrize("n_iter, low, high", [(20, 1e-3, 0.1), (25, 10, 1e6)])
def test_float32_is_enough_for_twenty_steps(n_iter, low, high):
    """Why recipes take no more of them: here patches are fewer than features, which are too many for float64."""
    torch.manual_seed(0)
    patches = torch.randn(300, 8, dtype=torch.float64).cumsum(0) * 10
    _, covariance = whitening.mean_and_covariance(patches, 1e-5)
    want, found = (whitening.inverse_sqrt(each, n_iter).double() for each in (covariance, covariance.float()))
    assert low < (found - want).norm() / want.norm() < high


@pytest.mark.parametrize("n_iter", [1, 5, 10, 15])
@pytest.mark.parametrize("channels", [16, 64])
def test_gradients_of_many_steps_in_float32(channels, n_iter):
    """With fewer patches than features: what rounding the steps amplify, their gradient must not amplify once more."""
    torch.manual_seed(0)
    layer = FastDeconv(channels, 16, 3, padding=1, n_iter=n_iter, dense_small_maps=True).double()
    x = (torch.randn(2, channels, 2, 2, dtype=torch.float64).cumsum(1) / 3).relu()
    upstream = torch.randn(2, 16, 2, 2, dtype=torch.float64)
    grads = []
    for dtype in (torch.float64, torch.float32):
        each, image = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(each(image), [image, each.weight], upstream.to(dtype)))
    for want, found in zip(*grads, strict=True):
        assert (found - want).norm() < (1e-3 if n_iter == 15 else 1e-4) * want.norm()


def test_gain_is_bounded_for_fewer_rows_than_features():
    patches = torch.randn(50, 3, dtype=torch.float64)
    _, covariance = whitening.mean_and_covariance(patches, 1e-5)
    deconv = whitening.inverse_sqrt(covariance, 5)
    bound = 1.5**5 / covariance.norm().sqrt()
    assert torch.linalg.eigvalsh(deconv).max() <= bound * (1 + 1e-9)


def test_statistics_are_float32_under_autocast():
    rows = torch.randn(30, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, mean, deconv = whitening.statistics(rows, Rows(4), 1e-5, 5)
    assert mean.dtype == deconv.dtype == torch.float32
    want = whitening.statistics(rows.float(), Rows(4), 1e-5, 5)
    assert torch.equal(deconv, want[2])


@pytest.mark.parametrize("groups, grouping", list(itertools.product([1, 4], ["channel", "published"])))
def test_unfold_inverts_fold(groups, grouping):
    weight = torch.randn(8, 8 // groups, 3, 3, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    features = 18 if groups == 4 else 36
    patches = torch.randn(*((4,) if groups == 4 else ()), features, 200, dtype=torch.float64)
    mean, covariance = whitening.mean_and_covariance(patches, 1e-5)
    mean, deconv = mean.flatten(), whitening.inverse_sqrt(covariance, 5)
    inner = whitening.unfold_weight(weight, bias, mean, deconv, groups, grouping)
    back = whitening.fold_weight(*inner, whitening.Statistics(mean, deconv), groups, grouping)
    torch.testing.assert_close(back[0], weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back[1], bias, rtol=1e-9, atol=1e-9)


class RoundedProducts(TorchDispatchMode):
    """Rounds what is multiplied to 10 bits, as GPUs do with TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if first is not None:
            args = [*args[:first], *map(self.rounded, args[first : first + 2]), *args[first + 2 :]]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32) + (1 << 12)
        return (bits & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize(
    "channels, n_iter, options, low, high",
    [
        *((channels, n_iter, {}, 1e-4, 0.02) for channels, n_iter in [(3, 5), (3, 15), (64, 5)]),
        *((channels, n_iter, {"every": 1}, 1e-4, 0.02) for channels, n_iter in [(3, 5), (3, 15), (64, 5)]),
        (64, 14, {}, 0.2, 100),
    ],
)
def test_many_steps_of_many_features_need_products_in_full_precision(channels, n_iter, options, low, high, monkeypatch):
    """Why `convert` warns of `torch.set_float32_matmul_precision`; the first layer's fifteen steps are in float64."""
    monkeypatch.setattr(whitening, "_SPECTRAL_SIZE", 10**6)  # products, as on a GPU
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(8, 3, 6, 6), 64, mode="bicubic")
    x = smooth.mean(1, keepdim=True) + 0.3 * smooth + 0.02 * torch.randn(8, 3, 64, 64)
    if channels > 3:
        x = F.conv2d(x, torch.randn(channels, 3, 3, 3)).relu()
    layer = FastDeconv(channels, 8, 3, padding=1, n_iter=n_iter, **options)
    x.requires_grad_()
    upstream = torch.randn(8, 8, *x.shape[2:])

    def step(layer, x):
        found = layer(x)
        return [found, *torch.autograd.grad(found, [x, layer.weight], upstream.to(found.dtype))]

    wants = step(copy.deepcopy(layer).double(), x.double())
    assert (layer(x) - wants[0]).norm() < 2e-3 * wants[0].norm()
    with RoundedProducts():
        found, *grads = step(layer, x)
    assert low < (found - wants[0]).norm() / wants[0].norm() < high
    for grad, want in zip(grads, wants[1:], strict=True):
        assert (grad - want).norm() < high * want.norm()

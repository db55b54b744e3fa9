"""Products by convolution: equal to those of float64, as the operands lie in memory, and only where they pay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import norm
from norm import matmul as products

SIZES = [(64, 96, 128), (128, 96, 64), (96, 96, 96), (37, 53, 61), (48, 1, 5)]


@pytest.fixture(params=[1, 2])
def by_convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """All products go by convolution, with this many threads; the list counts them."""
    found: list[int] = []
    convolution = products._convolution

    def counted(a: Tensor, b: Tensor) -> Tensor:
        found.append(1)
        return convolution(a, b)

    monkeypatch.setattr(products, "slow_blas", lambda: True)
    monkeypatch.setattr(products, "_LARGE", 1)
    monkeypatch.setattr(products, "_convolution", counted)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield found
    torch.set_num_threads(threads)


def matrix(*shape: int, transposed: bool) -> Tensor:
    return torch.randn(shape[::-1]).mT if transposed else torch.randn(shape)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [(), (1,)], ids=["matrices", "one of a batch"])
def test_products_are_those_of_float64(
    by_convolution: list[int], size: tuple[int, int, int], batch: tuple[int]
) -> None:
    m, k, n = size
    for left in (False, True):
        for right in (False, True):
            a = matrix(m, k, transposed=left).expand(*batch, m, k)
            b = matrix(k, n, transposed=right).expand(*batch, k, n)
            c = torch.randn(*batch, m, n)
            want = a.double() @ b.double()
            torch.testing.assert_close(products.matmul(a, b).double(), want, rtol=1e-5, atol=1e-4)
            found = products.fused(c, a, b, 1.5, -0.5)
            torch.testing.assert_close(found.double(), 1.5 * c.double() - 0.5 * want, rtol=1e-5, atol=1e-4)
            want += c.double()
            assert products.fused_(c, a, b) is c
            torch.testing.assert_close(c.double(), want, rtol=1e-5, atol=1e-4)
    assert len(by_convolution) == 12


def test_long_sums_lose_no_digits(by_convolution: list[int]) -> None:
    """A covariance of thousands of patches: one convolution would have seven times the error of MKL's product."""
    torch.manual_seed(0)
    x = (torch.randn(512, 8) @ torch.randn(8, 4000) + 0.3 * torch.randn(512, 4000)).relu()
    x -= x.mean(1, keepdim=True)
    want = x.double() @ x.double().mT
    assert (products.matmul(x, x.mT) - want).norm() < 1e-6 * want.norm()
    assert len(by_convolution) == 16


def test_long_sums_for_few_results_are_matrix_products(by_convolution: list[int]) -> None:
    a, b = torch.randn(64, 4000), torch.randn(4000, 64)
    assert torch.equal(products.matmul(a, b), a @ b)
    assert not by_convolution


def test_a_slice_of_a_matrix(by_convolution: list[int]) -> None:
    a, b = torch.randn(64, 200)[:, 3:131], torch.randn(128, 90)[:, ::2]
    torch.testing.assert_close(products.matmul(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert by_convolution


@pytest.mark.parametrize("name", ["deconv", "deconv_fast"])
def test_layers_step_as_with_matrix_products(
    by_convolution: list[int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Output, gradients and running statistics of a layer, one step, with products of either kind."""
    torch.manual_seed(0)
    x = torch.randn(8, 32, 12, 12)
    found = []
    for convolves in (True, False):
        torch.manual_seed(1)
        layer = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48))
        norm.convert(layer, name, block=16, stem_n_iter=5)
        images = x.clone().requires_grad_()
        if not convolves:
            monkeypatch.setattr(products, "slow_blas", lambda: False)
            before = len(by_convolution)
        y = layer(images)
        y.square().mean().backward()
        assert images.grad is not None
        gradients = [each.grad for each in layer.parameters() if each.grad is not None]
        found.append([y.detach(), images.grad, *gradients, *layer.buffers()])
    assert before == len(by_convolution) > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_have_matrix_products(by_convolution: list[int], dtype: torch.dtype) -> None:
    a, b = torch.randn(64, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype)
    assert torch.equal(products.matmul(a, b), a @ b)
    assert not by_convolution


def test_batches_have_matrix_products(by_convolution: list[int]) -> None:
    a, b = torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    assert torch.equal(products.matmul(a, b), a @ b)
    assert not by_convolution


def test_rounded_convolutions_are_not_taken(by_convolution: list[int]) -> None:
    """Where the user lets oneDNN convolve or multiply in bfloat16, or not at all, products stay what they are."""
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    for kind in (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
        before, kind.fp32_precision = kind.fp32_precision, "bf16"
        try:
            assert torch.equal(products.matmul(a, b), a @ b)
        finally:
            kind.fp32_precision = before
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(products.matmul(a, b), a @ b)
    assert not by_convolution
    products.matmul(a, b)
    assert by_convolution


def test_small_products_stay(by_convolution: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LARGE", 64**3 + 1)
    products.matmul(torch.randn(64, 64), torch.randn(64, 64))
    assert not by_convolution
    products.matmul(torch.randn(64, 64), torch.randn(64, 65))
    assert by_convolution


@pytest.mark.parametrize(
    ("processor", "slow"),
    [
        ({"cpu_name": "AMD EPYC 9005", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7003", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
    ],
    ids=["AMD, AVX-512", "AMD, AVX2", "Intel", "unknown"],
)
def test_processors(monkeypatch: pytest.MonkeyPatch, processor: dict[str, object], slow: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products.slow_blas.__wrapped__() is slow

"""Sums over the map against the patches themselves, for windows of every kind."""

from collections.abc import Callable

import pytest
import torch

from norm import moments
from norm.sampling import Rows, Sampler, Windows
from norm.strides import Pair

D64 = torch.float64


def windows(kernel: Pair, strides: Pair, padding: Pair, dilation: Pair = (1, 1), blocks: int = 1, **more) -> Windows:
    channels = 6 if more.get("matrices", 1) == 1 else 6 // more["matrices"]
    return Windows(kernel, strides, padding, dilation, channels // blocks * kernel[0] * kernel[1], **more)


CASES: dict[str, Sampler] = {
    "overlapping": windows((3, 3), (1, 1), (1, 1)),
    "tiles": windows((3, 3), (3, 3), (1, 1), blocks=2),
    "gaps": windows((3, 3), (5, 4), (1, 1)),
    "dilated": windows((3, 3), (2, 2), (2, 2), (2, 2)),
    "uneven": windows((2, 5), (3, 2), (0, 2), (2, 1)),
    "more padding than kernel": windows((3, 3), (2, 2), (4, 4)),
    "matrices": windows((3, 3), (2, 2), (1, 1), matrices=3),
    "every second image": windows((3, 3), (2, 2), (1, 1), images=2),
    "pixels": windows((1, 1), (1, 1), (0, 0)),
    "padded pixels": windows((1, 1), (1, 1), (1, 1)),
    "some pixels": windows((1, 1), (2, 2), (0, 0)),
    "from the middle of cells": windows((1, 1), (4, 3), (0, 0), start=(1, 0)),
    "all pixels but the first row": windows((1, 1), (1, 1), (0, 0), start=(1, 0)),
    "every fourth of a list": windows((1, 1), (2, 2), (0, 0), listed=True),
    "interleaved": windows((3, 3), (2, 2), (1, 1), blocks=2, grouping="published"),
}


def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 6, 11, 14, dtype=D64).cumsum(-1) + 5


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_mean_and_variance_are_those_of_the_patches(case: str, layout: torch.memory_format, on_gpu: bool):
    sampler, x = CASES[case], images().to(memory_format=layout)
    patches = sampler.gather(x)
    mean, variance = moments.of_pieces(x, sampler, D64) if on_gpu else moments.mean_and_variance(x, sampler)
    torch.testing.assert_close(mean, patches.mean(-1))
    torch.testing.assert_close(variance, (patches - patches.mean(-1, keepdim=True)).square().mean((-2, -1)))
    assert sampler.rows(x.shape) == patches.shape[-1]


@pytest.mark.parametrize("add", [moments.add_scaled_, moments.add_to_pieces_], ids=["cpu", "gpu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_what_is_added_goes_where_the_patches_come_from(
    case: str, layout: torch.memory_format, add: Callable[..., None]
):
    sampler, x = CASES[case], images().to(memory_format=layout).requires_grad_()
    patches = sampler.gather(x)
    shape = patches.shape[:-1]
    factor, shift = torch.randn(shape[:-1], dtype=D64), torch.randn(shape, dtype=D64)
    want = torch.autograd.grad(patches, x, factor[..., None, None] * patches.detach() + shift[..., None])[0]
    found = torch.ones_like(x)
    add(found, x.detach(), sampler, factor, shift)
    torch.testing.assert_close(found, want + 1)


def test_rows_of_a_linear_layer():
    x = torch.randn(5, 7, 12, dtype=D64)
    mean, variance = moments.mean_and_variance(x, Rows(4))
    torch.testing.assert_close(mean, x.view(-1, 4).mean(0))
    torch.testing.assert_close(variance, x.view(-1, 4).var(0, correction=0).mean())


@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (12, 12)], ids=["no padding", "whole places of padding"])
def test_a_large_mean_cancels_little_in_float32(padding: int, dilation: int):
    x = images()[..., :11] / 3 + 1000
    sampler = windows((3, 3), (1, 1), (padding, padding), (dilation, dilation))
    assert moments._over_the_map(x, sampler)
    found, want = moments.mean_and_variance(x.float(), sampler)[1], moments.mean_and_variance(x, sampler)[1]
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_copied_windows_are_those_of_unfold(case: str, monkeypatch: pytest.MonkeyPatch):
    sampler, x = CASES[case], images()
    found = sampler.gather(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(found, sampler.gather(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_windows_as_a_view_are_those_of_unfold(case: str, layout: torch.memory_format):
    sampler, x = CASES[case], images().to(memory_format=layout)[1:]
    assert isinstance(sampler, Windows)
    if sampler.kernel_size != (1, 1):
        unfolded = torch.nn.functional.unfold(
            x, sampler.kernel_size, sampler.dilation, sampler.padding, sampler.strides
        )
        assert torch.equal(sampler._strided(x), unfolded)


@pytest.mark.parametrize("case", [case for case in CASES if case != "interleaved"])
def test_the_compilers_gradient_is_that_of_the_patches(case: str):
    sampler, x = CASES[case], images().requires_grad_()
    assert isinstance(sampler, Windows)
    patches = sampler.gather(x)
    mean, variance = patches.mean(-1), (patches - patches.mean(-1, keepdim=True)).square().mean((-2, -1))
    weights = torch.randn_like(mean), torch.randn_like(variance)
    want = torch.autograd.grad((mean * weights[0]).sum() + (variance * weights[1]).sum(), x)[0]
    copied, *found = moments.TracedMoments.apply(x, sampler)
    got = torch.autograd.grad(sum((each * weight).sum() for each, weight in zip(found, weights, strict=True)), x)[0]
    assert torch.equal(copied, patches) and not copied.requires_grad
    torch.testing.assert_close(found, [mean, variance])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_what_is_spread_is_what_would_be_added(case: str):
    sampler, x = CASES[case], images()
    patches = torch.randn_like(sampler.gather(x))
    want = torch.zeros_like(x)
    sampler.scatter_add_(want, patches)
    torch.testing.assert_close(sampler.spread(patches, x.shape), want)

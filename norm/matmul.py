"""Matrix products on CPUs whose convolutions are twice as fast as their matrix products.

torch multiplies float32 matrices with MKL, which takes AVX2 on AMD's processors, where oneDNN, which convolves, takes
AVX-512 (docs/step_times.md has figures). A product of matrices is a convolution of 1x1 too.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

_LARGE = 2**25
"""Multiplications from which a product of matrices is long enough for the convolution's start not to matter."""
_LONG = 1024
"""Longest sums that are left to one convolution: oneDNN adds up in sequence, which loses digits, MKL in parts."""
_PART = 256
"""Terms of a part of longer ones."""
_WIDE = 2**18
"""Results from which such parts are still faster than MKL."""
_IMAGES = 16
"""With one thread torch convolves a map of 1x1 by MKL, unless there are so many images."""


@functools.cache
def slow_blas() -> bool:
    """Whether torch multiplies matrices with MKL on a processor of AMD that has AVX-512 (torch 2.9 does not tell)."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_f")) and "AMD" in found.get("cpu_name", "")


def _convolves(a: Tensor, b: Tensor) -> bool:
    if a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or not slow_blas():
        return False
    (m, k), n = a.shape[-2:], b.shape[-1]
    if a.numel() > m * k or b.numel() > k * n or m * k * n < _LARGE or (k > _LONG and m * n < _WIDE):
        return False
    return _exact_convolution()


def _exact_convolution() -> bool:
    """Whether oneDNN may be used and convolves in float32 as it is, and nobody wants products to be rounded (which are
    faster still)."""
    mkldnn = torch.backends.mkldnn
    kinds = (getattr(mkldnn, name, None) for name in ("conv", "matmul"))
    exact = all(getattr(kind, "fp32_precision", "none") in ("none", "ieee") for kind in kinds)
    return exact and bool(mkldnn.enabled)  # type: ignore[attr-defined]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, (..., m, k) and (..., k, n)."""
    if not _convolves(a, b):
        return a @ b
    left, right = a.reshape(a.shape[-2:]), b.reshape(b.shape[-2:])
    step = _PART if left.shape[1] > _LONG else left.shape[1]
    found = _convolution(left[:, :step], right[:step])
    for start in range(step, left.shape[1], step):
        found += _convolution(left[:, start : start + step], right[start : start + step])
    return found.expand(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), -1, -1)


def fused(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta c + alpha a b, in one kernel but where it goes by convolution."""
    if _convolves(a, b):
        found = matmul(a, b)
        return (found if alpha == 1 else found.mul_(alpha)).add_(c, alpha=beta)
    return (torch.baddbmm if a.ndim == 3 else torch.addmm)(c, a, b, beta=beta, alpha=alpha)


def fused_(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a b, in place of c."""
    if _convolves(a, b):
        return c.add_(matmul(a, b))
    return c.baddbmm_(a, b) if c.ndim == 3 else c.addmm_(a, b)


def _convolution(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices as the convolution that reads them as they lie in memory, (m, n) and contiguous."""
    if a.mT.is_contiguous() and not a.is_contiguous():  # the gradient of a weight, summed over k pixels
        shape = (a.shape[0], b.shape[1], 1, 1)
        return conv2d_weight(_pixels(b), shape, _pixels(a.mT)).view(shape[:2])
    if b.is_contiguous() and b.shape[1] > a.shape[0]:  # n pixels, channel by channel
        images = _images(b.shape[1])
        x = b.view(b.shape[0], images, -1, 1).transpose(0, 1)
        return F.conv2d(x, a[..., None, None]).transpose(0, 1).reshape(len(a), -1)
    return F.conv2d(_pixels(a), b.mT[..., None, None]).permute(0, 2, 3, 1).reshape(len(a), -1)  # m pixels


def _images(pixels: int) -> int:
    return _IMAGES if torch.get_num_threads() == 1 and pixels % _IMAGES == 0 else 1


def _pixels(rows: Tensor) -> Tensor:
    """A row a pixel, (m, c), as images (i, c, m / i, 1) in channels_last."""
    rows = rows.contiguous()
    return rows.view(_images(len(rows)), -1, 1, rows.shape[1]).permute(0, 3, 1, 2)

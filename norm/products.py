"""The Newton-Schulz steps as matrix products, few enough of them that a GPU is not kept waiting for their start.

The steps keep what their gradient needs; it is written out so that it has few kernels and runs in full precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from norm.matmul import fused, matmul

T = TypeVar("T")

FEW_STEPS = 8
"""Newton-Schulz steps up to which rounding does no harm, to float32 or to the 10 bits of TF32."""
_PRECISE_SIZE = 256


def root_dtype(x: Tensor, features: int, n_iter: int) -> torch.dtype:
    """What the covariance of x's patches and its inverse root are computed in: float32, or float64 where x is.

    Also where `n_iter` is more than `FEW_STEPS`, with up to 256 features, as in the paper's first layer: 15 steps, of
    27 or 147 features. Pixels of camera images are so much alike that float32's rounding would change D by a
    thousandth. (Apple's GPUs have no float64.)
    """
    precise = n_iter > FEW_STEPS and features <= _PRECISE_SIZE and x.device.type != "mps"
    return torch.float64 if precise or x.dtype == torch.float64 else torch.float32


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device; there is none for meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turns autocast off for this device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def full_precision(backward: Callable[..., T]) -> Callable[..., T]:
    """For the backward of an autograd function: without autocast, which a compiled graph's backward has from its
    forward (an eager one's has none)."""

    @functools.wraps(backward)
    def wide(ctx: Any, grad: Tensor, *others: Any) -> T:
        with without_autocast(grad.device):
            return backward(ctx, grad, *others)

    return wide


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return matmul(a, b)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return matmul(grad, b.mT), matmul(a.mT, grad)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, both (m, n) matrices, whose gradient is in full precision in a compiled graph as well."""
    found: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return found


def newton_schulz(y: Tensor, n_iter: int, kept: list[Tensor] | None = None) -> Tensor:
    """Z after `n_iter` steps from Y0 = A / |A|_F, which the caller has divided; (F, F) or (M, F, F).

    Args:
        kept: takes what a gradient needs: Y0 and T, then Z, Y and T of each step after the first.
    """
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)
    t = torch.add(1.5 * eye, y, alpha=-0.5)
    z = t
    if kept is not None:
        kept += [y, t]
    for _ in range(n_iter - 1):
        y = y @ t
        t = fused(eye, z, y, 1.5, -0.5)
        if kept is not None:
            kept += [z, y, t]
        z = t @ z
    return z


class Products(torch.autograd.Function):
    """Z / sqrt(|A|_F) after `n_iter` steps, see `norm.whitening.inverse_sqrt`; (F, F) or (M, F, F)."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, n_iter: int) -> Tensor:
        size = torch.linalg.matrix_norm(matrix, keepdim=True)
        kept: list[Tensor] = []
        z = newton_schulz(matrix / size, n_iter, kept)
        ctx.save_for_backward(size, z, *kept)
        return z * size.rsqrt()

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        size, last, *kept = ctx.saved_tensors
        dz = grad * size.rsqrt()
        through_root = (dz * last).sum((-2, -1), keepdim=True).mul_(-0.5)  # |A|_F under the root, times |A|_F
        dy = _backwards(dz, kept)
        through_x = (dy * kept[0]).sum((-2, -1), keepdim=True)  # |A|_F below A, times |A|_F
        return torch.addcmul(dy, through_root - through_x, kept[0]) / size, None


def _backwards(dz: Tensor, kept: list[Tensor]) -> Tensor:
    """The gradient of Y0 from that of the last Z: the steps from the last to the first, 6 n_iter - 6 products.

    From the first to the last it would be as many (the derivative of the polynomial in the gradient's direction), but
    ten and more steps amplify that one's rounding to a hundred times this one's where rows are fewer than features.
    """
    dy: Tensor | None = None  # nobody reads the last Y
    while len(kept) > 2:
        *kept, z, y, t = kept
        dt = dz @ z.mT if dy is None else fused(dz @ z.mT, y.mT, dy, 1.0, 1.0)
        dy = (z.mT @ dt).mul_(-0.5) if dy is None else fused(dy @ t.mT, z.mT, dt, 1.0, -0.5)
        dz = fused(t.mT @ dz, dt, y.mT, 1.0, -0.5)
    y, t = kept
    if dy is None:  # of a single step
        return dz * -0.5
    return fused(fused(dz, y.mT, dy, -0.5, -0.5), dy, t.mT, 1.0, 1.0)

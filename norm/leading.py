"""D of the cheap method: the leading directions of a running covariance are whitened, all others are scaled alike.

A covariance over its scale, of F features, is held as V diag(values) V^T + rest (I - V V^T), with r orthonormal
columns V. Its damped inverse root then has the same form: a gain for each leading direction and one for the rest
(`gains`). Five Newton-Schulz steps whiten no further than 1.5^5, so beyond the leading directions gains differ little.

Shapes, with G conv groups: basis (F, r) or (G, F, r); values (r,) or (G, r); rest () or (G,); gains (r + 1,) or
(G, r + 1), the last one that of the rest. All functions take any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def first_basis(features: int, rank: int) -> Tensor:
    """Where the search for the leading directions begins: (F, r), any orthonormal columns, always the same ones."""
    if rank == features:
        return torch.eye(features)
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(features, rank, generator=generator))[0]


def renew(
    basis: Tensor,
    values: Tensor,
    rest: Tensor,
    patches: Tensor,
    ridge: Tensor,
    rate: float,
    passes: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """basis, values and rest of (1 - rate) times the covariance held and `rate` times that of `patches`.

    One step of orthogonal iteration from the directions held (Golub and Van Loan, Matrix Computations, section 8.2), or
    `passes` of them, and the Rayleigh-Ritz values there; no matrix of F x F is made. With r = F it is exact.

    Args:
        patches: (..., F, rows), centred and over the square root of scale times rows, so that patches patches^T is
            their covariance over the scale.
        ridge: () or (G,), added to that covariance's diagonal.
        rate: between 0 and 1.
        total: sums a product of patches over the processes that have some of them; None: they are all here.
    """
    total = total or (lambda product: product)
    features, rank = basis.shape[-2:]
    held, ridge = basis, ridge[..., None, None]
    rest_held = rest[..., None, None]

    def project(vectors: Tensor) -> tuple[Tensor, Tensor]:
        return held.mT @ vectors, patches.mT @ vectors

    if rank < features:
        for _ in range(passes):
            inside, rows = project(basis)
            applied = held @ ((values[..., None] - rest_held) * inside) + rest_held * basis
            applied = (1 - rate) * applied + rate * (total(patches @ rows) + ridge * basis)
            basis = torch.linalg.qr(applied)[0]
    inside, rows = project(basis)
    small = (1 - rate) * (inside.mT @ ((values[..., None] - rest_held) * inside)) + rate * total(rows.mT @ rows)
    small.diagonal(dim1=-2, dim2=-1).add_(((1 - rate) * rest_held + rate * ridge)[..., 0])
    values, turn = torch.linalg.eigh(small)
    # the trace of a covariance over its scale is F
    rest = ((features - values.sum(-1)) / max(1, features - rank)).clamp_(min=0)
    return basis @ turn, values.clamp_(min=0), rest


def directions(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """basis, values and rest of a covariance over its scale (..., F, F)."""
    values, vectors = torch.linalg.eigh(covariance)
    rest = values[..., :-rank].sum(-1) / max(1, covariance.shape[-1] - rank)
    return vectors[..., -rank:], values[..., -rank:], rest


def gains(values: Tensor, rest: Tensor, features: int, n_iter: int) -> Tensor:
    """What `whitening.inverse_sqrt` makes of the eigenvalues: of the r leading ones, then of the rest."""
    every = torch.cat([values, rest[..., None]], -1)
    norm = (values.square().sum(-1) + (features - values.shape[-1]) * rest.square()).sqrt()[..., None]
    y, z = every / norm, torch.ones_like(every)
    for _ in range(n_iter):
        t = 1.5 - 0.5 * z * y
        y, z = y * t, t * z
    return z * norm.rsqrt()


def tilt(basis: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """tilted (..., F, r) and the rest's gain, (): the shape is rest (I + tilted basis^T)."""
    last = gains[..., -1]
    return basis * (gains[..., :-1] / last[..., None] - 1).unsqueeze(-2), last


def matrix(basis: Tensor, tilted: Tensor, factor: Tensor) -> Tensor:
    """D = factor (I + tilted basis^T), (..., F, F), with factor = rest's gain / sqrt(scale)."""
    eye = torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
    return (tilted @ basis.mT + eye) * factor[..., None, None]


def times(rows: Tensor, basis: Tensor, tilted: Tensor, factor: Tensor, in_place: bool = False) -> Tensor:
    """rows D, (m, F) or (G, m, F), without D: two thin products."""
    inner = rows @ tilted
    if in_place:
        product = rows.baddbmm_ if rows.ndim == 3 else rows.addmm_
        return product(inner, basis.mT).mul_(factor[..., None, None])
    return (torch.baddbmm if rows.ndim == 3 else torch.addmm)(rows, inner, basis.mT).mul_(factor[..., None, None])

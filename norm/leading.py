"""D of the cheap method: the leading directions of a running covariance are whitened, all others are scaled alike.

A covariance over its scale, of F features, is held as V H V^T + rest (I - V V^T), with r orthonormal columns V and a
symmetric H. Its damped inverse root then has the same form (`respond`). Five Newton-Schulz steps whiten no further than
1.5^5, so beyond the leading directions gains differ little.

There are only products, and triangular factors of r x r matrices: for other decompositions (QR, eigenvectors) a GPU
makes the host wait, once a layer.

Shapes, with M matrices: basis V, (F, r) or (M, F, r); inner, (r + 1, r + 1) or (M, r + 1, r + 1), H with rest in the
corner and zeros beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from norm.matmul import fused, fused_, matmul
from norm.products import newton_schulz, root_dtype

_SHIFT = 1e-14
"""Of the trace: more than float64's rounding, less than the square of float32's."""
_HIDDEN = 5e-13
"""The share of the columns that float64 hides; more, and they would not be what was asked for to as many digits."""


def few(rank: int, features: int) -> bool:
    """Whether two thin products with `rank` directions take less than one with D. If not, D's shape is held whole."""
    return 2 * rank < features


def first(features: int, rank: int) -> tuple[Tensor, Tensor]:
    """basis and inner of the identity, where the search for the directions begins: always the same ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)  # a narrower default has no factorisation
    basis = torch.linalg.qr(torch.randn(features, rank, generator=generator, device="cpu", dtype=wide))[0]
    return basis, torch.eye(rank + 1, device="cpu", dtype=wide)


def renew(
    basis: Tensor,
    inner: Tensor,
    patches: Tensor,
    ridge: Tensor,
    rate: float | Tensor,
    passes: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """basis and inner of (1 - rate) times the covariance held and `rate` times that of `patches`.

    One step of orthogonal iteration from the directions held (Golub and Van Loan, Matrix Computations, section 8.2),
    and the Rayleigh quotient there; no matrix of F x F is made.

    Args:
        patches: (..., F, rows), centred and over the square root of scale times rows, so that patches patches^T is
            their covariance over the scale.
        ridge: () or (M,), added to that covariance's diagonal.
        rate: between 0 and 1.
        passes: so many steps of iteration; more than one only at rate 1, where nothing held is left.
        total: sums a product of patches over the processes that have some of them; None: they are all here.
    """
    total = total or (lambda product: product)
    features, rank = basis.shape[-2:]
    held, rest = inner[..., :rank, :rank], inner[..., rank:, rank:]
    eye = torch.eye(rank, dtype=basis.dtype, device=basis.device)
    ridge = ridge[..., None, None] * eye
    before, mix = basis, torch.lerp(held, ridge, rate)
    for _ in range(passes):
        applied = total(matmul(patches, matmul(patches.mT, basis))).mul_(rate)
        basis = orthonormal(fused(applied, basis, mix, 1.0, 1.0), basis)
    inside, rows = before.mT @ basis, matmul(patches.mT, basis)
    kept = inside.mT @ (held - rest * eye) @ inside + rest * eye
    found = torch.lerp(kept, total(rows.mT @ rows) + ridge, rate)
    found = (found + found.mT) / 2
    trace = found.diagonal(dim1=-2, dim2=-1).sum(-1)
    return basis, _with_rest(found, (features - trace) / (features - rank))  # that of the whole is F


def orthonormal(columns: Tensor, before: Tensor) -> Tensor:
    """Orthonormal columns of the same span, (..., F, r), where that has fewer dimensions filled up by `before`, which
    are orthonormal; not finite where it can not be told.

    Cholesky QR in float64, shifted, and once more to be rid of the shift (Fukaya, Kannan, Nakatsukasa, Yamamoto and
    Yanagisawa, "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices", SIAM Journal on
    Scientific Computing 42, 2020, algorithm 4.1 and section 4.2). Products of float32 may have exactly equal rows, as
    those of images in black and white in 0 to 255, beside which the ridge is rounded away: so there is as much of
    `before` in the columns as rounding hides.
    """
    wide, failed = columns.double(), []
    hidden = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    wide = torch.addcmul(wide, hidden, before.double(), value=max(torch.finfo(columns.dtype).eps, _HIDDEN))
    for shift in (_SHIFT, 0.0):
        gram = wide.mT @ wide
        if shift:
            diagonal = gram.diagonal(dim1=-2, dim2=-1)
            diagonal.add_(diagonal.sum(-1, keepdim=True), alpha=shift)
        factor, how = torch.linalg.cholesky_ex(gram)  # which goes on where it fails: a GPU makes no host wait
        failed.append(how)
        wide = torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False)
    return wide.to(columns.dtype).masked_fill_((failed[0] + failed[1] != 0)[..., None, None], math.nan)


def directions(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """basis and inner of a covariance over its scale (..., F, F)."""
    values, vectors = torch.linalg.eigh(covariance)
    rest = values[..., :-rank].mean(-1)
    return vectors[..., -rank:], _with_rest(torch.diag_embed(values[..., -rank:]), rest)


def _with_rest(matrix: Tensor, rest: Tensor) -> Tensor:
    inner = pad(matrix, (0, 1, 0, 1))
    inner[..., -1, -1] = rest.clamp(min=0)
    return inner


def respond(basis: Tensor, inner: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """What `whitening.inverse_sqrt` makes of the covariance, last (I + tilted basis^T): tilted, like basis, and
    last, () or (M,), the gain of all other directions."""
    features, rank = basis.shape[-2:]
    inner = inner.to(root_dtype(inner, rank + 1, n_iter))
    rest = inner[..., -1, -1].square() * (features - rank - 1)
    norm = (inner.square().sum((-2, -1)) + rest).sqrt()[..., None, None]
    root = (newton_schulz(inner / norm, n_iter) * norm.rsqrt()).to(basis.dtype)
    last = root[..., -1, -1]
    return fused(basis, basis, root[..., :rank, :rank] / last[..., None, None], -1.0, 1.0), last


def matrix(basis: Tensor, tilted: Tensor, factor: Tensor) -> Tensor:
    """D = factor (I + tilted basis^T), (..., F, F), with factor = last / sqrt(scale)."""
    eye = torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
    return (matmul(tilted, basis.mT) + eye) * factor[..., None, None]


def times(rows: Tensor, basis: Tensor, tilted: Tensor, factor: Tensor, in_place: bool = False) -> Tensor:
    """rows D, (m, F) or (M, m, F), without D: two thin products."""
    inner = matmul(rows, tilted)
    product = fused_(rows, inner, basis.mT) if in_place else fused(rows, inner, basis.mT, 1.0, 1.0)
    return product.mul_(factor[..., None, None])

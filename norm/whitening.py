"""The mathematics of network deconvolution, as pure functions.

A convolution sees its input as patches. Network deconvolution (Ye et al., "Network Deconvolution", ICLR 2020,
arXiv 1905.11926, sections 3 and 4) whitens the patches before the weights are applied:

    mu  = mean of the patches
    Cov = mean of (patch - mu)(patch - mu)^T + eps I
    D   = Cov^(-1/2)                                    (`inverse_sqrt`)
    y   = W D (patch - mu) + b = (W D) patch + (b - W D mu)

so that the layer is an ordinary convolution with the weight W D and the bias b - W D mu (`fold_weight`).

Shapes, with C channels, G conv groups and kernel k_h x k_w. A *block* is B channels; its patches have
F = B k_h k_w features.

- patches      (F, rows), or (M, F, rows) for a grouped convolution
- mean         (F,)       or (M F,)
- deconv D     (F, F)     or (M, F, F)

One D serves all C / B blocks of an ungrouped convolution: their patches are stacked as further rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from norm import leading, moments, processes
from norm.matmul import fused, matmul
from norm.products import FEW_STEPS, Products, full_precision, root_dtype, without_autocast
from norm.sampling import Sampler, Windows
from norm.strides import Grouping

_SPECTRAL_SIZE = 128
"""Features from which an eigendecomposition on a CPU is faster than the products. It is taken for `FEW_STEPS`."""
_CLOSE = 1e-6
"""Eigenvalues over |A|_F that differ by less have no divided difference that could be computed."""


def mean_and_covariance(patches: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance + eps I over the rows, in the same dtype: (..., F, rows) -> (..., F), (..., F, F)."""
    mean = patches.mean(-1)
    centred = patches - mean.unsqueeze(-1)
    eye = torch.eye(patches.shape[-2], dtype=patches.dtype, device=patches.device)
    return mean, fused(eye, centred, centred.mT, eps, 1 / patches.shape[-1])


def over_processes(patches: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`mean_and_covariance` of the patches of all processes, and how many rows these have, ().

    Two sums: the covariance is taken around the common mean, so that nothing cancels.
    """
    count = patches.new_full((1,), patches.shape[-1])
    sums = processes.total(torch.cat([patches.sum(-1).flatten(), count]))
    rows = sums[-1]
    mean = (sums[:-1] / rows).view(patches.shape[:-1])
    centred = patches - mean.unsqueeze(-1)
    covariance = processes.unpack(
        processes.total(processes.pack(matmul(centred, centred.mT))) / rows, patches.shape[-2]
    )
    covariance.diagonal(dim1=-2, dim2=-1).add_(eps)
    return mean, covariance, rows


class _Moments(torch.autograd.Function):
    """x as it is, and `mean_and_covariance` of its patches, with a gradient of one product.

    The gradient gathers the patches again from x, which the layer keeps anyway: with G the covariance's gradient and g
    the mean's, a patch gets ((G + G^T)(patch - mu) + g) / rows; the centred patches sum to zero, so that no term comes
    from mu in the covariance. It is added to the gradient that x has from the layer, in place: nobody else has that
    one, since x as returned goes to the layer alone. With `joint`, rows, G and g are summed over the processes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sampler: Sampler, eps: float, joint: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        patches, rows = sampler.gather(x).to(dtype), None
        if joint:
            mean, covariance, rows = over_processes(patches, eps)
        else:
            mean, covariance = mean_and_covariance(patches, eps)
        ctx.save_for_backward(x, mean, rows)
        ctx.sampler = sampler
        return _alias(x), mean, covariance

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, to_x: Tensor, to_mean: Tensor, to_covariance: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rows = ctx.saved_tensors
        to_covariance = to_covariance + to_covariance.mT
        if rows is not None:
            packed = processes.pack(to_covariance)
            sums = processes.total_(torch.cat([to_mean.flatten(), packed.flatten()]))
            to_mean = sums[: to_mean.numel()].view_as(to_mean)
            to_covariance = processes.unpack(sums[to_mean.numel() :].view_as(packed), mean.shape[-1])
        centred = ctx.sampler.gather(x).to(mean.dtype) - mean.unsqueeze(-1)
        if centred.shape[-1] == 0:  # other processes have all images that are taken
            return to_x, None, None, None, None
        to_mean, to_covariance, three = (
            each.reshape(-1, *each.shape[-2:]) for each in (to_mean.unsqueeze(-1), to_covariance, centred)
        )
        grad = fused(to_mean, to_covariance, three, 1.0, 1.0).div_(centred.shape[-1] if rows is None else rows)
        if torch.compiler.is_compiling():  # which takes nothing that is overwritten
            return to_x + ctx.sampler.spread(grad.view(centred.shape), x.shape).to(to_x.dtype), None, None, None, None
        ctx.sampler.scatter_add_(to_x, grad.view(centred.shape))
        return to_x, None, None, None, None


class _MeanAndScale(torch.autograd.Function):
    """x as it is; mean of its patches, and scale s = mean((patch - mu)^2) + eps over rows and features.

    A patch's gradient is (g_mu + 2 g_s (patch - mu) / F) / rows, added as in `_Moments`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sampler: Sampler, eps: float, joint: bool) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = moments.mean_and_variance(x, sampler)
        rows = None
        if joint:
            mean, variance, rows = moments.over_processes(mean, variance, sampler.rows(x.shape))
        ctx.save_for_backward(x, mean, rows)
        ctx.sampler = sampler
        return _alias(x), mean, variance + eps

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, to_x: Tensor, to_mean: Tensor, to_scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rows = ctx.saved_tensors
        if rows is None:
            rows = ctx.sampler.rows(x.shape)
        else:
            sums = processes.total_(torch.cat([to_mean.flatten(), to_scale.flatten()]))
            to_mean, to_scale = sums[: mean.numel()].view_as(to_mean), sums[mean.numel() :].view_as(to_scale)
        factor = to_scale * (2 / (mean.shape[-1] * rows))
        moments.add_scaled_(to_x, x, ctx.sampler, factor, to_mean / rows - factor.unsqueeze(-1) * mean)
        return to_x, None, None, None


def mean_and_scale(x: Tensor, sampler: Sampler, eps: float, joint: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x, for the layer to go on with; mean (F,) or (M F,), scale () or (M,), of all processes' patches if `joint`.
    float32 under autocast, float64 stays float64."""
    with without_autocast(x.device):
        x, mean, scale = _MeanAndScale.apply(x, sampler, eps, joint)  # type: ignore[no-untyped-call]
        return x, mean.flatten(), scale


def _alias(x: Tensor) -> Tensor:
    """x with its strides. `view_as` gives a single image in channels_last others, with which the gradients of torch's
    grouped convolution are wrong on a CPU in float64 (2.14)."""
    return torch.ops.aten.alias(x)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def inverse_sqrt(matrix: Tensor, n_iter: int) -> Tensor:
    """`n_iter` Newton-Schulz steps towards A^(-1/2) of symmetric positive definite A, (..., F, F).

    Y0 = A / |A|_F, Z0 = I; T = (3 I - Z Y) / 2, Y = Y T, Z = T Z; the result is Z / sqrt(|A|_F). Five steps are not
    converged for an ill-conditioned A; that is part of the method: no direction is amplified by more than
    1.5^n_iter / sqrt(|A|_F). The first step needs no product with Z0, the last none for Y: 3 n_iter - 3 products.
    Large matrices on a CPU take the same steps on their eigenvalues (`_Spectral`). In the dtype of `matrix`, computed
    in `root_dtype`.
    """
    large = matrix.device.type == "cpu" and matrix.shape[-1] >= _SPECTRAL_SIZE and n_iter <= FEW_STEPS
    large = large and not torch.compiler.is_compiling()
    # what is not finite goes through the products, which hand it on as every layer does
    if large and bool(torch.linalg.matrix_norm(matrix.detach()).isfinite().all()):
        root: Tensor = _Spectral.apply(matrix, n_iter)  # type: ignore[no-untyped-call]
        return root
    wide = matrix.to(root_dtype(matrix, matrix.shape[-1], n_iter))
    products: Tensor = Products.apply(wide, n_iter)  # type: ignore[no-untyped-call]
    return products.to(matrix.dtype)


class _Spectral(torch.autograd.Function):
    """The Newton-Schulz steps as p on eigenvalues: A / |A|_F = V diag(x) V^T, D = V diag(p(x)) V^T / sqrt(|A|_F).

    One eigendecomposition and one product, and four products for the gradient, in place of 3 n_iter - 3 and twice as
    many; V and x are all that is kept. In the basis V, a gradient G of V diag(p(x)) V^T becomes P o G with
    P_ij = (p(x_i) - p(x_j)) / (x_i - x_j), in float64, and (p'(x_i) + p'(x_j)) / 2 where both are close together: up to
    8 steps that is right to 1e-6, and equal to the products within rounding.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, n_iter: int) -> Tensor:
        size = torch.linalg.matrix_norm(matrix)
        values, vectors = torch.linalg.eigh(matrix / size[..., None, None])
        z, _ = _newton_schulz(values, n_iter)
        ctx.save_for_backward(size, values, vectors)
        ctx.n_iter = n_iter
        return matmul(vectors * (z * size.rsqrt().unsqueeze(-1)).unsqueeze(-2), vectors.mT)

    @staticmethod
    @once_differentiable  # the decomposition is taken as constant, which a second derivative could not be told
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        size, values, vectors = ctx.saved_tensors
        x = values.double()
        z, slope = _newton_schulz(x, ctx.n_iter)
        apart = x.unsqueeze(-1) - x.unsqueeze(-2)
        means = (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2
        divided = torch.where(apart.abs() < _CLOSE, means, (z.unsqueeze(-1) - z.unsqueeze(-2)) / apart).to(grad.dtype)
        z = z.to(grad.dtype)
        inner = matmul(matmul(vectors.mT, grad), vectors) * size.rsqrt()[..., None, None]
        through_root = -0.5 * (inner.diagonal(dim1=-2, dim2=-1) * z).sum(-1)  # |A|_F under the root, times |A|_F
        inner = divided * inner
        through_x = -(inner.diagonal(dim1=-2, dim2=-1) * values).sum(-1)  # |A|_F below A, times |A|_F
        inner.diagonal(dim1=-2, dim2=-1).add_((through_x + through_root).unsqueeze(-1) * values)
        return matmul(matmul(vectors, inner / size[..., None, None]), vectors.mT), None


def _newton_schulz(x: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """p(x) and its derivative, elementwise."""
    y, z = x, torch.ones_like(x)
    dy, dz = torch.ones_like(x), torch.zeros_like(x)
    for _ in range(n_iter):
        t, dt = 1.5 - 0.5 * z * y, -0.5 * (dz * y + z * dy)
        dy, dz = dy * t + y * dt, dt * z + t * dz
        y, z = y * t, t * z
    return z, dz


def statistics(
    x: Tensor, sampler: Sampler, eps: float, n_iter: int, joint: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x, for the layer to go on with, and mean (F,) or (M F,) and deconv D of its patches, those of all processes if
    `joint`.

    float32 under autocast, float64 stays float64; see `root_dtype`.
    """
    with without_autocast(x.device):
        wide = torch.promote_types(x.dtype, torch.float32)
        dtype = root_dtype(x, sampler.features, n_iter)
        x, mean, covariance = _Moments.apply(x, sampler, eps, joint, dtype)  # type: ignore[no-untyped-call]
        deconv = inverse_sqrt(covariance, n_iter)
        if dtype != wide:  # an overflow of the layer's own dtype is not to pass for statistics
            overflow = covariance.detach().diagonal(dim1=-2, dim2=-1).sum(-1).to(wide)
            deconv = deconv + 0 * overflow[..., None, None]
        return x, mean.flatten().to(wide), deconv.to(wide)


def traced_mean_and_scale(x: Tensor, sampler: Sampler, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The patches, (F, rows) or (M, F, rows), and `mean_and_scale`, for the compiler."""
    with without_autocast(x.device):
        if isinstance(sampler, Windows) and not sampler.interleaved(x.shape[1]):
            patches, mean, variance = moments.TracedMoments.apply(x, sampler)  # type: ignore[no-untyped-call]
            return patches, mean.flatten(), variance + eps
        patches = sampler.gather(x)
        each, mean = torch.var_mean(_wide(patches), -1, correction=0)
        return patches, mean.flatten(), each.mean(-1) + eps


def split_weight(weight: Tensor, features: int, matrices: int, grouping: Grouping) -> Tensor:
    """A weight (out, C / G, k_h, k_w) as rows that a D multiplies: (out C/B, F), or with M D's, one for each block of
    the conv groups, (M, out / G, F)."""
    if matrices > 1:
        blocks = weight[0].numel() // features
        return weight.reshape(matrices // blocks, -1, blocks, features).transpose(1, 2).reshape(matrices, -1, features)
    if grouping == "channel":
        return weight.reshape(-1, features)
    return weight.reshape(weight.shape[0], features, -1).transpose(1, 2).reshape(-1, features)


def merge_weight(rows: Tensor, shape: torch.Size, matrices: int, grouping: Grouping) -> Tensor:
    """The inverse of `split_weight`."""
    if matrices > 1:
        rows = rows.unflatten(0, (-1, math.prod(shape[1:]) // rows.shape[-1])).transpose(1, 2)
    elif grouping == "published":
        rows = rows.reshape(shape[0], -1, rows.shape[-1]).transpose(1, 2)
    return rows.reshape(shape)


def _over_blocks(each: Tensor, outputs: int) -> Tensor:
    """The sum of what the blocks of an output's channels give, (out C/B,) or (M, out / G), as `split_weight` has them;
    (out,)."""
    if each.ndim == 1:
        return each.view(outputs, -1).sum(1)
    return each.view(-1, each.numel() // outputs, each.shape[1]).sum(1).flatten()


def _to_blocks(each: Tensor, rows: torch.Size) -> Tensor:
    """The adjoint of `_over_blocks`, (..., 1), for rows (out C/B, F) or (M, out / G, F)."""
    if len(rows) == 2:
        return each.repeat_interleave(rows[0] // len(each)).unsqueeze(1)
    return each.view(-1, 1, rows[1], 1).expand(-1, rows[0] * rows[1] // len(each), -1, -1).reshape(*rows[:2], 1)


class Gradients(NamedTuple):
    """What `fold_gradient` finds; None for what has no gradient."""

    weight: Tensor
    mean: Tensor
    deconv: Tensor | None
    scale: Tensor | None


class Statistics(NamedTuple):
    """What whitens: the patches' mean (F,) or (M F,), and D, or M of them (`split_weight`).

    Without `scale`, D is `deconv` (F, F) or (M, F, F). With the patches' `scale`, () or (M,), `deconv` is D's shape:
    D = deconv / sqrt(scale). With `tilted` and `last` too, D is `leading.matrix` of few leading directions:
    `deconv` is their basis (F, r) or (M, F, r), like `tilted`, and `last` the gain of the rest, () or (M,).
    """

    mean: Tensor
    deconv: Tensor
    tilted: Tensor | None = None
    last: Tensor | None = None
    scale: Tensor | None = None

    def matrix(self) -> Tensor:
        """D itself."""
        if self.scale is None:
            return self.deconv
        if self.tilted is None:
            return self.deconv * self.scale.rsqrt()[..., None, None]
        return leading.matrix(self.deconv, self.tilted, self._factor())

    def times(self, rows: Tensor, in_place: bool = False) -> Tensor:
        """rows D, (m, F) or (M, m, F), in the dtype of rows; `in_place`: rows may be overwritten."""
        if self.tilted is None:
            return matmul(rows, self.matrix().to(rows.dtype))
        basis, tilted = self.deconv.to(rows.dtype), self.tilted.to(rows.dtype)
        return leading.times(rows, basis, tilted, self._factor().to(rows.dtype), in_place)

    def _factor(self) -> Tensor:
        assert self.last is not None and self.scale is not None
        return self.last * self.scale.rsqrt()


def fold_weight(
    weight: Tensor,
    bias: Tensor | None,
    found: Statistics,
    matrices: int,
    grouping: Grouping,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight W D and bias b - W D mu of the ordinary convolution or linear layer, in the dtype of the statistics; the
    product W D in `dtype`, if that is given."""
    mean, features = found.mean, found.deconv.shape[-2]
    with without_autocast(weight.device):
        folded = times_deconv(weight, found, matrices, grouping, dtype)
        rows = split_weight(folded, features, matrices, grouping).to(mean.dtype)
        mean = mean.view(matrices, features) if matrices > 1 else mean
        offset = _over_blocks((rows @ mean[..., None]).squeeze(-1), len(weight))
        return folded, -offset if bias is None else bias.to(offset.dtype) - offset


def times_deconv(
    weight: Tensor, found: Statistics, matrices: int, grouping: Grouping, dtype: torch.dtype | None = None
) -> Tensor:
    """W D, in this dtype or that of the statistics."""
    rows = split_weight(weight.to(dtype or found.deconv.dtype), found.deconv.shape[-2], matrices, grouping)
    return merge_weight(found.times(rows), weight.shape, matrices, grouping)


def fold_gradient(
    to_folded: Tensor,
    to_bias: Tensor,
    weight: Tensor,
    folded: Tensor,
    found: Statistics,
    matrices: int,
    grouping: Grouping,
) -> Gradients:
    """Gradients of `fold_weight` in closed form.

    Args:
        to_folded, to_bias: gradients of what `fold_weight` returned; `to_folded` may be overwritten.
        weight: what was folded.
        folded: the weight that `fold_weight` returned, whose dtype the products with D and with W have.
    """
    mean, deconv, scale = found.mean, found.deconv, found.scale
    features, dtype = deconv.shape[-2], folded.dtype
    # rearranged before they are widened: half as much to move under autocast
    rows = split_weight(to_folded, features, matrices, grouping).to(mean.dtype)
    products = split_weight(folded, features, matrices, grouping).to(mean.dtype)
    to_offset = -_to_blocks(to_bias.to(mean.dtype), rows.shape)
    to_mean = (products.mT @ to_offset).flatten()
    if matrices > 1:
        rows.baddbmm_(to_offset, mean.view(matrices, 1, features))
    else:
        rows.addr_(to_offset[:, 0], mean)
    if scale is None:
        rows = rows.to(dtype)
        to_deconv = matmul(split_weight(weight.to(dtype), features, matrices, grouping).mT, rows).to(deconv.dtype)
        rows = matmul(rows, deconv.to(dtype).mT)
        return Gradients(merge_weight(rows, weight.shape, matrices, grouping), to_mean, to_deconv, None)
    flat = (-1,) if matrices == 1 else (matrices, -1)
    to_scale = torch.linalg.vecdot(rows.reshape(flat), products.reshape(flat)) / scale * -0.5
    rows = found.times(rows.to(dtype), in_place=True)
    return Gradients(merge_weight(rows, weight.shape, matrices, grouping), to_mean, None, to_scale)


def unfold_weight(
    weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, matrices: int, grouping: Grouping
) -> tuple[Tensor, Tensor]:
    """The inverse of `fold_weight`, in float64: the W, b that fold to `weight`, `bias`."""
    mean, deconv = mean.double(), deconv.double()
    features = deconv.shape[-1]
    rows = split_weight(weight.double(), features, matrices, grouping)
    new_rows = torch.linalg.solve(deconv, rows, left=False)
    mean = mean.view(matrices, features) if matrices > 1 else mean
    offset = _over_blocks((rows @ mean[..., None]).squeeze(-1), len(weight))
    new_bias = offset if bias is None else bias.double() + offset
    return merge_weight(new_rows, weight.shape, matrices, grouping), new_bias

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

- patches      (F, rows), or (G, F, rows) for a grouped convolution
- mean         (F,)       or (G F,)
- deconv D     (F, F)     or (G, F, F)

One D serves all C / B blocks of an ungrouped convolution: their patches are stacked as further rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Grouping = Literal["channel", "published"]
Pair = tuple[int, int]
_SPECTRAL_SIZE = 128
"""Features from which an eigendecomposition on a CPU is faster than the products."""
_SMALL_MAP = 64
_FEWEST_WINDOWS = 36


def resolve_block(channels: int, block: int) -> int:
    """Channels a block holds: `block`, at most `channels`; gcd of both where `block` does not divide `channels`."""
    return channels if block > channels else math.gcd(block, channels)


def output_size(size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Positions of a convolution in both directions."""
    each = zip(size, kernel_size, stride, padding, dilation, strict=True)
    height, width = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in each)
    return height, width


def dense_strides(positions: Pair, most: int) -> Pair:
    """Sampling strides that leave no small map with a corner or two: where the convolution has up to 8 positions in a
    direction every one is taken, up to 16 every second, beyond that every `most`-th; never fewer than every `most`-th.

    At stride 3 a 1x1 convolution sees one of eight images in an image-pooling branch: a covariance of one row is eps I,
    and the layer amplifies by eps^(-1/2).
    """
    height, width = (min(most, 1 if side <= 8 else 2 if side <= 16 else most) for side in positions)
    return height, width


def thin_out(images: int, blocks: int, positions: Pair, strides: Pair, most_rows: int) -> tuple[int, Pair]:
    """(take every so many-th image, sampling strides) that leave about `most_rows` rows, less than twice as many on
    small maps.

    Statistics depend on a window's place, so small maps (up to 64 windows) keep all windows and lose images. On larger
    maps an image's mean and scale are not the batch's: all images stay, and the grid gets coarser, down to 36 windows.
    """

    def windows(each: Pair) -> int:
        return math.prod(-(-side // step) for side, step in zip(positions, each, strict=True))

    if windows(strides) > _SMALL_MAP:
        while images * blocks * windows(strides) > most_rows:
            wider = (strides[0] + 1, strides[1] + 1)
            if windows(wider) < _FEWEST_WINDOWS:
                break
            strides = wider
        return 1, strides
    return max(1, min(images, images * blocks * windows(strides) // most_rows)), strides


def sample(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, sampling_stride: Pair) -> Tensor:
    """The patches that the statistics are taken from: (N, C, H, W) -> (N', C k_h k_w, rows), channel-major features.

    Kernels larger than 1x1: the zero-padded windows at `sampling_stride` times the stride of the convolution.
    1x1: every (product of both strides in both directions)-th pixel of the flattened N x H x W list, whatever the
    padding.
    Only what is sampled is gathered.
    """
    step = (sampling_stride[0] * stride[0], sampling_stride[1] * stride[1])
    if kernel_size != (1, 1):
        return F.unfold(x, kernel_size, dilation, padding, step)
    n, c, h, w = x.shape
    every = step[0] * step[1]
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1, c)[::every].t().unsqueeze(0)
    pixels = x.flatten(2)
    if (h * w) % every == 0:
        return pixels[:, :, ::every]
    index = torch.arange(0, n * h * w, every, device=x.device)
    return pixels[index.div(h * w, rounding_mode="floor"), :, index % (h * w)].t().unsqueeze(0)


def group_patches(patches: Tensor, features: int, groups: int, grouping: Grouping) -> Tensor:
    """(N, C k_h k_w, rows) -> (F, N C/B rows), or (G, F, N rows) for a grouped convolution.

    grouping "channel": a block is B neighbouring channels, as in the paper. "published": block j holds the features
    whose channel-major index is j modulo C / B, as the authors' code reshapes them.
    """
    n, _, rows = patches.shape
    if groups > 1:
        return patches.reshape(n, groups, features, rows).permute(1, 2, 0, 3).reshape(groups, features, -1)
    if grouping == "channel":
        return patches.reshape(n, -1, features, rows).permute(2, 0, 1, 3).reshape(features, -1)
    return patches.reshape(n, features, -1, rows).permute(1, 0, 2, 3).reshape(features, -1)


def mean_and_covariance(patches: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance + eps I over the rows, in the same dtype: (..., F, rows) -> (..., F), (..., F, F)."""
    mean = patches.mean(-1)
    centred = patches - mean.unsqueeze(-1)
    eye = torch.eye(patches.shape[-2], dtype=patches.dtype, device=patches.device)
    return mean, centred @ centred.mT / patches.shape[-1] + eps * eye


class _Moments(torch.autograd.Function):
    """`mean_and_covariance` of patches that are gathered from x, with a gradient of one product.

    The gradient gathers the patches again from x, which the convolution keeps anyway: with G the covariance's gradient
    and g the mean's, a patch gets (G + G^T)(patch - mu) / rows + g / rows; the centred patches sum to zero, so that no
    term comes from mu in the covariance.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Callable[[Tensor], Tensor], eps: float) -> tuple[Tensor, Tensor]:
        mean, covariance = mean_and_covariance(_wide(gather(x)), eps)
        ctx.save_for_backward(x, mean)
        ctx.gather = gather
        return mean, covariance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_covariance: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            patches = ctx.gather(source)
        centred = _wide(patches.detach()) - mean.unsqueeze(-1)
        grad = torch.baddbmm(
            to_mean.reshape(-1, to_mean.shape[-1], 1),
            *((each.reshape(-1, *each.shape[-2:])) for each in (to_covariance + to_covariance.mT, centred)),
        ).div_(patches.shape[-1])
        (to_x,) = torch.autograd.grad(patches, source, grad.view(patches.shape).to(patches.dtype))
        return to_x, None, None


class _MeanAndScale(torch.autograd.Function):
    """Mean, scale s = mean((patch - mu)^2) + eps and shape Cov / s of patches that are gathered from x.

    Mean and scale have gradients, the shape has none: no product of two F x F matrices is left. A patch gets
    (g_mu + 2 g_s (patch - mu) / F) / rows. Without `shape` the covariance is not computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gather: Callable[[Tensor], Tensor], eps: float, shape: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        patches = _wide(gather(x))
        mean = patches.mean(-1)
        centred = patches - mean.unsqueeze(-1)
        scale = centred.square().mean((-2, -1)) + eps
        covariance = None
        if shape:
            covariance = (centred @ centred.mT).div_(patches.shape[-1])
            covariance.diagonal(dim1=-2, dim2=-1).add_(eps)
            covariance.div_(scale[..., None, None])
            ctx.mark_non_differentiable(covariance)
        ctx.save_for_backward(x, mean)
        ctx.gather = gather
        return mean, scale, covariance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_scale: Tensor, _: None) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            patches = ctx.gather(source)
        factor = to_scale[..., None, None] * (2 / patches.shape[-2])
        grad = (_wide(patches.detach()) - mean.unsqueeze(-1)).mul_(factor).add_(to_mean.unsqueeze(-1))
        grad.div_(patches.shape[-1])
        (to_x,) = torch.autograd.grad(patches, source, grad.to(patches.dtype))
        return to_x, None, None, None


def mean_and_scale(
    x: Tensor, gather: Callable[[Tensor], Tensor], eps: float, shape: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean (F,) or (G F,), scale () or (G,), and the covariance over the scale, which has no gradient, if `shape`.

    float32 under autocast, float64 stays float64; for `gather` see `statistics`.
    """
    with torch.autocast(device_type=x.device.type, enabled=False):
        mean, scale, covariance = _MeanAndScale.apply(x, gather, eps, shape)  # type: ignore[no-untyped-call]
        return mean.flatten(), scale, covariance


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def inverse_sqrt(matrix: Tensor, n_iter: int) -> Tensor:
    """`n_iter` Newton-Schulz steps towards A^(-1/2) of symmetric positive definite A, (..., F, F).

    Y0 = A / |A|_F, Z0 = I; T = (3 I - Z Y) / 2, Y = Y T, Z = T Z; the result is Z / sqrt(|A|_F). Five steps are not
    converged for an ill-conditioned A; that is part of the method: no direction is amplified by more than
    1.5^n_iter / sqrt(|A|_F). The first step needs no product with Z0, the last none for Y: 3 n_iter - 3 products.
    Large matrices on a CPU take the same steps on their eigenvalues (`_Spectral`).
    """
    large = matrix.device.type == "cpu" and matrix.shape[-1] >= _SPECTRAL_SIZE and not torch.compiler.is_compiling()
    # what is not finite goes through the products, which hand it on as every layer does
    if large and bool(torch.linalg.matrix_norm(matrix.detach()).isfinite().all()):
        root: Tensor = _Spectral.apply(matrix, n_iter)  # type: ignore[no-untyped-call]
        return root
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    scale = torch.linalg.matrix_norm(matrix, keepdim=True)
    y = matrix / scale
    t = 1.5 * eye - 0.5 * y
    z = t
    for _ in range(n_iter - 1):
        y = y @ t
        t = 1.5 * eye - 0.5 * (z @ y)
        z = t @ z
    return z * scale.rsqrt()


class _Spectral(torch.autograd.Function):
    """The Newton-Schulz steps as p on eigenvalues: A / |A|_F = V diag(x) V^T, D = V diag(p(x)) V^T / sqrt(|A|_F).

    One eigendecomposition and one product, and four products for the gradient, in place of 3 n_iter - 3 and twice as
    many; V and x are all that is kept. In the basis V, a gradient G of V diag(p(x)) V^T becomes P o G with
    P_ij = (p(x_i) - p(x_j)) / (x_i - x_j), which is computed without cancellation by the same recursion, with the
    product rule of divided differences [f g]_ij = f_i [g]_ij + [f]_ij g_j. Equal to the products within rounding; many
    steps amplify the rounding of small eigenvalues, so they are computed in float64.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, n_iter: int) -> Tensor:
        wide = matrix.double() if n_iter > 8 else matrix
        size = torch.linalg.matrix_norm(wide)
        values, vectors = torch.linalg.eigh(wide / size[..., None, None])
        y, z = values, torch.ones_like(values)
        for _ in range(n_iter):
            t = 1.5 - 0.5 * z * y
            y, z = y * t, t * z
        ctx.save_for_backward(size, values, vectors)
        ctx.n_iter = n_iter
        return ((vectors * (z * size.rsqrt().unsqueeze(-1)).unsqueeze(-2)) @ vectors.mT).to(matrix.dtype)

    @staticmethod
    @once_differentiable  # the decomposition is taken as constant, which a second derivative could not be told
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        size, values, vectors = ctx.saved_tensors
        y, z = values, torch.ones_like(values)
        dy, dz = torch.ones_like(vectors), torch.zeros_like(vectors)
        for _ in range(ctx.n_iter):
            t = 1.5 - 0.5 * z * y
            dt = -0.5 * (z.unsqueeze(-1) * dy + dz * y.unsqueeze(-2))
            dy, dz = y.unsqueeze(-1) * dt + dy * t.unsqueeze(-2), t.unsqueeze(-1) * dz + dt * z.unsqueeze(-2)
            y, z = y * t, t * z
        inner = (vectors.mT @ grad.to(vectors.dtype) @ vectors) * size.rsqrt()[..., None, None]
        through_root = -0.5 * (inner.diagonal(dim1=-2, dim2=-1) * z).sum(-1)  # |A|_F under the root, times |A|_F
        inner = dz * inner
        through_x = -(inner.diagonal(dim1=-2, dim2=-1) * values).sum(-1)  # |A|_F below A, times |A|_F
        inner.diagonal(dim1=-2, dim2=-1).add_((through_x + through_root).unsqueeze(-1) * values)
        return (vectors @ (inner / size[..., None, None]) @ vectors.mT).to(grad.dtype), None


def statistics(x: Tensor, gather: Callable[[Tensor], Tensor], eps: float, n_iter: int) -> tuple[Tensor, Tensor]:
    """Mean (F,) or (G F,) and deconv D of the patches `gather(x)`, (F, rows) or (G, F, rows), where `gather` is linear.

    float32 under autocast, float64 stays float64.
    """
    with torch.autocast(device_type=x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # the compiler saves what it likes and cuts the products itself
            mean, covariance = mean_and_covariance(_wide(gather(x)), eps)
        else:
            mean, covariance = _Moments.apply(x, gather, eps)  # type: ignore[no-untyped-call]
        return mean.flatten(), inverse_sqrt(covariance, n_iter)


def split_weight(weight: Tensor, features: int, groups: int, grouping: Grouping) -> Tensor:
    """A weight (out, C / G, k_h, k_w) as rows that a D multiplies: (out C/B, F), or (G, out / G, F)."""
    if groups > 1:
        return weight.reshape(groups, -1, features)
    if grouping == "channel":
        return weight.reshape(-1, features)
    return weight.reshape(weight.shape[0], features, -1).transpose(1, 2).reshape(-1, features)


def merge_weight(rows: Tensor, shape: torch.Size, groups: int, grouping: Grouping) -> Tensor:
    """The inverse of `split_weight`."""
    if groups == 1 and grouping == "published":
        rows = rows.reshape(shape[0], -1, rows.shape[-1]).transpose(1, 2)
    return rows.reshape(shape)


def fold_weight(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    deconv: Tensor,
    groups: int,
    grouping: Grouping,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight W D and bias b - W D mu of the ordinary convolution or linear layer, in the dtype of the statistics.

    With `scale` s, () or (G,), D is deconv / sqrt(s).
    """
    features = deconv.shape[-1]
    with torch.autocast(device_type=weight.device.type, enabled=False):
        rows = split_weight(weight.to(deconv.dtype), features, groups, grouping) @ deconv
        if scale is not None:
            rows = rows * scale.rsqrt().view(-1, *[1] * (rows.ndim - 1))
        if groups > 1:
            offset = (rows @ mean.view(groups, features, 1)).flatten()
        else:
            offset = (rows @ mean).view(weight.shape[0], -1).sum(1)
        new_bias = -offset if bias is None else bias.to(deconv.dtype) - offset
        return merge_weight(rows, weight.shape, groups, grouping), new_bias


def unfold_weight(
    weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, groups: int, grouping: Grouping
) -> tuple[Tensor, Tensor]:
    """The inverse of `fold_weight`, in float64: the W, b that fold to `weight`, `bias`."""
    mean, deconv = mean.double(), deconv.double()
    features = deconv.shape[-1]
    rows = split_weight(weight.double(), features, groups, grouping)
    new_rows = torch.linalg.solve(deconv, rows, left=False)
    if groups > 1:
        offset = (rows @ mean.view(groups, features, 1)).flatten()
    else:
        offset = (rows @ mean).view(weight.shape[0], -1).sum(1)
    new_bias = offset if bias is None else bias.double() + offset
    return merge_weight(new_rows, weight.shape, groups, grouping), new_bias

"""Mean and variance of sampled patches, and their gradient, without making the patches where that is cheaper.

A window's pixel (channel c, kernel place i, j) lies at the map's place (h, w) where marks_i[h] marks_j[w] = 1
(`Windows.marks`). So a sum over windows is one over the map, weighted by those marks, after the images and the blocks
of channels are summed up: two passes over the input, where patches would copy most pixels several times. A GPU copies
faster than it starts all that: there, unless they are many, patches are taken as `F.unfold` leaves them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from norm import processes
from norm.products import full_precision
from norm.sampling import Sampler, Windows

_COVERED = 0.25
"""Sum over the map where the sampled windows hold at least this share of its pixels, counted with repetition."""
_MANY = 2**24
"""Values of all patches, from which a GPU sums over the map as well."""


def _over_the_map(x: Tensor, sampler: Sampler) -> bool:
    if not isinstance(sampler, Windows) or sampler.covered(x.shape) < _COVERED or sampler.rows(x.shape) == 0:
        return False
    return x.device.type == "cpu" or sampler.rows(x.shape) * sampler.features * sampler.matrices > _MANY


def mean_and_variance(x: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Mean (F,) or (M, F) of the patches; variance () or (M,), the mean of (patch - mean)^2 over rows and features.

    In float32, or float64 if x is; zeros where no patch is taken, since other processes have all of them.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not _over_the_map(x, sampler):
        if sampler.rows(x.shape) and x.device.type != "cpu":
            return of_pieces(x, sampler, dtype)
        patches = sampler.gather(x).to(dtype)
        if patches.shape[-1] == 0:
            return patches.sum(-1), patches.sum((-2, -1))
        mean = patches.mean(-1)
        return mean, (patches - mean.unsqueeze(-1)).square_().mean((-2, -1))
    assert isinstance(sampler, Windows)  # said by _over_the_map
    x = sampler.blocks(x)
    images, blocks, _, height, width = x.shape
    down, across = sampler.marks((height, width), x.device, dtype)
    windows = images * blocks * sampler.count((height, width))
    total = _over_images(x, dtype)
    mean = torch.einsum("chw,ih,jw->cij", total, down, across).div_(windows)
    # Around the channel's mean M, which leaves little to cancel. With p the share of windows with this kernel place on
    # the map, and off = mean - p M, it is mean((x - M)^2) - off^2 + (1 - p) M (p M + 2 off). The last term is what the
    # zeros add, exactly nothing for places that are always on the map or always in the padding.
    middle = (total.mean((-2, -1)) / (images * blocks))[:, None, None]
    squares = _over_images((x - middle).square_(), dtype)
    times = down.sum(0)[:, None] * across.sum(0)
    share = (down.sum(1)[:, None] * across.sum(1)).mul_(images * blocks).div_(windows)
    off = mean - share * middle
    zeros = (1 - share) * middle * (share * middle + 2 * off)
    spread = (squares * times).sum((-2, -1)).div_(windows) + (zeros - off.square()).sum((-2, -1))
    if sampler.matrices == 1:
        return mean.flatten(), spread.sum() / sampler.features
    # einsum chooses the layout of its result
    return mean.reshape(sampler.matrices, -1), spread.reshape(sampler.matrices, -1).sum(-1) / sampler.features


def _over_images(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over images and blocks, (N, blocks, C, H, W) -> (C, H, W), written in the order in which channels_last is
    read: a CPU takes several times as long otherwise."""
    if x.stride(2) != 1:
        return x.sum((0, 1), dtype=dtype)
    return x.permute(0, 3, 4, 1, 2).sum(0, dtype=dtype).sum(2).permute(2, 0, 1)


def of_pieces(x: Tensor, sampler: Sampler, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`mean_and_variance`, in few kernels."""
    apart, others = sampler.apart(sampler.pieces(x).to(dtype))
    each, mean = torch.var_mean(apart, others, correction=0)
    return mean, each.mean(-1)


def over_processes(mean: Tensor, variance: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """`mean_and_variance` of the patches of all processes, from those of this one's `rows`; and how many there are, ().

    One sum, in float64, so that nothing is lost where the mean is much larger than the spread.
    """
    wide = mean.double()
    squares = variance.double() + wide.square().mean(-1)
    each = torch.cat([wide.flatten(), squares.flatten(), wide.new_ones(1)])
    sums = processes.total_(each * rows)
    all_rows = sums[-1]
    wide, squares = ((part / all_rows) for part in (sums[: mean.numel()].view_as(mean), sums[mean.numel() : -1]))
    spread = squares.view_as(variance) - wide.square().mean(-1)
    return wide.to(mean.dtype), spread.clamp_(min=0).to(mean.dtype), all_rows.to(mean.dtype)


def add_scaled_(grad: Tensor, x: Tensor, sampler: Sampler, factor: Tensor, shift: Tensor) -> None:
    """Add factor patch + shift to `grad`, a gradient of x, in place, for each patch where it comes from.

    factor () or (M,), shift (F,) or (M, F).
    """
    if not _over_the_map(x, sampler):
        if sampler.rows(x.shape) and x.device.type != "cpu":
            add_to_pieces_(grad, x, sampler, factor, shift)
            return
        patches = sampler.gather(x).to(shift.dtype)
        sampler.scatter_add_(grad, torch.addcmul(shift.unsqueeze(-1), patches, factor[..., None, None]))
        return
    assert isinstance(sampler, Windows)  # said by _over_the_map
    x, grad = sampler.blocks(x), sampler.blocks(grad)
    channels, height, width = x.shape[2:]
    down, across = sampler.marks((height, width), x.device, shift.dtype)
    times = down.sum(0)[:, None] * across.sum(0)
    if sampler.matrices > 1:
        factor = factor.repeat_interleave(channels // sampler.matrices)[:, None, None]
    constant = torch.einsum("cij,ih,jw->chw", shift.reshape(channels, len(down), len(across)), down, across)
    # in the order of grad: a CPU adds what lies in another order many times slower
    constant = torch.empty_like(grad[0, 0]).copy_(constant)
    grad.addcmul_(x.to(grad.dtype), (times * factor).to(grad.dtype)).add_(constant)


def add_to_pieces_(grad: Tensor, x: Tensor, sampler: Sampler, factor: Tensor, shift: Tensor) -> None:
    """`add_scaled_`, in few kernels."""
    pieces = sampler.pieces(x).to(shift.dtype)
    apart, others = sampler.apart(pieces)
    behind = 3 - max({1, 2} - set(others))  # dimensions after the features
    each = torch.addcmul(shift.view(*shift.shape, *[1] * behind), apart, factor.view(-1, 1, 1))
    sampler.add_pieces_(grad, each.reshape(pieces.shape))


class TracedMoments(torch.autograd.Function):
    """Patches, and their `mean_and_variance`, for the compiler: the gradient is an expression of each pixel by itself,
    which goes into the kernel of what stands before the layer. That of `F.unfold` is a scatter into zeros.

    Not for interleaved blocks (`Windows.interleaved`). The patches are given without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        patches = windows.gather(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        each, mean = torch.var_mean(patches.to(dtype), -1, correction=0)
        ctx.save_for_backward(x, mean)
        ctx.windows = windows
        ctx.mark_non_differentiable(patches)
        return patches, mean, each.mean(-1)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, _: Tensor, to_mean: Tensor, to_variance: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        rows = ctx.windows.rows(x.shape)
        factor = to_variance * (2 / (mean.shape[-1] * rows))
        return scaled_everywhere(x, ctx.windows, factor, to_mean / rows - factor.unsqueeze(-1) * mean), None


def scaled_everywhere(x: Tensor, windows: Windows, factor: Tensor, shift: Tensor) -> Tensor:
    """What `add_scaled_` adds, as a tensor like x."""
    taken = windows.taken_images(len(x), x.device)[:, None, None, None, None]
    size = (x.shape[2], x.shape[3])
    if windows.listed:
        taken = windows.taken_pixels(x.shape, x.device)[:, None]
    x = x.unflatten(1, (-1, windows.channels(x.shape[1])))
    each = shift.reshape(x.shape[2], *windows.kernel_size, 1, 1)
    if windows.matrices > 1:
        factor = factor.repeat_interleave(x.shape[2] // windows.matrices)[:, None, None]
    if windows.listed:
        found = x * factor + each[:, 0, 0]
    else:
        down, across = windows.marks(size, x.device, shift.dtype)
        places = down[:, None, :, None] * across[None, :, None, :]
        found = x * (down.sum(0)[:, None] * across.sum(0) * factor) + (each * places).sum((1, 2))
    return torch.where(taken, found, 0).to(x.dtype).flatten(1, 2)

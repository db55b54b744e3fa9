"""`ChannelDeconv` whitens the channels of a feature map or vector and leaves the layers around it alone."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from norm import processes, whitening
from norm.checks import NormError, check_options
from norm.processes import Traffic
from norm.products import product, without_autocast
from norm.sampling import Rows
from norm.state import Whitening
from norm.strides import Grouping


class ChannelDeconv(Whitening):
    """Whitens the channels of a feature map, or the features of a vector, in blocks; it has no weights.

    The first C - C % block channels are whitened with one D for all blocks; what is left is standardised with one mean
    and variance. Statistics come from every `sampling_stride`^2-th element of a block's flattened (blocks, N, H, W)
    list, from all where H or W is smaller than the stride. The first training batch sets the running averages.

    Args:
        block: channels whitened together, at most the channels of the input.
        n_iter, eps, momentum, sampling_stride: as in FastDeconv.
        grouping: "channel": blocks of neighbouring channels. "published": block j holds the channels whose index is j
            modulo C / block.
        features_last: the channels stand in the last dimension, as for a Linear, and every vector is a row.
        sync: in training, take the statistics from the elements of all processes (`norm.processes`): n processes with b
            vectors each compute what one does with n b. Of feature maps each takes its own every so many-th element.
        device, dtype: of the statistics; float32 or float64.

    Shape: (N, C, H, W) or (N, C), kept; with features_last (..., C).

    Raises:
        NormError: an option out of range, an input of another rank or with fewer than `block` channels, or `.half()`.
    """

    running_deconv: Tensor
    rest_mean: Tensor
    rest_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        block: int = 64,
        *,
        n_iter: int = 5,
        eps: float = 1e-2,
        momentum: float = 0.1,
        sampling_stride: int = 3,
        grouping: Grouping = "channel",
        features_last: bool = False,
        sync: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(block, n_iter, eps, momentum, sampling_stride)
        super().__init__()
        self.block = self.root_size = block
        self.n_iter = n_iter
        self.eps = eps
        self.momentum = momentum
        self.sampling_stride = sampling_stride
        self.grouping: Grouping = grouping
        self.features_last = features_last
        self.sync = sync
        sizes: dict[str, tuple[int, ...]] = {"running_mean": (block,), "running_deconv": (block, block)}
        for name, size in {**sizes, "rest_mean": (), "rest_var": ()}.items():
            self.register_buffer(name, torch.empty(size, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64, device=device))
        self._check_wide(self.running_mean.dtype)
        self.reset_parameters()
        self.seen: tuple[int, int] | None = None

    def reset_parameters(self) -> None:
        """Begin anew; there is nothing but running statistics."""
        self.running_mean.zero_()
        self.running_deconv.copy_(torch.eye(self.block, device=self.running_deconv.device))
        self.rest_mean.zero_()
        self.rest_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self._joint():  # it waits for other processes: its own piece, not traced
            return torch.compiler.disable(ChannelDeconv.forward)(self, x)  # type: ignore[no-any-return]
        self._check_dtype(x)
        if self.features_last and x.ndim not in (0, 2):
            return self.forward(x.reshape(-1, x.shape[-1])).view_as(x)
        if x.ndim not in (2, 4):
            raise NormError(f"ChannelDeconv got an input of shape {tuple(x.shape)}; it takes (N, C) or (N, C, H, W)")
        if x.shape[1] < self.block:
            raise NormError(f"ChannelDeconv has block {self.block} but an input of {x.shape[1]} channels")
        if self.training and self.alone(x):
            return self._alone(x)
        self.seen = (x.shape[1], x.ndim)
        if x.numel() == 0 and not (self.training and self._joint()):
            return x  # no image, no statistics, as in the layers
        whole = x.shape[1] - x.shape[1] % self.block
        with without_autocast(x.device):
            wide = x if x.dtype == torch.float64 else x.float()
            parts = [self._whiten(wide[:, :whole])]
            if whole < x.shape[1]:
                parts.append(self._standardise(wide[:, whole:]))
            if self._moves():
                self.num_batches_tracked.add_(1)
            return torch.cat(parts, 1).to(x.dtype)

    def alone(self, x: Tensor) -> bool:
        """Whether x is one vector, or one image with one sampled pixel, of all processes: see `FastDeconv.alone`."""
        if self._joint() or x.numel() == 0:
            return False
        if self.features_last:
            return x.ndim > 0 and x.numel() == x.shape[-1]
        return x.ndim in (2, 4) and len(x) == 1 and x.numel() // x.shape[1] <= self._every(x)

    def _alone(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            warnings.warn(
                "ChannelDeconv: one vector alone has no covariance; it is taken with the averages, as in evaluation, "
                "and they stay. Give two images or more, in an epoch's last batch too: DataLoader(..., drop_last=True)",
                stacklevel=3,
            )
        self.training = False
        try:
            return self.forward(x)
        finally:
            self.training = True

    def _moves(self) -> bool:
        return self.training and (torch.compiler.is_compiling() or not self._again())

    @torch.no_grad()
    def _move(self, *averages: tuple[Tensor, Tensor]) -> None:
        """Move each average towards what was found."""
        if self._moves():
            for held, found in averages:  # views, as in `running_shape`
                held.view(-1).lerp_(found.to(held.dtype).view(-1), self._rate())

    def _every(self, x: Tensor) -> int:
        dense = x.ndim == 2 or min(x.shape[2:]) < self.sampling_stride
        return 1 if dense else self.sampling_stride**2

    def _rate(self) -> Tensor:
        first = (self.num_batches_tracked == 0).to(self.running_mean.dtype)
        return first * (1 - self.momentum) + self.momentum

    def _whiten(self, x: Tensor) -> Tensor:
        channels = x.transpose(0, 1)
        count, pixels = x.shape[1] // self.block, x.numel() // x.shape[1]
        if self.grouping == "channel":
            blocks = channels.reshape(count, self.block, pixels).transpose(0, 1)
        else:
            blocks = channels.reshape(self.block, count, pixels)
        rows = blocks.reshape(self.block, count * pixels)
        mean, deconv = self.running_mean, self.running_deconv
        if self.training:
            sampled = rows[:, :: self._every(x)].t()
            _, mean, deconv = whitening.statistics(sampled, Rows(self.block), self.eps, self.n_iter, self._joint())
            self._move((self.running_mean, mean), (self.running_deconv, deconv))
        elif torch.is_grad_enabled() or torch.jit.is_tracing():
            deconv = deconv.clone()  # which a training step may move before the gradient is taken
        times = product if self.training else torch.matmul  # whose gradients have gradients
        white = times(deconv, rows - mean[:, None]).view(blocks.shape)
        if self.grouping == "channel":
            white = white.transpose(0, 1)
        return white.reshape(channels.shape).transpose(0, 1)

    def _standardise(self, x: Tensor) -> Tensor:
        mean, var = self.rest_mean, self.rest_var
        if self.training:
            sampled = x.flatten(1)[:, :: self._every(x)]
            # The unbiased variance, as the authors' code; one element alone has none.
            if self._joint():
                mean, var = _mean_and_var(sampled)
            else:
                mean, var = sampled.mean(), sampled.var(correction=min(1, sampled.numel() - 1))
            self._move((self.rest_mean, mean), (self.rest_var, var))
        return (x - mean) * (var + self.eps).rsqrt()

    def _joint(self) -> bool:
        """Whether the statistics are those of all processes."""
        return self.sync and processes.active()

    def traffic(self) -> Traffic:
        """What a training step sends with `sync`, forward and backward."""
        numbers = 2 * self.block + 1 + 2 * processes.triangle(self.block)
        found = Traffic(3, self.root_dtype().itemsize * numbers)
        rest = self.seen is None or self.seen[0] % self.block != 0
        return found.plus(Traffic(4, 2 * self.running_mean.element_size() * 3)) if rest else found

    def folded(self) -> tuple[Tensor, Tensor, int]:
        """Matrix (C, C) and offset (C,) of the map that this layer is in evaluation, and the rank of its input.

        Raises:
            NormError: the layer has seen no input since it was made, so that it does not know C.
        """
        if self.seen is None:
            raise NormError("a ChannelDeconv learns its channels from its input; run one batch before folding")
        channels, rank = self.seen
        eye = torch.eye(channels, dtype=self.running_deconv.dtype, device=self.running_deconv.device)
        whole = channels - channels % self.block
        training, self.training = self.training, False
        try:
            rows = torch.cat([torch.zeros_like(eye[:1]), eye])
            images = torch.cat([self._whiten(rows[:, :whole]), self._standardise(rows[:, whole:])], 1)
        finally:
            self.training = training
        return (images[1:] - images[0]).t().contiguous(), images[0], rank

    def extra_repr(self) -> str:
        return f"block={self.block}, n_iter={self.n_iter}, eps={self.eps}, sampling_stride={self.sampling_stride}"


def _mean_and_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all processes' elements, as `_standardise` takes them in one."""
    total, count = processes.total(torch.stack([x.sum(), x.new_tensor(float(x.numel()))])).unbind()
    mean = total / count
    return mean, processes.total((x - mean).square().sum()) / (count - 1).clamp(min=1)

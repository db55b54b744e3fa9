"""The recipes that the toolkit brings: bn, sync_bn, frozen_bn, gn, in, ln, none, keep, deconv and deconv_fast.

Their options are read without torch, whose import takes seconds: what makes layers is imported where it makes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from norm.checks import FRESH_STEPS, NormError, check_options
from norm.registry import Place, Recipe, register
from norm.strides import Grouping, largest_block

if TYPE_CHECKING:
    from torch import nn

_MOST_STEPS = 20
"""Each step amplifies the rounding of eigenvalues near zero by 2.25, up to 6e-8 * 2.25^20 = 0.7 of what they become
(tests/norm/test_whitening.py)."""


def _check_eps(name: str, eps: float) -> None:
    if not 0 < eps < math.inf:
        raise NormError(f"{name}: eps is {eps}; it must be greater than 0")


@register("keep")
@dataclass(frozen=True, kw_only=True)
class Keep(Recipe):
    """Leaves the layers as they are; meant for `overrides`."""


@register("bn")
@dataclass(frozen=True, kw_only=True)
class BatchNorm(Recipe):
    """Batch norm as the network has it; options that are given replace its settings."""

    eps: float | None = None
    """Added to the variance; None: as the network has it."""
    momentum: float | None = None
    """Rate of the running averages; None: as the network has it."""

    def __post_init__(self) -> None:
        if self.eps is not None:
            _check_eps("bn", self.eps)
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise NormError(f"bn: momentum is {self.momentum}; it must lie between 0 and 1")

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        if self.eps is None and self.momentum is None:
            return old
        from torch import nn

        from norm.replacements import copy_norm

        new = nn.BatchNorm2d(
            old.num_features,
            old.eps if self.eps is None else self.eps,
            old.momentum if self.momentum is None else self.momentum,
            old.affine,
            old.track_running_stats,
        )
        return copy_norm(old, new)


@register("sync_bn")
@dataclass(frozen=True, kw_only=True)
class SyncBatchNorm(Recipe):
    """Batch norm whose statistics are those of all processes; in one process it is batch norm. Several need GPUs."""

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        from torch import nn

        from norm.replacements import copy_norm

        new = nn.SyncBatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        return copy_norm(old, new)


@register("frozen_bn")
@dataclass(frozen=True, kw_only=True)
class FrozenBatchNorm(Recipe):
    """Batch norm with its present statistics, weight and bias, held: for fine-tuning with small batches."""

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        if old.running_mean is None:
            raise NormError(f"frozen_bn: {at.name} tracks no running statistics that could be held")
        from norm.other_layers import FrozenBatchNorm2d
        from norm.replacements import copy_norm

        return copy_norm(old, FrozenBatchNorm2d(old.num_features, old.eps))


@register("gn")
@dataclass(frozen=True, kw_only=True)
class GroupNorm(Recipe):
    """Group norm (Wu and He, arXiv 1803.08494), with weight standardisation (Qiao et al., arXiv 1903.10520) if asked.

    Where `groups` does not divide the channels, the greatest common divisor of both is used.
    """

    groups: int = 32
    """Groups of channels."""
    eps: float = 1e-5
    """Added to the variance."""
    weight_standardisation: bool = False
    """Convolutions subtract their filters' means and divide by their deviations."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise NormError(f"gn: groups is {self.groups}; it must be at least 1")
        _check_eps("gn", self.eps)

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        from norm.replacements import group_norm

        return group_norm(old, math.gcd(self.groups, old.num_features), self.eps)

    def conv(self, old: nn.Conv2d, at: Place) -> nn.Module:
        # A filter of one number has no variance, and the layer that predicts is not normalised afterwards.
        if not self.weight_standardisation or at.last or old.weight[0].numel() == 1:
            return old
        from norm.other_layers import WSConv2d
        from norm.replacements import check_shape, conv_arguments, copy_conv

        check_shape(old, at)
        return copy_conv(old, WSConv2d(**conv_arguments(old), bias=old.bias is not None))


@register("in")
@dataclass(frozen=True, kw_only=True)
class InstanceNorm(Recipe):
    """Instance norm with a learned scale and shift, as a group norm of one channel a group (1x1 maps allowed)."""

    eps: float = 1e-5
    """Added to the variance."""

    def __post_init__(self) -> None:
        _check_eps("in", self.eps)

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        from norm.replacements import group_norm

        return group_norm(old, old.num_features, self.eps)


@register("ln")
@dataclass(frozen=True, kw_only=True)
class LayerNorm(Recipe):
    """Layer norm over channels and pixels of an image, as a group norm of one group (Wu and He, section 3)."""

    eps: float = 1e-5
    """Added to the variance."""

    def __post_init__(self) -> None:
        _check_eps("ln", self.eps)

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        from norm.replacements import group_norm

        return group_norm(old, 1, self.eps)


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoNorm(Recipe):
    """No norm at all; convolutions without a bias get one, starting at zero."""

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        from torch import nn

        return nn.Identity()

    def conv(self, old: nn.Conv2d, at: Place) -> nn.Module:
        if old.bias is not None:
            return old
        from torch import nn

        from norm.replacements import check_shape, conv_arguments, copy_conv

        check_shape(old, at)
        return copy_conv(old, nn.Conv2d(**conv_arguments(old), bias=True))


@register("deconv")
@dataclass(frozen=True, kw_only=True)
class Deconv(Recipe):
    """Network deconvolution: every Conv2d becomes a FastDeconv, every batch norm goes (Ye et al. 2020, section 4)."""

    block: int = 64
    """Channels whitened together."""
    last_block: int | None = None
    """Channels whitened together in the last 1x1 convolution; None: all its input channels, as the authors do."""
    n_iter: int = 5
    """Newton-Schulz steps."""
    eps: float = 1e-5
    """Added to the diagonal of the covariance."""
    momentum: float = 0.1
    """Rate of the running averages."""
    sampling_stride: int = 3
    """Statistics use every so many-th window in each direction."""
    grouping: Grouping = "channel"
    """Blocks of neighbouring channels, or those of the authors' code, where `block` and `block_features` say nothing of
    grouped convolutions."""
    dense_small_maps: bool = True
    """Take every window where the output is small, not the corners that the authors' stride leaves."""
    stem_n_iter: int = 5
    """Newton-Schulz steps of the first convolution; the paper's 15 amplify the noise of images and cost accuracy
    (docs/results.md)."""
    stem_freeze: bool = True
    """The first convolution holds its statistics nine tenths of the time."""
    freeze_iter: int = 100
    """Steps in which a frozen layer updates its statistics, of every ten times as many."""
    max_rows: int = 4000
    """Take the statistics from about so many patches, by leaving out images or by a coarser grid; 0: from all, as the
    authors do."""
    block_features: int = 0
    """Whiten as many channels together as give up to so many features (channels x kernel size), in place of `block`,
    which then keeps its default; 0: `block` channels. The gcd rule leaves 16 of 80 or 112 channels together, and a 1x1
    layer 64 features."""
    every: int = 0
    """0: the exact method. n: the shape of D comes from a running covariance, without gradient, renewed once in n
    steps; mean and scale stay the batch's, with gradients."""
    rank: int = 64
    """With `every`: the leading directions that are whitened; all others get one gain."""
    fresh_steps: int = FRESH_STEPS
    """With `every`: in so many training steps at first the shape is that of each batch, renewed in each of them."""
    gain: bool = False
    """Learn a gain for each output channel, so that of a weight only its direction counts (weight normalisation):
    calibrated weights then move at the same rate as fresh ones. Weights that are initialised anew after the conversion
    keep the gain of those before."""
    sync: bool = False
    """Statistics of all processes' patches, in training: n processes with b images compute what one does with n b. Off:
    each has those of its own images."""
    keep_depthwise: bool = False
    """Leave depthwise convolutions and the batch norms right behind them as they are. What a depthwise convolution sees
    of a channel by itself, its own few taps, is worth little to whiten."""
    fc_block: int = 0
    """Features whitened together in linear layers, which become Delinear; 0 keeps them. Those stay whose weights their
    owner reads (torch's MultiheadAttention and TransformerEncoderLayer, attention in torchvision's Swin and in timm's
    BEiT, EVA and SwinV2)."""
    delinear: bool = True
    """False: linear layers stay, and a ChannelDeconv with blocks of fc_block stands before each (the authors' other
    way, `--delinear False`)."""

    def __post_init__(self) -> None:
        check_options(self.block, self.n_iter, self.eps, self.momentum, self.sampling_stride)
        check_options(self.last_block or 1, self.stem_n_iter, self.eps, self.momentum)
        if max(self.n_iter, self.stem_n_iter) > _MOST_STEPS:
            raise NormError(
                f"deconv: n_iter={self.n_iter} and stem_n_iter={self.stem_n_iter} must be at most {_MOST_STEPS}: "
                "rounding in float32 outgrows the result of more steps where patches are fewer than features"
            )
        if min(self.max_rows, self.block_features, self.every, self.fresh_steps) < 0:
            raise NormError(
                f"deconv: max_rows={self.max_rows}, block_features={self.block_features}, every={self.every} and "
                f"fresh_steps={self.fresh_steps}; they must be at least 0"
            )
        if self.freeze_iter < 1 or self.fc_block < 0 or self.last_block == 0:
            raise NormError(
                f"deconv: freeze_iter={self.freeze_iter} and last_block={self.last_block} must be at least 1, "
                f"fc_block={self.fc_block} at least 0"
            )
        idle = {"rank": 64, "fresh_steps": FRESH_STEPS} if self.every == 0 else {}
        if any(getattr(self, name) != default for name, default in idle.items()):
            raise NormError(
                f"deconv: rank={self.rank} and fresh_steps={self.fresh_steps} have no effect with every=0, the exact "
                "method; set every, such as 4 (deconv_fast), or leave them out"
            )
        if self.block_features and self.block != 64:
            raise NormError(
                f"deconv: block={self.block} has no effect with block_features={self.block_features}; set one of both"
            )
        if not self.stem_freeze and self.freeze_iter != 100:
            raise NormError(f"deconv: freeze_iter={self.freeze_iter} has no effect with stem_freeze=False")
        if not self.delinear and self.fc_block == 0:
            raise NormError("deconv: delinear=False has no effect with fc_block=0; set fc_block, such as 64")

    def override(self, options: dict[str, Any]) -> Recipe:
        """An n_iter or block given for some layers holds for the first and the last too, if they are among them. Of
        block and block_features it is the one given that holds."""
        if "block" in options and "block_features" not in options:
            options = {"block_features": 0, **options}
        if options.get("block_features") and "block" not in options:
            options = {"block": 64, **options}
        if "n_iter" in options:
            options = {"stem_n_iter": options["n_iter"], **options}
        if "block" in options:
            options = {"last_block": options["block"], **options}
        return super().override(options)

    def norm(self, old: nn.BatchNorm2d, at: Place) -> nn.Module:
        from torch import nn

        return old if self.keep_depthwise and at.depthwise else nn.Identity()

    def conv(self, old: nn.Conv2d, at: Place) -> nn.Module:
        if self.keep_depthwise and at.depthwise:
            return old
        from norm.layers import FastDeconv
        from norm.replacements import check_shape, check_wide, conv_arguments, copy_conv

        check_wide(old.weight, at)
        check_shape(old, at)
        last = at.last and old.kernel_size == (1, 1)
        block = self.block
        if self.block_features:
            block = largest_block(old.in_channels // old.groups, self.block_features // math.prod(old.kernel_size))
        new = FastDeconv(
            **conv_arguments(old),
            block=(self.last_block or old.in_channels) if last else block,
            n_iter=self.stem_n_iter if at.first else self.n_iter,
            eps=self.eps,
            momentum=self.momentum,
            sampling_stride=self.sampling_stride,
            freeze=at.first and self.stem_freeze,
            freeze_iter=self.freeze_iter,
            grouping=self.grouping,
            dense_small_maps=self.dense_small_maps,
            max_rows=self.max_rows,
            every=self.every,
            rank=self.rank,
            fresh_steps=self.fresh_steps,
            gain=self.gain,
            sync=self.sync,
        )
        copy_conv(old, new)
        new.set_weight(old.weight)
        return new

    def linear(self, old: nn.Linear, at: Place) -> nn.Module:
        if self.fc_block == 0:
            return old
        from norm.layers import Delinear
        from norm.replacements import check_shape, check_wide, copy_linear

        check_wide(old.weight, at)
        check_shape(old, at)
        if not self.delinear:
            return self._behind_a_whitening(old)
        new = Delinear(
            old.in_features,
            old.out_features,
            block=self.fc_block,
            n_iter=self.n_iter,
            eps=self.eps,
            momentum=self.momentum,
            every=self.every,
            rank=self.rank,
            fresh_steps=self.fresh_steps,
            gain=self.gain,
            sync=self.sync,
        )
        return copy_linear(old, new)

    def _behind_a_whitening(self, old: nn.Linear) -> nn.Sequential:
        from torch import nn

        from norm.channel_deconv import ChannelDeconv
        from norm.replacements import in_state_of

        block = min(self.fc_block, old.in_features)
        whitening = ChannelDeconv(
            block,
            n_iter=self.n_iter,
            momentum=self.momentum,
            sampling_stride=self.sampling_stride,
            features_last=True,
            sync=self.sync,
        )
        where = {"device": old.weight.device, "dtype": old.weight.dtype}
        linear = nn.Linear(old.in_features, old.out_features, old.bias is not None, **where)
        linear.load_state_dict(old.state_dict())
        return nn.Sequential(whitening, in_state_of(old, linear)).to(old.weight.device, old.weight.dtype)


@register("deconv_fast")
@dataclass(frozen=True, kw_only=True)
class DeconvFast(Deconv):
    """Network deconvolution at about batch norm's price: `deconv` with a running shape that has no gradient, whose
    leading directions are renewed once in four steps. Another method than the paper's; docs/performance.md compares
    them.

    It needs about as many patches as a block has features: with two images of 64x64 pixels, whose last maps are 2x2,
    gradients of deep networks grow from layer to layer, where the exact method's do not. Layers warn of it.
    """

    every: int = 4

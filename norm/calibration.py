"""Conversion of a trained batch-norm network into a deconvolution network that computes the same function.

The network is run in evaluation mode on a few batches. That gives, for every convolution, the mean and covariance of
its patches (so D), and the batch norm, if any, that alone takes its output. With w_eff, b_eff the convolution with that
batch norm folded in, W = w_eff D^(-1) and b = b_eff + w_eff mu make the deconvolution layer compute the same.
A batch norm that follows no convolution (pre-activation networks) becomes a scale and shift a channel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from norm import whitening
from norm.channel_deconv import ChannelDeconv
from norm.checks import NormError
from norm.inputs import float_batches
from norm.layers import Delinear, FastDeconv
from norm.other_layers import ChannelAffine
from norm.plan import Swap


@dataclass
class Moments:
    """Sums over the sampled patches of a layer, in float64."""

    rows: int = 0
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, patches: Tensor) -> None:
        wide = patches.double()
        total, square = wide.sum(-1), wide @ wide.mT
        self.rows += wide.shape[-1]
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square

    def finite(self) -> bool:
        return self.square is not None and bool(self.square.isfinite().all())

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean, flattened, and covariance."""
        assert self.total is not None and self.square is not None
        mean = self.total / self.rows
        covariance = self.square / self.rows - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return mean.flatten(), covariance


@dataclass
class Observed:
    """What a run of the network showed; layers by id."""

    batch: Any = None
    output: Any = None
    moments: dict[int, Moments] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    readers: dict[int, int] = field(default_factory=dict)
    """How many operations read the outputs of a convolution."""
    norms: dict[int, list[int]] = field(default_factory=dict)
    """The norms that read the outputs of a convolution, one entry a call."""


_READ = (Tensor.__setitem__, Tensor.numpy, Tensor.tolist, Tensor.item)
"""What reads or changes a tensor's values, and gives no tensor."""


class _CountReaders(TorchFunctionMode):
    """Counts the operations that read a convolution's output; its hook has left the convolution's id on the tensor."""

    def __init__(self, readers: dict[int, int]) -> None:
        super().__init__()
        self.readers = readers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)) or func in _READ:
            for leaf in tree_leaves((args, kwargs or {})):
                source = getattr(leaf, "_norm_source", None) if isinstance(leaf, Tensor) else None
                if source is not None:
                    self.readers[source] = self.readers.get(source, 0) + 1
        return result


def observe(model: nn.Module, swaps: list[Swap], batches: Tensor | Iterable[Tensor]) -> Observed:
    """Run `model` in evaluation mode over the batches.

    Raises:
        NormError: no layer of the plan whitens, no batch, or a batch that is no floating-point tensor.
    """
    if not any(isinstance(swap.core, (FastDeconv, Delinear)) for swap in swaps):
        raise NormError("calibrate= goes with a recipe that whitens, such as deconv; this one does not")
    if any(isinstance(part, ChannelDeconv) for swap in swaps for part in swap.new.modules()):
        raise NormError("calibrate= cannot keep the function where ChannelDeconv layers come in; use delinear=True")
    seen = Observed()
    with _evaluation(model), ExitStack() as stack, torch.no_grad():
        for swap in swaps:
            for handle in _watch(swap, seen):
                stack.callback(handle.remove)
        for batch in float_batches("calibrate", batches):
            with _CountReaders(seen.readers):
                output = model(batch)
            for leaf in tensors(output):  # whoever gets the output reads it too
                if (source := getattr(leaf, "_norm_source", None)) is not None:
                    seen.readers[source] = seen.readers.get(source, 0) + 1
            if seen.batch is None:
                seen.batch, seen.output = batch, output
    if seen.batch is None:
        raise NormError("calibrate holds no batch; give at least one tensor (N, C, H, W)")
    return seen


def _watch(swap: Swap, seen: Observed) -> list[Any]:
    """Hooks that note what goes in and out of one layer."""
    key, core = id(swap.old), swap.core
    if swap.old._forward_hooks:  # a hook of somebody's may keep the output, so no norm may be folded into the layer
        seen.readers[key] = 1

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.calls[key] = seen.calls.get(key, 0) + 1
        x = next(iter((*args, *kwargs.values())))
        if swap.kind == "norm":
            source = getattr(x, "_norm_source", None)
            if source is not None:
                seen.norms.setdefault(source, []).append(key)
        elif isinstance(core, FastDeconv):
            if x.ndim != 4:
                raise NormError(f"calibrate: {swap.names[0]} got {tuple(x.shape)}; give batches of images (N, C, H, W)")
            seen.moments.setdefault(key, Moments()).add(core.patches(*core.pad(swap.lead(x))))
        elif isinstance(core, Delinear):
            seen.moments.setdefault(key, Moments()).add(core.patches(x))

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(core, FastDeconv):
            output._norm_source = key  # type: ignore[attr-defined]

    before = swap.old.register_forward_pre_hook(on_input, with_kwargs=True)
    return [before, swap.old.register_forward_hook(on_output)]


def apply(swaps: list[Swap], seen: Observed) -> None:
    """Give the planned layers the statistics that were seen, and weights that keep the function."""
    by_id = {id(swap.old): swap for swap in swaps}
    merged: dict[int, str] = {}
    for swap in swaps:
        if not isinstance(swap.core, (FastDeconv, Delinear)):
            continue
        key = id(swap.old)
        if key in seen.moments and not seen.moments[key].finite():
            raise NormError(
                f"calibrate: {swap.names[0]} got values that are not finite; look for NaN or inf in the images, and at "
                "the network's outputs"
            )
        if key not in seen.moments or seen.moments[key].rows == 0:  # or with empty inputs alone
            swap.why = _join(swap.why, "not reached by calibration: weights kept")
            continue
        norm = _only_norm(key, seen, by_id)
        if norm is not None:
            merged[id(norm.old)] = swap.names[0]
            swap.why = _join(swap.why, f"calibrated with {norm.names[0]}")
        else:
            swap.why = _join(swap.why, "calibrated")
        _set_layer(swap.core, swap.plain, None if norm is None else norm.plain, seen.moments[key])
    for swap in swaps:
        if not _goes(swap):
            continue
        if id(swap.old) in merged:
            swap.why = _join(swap.why, f"folded into {merged[id(swap.old)]}")
        else:
            swap.core = _affine(swap.plain)
            if "weight" in swap.old._buffers:  # a frozen norm's
                swap.core.requires_grad_(False)
            reached = id(swap.old) in seen.calls
            kept = "scale and shift kept" + (", no convolution of its own to take them" if reached else "")
            swap.why = _join(swap.why, f"{'calibrated' if reached else 'not reached by calibration'}: {kept}")


def _goes(swap: Swap) -> bool:
    """A norm that the recipe removes; one that it replaces by another norm is left to it."""
    return swap.kind == "norm" and isinstance(swap.core, nn.Identity)


def _only_norm(key: int, seen: Observed, by_id: dict[int, Swap]) -> Swap | None:
    """The batch norm that reads every output of the convolution, alone, and nothing else; else None."""
    norms = seen.norms.get(key, [])
    calls = seen.calls[key]
    if len(set(norms)) != 1 or len(norms) != calls or seen.readers.get(key) != calls:
        return None
    norm = by_id[norms[0]]
    return norm if seen.calls[norms[0]] == calls and _goes(norm) else None


def _set_layer(core: FastDeconv | Delinear, conv: nn.Module, norm: nn.Module | None, moments: Moments) -> None:
    assert isinstance(conv, (nn.Conv2d, nn.Linear))
    weight, bias = conv.weight.detach().double(), None if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        scale, shift = _scale_and_shift(norm)
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        bias = shift if bias is None else bias * scale + shift
    with torch.no_grad():
        core.set_statistics(*moments.statistics())
        deconv = core.deconv()
        weight, bias = whitening.unfold_weight(weight, bias, core.running_mean, deconv, core.matrices, core.grouping)
        core.set_weight(weight, rescale=True)
        assert core.bias is not None
        core.bias.copy_(bias)


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm does in evaluation, in float64.

    Raises:
        NormError: it tracks no running statistics.
    """
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        raise NormError("calibrate needs batch norms with running statistics; this network's do not track them")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _affine(norm: nn.Module) -> ChannelAffine:
    scale, shift = _scale_and_shift(norm)
    new = ChannelAffine(scale.numel()).to(scale.device)
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    new.to(norm.running_mean.dtype)
    if norm.weight is not None:
        new.requires_grad_(norm.weight.requires_grad)
    with torch.no_grad():
        new.weight.copy_(scale)
        new.bias.copy_(shift)
    return new


def deviation(model: nn.Module, seen: Observed) -> float | None:
    """Largest difference of the first batch's outputs to those before, relative to the largest; None without tensors.

    Warns beyond 1e-3: then the network reads a layer in a way that calibration does not see, or an override replaces a
    trained norm by another.
    """
    with _evaluation(model), torch.no_grad():
        after, before = tensors(model(seen.batch)), tensors(seen.output)
    if not before:
        return None
    if [each.shape for each in after] != [each.shape for each in before]:  # such as other boxes of a detector
        found = math.inf
    else:
        each = [_difference(a, b) for a, b in zip(after, before, strict=True)]
        found = float(torch.tensor(each, dtype=torch.float64).max())  # Python's max passes over a NaN
    if not found < 1e-3:
        warnings.warn(f"the converted network's outputs differ by {found:.1e} of the largest from before", stacklevel=3)
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    """0 without a number to compare."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a network returned: a tensor, containers or an object of them."""
    leaves = tree_leaves([_inside(leaf) for leaf in tree_leaves(output)])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _inside(leaf: Any) -> Any:
    """What an object holds that torch does not look into: containers of a class of their own among them."""
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, list | tuple):
        return list(leaf)
    return vars(leaf) if hasattr(leaf, "__dict__") else leaf


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)

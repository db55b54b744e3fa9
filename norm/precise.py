"""Running statistics as plain averages over some batches at the weights of now, before an evaluation.

Running averages trail weights that move; after the training they have weights of many steps in them. Averages at fixed
weights (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3) do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from norm import processes
from norm.channel_deconv import ChannelDeconv
from norm.checks import NormError
from norm.inputs import check_network, float_batches
from norm.layers import Delinear, FastDeconv
from norm.state import Deconvolving


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Tensor | Iterable[Tensor]) -> int:
    """Replace the running statistics of batch norms and whitening layers by averages over `batches`, in place.

    Those layers normalise each batch by its own statistics, as in training; all others (dropout, say) work as in
    evaluation. A later training goes on from the new averages, at its own rate. Stay as they are: a batch norm without
    running statistics, a frozen one, a layer that is in evaluation mode in a model that is not, and a layer that no
    batch reaches, or none with values to average. A compiled model runs as it was written: each batch has its own rate,
    which is another graph.

    Args:
        model: a network; its mode comes back afterwards.
        batches: inputs (N, C, H, W) on the network's device, with the augmentation of the training, or one such batch.

    Returns:
        How many layers have new statistics; 0 without any such layer, and then no batch is read.

    Raises:
        NormError: `model` is no network; no batch, one without images, or one that is no floating-point tensor. After
            any error the model is as it was.
    """
    check_network("norm.precise_statistics", model)
    layers = [layer for layer in averaging(model) if layer.training or not model.training]
    if not layers:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # whose import takes seconds, and without which nothing is compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            reached = [stack.enter_context(_anew(layer)) for layer in layers]
            batch: Tensor | None = None
            for batch in float_batches("precise_statistics", batches):
                model(batch)
            if batch is None:
                raise NormError("precise_statistics: no batch was given; give at least one tensor (N, C, H, W)")
    finally:
        for module, mode in modes:
            module.training = mode
    return sum(calls() > 0 for calls in reached)


def averaging(model: nn.Module) -> list[nn.Module]:
    """The layers that have running statistics which a training moves."""
    return [
        module
        for module in model.modules()
        if (isinstance(module, _BatchNorm) and module.track_running_stats)
        or isinstance(module, (Deconvolving, ChannelDeconv))
    ]


@contextmanager
def _anew(layer: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, the layer is in training mode, its averages start anew and every call that moves them counts, of which
    the function given tells the number; its settings and counts come back, and its averages where there was no such
    call, or an error."""
    before = {name: one.clone() for name, one in layer.named_buffers()}
    anew: dict[str, Any] = {"momentum": layer.momentum}
    if isinstance(layer, Deconvolving):
        anew |= {"every": min(layer.every, 1), "fresh_steps": 0, "_steps": 0}
        if "steps" in before:
            layer.steps.zero_()
        # of a layer that never freezes it is the class's: one of its own would compile the network again
        anew |= {"freeze": False} if layer.freeze else {}
    settings = {name: getattr(layer, name) for name in anew}
    calls = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal calls
        x = next(iter((*args, *kwargs.values())), None)
        joint = processes.active() and (isinstance(module, nn.SyncBatchNorm) or getattr(module, "sync", False))
        empty = isinstance(x, Tensor) and x.numel() == 0 and not joint
        layers = (FastDeconv, Delinear, ChannelDeconv)
        alone = isinstance(module, layers) and isinstance(x, Tensor) and x.ndim > 0 and module.alone(x)
        # a batch norm's own hook may have it leave a single value out (`engine.single_values`)
        if empty or alone or not module.training:
            return
        calls += 1
        module.momentum = 1 / calls  # type: ignore[assignment]

    handle = layer.register_forward_pre_hook(count, with_kwargs=True)
    layer.training = True
    for held in layer.buffers():  # those of a batch that overflowed would stay, whatever they weigh
        if held.is_floating_point():
            held.nan_to_num_(0.0, 0.0, 0.0)
    for name, value in anew.items():
        setattr(layer, name, value)
    kept = False
    try:
        yield lambda: calls
        kept = calls > 0
    finally:
        handle.remove()
        for name, value in settings.items():
            setattr(layer, name, value)
        for name, held in before.items():
            if not kept or name in ("steps", "num_batches_tracked"):
                layer.get_buffer(name).copy_(held)

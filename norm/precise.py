"""Running statistics as plain averages over some batches at the weights of now, before an evaluation.

Running averages trail weights that move; after the training they have weights of many steps in them. Averages at fixed
weights (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3) do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from norm.channel_deconv import ChannelDeconv
from norm.state import Deconvolving, NormError


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of batch norms and whitening layers by averages over `batches`, in place.

    Those layers normalise each batch by its own statistics, as in training; all others (dropout, say) work as in
    evaluation. A later training goes on from the new averages, at its own rate. A batch norm without running statistics
    and a frozen one stay as they are.

    Args:
        model: a network; its mode comes back afterwards.
        batches: inputs (N, C, H, W) on the network's device, with the augmentation of the training.

    Returns:
        How many layers have new statistics; 0 without any such layer, and then no batch is read.

    Raises:
        NormError: no batch.
    """
    layers = [module for module in model.modules() if _averages(module)]
    if not layers:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    try:
        model.eval()
        with ExitStack() as stack:
            for layer in layers:
                layer.training = True
                stack.enter_context(_anew(layer))
            for seen, batch in enumerate(batches, start=1):
                for layer in layers:
                    if not isinstance(layer, _BatchNorm):  # torch's count for themselves
                        layer.momentum = 1 / seen  # type: ignore[assignment]
                model(batch)
    finally:
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise NormError("precise_statistics: no batch was given")
    return len(layers)


def _averages(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.track_running_stats
    return isinstance(module, (Deconvolving, ChannelDeconv))


@contextmanager
def _anew(layer: nn.Module) -> Iterator[None]:
    """Inside, the layer's averages start anew and every batch counts; its settings and counts come back."""
    names = ["momentum", *(name for name in ("freeze", "every", "fresh_steps", "_steps") if hasattr(layer, name))]
    before = {name: getattr(layer, name) for name in names}
    counts = {name: one.clone() for name, one in layer.named_buffers() if name in ("steps", "num_batches_tracked")}
    if isinstance(layer, _BatchNorm):
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for the plain average
    elif isinstance(layer, Deconvolving):
        layer.freeze, layer.every, layer.fresh_steps, layer._steps = False, min(layer.every, 1), 0, 0
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(layer, name, value)
        for name, count in counts.items():
            getattr(layer, name).copy_(count)

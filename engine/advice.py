"""What a training's log says of settings that cost accuracy or time without an error."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import ExperimentConfig
from norm import processes
from norm.channel_deconv import ChannelDeconv
from norm.state import Whitening

FEW_IMAGES = 2
"""From here down a micro-batch's statistics cost points of accuracy (docs/results.md, smaller micro-batches)."""


def few_images(model: nn.Module, cfg: ExperimentConfig, world: int) -> str | None:
    """A sentence where layers have statistics of few images though the batch has more, else None."""
    split = cfg.split(world)
    images = split.micro_batch
    if images > FEW_IMAGES or images == cfg.batch_size:
        return None
    together = set(processes.synchronised(model)) if world > 1 else set()
    whitening = [one for one in model.modules() if isinstance(one, (Whitening, ChannelDeconv)) and one not in together]
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    norms = [one for one in norms if world == 1 or not isinstance(one, nn.SyncBatchNorm)]
    if not whitening and not norms:
        return None
    remedies = []
    if world > 1:
        remedies += ["norm.sync=true for deconvolution's from all processes"] * bool(whitening)
        remedies += ["the recipe sync_bn for batch norm's on GPUs"] * bool(norms)
    remedies.append("a larger micro_batch" if split.accumulation > 1 else "a larger batch_size")
    return (
        f"note: {len(whitening) + len(norms)} layers take their statistics from {images} image{'s' * (images > 1)} of "
        f"the {cfg.batch_size} in a batch, which costs accuracy (docs/results.md); set "
        f"{', '.join(remedies)}, or norm.name=gn"
    )


def not_compiled(model: nn.Module, cfg: ExperimentConfig, device: torch.device) -> str | None:
    """A sentence where whitening layers run on a GPU without the compiler, else None."""
    if device.type != "cuda" or cfg.runtime.compile or cfg.runtime.checkpointing:  # which cannot be compiled
        return None
    if not any(isinstance(one, Whitening) for one in model.modules()):
        return None
    return (
        "note: deconvolution is not compiled, and its many small kernels then made a GPU's steps two to seven times as "
        "long as batch norm's: set runtime.compile=true, or reduce-overhead for small networks or images "
        "(docs/performance.md)"
    )

"""Parameters that a network has and its forward does not use, which DistributedDataParallel must be told of."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def unused_parameters(model: nn.Module, images: Tensor) -> list[str] | None:
    """Names of the parameters that are to be trained and get no gradient from the outputs in training mode; None if the
    network does not take such images.

    A copy of `model` computes `images` (N, C, H, W), on its device; the model and the random numbers stay as they are.
    """
    try:
        return _unused(model, images)
    except (RuntimeError, ValueError, AssertionError):  # as networks refuse a size
        return None


def _unused(model: nn.Module, images: Tensor) -> list[str]:
    twin = copy.deepcopy(model).train()
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so few images; a training of the network warns by itself
        outputs = [one for one in tree_leaves(twin(images)) if isinstance(one, Tensor) and one.requires_grad]
        if outputs:
            torch.stack([one.float().sum() for one in outputs]).sum().backward()
    return [name for name, one in twin.named_parameters() if one.requires_grad and one.grad is None]

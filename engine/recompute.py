"""Activation checkpointing: what a block computes inside is thrown away, and computed again for the backward.

It costs about one more forward a step and saves most of the memory that grows with the batch. The second forward is
exact: it starts from the buffers, counters and random numbers that the first one found, and leaves no trace in them, so
that running statistics move once a step and gradients are bit for bit those without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to compute again, by name: the outermost entries of the network's sequences with at least two
    convolutions or linear layers, such as the residual blocks of a ResNet or the layers of a transformer."""
    found: dict[str, nn.Module] = {}
    _collect(model, "", found, set())
    return found


def recompute_blocks(model: nn.Module) -> str:
    """Checkpoint the blocks of `model` in training, in place; returns the line for the log. Names of parameters stay.

    Raises:
        UserError: the network has no block.
    """
    chosen = blocks(model)
    if not chosen:
        raise UserError(
            "runtime.checkpointing: this network has no sequence of blocks whose values could be computed again; set "
            "runtime.checkpointing=false"
        )
    for block in chosen.values():
        block.forward = partial(_forward, block, block.forward)
    names = list(chosen)
    return f"checkpointing: {len(names)} blocks are computed again in the backward ({names[0]} ... {names[-1]})"


def _collect(module: nn.Module, prefix: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if id(child) in seen:  # a block in two places is one block
            continue
        seen.add(id(child))
        inside = sum(isinstance(each, _WEIGHTED) for each in child.modules())
        composite = inside >= 2 and not isinstance(child, _WEIGHTED)
        if composite and isinstance(module, _CONTAINERS) and not _holds_blocks(child):
            found[path] = child
        else:
            _collect(child, f"{path}.", found, seen)


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a stage, a container whose own entries are blocks."""
    if type(module) not in _CONTAINERS:
        return False
    return any(sum(isinstance(x, _WEIGHTED) for x in child.modules()) >= 2 for child in module.children())


def _forward(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    before = _states(block)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _as_before(before)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


State = tuple[nn.Module, dict[str, Tensor | None], dict[str, Any]]


def _states(block: nn.Module) -> list[State]:
    """For each module copies of its buffers, and its counters and switches, which may be tensors too; layers of `norm`
    are told that they find them."""
    return [
        (
            module,
            {name: None if each is None else each.clone() for name, each in module._buffers.items()},
            {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in vars(module).items()
                if isinstance(value, (bool, int, float, Tensor))
            }
            | ({"rewound": True} if "rewound" in vars(module) else {}),
        )
        for module in block.modules()
    ]


@contextmanager
def _as_before(states: list[State]) -> Iterator[None]:
    """Inside, the modules have those buffers and counters; afterwards those that they have now. Tensors change place
    rather than value: autograd may hold them."""
    now = [(dict(module._buffers), {name: vars(module)[name] for name in held}) for module, _, held in states]
    try:
        for module, buffers, counters in states:
            module._buffers.update(buffers)
            vars(module).update(counters)
        yield
    finally:
        for (module, _, _), (buffers, counters) in zip(states, now, strict=True):
            module._buffers.update(buffers)
            vars(module).update(counters)

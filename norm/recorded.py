"""The renewal of a shape on a GPU, recorded as a CUDA graph: some 75 small kernels, whose start takes the host longer
than the GPU needs for them, become one.

Layers whose patches have the same shape share a recording, and all recordings of a device share their memory: they are
replayed one after the other, and what they find is copied out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BEFORE = 2
"""Times that a shape is renewed as it is written before it is recorded: with images of many sizes few come again."""
_MOST = 64
"""Recordings that are kept."""

Tensors = tuple[Tensor, ...]


class Signature(NamedTuple):
    """What a recording is made for: shapes and dtypes of all tensors, and the numbers that it holds."""

    device: torch.device
    tensors: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    numbers: tuple[float, ...]


def renew(move: Callable[..., None], held: Any, found: Tensors, rate: float, numbers: tuple[Any, ...]) -> None:
    """`move(held, *found, rate, *numbers)`.

    Args:
        held: an `Averages`, of which `move` changes all but the first two.
        found: mean, scale and patches.
    """
    each = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in (*held, *found))
    recording = _recording(Signature(held[0].device, each, numbers))
    recording.seen += 1
    if recording.seen <= _BEFORE:
        move(held, *found, rate, *numbers)
        return
    if recording.graph is None:
        recording.record(move, held, found, numbers)
    recording.replay(held, found, rate)


def by_hand(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded where this tensor is, by somebody else."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=_MOST)
def _recording(signature: Signature) -> _Recording:
    return _Recording()


@functools.cache
def _pool(device: torch.device) -> torch.cuda.CUDAGraph:
    """A recording of next to nothing, whose memory the others share: it goes with the last of its recordings."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.ones(1, device=device)
    return graph


class _Recording:
    """A CUDA graph, and the tensors that it reads and writes."""

    def __init__(self) -> None:
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: Any = None
        self.found: Tensors = ()
        self.rate = torch.empty(())

    def record(self, move: Callable[..., None], held: Any, found: Tensors, numbers: tuple[Any, ...]) -> None:
        self.held = type(held)(*(None if tensor is None else tensor.clone() for tensor in held))
        self.found = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in found)
        self.rate = torch.ones((), dtype=held[0].dtype, device=held[0].device)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: threads that pin memory go on meanwhile
        capture = torch.cuda.graph(self.graph, _pool(self.rate.device).pool(), capture_error_mode="thread_local")
        with torch.cuda.device(self.rate.device), capture:
            move(self.held, *self.found, self.rate, *numbers)

    def replay(self, held: Any, found: Tensors, rate: float) -> None:
        assert self.graph is not None
        _, _, *mine = (tensor for tensor in self.held if tensor is not None)
        _, _, *others = (tensor for tensor in held if tensor is not None)
        *sums, patches = found
        self.found[-1].copy_(patches)
        torch._foreach_copy_([*self.found[:-1], *mine], [*sums, *others])
        self.rate.fill_(rate)
        self.graph.replay()
        torch._foreach_copy_(others, mine)

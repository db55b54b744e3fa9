"""Sums over the processes of a training, so that whitening statistics are those of all their batches together.

All processes must ask for the same sums in the same order: a network whose layers are called alike everywhere, as
DistributedDataParallel demands too. `torch.distributed`'s default group is used. In a single process `active` is False,
and nobody asks.

A symmetric matrix travels as its lower triangle: half the bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable


class Share(NamedTuple):
    """Which part of a step's images this process has: the `rank`-th of `processes` equal ones."""

    rank: int = 0
    processes: int = 1


ALONE = Share()


class Traffic(NamedTuple):
    """Collective operations, and the bytes that a process hands to them; averages may be fractions.

    What goes over the wire depends on the algorithm: a ring of n processes sends 2 (n - 1) / n times the bytes of a
    sum from each of them.
    """

    calls: float = 0.0
    size: float = 0.0

    def plus(self, other: Traffic, times: float = 1.0) -> Traffic:
        return Traffic(self.calls + times * other.calls, self.size + times * other.size)


def active() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share() -> Share:
    """That of this process."""
    return Share(dist.get_rank(), dist.get_world_size()) if active() else ALONE


def total_(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place and without gradient; `tensor` must be contiguous."""
    dist.all_reduce(tensor)
    return tensor


def same_(tensor: Tensor) -> Tensor:
    """Rank 0's values, in place; `tensor` must be contiguous."""
    dist.broadcast(tensor, src=0)
    return tensor


class _Total(torch.autograd.Function):
    """Each process's loss depends on the sum, so the gradient of each summand is the sum of all their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total_(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return total_(grad.clone(memory_format=torch.contiguous_format))


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, with the gradient of the sum of their losses."""
    found: Tensor = _Total.apply(tensor)  # type: ignore[no-untyped-call]
    return found


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix: (..., F, F) -> (..., F (F + 1) / 2)."""
    row, column = torch.tril_indices(*matrix.shape[-2:], device=matrix.device)
    return matrix[..., row, column]


def unpack(packed: Tensor, features: int) -> Tensor:
    """The inverse of `pack`."""
    row, column = torch.tril_indices(features, features, device=packed.device)
    matrix = packed.new_zeros(*packed.shape[:-1], features, features)
    matrix[..., row, column] = packed
    matrix[..., column, row] = packed
    return matrix


def triangle(features: int) -> int:
    """Numbers that `pack` leaves."""
    return features * (features + 1) // 2


def synchronised(model: nn.Module) -> list[nn.Module]:
    """The layers with `sync=True`."""
    return [each for each in model.modules() if getattr(each, "sync", False) is True and hasattr(each, "traffic")]


def traffic(model: nn.Module) -> Traffic:
    """What the layers with `sync=True` send in a forward and backward pass, on an average over the steps.

    It counts every layer as called once, trained every time and with an input that has a gradient, so it is an upper
    bound: the first layer sends no gradient, and nothing while it is frozen.
    """
    found = Traffic()
    for layer in synchronised(model):
        found = found.plus(layer.traffic())  # type: ignore[operator]
    return found

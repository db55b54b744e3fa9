"""What is handed to the functions of this package, looked at before anything is done with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


class NormError(ValueError):
    """A wrong option, an unknown name, or a model that a recipe cannot be applied to; the message says what to do."""


def check_network(what: str, model: object) -> None:
    """Raises NormError unless `model` is a network; `what` is the function that it was given to."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        more = "; norm.convert changes the network in place and gives a report" if kind == "Report" else ""
        raise NormError(f"{what}: expected a network (an nn.Module), found {kind}{more}")


def check_options(block: int, n_iter: int, eps: float, momentum: float, sampling_stride: int = 1) -> None:
    """Raises NormError unless all are in range."""
    for name, value in (("block", block), ("n_iter", n_iter), ("sampling_stride", sampling_stride)):
        if value < 1:
            raise NormError(f"{name} is {value}; it must be at least 1")
    if n_iter > 30:
        raise NormError(f"n_iter is {n_iter}; it must be at most 30, beyond that float32 overflows")
    if not 0 < eps < math.inf:
        raise NormError(f"eps is {eps}; it must be greater than 0, else a covariance of few rows has no inverse root")
    if not 0 <= momentum <= 1:
        raise NormError(f"momentum is {momentum}; it must lie between 0 and 1")


def _pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and bool(batch) and isinstance(batch[0], Tensor)


def float_batches(what: str, batches: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, or the one batch; `what` is the argument or function that errors name.

    Raises:
        NormError: there are none to go through, one is no floating-point tensor, or has no images.
    """
    try:
        each = iter([batches] if isinstance(batches, Tensor) else batches)  # once: a loader starts its workers
    except TypeError:
        raise NormError(f"{what}: expected float tensors (N, C, H, W), one or several; found {batches!r}") from None
    for batch in each:
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            found = f"a tensor of {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
            more = "; of a loader give the images alone: (images for images, _ in loader)" if _pair(batch) else ""
            raise NormError(f"{what}: expected float tensors (N, C, H, W), found {found}{more}")
        if len(batch) == 0:
            raise NormError(f"{what}: a batch without images, of shape {tuple(batch.shape)}")
        yield batch

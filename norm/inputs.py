"""Networks and batches that functions of this package are given, looked at before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from norm.checks import NormError


def check_network(what: str, model: object) -> None:
    """Raises NormError unless `model` is a network; `what` is the function that it was given to."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        more = "; norm.convert changes the network in place and gives a report" if kind == "Report" else ""
        raise NormError(f"{what}: expected a network (an nn.Module), found {kind}{more}")


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

"""What is no network and no batch is told so, by the functions that take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import norm


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


CALLS: dict[str, Callable[[Any], object]] = {
    "norm.convert": lambda model: norm.convert(model, "deconv"),
    "norm.fold": norm.fold,
    "norm.precise_statistics": lambda model: norm.precise_statistics(model, torch.zeros(1, 3, 8, 8)),
}


@pytest.mark.parametrize("what", CALLS)
def test_what_is_no_network(what: str) -> None:
    with pytest.raises(norm.NormError, match=rf"^{what}: expected a network \(an nn.Module\), found NoneType$"):
        CALLS[what](None)
    with pytest.raises(norm.NormError, match="found OrderedDict$"):
        CALLS[what](network().state_dict())
    with pytest.raises(norm.NormError, match="found Report; norm.convert changes the network in place"):
        CALLS[what](norm.convert(network(), "deconv"))


def test_what_is_no_batch() -> None:
    model = network()
    with pytest.raises(norm.NormError, match=r"^calibrate: expected float tensors \(N, C, H, W\).*found 5$"):
        norm.convert(model, "deconv", calibrate=5)  # type: ignore[arg-type]
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[1], nn.BatchNorm2d)
    with pytest.raises(norm.NormError, match=r"^precise_statistics: expected float tensors.*found 5$"):
        norm.precise_statistics(model, 5)  # type: ignore[arg-type]

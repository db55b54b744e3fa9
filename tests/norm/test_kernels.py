"""How many kernels a layer's training step starts on a GPU, which waits for each of them.

Counted on the meta device, which goes the GPU's ways: operations that are no views and allocate no more than memory.
"""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from norm import FastDeconv

VIEWS = """view _unsafe_view t transpose expand permute unsqueeze squeeze slice select detach as_strided alias split
    split_with_sizes diagonal unbind lift_fresh _reshape_alias unfold unflatten"""
MEMORY = "empty empty_strided empty_like new_empty new_empty_strided"


class Kernels(TorchDispatchMode):
    """Counts, by name, the operations on tensors of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.without = {*VIEWS.split(), *MEMORY.split()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        outputs = [each for each in (result if isinstance(result, tuple) else (result,)) if isinstance(each, Tensor)]
        if name not in self.without and any(each.is_meta for each in outputs):
            self.found[name] += 1
        return result


def kernels(layer: nn.Module, steps: int, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> list[Counter[str]]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know the device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    found = []
    for _ in range(steps):
        layer.zero_grad()
        with Kernels() as mode:
            y = layer(images.detach().requires_grad_())
            y.backward(torch.empty_like(y))
        found.append(mode.found)
    return found


@pytest.mark.parametrize(("options", "most"), [({}, 85), ({"every": 4, "fresh_steps": 0}, 46)], ids=["exact", "cheap"])
@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("kernel", [1, 3])
def test_few_are_started(
    options: dict[str, Any], most: int, kernel: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        layer = FastDeconv(64, 64, kernel, padding=kernel // 2, dense_small_maps=True, max_rows=4000, **options)
        images = torch.randn(512, 64, size, size).to(memory_format=torch.channels_last)
    renewed, *others = kernels(layer, 4, monkeypatch, images)
    for each in others:
        assert each.total() <= most, each
    assert renewed.total() <= (most + 150 if options else most), renewed  # four passes in the first step

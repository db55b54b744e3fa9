"""Parameters without a gradient are found on a copy, which leaves no trace."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from engine.unused import unused_parameters


class Branched(nn.Module):
    """With a layer that is never called, one that is frozen, a batch norm, dropout, and a warning."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.spare = nn.Linear(2, 2)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        warnings.warn("few images", stacklevel=2)
        return {"out": self.frozen(self.body(x))}


def test_names_and_no_trace() -> None:
    torch.manual_seed(0)
    model = Branched().eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        found = unused_parameters(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert found == ["spare.weight", "spare.bias"]
    assert not told, "the training itself warns"
    assert torch.equal(random, torch.get_rng_state()) and not model.training
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in before.items())
    assert all(one.grad is None for one in model.parameters())


def test_images_that_the_network_refuses() -> None:
    assert unused_parameters(Branched(), torch.randn(2, 3, 2, 2)) is None

"""SENet-18: a ResNet of pre-activation blocks with a gate on their output (Hu et al., arXiv 1709.01507)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from classify.models.layers import squeeze_excitation
from classify.models.preact_resnet import PreactBlock
from classify.models.resnet import ResNet


class GatedBlock(PreactBlock):
    """A pre-activation block that gates what it adds to its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.gate = squeeze_excitation(outputs)

    def residual(self, active: Tensor) -> Tensor:
        return self.gate(super().residual(active))


NETWORKS = {"senet18": partial(ResNet, GatedBlock, (64, 128, 256, 512), (2, 2, 2, 2))}

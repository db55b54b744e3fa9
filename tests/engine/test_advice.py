"""What a training is told of settings that cost accuracy or time: where they do, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import norm
from engine.advice import few_images, not_compiled
from tests.engine.toy import config


def network(recipe: str, **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    norm.convert(model, recipe, **options)
    return model


@pytest.mark.parametrize(
    "recipe, options, batch, micro, world, told",
    [
        ("bn", {}, 8, 2, 1, "2 layers take their statistics from 2 images of the 8 in a batch"),
        ("bn", {}, 8, 2, 4, "set the recipe sync_bn for batch norm's on GPUs, a larger batch_size, or norm.name=gn"),
        ("deconv", {}, 8, None, 8, "from 1 image of the 8 in a batch, which costs accuracy"),
        ("deconv", {}, 8, None, 8, "set norm.sync=true for deconvolution's from all processes, a larger batch_size"),
        ("deconv_fast", {}, 8, 1, 1, "set a larger micro_batch, or norm.name=gn"),
        ("deconv", {"sync": True}, 8, 2, 1, "set a larger micro_batch"),
        ("bn", {}, 8, 1, 2, "batch norm's on GPUs, a larger micro_batch, or norm.name=gn"),
        ("deconv", {"sync": True}, 8, None, 8, None),
        ("sync_bn", {}, 8, None, 8, None),
        ("gn", {"groups": 2}, 8, 1, 1, None),
        ("frozen_bn", {}, 8, 1, 1, None),
        ("bn", {}, 12, 3, 4, None),
        ("bn", {}, 2, None, 1, None),
    ],
)
def test_statistics_of_few_images(
    recipe: str, options: dict[str, Any], batch: int, micro: int | None, world: int, told: str | None
) -> None:
    found = few_images(network(recipe, **options), config(batch=batch, micro=micro), world)
    assert (told is None and found is None) or (told is not None and found is not None and told in found)


def test_deconvolution_that_is_not_compiled_on_a_gpu() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    found = not_compiled(network("deconv"), config(), gpu)
    assert found is not None and "set runtime.compile=true, or reduce-overhead" in found
    assert not_compiled(network("bn"), config(), gpu) is None
    assert not_compiled(network("deconv"), config(), cpu) is None
    assert not_compiled(network("deconv"), config(runtime__checkpointing=True), gpu) is None  # refused beside it
    for mode in (True, "reduce-overhead"):
        assert not_compiled(network("deconv"), config(runtime__compile=mode), gpu) is None

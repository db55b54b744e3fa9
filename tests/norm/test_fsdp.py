"""Sharded parameters (torch's `fully_shard`): each layer sees its whole weight in a step, as without."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import norm


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe", ["deconv", "deconv_fast"])
def test_a_sharded_network_trains_as_a_whole_one(mesh: DeviceMesh, recipe: str) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(1)
    )
    whole.append(nn.Linear(6 * 36, 4))
    norm.convert(whole, recipe, fc_block=54, gain=True)
    sharded = copy.deepcopy(whole)
    for part in (sharded[0], sharded[3], sharded):
        fully_shard(part, mesh=mesh)
    for model in (whole, sharded):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(16, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    x = torch.randn(2, 3, 8, 8)
    whole.eval(), sharded.eval()
    assert torch.equal(sharded(x), whole(x))

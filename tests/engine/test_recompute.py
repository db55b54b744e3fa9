"""Checkpointed blocks give bit for bit what they give without, and leave the same state behind."""

import copy

import pytest
import torch
from torch import Tensor, nn

import norm
from engine.config import RuntimeConfig
from engine.errors import UserError
from engine.prepare import prepare, session
from engine.recompute import blocks, recompute_blocks
from tests.engine.toy import config


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.drop(self.norm(self.first(x)).relu()))


def network(recipe: str = "bn", **options: object) -> nn.Module:
    torch.manual_seed(0)
    stages = [nn.Sequential(Block(8), Block(8)), nn.Sequential(Block(8))]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *stages, nn.Conv2d(8, 4, 1))
    norm.convert(model, recipe, **options)
    return model


def trained(model: nn.Module, steps: int = 5) -> list[Tensor]:
    """Parameters, buffers and gradients after some steps, and the losses."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 12, 12)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return [*losses, *model.state_dict().values(), *gradients]


@pytest.mark.parametrize(
    "recipe, options",
    [
        ("bn", {}),
        ("gn", {"groups": 4}),
        ("deconv", {"block": 8}),
        ("deconv", {"block": 8, "every": 2, "rank": 4}),
        ("deconv", {"block": 8, "freeze_iter": 1}),
    ],
)
def test_the_same_results_bit_for_bit(recipe: str, options: dict[str, object]):
    """Running statistics, their counters and dropout included."""
    plain, checkpointed = network(recipe, **options), network(recipe, **options)
    assert "3 blocks are computed again" in recompute_blocks(checkpointed)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    for one, other in zip(trained(plain), trained(checkpointed), strict=True):
        assert torch.equal(one, other)


def test_less_is_kept_for_the_backward():
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randn(8, 3, 32, 32)).sum()
        return sum(sizes.values())

    checkpointed = network()
    recompute_blocks(checkpointed)
    assert kept(checkpointed) < 0.5 * kept(network())


def test_nothing_is_computed_again_in_evaluation():
    model = network()
    recompute_blocks(model)
    calls: list[int] = []
    model[1][0].first.register_forward_hook(lambda *_: calls.append(1))
    model.eval()(torch.randn(1, 3, 12, 12)).sum().backward()
    assert len(calls) == 1
    model.train()(torch.randn(1, 3, 12, 12)).sum().backward()
    assert len(calls) == 3


def test_a_copy_works_by_itself():
    """As the moving average of the weights is made."""
    model = network()
    recompute_blocks(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.randn(2, 3, 12, 12)
    assert other.train()(x).abs().sum() == 0 and model.train()(x).abs().sum() > 0


def test_blocks_are_found_in_known_networks():
    from torchvision.models import mobilenet_v3_small, resnet18

    assert list(blocks(resnet18())) == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert len(blocks(mobilenet_v3_small())) == 11


def test_a_plain_chain_has_no_block():
    with pytest.raises(UserError, match="no sequence of blocks"):
        recompute_blocks(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))


def test_the_config_turns_it_on():
    cfg = config()
    cfg = cfg.model_copy(update={"runtime": cfg.runtime.model_copy(update={"checkpointing": True})})
    with session(cfg.runtime):
        assert "3 blocks are computed again" in prepare(network(), cfg).report
    with pytest.raises(ValueError, match="compile and checkpointing exclude each other"):
        RuntimeConfig(compile=True, checkpointing=True)

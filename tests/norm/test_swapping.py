"""Layers are replaced wherever a network holds them, with what its user has put on them."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque, namedtuple
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import norm

Block = namedtuple("Block", "conv norm")


class Holder(nn.Module):
    """Registers its layers, and calls them as `hold` has put them away."""

    def __init__(self, hold: Any, call: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.held, self.call = hold(self.conv, self.norm), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, x)  # type: ignore[no-any-return]


def of_default(conv: nn.Module, batch_norm: nn.Module) -> Any:
    found: Any = defaultdict(list)
    found["stage"] += [conv, batch_norm]
    return found


def in_set(held: Any, x: Tensor) -> Tensor:
    convolutions = [one for one in held if isinstance(one, nn.Conv2d)]
    others = [one for one in held if not isinstance(one, nn.Conv2d)]
    return others[0](convolutions[0](x))  # type: ignore[no-any-return]


HELD: dict[str, tuple[Any, Any]] = {
    "list": (lambda c, b: [c, b], lambda h, x: h[1](h[0](x))),
    "tuple": (lambda c, b: ((c,), b), lambda h, x: h[1](h[0][0](x))),
    "namedtuple": (lambda c, b: [Block(c, b)], lambda h, x: h[0].norm(h[0].conv(x))),
    "defaultdict": (of_default, lambda h, x: h["stage"][1](h["stage"][0](x))),
    "OrderedDict": (lambda c, b: OrderedDict(c=c, b=b), lambda h, x: h["b"](h["c"](x))),
    "deque": (lambda c, b: deque([c, b]), lambda h, x: h[1](h[0](x))),
    "keys": (lambda c, b: {c: 1, b: 2}, lambda h, x: [*h][1]([*h][0](x))),
    "frozenset": (lambda c, b: frozenset([c, b]), in_set),
    "set": (lambda c, b: {c, b}, in_set),
    "partial": (lambda c, b: (functools.partial(c), functools.partial(b)), lambda h, x: h[1](h[0](x))),
    "bound method": (lambda c, b: (c.forward, b.forward), lambda h, x: h[1](h[0](x))),
}


@pytest.mark.parametrize("kind", HELD)
def test_layers_are_replaced_wherever_they_are_held(kind: str) -> None:
    torch.manual_seed(0)
    model = Holder(*HELD[kind])
    norm.convert(model, "deconv", stem_freeze=False)
    for x in torch.randn(3, 2, 3, 8, 8):
        model(x).square().mean().backward()
    assert model.conv.weight.grad is not None and isinstance(model.conv, norm.FastDeconv)
    assert (model.conv.running_mean != 0).any()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(norm.fold(model)(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_what_holds_no_such_layer_stays_itself() -> None:
    model = Holder(lambda c, b: [c, b], lambda h, x: h[1](h[0](x)))
    model.others = (3, functools.partial(print), torch.Size([2]), {"a": (1, 2)}, torch.relu)  # type: ignore[assignment]
    before = model.others
    norm.convert(model, "deconv")
    assert model.others is before


class Indexed(nn.Module):
    """As YOLO's networks: each layer knows where its input comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)])
        for number, layer in enumerate(self.layers):
            layer.f, layer.i = -1, number  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            assert layer.f == -1 and layer.i == number
            x = layer(x)
        return x


@pytest.mark.parametrize("recipe", ["deconv", "deconv_fast", "gn", "sync_bn", "frozen_bn", "none", "in", "ln"])
def test_what_was_put_on_a_layer_stays_on_it(recipe: str) -> None:
    model = Indexed()
    first: Any = model.layers[0]
    first.weight.no_weight_decay = True
    norm.convert(model, recipe, **({"groups": 2} if recipe == "gn" else {}))
    assert model.layers[0].weight.no_weight_decay
    x = torch.randn(2, 3, 8, 8)
    model.eval()(x)
    norm.fold(model)(x)


def test_methods_and_layers_that_were_put_on_a_layer_go_with_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    first: Any = model[0]

    def forward(self: Any) -> float:
        return float(self.weight.detach().abs().sum())

    first.penalty, first.twin = MethodType(forward, first), (model[2],)
    model.call = first.penalty  # type: ignore[assignment]
    norm.convert(model, "deconv")
    now: Any = model[0]
    nn.init.zeros_(now.weight)
    assert now.penalty() == 0 and model.call() == 0 and now.twin[0] is model[2] is not None
    assert isinstance(model[2], norm.FastDeconv)


def test_parameters_of_wrapped_layers_keep_what_was_put_on_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].weight.lr_scale = 0.1
    norm.convert(model, "deconv", fc_block=4, delinear=False)
    (weight,) = (one for name, one in model[3].named_parameters() if name.endswith("weight"))
    assert weight.lr_scale == 0.1


def test_a_narrow_default_dtype_is_no_hindrance() -> None:
    from norm import swapping

    swapping._of_layers.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        norm.convert(model, "gn", groups=2)
        layer = norm.FastDeconv(3, 8, 3, every=4, rank=2, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(model[1], nn.GroupNorm)
    torch.testing.assert_close(layer.basis.mT @ layer.basis, torch.eye(2))


def test_what_a_layer_has_by_itself_is_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 2))
    norm.convert(model, "deconv", fc_block=8, momentum=0.3)
    assert not hasattr(model[1], "num_features") and model[0].momentum == 0.3
    plain = norm.fold(model.eval())
    assert vars(plain[0]).keys() == vars(nn.Conv2d(3, 4, 3)).keys()
    assert vars(plain[3]).keys() == vars(nn.Linear(3, 4)).keys()


@pytest.mark.parametrize("recipe", ["deconv", "none"])
def test_a_weight_of_other_sizes_than_its_layer_says_is_an_error(recipe: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    model[0].weight = nn.Parameter(model[0].weight.sum(1, keepdim=True))
    before = model[0]
    with pytest.raises(norm.NormError, match=r"0 has a weight of shape \(8, 1, 3, 3\), but its .* say \(8, 3, 3, 3\)"):
        norm.convert(model, recipe)
    assert model[0] is before
    head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
    head[3].weight = nn.Parameter(head[3].weight[:1])
    with pytest.raises(norm.NormError, match=r"3 has a weight of shape \(1, 8\), but its .* say \(10, 8\)"):
        norm.convert(head, "deconv", fc_block=8)


def test_folded_in_inference_mode_it_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    norm.convert(model, "deconv")
    with torch.inference_mode():
        plain = norm.fold(model.eval())
    plain(torch.randn(2, 3, 8, 8)).sum().backward()
    assert plain[0].weight.grad is not None


def test_an_ensemble_is_evaluated_at_once() -> None:
    torch.manual_seed(0)
    nets = []
    for _ in range(2):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        norm.convert(net, "deconv")
        net(torch.randn(9, 3, 8, 8))
        nets.append(net.eval())
    parameters, buffers = torch.func.stack_module_state(nets)
    x = torch.randn(2, 3, 8, 8)

    def one(p: Any, b: Any) -> Tensor:
        return torch.func.functional_call(nets[0], (p, b), (x,))  # type: ignore[no-any-return]

    found = torch.vmap(one)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([net(x) for net in nets]), rtol=1e-4, atol=1e-5)


def test_steps_are_those_of_the_buffers_that_are_given() -> None:
    """DistributedDataParallel copies the first process's buffers into the others'; a call may have its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    norm.convert(net, "deconv", freeze_iter=2)
    assert net[0].freeze
    fresh = {name: one.clone() for name, one in net.named_buffers()}
    x = torch.randn(9, 3, 8, 8)
    want = net(x)
    for _ in range(4):
        net(torch.randn_like(x))
    later = {name: one.clone() for name, one in net.named_buffers()}
    assert int(net[0].steps) == 5 and net[0].train()._counted_last()
    found = torch.func.functional_call(net, (dict(net.named_parameters()), fresh), (x,))
    torch.testing.assert_close(found, want)
    assert int(fresh["0.steps"]) == 1
    net[0].steps.fill_(3)
    assert not net[0]._counted_last() and net[0].train()._steps == 3
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    norm.convert(other, "deconv", freeze_iter=2)
    with torch.no_grad():
        for name, one in other.named_buffers():
            one.copy_(later[name])
    other[0].load_state_dict({**dict(net[0].named_parameters())}, strict=False)
    held = other.train()(x)
    torch.testing.assert_close(held, norm.fold(other)(x), rtol=1e-4, atol=1e-5)

"""What trainings do around the layers: computing again for the backward, overflows, no image at all, copied buffers,
inputs that do not fit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import norm
from norm import ChannelDeconv, Delinear, FastDeconv
from norm.running_shape import Averages

RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("deconv", {"stem_freeze": True, "freeze_iter": 2}),
    ("deconv", {"fc_block": 4, "delinear": False}),
    ("deconv_fast", {"freeze_iter": 2}),
    ("deconv_fast", {"rank": 4, "fresh_steps": 2, "every": 2, "fc_block": 8}),
]


def network(recipe: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 5)
    )
    norm.convert(model, recipe, **options)
    return model


def images(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(9, 3, 8, 8)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("recipe", "options"), RECIPES)
def test_torchs_checkpointing_changes_nothing(recipe: str, options: dict[str, Any], reentrant: bool) -> None:
    plain = network(recipe, **options)
    again = copy.deepcopy(plain)
    for step in range(5):
        x = images(step).requires_grad_()
        plain(x).square().sum().backward()
        checkpoint(again, x, use_reentrant=reentrant).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_calls_before_a_checkpoints_backward(reentrant: bool) -> None:
    """The exact method computes each again; the cheap one holds the shape of the latest alone, and says so."""

    def loss(model: nn.Module, again: bool) -> Tensor:
        first, second = images(1).requires_grad_(), images(2).mul(3).requires_grad_()
        outs = [checkpoint(model, x, use_reentrant=reentrant) if again else model(x) for x in (first, second)]
        return (outs[0] - outs[1]).square().mean()

    found = []
    for again in (False, True):
        model = network("deconv", fc_block=8, stem_freeze=False)
        loss(model, again).backward()
        found.append([each.grad for each in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    cheap = network("deconv_fast", fc_block=8)
    with pytest.raises(
        norm.NormError, match=r"FastDeconv was called more than once|Delinear was called more than once"
    ):
        loss(cheap, True).backward()
    cheap = network("deconv_fast", fc_block=8)
    with torch.no_grad():
        cheap(images(3))  # a look at the loss before: the call after it is the latest
    checkpoint(cheap, images(1).requires_grad_(), use_reentrant=reentrant).sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(("recipe", "options"), RECIPES)
def test_one_batch_that_overflows_does_not_end_a_training(recipe: str, options: dict[str, Any], bad: float) -> None:
    model, other = network(recipe, **options), network(recipe, **options)
    for step in range(6):
        x = images(step)
        if step == 1:
            x[0, 1, 2, 3] = bad
        got, want = model(x), other(images(step))
        assert step == 1 or got.isfinite().all(), f"step {step}"
    assert want.isfinite().all()
    for layer in model.modules():
        if isinstance(layer, (FastDeconv, Delinear)) and layer.every:
            used: Averages = layer._averages()
            assert all(each.isfinite().all() for each in used[2:] if each is not None)


@pytest.mark.parametrize(("recipe", "options"), RECIPES)
def test_averages_that_overflowed_are_not_folded_and_can_be_taken_anew(recipe: str, options: dict[str, Any]) -> None:
    model = network(recipe, **options)
    x = images(0)
    x[0, 1, 2, 3] = float("inf")
    for batch in (x, images(1)):
        model(batch)
    with pytest.raises(norm.NormError, match=r"\w: its running statistics are not finite.*precise_statistics"):
        norm.fold(model)
    norm.precise_statistics(model, [images(step) for step in range(3)])
    plain = norm.fold(model)
    torch.testing.assert_close(plain(images(3)), model.eval()(images(3)), rtol=1e-3, atol=1e-3)
    assert plain(images(3)).isfinite().all()


def test_a_bad_batch_moves_no_shape() -> None:
    layer = FastDeconv(4, 4, 3, every=1, fresh_steps=0, rank=2)
    layer(torch.randn(9, 4, 8, 8))
    before = copy.deepcopy(layer._averages()[2:])
    layer(torch.full((9, 4, 8, 8), float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(before, layer._averages()[2:], strict=True))
    layer(torch.randn(9, 4, 8, 8))
    assert not any(torch.equal(a, b) for a, b in zip(before, layer._averages()[2:], strict=True))


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"freeze": True}])
def test_no_image_moves_nothing_and_has_a_gradient(options: dict[str, Any]) -> None:
    layer = FastDeconv(3, 4, 3, padding=1, **options)
    layer(images(0))
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, 3, 8, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 4, 8, 8) and x.grad is not None and x.grad.shape == x.shape
    assert layer.weight.grad is not None and not layer.weight.grad.any()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("layer", "seen", "x"),
    [
        (Delinear(4, 3), (9, 4), (0, 4)),
        (Delinear(4, 3, every=2), (2, 5, 4), (2, 0, 4)),
        (ChannelDeconv(4), (9, 6), (0, 6)),
        (ChannelDeconv(4), (9, 6, 4, 4), (0, 6, 4, 4)),
        (ChannelDeconv(4, features_last=True), (2, 9, 6), (2, 0, 6)),
    ],
)
def test_no_feature_vector_moves_nothing(layer: nn.Module, seen: tuple[int, ...], x: tuple[int, ...]) -> None:
    layer(torch.randn(seen))
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False):
        y = layer.train(training)(torch.zeros(x))
        assert y.shape == (*x[:-1], 3) if isinstance(layer, Delinear) else y.shape == x
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("layer", "x", "text"),
    [
        (FastDeconv(3, 4, 3), torch.ones(2, 3, 8, 8, dtype=torch.uint8), "an input of torch.uint8; expected .*float32"),
        (FastDeconv(3, 4, 3), torch.ones(2, 3, 8, 8).half(), "an input of torch.float16; expected .*float32"),
        (Delinear(4, 3), torch.ones(2, 4, dtype=torch.int64), "Delinear got an input of torch.int64"),
        (ChannelDeconv(4), torch.ones(2, 4, dtype=torch.int64), "ChannelDeconv got an input of torch.int64"),
        (FastDeconv(3, 4, 5), torch.ones(2, 3, 8, 4), "a kernel of 5x5 .* does not fit into an input of 8x4"),
    ],
)
def test_what_a_plain_layer_refuses_is_refused(layer: nn.Module, x: Tensor, text: str) -> None:
    with pytest.raises(norm.NormError, match=text):
        layer(x)
    if "kernel" not in text:
        with pytest.raises(norm.NormError, match=text):
            layer.eval()(x)


def test_a_copy_of_averages_is_trained_on_with_their_count() -> None:
    model = network("deconv_fast")
    for step in range(3):
        model(images(step))
    copied = AveragedModel(network("deconv_fast"), use_buffers=True)
    copied.update_parameters(model)
    copied.eval().train()
    counts = [layer._steps for layer in copied.modules() if isinstance(layer, FastDeconv)]
    assert counts == [3, 3]


def test_the_default_device_may_be_another_one() -> None:
    with torch.device("meta"):
        layer = FastDeconv(8, 8, 3, every=4, rank=4)
    assert {each.device.type for each in (*layer.parameters(), *layer.buffers())} == {"meta"}

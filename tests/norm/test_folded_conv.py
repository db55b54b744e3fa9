"""Folding anew in the backward changes what is kept, not what is computed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from norm import Delinear, FastDeconv, folded_conv


def both(layer: FastDeconv, x: Tensor, monkeypatch: pytest.MonkeyPatch, amp: bool = False) -> list[list[Tensor | None]]:
    """Output and gradients, folded anew and not."""
    results = []
    for anew in (True, False):
        monkeypatch.setattr(folded_conv, "worth_it", lambda *_, anew=anew: anew)
        twin, source = copy.deepcopy(layer), x.detach().clone().requires_grad_(x.requires_grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = twin(source)
        if y.requires_grad:
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        results.append([y, source.grad, *(each.grad for each in twin.parameters())])
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2},
        {"groups": 2, "block": 2},
        {"stride": 2, "bias": False},
        {"dilation": 2, "every": 2},
        {"grouping": "published", "block": 4},
    ],
    ids=str,
)
def test_equal_to_the_kept_weight(options: dict, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer = FastDeconv(8, 6, 3, padding=1, **options).double()
    for a, b in zip(*both(layer, torch.randn(2, 8, 9, 9).double().requires_grad_(), monkeypatch), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_and_inputs_without_gradient(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer = FastDeconv(4, 4, 3)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    for x in (torch.randn(2, 4, 9, 9), torch.randn(2, 4, 9, 9).requires_grad_()):
        for a, b in zip(*both(layer, x, monkeypatch), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("every", [0, 2])
def test_the_gradient_lies_as_the_weight_does(every: int, amp: bool):
    """Else autograd copies it once more, into these strides."""
    layer = FastDeconv(8, 6, 3, every=every).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = layer(x)
    (grad,) = torch.autograd.grad(y.float().square().mean(), layer.weight)
    assert grad.stride() == layer.weight.stride() != torch.empty(6, 8, 3, 3).stride()
    assert grad.dtype == torch.float32


def test_under_autocast_it_is_the_convolution_of_autocast(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    anew, kept = both(FastDeconv(4, 4, 3), torch.randn(2, 4, 9, 9).requires_grad_(), monkeypatch, amp=True)
    assert anew[0].dtype is kept[0].dtype is torch.bfloat16
    for a, b in zip(anew, kept, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def test_neither_patches_nor_the_folded_weight_are_kept():
    """What is kept beside the input and the parameters: D, mean, the eigenbasis and eigenvalues of the inverse root."""
    layer, x = FastDeconv(16, 512, 3, padding=1), torch.randn(4, 16, 24, 24).requires_grad_()
    own = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    features, weight = layer.features, layer.weight.numel() * 4
    assert sum(size for place, size in kept.items() if place not in own) < 2.2 * features**2 * 4 < weight + features**2


def test_it_is_done_where_it_is_cheap():
    assert folded_conv.worth_it(576, 2, (32, 32)) and not folded_conv.worth_it(576, 32, (4, 4))


def test_a_network_trains_through_it():
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(3, 8, 3, padding=1), nn.ReLU(), FastDeconv(8, 4, 3, padding=1))
    x, y = torch.randn(8, 3, 12, 12), torch.randn(8, 4, 12, 12)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


class Products(TorchDispatchMode):
    """The dtypes of the products of matrices (not with one vector), by the number of rows of their first factor."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[int, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[1].shape[-1] > 1:
            self.dtypes.setdefault(args[0].shape[-2], set()).update(each.dtype for each in args)
        return func(*args, **(kwargs or {}))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"every": 2}, {"every": 2, "rank": 8}, {"gain": True}], ids=str)
def test_the_product_with_d_is_bfloat16_under_autocast(options: dict, anew: bool, monkeypatch: pytest.MonkeyPatch):
    """As precise as bfloat16 is, 2^-9 a rounding, where the convolution and W D have one each."""
    torch.manual_seed(0)
    monkeypatch.setattr(folded_conv, "worth_it", lambda *_: anew)
    layer = FastDeconv(16, 24, 3, padding=1, block=16, **options)
    smooth = nn.functional.interpolate(torch.randn(4, 16, 5, 5), (16, 16), mode="bicubic")
    compare(layer, smooth + 0.3 * torch.randn(4, 16, 16, 16), rows=24 // layer.groups)


@pytest.mark.parametrize("options", [{}, {"every": 2}], ids=str)
def test_so_is_that_of_a_linear_layer(options: dict):
    torch.manual_seed(0)
    compare(Delinear(32, 24, block=16, **options), torch.randn(64, 32), rows=48)


def compare(layer: FastDeconv | Delinear, x: Tensor, rows: int) -> None:
    """With float64; `rows` is how many the weight has as the product with D takes it.

    torch's own convolution is less precise in bfloat16 on processors without instructions for it. There the product may
    be so too, by a tenth of what the convolution alone deviates.
    """
    results = []
    chosen = folded_conv.product_dtype
    for dtype, product in ((torch.float64, chosen), (torch.float32, lambda _: None), (torch.float32, chosen)):
        twin, source = copy.deepcopy(layer).to(dtype), x.to(dtype).relu().requires_grad_()
        with pytest.MonkeyPatch.context() as patch, Products() as products:
            patch.setattr(folded_conv, "product_dtype", product)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
                y = twin(source)
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).sin().to(y.dtype))
        results.append([y, source.grad, *(each.grad for each in twin.parameters())])
    for exact, convolved, rounded in zip(*results, strict=True):
        assert relative(rounded, exact) < max(0.015, 1.1 * relative(convolved, exact))
    assert products.dtypes[rows] == {torch.bfloat16}


def test_it_stays_float32_in_float16s_small_range():
    layer = FastDeconv(16, 24, 3, padding=1, block=16)
    with Products() as products, torch.autocast("cpu", torch.float16):
        y = layer(torch.randn(4, 16, 16, 16))
        y.float().sum().backward()
    assert y.dtype is torch.float16 and products.dtypes[24] == {torch.float32}


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "dilation", "every"),
    [(32, 32, 3, 2, 0), (32, 32, 5, 2, 0), (32, 32, 3, 6, 4), (64, 8, 3, 2, 0), (24, 1, 3, 2, 0)],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_dilated_layers_in_channels_last(
    channels: int, groups: int, kernel: int, dilation: int, every: int, training: bool
):
    """torch's own is noise where a CPU has instructions for bfloat16 (`folded_conv.misled`)."""
    torch.manual_seed(0)
    around = dilation * (kernel // 2)
    layer = FastDeconv(channels, channels, kernel, padding=around, dilation=dilation, groups=groups, every=every)
    x = torch.randn(2, channels, 23, 30)
    layer.train(training)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        twin = copy.deepcopy(layer).to(memory_format=layout)  # type: ignore[call-overload]
        source = x.clone(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = twin(source)
        y.float().sin().sum().backward()
        assert y.is_contiguous(memory_format=layout) and source.grad.is_contiguous(memory_format=layout)
        found.append([y.float(), source.grad, twin.weight.grad, twin.bias.grad])
    for usual, last in zip(*found, strict=True):
        assert (usual - last).norm() < 0.03 * usual.norm()

"""The running shape (`every`) against a plain float64 reference written from its formulas, and the rows it sees."""

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import norm
from norm import Delinear, FastDeconv, whitening
from tests.norm.reference import inverse_root

D64 = torch.float64

CASES: dict[str, dict[str, Any]] = {
    "3x3": dict(channels=8, out=6, kernel_size=3, padding=1, block=8),
    "blocks": dict(channels=8, out=6, kernel_size=3, padding=1, block=4, stride=2),
    "groups": dict(channels=8, out=4, kernel_size=3, padding=1, groups=2),
    "groups of blocks": dict(channels=12, out=4, kernel_size=3, padding=1, groups=2, block=3),
    "depthwise": dict(channels=6, out=12, kernel_size=3, padding=1, groups=6, dilation=2),
    "1x1": dict(channels=8, out=6, kernel_size=1, block=4),
    "stem": dict(channels=3, out=4, kernel_size=7, stride=2, padding=3, n_iter=15),
}


def make(case: str, **more: Any) -> FastDeconv:
    torch.manual_seed(0)
    options = {"rank": 1000, "fresh_steps": 0, **CASES[case], **more}
    return FastDeconv(options.pop("channels"), options.pop("out"), **options).to(D64)


def image(layer: FastDeconv) -> Tensor:
    x = torch.randn(3, layer.in_channels, 15, 14, dtype=D64).cumsum(-1) / 3
    return x + torch.randn(layer.in_channels, 1, 1, dtype=D64)


class Reference:
    """One D after the other; the state that the layer should have."""

    def __init__(self, layer: FastDeconv) -> None:
        self.layer, eye = layer, torch.eye(layer.features, dtype=D64)
        self.count = 1 if layer.groups == 1 else layer.in_channels // layer.block
        self.covariance, self.shape = [eye] * self.count, [eye] * self.count
        self.mean = torch.zeros(self.count, layer.features, dtype=D64)
        self.scale = torch.ones(self.count, dtype=D64)
        self.steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        layer, t = self.layer, self.steps
        patches = layer.patches(x, layer.padding).reshape(self.count, layer.features, -1)
        outs: list[Any] = [0] * layer.groups
        for g in range(self.count):
            rows = patches[g].t()
            mean = rows.mean(0)
            scale = ((rows - mean) ** 2).mean() + layer.eps
            rate = max(layer.momentum, 1 / (t + 1))
            self.mean[g] = (1 - rate) * self.mean[g] + rate * mean.detach()
            root = (1 - rate) / self.scale[g].sqrt() + rate / scale.detach().sqrt()  # D is averaged, as in the paper
            self.scale[g] = 1 / root**2
            if t < layer.fresh_steps or t % layer.every == (t // layer.every) % layer.every:
                centred = (rows - mean).detach()
                eye = torch.eye(layer.features, dtype=D64)
                now = (centred.t() @ centred / len(rows) + layer.eps * eye) / scale.detach()
                since = sum(s % layer.every == (s // layer.every) % layer.every for s in range(layer.fresh_steps, t))
                rate = 1 if t < layer.fresh_steps else max(1 - (1 - layer.momentum) ** layer.every, 1 / (since + 1))
                self.covariance[g] = (1 - rate) * self.covariance[g] + rate * now
                self.shape[g] = inverse_root(self.covariance[g], layer.n_iter)
            deconv = self.shape[g] / scale.sqrt()
            out, (group, place) = layer.out_channels // layer.groups, divmod(g, self.count // layer.groups)
            weight = layer.weight[group * out : (group + 1) * out]
            if layer.groups > 1:
                weight = weight[:, place * layer.block : (place + 1) * layer.block]
            weight = weight.reshape(-1, layer.features) @ deconv
            bias = (0 if place else layer.bias[group * out : (group + 1) * out]) - (weight @ mean).view(out, -1).sum(1)
            inside, kernel = x.chunk(self.count, 1)[g], weight.view(out, -1, *layer.kernel_size)
            outs[group] += F.conv2d(inside, kernel, bias, layer.stride, layer.padding, layer.dilation)
        self.steps += 1
        return torch.cat(outs, 1)


@pytest.mark.parametrize("every, fresh_steps", [(1, 0), (3, 0), (3, 4)])
@pytest.mark.parametrize("case", CASES)
def test_outputs_statistics_and_gradients_equal_the_formulas(case: str, every: int, fresh_steps: int):
    layer = make(case, every=every, fresh_steps=fresh_steps)
    reference = Reference(layer)
    for _ in range(fresh_steps + 5):
        x = image(layer).requires_grad_()
        inputs = [x, *layer.parameters()]
        want = reference(x)
        got = layer(x)
        upstream = torch.randn_like(want)
        want_grads = torch.autograd.grad(want, inputs, upstream)
        got_grads = torch.autograd.grad(got, inputs, upstream)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer.running_mean, reference.mean.flatten())
    torch.testing.assert_close(layer.running_scale.view(-1), reference.scale)
    roots = torch.stack(reference.shape) * reference.scale.rsqrt().view(-1, 1, 1)
    torch.testing.assert_close(layer.deconv().view_as(roots), roots)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_and_folding_use_the_running_statistics(case: str):
    layer = make(case, every=2)
    for _ in range(3):
        layer(image(layer))
    layer.eval()
    x = image(layer)
    found = whitening.Statistics(layer.running_mean, layer.deconv())
    weight, bias = whitening.fold_weight(layer.weight, layer.bias, found, layer.matrices, layer.grouping)
    want = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(norm.fold(nn.Sequential(layer))(x), want)
    assert int(layer.steps) == 3


def test_a_stored_layer_goes_on_where_it_stopped():
    layer = make("blocks", every=3)
    for _ in range(4):
        layer(image(layer))
    other = make("blocks", every=3)
    other.load_state_dict(layer.state_dict())
    for _ in range(4):
        x = image(layer)
        assert torch.equal(layer(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), other.buffers(), strict=True))


def test_delinear_is_the_layer_of_1x1_maps():
    torch.manual_seed(0)
    linear, conv = (
        Delinear(8, 5, block=4, every=2, rank=4, fresh_steps=0).to(D64),
        make("1x1", every=2, out=5, sampling_stride=1),
    )
    conv.load_state_dict({k: v.view(conv.state_dict()[k].shape) for k, v in linear.state_dict().items()})
    for _ in range(3):
        x = torch.randn(7, 8, dtype=D64)
        torch.testing.assert_close(linear(x), conv(x[:, :, None, None]).flatten(1))


def test_a_held_stem_uses_the_running_statistics():
    layer = make("stem", every=1, freeze=True, freeze_iter=1)
    layer(image(layer))
    before = copy.deepcopy(layer)
    x = image(layer)
    torch.testing.assert_close(layer(x), before.eval()(x))
    assert torch.equal(layer.shape, before.shape)


def test_calibration_keeps_the_function_and_the_averages_go_on_from_there():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    images = torch.randn(4, 3, 12, 12)
    for _ in range(20):
        net(images)
    net.eval()
    want = net(images)
    norm.convert(net, "deconv", every=2, rank=1000, stem_freeze=False, calibrate=images)
    torch.testing.assert_close(net(images), want, rtol=1e-3, atol=1e-4)
    layer, before = net[3], net[3].deconv().clone()
    net.train()
    net(torch.randn(4, 3, 12, 12))
    moved = (layer.deconv() - before).norm() / before.norm()
    assert 0 < moved < 0.5


def test_it_works_under_autocast_and_compiled():
    layer = make("blocks", every=2).float()
    twin = copy.deepcopy(layer)
    x = image(layer).float()
    want = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype is torch.bfloat16 and layer.shape.dtype is torch.float32
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
    twin.compile(backend="aot_eager")
    torch.testing.assert_close(twin(x), want)


def test_blocks_by_features():
    net = nn.Sequential(nn.Conv2d(80, 112, 3), nn.Conv2d(112, 8, 1), nn.Conv2d(8, 700, 1), nn.Conv2d(700, 7, 1))
    norm.convert(net, "deconv", block_features=640)
    assert [layer.block for layer in net] == [40, 112, 8, 700]  # 40 x 9 = 360; the last layer is whitened whole
    assert math.prod(net[0].running_deconv.shape) == 360**2


def test_options_out_of_range():
    with pytest.raises(norm.NormError, match="every is -1, fresh_steps 100"):
        FastDeconv(3, 3, 3, every=-1)
    with pytest.raises(norm.NormError, match="max_rows -5"):
        FastDeconv(3, 3, 3, max_rows=-5)
    with pytest.raises(norm.NormError, match="block_features=-1"):
        norm.convert(nn.Conv2d(3, 3, 3), "deconv", block_features=-1)


def test_importing_the_package_does_not_import_the_compiler():
    """It takes longer than torch itself."""
    command = "import sys; from norm import *; assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(norm.__file__).parent.parent)


def test_few_patches_are_told_once(recwarn):
    few, enough = torch.randn(2, 64, 2, 2), torch.randn(72, 64, 2, 2)  # 8 and 288 patches of 576 features
    FastDeconv(64, 8, 3, padding=1, dense_small_maps=True, every=4)(few)  # a first layer: nothing goes back further
    few.requires_grad_(), enough.requires_grad_()
    FastDeconv(64, 8, 3, padding=1, dense_small_maps=True)(few)
    for images in (enough, few):
        FastDeconv(64, 8, 3, padding=1, dense_small_maps=True, every=4).eval()(images)
    layer = FastDeconv(64, 8, 3, padding=1, dense_small_maps=True, every=4)
    for images in (enough, few):
        layer(images)
    assert not recwarn.list
    layer = FastDeconv(64, 8, 3, padding=1, dense_small_maps=True, every=4)
    with pytest.warns(UserWarning, match="8 patches of 576 features.*larger batch") as told:
        layer(few)
        layer(few)
    assert len(told) == 1


@pytest.mark.parametrize(("every", "groups"), [(0, 1), (4, 1), (0, 2)])
@pytest.mark.parametrize("kernel, stride, size", [(1, 1, 1), (4, 1, 4), (4, 4, 5), (3, 1, 1), (1, 1, 2), (2, 1, 4)])
def test_one_patch_a_block_is_told_and_moves_nothing(every: int, groups: int, kernel: int, stride: int, size: int):
    """A 1x1 map, a kernel as large as the map, a patch embedding with one patch, one among zeros, and the one of a
    small map that every third window gives."""
    torch.manual_seed(0)
    padding = int(kernel > size)
    layer = FastDeconv(32, 8, kernel, stride, padding, block=16, every=every, groups=groups, fresh_steps=0)
    one = torch.randn(1, 32, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(one)
        layer.train()(torch.randn(300, 32, size, size))
    before = copy.deepcopy(layer.state_dict())
    with pytest.warns(UserWarning, match="one image with one patch a block.*two images or more"):
        found = layer(one)
    assert all(torch.equal(held, before[key]) for key, held in layer.state_dict().items())
    torch.testing.assert_close(found, copy.deepcopy(layer).eval()(one))
    found.sum().backward()
    assert layer.weight.grad is not None and (layer.weight.grad != 0).any()
    assert norm.precise_statistics(layer, [one]) == 0

"""The layers against a plain float64 reference written from the formulas, patch by patch."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import norm
from norm import ChannelDeconv, Delinear, FastDeconv
from norm.other_layers import SamePad2d, WSConv2d
from tests.norm.reference import inverse_root

D64 = torch.float64

CASES: dict[str, dict[str, Any]] = {
    "3x3": dict(channels=8, out=6, kernel_size=3, padding=1, block=8),
    "blocks smaller than C": dict(channels=8, out=6, kernel_size=3, padding=1, block=4),
    "block that does not divide": dict(channels=12, out=5, kernel_size=3, padding=1, block=8),
    "stride": dict(channels=6, out=4, kernel_size=3, padding=1, stride=2),
    "dilation": dict(channels=6, out=4, kernel_size=3, padding=2, dilation=2, block=3),
    "groups": dict(channels=8, out=4, kernel_size=3, padding=1, groups=2),
    "groups of blocks": dict(channels=12, out=4, kernel_size=3, padding=1, groups=2, block=4),
    "depthwise": dict(channels=6, out=12, kernel_size=3, padding=1, groups=6, stride=2),
    "1x1": dict(channels=8, out=6, kernel_size=1, block=4),
    "1x1 with stride and padding": dict(channels=8, out=6, kernel_size=1, stride=2, padding=1),
    "1x1 groups": dict(channels=8, out=4, kernel_size=1, groups=4),
    "1x1 groups of blocks": dict(channels=16, out=6, kernel_size=1, groups=2, block=5),
    "7x7 stem": dict(channels=3, out=4, kernel_size=7, stride=2, padding=3, n_iter=15),
    "no bias": dict(channels=4, out=4, kernel_size=3, bias=False),
    "one step": dict(channels=4, out=4, kernel_size=3, n_iter=1),
    "small map": dict(channels=4, out=4, kernel_size=3, stride=2, padding=1, dense_small_maps=True),
    "small 1x1 map": dict(channels=8, out=4, kernel_size=1, stride=2, dense_small_maps=True),
    "every window": dict(channels=4, out=4, kernel_size=3, sampling_stride=1),
}


def reference(layer: FastDeconv, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and D of a training step: patches of every block whitened, then multiplied by the weight."""
    k, s, p, d = layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.dilation[0]
    n, c, _, _ = x.shape
    groups, positions = layer.groups, F.conv2d(x, layer.weight, None, s, p, d, layer.groups).shape[2:]
    every = (layer.sampling_stride,) * 2
    if layer.dense_small_maps:
        every = tuple(1 if side <= 8 else 2 if side <= 16 else layer.sampling_stride for side in positions)
    all_patches = F.unfold(x, k, d, p, s)  # (N, C k k, L)
    apart = every[0] * every[1] * s**2
    if k == 1 and (not layer.dense_small_maps or math.gcd(apart, x.shape[3]) ** 2 <= apart):
        sampled = x.permute(0, 2, 3, 1).reshape(-1, c)[::apart].t()[None]
    else:
        sampled = F.unfold(x, k, d, p, (every[0] * s, every[1] * s))
    features = layer.block * k * k
    blocks = c * k * k // features

    def index(block: int) -> Tensor:
        if groups > 1 or layer.grouping == "channel":
            return torch.arange(block * features, (block + 1) * features)
        return torch.arange(block, c * k * k, blocks)

    def rows(block: int) -> Tensor:
        return sampled[:, index(block)].transpose(1, 2).reshape(-1, features)

    shared = [torch.cat([rows(block) for block in range(blocks)])] if groups == 1 else [rows(b) for b in range(blocks)]
    means, roots = [], []
    for each in shared:
        mean = each.mean(0)
        covariance = (each - mean).t() @ (each - mean) / len(each) + layer.eps * torch.eye(features, dtype=x.dtype)
        means.append(mean)
        roots.append(inverse_root(covariance, layer.n_iter))
    total: Any = 0
    outs = layer.out_channels
    for block in range(blocks):
        which = block if groups > 1 else 0
        white = torch.einsum("fg,ngl->nfl", roots[which], all_patches[:, index(block)] - means[which][:, None])
        if groups == 1:
            total = total + torch.einsum("of,nfl->nol", layer.weight.flatten(1)[:, index(block)], white)
        else:
            group, place = divmod(block, blocks // groups)
            own = slice(group * outs // groups, (group + 1) * outs // groups)
            piece = torch.zeros(n, outs, white.shape[-1], dtype=x.dtype)
            piece[:, own] = layer.weight.flatten(1)[own, place * features : (place + 1) * features] @ white
            total = total + piece
    if layer.bias is not None:
        total = total + layer.bias[:, None]
    shape = F.conv2d(x, layer.weight, None, s, p, d, groups).shape
    return total.view(shape), torch.cat(means), torch.stack(roots) if groups > 1 else roots[0]


def make(case: str, grouping: str = "channel", dtype: torch.dtype = D64) -> tuple[FastDeconv, Tensor]:
    torch.manual_seed(0)
    options = dict(CASES[case])
    channels, out = options.pop("channels"), options.pop("out")
    layer = FastDeconv(channels, out, **options, grouping=grouping).to(dtype)  # type: ignore[arg-type]
    x = torch.randn(3, channels, 17, 14, dtype=dtype).cumsum(-1) / 3 + torch.randn(channels, 1, 1, dtype=dtype)
    return layer, x


@pytest.mark.parametrize("grouping", ["channel", "published"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_statistics_and_gradients_equal_the_formulas(case, grouping):
    layer, x = make(case, grouping)
    x.requires_grad_()
    want, mean, deconv = reference(layer, x)
    upstream = torch.randn_like(want)
    inputs = [x, *layer.parameters()]
    want_grads = torch.autograd.grad(want, inputs, upstream)
    got = layer(x)
    got_grads = torch.autograd.grad(got, inputs, upstream)
    close = dict(rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got, want, **close)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, **close)
    eye = torch.eye(layer.running_deconv.shape[-1], dtype=D64)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, **close)
    torch.testing.assert_close(layer.running_deconv, 0.9 * eye.expand_as(deconv) + 0.1 * deconv, **close)


@pytest.mark.parametrize("n_iter", [5, 15])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [dict(kernel_size=3, padding=1), dict(kernel_size=7, stride=2, padding=3)])
def test_the_first_layer_in_float32_on_images_whose_pixels_are_almost_alike(size, autocast, n_iter):
    """As a camera's are. The paper's 15 steps amplify what differs by up to 1.5^15 = 438, and rounding with it."""
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(8, 3, 4, 4), size=(64, 64), mode="bicubic")
    x = (smooth + smooth.mean(1, keepdim=True) + 0.01 * torch.randn(8, 3, 64, 64)).requires_grad_()
    layer = FastDeconv(3, 8, n_iter=n_iter, **size)
    wide = copy.deepcopy(layer).double()
    wide_x = x.detach().double().requires_grad_()
    want, mean, deconv = reference(wide, wide_x)
    upstream = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, [wide_x, wide.weight], upstream)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = layer(x)
    got_grads = torch.autograd.grad(got, [x, layer.weight], upstream.to(got.dtype))
    compared = [(layer.running_mean, 0.1 * mean), (layer.running_deconv, 0.9 * torch.eye(len(deconv)) + 0.1 * deconv)]
    outputs = [(got, want), *zip(got_grads, want_grads, strict=True)]
    for found, right in compared + ([] if autocast else outputs[: 3 if n_iter == 5 else 2]):
        assert (found - right).abs().max() < 1e-4 * right.abs().max()


@pytest.mark.parametrize("grouping, block, shape", [("channel", 3, (4, 27, 27)), ("published", 6, (2, 54, 54))])
def test_the_authors_whiten_whole_groups(grouping, block, shape):
    layer = FastDeconv(12, 4, 3, groups=2, block=4, grouping=grouping)
    assert (layer.block, tuple(layer.running_deconv.shape)) == (block, shape)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_uses_the_running_averages(case):
    layer, x = make(case)
    for _ in range(3):
        layer(x)
    layer.eval()
    weight, bias = layer.folded()
    want = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    before = layer.running_deconv.clone()
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.running_deconv, before)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_close_to_float64(case):
    layer, x = make(case)
    single = copy.deepcopy(layer).float()
    want = layer(x)
    # Fifteen steps amplify rounding in the directions that five leave alone.
    bound = (1e-2 if layer.n_iter == 15 else 1e-3) * want.detach().abs().max()
    assert (single(x.float()).double() - want).abs().max() < bound


def test_whitened_patches_are_white():
    """What the method is for: with enough steps, the patches that the weight sees have the identity as covariance."""
    torch.manual_seed(0)
    layer = FastDeconv(4, 36, 3, sampling_stride=1, n_iter=30, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(36, dtype=D64).view(36, 4, 3, 3))
    x = torch.randn(4, 4, 20, 20, dtype=D64).cumsum(-1).cumsum(1)
    out = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(out, correction=0), torch.eye(36, dtype=D64), rtol=0, atol=0.02)
    torch.testing.assert_close(out.mean(1), torch.zeros(36, dtype=D64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("grouping, updates", [("channel", 2), ("published", 3)])
def test_freeze_updates_in_the_first_steps_of_every_cycle(grouping, updates):
    layer = FastDeconv(3, 4, 3, freeze=True, freeze_iter=2, grouping=grouping)
    changed = []
    for _ in range(45):
        before = layer.running_deconv.clone()
        layer(torch.randn(2, 3, 9, 9))
        changed.append(not torch.equal(before, layer.running_deconv))
    assert changed == [position % 20 < updates for position in range(45)]


def test_a_held_layer_uses_the_running_averages_and_resumes_its_count():
    layer = FastDeconv(3, 4, 3, freeze=True, freeze_iter=1)
    x = torch.randn(2, 3, 9, 9)
    layer(x)
    held = layer(x)
    torch.testing.assert_close(held, copy.deepcopy(layer).eval()(x))
    other = FastDeconv(3, 4, 3, freeze=True, freeze_iter=1)
    other.load_state_dict(layer.state_dict())
    for _ in range(12):
        torch.testing.assert_close(other(x), layer(x))
    assert torch.equal(other.running_deconv, layer.running_deconv) and int(other.steps) == int(layer.steps) == 14


def replicas(layer: FastDeconv, count: int) -> list[FastDeconv]:
    """As torch.nn.DataParallel makes them, which needs GPUs: the first one has the layer's own buffers."""
    found = [layer._replicate_for_data_parallel() for _ in range(count)]
    for number, replica in enumerate(found):
        for name, parameter in layer._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        replica._buffers = {name: one if number == 0 else one.clone() for name, one in layer._buffers.items()}
    return found


@pytest.mark.parametrize("options", [{"freeze": True, "freeze_iter": 1}, {"every": 3, "fresh_steps": 1, "rank": 4}])
def test_replicas_count_a_step_once(options):
    torch.manual_seed(0)
    layer = FastDeconv(3, 4, 3, **options)
    twin = copy.deepcopy(layer)
    for step in range(1, 12):
        x, other = torch.randn(2, 4, 3, 9, 9)
        first, second = replicas(layer, 2)
        second(other)
        torch.testing.assert_close(first(x), twin(x))
        assert int(layer.steps) == step
    for name, held in twin.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), held)


def test_weights_without_a_count_load():
    layer = FastDeconv(3, 4, 3, freeze=True)
    state = layer.state_dict()
    del state["steps"]
    FastDeconv(3, 4, 3, freeze=True).load_state_dict(state)


def test_evaluation_does_not_count_freeze_steps():
    layer = FastDeconv(3, 4, 3, freeze=True).eval()
    layer(torch.randn(1, 3, 9, 9))
    assert int(layer.steps) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, x = make("blocks smaller than C", dtype=torch.float32)
    want = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", dtype):
        got = layer(x)
    got.float().sum().backward()
    assert got.dtype == dtype and layer.running_deconv.dtype == torch.float32
    assert layer.weight.grad is not None and torch.isfinite(layer.weight.grad).all()
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("every", [0, 2])
def test_autocast_leaves_float64_as_it_is(every: int):
    """As it leaves torch's own convolution and linear layer."""
    torch.manual_seed(0)
    conv = (FastDeconv(3, 4, 3, every=every, dtype=D64), torch.randn(4, 3, 9, 9, dtype=D64))
    linear = (Delinear(6, 4, every=every, dtype=D64), torch.randn(20, 6, dtype=D64))
    for layer, x in (conv, linear):
        want = copy.deepcopy(layer)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), want)


@pytest.mark.parametrize("every", [0, 1])
def test_gradients_of_one_grouped_image_in_channels_last(every: int):
    """In float64, where torch's own convolution takes strides as they are."""
    torch.manual_seed(0)
    layer = FastDeconv(8, 8, 3, padding=1, groups=2, every=every, rank=4, dtype=D64)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, upstream = torch.randn(1, 8, 9, 9, dtype=D64), torch.randn(1, 8, 9, 9, dtype=D64)
    found = []
    for each, memory_format in ((layer, torch.contiguous_format), (twin, torch.channels_last)):
        image = x.clone(memory_format=memory_format).requires_grad_()
        found.append(torch.autograd.grad((each(image) * upstream).sum(), [image, *each.parameters()]))
    torch.testing.assert_close(*found)


def test_channels_last_gives_the_same():
    for case in ("3x3", "1x1", "depthwise"):
        layer, x = make(case)
        twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(twin(x.to(memory_format=torch.channels_last)), layer(x))
        torch.testing.assert_close(twin.running_deconv, layer.running_deconv)


def test_half_and_bfloat16_are_refused_and_double_is_not():
    for layer in (FastDeconv(4, 4, 3), Delinear(4, 4), ChannelDeconv(4)):
        with pytest.raises(norm.NormError, match=r"cannot be turned to torch.float16.*autocast.*fold\(model\).half"):
            nn.Sequential(layer).half()
        with pytest.raises(norm.NormError, match="bfloat16"):
            layer.bfloat16()
        assert layer.double().running_deconv.dtype == D64


def test_state_dict_round_trip_and_deepcopy():
    for layer, x in (
        (FastDeconv(4, 4, 3), torch.randn(3, 4, 9, 9)),
        (Delinear(8, 3, block=4), torch.randn(9, 8)),
        (ChannelDeconv(4), torch.randn(3, 6, 9, 9)),
    ):
        other, blank = copy.deepcopy(layer), copy.deepcopy(layer)
        layer(x)
        assert not torch.equal(layer.running_deconv, blank.running_deconv)
        blank.load_state_dict(layer.state_dict())
        torch.testing.assert_close(blank.eval()(x), copy.deepcopy(layer).eval()(x))
        other(x)
        assert torch.equal(other.running_deconv, layer.running_deconv)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding_modes_pad_before_the_statistics(mode):
    layer = FastDeconv(4, 4, 3, padding=1, padding_mode=mode).double()
    plain = FastDeconv(4, 4, 3).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 10, 10, dtype=D64)
    torch.testing.assert_close(layer(x), plain(F.pad(x, (1, 1, 1, 1), mode)))
    torch.testing.assert_close(layer.running_deconv, plain.running_deconv)


def test_string_padding():
    same, number = FastDeconv(4, 4, 3, padding="same").double(), FastDeconv(4, 4, 3, padding=1).double()
    number.load_state_dict(same.state_dict())
    x = torch.randn(2, 4, 10, 10, dtype=D64)
    torch.testing.assert_close(same(x), number(x))
    assert FastDeconv(4, 4, 4, padding="same")(x.float()).shape[-2:] == (10, 10)
    assert FastDeconv(4, 4, 3, padding="valid")(x.float()).shape[-2:] == (8, 8)


def test_same_pad_pads_the_odd_pixel_right_and_below():
    x = torch.ones(1, 1, 6, 5)
    assert SamePad2d((3, 3), (2, 2), (1, 1))(x).shape == (1, 1, 7, 7)
    padded = SamePad2d((3, 3), (2, 2), (1, 1))(x)
    assert padded[0, 0, 0, 1] == 1 and padded[0, 0, -1].sum() == 0 and padded[0, 0, 0].sum() == 5
    assert SamePad2d((1, 1), (1, 1), (1, 1))(x) is x


def test_one_image_of_one_pixel_is_finite():
    layer = FastDeconv(16, 8, 1)
    out = layer(torch.randn(1, 16, 1, 1))
    out.sum().backward()
    assert torch.isfinite(out).all() and layer.weight.grad is not None and torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("shape", [(40, 12), (5, 8, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_delinear_equals_the_formulas(shape, bias):
    torch.manual_seed(0)
    layer = Delinear(12, 5, bias, block=8).double()
    assert layer.block == 4
    x = torch.randn(*shape, dtype=D64).cumsum(-1).requires_grad_()
    rows = x.reshape(-1, 4)
    mean = rows.mean(0)
    covariance = (rows - mean).t() @ (rows - mean) / len(rows) + 1e-5 * torch.eye(4, dtype=D64)
    deconv = inverse_root(covariance, 5)
    white = ((rows - mean) @ deconv).reshape(x.shape)
    want = white @ layer.weight.t() + (layer.bias if bias else 0)
    upstream = torch.randn_like(want)
    inputs = [x, *layer.parameters()]
    want_grads = torch.autograd.grad(want, inputs, upstream)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    weight, offset = layer.folded()
    torch.testing.assert_close(layer.eval()(x), F.linear(x, weight, offset))


@pytest.mark.parametrize("grouping", ["channel", "published"])
@pytest.mark.parametrize("shape", [(4, 8, 9, 7), (30, 8), (4, 8, 2, 9)])
def test_channel_deconv_whitens_whole_blocks_and_standardises_the_rest(shape, grouping):
    torch.manual_seed(0)
    layer = ChannelDeconv(3, grouping=grouping).double()
    x = (torch.randn(shape, dtype=D64).cumsum(1) + 2).requires_grad_()
    maps = x if x.ndim == 4 else x[:, :, None, None]
    dense = min(maps.shape[2:]) < 3
    index = [[0, 1, 2], [3, 4, 5]] if grouping == "channel" else [[0, 2, 4], [1, 3, 5]]
    rows = torch.cat([maps[:, i].permute(0, 2, 3, 1).reshape(-1, 3) for i in index])
    sampled = rows if dense else rows[::9]
    mean = sampled.mean(0)
    covariance = (sampled - mean).t() @ (sampled - mean) / len(sampled) + 1e-2 * torch.eye(3, dtype=D64)
    deconv = inverse_root(covariance, 5)
    want = torch.empty_like(maps)
    for i in index:
        want[:, i] = torch.einsum("ij,njhw->nihw", deconv, maps[:, i] - mean[:, None, None])
    rest = maps[:, 6:].flatten(1)
    rest = rest if dense else rest[:, ::9]
    want[:, 6:] = (maps[:, 6:] - rest.mean()) / (rest.var() + 1e-2).sqrt()
    got = layer(x)
    torch.testing.assert_close(got, want.view(shape), rtol=1e-8, atol=1e-9)
    upstream = torch.randn_like(got)
    got_grad, want_grad = (torch.autograd.grad(out, x, upstream)[0] for out in (got, want.view(shape)))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.running_deconv, deconv)  # the first batch sets the averages
    layer(x * 2)
    assert (layer.running_mean - 1.1 * mean).abs().max() < 1e-9
    matrix, offset, rank = layer.folded()
    flat = maps.transpose(1, -1)
    want_eval = (flat @ matrix.t() + offset).transpose(1, -1).view(shape)
    torch.testing.assert_close(layer.eval()(x), want_eval)
    assert rank == len(shape)


@pytest.mark.parametrize("every", [0, 1])
def test_a_training_step_leaves_the_gradient_of_an_evaluation_before_it(every: int):
    torch.manual_seed(0)
    model = nn.Sequential(FastDeconv(3, 4, 3, every=every), nn.Flatten(), Delinear(196, 2, block=8, every=every))
    model.append(ChannelDeconv(2))
    x = torch.randn(4, 3, 9, 9, requires_grad=True)
    model(x)
    loss = model.eval()(x).square().sum()
    wanted = [x, *model.parameters()]
    want = torch.autograd.grad(loss, wanted, retain_graph=True)
    model.train()(x)
    assert all(map(torch.equal, torch.autograd.grad(loss, wanted), want))


def test_channel_deconv_takes_one_vector_as_a_linear_layer_does():
    torch.manual_seed(0)
    layer = ChannelDeconv(2, features_last=True)
    layer(torch.randn(9, 6))
    x = torch.randn(6)
    torch.testing.assert_close(layer.eval()(x), layer(x[None])[0])
    assert norm.fold(nn.Sequential(layer))(x).shape == (6,)
    with pytest.raises(norm.NormError, match=r"shape \(6,\); it takes \(N, C\)"):
        ChannelDeconv(2)(x)


def test_channel_deconv_errors():
    with pytest.raises(norm.NormError, match=r"shape \(2, 3, 4\); it takes \(N, C\) or \(N, C, H, W\)"):
        ChannelDeconv(2)(torch.randn(2, 3, 4))
    with pytest.raises(norm.NormError, match="has block 8 but an input of 3 channels"):
        ChannelDeconv(8)(torch.randn(2, 3, 4, 4))
    with pytest.raises(norm.NormError, match="run one batch before folding"):
        ChannelDeconv(8).folded()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"block": 0}, "block is 0; it must be at least 1"),
        ({"n_iter": 0}, "n_iter is 0"),
        ({"n_iter": 31}, "n_iter is 31; it must be at most 30"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"eps": 0.0}, "eps is 0.0; it must be greater than 0"),
        ({"momentum": 1.5}, "momentum is 1.5; it must lie between 0 and 1"),
        ({"sampling_stride": 0}, "sampling_stride is 0"),
        ({"freeze_iter": 0}, "freeze_iter is 0"),
        ({"grouping": "blocks"}, "grouping is 'blocks'; it must be 'channel' or 'published'"),
    ],
)
def test_options_out_of_range_are_named(options, text):
    with pytest.raises(norm.NormError, match=text):
        FastDeconv(4, 4, 3, **options)


def test_weight_standardised_filters_have_mean_zero_and_variance_one():
    layer = WSConv2d(4, 5, 3).double()
    weight = layer.standardised().flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros(5, dtype=D64), atol=1e-12, rtol=0)
    torch.testing.assert_close(weight.var(1, correction=0), torch.ones(5, dtype=D64), atol=1e-6, rtol=0)
    x = torch.randn(2, 4, 8, 8, dtype=D64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.standardised(), layer.bias))


def test_a_stem_that_is_called_several_times_a_step():
    layer = FastDeconv(3, 4, 3, freeze=True, freeze_iter=1)
    for _ in range(12):
        sum(layer(torch.randn(2, 3, 9, 9)).square().sum() for _ in range(3)).backward()


def test_wrong_inputs_are_named():
    with pytest.raises(norm.NormError, match=r"expects an input \(N, 3, H, W\), got \(2, 4, 9, 9\)"):
        FastDeconv(3, 4, 3)(torch.randn(2, 4, 9, 9))


def test_a_second_derivative_is_refused_where_it_would_be_wrong():
    layer = FastDeconv(16, 4, 3)
    x = torch.randn(4, 16, 9, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_a_printed_layer_tells_its_method():
    fast = {"every": 4, "rank": 8, "fresh_steps": 7}
    for layer in (FastDeconv(8, 4, 3, **fast), Delinear(32, 4, **fast)):
        assert "every=4, rank=8, fresh_steps=7" in repr(layer)
    assert "every" not in repr(Delinear(32, 4)) + repr(FastDeconv(8, 4, 3))

"""Conversion of networks that keep, freeze, move or read their layers in other ways than most."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch import distributed as dist
from torchvision.ops import DeformConv2d
from torchvision.ops.misc import FrozenBatchNorm2d

import norm
from norm import ChannelDeconv, Delinear, FastDeconv, NormError
from norm.other_layers import ChannelAffine

D64 = torch.float64


class Listed(nn.Module):
    """Its layers stand in plain containers too, and those are what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.chain: list[Any] = [self.conv, (self.bn,)]
        self.heads = {"main": [self.head]}
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        first, (second,) = self.chain
        return self.heads["main"][0](second(first(x)))  # type: ignore[no-any-return]


def test_layers_in_plain_lists_are_those_that_were_converted_and_folded() -> None:
    model, x = Listed(), torch.randn(4, 3, 9, 9)
    norm.convert(model, "deconv")
    assert model.chain[0] is model.conv and model.chain[1] == (model.bn,) and model.heads["main"] == [model.head]
    assert isinstance(model.conv, FastDeconv) and isinstance(model.bn, nn.Identity) and model.sizes == [1, 2]
    model(x).sum().backward()
    assert model.conv.running_mean.any() and all(p.grad is not None for p in model.parameters())
    plain = norm.fold(model.eval())
    assert not any(isinstance(layer, FastDeconv) for layer in (*plain.modules(), plain.chain[0]))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "swin3d_t"])
def test_linear_layers_that_their_owner_reads_stay(name: str) -> None:
    model = torchvision.models.get_model(name, num_classes=3)
    norm.convert(model, "deconv", fc_block=32)
    found = {type(layer): key for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert set(found) == {nn.Linear, Delinear} and found[nn.Linear].endswith("attn.proj")
    model(torch.randn(1, 3, *([4] if "3d" in name else []), 64, 64)).sum().backward()


@pytest.mark.parametrize("delinear", [True, False])
@pytest.mark.parametrize("name", ["beit", "eva", "swin_v2"])
def test_timms_attention_reads_its_first_layer_alone(name: str, delinear: bool) -> None:
    size: dict[str, Any] = {"img_size": 32, "num_classes": 4}
    model: nn.Module
    if name == "swin_v2":
        model = SwinTransformerV2(patch_size=4, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4, **size)
    else:
        model = {"beit": Beit, "eva": Eva}[name](patch_size=8, embed_dim=16, depth=1, num_heads=2, **size)
    norm.convert(model, "deconv", fc_block=8, delinear=delinear)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    attention = next(layer for layer in model.modules() if hasattr(layer, "qkv"))
    assert type(attention.qkv) is nn.Linear and type(attention.proj) is not nn.Linear
    whitening = [layer for layer in model.modules() if isinstance(layer, Delinear | FastDeconv | ChannelDeconv)]
    assert len(whitening) > 4 and all(layer.running_mean.any() for layer in whitening)


def test_a_transformer_layer_computes_the_same_with_and_without_gradients() -> None:
    """Without, torch hands the weights of both linear layers to one operation."""

    class Own(nn.TransformerEncoderLayer):
        pass

    model = nn.Sequential(Own(8, 2, 16, dropout=0, batch_first=True), nn.Linear(8, 3))
    norm.convert(model, "deconv", fc_block=8)
    assert isinstance(model[1], Delinear) and type(model[0].linear1) is nn.Linear
    x = torch.randn(16, 5, 8) + 2
    for _ in range(3):
        model(x)
    with torch.no_grad():
        want = model.eval()(x)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("name", ["sync_bn", "gn", "in", "ln"])
def test_what_takes_the_place_of_a_frozen_norm_learns(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8))
    norm.convert(model, name)
    assert [parameter.requires_grad for parameter in model[1].parameters()] == [True, True]


def test_a_frozen_norm_that_is_kept_as_a_scale_stays_frozen() -> None:
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.Conv2d(3, 8, 3)).eval()
    norm.convert(model, "deconv", calibrate=torch.randn(4, 3, 9, 9))
    assert isinstance(model[0], ChannelAffine) and not any(each.requires_grad for each in model[0].parameters())
    assert all(each.requires_grad for each in model[1].parameters())


@pytest.mark.parametrize("name", ["deconv", "deconv_fast", "none", "gn"])
def test_weights_keep_their_memory_format(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    options = {"weight_standardisation": True} if name == "gn" else {}
    norm.convert(model.to(memory_format=torch.channels_last), name, **options)  # type: ignore[call-overload]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("delinear", [True, False])
def test_linear_layers_are_converted_on_meta(delinear: bool) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 49, 2))

    with torch.device("meta"):
        model = build()
    norm.convert(model, "deconv", fc_block=4, delinear=delinear)
    assert {each.device.type for each in model.state_dict().values()} == {"meta"}
    real, x = build(), torch.randn(4, 3, 9, 9)
    norm.convert(real, "deconv", fc_block=4, delinear=delinear)
    real(x)
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model.eval()(x), real.eval()(x))


def test_a_layer_with_a_forward_of_its_own_is_not_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    plain = model[1].forward
    model[1].forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    with pytest.raises(norm.NormError, match="1 has a forward of its own.*recipe.*keep"):
        norm.convert(model, "deconv")
    norm.convert(model, "deconv", overrides={"1": {"recipe": "keep"}})
    assert isinstance(model[0], FastDeconv) and type(model[1]) is nn.Conv2d


def test_a_wrapped_network_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 3)))
        with pytest.raises(norm.NormError, match="in a DistributedDataParallel, .*convert before it is wrapped"):
            norm.convert(model, "deconv")
    finally:
        dist.destroy_process_group()


def test_products_that_are_rounded_are_warned_of() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.warns(UserWarning, match=r"'high'\) rounds the products of 15 Newton-Schulz steps"):
            norm.convert(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)), "deconv", n_iter=15)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for recipe in ("deconv", "deconv_fast"):
                norm.convert(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)), recipe)
                options = {"stem_n_iter": 15}  # of 27 features, which are in float64
                norm.convert(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)), recipe, **options)
    finally:
        torch.set_float32_matmul_precision(before)


def test_convolutions_of_other_kinds_are_said_to_be_left() -> None:
    class Deforming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deform, self.bn = nn.Conv2d(3, 18, 3, padding=1), DeformConv2d(3, 4, 3), nn.BatchNorm2d(4)

    report = norm.convert(Deforming(), "deconv")
    assert report.left == {"DeformConv2d": 1} and str(report).endswith("left alone: 1 DeformConv2d")


def test_scripted_parts_stay() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), scripted).eval()
    x = torch.randn(2, 3, 9, 9)
    want = model(x)
    norm.convert(model, "deconv", calibrate=x)
    assert isinstance(model[0], FastDeconv) and model[2] is scripted
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.fold(model)(x), want, rtol=1e-4, atol=1e-4)
    assert norm.precise_statistics(model, x) == 1


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, dtype=torch.complex64), nn.Linear(8, 4, dtype=torch.complex64)])
def test_complex_weights_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    with pytest.raises(norm.NormError, match="1 has weights of torch.complex64; whitening needs"):
        norm.convert(model, "deconv", fc_block=8)
    assert type(model[0]) is nn.Conv2d


def test_block_and_block_features() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3)))

    model = build()
    norm.convert(model, "deconv", block_features=72, overrides={"1": {"block": 4}})
    assert [layer.block for layer in model] == [8, 4, 8]
    model = build()
    norm.convert(model, "deconv", block=4, overrides={"1": {"block_features": 72}})
    assert [layer.block for layer in model] == [4, 8, 4]
    before = copy.deepcopy(model)
    with pytest.raises(norm.NormError, match="block=4 has no effect with block_features=72; set one of both"):
        norm.convert(build(), "deconv", block=4, block_features=72)
    with pytest.raises(norm.NormError, match="called by its name, such as 'deconv', .*found Deconv"):
        norm.convert(model, norm.recipe("deconv"))  # type: ignore[arg-type]
    with pytest.raises(norm.NormError, match=r"overrides is \[.*expected patterns and options"):
        norm.convert(build(), "deconv", overrides=[("1", {"block": 4})])  # type: ignore[arg-type]
    assert [layer.block for layer in model] == [layer.block for layer in before]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("sync_bn", "frozen_bn", "gn", "in", "ln", "none", "deconv")),
        ("bn", {"eps": 0.1}),
        ("deconv_fast", {"gain": True}),
    ],
)
def test_a_norm_of_an_unknown_class_is_named(name: str, options: dict[str, Any]) -> None:
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Own(4))
    with pytest.raises(norm.NormError, match=r"1 is a .*Own, a norm layer that may do more.*recipe.*keep"):
        norm.convert(model, name, **options)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("name", ["deconv", "deconv_fast", "none"])
def test_a_convolution_of_an_unknown_class_is_named(name: str) -> None:
    class Own(nn.Conv2d):
        pass

    options = {} if name == "none" else {"gain": True}
    with pytest.raises(norm.NormError, match=r"0 is a .*Own, a conv layer that may do more.*recipe.*keep"):
        norm.convert(nn.Sequential(Own(3, 4, 3, bias=False)), name, **options)


@pytest.mark.parametrize(("name", "options"), [("in", {}), ("gn", {"groups": 4})])
def test_one_image_behind_image_pooling(name: str, options: dict[str, Any]) -> None:
    """As in DeepLabV3: maps of one pixel, one value a group."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    nn.init.normal_(pooled[2].bias)
    norm.convert(pooled, name, **options)
    x = torch.randn(2, 3, 8, 8)
    pooled(x[:1]).sum().backward()
    bias = pooled[2].bias.detach()
    for output in (pooled.eval()(x)[1], pooled(x[:1]), norm.fold(pooled)(x[:1])):
        torch.testing.assert_close(output.flatten(), bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [StdConv2dSame, ScaledStdConv2dSame])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_that_standardise_and_pad_unevenly(kind: type[nn.Conv2d], stride: int) -> None:
    model, x = nn.Sequential(kind(3, 8, 3, stride=stride, bias=False)).double(), torch.randn(4, 3, 10, 11).double()
    want, deconvolved = model(x), copy.deepcopy(model)
    norm.convert(model, "none")
    torch.testing.assert_close(model(x), want)
    report = norm.convert(deconvolved, "deconv", calibrate=x)
    torch.testing.assert_close(deconvolved.eval()(x), want)
    plain = norm.fold(deconvolved)
    torch.testing.assert_close(plain(x), want)
    assert type(plain[0]) is (Conv2dSame if stride == 2 else nn.Conv2d)
    assert report.deviation is not None and report.deviation < 1e-9


@pytest.mark.parametrize("options", [{}, {"every": 4}, {"block": 4}, {"gain": True}], ids=str)
def test_one_vector_alone_is_taken_with_the_averages(options: dict[str, Any]) -> None:
    """An epoch's last batch of one image: its covariance is eps I, and the average with it would be far off."""
    torch.manual_seed(0)
    layer = Delinear(16, 3, **options)
    for _ in range(3):
        layer(torch.randn(32, 16))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(1, 16, requires_grad=True)
    with pytest.warns(UserWarning, match="one vector alone has no covariance.*drop_last=True"):
        y = layer(x)
    y.sum().backward()
    assert layer.training and x.grad is not None and layer.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(y, layer.eval()(x))
    layer.train()(torch.randn(2, 16))
    assert not torch.equal(layer.running_mean, before["running_mean"])


@pytest.mark.parametrize("name", ["deconv", "deconv_fast"])
def test_timms_linear_layer_is_a_plain_one(name: str) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    assert type(model.classifier) is not nn.Linear
    norm.convert(model, name, fc_block=64)
    assert isinstance(model.classifier, Delinear)
    model.train()(torch.randn(3, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(norm.fold(model.eval())(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deconv", "deconv_fast"])
@pytest.mark.parametrize("delinear", [True, False])
def test_second_and_forward_derivatives_in_evaluation(name: str, delinear: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)).double()
    norm.convert(model, name, fc_block=8, delinear=delinear)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    model(x)
    model.eval()
    torch.autograd.gradcheck(model, x.clone().requires_grad_(), check_forward_ad=True)
    torch.autograd.gradgradcheck(model, x.clone().requires_grad_())
    assert torch.func.grad(lambda each: model(each).sum())(x).shape == x.shape


@pytest.mark.parametrize("delinear", [True, False])
def test_a_converted_network_is_traced(delinear: bool) -> None:
    """As TensorBoard's add_graph does, with gradients; the tracer looks whether it comes to the same without."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    norm.convert(model, "deconv", fc_block=8, delinear=delinear)
    x = torch.randn(3, 3, 6, 6)
    model(x)
    traced = torch.jit.trace(model.eval(), x)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("name", ["deconv", "deconv_fast"])
@pytest.mark.parametrize("training", [True, False])
def test_a_converted_network_runs_on_meta(name: str, training: bool) -> None:
    """For the sizes of what it computes."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        norm.convert(model, name, fc_block=64)
        y = model.train(training)(torch.empty(5, 3, 6, 6))
        y.sum().backward()
    assert y.is_meta and y.shape == (5, 2)


def test_a_layer_that_is_compiled_by_itself_is_refused() -> None:
    """Its wrapper goes on with the old layer, whatever stands in its place."""
    model = nn.Sequential(torch.compile(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(NormError, match=r"^0: torch.compile\(layer\) goes on with the layer that it was given"):
        norm.convert(model, "deconv")
    assert [name for name, _ in model.named_modules()] == names and isinstance(model[1], nn.BatchNorm2d)
    whole = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    norm.convert(whole, "deconv")
    assert any(isinstance(layer, FastDeconv) for layer in whole.modules())


@pytest.mark.parametrize("first", [True, False])
def test_one_vector_alone_does_not_count_in_precise_statistics(first: bool) -> None:
    torch.manual_seed(0)
    layer, batches = Delinear(16, 3), [torch.randn(32, 16), torch.randn(32, 16)]
    wanted, found = copy.deepcopy(layer), copy.deepcopy(layer)
    assert norm.precise_statistics(wanted, batches) == 1
    with pytest.warns(UserWarning, match="one vector alone"):
        assert norm.precise_statistics(
            found, [torch.randn(1, 16), *batches] if first else [*batches, torch.randn(1, 16)]
        )
        assert norm.precise_statistics(layer, torch.randn(1, 16)) == 0
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())

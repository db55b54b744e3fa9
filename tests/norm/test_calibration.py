"""Trained batch-norm networks become deconvolution networks that compute the same function."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

import norm
from norm import FastDeconv
from norm.other_layers import ChannelAffine


def trained(model: nn.Module, size: int = 32) -> nn.Module:
    """Statistics and affine parameters of batch norms unlike those of a new network."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
    for _ in range(5):
        model(torch.randn(8, 3, size, size) + 1)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "regnet_x_400mf"])
def test_the_function_stays(name):
    model = trained(torchvision.models.get_model(name, num_classes=7))
    x = torch.randn(4, 3, 32, 32) + 1
    want = model(x)
    report = norm.convert(model, "deconv", block=16, calibrate=[torch.randn(4, 3, 32, 32) + 1 for _ in range(2)])
    assert (model(x) - want).abs().max() < 1e-3 * want.abs().max()
    assert report.deviation is not None and report.deviation < 1e-3
    assert any(isinstance(layer, FastDeconv) for layer in model.modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    plain = norm.fold(model)
    assert (plain(x) - want).abs().max() < 1e-3 * want.abs().max()
    assert not any(type(layer).__module__.startswith("norm") for layer in plain.modules())
    model.train()(x).sum().backward()


def test_the_function_stays_where_groups_have_several_blocks():
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=2), nn.BatchNorm2d(6)]
    model = trained(nn.Sequential(*layers))
    x = torch.randn(4, 3, 16, 16) + 1
    want = model(x)
    norm.convert(model, "deconv", block=4, calibrate=torch.randn(8, 3, 16, 16) + 1)
    assert (model[3].block, model[3].running_deconv.shape) == (3, (4, 27, 27))
    for same in (model, norm.fold(model)):
        assert (same(x) - want).abs().max() < 1e-3 * want.abs().max()


def test_statistics_are_those_of_the_batches():
    """One batch gives the layer the mean and D that it would compute in training."""
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    x = torch.randn(6, 3, 20, 20)
    hidden = model[:3](x)
    norm.convert(model, "deconv", calibrate=x)
    twin = copy.deepcopy(model[3]).train()
    twin.momentum = 1.0
    twin(hidden)
    torch.testing.assert_close(model[3].running_mean, twin.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[3].running_deconv, twin.running_deconv, rtol=1e-3, atol=1e-3)


def test_a_batch_norm_read_elsewhere_too_is_not_folded():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            raw = self.conv(x)
            return self.out(self.bn(raw).relu() + raw.abs())

    model = trained(Tapped())
    x = torch.randn(4, 3, 9, 9)
    want = model(x)
    report = norm.convert(model, "deconv", calibrate=x)
    assert isinstance(model.bn, ChannelAffine)
    assert "scale and shift kept" in {row.name: row.why for row in report.rows}["bn"]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_one_convolution_with_two_batch_norms():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.stem(x)
            return self.b(self.conv(self.a(self.conv(x)).relu()))

    model = trained(Shared())
    x = torch.randn(4, 3, 9, 9)
    want = model(x)
    norm.convert(model, "deconv", calibrate=x)
    assert isinstance(model.a, ChannelAffine) and isinstance(model.b, ChannelAffine)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_kept_layers_keep_the_function_too():
    model = trained(torchvision.models.resnet18(num_classes=3))
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    overrides = {"layer1.*": {"recipe": "keep"}, "layer2.0.conv1": {"recipe": "keep"}}
    norm.convert(model, "deconv", block=16, calibrate=x, overrides=overrides)
    assert type(model.layer1[0].bn1) is nn.BatchNorm2d and isinstance(model.layer2[0].bn1, ChannelAffine)
    assert (model(x) - want).abs().max() < 1e-3 * want.abs().max()


def test_heads_that_do_not_run_keep_their_weights():
    model = torchvision.models.googlenet(num_classes=3, init_weights=False)
    report = norm.convert(model.eval(), "deconv", block=16, calibrate=torch.randn(2, 3, 64, 64))
    why = {row.name: row.why for row in report.rows}
    assert why["aux1.conv.conv"] == "not reached by calibration: weights kept"
    assert why["aux1.conv.bn"] == "not reached by calibration: scale and shift kept"


def test_modes_come_back_and_errors_change_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    for bad, text in (
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "expected float tensors.*found a tensor of torch.uint8"),
        ([], "calibrate holds no batch"),
        (["x"], "found str$"),
        ([(torch.zeros(1, 3, 4, 4), torch.zeros(1))], "found tuple; of a loader give the images alone"),
    ):
        with pytest.raises(norm.NormError, match=text):
            norm.convert(model, "deconv", calibrate=bad)
    with pytest.raises(norm.NormError, match="goes with a recipe that whitens"):
        norm.convert(model, "gn", groups=2, calibrate=torch.randn(1, 3, 4, 4))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert model.training and not model[1].training


def test_batch_norm_without_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(norm.NormError, match="needs batch norms with running statistics"):
        norm.convert(model, "deconv", calibrate=torch.randn(2, 3, 4, 4))


class Returned(nn.Module):
    """Hands out the convolution's own output beside the normalised one."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        raw = self.conv(x)
        return {"raw": raw, "norm": self.bn(raw)}


def test_an_output_that_is_handed_out_stays_what_it_was():
    model = trained(Returned())
    x = torch.randn(4, 3, 9, 9)
    want = model(x)
    norm.convert(model, "deconv", calibrate=x)
    got = model(x)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-4)


class OwnDict(dict):
    """Known to nobody, as the outputs of some libraries are."""


class OwnList(list):
    pass


@pytest.mark.parametrize("pack", [lambda found: OwnDict(found), lambda found: OwnList(found.values())])
def test_outputs_in_containers_of_a_class_of_their_own_are_seen(pack):
    class Packed(Returned):
        def forward(self, x):
            return pack(super().forward(x))

    model = trained(Packed())
    x = torch.randn(4, 3, 9, 9)
    want = list(Returned.forward(model, x).values())
    report = norm.convert(model, "deconv", calibrate=x)
    assert report.deviation is not None and report.deviation < 1e-4
    for found, before in zip(Returned.forward(model, x).values(), want, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


def test_an_output_that_a_hook_keeps_stays_what_it_was():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    kept = []
    model[0].register_forward_hook(lambda layer, args, out: kept.append(out))
    x = torch.randn(4, 3, 9, 9)
    model(x)
    norm.convert(model, "deconv", calibrate=x)
    model(x)
    torch.testing.assert_close(kept[-1], kept[0], rtol=1e-4, atol=1e-4)


def test_objects_as_outputs():
    @dataclass
    class Output:
        logits: torch.Tensor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return Output(self.net(x))

    report = norm.convert(trained(Model()), "deconv", calibrate=torch.randn(4, 3, 9, 9))
    assert report.deviation is not None and report.deviation < 1e-4


def test_a_norm_that_an_override_asks_for_is_not_folded_away():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.warns(UserWarning, match="outputs differ by"):
        norm.convert(model, "deconv", calibrate=torch.randn(4, 3, 9, 9), overrides={"1": {"recipe": "gn", "groups": 2}})
    assert isinstance(model[1], nn.GroupNorm)


def test_a_model_that_fails_after_the_swap_is_put_back():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.calls = Conv2dSame(3, 4, 3, stride=2), BatchNormAct2d(4), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("the second run fails")
            return self.bn(self.conv(x))

    model = Twice()
    with pytest.raises(RuntimeError, match="the second run fails"):
        norm.convert(model, "deconv", calibrate=torch.randn(2, 3, 4, 4))
    assert type(model.conv) is Conv2dSame and type(model.bn) is BatchNormAct2d


class Reading(nn.Module):
    """Does something with what a convolution gives before the batch norm gets it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.norm, self.what = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(input=x) if self.what == "keyword" else self.conv(x)
        more = 0.0
        if self.what == "write":
            y[:, :, 0] = 7
        elif self.what == "numpy":
            more = float(y.detach().numpy().mean())
        elif self.what == "list":
            more = y[0, 0, 0].tolist()[0]
        return self.norm(y) + more


@pytest.mark.parametrize("what", ["keyword", "write", "numpy", "list"])
def test_a_norm_is_not_folded_into_what_others_read(what):
    model = trained(Reading(what))
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        want = model(x)
        norm.convert(model, "deconv", calibrate=x)
        torch.testing.assert_close(model(x), want, atol=1e-3, rtol=1e-3)
    assert isinstance(model.norm, nn.Identity) == (what == "keyword")


def test_a_batch_without_images_is_refused():
    with pytest.raises(norm.NormError, match=r"a batch without images, of shape \(0, 3, 9, 9\)"):
        norm.convert(trained(Reading("keyword")), "deconv", calibrate=torch.zeros(0, 3, 9, 9))


@pytest.mark.parametrize("freeze_iter", [3, 100])
def test_a_calibrated_frozen_layer_does_not_start_anew(freeze_iter):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(8, 3, 9, 9) + 1
    norm.convert(model, "deconv_fast", calibrate=x, freeze_iter=freeze_iter)
    layer = model[0]
    before = layer.running_mean.clone()
    model.train()
    layer(x + 1)
    assert 0 < (layer.running_mean - before).abs().max() < 0.5


class Boxes(nn.Module):
    """Where a map is above a threshold: as many rows as it finds."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.conv, self.bn, self.threshold = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.bn(self.conv(x))
        return found[found > self.threshold]


def test_an_empty_output_differs_from_nothing():
    assert norm.convert(trained(Boxes(1e9)), "deconv", calibrate=torch.randn(4, 3, 9, 9)).deviation == 0


def test_outputs_of_another_shape_differ():
    model = trained(Boxes(0.5))
    calls = iter((0.5, 1e9))
    model.register_forward_pre_hook(lambda module, args: setattr(module, "threshold", next(calls)))
    with pytest.warns(UserWarning, match="differ by inf"):
        assert norm.convert(model, "deconv", calibrate=torch.randn(4, 3, 9, 9)).deviation == float("inf")


class Twice(nn.Module):
    """Two outputs, of which the second one is spoilt in a second run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.factors = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), iter((1.0, float("nan")))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = self.bn(self.conv(x))
        return [found, found * next(self.factors)]


def test_one_output_that_is_not_finite_is_told():
    with pytest.warns(UserWarning, match="differ by nan"):
        found = norm.convert(Twice(), "deconv", calibrate=torch.randn(4, 3, 9, 9)).deviation
    assert found is not None and math.isnan(found)


class Empty(nn.Module):
    """A detector whose head gets no proposal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x)[:0])


def test_a_layer_with_empty_inputs_alone_keeps_its_weights():
    model = Empty()
    before = model.head.weight.clone()
    report = norm.convert(model, "deconv", calibrate=torch.randn(4, 3, 9, 9))
    assert torch.equal(model.head.weight, before) and model.head.running_mean.isfinite().all()
    assert "not reached by calibration: weights kept" in report.rows[1].why


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.full((4, 3, 9, 9), float("nan")), "calibrate: 0 got values that are not finite; look for NaN"),
        (torch.randn(3, 9, 9), r"calibrate: 0 got \(3, 9, 9\); give batches of images \(N, C, H, W\)"),
    ],
)
def test_batches_that_say_nothing_are_refused_and_change_nothing(x, text):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    before = copy.deepcopy(model)
    with pytest.raises(norm.NormError, match=text):
        norm.convert(model, "deconv", calibrate=x)
    assert type(model[0]) is nn.Conv2d and torch.equal(model[0].weight, before[0].weight)

"""Running statistics averaged anew at fixed weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from norm import ChannelDeconv, Delinear, FastDeconv, NormError, precise_statistics
from tests.norm.reference import inverse_root

D64 = torch.float64


def batches(count: int = 3, channels: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(5, channels, 9, 9, dtype=D64) * (1 + number) + number for number in range(count)]


def moments(patches: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = patches.mean(1)
    centred = patches - mean[:, None]
    return mean, centred @ centred.T / patches.shape[1] + eps * torch.eye(len(mean), dtype=D64)


def test_batch_norm_gets_the_mean_of_its_batches() -> None:
    layer = nn.BatchNorm2d(4).to(D64)
    layer(batches()[0] + 9)
    seen = layer.num_batches_tracked.clone()
    assert precise_statistics(layer, batches()) == 1
    torch.testing.assert_close(layer.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches()]).mean(0))
    variances = [b.transpose(0, 1).flatten(1).var(1) for b in batches()]
    torch.testing.assert_close(layer.running_var, torch.stack(variances).mean(0))
    assert layer.momentum == 0.1 and layer.num_batches_tracked == seen


@pytest.mark.parametrize("freeze", [False, True])
def test_the_exact_method_gets_the_mean_of_its_inverse_roots(freeze: bool) -> None:
    layer = FastDeconv(4, 6, 3, padding=1, freeze=freeze, freeze_iter=2).to(D64)
    for _ in range(3):
        layer(batches()[0] + 9)
    before = copy.deepcopy(layer)
    precise_statistics(layer, batches())
    found = [moments(layer.patches(b, (1, 1)), layer.eps) for b in batches()]
    torch.testing.assert_close(layer.running_mean, torch.stack([mean for mean, _ in found]).mean(0))
    roots = [inverse_root(covariance, layer.n_iter) for _, covariance in found]
    torch.testing.assert_close(layer.running_deconv, torch.stack(roots).mean(0))
    assert (layer.momentum, layer.freeze) == (0.1, freeze)
    if freeze:
        assert layer.steps == before.steps and layer._steps == before._steps


@pytest.mark.parametrize(
    "make", [lambda: FastDeconv(4, 6, 3, padding=1, every=4, rank=36), lambda: Delinear(9, 6, every=4)]
)
def test_the_cheap_method_gets_the_mean_of_its_shapes(make) -> None:  # type: ignore[no-untyped-def]
    layer = make().to(D64)
    data = batches()
    for _ in range(3):
        layer(data[0] + 9)
    precise_statistics(layer, data)
    gathered = [layer.patches(b, (1, 1)) if isinstance(layer, FastDeconv) else layer.patches(b) for b in data]
    found = [moments(patches, layer.eps) for patches in gathered]
    scales = [covariance.diagonal().mean() for _, covariance in found]
    shape = torch.stack([covariance / scale for (_, covariance), scale in zip(found, scales, strict=True)]).mean(0)
    torch.testing.assert_close(layer.running_mean, torch.stack([mean for mean, _ in found]).mean(0))
    scale = torch.stack([scale**-0.5 for scale in scales]).mean() ** -2
    torch.testing.assert_close(layer.running_scale, scale)
    torch.testing.assert_close(layer.deconv(), inverse_root(shape, layer.n_iter) / scale.sqrt())
    assert (layer.every, layer.momentum, int(layer.steps), layer._steps) == (4, 0.1, 3, 3)


def test_other_layers_work_as_in_evaluation_and_modes_come_back() -> None:
    model = nn.Sequential(
        nn.Dropout(0.9), FastDeconv(4, 4, 1, sampling_stride=1), nn.BatchNorm2d(4, track_running_stats=False)
    ).to(D64)
    model.eval()
    model[0].train()
    model[2].train()
    precise_statistics(model, batches(1))
    assert [layer.training for layer in model] == [True, False, True]
    torch.testing.assert_close(model[1].running_mean, batches(1)[0].transpose(0, 1).flatten(1).mean(1))


def test_channel_deconv_too() -> None:
    layer = ChannelDeconv(4, sampling_stride=1).to(D64)
    layer(batches()[0])
    precise_statistics(layer, batches())
    means = [b.transpose(0, 1).flatten(1).mean(1) for b in batches()]
    torch.testing.assert_close(layer.running_mean.flatten(), torch.stack(means).mean(0))


def test_nothing_to_average_reads_nothing_and_no_batch_is_an_error() -> None:
    def unread():  # type: ignore[no-untyped-def]
        raise AssertionError
        yield

    assert precise_statistics(nn.Conv2d(4, 4, 1), unread()) == 0
    layer = nn.BatchNorm2d(4)
    with pytest.raises(NormError, match="no batch was given"):
        precise_statistics(nn.Sequential(layer), [])


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm2d(4), lambda: FastDeconv(4, 6, 3), lambda: FastDeconv(4, 6, 3, every=4)]
)
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ([], "no batch"),
        ([torch.ones(2, 4, 9, 9), (torch.ones(1),)], "found tuple"),
        ([torch.ones(2, 4, 9, 9).long()], "int64"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(make: Any, wrong: list[Any], text: str) -> None:
    layer = make()
    layer(batches()[0].float())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(NormError, match=text):
        precise_statistics(layer, wrong)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))
    assert layer.training and layer.momentum == 0.1 and getattr(layer, "every", 4) in (0, 4)


def test_one_tensor_is_one_batch() -> None:
    layer, other = nn.BatchNorm2d(4).to(D64), nn.BatchNorm2d(4).to(D64)
    precise_statistics(layer, batches()[0])
    precise_statistics(other, batches()[:1])
    assert torch.equal(layer.running_mean, other.running_mean) and layer.running_mean.any()


class Heads(nn.Module):
    """A layer that is called twice, one that only some batches reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.some, self.never = (FastDeconv(4, 4, 1, block=4).to(D64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 2:
            self.some(x)
        return self.twice(x) + self.twice(3 * x + 5)


def test_every_call_of_a_layer_counts_alike() -> None:
    model = Heads()
    model.never.running_mean.fill_(7)
    torch.manual_seed(0)
    x = [torch.randn(count, 4, 6, 6, dtype=D64) + count for count in (5, 2, 3)]
    assert precise_statistics(model, x) == 2
    every = torch.stack([model.twice.patches(each, (0, 0)).mean(1) for batch in x for each in (batch, 3 * batch + 5)])
    torch.testing.assert_close(model.twice.running_mean, every.mean(0))
    torch.testing.assert_close(model.some.running_mean, model.some.patches(x[1], (0, 0)).mean(1))
    assert (model.never.running_mean == 7).all()


class Proposals(nn.Module):
    """A head that gets no proposal of the first image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = FastDeconv(4, 4, 1).to(D64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=x[:0] if len(x) == 2 else x)  # type: ignore[no-any-return]


def test_calls_without_values_do_not_count() -> None:
    model = Proposals()
    model.head.running_mean.fill_(7)
    first, *others = [torch.randn(count, 4, 6, 6, dtype=D64) + count for count in (2, 5, 3)]
    assert precise_statistics(model, first) == 0 and (model.head.running_mean == 7).all()
    assert precise_statistics(model, [first, *others]) == 1
    means = [model.head.patches(each, (0, 0)).mean(1) for each in others]
    torch.testing.assert_close(model.head.running_mean, torch.stack(means).mean(0))


def test_layers_that_are_frozen_by_their_mode_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).to(D64).train()
    model[1].eval().requires_grad_(False)
    assert precise_statistics(model, batches()) == 1
    assert not model[1].running_mean.any() and model[2].running_mean.any() and not model[1].training
    assert precise_statistics(model.eval(), batches()) == 2


def test_a_compiled_model_is_not_compiled_for_each_batch() -> None:
    """Else `fullgraph` ends in an error after eight of them."""
    model = nn.Sequential(FastDeconv(4, 4, 3), nn.ReLU(), FastDeconv(4, 4, 3)).to(D64)
    twin = copy.deepcopy(model)
    model.compile(backend="aot_eager", fullgraph=True)
    assert precise_statistics(model, batches(10)) == precise_statistics(twin, batches(10)) == 2
    for found, want in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, want)
    with torch.no_grad():  # compiled now
        torch.testing.assert_close(model(batches()[0]), twin(batches()[0]))


def test_a_compiled_model_is_not_compiled_again_afterwards() -> None:
    class Network(nn.Module):  # torch 2.9 compiles the layers of a Sequential one by one
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = FastDeconv(4, 4, 3, freeze=True), Delinear(196, 3, block=4, every=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).flatten(1))  # type: ignore[no-any-return]

    model = Network().to(D64)
    graphs = CompileCounter()  # type: ignore[no-untyped-call]
    model.compile(backend=graphs)
    for _ in range(2):
        model(batches()[0])
    precise_statistics(model, batches())
    model(batches()[0])
    assert graphs.frame_count == 1 and model.conv.freeze and not model.linear.freeze


def test_buffers_of_a_parametrization_come_back_with_the_rest() -> None:
    layer = FastDeconv(4, 4, 3).to(D64)
    nn.utils.parametrizations.spectral_norm(layer)
    before = copy.deepcopy(dict(layer.named_buffers()))

    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used = layer, nn.BatchNorm2d(4).to(D64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    assert precise_statistics(Reaches(), batches()) == 1
    for name, held in before.items():
        assert torch.equal(layer.get_buffer(name), held)

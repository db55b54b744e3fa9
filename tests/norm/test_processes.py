"""Layers with `sync` on three processes against one layer with all images, which test_layers.py and
test_running_shape.py hold to the formulas; float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import norm
from engine.processes import in_processes
from engine.traffic import Counting
from norm import ChannelDeconv, Delinear, FastDeconv, processes
from norm.sampling import Windows

D64 = torch.float64
WORLD = 3
STEPS = 5

Build = Callable[..., nn.Module]


def conv(channels: int, out: int, kernel: int, **options: Any) -> Build:
    return lambda **more: FastDeconv(channels, out, kernel, **options, **more)


CASES: dict[str, tuple[Build, tuple[int, ...]]] = {
    "all rows": (conv(8, 6, 3, padding=1, block=4), (9, 12, 11)),
    "grouped": (conv(8, 4, 3, padding=1, groups=2, stride=2), (9, 12, 11)),
    "groups of blocks": (conv(8, 4, 3, padding=1, groups=2, block=2, stride=2), (9, 12, 11)),
    "interleaved": (conv(8, 4, 3, padding=1, block=4, grouping="published"), (6, 12, 11)),
    "pixels": (conv(8, 6, 1, block=4), (6, 7, 5)),
    "images left out": (conv(8, 4, 3, padding=1, block=4, dense_small_maps=True, max_rows=60), (12, 4, 4)),
    "fewer images than processes": (conv(8, 4, 3, padding=1, dense_small_maps=True, max_rows=16), (6, 4, 4)),
    "pixels of some images": (conv(8, 6, 1, block=4, sampling_stride=2, max_rows=20), (12, 5, 5)),
    "a coarser grid": (conv(4, 4, 3, padding=1, sampling_stride=1, max_rows=500), (6, 20, 20)),
    "held": (conv(3, 4, 3, freeze=True, freeze_iter=2), (6, 9, 9)),
    "running shape": (conv(8, 6, 3, padding=1, block=4, every=2, rank=7, fresh_steps=1), (9, 12, 11)),
    "running shape, grouped": (conv(8, 4, 3, padding=1, groups=2, every=3, rank=100, fresh_steps=0), (9, 12, 11)),
    "running shape, blocks": (conv(8, 4, 3, padding=1, groups=2, block=2, every=3, rank=7, fresh_steps=0), (9, 12, 11)),
    "running shape, images left out": (
        conv(8, 4, 3, padding=1, dense_small_maps=True, sampling_stride=1, max_rows=16, every=2, rank=9, fresh_steps=1),
        (6, 4, 4),
    ),
    "running shape, pixels": (conv(8, 6, 1, block=4, every=1, rank=2, fresh_steps=0, sampling_stride=1), (6, 5, 5)),
    "linear": (lambda **more: Delinear(8, 5, block=4, **more), (21,)),
    "linear, running shape": (lambda **more: Delinear(8, 5, block=4, every=2, rank=3, fresh_steps=0, **more), (21,)),
    "channels of vectors": (lambda **more: ChannelDeconv(4, **more), (21,)),
}
UNEVEN = ("all rows", "grouped", "running shape", "running shape, grouped", "linear", "channels of vectors")
"""All patches count, so that the processes may have unequal numbers of images."""


def shares(count: int, uneven: bool) -> list[int]:
    return [count - 3, 2, 1] if uneven else [count // WORLD] * WORLD


def trained(name: str, dtype: torch.dtype, sync: bool, mine: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Gradients and buffers of every step: first what belongs to the images, then what all share."""
    torch.manual_seed(0)
    build, (count, *size) = CASES[name]
    layer = build(sync=sync).to(dtype).train()
    channels = 10 if name.startswith("channels") else getattr(layer, "in_channels", getattr(layer, "in_features", 0))
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        whole = torch.randn(count, channels, *size, generator=generator, dtype=D64).cumsum(-1) / 3 + 1
        x = mine(whole).to(dtype).requires_grad_()
        y = layer(x)
        with torch.no_grad():
            upstream = torch.randn(count, *y.shape[1:], generator=generator, dtype=D64)
        grads = torch.autograd.grad((y * mine(upstream).to(dtype)).sum(), [x, *layer.parameters()])
        found += [y.detach(), *grads, *(buffer.clone() for buffer in layer.buffers())]
    return found


def all_cases(folder: Path) -> None:
    rank = dist.get_rank()
    for name, (_, (count, *_)) in CASES.items():
        for uneven in (False, True) if name in UNEVEN else (False,):
            sizes = shares(count, uneven)

            def mine(whole: Tensor, sizes: list[int] = sizes) -> Tensor:
                return whole.split(sizes)[rank]

            torch.save(trained(name, D64, True, mine), folder / f"{name} {uneven} {rank}.pt")
    torch.save(trained("all rows", torch.float32, True, lambda x: x.chunk(WORLD)[rank]), folder / f"float32 {rank}.pt")
    torch.save(loaded_by_the_first(), folder / f"loaded {rank}.pt")


def loaded_by_the_first() -> list[Tensor]:
    """What networks give of which the first process alone has loaded the weights, before DistributedDataParallel."""
    found = []
    for recipe in ("deconv", "deconv_fast"):
        before, then = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)) for _ in range(2))
        norm.convert(before, recipe, freeze_iter=2, sampling_stride=1)
        norm.convert(then, recipe, freeze_iter=2, sampling_stride=1, sync=True)
        images = torch.randn(5, 6, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        for x in images:
            before(x)
        if dist.get_rank() == 0:
            then.load_state_dict(before.state_dict())
        wrapped = nn.parallel.DistributedDataParallel(then)
        y = wrapped(images[0])
        y.square().mean().backward()
        found += [y.detach(), *(each.clone() for each in then.buffers())]
    return found


class Network(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 4)
        blocks = {"second": {"block": 2}}
        norm.convert(self, "deconv", sync=True, stem_freeze=False, fc_block=8, overrides=blocks, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.second(self.first(x)).mean((2, 3)))
        return y


@pytest.fixture
def pretended() -> Iterator[None]:
    """A second process that does not exist: sums are called, and come back as they are."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"every": 4, "rank": 16, "fresh_steps": 0}, {"delinear": False}])
def test_what_is_sent_is_what_was_said(pretended: None, options: dict[str, Any]):
    network = Network(**options)
    for _ in range(4):  # the first steps send more
        network(torch.randn(2, 3, 12, 12)).sum().backward()
    said = processes.traffic(network)
    with Counting() as counting:
        for _ in range(8):
            network(torch.randn(2, 3, 12, 12, requires_grad=True)).sum().backward()
    assert said == (counting.calls / 8, counting.size / 8) and said.size > 1000


@pytest.mark.parametrize("options", [{}, {"every": 2, "rank": 4, "fresh_steps": 1}, {"delinear": False}])
def test_the_compiler_leaves_the_sums_to_be_run_as_they_are(pretended: None, options: dict[str, Any]):
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    plain, other = Network(**options).to(D64), Network(**options).to(D64)
    other.compile(backend=backend)
    for _ in range(3):
        x = torch.randn(2, 3, 12, 12, dtype=D64)
        found = [torch.autograd.grad(each(x).square().sum(), list(each.parameters())) for each in (plain, other)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) > 1 and not any("all_reduce" in str(graph.graph) for graph in graphs)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    in_processes(all_cases, folder, world=WORLD)
    return folder


def check(name: str, dtype: torch.dtype, parts: list[list[Tensor]], tolerance: float) -> None:
    want = trained(name, dtype, False, lambda whole: whole)
    layer = CASES[name][0]()
    parameters, buffers = len(list(layer.parameters())), len(list(layer.buffers()))
    assert len(want) == STEPS * (2 + parameters + buffers)
    for number, (one, *each) in enumerate(zip(want, *parts, strict=True)):
        place = number % (2 + parameters + buffers)
        if place < 2:
            got = torch.cat(each)
        elif place < 2 + parameters:  # DistributedDataParallel sums those
            got = torch.stack(each).sum(0)
        else:
            assert all(torch.equal(each[0], other) for other in each)
            got = each[0]
        scale = float(one.abs().max()) if one.is_floating_point() else 1.0
        torch.testing.assert_close(got, one, rtol=0, atol=tolerance * max(scale, 1e-3))


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_processes_with_a_part_of_the_images_equal_one_with_all(several: Path, name: str, uneven: bool):
    """Outputs, gradients and running statistics over five steps."""
    if uneven and name not in UNEVEN:
        pytest.skip("which patches are taken depends on the number of images")
    parts = [torch.load(several / f"{name} {uneven} {rank}.pt") for rank in range(WORLD)]
    check(name, D64, parts, 1e-10)


def test_in_float32_they_are_equal_within_rounding(several: Path):
    check("all rows", torch.float32, [torch.load(several / f"float32 {rank}.pt") for rank in range(WORLD)], 1e-5)


def test_a_checkpoint_that_the_first_process_loads_counts_for_all(several: Path):
    """A count of their own had some hold the first layer while others averaged, and wait for each other's sums."""
    first, *others = (torch.load(several / f"loaded {rank}.pt") for rank in range(WORLD))
    assert len(first) > 10 and 6 in [int(one) for one in first if one.dtype == torch.int64]
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_without_sync_they_differ():
    """Else the tests above would show nothing."""
    for name in CASES:
        if name == "channels of vectors":
            continue
        last = trained(name, D64, False, lambda whole: whole.chunk(WORLD)[-1])
        assert not torch.allclose(last[0], trained(name, D64, False, lambda whole: whole)[0][-len(last[0]) :])


def test_a_triangle_is_a_symmetric_matrix():
    matrix = torch.randn(2, 5, 5, dtype=D64)
    matrix = matrix + matrix.mT
    packed = processes.pack(matrix)
    assert packed.shape == (2, processes.triangle(5))
    assert torch.equal(processes.unpack(packed, 5), matrix)


@pytest.mark.parametrize(
    "kernel, size, listed",
    [((3, 3), (4, 4), False), ((1, 1), (5, 5), False), ((1, 1), (5, 5), True), ((1, 1), (4, 4), True)],
)
@pytest.mark.parametrize("images", [1, 2, 5, 7])
def test_shares_take_what_the_whole_takes(kernel: tuple[int, int], size: tuple[int, int], listed: bool, images: int):
    x = torch.arange(12 * 2 * size[0] * size[1], dtype=D64).view(12, 2, *size)
    how = (kernel, (2, 2), (0, 0), (1, 1), 2 * kernel[0] * kernel[1], 1, "channel", images)
    whole = Windows(*how, listed=listed).gather(x)
    for share in (1, 2, 3, 4, 6):
        each = [(Windows(*how, first, listed), x[first : first + share]) for first in range(0, 12, share)]
        parts = [windows.gather(images) for windows, images in each]
        rows = [windows.rows(images.shape) for windows, images in each]
        assert torch.equal(torch.cat(parts, 1), whole)
        assert rows == [part.shape[-1] for part in parts]


def test_in_one_process_it_changes_nothing():
    for sync in (False, True):
        layer = FastDeconv(3, 4, 3, sync=sync)
        assert processes.synchronised(nn.Sequential(layer)) == ([layer] if sync else [])
    assert "sync=True" in str(layer) and not processes.active() and processes.share() == processes.ALONE
    name = "running shape"
    for a, b in zip(trained(name, D64, True, lambda x: x), trained(name, D64, False, lambda x: x), strict=True):
        assert torch.equal(a, b)

"""Memory plans: parsed sizes, curves, choices, and predictions held against measurements."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import probe as module
from engine.config import ExperimentConfig
from engine.errors import UserError
from engine.loop import Batch
from engine.optim import parameter_groups
from engine.plan import Curve, Option, Parts, Plan, parse_size
from engine.prepare import session
from engine.probe import Workload, make_plan
from tests.engine import toy

MIB = 2**20


class Net(nn.Module):
    def __init__(self, blocks: bool = True) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
            for c in (3, 16, 16, 16)
        ]
        self.body = nn.Sequential(*layers) if blocks else nn.Sequential(*(one for part in layers for one in part))
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def workload(cfg: ExperimentConfig | None = None, build: Callable[[], nn.Module] = Net, side: int = 64) -> Workload:
    def batch(count: int) -> Batch:
        images = torch.randn(count, 3, side, side)
        return {"image": images, "target": torch.zeros(count, side, side, dtype=torch.long), "name": ["x"] * count}

    return Workload(
        cfg or toy.config(batch=8),
        build,
        toy.loss,
        batch,
        lambda model: parameter_groups(model, (cfg or toy.config()).optim),
        [],
    )


@pytest.mark.parametrize(
    "text, size",
    [
        ("11GiB", 11 * 2**30),
        ("11 gib", 11 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("900MiB", 900 * 2**20),
        ("64kB", 64_000),
        ("2TiB", 2**41),
        ("512B", 512),
    ],
)
def test_sizes_with_units(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["lots", "", "11", "11 G", "-3GiB", "0GiB", "GiB", "1,5GiB", "3iB", "nanGiB", "1e3MiB"]
)
def test_other_words_are_one_error(text: str):
    with pytest.raises(UserError) as error:
        parse_size(text)
    assert str(error.value) == (
        f"--plan: found {text!r}, expected a size of memory with its unit, such as 11GiB or 900MiB"
    )


def phases(forward: int, update: int) -> dict[str, int]:
    return {"forward": forward, "update": update, "again: forward": forward + 10, "again: update": update}


def test_each_phase_has_a_line_of_its_own():
    """The update hides the forward in small batches and not in large ones."""
    curve = Curve({1: phases(20, 100), 2: phases(40, 100)})
    assert [curve.step(size, 1) for size in (1, 2, 4, 8)] == [100, 100, 100, 160]
    assert [curve.step(size, 2) for size in (1, 2, 5, 8)] == [100, 100, 110, 170]


def test_the_nearest_measurements_make_the_line():
    curve = Curve({1: phases(100, 0), 2: phases(110, 0), 4: phases(150, 0)})
    assert [curve.step(size, 1) for size in (2, 3, 4, 6)] == [110, 130, 150, 190]


def test_one_measurement_is_taken_in_proportion():
    """Two images did not fit."""
    curve = Curve({1: phases(100, 30)})
    assert [curve.step(size, 1) for size in (1, 2, 4)] == [100, 200, 400]
    found = Plan(
        "title", 250, 8, 1, 0, {False: Curve({1: {**phases(100, 0), "backward": 120}})}, Parts(50, 0, 0, 0, 50)
    )
    assert "micro_batch=1" in str(found) and (choice := found.choice()) is not None
    assert (choice.micro_batch, choice.accumulation) == (1, 8)


def test_several_processes_keep_the_gradients():
    curves = {False: Curve({1: phases(100, 0), 2: phases(200, 0)})}
    alone, several = (Plan("title", 9, 8, ranks, 1000, curves, Parts(500, 0, 0, 0, 70)) for ranks in (1, 2))
    assert several.memory(2, 1, False) == alone.memory(2, 1, False) + 70


def test_a_phase_that_shrinks_is_taken_as_constant():
    assert Curve({1: phases(50, 0), 2: phases(40, 0)}).step(9, 1) == 50


def plan(budget: int, checkpointing: bool = True) -> Plan:
    curves = {False: Curve({1: {**phases(100, 0), "backward": 0}, 2: {**phases(200, 0), "backward": 0}})}
    if checkpointing:
        curves[True] = Curve({1: {**phases(50, 0), "backward": 0}, 2: {**phases(70, 0), "backward": 0}})
    return Plan("title", budget, 8, 1, 1000, curves, Parts(500, 0, 0, 0, 500))


@pytest.mark.parametrize(
    "budget, micro_batch, accumulation, checkpointing",
    [(2300, 8, 1, False), (1999, 4, 2, False), (1710, 2, 4, False), (1590, 2, 4, True)],
)
def test_the_largest_micro_batch_without_checkpointing_first(
    budget: int, micro_batch: int, accumulation: int, checkpointing: bool
):
    found = plan(budget).choice()
    assert found is not None
    assert (found.micro_batch, found.accumulation, found.checkpointing) == (micro_batch, accumulation, checkpointing)
    assert found.memory <= budget


def test_the_keys_to_set_are_printed():
    text = str(plan(1999))
    assert text.endswith("same batch of 8 = 2 accumulated x 4, set:\n  micro_batch=4 runtime.checkpointing=false")
    assert "runtime.checkpointing=true would allow micro_batch=8" in text


def test_if_nothing_fits_the_least_is_told():
    found = plan(1000)
    assert found.choice() is None
    assert "nothing fits into" in str(found) and "micro_batch=1 runtime.checkpointing=true" in str(found)
    assert "the least is 0.0 MiB, with micro_batch=1 runtime.checkpointing=false" in str(
        plan(1000, checkpointing=False)
    )
    found.spare = 300 * 2**20
    assert "the least is 0.0 MiB, and 0.29 GiB more are left to what was not measured, with" in str(found)


def test_what_is_left_free_counts_for_advice_too():
    found = plan(1999)
    assert "would allow micro_batch=8" in str(found)
    found.spare = 1999 - next(o.memory for o in found.options() if o.micro_batch == 1)
    assert found.choice() == Option(1, 8, False, 1999 - found.spare)
    assert "would allow micro_batch=2" in str(found)


def test_a_share_is_left_to_memory_that_is_kept():
    found = plan(1999)
    least = next(o for o in found.options() if o.micro_batch == 1)
    found.spare, found.kept, found.budget = 7, 0.5, round(1.5 * least.memory) + 7
    assert found.fits(least)
    found.budget -= 1
    assert not found.fits(least)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optim", [{"name": "sgd"}, {"name": "adamw", "ema_decay": 0.9, "clip_norm": 1.0}])
def test_predictions_are_near_what_is_measured(checkpointing: bool, optim: dict[str, Any]):
    """From micro-batches of 1 and 2, for 6 and 8, within 3%."""
    cfg = toy.config(batch=8, **{f"optim__{key}": value for key, value in optim.items()})
    work = workload(cfg)
    with session(cfg.runtime):
        found = Plan("", 2**60, 8, 1, 0, {checkpointing: Curve()})
        module._measure(work, found, checkpointing, 2, seconds=60)
        assert sorted(found.curves[checkpointing].measured) == [1, 2]
        for size in (6, 8):
            truth = Curve({size: module._Trial(work, checkpointing).measure(size)})
            for accumulation in (1, 2):
                real = found.parts.lasting + truth.step(size, accumulation)
                assert found.memory(size, accumulation, checkpointing) == pytest.approx(real, rel=0.03)


def test_a_step_is_what_the_loop_takes():
    """The optimiser's state, the average and the values kept for the backward are all there."""
    cfg = toy.config(batch=2, optim__name="adamw", optim__ema_decay=0.9)
    found = make_plan(workload(cfg), 2**40)
    weights = sum(one.numel() for one in Net().parameters()) * 4
    assert found.parts.parameters == found.parts.gradients == weights
    assert 2 * weights <= found.parts.optimizer < 2 * weights + 1000  # two moments, and the counts of steps
    assert weights <= found.parts.average < weights + 2000
    maps = 2 * 64 * 64 * 4 * (4 * 3 * 16)  # three maps of 16 channels in each of four blocks
    assert maps < found.curves[False].step(2, 1) < 2 * maps


def test_checkpointing_is_only_probed_when_it_is_needed():
    assert list(make_plan(workload(), 2**40).curves) == [False]
    small = make_plan(workload(), 2**20)
    assert list(small.curves) == [False, True] and small.choice() is None
    for size in (1, 2):
        assert small.memory(size, 1, True) < small.memory(size, 1, False)


def test_checkpointing_is_probed_where_what_is_left_free_does_not_fit():
    wanted = make_plan(workload(), 2**40).options()[0].memory
    assert list(make_plan(workload(), wanted + 2**20).curves) == [False, True]


@pytest.mark.parametrize("batch", [1, 3, 4, 40])
def test_an_evaluation_counts(batch: int):
    def evaluate(model: nn.Module, count: int) -> None:
        assert not model.training and not torch.is_grad_enabled()
        model(torch.zeros(count, 3, 64, 64))

    found = make_plan(dataclasses.replace(workload(), evaluate=evaluate, eval_batch=batch), 2**40)
    image = 64 * 64 * 4 * (16 + 16)  # a layer's input and output
    assert batch * image <= found.evaluation < 2.5 * batch * image
    lasting, step = found.process + found.parts.lasting, found.curves[False].step(1, 8)
    assert found.memory(1, 8, False) == lasting + max(step, found.evaluation)
    found.budget = lasting
    assert batch in (3, 4) or ("a smaller data.eval_batch_size less" in str(found)) == (batch == 40)


def test_images_that_are_kept_for_precise_statistics_count():
    plain, precise = (make_plan(workload(toy.config(batch=8, norm__precise_batches=n)), 2**40) for n in (0, 5))
    image = 3 * 64 * 64 * 4
    assert precise.memory(4, 2, False) - precise.process == plain.memory(4, 2, False) - plain.process + 5 * 4 * image


def test_a_config_with_checkpointing_is_probed_with_it():
    cfg = toy.config(batch=4)
    cfg = cfg.model_copy(update={"runtime": cfg.runtime.model_copy(update={"checkpointing": True})})
    found = make_plan(workload(cfg), 2**40)
    assert list(found.curves) == [True] and "runtime.checkpointing=true" in str(found)


def test_a_network_without_blocks_is_planned_without_checkpointing():
    found = make_plan(workload(build=lambda: Net(blocks=False)), 2**20)
    assert list(found.curves) == [False]
    assert "this network has no sequence of blocks" in str(found)


def test_larger_micro_batches_are_measured_while_they_fit_and_time_is_left():
    plenty = make_plan(workload(side=16), 2**40)
    assert sorted(plenty.curves[False].measured) == [1, 2, 4, 8] and "  ~" not in str(plenty)
    short = make_plan(workload(side=16), 2**40, seconds=0)
    assert sorted(short.curves[False].measured) == [1, 2] and "  ~" in str(short)


def test_two_processes_measure_and_say_the_same(two: Path):
    """One that had stopped before the other one would leave it waiting, for DistributedDataParallel."""
    first, second = ((two / f"planned_{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and "measured={1: " in first and " 2: " in first and " 4: " not in first


def test_a_single_image_is_measured_alone():
    found = make_plan(workload(toy.config(batch=1), side=16), 2**40)
    assert sorted(found.curves[False].measured) == [1]
    assert "micro_batch=1" in str(found)


def test_half_precision_is_probed_too():
    found = make_plan(workload(toy.config(batch=2, runtime__amp="bf16"), side=16), 2**40)
    assert "bf16" in found.title and found.choice() is not None


def test_what_was_not_measured_is_left_free():
    found = plan(10_000)
    first = found.choice()
    assert first is not None
    found.budget = first.memory
    assert found.choice() == first
    found.spare = 1
    smaller = found.choice()
    assert smaller is None or smaller.memory < first.memory
    found.budget += 1
    assert found.choice() == first

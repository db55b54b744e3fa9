"""A short probe of an experiment's memory, from which `engine.plan` tells what fits.

Training steps are measured (`engine.memory`), with one image first, then with more, while they fit and time is left;
and an evaluation's batch.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed
from engine.config import ExperimentConfig
from engine.errors import UserError
from engine.loop import Batch, LossFunction
from engine.memory import allocated, keep_freed_memory, process_peak, show_bytes
from engine.optim import build_ema, build_optimizer
from engine.plan import AGAIN, Curve, Parts, Phases, Plan
from engine.precision import autocast, dtype_of
from engine.prepare import prepare, session

_SPARE = 600 * 2**20
"""What trainings on CPUs took beyond the prediction and `_KEPT` was up to 0.56 GiB (ResNet-18, validated with 256
images of 224x224: 3.69 GiB; pictures and plots included)."""
_KEPT = 0.2
"""Where freed memory is kept, one of 2.63 GiB took 3.4 (CamVid's DeepLabV3+ in bfloat16, with its evaluations)."""


@dataclass(frozen=True)
class Workload:
    """An experiment as its trainer sees it, without its data."""

    cfg: ExperimentConfig
    build: Callable[[], nn.Module]
    """The network, with plain convolutions and batch norm."""
    loss: LossFunction
    batch: Callable[[int], Batch]
    """A batch of so many images of the training's size, on the CPU."""
    groups: Callable[[nn.Module], list[dict[str, Any]]]
    """The optimiser's parameter groups."""
    images: list[Tensor]
    """To convert the network with, where the config wants images for that."""
    held: int = 0
    """Bytes of data that lie in memory, on the device, all the time."""
    evaluate: Callable[[nn.Module, int], Any] | None = None
    """What an evaluation does with a batch of so many images; the network, in evaluation mode, is where it computes."""
    eval_batch: int = 1
    """Images that go through an evaluation together."""
    smaller: str = "data.eval_batch_size"
    """The key whose smaller value lessens what an evaluation takes."""
    remark: str = ""
    """What had to be assumed."""


def make_plan(work: Workload, budget: int, seconds: float = 60.0) -> Plan:
    """Probe an experiment and plan its micro-batch for `budget` bytes of memory a process.

    A curve takes about `seconds`, or as long as the two smallest micro-batches do.

    With checkpointing it is probed as well when the whole batch does not fit without; a config that already asks for it
    is only probed so.

    Raises:
        UserError: as a training with this config; the batch cannot be divided among the processes.
    """
    start, cfg = time.monotonic(), work.cfg
    with session(cfg.runtime) as device:
        ranks = distributed.world_size()
        share = cfg.model_copy(update={"micro_batch": None}).split(ranks).micro_batch
        process = max(distributed.gather(process_peak())) if device.type == "cpu" else 0
        asked = cfg.runtime.checkpointing
        plan = Plan(_title(work, device), budget, cfg.batch_size, ranks, process, {asked: Curve()}, data=work.held)
        plan.smaller = work.smaller
        if device.type == "cpu":
            plan.spare, plan.kept = _SPARE, _KEPT if keep_freed_memory() else 0.0
            plan.precise = cfg.norm.precise_batches * _bytes([work.batch(1)["image"]])
        _measure(work, plan, asked, share, seconds)
        _measure_evaluation(work, plan)
        if not asked and not plan.fits(plan.options()[0]) and not cfg.runtime.compile:
            plan.curves[True] = Curve()
            try:
                _measure(work, plan, True, share, seconds)
            except UserError as error:
                del plan.curves[True]
                plan.remarks.append(str(error).partition("; ")[0])
        if device.type == "cuda":
            plan.process = max(distributed.gather(_beside_tensors(device)))
        else:
            share_too = f"{plan.kept:.0%} and " if plan.kept else ""
            plan.remarks.append(
                f"a process on a CPU may take {share_too}{show_bytes(_SPARE)} more, which are left free: buffers of "
                "libraries, memory that is kept, the loader"
            )
        plan.remarks += [work.remark] if work.remark else []
    plan.seconds = time.monotonic() - start
    return plan


def _measure_evaluation(work: Workload, plan: Plan) -> None:
    """With two images, and four, from which larger batches follow; one alone may take other ways in the libraries."""
    if work.evaluate is None:
        return
    trial = _Trial(work, False)
    model, device = trial.prepared.raw.eval(), trial.prepared.device
    counts = [min(count, work.eval_batch) for count in (2, 4)]
    highest = None
    with suppress(torch.OutOfMemoryError), torch.no_grad(), autocast(device, dtype_of(work.cfg.runtime.amp)):
        few, more = (allocated(partial(work.evaluate, model, count), device).peak for count in counts)
        an_image = max(0, more - few) / max(1, counts[1] - counts[0])
        highest = round(more + (work.eval_batch - counts[1]) * an_image)
        if device.type == "cpu":
            highest += work.eval_batch * _bytes([work.batch(1)["image"]])  # as they were read, before they are stacked
    everywhere = [one for one in distributed.gather(highest) if one is not None]
    if len(everywhere) < plan.ranks:
        raise UserError(
            f"--plan: not even an evaluation of {counts[1]} image{'s' * (counts[1] > 1)} fits into the memory that is "
            f"there; set a smaller {work.smaller}"
        )
    plan.evaluation = max(everywhere)


def _title(work: Workload, device: torch.device) -> str:
    shape = " x ".join(str(side) for side in work.batch(1)["image"].shape[1:])
    amp = "" if work.cfg.runtime.amp == "none" else f", {work.cfg.runtime.amp}"
    return f"memory of a training step, images of {shape}, norm {work.cfg.norm.name}{amp}, on {device.type}:"


def _beside_tensors(device: torch.device) -> int:
    """Bytes of a GPU that are in use, by this process's context or by others, and are not torch's tensors; and what
    torch's allocator holds beyond them at its peak."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return total - free - torch.cuda.memory_reserved(device) + max(0, held)


def _measure(work: Workload, plan: Plan, checkpointing: bool, share: int, seconds: float) -> None:
    """Fill a curve: one image, two, and more while they fit and so long as it is expected to end in time.

    All processes measure the same micro-batches, for which they wait for each other, and keep the highest figures.
    """
    start, curve, last = time.monotonic(), plan.curves[checkpointing], 0.0
    for size in (size for size in range(1, share + 1) if share % size == 0):
        if len(curve.measured) >= 2:
            late = time.monotonic() - start + last * size / max(curve.measured) > seconds
            if any(distributed.gather(late)) or plan.memory(size, 1, checkpointing) > plan.budget:
                return
        before, found = time.monotonic(), None
        with suppress(torch.OutOfMemoryError):
            gc.collect()  # else the network before this one might be given back meanwhile
            trial = _Trial(work, checkpointing)
            found = trial.measure(size)
            plan.parts = trial.parts()
            del trial  # before the next one is built
        everywhere = [one for one in distributed.gather(found) if one is not None]
        if len(everywhere) < plan.ranks:
            if not curve.measured:
                raise UserError(f"--plan: not even a micro-batch of {size} fits into the memory that is there")
            return
        curve.measured[size] = {key: max(one[key] for one in everywhere) for key in everywhere[0]}
        last = time.monotonic() - before


class _Trial:
    """A network with its optimiser, and single pieces of a step; see `engine.loop`, which this follows."""

    def __init__(self, work: Workload, checkpointing: bool) -> None:
        runtime = work.cfg.runtime.model_copy(update={"checkpointing": checkpointing})
        cfg = work.cfg.model_copy(update={"runtime": runtime})
        self.work, self.cfg = work, cfg
        self.prepared = prepare(work.build(), cfg, groups=work.groups, images=work.images)
        model = self.prepared.raw
        self.optimizer = build_optimizer(self.prepared.groups, cfg.optim)
        self.average = build_ema(model, cfg.optim)
        device = self.prepared.device.type
        self.scaler = torch.amp.grad_scaler.GradScaler(device, enabled=cfg.runtime.amp == "fp16")
        every = (one for group in self.optimizer.param_groups for one in group["params"])
        self.parameters = [one for one in every if one.requires_grad]
        model.train()

    def measure(self, micro_batch: int) -> Phases:
        """A step that accumulates two micro-batches."""
        device = self.prepared.device
        if device.type == "cuda":  # the search for the fastest kernels takes memory, once
            self.backward(self.forward(micro_batch))
            self.update()
            self.optimizer.zero_grad(set_to_none=True)
        found: Phases = {}
        held = 0
        taken: dict[int, int] = {}
        for again in ("", AGAIN):
            losses: list[Tensor] = []

            def run_forward(losses: list[Tensor] = losses) -> None:
                losses.append(self.forward(micro_batch))

            def run_backward(losses: list[Tensor] = losses) -> None:
                self.backward(losses.pop())

            forward, backward = (allocated(run, device, taken) for run in (run_forward, run_backward))
            found[f"{again}forward"] = held + forward.peak
            found[f"{again}backward"] = held + forward.left + backward.peak
            held += forward.left + backward.left
            if not again:
                once = held
        self.update()  # the first one makes what the optimiser keeps
        peak = allocated(self.update, device).peak
        return {**found, "update": once + peak, f"{AGAIN}update": held + peak}

    def parts(self) -> Parts:
        model = self.prepared.raw
        kept = (one for state in self.optimizer.state.values() for one in state.values() if isinstance(one, Tensor))
        average = [] if self.average is None else [*self.average.parameters(), *self.average.buffers()]
        return Parts(
            _bytes(model.parameters()), _bytes(model.buffers()), _bytes(kept), _bytes(average), _bytes(self.parameters)
        )

    def forward(self, micro_batch: int) -> Tensor:
        cfg, device = self.cfg, self.prepared.device
        batch = self.work.batch(micro_batch)
        batch = {key: one.to(device) if isinstance(one, Tensor) else one for key, one in batch.items()}
        if cfg.runtime.channels_last and batch["image"].ndim == 4:
            batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype_of(cfg.runtime.amp)):
            found = self.work.loss(self.prepared.raw, batch)
        return found.total / batch["target"].numel()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        if self.cfg.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.cfg.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.prepared.raw)


def _bytes(tensors: Any) -> int:
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

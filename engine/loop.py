"""The training loop that all trainers share."""

from __future__ import annotations

import itertools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import distributed, precision
from engine.config import ExperimentConfig, Length
from engine.errors import NotFiniteError, UserError
from engine.optim import (
    build_ema,
    build_optimizer,
    build_schedule,
    late_milestones,
    learning_rates,
    other_length,
    rates_at,
)
from engine.prepare import Prepared, lost_processes, seed_all
from engine.report import Evaluation, Log
from engine.resume import BEST, LAST
from engine.signals import StopRequest
from engine.state import TrainingState, isolated_rng
from engine.watch import Seen, Watch, check_finite
from norm import precise_statistics

__all__ = ["Batch", "Batches", "Evaluation", "Loss", "Result", "fit"]

Batch = dict[str, Any]  # "image": Tensor, "target": Tensor, "name": list[str]
SANITY_BATCHES = 2


class Loss(NamedTuple):
    """Sums over the valid elements (pixels) of a micro-batch; the loop divides by those of the whole step."""

    total: Tensor
    """What is minimised, a sum, 0-d."""
    weight: Tensor
    """The number of valid elements, or the sum of their weights, 0-d."""
    parts: dict[str, Tensor]
    """Sums to report, 0-d, with the same names in every step."""


class Batches(Protocol):
    """The training data of this process."""

    def __len__(self) -> int:
        """Micro-batches in an epoch, the same number on all processes."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch from number `start` on, exactly as if all had been read.

        A batch holds `image` (N x C x H x W), `target` (tensor) and `name` (N file names).
        """


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    score: float | None
    """Best score, None if nothing was evaluated."""
    best_step: int
    """Step of the best score."""
    last_score: float | None
    """Score at the end."""
    step: int
    """Steps done."""
    signal: int | None = None
    """The signal that ended it early, or None; `last.pt` then holds all that is needed to go on."""

    @property
    def stopped(self) -> bool:
        """Whether a signal ended it early."""
        return self.signal is not None


LossFunction = Callable[[nn.Module, Batch], Loss]
Evaluate = Callable[[nn.Module, int | None], Evaluation]


def fit(
    prepared: Prepared,
    cfg: ExperimentConfig,
    batches: Batches,
    *,
    loss: LossFunction,
    evaluate: Evaluate | None,
    groups: list[dict[str, Any]],
    log: Log,
    work_dir: str | Path,
    resume: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Result:
    """Train, evaluate, save.

    The gradient is that of the loss per valid element of the whole step, over processes and accumulated micro-batches:
    2 processes x 4 images give the same as 1 x 8, also where they have unequal numbers of ignored pixels.

    Args:
        prepared: see `engine.prepare.prepare`.
        cfg: the experiment.
        batches: training data of this process.
        loss: called with the network in training mode and a batch on its device, under autocast.
        evaluate: called with the network in evaluation mode, without gradients, and the largest number of batches to
            look at (None: all). Its score decides about `best.pt`. None: nothing is evaluated.
        groups: see `engine.optim.parameter_groups`.
        log: where to report; `fit` closes it.
        work_dir: gets `last.pt`, `best.pt`, `curves.png` and, if the loss is not finite, `nan_batch.json`.
        resume: what `engine.resume.find_resume` found.
        meta: plain facts of the task for the checkpoint, such as class names.

    Raises:
        UserError: the loss or the weights are not finite; the training set is smaller than a batch; the checkpoint does
            not fit; a file cannot be written.
        Interrupted: a signal came where nothing is lost by it: before the first step, or during an evaluation, which
            the resumed run does again.
    """
    with log, StopRequest() as stop, lost_processes():  # innermost: torchrun's SIGTERM must not cut the message off
        plan = _plan(cfg, batches)
        state = _build_state(prepared, cfg, groups, plan, meta or {})
        work = _Work(prepared, cfg, batches, loss, evaluate, state, log, Path(work_dir), plan, stop)
        work.begin(resume)
        stopped = False
        while state.step < plan.total and not stopped:
            epoch, done = divmod(state.step, plan.per_epoch)
            stream = _stream(batches, epoch, done * plan.accumulation, cfg.runtime.seed)
            for _ in range(min(plan.per_epoch - done, plan.total - state.step)):
                stopped = work.step(stream)
                if stopped:
                    break
                work.after_step()
        if not stopped or plan.due(state.step, cfg.report.log_every):
            work.report()
        if not stopped and state.score is None:
            work.evaluate_and_keep()
        work.check_and_save(work.dir / LAST)
        log.curves()
        if stopped:
            log.message(
                f"stopped by a signal after step {state.step}; {work.dir / LAST} is saved, --resume auto goes on"
            )
        number = (stop.signal or signal.SIGTERM) if stopped else None  # another process may have had it, not this one
        return Result(state.best_score, state.best_step, state.score, state.step, number)


@dataclass(frozen=True)
class _Plan:
    accumulation: int
    per_epoch: int  # steps
    total: int  # steps
    text: str

    def due(self, step: int, every: Length) -> bool:
        return step > 0 and step % every.steps(self.per_epoch) == 0


def _plan(cfg: ExperimentConfig, batches: Batches) -> _Plan:
    world = distributed.world_size()
    split = cfg.split(world)
    lengths = distributed.gather(len(batches))
    if len(set(lengths)) > 1:
        raise UserError(f"the processes have {lengths} batches; give all of them the same images")
    per_epoch = len(batches) // split.accumulation
    if per_epoch == 0:
        raise UserError(
            f"batch_size: {cfg.batch_size} is more than the training set holds (an epoch has {len(batches)} "
            f"micro-batches of {split.micro_batch} on each of {world} processes); choose a smaller one"
        )
    total = cfg.length.steps(per_epoch)
    text = (
        f"batch of {cfg.batch_size} = {world} process{'es' if world > 1 else ''} x {split.accumulation} accumulated x "
        f"{split.micro_batch} images; {total} steps, {per_epoch} an epoch"
    )
    return _Plan(split.accumulation, per_epoch, total, text)


def _build_state(
    prepared: Prepared, cfg: ExperimentConfig, groups: list[dict[str, Any]], plan: _Plan, meta: Mapping[str, Any]
) -> TrainingState:
    optimizer = build_optimizer(groups, cfg.optim)
    return TrainingState(
        cfg=cfg,
        meta=meta,
        steps_per_epoch=plan.per_epoch,
        model=prepared.raw,
        ema=build_ema(prepared.raw, cfg.optim),
        optimizer=optimizer,
        scheduler=build_schedule(optimizer, cfg.optim, plan.total, plan.per_epoch),
        scaler=torch.amp.grad_scaler.GradScaler(prepared.device.type, enabled=cfg.runtime.amp == "fp16"),
    )


def _stream(batches: Batches, epoch: int, start: int, seed: int) -> Iterator[Batch]:
    """An epoch's batches; what the loader draws from the global generators must not shift the network's own numbers,
    or a resumed run would differ."""
    with isolated_rng((seed + epoch) * distributed.world_size() + distributed.rank()):
        stream = iter(batches.epoch(epoch, start))
        first = list(itertools.islice(stream, 1))
    return itertools.chain(first, stream)


class _Work:
    """A step, and what is done between two of them."""

    def __init__(
        self,
        prepared: Prepared,
        cfg: ExperimentConfig,
        batches: Batches,
        loss: LossFunction,
        evaluate: Evaluate | None,
        state: TrainingState,
        log: Log,
        work_dir: Path,
        plan: _Plan,
        stop: StopRequest,
    ) -> None:
        self.prepared, self.cfg, self.batches = prepared, cfg, batches
        self.loss, self.evaluate = loss, evaluate
        self.state, self.log, self.dir, self.plan, self.stop = state, log, work_dir, plan, stop
        self.watch = Watch(work_dir)
        self.world = distributed.world_size()
        self.precise: list[Batch] = []
        self.scale = 0.0
        self.rates: dict[str, float] = {}
        self.asked_before: Tensor | None = None
        groups = state.optimizer.param_groups
        self.parameters = [one for group in groups for one in group["params"]]
        self.moving = [one for group in groups if group.get("initial_lr", group["lr"]) > 0 for one in group["params"]]

    def begin(self, resume: Mapping[str, Any] | None) -> None:
        """Everything before the first step."""
        cfg, state, plan = self.cfg, self.state, self.plan
        seed_all(cfg.runtime.seed + distributed.rank())  # the same weights everywhere, but not the same dropout
        if resume is not None:
            path = Path(resume.get("path", "checkpoint"))
            remark = state.restore(resume, str(path))
            self.watch.restore(resume.get("unreported"))
            self.rates = rates_at(state.scheduler, max(0, state.step - 1))  # of a row that is still to come
            if path.resolve().parent != self.dir.resolve():
                # its best.pt is elsewhere; this folder gets one of its own, even of a training that is finished
                state.best_score, state.best_step, state.score = None, 0, None
            told = [f"resumed after step {state.step} of {plan.total}", *resume.get("changed", []), remark]
            self.log.message("; ".join(filter(None, told)))
            if state.step >= plan.total:
                self.log.message("the training is finished; a greater length=... would go on")
            elif note := other_length(cfg.optim, Length.parse(resume["config"]["length"]), cfg.length, plan.per_epoch):
                self.log.message(note)
        self.log.message(plan.text)
        late = late_milestones(cfg.optim, plan.total, plan.per_epoch)
        if late:
            self.log.message(f"note: optim.milestones: the training ends before {', '.join(late)}")
        if self.evaluate is not None and cfg.norm.precise_batches:
            # read once: another epoch's batches cannot be read while one is under way
            first = itertools.islice(_stream(self.batches, 0, 0, cfg.runtime.seed), cfg.norm.precise_batches)
            self.precise = [{"image": batch["image"]} for batch in first]
        self.prepared.raw.train()
        if self.evaluate is not None and state.step < plan.total:
            self.evaluation(SANITY_BATCHES)  # an error in the evaluation shows now, not after an epoch
        self.log.begin(total_steps=plan.total, steps_per_epoch=plan.per_epoch, images_per_step=cfg.batch_size)
        if resume is not None and state.step == plan.total:
            self.report()  # a signal came before the last row ...
        if resume is not None and state.score is None and plan.due(state.step, cfg.report.eval_every):
            self.evaluate_and_keep()  # ... or between the step and its evaluation ...
        if resume is not None and plan.due(state.step, cfg.report.checkpoint_every):
            missing = [path for path in self.kept() if not path.exists()]  # ... and before this
            if missing:
                self.check_and_save(*missing)

    def autocast(self) -> torch.autocast:
        return precision.autocast(self.prepared.device, precision.dtype_of(self.cfg.runtime.amp))

    def step(self, stream: Iterator[Batch]) -> bool:
        """One update of the weights; returns whether all processes should stop now."""
        state, names, losses = self.state, [], []
        for number in range(self.plan.accumulation):
            distributed.at(f"reading data for step {state.step + 1}")
            batch = next(stream, None)
            if batch is None:
                raise RuntimeError(f"the epoch ended early, in step {state.step} of {self.plan.per_epoch} an epoch")
            names.append(list(batch["name"]))
            last = number == self.plan.accumulation - 1
            distributed.at(f"computing step {state.step + 1}")
            losses.append(self.backward(self.to_device(batch), synchronise=last))
        keys = list(losses[0].parts)
        rows = [torch.stack([one.total, one.weight, *(one.parts[key] for key in keys)]) for one in losses]
        local = torch.stack([row.detach().double() for row in rows])
        asked = local.new_tensor([float(self.stop.requested)])
        total, weight, *parts, asked = distributed.all_reduce_sum(torch.cat([local.sum(0), asked])).unbind()
        self.update(weight)
        state.step += 1
        state.score = None
        self.watch.add(
            Seen(state.step, names, list(local[:, 0].unbind()), total), weight, dict(zip(keys, parts, strict=True))
        )
        if self.world == 1:
            return self.stop.requested
        # All must stop after the same step. The sum of the step before is read, so that none waits for its GPU.
        stopping = self.asked_before is not None and self.asked_before.item() > 0
        self.asked_before = asked
        return stopping

    def to_device(self, batch: Batch) -> Batch:
        device = self.prepared.device
        moved = {
            key: one.to(device, non_blocking=True) if isinstance(one, Tensor) else one for key, one in batch.items()
        }
        if self.cfg.runtime.channels_last and moved["image"].ndim == 4:
            moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
        return moved

    def backward(self, batch: Batch, *, synchronise: bool) -> Loss:
        wrapped = self.prepared.wrapped
        quiet = isinstance(wrapped, DistributedDataParallel) and not synchronise
        with wrapped.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            with self.autocast():
                found = self.loss(wrapped, batch)
            if not self.scale:
                # The sum over all elements may exceed what fp16 gradients hold. Any factor that all processes share
                # will do, since `update` takes it out again, and a power of two rounds nothing.
                elements = max(distributed.gather(batch["target"].numel()))
                self.scale = 2.0 ** -round(math.log2(elements))
            distributed.at(f"in the backward of step {self.state.step + 1}")
            self.state.scaler.scale(found.total * self.scale).backward()
        return Loss(found.total.detach(), found.weight.detach(), {k: v.detach() for k, v in found.parts.items()})

    def update(self, weight: Tensor) -> None:
        """Gradients of the sums -> gradients per valid element of the whole step -> a step of the optimiser."""
        state, optimizer = self.state, self.state.optimizer
        state.scaler.unscale_(optimizer)
        # DistributedDataParallel has divided by the number of processes. Without a valid element the gradient is 0.
        factor = torch.where(weight > 0, self.world / self.scale / weight, 0.0)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        if self.cfg.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.moving, self.cfg.optim.clip_norm)  # not those with a rate of 0
        state.scaler.step(optimizer)
        state.scaler.update()
        self.rates = learning_rates(optimizer)
        with warnings.catch_warnings():
            # The scaler may leave out the very first update, of which the schedule complains.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            state.scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update_parameters(self.prepared.raw)

    def after_step(self) -> None:
        state, plan, report = self.state, self.plan, self.cfg.report
        if plan.due(state.step, report.log_every) or state.step == plan.total:
            self.report()
        if plan.due(state.step, report.eval_every):
            self.evaluate_and_keep()
        if plan.due(state.step, report.checkpoint_every):
            self.check_and_save(self.dir / LAST, *self.kept())

    def kept(self) -> list[Path]:
        return [self.dir / f"step-{self.state.step:08}.pt"] if self.cfg.report.keep_all else []

    def advice(self) -> str:
        amp = "" if self.cfg.runtime.amp == "none" else " or runtime.amp=none"
        return f"{self.state.saved}; try a lower optim.lr or optim.clip_norm=1{amp} (--resume auto --accept-changes)"

    def report(self) -> None:
        """Log the mean loss since the last report, or stop if it is not finite."""
        means = self.watch.means(advice=self.advice())
        if means is not None:
            self.log.train(self.state.step, means.loss, means.parts, self.rates)
            if means.empty:  # a loss of 0 would look like success
                self.log.message(
                    "warning: every target since the last report is ignored, so nothing was learned; if this goes on, "
                    "look at the labels of the training split"
                )

    def check_and_save(self, *paths: Path) -> None:
        """Never over a good checkpoint with a bad one: first the losses up to here, then the weights."""
        self.watch.check(advice=self.advice())
        self.check_weights()
        self.state.unreported, self.state.elapsed = self.watch.unreported(), self.log.elapsed(self.state.step)
        distributed.at(f"saving step {self.state.step}")
        with self.log.pause():
            self.state.save(*paths)

    def check_weights(self) -> None:
        check_finite(self.prepared.raw, f"after step {self.state.step} the weights are spoilt ({self.advice()})")

    def evaluation(self, max_batches: int | None) -> Evaluation:
        assert self.evaluate is not None
        distributed.at(f"evaluating step {self.state.step}")
        model = self.state.evaluated
        where = f"while step {self.state.step} was evaluated; {self.state.saved}"
        with isolated_rng(self.cfg.runtime.seed), torch.no_grad(), self.autocast(), self.stop.at_once(where):
            if max_batches is None and self.precise:
                precise_statistics(model, (self.to_device(batch)["image"] for batch in self.precise))
            distributed.broadcast_buffers(model)  # between two steps each process has its own running statistics
            model.eval()
            try:
                found = self.evaluate(model, max_batches)
            except NotFiniteError as error:  # in all processes: running statistics that are not settled may overflow
                found = Evaluation(math.nan, text=f"warning: nothing is scored: {error}")
        self.prepared.raw.train()
        return found

    def evaluate_and_keep(self) -> None:
        """Evaluate everything; the best one so far becomes best.pt."""
        if self.evaluate is None:
            return
        self.check_and_save(self.dir / LAST)  # a signal may break the evaluation off, and need not be agreed on
        state, start = self.state, time.monotonic()
        with self.log.pause():
            found = self.evaluation(None)
        state.score = float(found.score)
        best = math.isfinite(state.score) and (state.best_score is None or state.score > state.best_score)
        if best:
            state.best_score, state.best_step = state.score, state.step
        self.log.evaluation(state.step, found, seconds=time.monotonic() - start, best=best)
        if best:
            self.check_and_save(self.dir / BEST)

"""From a plain network to one that is ready to train: the one place for the order of the steps."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import norm
from engine import advice, distributed, layout, precision, traffic
from engine.config import ExperimentConfig, NormConfig, RuntimeConfig
from engine.errors import LostProcess, UserError, is_lost_worker
from engine.memory import keep_freed_memory
from engine.recompute import recompute_blocks
from engine.single_values import allow_single_values
from engine.unused import unused_parameters
from norm.precise import averaging


@dataclass(frozen=True)
class Prepared:
    """A network ready to train."""

    raw: nn.Module
    """The network itself; its state dict always has the plain names."""
    wrapped: nn.Module
    """What is called in training: `raw`, or its DistributedDataParallel wrapper."""
    device: torch.device
    report: str
    """What was done, for the log."""
    groups: list[dict[str, Any]]
    """The optimiser's parameter groups, where `prepare` was told how to make them."""


@contextmanager
def session(runtime: RuntimeConfig) -> Iterator[torch.device]:
    """Processes, threads, seeds, determinism and precision for the length of a `with` block; yields this process's
    device. On a CPU the process keeps the memory that it frees, from then on (`memory.keep_freed_memory`).

    Raises:
        UserError: see `distributed.setup`.
        LostProcess: inside the block another process, or one that loads data, was lost.
    """
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    joined = not distributed.is_joined()
    device = distributed.setup(runtime.device, runtime.ddp_timeout_minutes)
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads())
    products = torch.get_float32_matmul_precision()
    try:
        torch.use_deterministic_algorithms(runtime.deterministic)
        torch.backends.cudnn.benchmark = not runtime.deterministic
        torch.set_float32_matmul_precision(runtime.matmul_precision)
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        if device.type == "cpu":
            keep_freed_memory()
        seed_all(runtime.seed)
        with lost_processes():
            yield device
    except BaseException as error:
        if joined:
            distributed.leave(f"has ended: {(str(error).splitlines() or [type(error).__name__])[0]}")
        raise
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.set_num_threads(before[2])
        torch.set_float32_matmul_precision(products)
        if joined:
            distributed.cleanup()


@contextmanager
def predicting(runtime: RuntimeConfig) -> Iterator[torch.device]:
    """A `session` for a program that runs a trained network with `runtime.amp`; stderr says where that will be slow.

    A training says it in its log (`prepare`), and so its evaluations need not.

    Raises:
        UserError, LostProcess: see `session`.
    """
    with session(runtime) as device:
        if distributed.is_main() and (note := precision.slow(device, precision.dtype_of(runtime.amp))):
            print(f"warning: {note}", file=sys.stderr, flush=True)
        yield device


@contextmanager
def lost_processes() -> Iterator[None]:
    """Torch's errors about other processes, in words that say which one and what to do.

    Raises:
        LostProcess: in their place.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if is_lost_worker(error):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise the news again, over this
            raise LostProcess(
                f"runtime.workers: a process that loads data has died ({str(error).splitlines()[0].rstrip('. ')}); if "
                "memory is short (dmesg tells), lower runtime.workers or the batch; --resume auto goes on from the "
                "last checkpoint"
            ) from error
        told = distributed.explained(error) if isinstance(error, RuntimeError) else error
        if told is error:
            raise
        raise told from error


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def convert_norm(model: nn.Module, section: NormConfig, calibrate: Iterable[Tensor] | None = None) -> str:
    """Apply the normalization of a config to `model`, in place; returns the printable report.

    `calibrate` holds batches of images, N x C x H x W, with which a trained batch-norm network keeps its function. The
    norms then take single values too, see `engine.single_values`.

    Raises:
        UserError: the recipe does not know what to do with a layer, or an override matches nothing.
    """
    try:
        report = norm.convert(
            model, section.name, overrides=section.overrides or None, calibrate=calibrate, **section.options
        )
    except norm.NormError as error:
        raise UserError(f"norm: {error}") from None
    allow_single_values(model)
    return str(report)


def for_prediction(model: nn.Module, path: Path | str) -> nn.Module:
    """`norm.fold(model)`: plain layers in place of the norm's, which would compute their weights anew in each forward.

    Raises:
        UserError: the network cannot be folded; names `path`, its checkpoint.
    """
    try:
        return norm.fold(model)
    except norm.NormError as error:
        raise UserError(f"{path}: the network cannot be folded: {error}") from None


def prepare(
    model: nn.Module,
    cfg: ExperimentConfig,
    *,
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
    images: Iterable[Tensor] | None = None,
    blank: Tensor | None = None,
    fill: Callable[[nn.Module], None] | None = None,
) -> Prepared:
    """Device, norm recipe, freezing, memory layout, checkpointing, checks, compile, DistributedDataParallel, in that
    order.

    Call it inside `session`. `images` are batches N x C x H x W to calibrate with; `norm.calibrate_batches` of them are
    used. `blank`, one such batch of a size that the network takes, is for finding parameters that it does not use,
    where there are several processes. `groups` makes the optimiser's groups of the converted network (`engine.optim.
    parameter_groups`): for parameters with a rate of 0 no gradients are computed. `fill` is called with the converted
    network, before processes share its weights, to load weights that fit no other. `model` is changed in place.

    Raises:
        UserError: see `convert_norm`, `recompute_blocks` and `parameter_groups`; sync_bn among several processes
            without GPUs; precise statistics of a network that has no running ones.
    """
    device = current_device(cfg.runtime)
    wanted = cfg.norm.calibrate_batches
    model.to(device)  # first, since calibration runs the network
    batches = [batch.to(device) for batch in islice(images, wanted)] if images is not None and wanted else None
    report = [convert_norm(model, cfg.norm, batches)]
    if fill is not None:
        fill(model)
    if cfg.norm.precise_batches and not averaging(model):
        raise UserError(
            f"norm.precise_batches: {cfg.norm.precise_batches} has no effect, since with norm.name={cfg.norm.name} no "
            "layer has running statistics; leave it out"
        )
    made = [] if groups is None else groups(model)
    frozen = [one for group in made if group["lr"] == 0 for one in group["params"]]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if frozen:
        report.append(f"frozen, without gradients: {len(frozen)} parameters whose learning rate is 0")
    if cfg.runtime.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cpu":
            layout.leave_channels_last(model)
    if cfg.runtime.checkpointing:
        report.append(recompute_blocks(model))
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        if distributed.world_size() == 1:
            report.append("one process: SyncBatchNorm works as BatchNorm")
        elif device.type != "cuda":
            raise UserError(
                "norm.name: sync_bn synchronises GPUs, and this run is on CPUs; use bn, or runtime.device=cuda"
            )
    world = distributed.world_size()
    unused = unused_parameters(model, blank.to(device)) if world > 1 and blank is not None else []
    if unused is None or unused:
        what = f"leaves {len(unused)} parameters unused, such as {unused[0]}" if unused else "takes no blank image"
        report.append(f"the network {what}: the processes look for unused ones in each step")
    if cfg.runtime.compile:
        mode = None if cfg.runtime.compile is True else cfg.runtime.compile
        model.compile(mode=mode)  # in place: the names in the state dict stay
    wrapped = model
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=unused is None or bool(unused)
        )
        # rank 0's running statistics in every step, unless all have the same anyway; those it starts from are rank 0's
        wrapped.broadcast_buffers = not traffic.same_buffers(model)
    report += traffic.report(model, cfg)
    if note := precision.slow(device, precision.dtype_of(cfg.runtime.amp)):
        report.append(note)
    if device.type == "cpu" and not cfg.runtime.channels_last and (note := layout.slow(model)):
        report.append(note)
    report += filter(None, [advice.few_images(model, cfg, world), advice.not_compiled(model, cfg, device)])
    return Prepared(model, wrapped, device, "\n".join(report), made)


def current_device(runtime: RuntimeConfig) -> torch.device:
    """The device that `session` has chosen for this process."""
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

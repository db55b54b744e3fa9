"""What several processes cost: step times and traffic measured on this machine, and the traffic's time on many GPUs
computed from link speeds.

Time of a sum of S bytes over n GPUs: calls x latency + 2 (n - 1) / n x S / B, with B the bandwidth that each GPU has to
the outside (NVIDIA's nccl-tests, doc/PERFORMANCE.md, whose bounds these are); a broadcast takes S / B. The latency is
that of NCCL's own model for a tree of LL128 (src/graph/tuning.cc, NVIDIA/nccl at 01afd20):
4.4 us + 2 ((g - 1) x 1.2 us + log2(machines) x 8.5 us) with g GPUs in a machine.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engine import distributed, traffic
from engine.config import ExperimentConfig
from engine.optim import build_optimizer
from engine.prepare import convert_norm, prepare, session
from engine.probe import Workload
from engine.processes import in_processes
from engine.steps import TrainingStep
from norm.state import in_step

_MACHINE = 8
"""GPUs in a machine."""
_BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends together."""
_BASE, _INSIDE, _BETWEEN = 4.4e-6, 1.2e-6, 8.5e-6
"""Seconds of latency: of a sum, of a step inside a machine, and between two."""


@dataclass(frozen=True)
class Network:
    """Bytes a second in one direction that a GPU has to the others."""

    name: str
    inside: float
    """Within a machine."""
    between: float
    """Between machines: all network cards of a machine, since NCCL lays a ring through each of them."""


NETWORKS = (
    Network("8 x 400 Gb/s", 450e9, 8 * 50e9),
    Network("1 x 100 Gb/s", 450e9, 12.5e9),
)
"""Machines with eight GPUs on NVLink of the fourth generation, 900 GB/s both ways together, and two kinds of cards."""


@dataclass(frozen=True)
class Variant:
    """A config to measure."""

    label: str
    cfg: ExperimentConfig


@dataclass
class Row:
    """What was measured of a variant with so many processes, and what it was said to send."""

    variant: str
    processes: int
    seconds: float
    """Of a step of `images` images on each process: forward, backward, update."""
    images: int
    said: traffic.Step
    counted: float
    """Bytes that each process handed to collective operations in a step."""
    wire: float | None
    """Bytes that each process sent through the loopback interface in a step; None: this system does not tell."""


def measure(
    workload: Callable[[Any], Workload], variants: Sequence[Variant], processes: Sequence[int], rounds: int = 5
) -> list[Row]:
    """Medians over `rounds` of training steps of all variants in turn, in each number of processes; a round has as many
    steps as a norm needs for all that it does (`norm.every`). Each process has one thread and a micro-batch of its own.

    Args:
        workload: a function of a module that gives the work of a config, such as `seg.plan.workload`.
        variants: their configs; `runtime.device` is a CPU.
        processes: how many.

    Raises:
        UserError: as a training with these configs.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in processes:
            path = Path(folder, f"{world}.json")
            in_processes(_measure_here, workload, list(variants), rounds, path, world=world)
            rows += [Row(**{**row, "said": traffic.Step(**row["said"])}) for row in json.loads(path.read_text())]
    return rows


def _measure_here(workload: Callable[[Any], Workload], variants: list[Variant], rounds: int, path: Path) -> None:
    works, world = [_Work(workload(variant.cfg), variant) for variant in variants], distributed.world_size()
    for number in range(rounds + 2):
        for work in works:
            work.once(keep=number >= 2)  # buckets are made anew after the first step
    rows = [asdict(work.row(world)) for work in works]
    if distributed.is_main():
        path.write_text(json.dumps(rows))


class _Work:
    def __init__(self, workload: Workload, variant: Variant) -> None:
        self.variant, cfg = variant, workload.cfg
        self.times: list[float] = []
        micro = cfg.split(1).micro_batch
        # each process has as many images, whatever their number; the config's batch is that of one
        self.cfg = cfg.model_copy(update={"batch_size": micro * distributed.world_size(), "micro_batch": micro})
        with session(cfg.runtime):
            blank = workload.batch(2)["image"]
            groups, images = workload.groups, workload.images
            self.prepared = prepare(workload.build(), self.cfg, groups=groups, images=images, blank=blank)
            self.step = TrainingStep(self.prepared, self.cfg, self.prepared.groups, workload.loss)
            self.batch, self.images = workload.batch(micro), micro

    def once(self, keep: bool) -> None:
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(self.step.cycle):
            self.step(self.batch)
        if keep:
            self.times.append((time.perf_counter() - start) / self.step.cycle)

    def row(self, world: int) -> Row:
        """The times so far, and what is sent in a few further steps."""
        repeat = self.step.cycle
        for _ in range(repeat):
            if not in_step(self.prepared.raw, repeat):
                self.step(self.batch)
        distributed.barrier()
        before = loopback()
        with traffic.Counting() as counting:
            for _ in range(repeat):
                self.step(self.batch)
        distributed.barrier()
        after = loopback()
        wire = None if before is None or after is None else (after - before) / (repeat * world)
        said = traffic.step(self.prepared.raw, self.cfg, world)
        if world == 1:  # it sends nothing
            said = traffic.Step(0, 0, 0.0, 0.0)
        return Row(self.variant.label, world, median(self.times), self.images, said, counting.size / repeat, wire)


def loopback(path: Path = Path("/proc/net/dev")) -> int | None:
    """Bytes that this machine has sent to itself so far; None on a system that does not tell."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = [line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:")]
    return int(found[0][8]) if found else None


def steps(workload: Callable[[Any], Workload], variants: Sequence[Variant]) -> dict[str, traffic.Step]:
    """What a process sends in a step, for each variant, by label; without accumulation.

    Raises:
        UserError: as a training with such a config in one process.
    """
    found = {}
    for variant in variants:
        variant.cfg.split(1)
        work = workload(variant.cfg)
        model = work.build()
        build_optimizer(work.groups(model), variant.cfg.optim)
        convert_norm(model, variant.cfg.norm)
        whole = variant.cfg.model_copy(update={"batch_size": 1, "micro_batch": 1})
        found[variant.label] = traffic.step(model, whole, 1)
    return found


@dataclass(frozen=True)
class Cost:
    """Seconds that the traffic of a step takes on GPUs, at best; computed, not measured."""

    gradients: float
    """Sums of DistributedDataParallel's buckets; the backward goes on meanwhile."""
    buffers: float
    """Its broadcasts, before the forward."""
    statistics: float
    """Sums of `norm.sync`, for which forward and backward wait."""


def cost(step: traffic.Step, gpus: int, network: Network) -> Cost:
    """For so many GPUs, at least two, full machines if there are more than eight."""
    machines = math.ceil(gpus / _MACHINE)
    latency = _BASE + 2 * ((min(gpus, _MACHINE) - 1) * _INSIDE + math.log2(machines) * _BETWEEN)
    bandwidth = network.inside if machines == 1 else min(network.inside, network.between)
    ring = 2 * (gpus - 1) / gpus / bandwidth
    return Cost(
        math.ceil(step.gradients / _BUCKET) * latency + step.gradients * ring,
        latency + step.buffers / bandwidth if step.buffers else 0.0,
        step.calls * latency + step.statistics * ring,
    )


def measured_table(rows: Sequence[Row]) -> str:
    """A line for each variant and number of processes; traffic of one process in a step."""
    lines: list[tuple[str, ...]] = [
        ("variant", "processes", "images", "step ms", "said MiB", "of it sync", "sums", "counted MiB", "wire MiB")
    ]
    for row in rows:
        total = row.said.gradients + row.said.buffers + row.said.statistics
        sizes = [f"{size / 2**20:.2f}" for size in (total, row.said.statistics)]
        wire = "-" if row.wire is None else f"{row.wire / 2**20:.2f}"
        lines.append(
            (
                row.variant,
                str(row.processes),
                str(row.processes * row.images),
                f"{1e3 * row.seconds:.0f}",
                *sizes,
                f"{row.said.calls:.0f}",
                f"{row.counted / 2**20:.2f}",
                wire,
            )
        )
    return _aligned(lines)


def computed_table(steps: dict[str, traffic.Step], gpus: Sequence[int]) -> str:
    """ms a step, by variant and network (rows) and number of GPUs (columns), and the MiB from each GPU that they are
    for: gradients + buffers + statistics; and the number of sums that the statistics take."""
    lines: list[tuple[str, ...]] = [("variant", "MiB", "sums", "network", *(f"{count} GPUs" for count in gpus))]
    for label, step in steps.items():
        sizes = " + ".join(f"{size / 2**20:.1f}" for size in (step.gradients, step.buffers, step.statistics))
        for network in NETWORKS:
            found = [cost(step, count, network) for count in gpus]
            cells = [" + ".join(f"{1e3 * part:.1f}" for part in astuple(each)) for each in found]
            lines.append((label, sizes, f"{step.calls:.0f}", network.name, *cells))
    return _aligned(lines)


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)

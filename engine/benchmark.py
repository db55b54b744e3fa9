"""What a normalization costs: step time, memory, evaluation and arithmetic of one network with several recipes.

The variants are measured in turn, A B A B ..., in one process, and compared by their medians: other work on the machine
then slows all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import norm
from engine import flops
from engine.checkpoint import first_line
from engine.errors import UserError
from engine.layout import leave_channels_last
from engine.memory import allocated, quiet_profiler
from engine.optim import build_optimizer
from engine.precision import autocast
from engine.prepare import convert_norm
from norm.calibration import tensors
from norm.state import in_step, skip_fresh_steps

_WARM_UP = (1, 4)
"""Rounds on a CPU, on a GPU, where `norm.recorded` records what it has seen some times."""


@dataclass(frozen=True)
class Variant:
    """A recipe to measure."""

    label: str
    section: Any
    """An `engine.config.NormConfig`."""


@dataclass(frozen=True)
class Case:
    """A network and what goes into it."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the network, with plain convolutions and batch norm; called once for each variant, after seeding."""
    shape: tuple[int, ...]
    """Of the input, N x C x H x W."""
    between: bool = False
    """A layer as it is between others: the gradient of its input is computed too. Images need none."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    rounds: int = 7
    """Rounds that count, after one that warms up (on a GPU four)."""
    steps: int = 4
    """Steps in a round; what is not done in every step (norm.every) needs as many or a multiple."""
    device: torch.device = torch.device("cpu")
    amp: torch.dtype | None = None
    channels_last: bool = False
    compile: str | None = None
    """Mode of torch.compile."""
    memory: bool = True
    """Measure memory and count operations too (not those of compiled networks)."""
    evaluation: bool = True
    """Measure the forward in evaluation too."""


@dataclass
class Row:
    """What was measured of a variant; None: not measured."""

    case: str
    variant: str
    shape: tuple[int, ...] = ()
    """Of the input."""
    step: float = 0.0
    """Seconds of forward, backward and update."""
    ratio: float = 1.0
    """`step` over that of the first variant."""
    images_per_second: float = 0.0
    saved: int | None = None
    """Bytes kept for the backward, parameters left out."""
    peak: int | None = None
    """Largest allocation of a round's steps beyond what was there before, in bytes."""
    flops: int | None = None
    """Multiplications and additions of matrix products and convolutions in a step, the mean of a round's."""
    evaluation: float | None = None
    """Seconds of a forward in evaluation."""
    folded: float | None = None
    """The same after folding (batch norm into the convolution, `norm.fold`); None where nothing can be folded."""


def measure(case: Case, variants: Sequence[Variant], settings: Settings) -> list[Row]:
    """Measure one network with all variants.

    Raises:
        UserError: see `engine.prepare.convert_norm`; a network that does not take the input; a round that is no
            multiple of a norm's cycle.
    """
    check(case, settings.device)
    works = [_Work(case, variant, settings) for variant in variants]
    rows = [Row(case.name, variant.label, case.shape) for variant in variants]
    trained = _in_turn([work.step for work in works], settings)
    for row, work, seconds in zip(rows, works, trained, strict=True):
        row.step, row.ratio = seconds, seconds / trained[0]
        row.images_per_second = case.shape[0] / seconds
        if settings.memory:
            row.saved, row.peak = work.saved(), work.peak()
            row.flops = None if settings.compile else work.flops()
    if settings.evaluation:
        _evaluate(rows, works, settings)
    return rows


def check(case: Case, device: torch.device) -> None:
    """Raises UserError for an unknown network, or one that gives no tensor of floats for such an input."""
    network = case.build().to(device).eval()
    try:
        with torch.no_grad():
            found = network(torch.zeros(case.shape, device=device))
    except (RuntimeError, ValueError) as error:
        size = "x".join(map(str, case.shape))
        raise UserError(
            f"{case.name}: cannot compute an input of {size}: {first_line(error)}; give another size or network"
        ) from None
    if not tensors(found):
        kind = type(found).__name__
        raise UserError(f"{case.name}: gives no tensor of floats but {kind}; the steps measured need one")


def _evaluate(rows: Sequence[Row], works: Sequence[_Work], settings: Settings) -> None:
    plain = [work.evaluated() for work in works]
    folded = [_folded(network, work.images.detach()) for work, network in zip(works, plain, strict=True)]
    for network in folded if settings.compile else []:
        if network is not None:  # a copy, which is not compiled as that before it is
            network.compile(mode=settings.compile)
    with torch.no_grad():
        calls = [work.forward(network) for work, network in zip(works, plain, strict=True)]
        shorter = [work.forward(network) for work, network in zip(works, folded, strict=True) if network is not None]
        found = _in_turn([*calls, *shorter], settings)
    for row, seconds in zip(rows, found, strict=False):
        row.evaluation = seconds
    rest = iter(found[len(rows) :])
    for row, network in zip(rows, folded, strict=True):
        row.folded = None if network is None else next(rest)


def trace(case: Case, variant: Variant, settings: Settings, path: Path) -> None:
    """Write torch's profile of a round of training steps as a Chrome trace (chrome://tracing, ui.perfetto.dev).

    A whole round, since some norms compute in every few steps what they leave out in others; each is marked `step`.
    """
    work = _Work(case, variant, settings)
    work.step()
    work.align()
    quiet_profiler()
    with torch.profiler.profile(record_shapes=True) as profile:
        for number in range(settings.steps):
            with torch.profiler.record_function(f"step {number + 1}"):
                work.step()
    try:
        profile.export_chrome_trace(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def table(rows: Sequence[Row]) -> str:
    """A line for each variant; times in ms, memory in MiB with the ratio to the first variant of the case."""
    measured = ("step ms", "ratio", "img/s", "saved MiB", "peak MiB", "GFLOP", "eval ms", "folded ms")
    head = ("case", "variant", "input", *measured)
    lines = [head]
    first: dict[str, Row] = {}
    for row in rows:
        base = first.setdefault(row.case, row)
        lines.append(
            (
                row.case,
                row.variant,
                "x".join(map(str, row.shape)),
                f"{1e3 * row.step:.1f}",
                f"{row.ratio:.2f}",
                f"{row.images_per_second:.1f}",
                _memory(row.saved, base.saved),
                _memory(row.peak, base.peak),
                "-" if row.flops is None else f"{row.flops / 1e9:.1f}",
                "-" if row.evaluation is None else f"{1e3 * row.evaluation:.1f}",
                "-" if row.folded is None else f"{1e3 * row.folded:.1f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = (
        "  ".join(
            word.ljust(w) if i < 3 else word.rjust(w) for i, (word, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(text.rstrip() for text in texts)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _memory(value: int | None, base: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / 2**20:.1f}" + (f" ({value / base:.2f})" if base else "")


class _Work:
    """A network with one recipe, ready to be stepped."""

    def __init__(self, case: Case, variant: Variant, settings: Settings) -> None:
        from engine.config import OptimConfig

        torch.manual_seed(0)
        self.settings = settings
        self.model = case.build().to(settings.device)
        convert_norm(self.model, variant.section)
        for every in {int(getattr(layer, "every", 0)) or 1 for layer in self.model.modules()}:
            if settings.steps % every:
                ordinal = {2: "2nd", 3: "3rd"}.get(every, f"{every}th")
                raise UserError(
                    f"--steps {settings.steps}: {variant.label} does in every {ordinal} step what it leaves out in "
                    f"others; give a multiple of {every}"
                )
        skip_fresh_steps(self.model)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=layout).train()  # type: ignore[call-overload]
        if settings.channels_last and settings.device.type == "cpu":
            leave_channels_last(self.model)  # as trainings do
        self.images = torch.randn(case.shape, device=settings.device).to(memory_format=layout)
        self.images.requires_grad_(case.between)
        groups = [{"params": list(self.model.parameters())}]
        self.optimizer = build_optimizer(groups, OptimConfig(lr=1e-3))
        enabled = settings.amp == torch.float16
        self.scaler = torch.amp.grad_scaler.GradScaler(settings.device.type, enabled=enabled)
        if settings.compile:
            self.model.compile(mode=settings.compile)

    def loss(self) -> Tensor:
        with autocast(self.settings.device, self.settings.amp):
            found = self.model(self.images)
        return torch.stack([output.float().square().mean() for output in tensors(found)]).sum()

    def step(self) -> None:
        self.scaler.scale(self.loss()).backward()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.images.grad = None

    def saved(self) -> int:
        """Bytes that autograd keeps, each storage once, without those of parameters and of the input."""
        own = {each.untyped_storage().data_ptr() for each in [*self.model.parameters(), self.images]}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        if self.settings.compile:
            pack = torch.compiler.disable(pack)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.images.grad = None
        return sum(kept.values())

    def align(self) -> None:
        """Step until a round holds all that a norm does."""
        for _ in range(self.settings.steps):
            if in_step(self.model, self.settings.steps):
                return
            self.step()

    def whole_round(self) -> None:
        """Steps enough for all that a norm does: some compute in every few what they leave out in others."""
        for _ in range(self.settings.steps):
            self.step()

    def flops(self) -> int:
        """Of a step, the mean over a round."""
        self.align()
        return round(flops.count(self.whole_round) / self.settings.steps)

    def peak(self) -> int:
        """Of the largest step of a round."""
        self.align()
        return allocated(self.whole_round, self.settings.device).peak

    def evaluated(self) -> nn.Module:
        return self.model.eval()

    def forward(self, network: nn.Module) -> Callable[[], Any]:
        images = self.images.detach()

        def call() -> Any:
            with autocast(self.settings.device, self.settings.amp):
                return network(images)

        return call


def _folded(network: nn.Module, images: Tensor) -> nn.Module | None:
    """Without any norm: deconvolution by `norm.fold`, batch norm by torch's tracer.

    Where that cannot follow (control flow that depends on the input), what conversion sees in a run on `images` tells
    which batch norm goes into which convolution; folded again, the converted network is the same plain one.
    """
    plain = norm.fold(network)
    if not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules()):
        kinds = [[type(module) for module in each.modules()] for each in (network, plain)]
        return plain if kinds[0] != kinds[1] else None  # group norm stays
    from torch.fx.experimental.optimization import fuse
    from torch.fx.proxy import TraceError

    try:
        fused: nn.Module = fuse(plain)
    except (TraceError, TypeError):
        try:
            norm.convert(plain, "deconv", calibrate=images)
        except norm.NormError:
            return None
        return norm.fold(plain)
    return fused


def _in_turn(calls: Sequence[Callable[[], Any]], settings: Settings) -> list[float]:
    """Seconds of each call: the median over the rounds of a round's mean. A GPU is waited for once a round."""
    times: list[list[float]] = [[] for _ in calls]
    first = _WARM_UP[settings.device.type == "cuda"]
    for number in range(settings.rounds + first):
        for call, found in zip(calls, times, strict=True):
            start = _now(settings.device)
            for _ in range(settings.steps):
                call()
            seconds = _now(settings.device) - start
            if number >= first:
                found.append(seconds / settings.steps)
    return [median(found) for found in times]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

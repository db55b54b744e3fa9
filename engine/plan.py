"""A memory plan: which micro-batch of an experiment fits into a given memory, by what `engine.probe` has measured.

What a larger micro-batch takes lies on the straight line through the last two, for each phase of a step by itself: a
phase whose peak grows slowly (the update) hides another one that grows faster (the forward) only in small batches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from engine.errors import UserError
from engine.memory import show_bytes

_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Parts:
    """Bytes that stay from step to step, and those of the gradients, which live within a step."""

    parameters: int
    buffers: int
    optimizer: int
    average: int
    gradients: int

    @property
    def lasting(self) -> int:
        return self.parameters + self.buffers + self.optimizer + self.average


Phases = dict[str, int]
"""Bytes at the peak of each phase of a step that accumulates two micro-batches, beyond the parts that last. Those that
begin with AGAIN are the second micro-batch's."""
AGAIN = "again: "


@dataclass
class Curve:
    """What a step takes beyond the parts that last, as a function of the micro-batch."""

    measured: dict[int, Phases] = field(default_factory=dict)

    def step(self, micro_batch: int, accumulation: int) -> int:
        """Bytes at the peak of a step, as measured or else on the lines through the two nearest measurements."""
        if micro_batch in self.measured:
            found = self.measured[micro_batch]
        elif len(self.measured) == 1:  # more did not fit: in proportion, which is too much rather than too little
            ((size, first),) = self.measured.items()
            found = {key: round(value * micro_batch / size) for key, value in first.items()}
        else:
            low, high = self._nearest(micro_batch)
            first, second = self.measured[low], self.measured[high]
            share = (micro_batch - low) / (high - low)
            found = {key: round(first[key] + share * max(0, second[key] - first[key])) for key in first}
        return max(value for key, value in found.items() if accumulation > 1 or not key.startswith(AGAIN))

    def image(self) -> float:
        """Bytes that one more image takes."""
        if len(self.measured) == 1:
            ((size, _),) = self.measured.items()
            return self.step(size, 1) / size
        low, high = self._nearest(max(self.measured) + 1)
        return max(
            (self.measured[high][key] - self.measured[low][key]) / (high - low) for key in ("forward", "backward")
        )

    def _nearest(self, micro_batch: int) -> tuple[int, int]:
        sizes = sorted(self.measured)
        place = next((i for i, size in enumerate(sizes) if size > micro_batch), len(sizes) - 1)
        place = max(1, place)
        return sizes[place - 1], sizes[place]


@dataclass(frozen=True)
class Option:
    """A way to compute the global batch, and the memory that it is predicted to take."""

    micro_batch: int
    accumulation: int
    checkpointing: bool
    memory: int


@dataclass
class Plan:
    """What was measured and what follows from it."""

    title: str
    budget: int
    batch_size: int
    ranks: int
    process: int
    """Bytes that the program itself takes beside torch's tensors."""
    curves: dict[bool, Curve]
    """By whether activations are computed again."""
    parts: Parts = Parts(0, 0, 0, 0, 0)
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    spare: int = 0
    """Bytes of the budget that are left to what was not measured."""
    kept: float = 0.0
    """What is left besides, as a share of the memory: freed memory that the C library keeps is not all of use."""
    data: int = 0
    """Bytes of the data set where it lies in memory."""
    evaluation: int = 0
    """Bytes at the peak of an evaluation's batch, beyond the parts that last."""
    smaller: str = "data.eval_batch_size"
    """The key whose smaller value lessens that."""
    precise: int = 0
    """Bytes kept for precise statistics, for each image of a micro-batch."""

    def options(self) -> list[Option]:
        """Every micro-batch that divides this process's share of the batch, the largest first."""
        share = self.batch_size // self.ranks
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        return [
            Option(size, share // size, checkpointing, self.memory(size, share // size, checkpointing))
            for checkpointing in self.curves
            for size in sizes
        ]

    def memory(self, micro_batch: int, accumulation: int, checkpointing: bool) -> int:
        """Bytes at the peak of a training step or an evaluation. Several processes keep the gradients between steps, in
        the buckets of DistributedDataParallel."""
        lasting = self.process + self.data + self.parts.lasting + (self.parts.gradients if self.ranks > 1 else 0)
        step = self.curves[checkpointing].step(micro_batch, accumulation)
        return lasting + self.precise * micro_batch + max(step, self.evaluation)

    def choice(self) -> Option | None:
        """The largest micro-batch that fits, without computing activations again if there is one so."""
        return next((option for option in self.options() if self.fits(option)), None)

    def fits(self, option: Option) -> bool:
        return option.memory + self.left(option) <= self.budget

    def left(self, option: Option) -> int:
        """Bytes that are left to what was not measured."""
        return round(self.kept * option.memory) + self.spare

    def __str__(self) -> str:
        return "\n".join([self.title, *self._parts(), "", *self._table(), "", *self._advice()])

    def _parts(self) -> list[str]:
        parts = self.parts
        named = {
            "the program itself": self.process,
            "the data set": self.data,
            "parameters": parts.parameters,
            "buffers": parts.buffers,
            "optimizer": parts.optimizer,
            "moving average": parts.average,
            "gradients (in a step)": parts.gradients,
        }
        for checkpointing, curve in self.curves.items():
            what = "an image, with checkpointing" if checkpointing else "an image (in a step)"
            named[what] = round(curve.image())
        named |= {"an evaluation": self.evaluation, "precise statistics, an image": self.precise}
        return [f"  {name:<30} {show_bytes(value):>12}" for name, value in named.items() if value]

    def _table(self) -> list[str]:
        rows: dict[int, dict[bool, Option]] = {}
        for option in self.options():
            rows.setdefault(option.micro_batch, {})[option.checkpointing] = option
        titles = {False: "memory", True: "with checkpointing"}
        lines = ["micro_batch  accumulation" + "".join(f"  {titles[key]:>20}" for key in self.curves)]
        for size, found in rows.items():
            cells = [self._cell(option) for option in found.values()]
            lines.append(
                f"{size:>11}  {next(iter(found.values())).accumulation:>12}"
                + "".join(f"  {cell:>20}" for cell in cells)
            )
        return lines

    def _cell(self, option: Option) -> str:
        sign = "" if option.micro_batch in self.curves[option.checkpointing].measured else "~"
        return f"{sign}{show_bytes(option.memory)}{' fits' if self.fits(option) else ''}"

    def _advice(self) -> list[str]:
        chosen, budget = self.choice(), show_bytes(self.budget)
        guessed = any(o.micro_batch not in self.curves[o.checkpointing].measured for o in self.options())
        sign = "; ~: not measured, on the line through those that are" if guessed else ""
        notes = [*self.remarks, f"measured in {self.seconds:.0f} s{sign}"]
        if chosen is None:
            least = min(self.options(), key=lambda option: option.memory)
            how = f"micro_batch={least.micro_batch} runtime.checkpointing={str(least.checkpointing).lower()}"
            more_left = self.left(least)
            left = f", and {show_bytes(more_left)} more are left to what was not measured" if more_left else ""
            if self.evaluation > self.curves[least.checkpointing].step(least.micro_batch, least.accumulation):
                notes.append(f"an evaluation takes {show_bytes(self.evaluation)}; a smaller {self.smaller} less")
            return [*notes, f"nothing fits into {budget}: the least is {show_bytes(least.memory)}{left}, with {how}"]
        more = next((o for o in self.options() if self.fits(o) and o.micro_batch > chosen.micro_batch), None)
        if more is not None:
            notes.append(
                f"runtime.checkpointing=true would allow micro_batch={more.micro_batch}, for about a third more time"
            )
        ranks = f"{self.ranks} processes x " if self.ranks > 1 else ""
        notes.append(
            f"for {budget}, with the same batch of {self.batch_size} = {ranks}{chosen.accumulation} accumulated x "
            f"{chosen.micro_batch}, set:"
        )
        return [*notes, f"  micro_batch={chosen.micro_batch} runtime.checkpointing={str(chosen.checkpointing).lower()}"]


def parse_size(text: str) -> int:
    """Bytes of a size such as 11GiB, 11.5 GB or 900MiB; GiB counts by 1024, GB by 1000.

    Raises:
        UserError: it is none, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    size = 0
    if found is not None and not (found[3] and not found[2]):
        size = round(float(found[1]) * (1024 if found[3] else 1000) ** (_UNITS[found[2].upper()] if found[2] else 0))
    if size < 1:
        raise UserError(f"--plan: found {text!r}, expected a size of memory with its unit, such as 11GiB or 900MiB")
    return size

"""How much processes tell each other in a training step: computed from the layers, and counted as it is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import distributed
from engine.config import ExperimentConfig
from engine.recompute import blocks
from norm import processes

_OPERATIONS = ("c10d::allreduce_", "c10d::broadcast_")


class Counting(TorchDispatchMode):
    """Counts sums and broadcasts in a `with` block, those of DistributedDataParallel and of the backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.size = 0
        """Bytes that were handed to them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _OPERATIONS:
            self.calls += 1
            self.size += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """Bytes that a process hands to collective operations in a training step, and calls of those of `norm.sync`."""

    gradients: int
    """Averaged by DistributedDataParallel, after the last micro-batch."""
    buffers: int
    """Broadcast by it from rank 0, before the first micro-batch."""
    statistics: float
    """Summed by the layers with `norm.sync`, at most."""
    calls: float


def step(model: nn.Module, cfg: ExperimentConfig, world: int) -> Step:
    """What `model`, converted, sends in a step of the experiment among `world` processes."""
    accumulation = cfg.split(world).accumulation
    found = processes.traffic(model)
    if cfg.runtime.checkpointing:  # the forward's sums again, in the backward: no more than all of them again
        for block in blocks(model).values():
            found = found.plus(processes.traffic(block))
    buffers = 0 if same_buffers(model) else sum(buffer.nbytes for buffer in model.buffers())
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return Step(gradients, buffers, accumulation * found.size, accumulation * found.calls)


def same_buffers(model: nn.Module) -> bool:
    """Whether all processes have the same buffers at any time, since every layer that has any is synchronised."""
    equal = set(processes.synchronised(model))
    return all(module in equal or not module._buffers for module in model.modules())


def report(model: nn.Module, cfg: ExperimentConfig) -> list[str]:
    """Lines for the log of a training, for the processes that there are."""
    layers, world = len(processes.synchronised(model)), distributed.world_size()
    if world == 1:
        return ["one process: norm.sync changes nothing"] if layers else []
    found = step(model, cfg, world)
    lines = [f"traffic of a step and process: gradients {_mib(found.gradients)}, buffers {_mib(found.buffers)}"]
    if layers:
        lines.append(
            f"norm.sync: statistics of {layers} layers, at most {_mib(found.statistics)} a step and process in "
            f"{found.calls:.0f} sums"
        )
    return lines


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"

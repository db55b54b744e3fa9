"""Processes started by torchrun, and the few collective operations that are used.

Everything works without torchrun too: one process, rank 0 of 1.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from engine.errors import UserError
from engine.presence import Presence
from engine.signals import StopRequest

_presence: Presence | None = None
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def setup(device: str = "auto", timeout_minutes: float = 30.0) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this process's device.

    `device` is auto, cpu or cuda. On GPUs rank i of a machine takes GPU i.

    Raises:
        UserError: the environment names some of torchrun's variables but not all, or nonsense; no GPU where one is
            asked for; more processes than GPUs; the others cannot be joined.
        LostProcess: some did not come in time; they are named.
    """
    global _presence
    ranks = _environment()
    local = ranks["LOCAL_RANK"] if ranks else 0
    chosen = _pick(device, local)
    if ranks and not dist.is_initialized():
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        try:
            _presence = Presence(host, int(port), ranks["RANK"], ranks["WORLD_SIZE"], 60 * timeout_minutes)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                store=_presence.group,
                rank=_presence.rank,
                world_size=_presence.world,
                timeout=timedelta(seconds=60 * timeout_minutes + _presence.grace),
                device_id=chosen if chosen.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            raise UserError(f"could not join the other processes at {host}:{port}: {error}") from None
    return chosen


def _environment() -> dict[str, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, checked; empty without torchrun."""
    given = [name for name in _VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(given):
        return {}
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}: start several processes with "
            "torchrun, which sets them all, or unset them for a single process"
        )
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ[name]
        if not text.isdigit():
            raise UserError(f"the environment variable {name} is {text!r}, expected a whole number")
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise UserError(f"the environment says RANK={values['RANK']} of WORLD_SIZE={values['WORLD_SIZE']} processes")
    return values


def _pick(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("runtime.device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; start at most "
            "that many processes (--nproc-per-node), or set runtime.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def is_joined() -> bool:
    """Whether this process has joined others, and not left them."""
    return dist.is_initialized()


def at(what: str) -> None:
    """Tell the other processes what this one is at, should they have to wait for it; see `engine.presence`."""
    if _presence is not None:
        _presence.at(what)


def _meet() -> None:
    """Each collective operation is a mark: who has not come to it is the one that the others wait for."""
    if _presence is not None:
        _presence.at()


def leave(reason: str) -> None:
    """Tell the others why this process takes part no longer; does nothing for a single one."""
    if _presence is not None:
        _presence.leave(reason)


def explained(error: RuntimeError) -> Exception:
    """`error`, or the clear one in its place if torch raised it since another process did not take part."""
    if _presence is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return error
    with StopRequest():  # torchrun ends the others at once when one has died, and gives them time to say why
        return _presence.explain(error)


def cleanup() -> None:
    """Leave the other processes; does nothing for a single one."""
    global _presence
    leave("has finished")
    _presence = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        _meet()
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, of the same shape and dtype; `tensor` is left as it is."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        _meet()
        dist.all_reduce(total)
    return total


def gather(value: Any) -> list[Any]:
    """A picklable value of every process, in the order of the ranks, on all of them."""
    values = [value] * world_size()
    if dist.is_initialized():
        _meet()
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers (running statistics) of rank 0."""
    if dist.is_initialized():
        _meet()
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

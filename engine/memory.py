"""How much memory a piece of work allocates: exact on a GPU, by torch's own events on a CPU; and whether the C library
keeps on a CPU what is freed."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Allocated(NamedTuple):
    """Bytes beyond what was allocated before."""

    peak: int
    """The most at any time."""
    left: int
    """What is still there afterwards; less than 0 if more was given back than taken."""


def allocated(call: Callable[[], Any], device: torch.device, taken: dict[int, int] | None = None) -> Allocated:
    """What tensors take while `call` runs, with the buffers that torch's operations allocate by its allocator.

    On a CPU libraries' own buffers, such as oneDNN's, are not seen, and what is given back only counts if it was taken
    in the call, or in a call before it that had the same `taken` (addresses and bytes, kept up to date). Garbage in
    cycles is not collected while `call` runs: whenever Python does that by itself would change the figures. What there
    was before is better collected before.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return _allocated(call, device, {} if taken is None else taken)
    finally:
        if collects:
            gc.enable()


def _allocated(call: Callable[[], Any], device: torch.device, taken: dict[int, int]) -> Allocated:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        peak, left = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return Allocated(peak - before, left - before)
    quiet_profiler()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = _flat(profile.profiler.kineto_results.experimental_event_tree())
    changes = [event for event in events if event.name == "[memory]"]
    total = highest = 0
    for change in sorted(changes, key=lambda event: event.start_time_ns):
        place, size = change.extra_fields.ptr, change.extra_fields.alloc_size
        if size > 0:
            taken[place] = size
            total += size
        else:  # by address: torch's own sizes are of whatever an earlier profile saw there
            total -= taken.pop(place, 0)
        highest = max(highest, total)
    return Allocated(highest, total)


def _flat(events: list[Any]) -> list[Any]:
    return [one for event in events for one in (event, *_flat(event.children))]


def quiet_profiler() -> None:
    """torch's profiler tells stderr of each start and stop, and of GPUs that are not there, unless the environment says
    otherwise."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees, for what it allocates next, instead of handing it to the system and
    taking it again, page by page, in every training step. It takes some memory more (docs/step_times.md).

    For the whole process and as long as it runs, as there is no way back. It stays as it is where another C library is
    used, or where the environment says when glibc hands memory back (MALLOC_TRIM_THRESHOLD_ and others, mallopt(3)).

    Returns:
        Whether glibc keeps it from now on.
    """
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
    told = any(name in os.environ for name in names) or "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    if told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    kept = mallopt(mmap, 2**30) or mallopt(mmap, 2**25)  # older versions take at most 32 MiB
    return bool(kept and mallopt(trim, 2**31 - 1))


def process_peak() -> int:
    """The most memory, in bytes, that this process has had in use (resident) so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_bytes(count: float) -> str:
    """In GiB, or MiB below a tenth of one."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 0.1 * 2**30 else f"{count / 2**20:.1f} MiB"

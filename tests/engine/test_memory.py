"""What is counted of a computation whose memory is known."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.memory import allocated, process_peak, show_bytes

CPU = torch.device("cpu")
FLOATS = 250_000  # 1 MB


def test_the_peak_and_what_is_left():
    held: list[torch.Tensor] = []

    def work() -> None:
        first = torch.zeros(2 * FLOATS)
        second = torch.zeros(FLOATS)
        del first
        held.append(second)
        torch.zeros(FLOATS)

    found = allocated(work, CPU)
    assert 3e6 <= found.peak < 3.01e6 and 1e6 <= found.left < 1.01e6


def test_what_is_given_back_counts_below_zero():
    held: list[torch.Tensor] = []
    taken: dict[int, int] = {}
    allocated(lambda: held.append(torch.zeros(FLOATS)), CPU, taken)
    found = allocated(lambda: held.clear(), CPU, taken)
    assert found.peak == 0 and -1.01e6 < found.left <= -1e6 and not taken


def test_what_was_taken_before_is_nothing_of_the_call():
    """Not even where an earlier measurement saw something else at its address."""
    held = [torch.zeros(FLOATS)]
    allocated(lambda: held.append(torch.zeros(FLOATS)), CPU)
    found = allocated(lambda: held.clear(), CPU)
    assert found == (0, 0)


def test_values_kept_for_the_backward_are_seen():
    x = torch.zeros(FLOATS, requires_grad=True)
    kept: list[torch.Tensor] = []
    taken: dict[int, int] = {}
    forward = allocated(lambda: kept.append((x.exp() * x.sin()).sum()), CPU, taken)
    assert 2e6 <= forward.left < 3.1e6  # exp keeps its result, the product both factors
    backward = allocated(lambda: kept.pop().backward(), CPU, taken)
    assert forward.left + backward.left < 1.1e6  # the gradient alone


def test_the_process_has_taken_some_memory():
    assert process_peak() > 50e6


FAULTS = """
import resource, torch
from engine.memory import keep_freed_memory
print(keep_freed_memory())
for _ in range(10):  # the first ones give the heap its size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1, 40, 100):  # MiB
        torch.ones(size * 2**18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    """What is handed back comes again with a page fault for each 4 KiB, or for each huge page."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC"))}
    found = []
    for more in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        command = [sys.executable, "-c", FAULTS]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=environment | more, capture_output=True, text=True, check=True
        )
        found.append(done.stdout.split())
    (kept, *_, with_it), (told, *_, without) = found
    assert (kept, told) == ("True", "False")
    assert int(without) > 10 and int(with_it) < 0.1 * int(without)


def test_sizes_in_words():
    assert [show_bytes(x) for x in (11 * 2**30, 2**29, 900 * 2**10, 0)] == [
        "11.00 GiB",
        "0.50 GiB",
        "0.9 MiB",
        "0.0 MiB",
    ]


def test_the_profiler_is_quiet():
    text = "import torch; from engine.memory import allocated; allocated(lambda: torch.ones(3), torch.device('cpu'))"
    environment = {key: value for key, value in os.environ.items() if key != "KINETO_LOG_LEVEL"}
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", text], cwd=root, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")

"""The programs in tools/, each in a process of its own, as a user starts them, but without the seconds in which Python
imports the libraries: the process is forked from a server that has them (`multiprocessing`'s forkserver)."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ["torch", "torchvision", "segmentation_models_pytorch", "albumentations", "matplotlib.pyplot"]


def preload() -> None:
    """Have the server import the libraries, once the first process is asked for. None of them starts a thread."""
    multiprocessing.set_forkserver_preload(LIBRARIES)


def run(
    name: str, *arguments: object, cwd: str | Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run tools/`name`.py; returns its status and what it printed. `env` adds to the environment.

    Raises:
        subprocess.TimeoutExpired: it was still running after `timeout` seconds, and was killed.
    """
    command = [str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, stream) for stream in ("out", "err")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(command, outputs, str(cwd), environment)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in outputs))


def _run(command: Sequence[str], outputs: Sequence[Path], cwd: str, environment: Mapping[str, str]) -> None:
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = list(command)
    sys.path[0] = str(Path(command[0]).parent)  # as Python itself does
    runpy.run_path(command[0], run_name="__main__")

from __future__ import annotations

from pathlib import Path

import pytest

from engine.processes import in_processes
from tests.engine.two_processes import everything


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes have left there, see `two_processes.py`."""
    folder = tmp_path_factory.mktemp("two")
    in_processes(everything, folder)
    return folder

"""Imports point down only: tools > seg and classify > engine > norm, and norm needs nothing but torch."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [{"norm"}, {"engine"}, {"seg", "classify"}, {"tools"}]  # rooms on one floor know nothing of each other
ROOMS = set().union(*FLOORS)
FILES = [path for room in sorted(ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT).parts[0]
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[:floor], {room})
    assert imported(path) & ROOMS <= below
    assert "tests" not in imported(path)


def test_norm_imports_torch_only():
    names = set().union(*(imported(path) for path in (ROOT / "norm").rglob("*.py")))
    assert names - set(sys.stdlib_module_names) == {"torch", "norm"}


def test_files_stay_small_and_functions_readable():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 480, f"{path} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 80, (
                    f"{path}: {node.name} is {node.end_lineno - node.lineno} lines"
                )

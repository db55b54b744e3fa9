"""Where the scores of a checkpoint lie, and what their file says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def scores_folder(checkpoint: Path, split: str) -> Path:
    """Beside the checkpoint, if nothing else is said; a split may be a folder of a folder."""
    return checkpoint.with_name(f"scores_{split.strip('/').replace('/', '_')}")


def written(json_file: Path, out: Path) -> str:
    """Where the scores and the pictures of an evaluation are: few look for a folder beside the checkpoint."""
    return f"scores: {json_file}, pictures: {out}"


def described(checkpoint: Path, split: str, overrides: Sequence[str], views: object = None) -> dict[str, Any]:
    """Whose scores a file holds: those of another evaluation beside the checkpoint take its place."""
    found = {"checkpoint": str(checkpoint), "split": split, "changes": list(overrides)}
    return {"of": {**found, "averaged_over": None if views is None else str(views)}}

"""A work directory belongs to one experiment: what may be resumed, and what is never overwritten."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import checkpoint, distributed
from engine.config import ExperimentConfig, Loaded
from engine.errors import UserError

LAST = "last.pt"
BEST = "best.pt"
CONFIG = "config.yaml"
FREE = (  # may differ when a run goes on ...
    "runtime.",
    "report.",
    "length",
    "data.root",
    "data.labels",
    "data.download",
    "data.check_files",
    "data.eval_batch_size",
)
BOUND = ("runtime.seed",)  # ... and among them those that decide which data comes next


def find_resume(work_dir: str | Path, resume: str | Path | None, config: ExperimentConfig) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None to start anew.

    `resume` is None (start anew), "auto" (the work directory's `last.pt`, if there is one), or the path of a checkpoint
    or of a folder that holds `last.pt`. The path comes back as the key `path`.

    Raises:
        UserError: the work directory holds a run and `resume` does not name it; no such checkpoint; it is of another
            configuration (the differing keys are listed).
    """
    folder = Path(work_dir)
    there = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    if resume is None:
        if there:
            raise UserError(
                f"{folder}: holds the checkpoints of a run ({there[0].name}{' ...' if len(there) > 1 else ''}); go on "
                "with --resume auto, or choose another --work-dir"
            )
        return None
    if str(resume) == "auto":
        path = folder / LAST
        if not path.exists():
            if there:
                raise UserError(
                    f"{folder}: holds {there[0].name} but no {LAST} to resume; name a checkpoint with --resume PATH, "
                    "or choose another --work-dir"
                )
            return None
    else:
        path = Path(resume) / LAST if Path(resume).is_dir() else Path(resume)
        if there and path.resolve().parent != folder.resolve():
            raise UserError(
                f"{folder}: holds the checkpoints of a run ({there[0].name}), and --resume names {path}, of another "
                "one; choose another --work-dir"
            )
    state = checkpoint.load(path)
    differing = differences(state["config"], config.model_dump(mode="json"))
    if differing:
        raise UserError(
            f"{path}: was trained with another configuration:\n  "
            + "\n  ".join(differing)
            + "\n  choose another --work-dir, or resume with the same configuration (length, runtime.* and report.* "
            "may differ)"
        )
    state["path"] = str(path)
    return state


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two resolved configurations differ, apart from those that may, as `key: was a, now b`."""
    flat_then, flat_now = _flat(then), _flat(now)
    lines = []
    for key in dict.fromkeys([*flat_then, *flat_now]):
        if key.startswith(FREE) and key not in BOUND:
            continue
        was, here = flat_then.get(key, "not set"), flat_now.get(key, "not set")
        if was != here:
            lines.append(f"{key}: was {was}, now {here}")
    return lines


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def open_work_dir(work_dir: str | Path, loaded: Loaded[Any], resume: str | Path | None) -> dict[str, Any] | None:
    """Make the work directory, write the resolved configuration into it, and return what `find_resume` finds.

    Raises:
        UserError: as `find_resume`; the directory cannot be made or written.
    """
    state = find_resume(work_dir, resume, loaded.config)
    if distributed.is_main():
        folder = Path(work_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{CONFIG}.tmp"
            temporary.write_text(loaded.text, encoding="utf-8")
            os.replace(temporary, folder / CONFIG)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write the work directory: {error.strerror}; choose another --work-dir, or check its "
                "permissions"
            ) from None
    distributed.barrier()
    return state

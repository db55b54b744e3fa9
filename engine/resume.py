"""A work directory belongs to one experiment: what may be resumed, and what is never overwritten."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine import checkpoint, distributed
from engine.config import ExperimentConfig, Loaded
from engine.errors import UserError
from engine.report import METRICS, read_metrics

LAST = "last.pt"
BEST = "best.pt"
CONFIG = "config.yaml"
LOCK = ".lock"
FREE = (  # may differ when a run goes on ...
    "runtime.",
    "report.",
    "recipes.",  # what they say is in norm and optim
    "length",
    "data.root",
    "data.labels",
    "data.download",
    "data.check_files",
    "data.eval_batch_size",
    "data.on_error",
)
BOUND = ("runtime.seed",)  # ... and among them those that decide which data comes next
ACCEPTED = ("optim.lr:", "optim.clip_norm:", "micro_batch:", "predict.")  # as `differences` tells them
"""What may differ when it is said so: another rate after a loss that was not finite, less memory, not another run."""
ENDED = (*BOUND, "runtime.amp", "runtime.matmul_precision")  # of a run that has ended: another result
_MEANING = "after the number of images come checksums: of the names, or of labels and pixels"


def find_resume(
    work_dir: str | Path, resume: str | Path | None, config: ExperimentConfig, accept: bool = False
) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None to start anew.

    `resume` is None (start anew), "auto" (the work directory's `last.pt`, if there is one), or the path of a checkpoint
    or of a folder that holds `last.pt`. The path comes back as the key `path`; with `accept` keys of `ACCEPTED` may
    differ, and come back as `changed`, as `differences` tells them.

    Raises:
        UserError: the work directory holds a run and `resume` does not name it, or the scores of one without
            checkpoints; no such checkpoint; it is of another configuration (the differing keys are listed).
    """
    folder = Path(work_dir)
    there = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    if not there and any(row.get("kind") == "eval" for row in read_metrics(folder / METRICS)):
        raise UserError(
            f"{folder}: holds the scores of a run ({METRICS}), which would be overwritten, and no checkpoint; "
            "choose another --work-dir, or move that file away"
        )
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
    differing = differences(complete(state["config"], type(config)), config.model_dump(mode="json"))
    others = [line for line in differing if not line.startswith(ACCEPTED)]
    if differing and (others or not accept):
        remedy = "resume with the same configuration" + ("" if others else ", or accept these with --accept-changes")
        raise UserError(
            f"{path}: was trained with another configuration:\n  "
            + "\n  ".join(differing)
            + f"\n  choose another --work-dir, or {remedy} (length, report.*, where the data are and runtime.* but for "
            "runtime.seed may differ)"
        )
    if path.resolve().parent == folder.resolve() and path.name != LAST:
        _check_latest(path, state["step"])
    state["path"], state["changed"] = str(path), differing
    return state


def starts_anew(work_dir: str | Path, resume: str | Path | None) -> bool:
    """Whether `find_resume` would find nothing to go on from: for what is looked at before the work directory is
    opened."""
    return resume is None or (str(resume) == "auto" and not (Path(work_dir) / LAST).exists())


def _check_latest(path: Path, step: int) -> None:
    """Raises UserError where a later checkpoint lies beside this one, which is of this step."""
    for other in (path.parent / BEST, path.parent / LAST):
        if other.name != path.name and other.exists() and (later := checkpoint.load(other)["step"]) > step:
            raise UserError(
                f"{path}: is of step {step}, and {other} of step {later}, which another training from there "
                "would overwrite; choose another --work-dir for it, or go on with --resume auto"
            )


def complete(stored: Mapping[str, Any], schema: type[ExperimentConfig]) -> Mapping[str, Any]:
    """A stored configuration with the defaults of the keys that came since; one that the schema does not take any more
    stays as it is."""
    try:
        return schema.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


def differences(then: Mapping[str, Any], now: Mapping[str, Any], bound: Sequence[str] = BOUND) -> list[str]:
    """The keys in which two resolved configurations differ, apart from those that may, but for the `bound` ones among
    them, as `key: was a, now b`."""
    flat_then, flat_now = _flat(then), _flat(now)
    lines = []
    for key in dict.fromkeys([*flat_then, *flat_now]):
        if key.startswith(FREE) and key not in bound:
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


def check_data(splits: Mapping[str, str], state: Mapping[str, Any] | None) -> None:
    """Whether all processes have the same images, and the checkpoint `state`, if there is one, was trained on them.

    Args:
        splits: "train" and "val", each with its `engine.loading.digest`, to which more may be added after a comma.
        state: what `find_resume` found; those of earlier versions do not say, or not what was added.

    Raises:
        UserError: they differ.
    """
    everywhere = distributed.gather(dict(splits))
    for name, here in splits.items():
        found = [each[name] for each in everywhere]
        if other := next((rank for rank, one in enumerate(found) if one != found[0]), 0):
            raise UserError(
                f"the processes have different images: of {name!r} process 0 has {found[0]}, process {other} "
                f"{found[other]} ({_MEANING}); complete the data on its machine"
            )
        then = here if state is None else state["meta"].get("data", {}).get(name, here)
        if state is not None and then != here and not here.startswith(f"{then}, "):
            raise UserError(
                f"{state['path']}: was trained with other images: of {name!r} it had {then}, now there are {here} "
                f"({_MEANING}); put them back as they were, or start anew in another "
                "--work-dir"
            )


def _check_alike(folder: Path, state: Mapping[str, Any] | None) -> None:
    """Raises UserError unless all processes go on from the same step: else some would spoil what the others know."""
    steps = distributed.gather(None if state is None else int(state["step"]))
    if other := next((rank for rank, step in enumerate(steps) if step != steps[0]), 0):
        told = ["no checkpoint" if step is None else f"one of step {step}" for step in (steps[0], steps[other])]
        raise UserError(
            f"{folder}: process 0 finds {told[0]} to go on from there, process {other} {told[1]}; give a --work-dir "
            "that all machines share, and look whether it is mounted on each"
        )


@contextmanager
def open_work_dir(
    work_dir: str | Path, loaded: Loaded[Any], resume: str | Path | None, accept: bool = False
) -> Iterator[dict[str, Any] | None]:
    """Make the work directory, write the resolved configuration into it, and yield what `find_resume` finds.

    The directory belongs to this run alone until the `with` block ends.

    Raises:
        UserError: as `find_resume`; another run works in it; it cannot be made or written; not all processes find the
            same checkpoint in it.
    """
    folder = Path(work_dir)
    with ExitStack() as held:
        if distributed.is_main():
            with _told(folder):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(_alone_in(folder))  # before its last.pt is read
        distributed.barrier()
        state = find_resume(folder, resume, loaded.config, accept)
        _check_alike(folder, state)
        if distributed.is_main():
            with _told(folder):
                temporary = folder / f".{CONFIG}.tmp"
                temporary.write_text(loaded.text, encoding="utf-8")
                os.replace(temporary, folder / CONFIG)
        distributed.barrier()
        yield state


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the work directory: {error.strerror}; choose another --work-dir, or check its "
            "permissions and free space"
        ) from None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds a lock that the system takes back when the process ends, however it ends.

    A POSIX lock, since it is not inherited: loader processes that outlive a killed run for a moment do not hold it.
    """
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, f"its file system gives no lock ({error.strerror})") from None
            file.seek(0)
            raise UserError(
                f"{folder}: another run works in this directory ({file.read().strip() or 'it has just started'}); wait "
                "for its end or stop it, or choose another --work-dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield

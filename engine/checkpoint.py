"""Checkpoints: complete, written atomically, safe to load (tensors and plain containers, never code)."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError, is_lost_worker

FORMAT = 1
KEYS = (
    "format",  # version of this list
    "task",  # name of the trainer
    "config",  # resolved configuration, plain dict
    "meta",  # the task's own facts (class names ...), plain dict
    "step",  # updates done
    "epoch",  # epoch in which the next step lies
    "step_in_epoch",  # position of the sampler: steps of that epoch already done
    "steps_per_epoch",
    "model",  # state dict
    "ema",  # state dict of the averaged network, or None
    "ema_updates",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",  # random states, a dict for each rank
    "score",  # the evaluated score of this very state, or None
    "best_score",  # or None
    "best_step",
)

TIMED = ".elapsed.seconds"
"""The only place that differs between two runs that are alike."""


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that `path` always holds either the old file or the whole new one.

    Raises:
        UserError: it cannot be written (permission, disk full ...); the old file is untouched.
    """
    write_atomically(Path(path), lambda temporary: torch.save(dict(state), temporary))


def export_weights(path: str | Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors, for other programs; tensors may share memory, then each gets its own copy.

    Raises:
        UserError: it cannot be written; the old file is untouched.
    """
    from safetensors.torch import save as serialized

    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state_dict.items()}
    # not by save_file, which makes a file that nobody else may read, whatever the umask says
    write_atomically(Path(path), lambda temporary: Path(temporary).write_bytes(serialized(tensors)))


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Call `write` with the name of a temporary file beside `path`, which then takes its place, whole or not at all.

    Raises:
        UserError: it cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed run left is overwritten by the next
    try:
        write(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself survives a power cut
        finally:
            os.close(folder)
    except Exception as error:  # torch and safetensors turn a full disk into errors of their own
        full = None if isinstance(error, OSError) else _why_not_more(temporary)
        with suppress(OSError):
            temporary.unlink()
        ours = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
        if not ours or is_lost_worker(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else full or first_line(error)
        raise UserError(
            f"{path}: cannot write: {reason}; check the permissions and the free space of {path.parent}"
        ) from error


def _why_not_more(path: Path) -> str | None:
    """What the system says to a few more bytes: `No space left on device`, a quota ...; None if it takes them."""
    try:
        with open(path, "ab", buffering=0) as file:
            file.write(bytes(1 << 16))
            file.write(bytes(1))  # the first of them may have been written in part
    except OSError as error:
        return error.strerror
    return None


def task(path: str | Path) -> str:
    """The task of a checkpoint, such as `seg`. Raises UserError as `load`."""
    return str(load(path)["task"])


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, without running any code that it may hold.

    Raises:
        UserError: missing, truncated, changed by a bit, not a checkpoint, of another format, or with code in it.
    """
    state = read(path, map_location)
    if not isinstance(state, dict) or "format" not in state:
        found = f"a {type(state).__name__}" + (
            f" with the keys {_some(list(state))}" if isinstance(state, dict) else ""
        )
        raise UserError(f"{path}: found {found}, expected a checkpoint written by tools/train.py")
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise UserError(
            f"{path}: a checkpoint of format {state['format']!r}, this version reads format {FORMAT}; load it with the "
            "version that wrote it"
        )
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise UserError(f"{path}: the checkpoint lacks {', '.join(missing)}; it was not written whole")
    _check_sums(Path(path))
    return state


def load_trained(path: str | Path, task: str) -> dict[str, Any]:
    """`load` a checkpoint of a task whose network is to be used.

    Raises:
        UserError: as `load`, of another task, or with a part of another kind than `save` was given.
    """
    state = load(path)
    if state["task"] != task:
        raise UserError(f"{path}: a checkpoint of the task {state['task']!r}, expected one of {task!r}")
    for key, kind in {"config": (dict,), "meta": (dict,), "model": (dict,), "ema": (dict, type(None))}.items():
        if not isinstance(state[key], kind):
            found, expected = type(state[key]).__name__, kind[0].__name__
            raise UserError(f"{path}: {key}: found a {found}, expected a {expected}; the checkpoint was tampered with")
    return state


def load_identified(path: str | Path, task: str) -> tuple[dict[str, Any], str]:
    """`load_trained`, and the SHA-256 of the very file that was read, though a training may replace it meanwhile.

    Raises:
        UserError: as `load_trained`, or the file is another one each time it is read.
    """
    after = _sha256(Path(path))
    for _ in range(3):
        state = load_trained(path, task)
        before, after = after, _sha256(Path(path))
        if before == after is not None:
            return state, after
    raise UserError(
        f"{path}: the checkpoint is replaced faster than it can be read; copy it, and give the copy to this program"
    )


def _sha256(path: Path) -> str | None:
    """None for what cannot be read, which `read` has an error for."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError:
        return None
    return found.hexdigest()


def _check_sums(path: Path) -> None:
    """Raises UserError unless the bytes are those that were written: torch does not look at the checksums in the file,
    and weights with a turned bit would be used without a word."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises whatever a wrong byte leads to: BadZipFile, NotImplementedError, ...
        raise UserError(f"{path}: the checkpoint is damaged: {first_line(error)}") from None
    if damaged is not None:
        raise UserError(
            f"{path}: the checkpoint is damaged: {damaged} in it is not what was written (wrong checksum); take "
            "another one, or copy it again"
        )


_AVERAGES, _WEIGHTS = ("ema", "state_dict_ema", "model_ema"), ("state_dict", "model")


def weights_in(state: Any) -> dict[str, Tensor] | None:
    """The tensors of anybody's checkpoint as `read` gives it; None if there is no dictionary of them.

    Where an average of the weights was kept beside them (ours, timm's, torchvision's scripts), the average: it is what
    was scored.
    """
    while isinstance(state, dict):
        inner = [state[key] for key in (*_AVERAGES, *_WEIGHTS) if isinstance(state.get(key), dict) and state[key]]
        if not inner:
            # torch's AveragedModel counts its updates among its tensors
            return {key: one for key, one in state.items() if isinstance(one, Tensor) and key != "n_averaged"}
        state = inner[0]
    return None


def read(path: str | Path, map_location: str | torch.device = "cpu") -> Any:
    """Read any file of tensors and plain containers (`torch.save`, or safetensors by its suffix), never code.

    Raises:
        UserError: missing, truncated, not such a file, or with code in it.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        folder = path if path.is_dir() else path.parent  # a run's, or a slip in the name
        there = [one for one in ("best.pt", "last.pt") if (folder / one).is_file()]
        hint = f"; {folder} has {' and '.join(there)}" if there else ""
        raise UserError(f"{path}: cannot read the checkpoint: {error.strerror}{hint}") from None
    if path.suffix == ".safetensors":
        return _read_safetensors(path, map_location)
    if not start:
        raise UserError(f"{path}: the file is empty (0 bytes), expected a checkpoint")
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: the checkpoint is truncated ({path.stat().st_size} bytes, its end is missing); take another one, "
            "or copy it again"
        )
    if path.suffix == ".pt2":
        raise UserError(
            f"{path}: an exported program (torch.export), expected a checkpoint such as the best.pt it is of"
        )
    if start != b"PK\x03\x04" and start[:1] != b"\x80":
        raise UserError(f"{path}: not a checkpoint (its first bytes are {start!r})")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # such a file is an error below
            # torchvision's and timm's programs keep their arguments beside the weights; setting its fields runs nothing
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None and not _is_pickle(path):
            reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
            raise UserError(
                f"{path}: the checkpoint is damaged: {reason[1] if reason else first_line(error)}"
            ) from None
        held = f"refers to the code {name[1]}" if name else "is a bare pickle"
        raise UserError(
            f"{path}: refused, because the file {held} and loading it could run anything; expected tensors and plain "
            "containers only"
        ) from None
    except Exception as error:  # torch's unpickler raises whatever a wrong byte leads to: IndexError, TypeError, ...
        raise UserError(f"{path}: the checkpoint is damaged: {first_line(error)}") from None


def _is_pickle(path: Path) -> bool:
    """Whether the file is a pickle from its first byte; looks at the instructions and carries out none."""
    try:
        with open(path, "rb") as file:
            return any(instruction.name == "STOP" for instruction, _, _ in pickletools.genops(file))
    except Exception:  # genops raises whatever a wrong byte leads to
        return False


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(map_location))
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Of its message; its class where there is none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def load_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path, *, remedy: str | None = None
) -> None:
    """Load weights into `model`; every layer must match. `path` is only named in errors, which end with `remedy`, by
    default with the keys of the config that describe a whole network.

    Batch norm's `num_batches_tracked` may be missing, as in files that are older than it; the model's own stays.

    Raises:
        UserError: layers differ; lists their shapes here and on disk, what is missing and what is unexpected. The model
            is left as it was.
    """
    here = model.state_dict()
    for name, tensor in state_dict.items():
        _check_weight(name, tensor, here.get(name), path)
    shapes = {
        name: (tuple(here[name].shape), tuple(tensor.shape))
        for name, tensor in state_dict.items()
        if name in here and here[name].shape != tensor.shape
    }
    state_dict = {**{name: here[name] for name in here if name.endswith("num_batches_tracked")}, **state_dict}
    missing = [name for name in here if name not in state_dict]
    unexpected = [name for name in state_dict if name not in here]
    if not (shapes or missing or unexpected):
        whole = OrderedDict(state_dict)
        # the layers' versions, which a file may be without: torchvision's MNASNet refuses weights of none
        vars(whole)["_metadata"] = vars(here).get("_metadata")
        model.load_state_dict(whole)
        return
    lines = [f"{path}: these weights are of another network than {type(model).__name__}"]
    lines += _listing("of another shape", [f"{name}: here {a}, in the file {b}" for name, (a, b) in shapes.items()])
    lines += _listing("missing in the file", missing)
    lines += _listing("unexpected in the file", unexpected)
    lines.append(f"  {remedy or _hint(list(here), shapes, missing, unexpected)}")
    raise UserError("\n".join(lines))


def _check_weight(name: Any, tensor: Any, here: Tensor | None, path: str | Path) -> None:
    """Raises UserError for what torch would refuse in words of its own, or take with a loss (complex numbers)."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        found = f"a {type(tensor).__name__}" if isinstance(name, str) else f"the name {name!r}"
        raise UserError(f"{path}: {name}: found {found} among the weights, expected tensors by name")
    if tensor.layout != torch.strided:
        raise UserError(f"{path}: {name}: found a tensor of layout {tensor.layout}, expected a dense one")
    if here is not None and (tensor.is_floating_point(), tensor.is_complex()) != (here.is_floating_point(), False):
        raise UserError(f"{path}: {name}: found numbers of type {tensor.dtype}, expected {here.dtype}")


_Shape = tuple[int, ...]
_WHITENING = ("running_mean", "running_deconv", "running_scale", "inner", "shape", "basis", "tilted", "last")
_STATISTICS = tuple(f".{name}" for name in _WHITENING)


def _hint(
    here: list[str], shapes: Mapping[str, tuple[_Shape, _Shape]], missing: list[str], unexpected: list[str]
) -> str:
    if list(shapes) == here[:1] and not missing and not unexpected:
        a, b = shapes[here[0]]
        if len(a) == len(b) == 4 and a[0] == b[0] and a[2:] == b[2:]:
            return f"the first layer takes images of {a[1]} channels here, of {b[1]} in the file: check the data set"
    if shapes and not missing and not unexpected and all(name.endswith(_STATISTICS) for name in shapes):
        return "only the whitening differs: check norm.block, norm.grouping and norm.overrides"
    if shapes and not missing and not unexpected and all(name in here[-len(here) // 4 :] for name in shapes):
        return "only the last layers differ: probably another number of classes"
    layers = {name.rpartition(".")[0] for name in missing} & {name.rpartition(".")[0] for name in unexpected}
    statistics = ("running_mean", "running_var", "running_deconv", "num_batches_tracked")
    if layers or any(name.endswith(statistics) for name in [*missing, *unexpected]):
        return "whole layers are of another kind: check norm.name and its options, then model.name"
    return "check model.name and its options"


def _listing(title: str, names: list[str], most: int = 10) -> list[str]:
    if not names:
        return []
    more = [f"    ... and {len(names) - most} more"] if len(names) > most else []
    return [f"  {len(names)} {title}:", *(f"    {name}" for name in names[:most]), *more]


def _some(names: list[Any], most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (" ..." if len(names) > most else "")


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """The places (".model.conv.weight") where two checkpoints, or parts of them, are not bit for bit equal, apart from
    what was measured with a clock."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [one for key in a for one in differing(a[key], b[key], f"{path}.{key}") if one.split("[")[0] != TIMED]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [one for i, (x, y) in enumerate(zip(a, b, strict=True)) for one in differing(x, y, f"{path}[{i}]")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if type(a) is type(b) and a == b else [path]

"""Checkpoints: damaged files, other contents, and files that try to run code. Each is used to label one image."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import nn

from engine import checkpoint
from engine.images import write_png
from seg.fuzz.case import Call, Ran, Wrong, damaged, pick, texture
from seg.fuzz.ground import Ground
from seg.labels import to_label_ids

State = dict[str, Any]
_VALUES: tuple[Any, ...] = (None, 0, -1, 2, 1.5, float("nan"), "", "seg", [], [1], {}, {"a": 1}, True, b"x", (1, 2))


def make(rng: Generator, folder: Path, count: int, ground: Ground) -> Call:
    """A changed checkpoint in whose folder a module lies that must not be imported."""
    image = texture(rng, 40, 56)
    write_png(folder / "in/image.png", image)
    (folder / "in/evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    path = folder / "in/best.pt"
    kind: Callable[[Generator, Path, Ground], tuple[str, bool]] = pick(
        rng, (_bytes, _bytes, _content, _content, _foreign)
    )
    what, same = kind(rng, path, ground)
    if path.with_suffix(".safetensors").exists():
        path = path.with_suffix(".safetensors")
    result = folder / "out/labels/image_labelIds.png"

    def check(ran: Ran) -> None:
        if ran.status == 1:
            if "image.png: The network's output is not finite" not in ran.out:
                raise Wrong(f"a problem that is none of the weights: {ran.out[-300:]}")
            return
        ids = np.asarray(Image.open(result))
        if ids.shape != (40, 56) or (same and not np.array_equal(ids, to_label_ids(ground.predictor.predict(image)))):
            raise Wrong("other labels than those of the weights that were written")

    arguments = [str(path), str(folder / "in/image.png"), "--out", str(folder / "out")]
    return Call("predict", arguments, what, check, names=("best.", "image.png"))


def _bytes(rng: Generator, path: Path, ground: Ground) -> tuple[str, bool]:
    """Damage anywhere, or at the end, where a zip file's directory is."""
    data = ground.weights.read_bytes()
    if rng.random() < 0.4:
        end, how = damaged(data[-30_000:], rng)
        data, how = data[:-30_000] + end, f"near the end: {how}"
    else:
        data, how = damaged(data, rng)
    path.write_bytes(data)
    return how, True


def _content(rng: Generator, path: Path, ground: Ground) -> tuple[str, bool]:
    """Sound files with other contents."""
    state = torch.load(ground.weights, weights_only=True)
    what = pick(rng, (_key, _key, _config, _config, _meta, _weights, _weights, _weights))(rng, state)
    torch.save(state, path)
    return what, False


def _key(rng: Generator, state: State) -> str:
    key, act = pick(rng, sorted(state)), pick(rng, ("gone", "other"))
    if act == "gone":
        del state[key]
        return f"{key} is gone"
    state[key] = pick(rng, _VALUES)
    return f"{key} is {state[key]!r}"


def _config(rng: Generator, state: State) -> str:
    config = state["config"]
    if rng.random() < 0.2:
        config["imports"] = ["evil"]
        return "imports a module"
    section = pick(rng, sorted(config))
    if isinstance(config[section], dict) and config[section] and rng.random() < 0.7:
        key = pick(rng, sorted(config[section]))
        config[section][key] = pick(rng, _VALUES)
        return f"config {section}.{key} is {config[section][key]!r}"
    config[section] = pick(rng, _VALUES)
    return f"config {section} is {config[section]!r}"


def _meta(rng: Generator, state: State) -> str:
    table = {"name": "x", "labels": [{"id": 0, "name": "a", "color": [1, 2, 3], "train_id": 0}]}
    state["meta"] = pick(
        rng,
        (
            {},
            {"classes": ["a"]},
            {"classes": 3},
            {"labels": table},
            {"labels": {**table, "labels": 3}},
            {"labels": {"name": "x"}},
            {"labels": [1, 2]},
            {"labels": None},
            {"labels": {"name": "../../x", "labels": [{"id": 999, "name": "a", "color": [1], "train_id": "b"}]}},
        ),
    )
    return f"meta is {state['meta']!r}"


def _weights(rng: Generator, state: State) -> str:
    model = state["model"]
    name = pick(rng, sorted(model))
    act = pick(rng, ("gone", "more", "shape", "type", "nan", "huge", "value", "empty", "ema", "sparse"))
    if act == "gone":
        del model[name]
    elif act == "ema":
        state["ema"] = pick(rng, (dict(list(model.items())[:3]), {}, [1], torch.zeros(2)))
    elif act == "more":
        model[pick(rng, ("extra.weight", "", "../x", "a" * 999, 7))] = torch.zeros(2)
    elif act == "value":
        model[name] = pick(rng, _VALUES)
    elif act == "empty":
        state["model"] = pick(rng, ({}, [], None, {"a": {}}))
    elif act == "sparse":
        model[name] = model[name].float().reshape(-1).to_sparse()
    else:
        change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "shape": lambda tensor: tensor.reshape(-1).repeat(2)[: tensor.numel() + 1],
            "type": lambda tensor: tensor.to(pick(rng, (torch.float16, torch.int32, torch.complex64, torch.bool))),
            "nan": lambda tensor: torch.full_like(tensor.float(), float("nan")),
            "huge": lambda tensor: tensor.float() * 1e38,
        }
        model[name] = change[act](model[name])
    return f"weights {name}: {act}"


class _Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, argument: Any) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> Any:
        return self.function, (self.argument,)


def _foreign(rng: Generator, path: Path, ground: Ground) -> tuple[str, bool]:
    """Files that other programs write, and those that run code when they are unpickled."""
    marker = str(path.parent.parent / "ran")
    code = pick(rng, (_Runs(os.system, f"touch {marker}"), _Runs(eval, f"open({marker!r}, 'w')")))
    name, act = pick(rng, _FOREIGN)
    act(path, code, ground)
    return name, False


def _with_code(path: Path, code: Any, ground: Ground) -> None:
    torch.save({**torch.load(ground.weights, weights_only=True), "meta": code}, path)


def _zip(path: Path, code: Any, ground: Ground) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(code))
        archive.writestr("archive/version", "3\n")


def _zip_out(path: Path, code: Any, ground: Ground) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("/tmp/escaped", "x")


def _script(path: Path, code: Any, ground: Ground) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


def _tensors(path: Path, code: Any, ground: Ground) -> None:
    from safetensors.torch import save_file

    state = torch.load(ground.weights, weights_only=True)["model"]
    save_file(state, path.with_suffix(".safetensors"))


def _bad_tensors(path: Path, code: Any, ground: Ground) -> None:
    path.with_suffix(".safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _old(path: Path, code: Any, ground: Ground) -> None:
    torch.save(torch.load(ground.weights, weights_only=True), path, _use_new_zipfile_serialization=False)


def _module(path: Path, code: Any, ground: Ground) -> None:
    torch.save(nn.Linear(2, 2), path)


def _twice(path: Path, code: Any, ground: Ground) -> None:
    file = io.BytesIO()
    pickle.dump(code, file)
    pickle.dump(code, file)
    path.write_bytes(file.getvalue())


_FOREIGN: list[tuple[str, Callable[[Path, Any, Ground], Any]]] = [
    ("a pickle that runs code", lambda path, code, ground: path.write_bytes(pickle.dumps(code))),
    ("a pickle of protocol 0", lambda path, code, ground: path.write_bytes(pickle.dumps(code, protocol=0))),
    ("two pickles", _twice),
    ("a checkpoint with code in it", _with_code),
    ("a zip of a pickle with code", _zip),
    ("a zip with names that lead out", _zip_out),
    ("TorchScript", _script),
    ("safetensors", _tensors),
    ("safetensors with a huge header", _bad_tensors),
    ("a checkpoint as torch wrote it before 1.6", _old),
    ("a pickled module", _module),
    ("a state dict", lambda path, code, ground: torch.save(nn.Linear(2, 2).state_dict(), path)),
    ("a list", lambda path, code, ground: torch.save([1, 2], path)),
    ("text", lambda path, code, ground: path.write_text("weights")),
    ("a folder", lambda path, code, ground: path.mkdir()),
    ("nothing", lambda path, code, ground: None),
    ("an empty file", lambda path, code, ground: path.touch()),
    ("format 99", lambda path, code, ground: torch.save({"format": 99}, path)),
    ("format [1]", lambda path, code, ground: torch.save({"format": [checkpoint.FORMAT]}, path)),
]

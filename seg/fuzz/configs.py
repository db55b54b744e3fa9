"""Configs and other YAML: other values, strange documents, documents that run code or fill memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from numpy.random import Generator

from seg.fuzz.case import Call, Ran, Wrong, damaged, pick
from seg.fuzz.ground import CONFIG, Ground

_VALUES = (
    *("0", "-1", "3", "1e400", "-0.5", "1e-4", ".nan", ".inf", "1" * 400, "1" * 5000, "0x1F", "0o17", "1_000", "1:30"),
    *(
        "true",
        "no",
        "null",
        "~",
        "''",
        "' '",
        "[]",
        "{}",
        "[1, [2, [3]]]",
        "{a: {b: c}}",
        "2026-01-01",
        "!!binary aGk=",
    ),
    *(
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!timestamp 2001-01-01",
        "&a [*a]",
        "*nowhere",
        "!unknown x",
        "'\\0'",
        "../..",
        "/",
    ),
    *("30 epochs", "2 steps", "[64, 64]", "deconv", "bn", "ohem", "auto", "[0.5]", "{name: bn}", "|\n  text", "a: b"),
    *("'\u202e\U0001f600'", "[16, 16]", "16", "nan", "cuda", "[1, 2, 3]", "folder", "inf steps", "-3 epochs"),
)


_MILD = {
    "lr: 0.01": ("lr: 1e-3", "lr: 3", "lr: 0.5", "lr: 1.0e-2"),
    "momentum: 0.9": ("momentum: 0", "momentum: 0.5", "nesterov: true"),
    "weight_decay: 1e-4": ("weight_decay: 0", "weight_decay: 5E-4"),
    "schedule: poly": ("schedule: cosine", "schedule: constant"),
    "name: cross_entropy": ("name: ohem", "name: focal", "name: dice"),
    "name: bn": ("name: gn", "name: deconv", "name: none", "name: frozen_bn"),
    "flip: 0.5": ("flip: 0", "flip: 1.0", "color_jitter: 0.3", "base_size: 64"),
    "crop: [64, 64]": ("crop: [32, 96]", "crop: [64,64]   # a remark", "crop:\n    - 64\n    - 32"),
    "seed: 1": ("seed: 0", "seed: 4294967295", "deterministic: true"),
    "length: 1 steps": ("length: 1 epochs", "length: '2 steps'"),
}
"""Other values that are right too."""


def make(rng: Generator, folder: Path, count: int, ground: Ground) -> Call:
    """A config that was changed, shown resolved; one in ten is trained with for a step."""
    path = folder / "in/config.yaml"
    trained = rng.random() < 0.1
    good = rng.random() < 0.2
    if good:
        data, what = _mild(rng)
    else:
        data, what = _value(CONFIG, rng, folder) if trained else changed_text(CONFIG, rng, folder)
    path.write_bytes(data)
    names = ("config.yaml", "override", "data.", "task: ", "/etc/passwd")
    if trained:
        work = folder / "out/run"
        small = ["length=1 steps", "batch_size=2", f"data.root={ground.data}", "model.name=lraspp_mobilenet_v3_large"]
        small += ["runtime.device=cpu", "runtime.workers=0", "data.crop=[64,64]", "data.eval_batch_size=1"]
        arguments = [str(path), *small, "--work-dir", str(work)]
        # errors of a run name keys of the config
        keys = tuple(f"{section}." for section in yaml.safe_load(CONFIG)) + ("batch_size", "micro_batch", "length")
        return Call("train", arguments, f"trained: {what}", lambda ran: _trained(work), names=names + keys, good=good)
    return Call("train", [str(path), "--show"], what, _shown, names=names, good=good)


def _shown(ran: Ran) -> None:
    """What is shown is YAML that says the same again."""
    found = yaml.safe_load(ran.out)
    if not isinstance(found, dict) or found.get("task") not in ("seg", "classify"):
        raise Wrong(f"not a resolved config: {ran.out[:200]!r}")


def _trained(work: Path) -> None:
    if not (work / "last.pt").is_file():
        raise Wrong("ended well without a checkpoint")


def _mild(rng: Generator) -> tuple[bytes, str]:
    text, changes = CONFIG, []
    for _ in range(int(rng.integers(1, 4))):
        old = pick(rng, sorted(_MILD))
        new = pick(rng, _MILD[old])
        text = text.replace(old, new)
        changes.append(new)
    return text.encode(), "; ".join(changes)


def changed_text(text: str, rng: Generator, folder: Path) -> tuple[bytes, str]:
    """A YAML text with one to three changes, as bytes, and what they are."""
    change: Callable[[str, Generator, Path], tuple[bytes, str]] = pick(
        rng, (_value, _value, _value, _lines, _raw, _odd)
    )
    return change(text, rng, folder)


def _value(text: str, rng: Generator, folder: Path) -> tuple[bytes, str]:
    """Some values are replaced."""
    lines, changes = text.splitlines(), []
    for _ in range(int(rng.integers(1, 3))):
        place = int(rng.integers(len(lines)))
        key, colon, _ = lines[place].rpartition(": ")
        value = pick(rng, _VALUES)
        lines[place] = f"{key}{colon}{value}" if colon else f"{lines[place]} {value}"
        changes.append(lines[place].strip()[:60])
    return "\n".join(lines).encode(), "; ".join(changes)


def _lines(text: str, rng: Generator, folder: Path) -> tuple[bytes, str]:
    """Lines are left out, doubled, moved in or out, or unknown keys."""
    lines = text.splitlines()
    place = int(rng.integers(len(lines)))
    new, what = pick(
        rng,
        (
            ([], "a line left out"),
            ([lines[place]] * 2, "a line twice"),
            (["  " + lines[place]], "moved in"),
            ([lines[place].strip()], "moved out"),
            (["\t" + lines[place]], "a tab"),
            ([lines[place], "  momentun: 3"], "an unknown key"),
            ([lines[place].replace(":", "")], "no colon"),
            ([lines[place].upper()], "capitals"),
            ([lines[place], "<<: [1, 2]"], "a merge of numbers"),
            ([lines[place], "? [a, b]", ": c"], "a list for a key"),
            ([lines[place], "---", "task: seg"], "two documents"),
        ),
    )
    lines[place : place + 1] = new
    return "\n".join(lines).encode(), f"line {place + 1}: {what}"


def _raw(text: str, rng: Generator, folder: Path) -> tuple[bytes, str]:
    return damaged(text.encode(), rng)


def _odd(text: str, rng: Generator, folder: Path) -> tuple[bytes, str]:
    """Whole documents."""
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w')"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    options: tuple[tuple[Any, str], ...] = (
        (f"{text}x: !!python/object/apply:os.system ['touch {marker}']\n", "os.system by a tag"),
        (f'{text}x: !!python/object/apply:builtins.eval ["{code}"]\n', "eval by a tag"),
        (f'!!python/object/new:exec ["{code}"]\n', "exec by a tag"),
        (f"{text}x: !!python/name:os.system ''\n", "a name by a tag"),
        (f"{text}{bomb}", "anchors that grow to 9^9"),
        (text + "optim: &o {<<: *o}\n", "a mapping merged into itself"),
        (f"{text}x: &x {{y: *x}}\n", "a mapping within itself"),
        ("[" * 20_000, "20000 brackets"),
        ("a: " * 3000 + "b", "keys within keys"),
        ("{a: " * 3000, "braces within braces"),
        (text.encode("utf-16"), "UTF-16"),
        (b"\xef\xbb\xbf" + text.encode(), "a byte order mark"),
        (text.encode() + b"x: \xff\xfe\n", "bytes that are no UTF-8"),
        (text.encode().replace(b"\n", b"\r\n"), "line ends of Windows"),
        (text.encode().replace(b"\n", b"\r"), "line ends of old Macs"),
        (b"\0" * 100, "zeros"),
        (b"", "nothing"),
        ("# only a comment\n", "a comment"),
        ("- 1\n- 2\n", "a list"),
        ("just words", "a word"),
        (f"base: config.yaml\n{text}", "its own base"),
        (f"base: /\n{text}", "a folder for a base"),
        (f"base: /etc/passwd\n{text}", "another file for a base"),
        (f"base: [a]\n{text}", "a list for a base"),
        (f"imports: [no_such_module]\n{text}", "a module that is not there"),
        (f"imports: ['../x', 3]\n{text}", "modules that are no names"),
        (f"{text}{'y' * 100_000}: 1\n", "a key of 100000 letters"),
        (f"? {'z' * 2000}\n: 1\n{text}", "a long complex key"),
        (f"%YAML 9.9\n---\n{text}", "YAML of another version"),
        (text.replace("task: seg", "task: classify"), "the other task"),
    )
    data, what = pick(rng, options)
    return data if isinstance(data, bytes) else data.encode(), what

"""What a case is, and how bytes are damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from seg.fuzz.ground import Ground


class Wrong(Exception):
    """A program ended well and its output is not right."""


@dataclass(frozen=True)
class Ran:
    """How a program ended: its exit status, and what it wrote to stdout and stderr."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Call:
    """One run of a program on input that lies in `in/` below the folder of the case; it may write below `out/` only."""

    program: str
    arguments: list[str]
    what: str
    """What the input is, for the report."""
    check: Callable[[Ran], None]
    """Raises Wrong if what came out of status 0 or 1 is not right."""
    names: tuple[str, ...] = ()
    """An error must hold one of these: the name of the bad file, or of the key."""
    count: int = 1
    """Cases that this call is."""
    good: bool = False
    """Whether the input is sound, so that refusing it is wrong."""
    refused: Callable[[Ran], int] = field(default=lambda ran: 0)
    """How many of the cases were refused by a call that ended with status 0 or 1."""


Maker = Callable[[Generator, Path, int, Ground], Call]
"""(draws, folder of the case, how many cases it may make, ground) -> the call; writes the input."""


def pick(rng: Generator, options: Any) -> Any:
    """One of a sequence, as it is (numpy's own choice would turn it into an array)."""
    return options[int(rng.integers(len(options)))]


def damaged(data: bytes, rng: Generator) -> tuple[bytes, str]:
    """The bytes after one to three random damages, and their names."""
    names = []
    for _ in range(int(rng.integers(1, 4))):
        name, change = pick(rng, _DAMAGES)
        data = change(data, rng) if data else b"\0"
        names.append(name)
    return data, ", ".join(names)


def _place(data: bytes, rng: Generator) -> int:
    """Half of the places lie in the first bytes, where headers are."""
    return int(rng.integers(min(len(data), 80) if rng.random() < 0.5 else len(data)))


def _bytes(data: bytes, rng: Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 12))):
        changed[_place(data, rng)] = int(rng.integers(256))
    return bytes(changed)


def _bit(data: bytes, rng: Generator) -> bytes:
    changed = bytearray(data)
    changed[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _number(data: bytes, rng: Generator) -> bytes:
    place = _place(data, rng)
    value = pick(rng, (0, 1, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 60_000))
    return data[:place] + struct.pack(pick(rng, ("<I", ">I")), value) + data[place + 4 :]


def _cut(data: bytes, rng: Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def _hole(data: bytes, rng: Generator) -> bytes:
    place = _place(data, rng)
    return data[:place] + data[place + int(rng.integers(1, 40)) :]


def _twice(data: bytes, rng: Generator) -> bytes:
    place = _place(data, rng)
    return data[: place + int(rng.integers(1, 40))] + data[place:]


def _inserted(data: bytes, rng: Generator) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.bytes(int(rng.integers(1, 40))) + data[place:]


def _zeros(data: bytes, rng: Generator) -> bytes:
    place = int(rng.integers(len(data)))
    length = min(len(data) - place, int(rng.integers(1, 400)))
    return data[:place] + bytes(length) + data[place + length :]


def _tail(data: bytes, rng: Generator) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 200)))


_DAMAGES: list[tuple[str, Callable[[bytes, Generator], bytes]]] = [
    ("bytes changed", _bytes),
    ("a bit turned", _bit),
    ("a number changed", _number),
    ("cut off", _cut),
    ("cut off", _cut),
    ("a hole", _hole),
    ("a part twice", _twice),
    ("bytes inserted", _inserted),
    ("zeros", _zeros),
    ("a tail", _tail),
]


def texture(rng: Generator, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image, RGB uint8 (height, width, 3): blocks of colours and some noise."""
    coarse = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
    blocks = np.kron(coarse, np.ones((9, 9, 1), np.uint8))[:height, :width]
    return blocks ^ rng.integers(0, 8, blocks.shape, dtype=np.uint8)

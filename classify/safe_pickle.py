"""Pickles of arrays and plain values, read without running what they say."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError


def load(path: Path) -> Any:
    """The value in a pickle of numpy arrays, containers, numbers and text; Python 2's strings become latin-1 text.

    Raises:
        UserError: the file can't be read, is damaged, or asks for any other class or function, which may be any code.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    try:
        return _Restricted(io.BytesIO(data), encoding="latin1").load()
    except _HasCode as error:
        raise UserError(
            f"{path}: has code: it asks for {error}, where arrays and plain values are all that a data file needs. It "
            "was not loaded; get the file from a source that you trust."
        ) from None
    except Exception as error:  # damaged bytes may end in almost any error
        found = f"damaged or not a pickle ({type(error).__name__}: {error})" if data else "empty (zero bytes)"
        raise UserError(f"{path}: {found}; delete it and get it anew.") from None


class _HasCode(Exception):
    pass


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in a pickle that Python 2 can read."""
    if encoding != "latin1":
        raise ValueError(f"bytes written as {encoding}")
    return text.encode("latin1")


_array: Any = np.empty(0).__reduce__()[0]
_scalar: Any = np.float64(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _HasCode(f"{module}.{name}")
        return _ALLOWED[module, name]

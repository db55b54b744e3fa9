"""The options of layers and recipes, looked at before anything is done with them. It does without torch, whose import
takes seconds, so that a config is read and shown at once."""

from __future__ import annotations

import math

FRESH_STEPS = 100
"""Weights change so fast at first that the shape of a few steps before amplifies what it should not: in VGG-16 at rate
0.1 the loss rose from 2.5 to 3.7 within ten steps (docs/experiments.md)."""


class NormError(ValueError):
    """A wrong option, an unknown name, or a model that a recipe cannot be applied to; the message says what to do."""


def check_options(block: int, n_iter: int, eps: float, momentum: float, sampling_stride: int = 1) -> None:
    """Raises NormError unless all are in range."""
    for name, value in (("block", block), ("n_iter", n_iter), ("sampling_stride", sampling_stride)):
        if value < 1:
            raise NormError(f"{name} is {value}; it must be at least 1")
    if n_iter > 30:
        raise NormError(f"n_iter is {n_iter}; it must be at most 30, beyond that float32 overflows")
    if not 0 < eps < math.inf:
        raise NormError(f"eps is {eps}; it must be greater than 0, else a covariance of few rows has no inverse root")
    if not 0 <= momentum <= 1:
        raise NormError(f"momentum is {momentum}; it must lie between 0 and 1")

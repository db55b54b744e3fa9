"""The formulas of the method, written plainly, that fast paths are checked against."""

import torch
from torch import Tensor


def inverse_root(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz steps as in the paper."""
    norm = matrix.square().sum().sqrt()
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    y, z = matrix / norm, eye
    for _ in range(steps):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return z / norm.sqrt()

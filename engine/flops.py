"""Multiplications and additions of matrix products and convolutions, counted as they are computed.

torch's counter counts a grouped convolution's weight gradient once for each pair of groups, of which only those on the
diagonal are computed, and does not know the products that are added to a tensor in place; here both are what they take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def count(call: Callable[[], Any]) -> int:
    """Those of a call, backward passes in it included; what compiled code computes is not seen."""
    aten = torch.ops.aten
    mapping = {aten.convolution_backward: _convolution_backward, aten.addmm_: _product, aten.baddbmm_: _product}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def _product(_added: Shape, a: Shape, b: Shape, *, out_shape: Shape, **_options: Any) -> int:
    """Of matrices (m, k) and (k, n), or batches of them."""
    return 2 * math.prod(a) * b[-1]


def _convolution_backward(
    grad: Shape,
    x: Shape,
    weight: Shape,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    *,
    out_shape: Any,
) -> int:
    """As many for the gradient of the input, and for that of the weight, as the forward has: each value of the output
    (transposed: of the input) meets one filter."""
    return (wanted[0] + wanted[1]) * 2 * math.prod(x if transposed else grad) * math.prod(weight[1:])

"""How much processes tell each other: collective operations counted as they are called."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OPERATIONS = {"c10d::allreduce_": "all_reduce", "c10d::broadcast_": "broadcast"}


class Counting(TorchDispatchMode):
    """Counts the sums and broadcasts of a `with` block, those of DistributedDataParallel and of the backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.size = 0
        """Bytes that were handed to them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _OPERATIONS:
            self.calls += 1
            self.size += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))

"""Network deconvolution for any PyTorch model, and the norms that it is compared with.

    report = norm.convert(model, "deconv")      # in place; print(report) says what was done
    norm.precise_statistics(model, batches)      # before an evaluation: running statistics averaged at fixed weights
    plain = norm.fold(model)                    # after training: a copy with plain convolutions

Read `whitening` (the mathematics), `layers`, `registry`, `recipes`, `plan`, `conversion`, `calibration`, `folding`,
`precise` in this order; `adapters`, `other_layers` and `matmul` are for looking things up.

What needs torch is imported when it is first asked for, by `__getattr__` below, since that takes seconds: names and
options of recipes are known, and a config is checked, without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from norm import recipes as _recipes  # registers the recipes that the toolkit brings
from norm.checks import NormError
from norm.registry import Place, Recipe, available, recipe, register

if TYPE_CHECKING:
    from norm.channel_deconv import ChannelDeconv
    from norm.conversion import Report, convert
    from norm.folding import fold
    from norm.layers import Delinear, FastDeconv
    from norm.precise import precise_statistics

__all__ = [
    "ChannelDeconv",
    "Delinear",
    "FastDeconv",
    "NormError",
    "Place",
    "Recipe",
    "Report",
    "available",
    "convert",
    "fold",
    "precise_statistics",
    "recipe",
    "register",
]

del _recipes

_WITH_TORCH = {
    "ChannelDeconv": "norm.channel_deconv",
    "Delinear": "norm.layers",
    "FastDeconv": "norm.layers",
    "Report": "norm.conversion",
    "convert": "norm.conversion",
    "fold": "norm.folding",
    "precise_statistics": "norm.precise",
}

if not TYPE_CHECKING:  # else a misspelt name would pass type checks

    def __getattr__(name: str) -> Any:
        if name not in _WITH_TORCH:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(_WITH_TORCH[name]), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

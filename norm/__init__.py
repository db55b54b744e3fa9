"""Network deconvolution for any PyTorch model, and the norms that it is compared with.

    report = norm.convert(model, "deconv")      # in place; print(report) says what was done
    norm.precise_statistics(model, batches)      # before an evaluation: running statistics averaged at fixed weights
    plain = norm.fold(model)                    # after training: a copy with plain convolutions

Read `whitening` (the mathematics), `layers`, `registry`, `recipes`, `plan`, `convert`, `calibration`, `fold`, `precise`
in this order; `adapters`, `other_layers` and `matmul` are for looking things up.
"""

from norm import recipes as _recipes  # registers the recipes that the toolkit brings
from norm.channel_deconv import ChannelDeconv
from norm.checks import NormError
from norm.convert import Report, convert
from norm.fold import fold
from norm.layers import Delinear, FastDeconv
from norm.precise import precise_statistics
from norm.registry import Place, Recipe, available, recipe, register

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

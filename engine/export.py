"""Trained networks for other programs: folded, so that nothing of the norm is left, and checked before they are kept.

A program (torch.export) is the whole network with the normalisation of its input; it runs without this toolkit's code,
in Python or compiled ahead of time. Weights alone are safetensors.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from engine import checkpoint
from engine.config import NormConfig
from engine.errors import UserError
from engine.prepare import for_prediction

TOLERANCE = 1e-3
"""Largest difference of a program's output from the trained network's, relative to the largest output."""
FACTS = "network.json"
"""What a program holds beside the network, under this name (`extra_files` of torch.export.load)."""

Logits = Callable[[nn.Module, Tensor], Tensor]


class Deployed(nn.Module):
    """Images (N, C, H, W), RGB or grey, float32 in [0, 1], scaled if asked and normalised -> what `logits` gives."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        logits: Logits,
        mean: Sequence[float],
        std: Sequence[float],
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.logits = logits
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        torch.ops.aten._assert_tensor_metadata(images, dtype=torch.float32)  # bytes would give other logits, silently
        if self.scale is not None:
            images = self.scale(images)
        return self.logits(self.network, (images - self.mean) / self.std)


@dataclass(frozen=True)
class Exported:
    """What was written; printed, a line."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path} ({self.path.stat().st_size / 2**20:.1f} MiB): {self.what}"


def export(
    network: nn.Module,
    path: Path,
    size: tuple[int, int],
    logits: Logits,
    mean: Sequence[float],
    std: Sequence[float],
    facts: Mapping[str, Any],
    scale: Callable[[Tensor], Tensor] | None = None,
    part: str = "",
    rebuilt: str = "",
) -> Exported:
    """Write a trained network, in evaluation mode and on the CPU, as `path` says: a program (.pt2) for any number of
    images of this height and width, or weights (.safetensors), for which the size does not matter. `part` names the
    module whose weights these are, where it is not the whole network; `rebuilt` makes the network that takes them
    (`rebuilding`), and is printed.

    Raises:
        UserError: another suffix, a size that the network does not take, a network that torch cannot export, one whose
            program computes something else, or a file that cannot be written.
    """
    if path.suffix not in (".pt2", ".safetensors"):
        raise UserError(f"--out {path}: expected a name that ends in .pt2 (a program) or .safetensors (weights)")
    folded = for_prediction(network, "--out")
    if path.suffix == ".safetensors":
        checkpoint.export_weights(path, folded.get_submodule(part).state_dict())
        return Exported(path, "the folded network's weights" + (rebuilt and f", for\n  {rebuilt}"))
    found = _program(Deployed(folded, logits, mean, std, scale).eval(), (len(mean), *size))
    buffer = io.BytesIO()
    torch.export.save(found, buffer, extra_files={FACTS: json.dumps({**facts, "input": _input(mean, size)})})
    deviation = _deviation(buffer, Deployed(network, logits, mean, std, scale).eval(), (len(mean), *size))
    if not deviation <= TOLERANCE:
        raise UserError(
            f"{path}: not written: the exported program's outputs differ from the network's by {deviation:.1e} of the "
            f"largest, expected at most {TOLERANCE:g}; deploy the weights (.safetensors) instead"
        )
    checkpoint.write_atomically(path, lambda temporary: Path(temporary).write_bytes(buffer.getvalue()))
    text = f"a program for N images of {size[0]}x{size[1]}; outputs differ from the network's by {deviation:.1e}"
    return Exported(path, text)


def rebuilding(call: str, section: NormConfig, images: Tensor, part: str = "") -> str:
    """Python, in a line, that makes the network which the weights fit: without it they may load all the same, where
    norms have another eps or layers another dilation, and the outputs be others.

    Args:
        call: makes the network with plain convolutions and batch norm.
        section: the norm that it was converted with.
        images: what a calibration may be shown, of which the layers depend and not their weights.
        part: as for `export`: the prefix of the names in `section.overrides`.
    """
    if section.name == "bn" and not section.overrides and not section.options:
        return f"network = {call}"
    words = [repr(section.name), *(f"{key}={value!r}" for key, value in section.options.items())]
    if section.overrides:  # their patterns are of names in the whole network
        inside = ("|".join(one.removeprefix(f"{part}.") for one in key.split("|")) for key in section.overrides)
        words.append(f"overrides={dict(zip(inside, section.overrides.values(), strict=True))!r}")
    if section.calibrate_batches:
        words.append(f"calibrate=torch.zeros{tuple(images.shape)}")
    return f"network = {call}; norm.convert(network, {', '.join(words)}); network = norm.fold(network.eval())"


def _input(mean: Sequence[float], size: tuple[int, int]) -> str:
    return f"{'RGB' if len(mean) == 3 else 'grey'}, float32 (N, {len(mean)}, {size[0]}, {size[1]}) in [0, 1]"


def _program(module: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    images = torch.rand(2, *shape)
    try:
        with torch.no_grad():
            module(images)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--size {shape[-2]} {shape[-1]}: the network cannot compute images of this size "
            f"({checkpoint.first_line(error)}); give another one"
        ) from error
    try:
        with torch.no_grad():
            return torch.export.export(module, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
    except Exception as error:  # whatever a network of a library does that torch cannot trace
        raise UserError(
            f"torch.export cannot take this network as a program ({checkpoint.first_line(error)}); export its weights "
            "(.safetensors) instead"
        ) from error


@torch.no_grad()
def _deviation(file: io.BytesIO, network: nn.Module, shape: tuple[int, ...]) -> float:
    """Of the program that the file gives back, from the network, on images of noise: one, and three."""
    file.seek(0)
    program = torch.export.load(file).module()
    found = []
    for count in (1, 3):
        images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))
        want = network(images)
        found.append((program(images) - want).abs().max() / want.abs().max().clamp_min(1e-30))
    return float(torch.stack(found).max())  # Python's max passes over a NaN

"""Mixed precision: what `runtime.amp` means, and whether a device has instructions for it."""

from __future__ import annotations

import torch

from engine.config import Amp

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# what torch.cpu.get_capabilities calls the instructions with which oneDNN multiplies in these types
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx_ne_convert", "fp16_arith"),
}


def dtype_of(amp: Amp) -> torch.dtype | None:
    """What autocast computes in; None where everything stays in float32."""
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on `device`, or a context that does nothing where it is None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def slow(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """A sentence for the user where `device` has no instructions for `dtype`, else None.

    torch computes in it all the same, on processors with AVX2 alone more than ten times as slowly as in float32.
    """
    if dtype is None:
        return None
    if device.type == "cuda":
        there = dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.9
        capabilities = torch.cpu.get_capabilities()
        there = any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])
    else:
        there = True  # nobody to ask
    if there:
        return None
    kind = "GPU" if device.type == "cuda" else "processor"
    return (
        f"runtime.amp={_NAMES[dtype]}: this {kind} has no instructions for {str(dtype).removeprefix('torch.')} and may "
        "take many times as long as with runtime.amp=none"
    )

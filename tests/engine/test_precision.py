from __future__ import annotations

import pytest
import torch

from engine import precision
from engine.prepare import prepare
from tests.engine.toy import config, small

CPU = torch.device("cpu")


def capabilities(monkeypatch: pytest.MonkeyPatch, **there: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False, **there}, False)


def test_autocast_computes_in_what_the_config_names() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    for amp, dtype in (("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with precision.autocast(CPU, precision.dtype_of(amp)):  # type: ignore[arg-type]
            assert layer(x).dtype == dtype


def test_a_processor_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities(monkeypatch)
    report = prepare(small(), config(runtime__amp="bf16")).report
    assert "runtime.amp=bf16: this processor has no instructions for bfloat16" in report
    assert "runtime.amp=none" in report
    assert "instructions" not in prepare(small(), config()).report
    assert "float16" in str(precision.slow(CPU, torch.float16))


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_with_them_is_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    capabilities(monkeypatch, **{name: True})
    assert precision.slow(CPU, torch.bfloat16) is None
    assert precision.slow(CPU, torch.float16) is not None


def test_a_torch_that_cannot_tell_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.slow(CPU, torch.bfloat16) is None


@pytest.mark.parametrize("native", [True, False])
def test_an_old_gpu_emulates_bfloat16(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert (precision.slow(torch.device("cuda"), torch.bfloat16) is None) == native
    assert precision.slow(torch.device("cuda"), torch.float16) is None

"""What is exported computes what the network does, or is not written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import norm
from engine import export as export_module
from engine.errors import UserError
from engine.export import export

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def plain(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def trained(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    )
    norm.convert(model, recipe)
    for _ in range(3):
        model(torch.randn(4, 3, 16, 16) + 1)
    return model.eval()


@pytest.mark.parametrize("recipe", ["bn", "deconv", "deconv_fast"])
def test_a_program_computes_what_the_network_does(recipe: str, tmp_path: Path) -> None:
    model = trained(recipe)
    done = export(model, tmp_path / "x.pt2", (16, 24), plain, MEAN, STD, {"classes": ["a", "b"]})
    facts = {"network.json": ""}
    program = torch.export.load(tmp_path / "x.pt2", extra_files=facts).module()
    x = torch.rand(5, 3, 16, 24)
    want = model((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    torch.testing.assert_close(program(x), want)
    assert json.loads(facts["network.json"]) == {
        "classes": ["a", "b"],
        "input": "RGB, float32 (N, 3, 16, 24) in [0, 1]",
    }
    assert str(done).startswith(f"{tmp_path / 'x.pt2'} (") and "N images of 16x24" in str(done)
    assert isinstance(model[0], norm.FastDeconv) == (recipe != "bn"), "the network itself stays"


def test_weights_fit_the_network_without_norms(tmp_path: Path) -> None:
    model = trained("deconv")
    export(model, tmp_path / "x.safetensors", (16, 16), plain, MEAN, STD, {})
    other = trained("none")
    other.load_state_dict(load_file(tmp_path / "x.safetensors"))
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(other(x), model(x))


def test_bytes_are_refused_by_a_program(tmp_path: Path) -> None:
    export(trained("deconv"), tmp_path / "x.pt2", (16, 16), plain, MEAN, STD, {})
    program = torch.export.load(tmp_path / "x.pt2")
    for run in (program.module(), program.run_decompositions().module()):
        with pytest.raises(RuntimeError, match="dtype mismatch"):
            run(torch.ones(1, 3, 16, 16, dtype=torch.uint8))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_exported_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch.export cannot take this network as a program .*safetensors"):
        export(Branching().eval(), tmp_path / "x.pt2", (8, 8), plain, MEAN, STD, {})
    with pytest.raises(UserError, match=r"x.onnx: expected a name that ends in .pt2 .* or .safetensors"):
        export(Branching().eval(), tmp_path / "x.onnx", (8, 8), plain, MEAN, STD, {})
    with pytest.raises(UserError, match="nowhere/x.pt2: cannot write: No such file"):
        export(trained("bn"), tmp_path / "nowhere/x.pt2", (8, 8), plain, MEAN, STD, {})
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_too_small_is_told_as_such(tmp_path: Path) -> None:
    small = nn.Sequential(nn.MaxPool2d(9)).eval()
    with pytest.raises(UserError, match="--size 8 8: the network cannot compute images of this size .*give another"):
        export(small, tmp_path / "x.pt2", (8, 8), plain, MEAN, STD, {})
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = trained("deconv")
    with torch.no_grad():
        other[3].bias.add_(1)
    monkeypatch.setattr(export_module, "for_prediction", lambda model, path: other)
    with pytest.raises(UserError, match="x.pt2: not written: the exported program's outputs differ .* by [1-9]"):
        export(trained("deconv"), tmp_path / "x.pt2", (8, 8), plain, MEAN, STD, {})
    assert not list(tmp_path.iterdir())


class Overflows(nn.Module):
    """Infinity times zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x.mean((2, 3)) + 1000) * 0


def test_outputs_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x.pt2: not written: the exported program's outputs differ .* by nan"):
        export(Overflows().eval(), tmp_path / "x.pt2", (8, 8), plain, MEAN, STD, {})
    assert not list(tmp_path.iterdir())

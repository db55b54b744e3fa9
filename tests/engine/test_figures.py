"""Pictures of whitening: what is drawn is what the layer computes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from engine import figures
from engine.errors import UserError
from norm import FastDeconv


def smooth(channels: int, size: int = 16, count: int = 24) -> Tensor:
    """Images whose neighbouring pixels and channels are alike."""
    noise = torch.randn(count, channels, size + 4, size + 4, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(noise, 5, 1)
    return 4 * blurred + 2 * blurred.mean(1, keepdim=True) + 1


def trained(channels: int = 3, kernel: int = 3, **options: object) -> tuple[FastDeconv, Tensor]:
    """A layer in eval mode whose running averages are those of the returned images."""
    torch.manual_seed(0)
    layer = FastDeconv(channels, 6, kernel, padding=kernel // 2, momentum=1.0, **options)  # type: ignore[arg-type]
    x = smooth(channels)
    layer(x)
    return layer.eval(), x


@pytest.mark.parametrize("groups", [1, 3])
def test_the_whitened_patches_are_what_the_weights_see(groups: int):
    layer, x = trained(groups=groups, sampling_stride=1)
    before, after = figures.whitened(layer, x)
    out = 6 // groups
    by_hand = layer.weight[:out].flatten(1).double() @ torch.from_numpy(after) + layer.bias[:out, None].double()
    expected = layer(x)[:, :out].transpose(0, 1).flatten(1)  # patches come image by image
    torch.testing.assert_close(by_hand.float(), expected, atol=1e-3, rtol=1e-3)
    assert before.shape == after.shape == (27 // groups, len(x) * 16 * 16)


def test_whitening_whitens():
    layer, x = trained(n_iter=15, sampling_stride=1)
    before, after = figures.whitened(layer, x)
    assert np.abs(np.cov(after, bias=True) - np.eye(27)).max() < 0.02 < np.abs(np.cov(before, bias=True)).max()
    assert np.abs(after.mean(1)).max() < 1e-2


def test_the_picture_of_whitening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, data, **_: kept.append(self) or data.write(b"x"))
    layer, x = trained(n_iter=15, sampling_stride=1)
    figures.draw_whitening(layer, "stem", x, tmp_path / "w.png", "24 images")
    assert "stem (3x3, 3 to 6 channels, block 3): 6,144 patches of 27 values, 24 images" in kept[0].get_suptitle()
    by_title = {axes.get_title().partition(":")[0]: axes for axes in kept[0].axes}
    first, second = (by_title[f"Correlation {name}"].images[0] for name in ("before", "after"))
    assert first.get_clim() == second.get_clim() == (-1, 1) and first.cmap.name == second.cmap.name
    assert first.get_array()[0, 1] > 0.5 > 0.02 > abs(second.get_array()[0, 1])
    before, after = (line.get_ydata() for line in by_title["Eigenvalues of the covariance"].lines[:2])
    assert before[0] / before[-1] > 100 and after[0] / after[-1] < 1.1 and by_title["Values before"].patches


def test_a_feature_that_never_varies_is_masked(tmp_path: Path):
    """Its correlations are unknown, and nothing is divided by zero (a warning would fail the test)."""
    layer, x = FastDeconv(3, 6, 1, momentum=1.0), smooth(3)
    x[:, 1] = 2.5
    layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.draw_whitening(layer.eval(), "dead", x, tmp_path / "w.png")
    assert (tmp_path / "w.png").stat().st_size > 10_000


def test_a_single_feature_has_no_correlations(tmp_path: Path):
    layer, x = trained(kernel=1, block=1)
    figures.draw_whitening(layer, "one", x, tmp_path / "w.svg")
    assert "a single feature" in (tmp_path / "w.svg").read_text()


def test_kernels_are_center_surround(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, data, **_: kept.append(self) or data.write(b"x"))
    layer, _ = trained(kernel=5, n_iter=15)
    figures.draw_kernels(layer, "stem", tmp_path / "k.png")
    small = [
        axes for part in kept[0].subfigs for axes in part.axes if axes.images and axes.images[0].get_array().size == 25
    ]
    assert [axes.get_ylabel() for axes in small] == [
        f"whitened {c}" if j == 0 else "" for c in ("red", "green", "blue") for j in range(3)
    ]
    grids = [axes.images[0].get_array() for axes in small]
    deconv = layer.running_deconv
    assert np.allclose(grids[5], deconv[25 + 12, 50:].view(5, 5))  # what whitened green takes from blue
    for i in (0, 4, 8):
        assert grids[i][2, 2] == grids[i].max() > 0 > grids[i][2, 1]
    low, high = small[0].images[0].get_clim()
    assert low == -high == -max(np.abs(grid).max() for grid in grids)


@pytest.mark.parametrize(
    "options", [{"channels": 1}, {"channels": 64}, {"channels": 6, "groups": 6}, {"channels": 12, "block": 4}]
)
def test_kernels_of_other_inputs(tmp_path: Path, options: dict[str, int]):
    channels = options.pop("channels")
    layer = FastDeconv(channels, 12, 3, **options)  # type: ignore[arg-type]
    figures.draw_kernels(layer, "stem", tmp_path / "k.png")
    assert (tmp_path / "k.png").stat().st_size > 5_000


def test_interleaved_features_are_no_kernels(tmp_path: Path):
    with pytest.raises(UserError, match=r"stem: with norm.grouping=published and fewer channels in a block \(4\)"):
        figures.draw_kernels(FastDeconv(8, 8, 3, block=4, grouping="published"), "stem", tmp_path / "k.png")
    figures.draw_kernels(FastDeconv(3, 8, 3, grouping="published"), "stem", tmp_path / "k.png")


def network() -> nn.Sequential:
    return nn.Sequential(
        FastDeconv(3, 6, 3), nn.ReLU(), FastDeconv(6, 6, 1), FastDeconv(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)
    )


def test_layers_are_found_and_chosen():
    layers = figures.deconv_layers(network(), "x.pt")
    assert list(layers) == ["0", "2", "3"]
    assert figures.choose(layers, None) == "0" and figures.choose(layers, "3") == "3"
    assert figures.choose({"a": layers["2"], "b": layers["2"]}, None) == "b"
    with pytest.raises(UserError, match="--layer: no deconvolution layer '4'; there are: 0, 2, 3"):
        figures.choose(layers, "4")
    with pytest.raises(UserError, match="x.pt: the network has no deconvolution layer.*norm.name=deconv"):
        figures.deconv_layers(nn.Conv2d(3, 3, 1), "x.pt")


def test_the_input_of_a_layer_is_caught_once():
    model, x = network().eval(), smooth(3)

    def twice() -> None:
        model(x)
        model(2 * x)

    found = figures.caught(model[2], twice)
    assert torch.equal(found, model[:2](x)) and not found.requires_grad
    assert not model[2]._forward_pre_hooks
    with pytest.raises(UserError, match="does not use this layer"):
        figures.caught(model[2], lambda: None)

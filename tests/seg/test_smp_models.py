"""Networks of segmentation-models-pytorch: any input size, every norm, one image, and what cannot be had."""

import pytest
import torch

import norm
from engine.errors import UserError
from seg import models
from seg.config import ModelConfig


def build(name: str, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(ModelConfig(name=name, **more), 5, pretrained=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["unet", "fpn", "deeplabv3plus", "segformer", "manet", "linknet"])
@pytest.mark.parametrize("size", [(64, 96), (71, 83)])
def test_logits_have_the_size_of_the_input(architecture: str, size: tuple[int, int]):
    model = build(f"smp/{architecture}/resnet18").eval()
    with torch.no_grad():
        found = model(torch.randn(2, 3, *size))
    assert found["out"].shape == (2, 5, *size) and found["out"].isfinite().all()


def test_padding_leaves_what_fits_alone():
    """An image whose sides divide by the stride goes through the library's network as it is."""
    model = build("smp/unet/resnet18").eval()
    x = torch.randn(1, 3, 64, 96)
    inner = next(
        m for m in model.modules() if type(m).__module__.startswith("segmentation_models_pytorch.decoders.unet")
    )
    with torch.no_grad():
        torch.testing.assert_close(model(x)["out"], inner(x))


@pytest.mark.parametrize("recipe", ["bn", "deconv", "deconv_fast"])
def test_it_converts_trains_and_folds(recipe: str):
    model = build("smp/unet/resnet18")
    norm.convert(model, recipe)
    model(torch.randn(2, 3, 65, 97))["out"].square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(norm.fold(model)(x)["out"], model(x)["out"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["smp/nosuch/resnet18", "smp/unet/nosuch", "smp/unet"])
def test_unknown_names(name: str):
    with pytest.raises(UserError, match="model.name"):
        build(name)


def test_an_unknown_option_is_named():
    with pytest.raises(UserError, match="model.options"):
        build("smp/unet/resnet18", options={"nosuch": 1})

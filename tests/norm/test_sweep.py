"""Networks of three libraries by name: they convert, train a step and fold to the same.

Blocks of 16 and pictures of 64 x 64 keep the sweep short; what is tested does not depend on either.
"""

import copy

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import norm

TORCHVISION = """resnet18 resnext50_32x4d vgg11_bn densenet121 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large
efficientnet_b0 shufflenet_v2_x0_5 mnasnet0_5 regnet_x_400mf regnet_y_400mf googlenet squeezenet1_1 convnext_tiny
deeplabv3_resnet50 fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large""".split()  # noqa: SIM905
TIMM = """resnet18d resnetv2_18 legacy_seresnet18 ecaresnet26t skresnet18 resnest14d hrnet_w18_small dla46_c
ese_vovnet19b_dw cspresnet50 repvgg_a0 mobileone_s0 rexnet_100 ghostnet_100 mixnet_s tinynet_e lcnet_050 mobilenetv2_050
mobilenetv3_small_050 mobilenetv4_conv_small_050 tf_efficientnet_lite0 tf_mobilenetv3_small_minimal_100 fbnetc_100
spnasnet_100 hardcorenas_a regnetx_002 regnety_002 dpn48b selecsls42 mobilevit_xxs edgenext_xx_small repghostnet_050
fasternet_t0 nf_regnet_b0 convnext_atto starnet_s1 cpubone_b0_bfrobust""".split()  # noqa: SIM905
SMP = """Unet/resnet18 Unet/efficientnet-b0 Unet/tu-tf_efficientnet_lite0 Unet/timm-regnetx_002 Unet/mobileone_s0
UnetPlusPlus/mobilenet_v2 MAnet/timm-mobilenetv3_small_minimal_100 Linknet/resnet18 FPN/resnet18 PSPNet/resnet18
DeepLabV3/resnet18 DeepLabV3Plus/resnet18 DeepLabV3Plus/efficientnet-b0 DeepLabV3Plus/tu-tf_efficientnet_lite0
UPerNet/mobilenet_v2 Segformer/mit_b0""".split()  # noqa: SIM905
LARGE = """torchvision/convnext_tiny torchvision/fcn_resnet50 torchvision/resnext50_32x4d torchvision/vgg11_bn
timm/resnest14d timm/mixnet_s timm/cspresnet50 timm/dpn48b timm/starnet_s1 timm/mobileone_s0 timm/hrnet_w18_small
timm/selecsls42 timm/repvgg_a0 smp/Unet/mobileone_s0 smp/Unet/efficientnet-b0 smp/DeepLabV3/resnet18
smp/UPerNet/mobilenet_v2 smp/Unet/tu-tf_efficientnet_lite0""".split()  # noqa: SIM905
"""Those that take longest, run by hand."""
NAMES = [*(f"torchvision/{n}" for n in TORCHVISION), *(f"timm/{n}" for n in TIMM), *(f"smp/{n}" for n in SMP)]


def build(name: str) -> nn.Module:
    library, _, rest = name.partition("/")
    if library == "timm":
        return timm.create_model(rest, num_classes=7)
    if library == "smp":
        architecture, encoder = rest.split("/")
        return getattr(smp, architecture)(encoder, encoder_weights=None, classes=7)
    if rest == "vgg11_bn":  # without its 120 million weights of linear layers
        features = torchvision.models.vgg11_bn().features
        return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 7))
    options = {"init_weights": False} if rest == "googlenet" else {}
    segmentation = rest.startswith(("deeplab", "fcn", "lraspp"))
    extra = {"weights_backbone": None} if segmentation else {}
    return torchvision.models.get_model(rest, weights=None, num_classes=7, **options, **extra)


def logits(output: object) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not found:  # a named tuple of torchvision that is no container to torch
        found = [getattr(output, "logits"), getattr(output, "aux_logits1"), getattr(output, "aux_logits2")]  # noqa: B009
    return found


def test_the_sweep_is_broad():
    assert len(set(NAMES)) >= 60


@pytest.mark.parametrize(
    "name, recipe",
    [
        pytest.param(name, recipe, marks=[pytest.mark.slow] if name in LARGE else [])
        for name, recipe in [*((n, "deconv") for n in NAMES), *((n, "deconv_fast") for n in NAMES[::4])]
    ],
)
def test_converts_trains_and_folds(name, recipe):
    torch.manual_seed(0)
    model = build(name)
    report = norm.convert(model, recipe, block=16)
    assert any("FastDeconv" in row.new for row in report.changed)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())

    # The gradient of D holds back what few patches amplify; the cheap recipe, which lacks it, needs more of them.
    images = torch.randn(2 if recipe == "deconv" else 8, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = sum((out.logsumexp(1) - out[:, 0]).mean() for out in logits(model(images)))
    assert torch.isfinite(loss)
    loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert grads and not [key for key, grad in grads.items() if not torch.isfinite(grad).all()]
    optimizer.step()

    model.eval()
    plain = norm.fold(model)
    assert not [key for key, layer in plain.named_modules() if type(layer).__module__.startswith("norm")]
    careful = copy.deepcopy(model)  # an activation in place must not change what another layer reads
    for layer in careful.modules():
        if getattr(layer, "inplace", None) is True:
            layer.inplace = False
    with torch.no_grad():
        wants = logits(model(images))
        for other in (plain, careful):
            for got, want in zip(logits(other(images)), wants, strict=True):
                assert torch.isfinite(want).all()
                assert (got - want).abs().max() <= 1e-3 * want.abs().max()

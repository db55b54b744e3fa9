"""What has been published, to stand beside what is measured here.

Table 1 and Table 2: Ye et al., "Network Deconvolution", ICLR 2020 (arXiv 1905.11926). The reproduction's figures of
Table 2: "[Re] Network Deconvolution", 2024 (arXiv 2410.01189).
"""

from __future__ import annotations

SOURCE = 'Ye et al., "Network Deconvolution", ICLR 2020 (arXiv 1905.11926)'
REPRODUCTION = '"[Re] Network Deconvolution", 2024 (arXiv 2410.01189)'

NAMES = {
    "vgg11": "VGG-11",
    "vgg16": "VGG-16",
    "resnet18": "ResNet-18",
    "preact_resnet18": "Preact-18",
    "densenet121": "DenseNet-121",
    "resnext29_32x4d": "ResNeXt-29 (32x4d)",
    "mobilenet_v2": "MobileNetV2",
    "dpn92": "DPN-92",
    "pnasnet_a": "PNASNet-A",
    "senet18": "SENet-18",
    "efficientnet_b0": "EfficientNet-B0",
}
"""The paper's names of networks."""

_TABLE1 = {
    "vgg16": "14.12 74.18 90.07 93.25 93.58 94.56  2.01 37.94 63.22 71.97 72.75 75.32",
    "resnet18": "56.25 72.89 92.64 94.07 94.87 95.40 16.10 35.73 72.67 76.55 77.70 78.63",
    "preact_resnet18": "55.15 72.70 91.93 94.10 94.37 95.44 15.17 36.52 70.79 76.04 76.14 79.14",
    "densenet121": "59.56 76.63 93.25 94.89 94.71 95.88 17.90 42.91 74.79 77.63 77.99 80.69",
    "resnext29_32x4d": "52.14 69.22 93.12 94.05 95.15 95.80 17.98 30.93 74.26 77.35 78.60 80.34",
    "mobilenet_v2": "54.29 65.40 89.86 92.52 90.51 94.35 15.88 29.01 66.31 72.33 67.52 74.90",
    "dpn92": "34.00 53.02 92.87 93.74 95.14 95.82  8.84 21.89 74.87 76.12 78.87 80.38",
    "pnasnet_a": "21.81 64.19 75.85 81.97 81.22 84.45 10.49 36.52 44.60 55.65 54.52 59.44",
    "senet18": "57.63 67.21 92.37 94.11 94.57 95.38 16.60 32.22 71.10 75.79 76.41 78.63",
    "efficientnet_b0": "35.40 55.67 84.21 86.78 86.07 88.42 19.03 22.40 57.23 57.59 59.09 62.37",
}
"""Test accuracy in percent, batch norm and deconvolution in turn, of CIFAR-10 after 1, 20 and 100 epochs, then of
CIFAR-100."""

_TABLE2 = {
    "vgg11": {
        "plain": (69.02, 88.63),
        "bn": (70.38, 89.81),
        "deconv": (71.95, 90.49),
        "deconv, 2024": (71.95, 90.60),
    },
    "resnet18": {"bn": (69.76, 89.08), "deconv": (71.24, 90.14), "deconv, 2024": (71.58, 90.27)},
    "densenet121": {"bn": (74.65, 92.17), "deconv": (75.73, 92.75), "deconv, 2024": (75.67, 92.69)},
}
"""ImageNet after 90 epochs, top-1 and top-5 in percent."""

_COLUMNS = [(data, epochs) for data in ("cifar10", "cifar100") for epochs in (1, 20, 100)]


def networks(data: str) -> list[str]:
    """The networks that the paper trains on a data set, in its order; none on one that it does not use."""
    if data == "imagenet":
        return list(_TABLE2)
    return list(_TABLE1) if data in ("cifar10", "cifar100") else []


def figures(network: str, data: str, epochs: int) -> dict[str, tuple[float, ...]]:
    """The published accuracies in percent by column, (top-1,) or (top-1, top-5); empty where there are none."""
    if data == "imagenet":
        return {**_TABLE2[network]} if network in _TABLE2 and epochs == 90 else {}
    if network not in _TABLE1 or (data, epochs) not in _COLUMNS:
        return {}
    first = 2 * _COLUMNS.index((data, epochs))
    bn, deconv = (float(word) for word in _TABLE1[network].split()[first : first + 2])
    return {"bn": (bn,), "deconv": (deconv,)}

"""Corrupted images: noise, blur, weather and digital faults in five severities, drawn by albumentations.

The idea is that of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261) and of Kamann and Rother for segmentation
(CVPR 2020, arXiv 1908.05005); the parameters are this file's own, so scores compare among networks that were measured
here, not with those papers. `CORRUPTIONS` holds all of them. A corruption is a pure function of (image, name of the
image, corruption, severity); its draws (where drops fall, which way the camera moved) are the same in all severities.
Lengths in pixels are those for a shorter side of 512 and grow with the image; kernels and radii are whole, so that
neighbouring severities of a blur may be the same on small images (defocus from 426 lines down, motion blur from 227).
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError

Rgb = NDArray[np.uint8]

SEVERITIES = (1, 2, 3, 4, 5)
_REFERENCE_SIDE = 512
_SMALLEST_SIDE = 4
"""Pixels to which shorter sides are filled up meanwhile: there is no sixth of a pixel, and no room for rain."""


@dataclass(frozen=True)
class Corruption:
    """One transform of albumentations, its options by severity."""

    group: str
    """noise, blur, weather or digital."""
    transform: str
    """Its class in albumentations."""
    values: Mapping[str, tuple[Any, ...]]
    """Option -> its value for each severity; a number for an option that takes a range stands for that number only."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that are the same in all severities."""
    lengths: tuple[str, ...] = ()
    """Options that are lengths in pixels for a shorter side of 512."""


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        # standard deviation as a share of the full range
        "gaussian_noise": Corruption("noise", "GaussNoise", {"std_range": (0.04, 0.08, 0.12, 0.18, 0.26)}),
        # reciprocal of the photons of a white pixel
        "shot_noise": Corruption("noise", "ShotNoise", {"scale_range": (0.001, 0.003, 0.007, 0.015, 0.03)}),
        # a sensor at a high ISO: luminance noise and shifts of hue
        "iso_noise": Corruption(
            "noise",
            "ISONoise",
            {"intensity": (0.15, 0.25, 0.35, 0.5, 0.7), "color_shift": (0.02, 0.04, 0.06, 0.08, 0.1)},
        ),
        "gaussian_blur": Corruption(
            "blur", "GaussianBlur", {"sigma_limit": (1.0, 2.0, 3.0, 4.5, 6.0)}, {"blur_limit": 0}, ("sigma_limit",)
        ),
        # centred, since a shifted image would no longer lie on its label
        "motion_blur": Corruption(
            "blur",
            "MotionBlur",
            {"blur_limit": (5, 9, 15, 21, 31)},
            {"allow_shifted": False, "direction_range": (0.0, 0.0)},
            ("blur_limit",),
        ),
        "defocus": Corruption("blur", "Defocus", {"radius": (2, 3, 5, 7, 10)}, {"alias_blur": (0.1, 0.1)}, ("radius",)),
        "fog": Corruption("weather", "RandomFog", {"fog_coef_range": (0.2, 0.35, 0.5, 0.7, 0.9)}, {"alpha_coef": 0.12}),
        "rain": Corruption(
            "weather",
            "RandomRain",
            {
                "rain_type": ("drizzle", "default", "heavy", "heavy", "torrential"),
                "brightness_coefficient": (0.9, 0.8, 0.7, 0.6, 0.5),
                "blur_value": (3, 3, 3, 5, 5),
            },
            {"drop_width": 1},
            ("drop_width",),
        ),
        "snow": Corruption(
            "weather",
            "RandomSnow",
            {"snow_point_range": (0.1, 0.2, 0.3, 0.4, 0.55), "brightness_coeff": (1.4, 1.6, 1.9, 2.2, 2.5)},
            {"method": "bleach"},
        ),
        "jpeg": Corruption(
            "digital", "ImageCompression", {"quality_range": (40, 25, 15, 9, 5)}, {"compression_type": "jpeg"}
        ),
        # gamma in percent: an underexposed picture
        "dark": Corruption("digital", "RandomGamma", {"gamma_limit": (130, 160, 200, 250, 320)}),
        "low_contrast": Corruption(
            "digital",
            "RandomBrightnessContrast",
            {"contrast_limit": (-0.2, -0.4, -0.55, -0.7, -0.82), "brightness_limit": (0.08, 0.16, 0.22, 0.28, 0.33)},
        ),
        # resolution left of each side; no exact fraction such as a quarter, which may change less than the severity
        # before it: its blocks of whole pixels are given back in their place, others half a pixel off
        "pixelate": Corruption(
            "digital",
            "Downscale",
            {"scale_range": (0.64, 0.44, 0.34, 0.24, 0.17)},
            {"interpolation_pair": {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST}},
        ),
    }
)
"""All corruptions and their parameters."""


def corrupt(image: Rgb, corruption: str, severity: int, name: str, seed: int = 0) -> Rgb:
    """The image with one corruption.

    Args:
        image: RGB uint8 (H, W, 3); not changed.
        corruption: a key of `CORRUPTIONS`.
        severity: 1 (slight) to 5.
        name: of the image; fixes the draws together with corruption and `seed`.

    Returns:
        RGB uint8 (H, W, 3).

    Raises:
        UserError: an unknown corruption or severity.
    """
    check([corruption], [severity])
    # albumentations asks the network for a newer version when it is imported, unless this says no
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    spec = CORRUPTIONS[corruption]
    options = parameters(corruption, severity, min(image.shape[:2]))
    pipeline = A.Compose([getattr(A, spec.transform)(**options, p=1)])
    key = zlib.crc32(f"{name}/{corruption}".encode(errors="surrogatepass"))  # a file's name may be no text
    generator = np.random.default_rng([seed, key])
    pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    height, width = image.shape[:2]
    rows, columns = (max(0, _SMALLEST_SIDE - side) for side in (height, width))
    if rows or columns:
        image = cv2.copyMakeBorder(image, 0, rows, 0, columns, cv2.BORDER_REPLICATE).astype(np.uint8, copy=False)
    result: Rgb = pipeline(image=image)["image"]
    return np.ascontiguousarray(result[:height, :width])


def parameters(corruption: str, severity: int, shorter_side: int = _REFERENCE_SIDE) -> dict[str, Any]:
    """The options of albumentations' transform for an image with that shorter side."""
    spec = CORRUPTIONS[corruption]
    options = {**spec.fixed, **{option: values[severity - 1] for option, values in spec.values.items()}}
    for option in spec.lengths:
        options[option] = _scaled(options[option], shorter_side / _REFERENCE_SIDE, odd=option == "blur_limit")
    for option in spec.values:
        if option.endswith(("_range", "_limit", "_shift")) or option in ("intensity", "radius"):
            options[option] = (options[option], options[option])
    return options


def check(corruptions: Sequence[str], severities: Sequence[int] = SEVERITIES) -> None:
    """Raises UserError for a name or severity that there isn't."""
    unknown = [name for name in corruptions if name not in CORRUPTIONS]
    if unknown:
        raise UserError(f"corruption: unknown {unknown[0]!r}; known: {', '.join(CORRUPTIONS)}")
    strange = [severity for severity in severities if severity not in SEVERITIES]
    if strange:
        raise UserError(f"severity: found {strange[0]}, expected 1 (slight) to 5")


def table() -> list[list[str]]:
    """Rows group, corruption, transform and options by severity, as text."""
    rows = []
    for name, spec in CORRUPTIONS.items():
        options = [f"{option} {', '.join(map(str, values))}" for option, values in spec.values.items()]
        rows.append([spec.group, name, spec.transform, "; ".join(options)])
    return rows


def _scaled(length: float, factor: float, odd: bool) -> float:
    """A length for an image of another size; whole lengths stay whole, kernels odd and at least 3."""
    if isinstance(length, float):
        return max(0.3, length * factor)
    return max(3, 2 * round((length * factor - 1) / 2) + 1) if odd else max(1, round(length * factor))

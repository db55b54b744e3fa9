"""Paints a rendered street: colours, textures, light, and the camera's flaws."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from seg import sample_pen as draw
from seg.sample_scene import Scene

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# How strongly each material shows each noise field: fine grain, blotches, leaves, streaks, tiles, bricks.
TEXTURES = np.zeros((9, 6), np.float32)
TEXTURES[draw.SMOOTH] = (0.02, 0.03, 0, 0, 0, 0)
TEXTURES[draw.ASPHALT] = (0.08, 0.08, 0, 0, 0, 0)
TEXTURES[draw.PAVING] = (0.05, 0.05, 0, 0, 0.16, 0)
TEXTURES[draw.GRASS] = (0.06, 0.10, 0.06, 0.16, 0, 0)
TEXTURES[draw.LEAVES] = (0.06, 0.10, 0.34, 0, 0, 0)
TEXTURES[draw.PLASTER] = (0.03, 0.08, 0, 0.02, 0, 0)
TEXTURES[draw.BRICK] = (0.04, 0.06, 0, 0, 0, 0.10)
TEXTURES[draw.CLOTH] = (0.05, 0.06, 0, 0.05, 0, 0)
SHIFT = 4  # fractional bits of OpenCV's coordinates


def paint(scene: Scene, size: tuple[int, int], rng: Generator) -> Bytes:
    """The scene as an RGB picture (height, width, 3) uint8."""
    fine = 2 if size[1] <= 1024 else 1
    colours, materials = _fill(scene, size, fine)
    picture = cv2.resize(colours, (size[1], size[0]), interpolation=cv2.INTER_AREA).astype(np.float32)
    materials = np.ascontiguousarray(materials[::fine, ::fine])
    picture = np.where((materials == draw.SKY)[..., None], _sky(scene, size, rng), picture)
    picture *= _texture(scene, materials, rng)[..., None]
    return _develop(picture, rng)


def _fixed(poly: NDArray[np.float64], width: int) -> NDArray[np.int32]:
    """Image coordinates in fixed point; pixel centres are whole numbers."""
    pixels = np.clip(poly, -30, 30) * width - 0.5
    return np.round(pixels * (1 << SHIFT)).astype(np.int32)


def _fill(scene: Scene, size: tuple[int, int], fine: int) -> tuple[Bytes, Bytes]:
    """Polygons in flat colours, `fine` times enlarged, and the material of each pixel."""
    height, width = size[0] * fine, size[1] * fine
    colours, materials = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    line = cv2.LINE_AA if fine == 1 else cv2.LINE_8
    for layer in (scene.ground, scene.standing):
        for shape in layer:
            if shape.colour is None or not len(shape.polys):
                continue
            if isinstance(shape.polys, np.ndarray):
                polys = list(_fixed(shape.polys, width))
            else:
                polys = [_fixed(poly, width) for poly in shape.polys]
            cv2.fillPoly(colours, polys, shape.colour, line, SHIFT)
            cv2.fillPoly(materials, polys, (shape.material,), cv2.LINE_8, SHIFT)
        if layer is scene.ground and scene.shadows:
            colours = _shade(scene, colours, materials)
    return colours, materials


def _shade(scene: Scene, colours: Bytes, materials: Bytes) -> Bytes:
    """Darken the ground where something stands in the light."""
    height, width = materials.shape
    small = np.zeros((height // 2, width // 2), np.uint8)
    for poly in scene.shadows:
        cv2.fillPoly(small, [_fixed(poly, width // 2)], 255, cv2.LINE_8, SHIFT)
    small = cv2.GaussianBlur(small, (0, 0), max(0.6, width / 400))
    mask = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    mask[materials == draw.SKY] = 0
    factor = cv2.convertScaleAbs(mask, alpha=scene.shade - 1, beta=255)
    return np.asarray(cv2.multiply(colours, cv2.merge([factor] * 3), scale=1 / 255), np.uint8)


def _noise(rng: Generator, size: tuple[int, int], rows: int, columns: int) -> Floats:
    """Smooth noise around 0 from a grid of rows x columns cells."""
    grid = rng.standard_normal((rows, columns), np.float32)
    how = cv2.INTER_CUBIC if rows < size[0] else cv2.INTER_AREA
    return np.asarray(cv2.resize(grid, (size[1], size[0]), interpolation=how), np.float32)


def _sky(scene: Scene, size: tuple[int, int], rng: Generator) -> Floats:
    """A gradient with clouds (height, width, 3)."""
    rise = np.clip(np.arange(size[0]) / size[1] / scene.camera.horizon, 0, 1).astype(np.float32)[:, None, None]
    top, low = (np.array(colour, np.float32) for colour in scene.sky)
    field = _noise(rng, size, 5, 6) + 0.5 * _noise(rng, size, 10, 14) + 0.25 * _noise(rng, size, 22, 30)
    clouds = np.clip(field * 0.7 + scene.clouds - 0.6, 0, 1)[..., None] * 0.8
    light = np.array([244, 244, 246], np.float32) * (0.92 + 0.1 * (1 - rise))
    plain = top + (low - top) * rise
    return plain + (np.minimum(light, low * 1.15) - plain) * clouds


def _tiles(scene: Scene, size: tuple[int, int]) -> Floats:
    """Joints between paving slabs as the camera sees them: 0 on slabs, negative in joints; fades with distance."""
    camera, tiles = scene.camera, np.zeros(size, np.float32)
    first = int(camera.horizon * size[1]) + 2
    y, x = (axis.astype(np.float32) / size[1] for axis in np.ogrid[first : size[0], 0 : size[1]])
    z = camera.focal * camera.height / (y - camera.horizon)
    across = ((x - camera.centre) * z / camera.focal - camera.curve * z * z) / 0.9
    row, column = np.floor(z / 0.9), np.floor(across)
    joint = (np.abs(across - column - 0.5) > 0.45) | (np.abs(z / 0.9 - row - 0.5) > 0.45)
    shade = ((column * 3 + row * 7) % 5) * 0.06 - 0.12
    tiles[first:] = np.where(joint, np.float32(-1), shade) * np.clip(1.3 - z / 25, 0, 1)
    return tiles


def _bricks(size: tuple[int, int]) -> Floats:
    """Courses of stones in the picture's plane."""
    y, x = (axis.astype(np.float32) / size[1] for axis in np.ogrid[0 : size[0], 0 : size[1]])
    row = np.floor(y * 110)
    ends = [(x * 60 + shift) % 1 < 0.14 for shift in (0.0, 0.5)]
    joint = (y * 110 - row < 0.3) | np.where(row % 2 == 0, *ends)
    return np.where(joint, np.float32(-0.9), np.float32(0.4))


def _texture(scene: Scene, materials: Bytes, rng: Generator) -> Floats:
    """The factor by which each pixel's material makes it lighter or darker."""
    size = materials.shape[:2]
    base = (size[0] * 512 // size[1], 512)
    fields = (
        _noise(rng, size, *base), _noise(rng, size, base[0] // 20, 26), _leaves(rng, size, base),
        _noise(rng, size, base[0] // 5, 400), _tiles(scene, size), _bricks(size),
    )  # fmt: skip
    factor = np.ones(size, np.float32)
    for column, noise in enumerate(fields):
        factor += TEXTURES[:, column][materials] * noise
    return np.clip(factor, 0.25, 1.8)


def _leaves(rng: Generator, size: tuple[int, int], base: tuple[int, int]) -> Floats:
    return 0.7 * _noise(rng, size, base[0] // 3, base[1] // 3) + 0.6 * _noise(rng, size, base[0] // 8, base[1] // 8)


def _develop(picture: Floats, rng: Generator) -> Bytes:
    """What the camera adds: white balance, exposure, vignette, blur, noise."""
    height, width = picture.shape[:2]
    balance = np.exp(rng.normal(0, 0.045, 3)).astype(np.float32)
    gain, contrast, vivid = (float(rng.uniform(*span)) for span in ((0.95, 1.4), (0.85, 1.2), (0.9, 1.4)))
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette: Floats = (1 - 0.12 * (x * x + y * y)).astype(np.float32)
    grey = np.full((3, 3), 1 / 3)
    mix = (grey + (np.eye(3) - grey) * vivid) * contrast
    lens = np.hstack([mix, np.full((3, 1), 110 * (1 - contrast))]) * (balance * gain)[:, None]
    sensed = cv2.GaussianBlur(
        cv2.transform(picture, lens), (0, 0), float(rng.uniform(0.25, 0.6)) * max(1, width / 1024)
    )
    picture = np.asarray(sensed, np.float32) * vignette[..., None]
    picture += rng.standard_normal((height, width, 1), np.float32) * float(rng.uniform(2, 6))
    return np.clip(picture, 0, 255).astype(np.uint8)

"""How the sample renderer draws: camera, colours, polygons.

A `Pen` turns metres into polygons. World axes: x to the right, y up from the street, z ahead, all in metres from the
camera's foot. Image coordinates are in units of the image's width, so that a scene has no pixel size.
Whatever belongs to one object is drawn as parts; its label is the outline of their union, one polygon an instance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]
Colour = tuple[float, float, float]  # RGB, 0 to 255

# Materials: row numbers of the texture table in seg/sample.py.
SMOOTH, ASPHALT, PAVING, GRASS, LEAVES, PLASTER, BRICK, CLOTH, SKY = range(9)

CURVE = 12  # points along a bent edge
STEPS = np.linspace(0, 1, CURVE)
FAR = 42.0  # metres beyond which details are too small to be drawn

GLASS: Colour = (52, 62, 74)
RUBBER: Colour = (26, 26, 28)
CARS: tuple[Colour, ...] = (
    (188, 190, 192), (32, 33, 36), (228, 228, 224), (104, 106, 110), (150, 30, 28), (38, 60, 122), (70, 92, 72),
    (172, 150, 110), (96, 122, 150), (120, 84, 60),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (38, 42, 58), (150, 44, 40), (60, 76, 48), (196, 190, 178), (70, 70, 74), (40, 90, 140), (208, 160, 60),
    (112, 84, 64), (128, 60, 110), (24, 24, 26), (120, 140, 160),
)  # fmt: skip
SKINS: tuple[Colour, ...] = ((222, 180, 150), (190, 140, 108), (128, 86, 62), (84, 58, 44))
FACADES: tuple[Colour, ...] = (
    (150, 140, 126), (126, 124, 124), (178, 160, 128), (142, 92, 74), (108, 112, 120), (196, 188, 172), (120, 104, 90),
    (168, 120, 96), (92, 90, 92), (136, 144, 138), (184, 172, 104), (150, 160, 172),
)  # fmt: skip
GREENS: tuple[Colour, ...] = ((62, 88, 44), (84, 104, 52), (48, 72, 44), (104, 112, 52), (130, 108, 56), (76, 84, 62))


@dataclass(frozen=True)
class Shape:
    """Polygons of one colour and, for the ground truth, their label.

    polys: arrays of shape (N, 2), or one of shape (M, N, 2), x and y in units of the image's width.
    colour None: labelled, not painted. label None: painted, not labelled.
    """

    polys: list[Array] | Array
    label: str | None
    colour: Colour | None
    material: int = SMOOTH


@dataclass(frozen=True)
class Camera:
    """A pinhole above a street that bends: x is measured from the bent street's line.

    focal, horizon and centre are in units of the image's width; height in metres; curve in 1/metre.
    """

    focal: float
    centre: float
    horizon: float
    height: float
    curve: float
    aspect: float

    def project(self, points: Array) -> Array:
        """World points (..., 3) in metres with z > 0 -> image points (..., 2)."""
        z = points[..., 2]
        scale = self.focal / z
        image = np.empty(points.shape[:-1] + (2,))
        image[..., 0] = self.centre + scale * (points[..., 0] + self.curve * z * z)
        image[..., 1] = self.horizon + scale * (self.height - points[..., 1])
        return image

    @property
    def near(self) -> float:
        """Distance in metres at which the street leaves the picture at the bottom."""
        return self.focal * self.height / (self.aspect - self.horizon)


def scaled(colour: Colour, factor: float) -> Colour:
    """The colour, lighter or darker."""
    return (min(255.0, colour[0] * factor), min(255.0, colour[1] * factor), min(255.0, colour[2] * factor))


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """The colour between a (share 0) and b (share 1)."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def pick(rng: Generator, colours: Sequence[Colour], spread: float = 0.12, tint: float = 6.0) -> Colour:
    """A colour of the list, lighter or darker by up to a share of `spread`, its channels varied by `tint`."""
    base = colours[int(rng.integers(len(colours)))]
    light, (r, g, b) = rng.uniform(1 - spread, 1 + spread), rng.normal(0, tint, 3).tolist()
    return _bounded(base[0] * light + r), _bounded(base[1] * light + g), _bounded(base[2] * light + b)


def _bounded(value: float) -> float:
    return min(250.0, max(5.0, value))


def rectangle(x0: float, x1: float, y0: float, y1: float) -> Array:
    """Corners of an upright rectangle (4, 2)."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def ellipse(x: float, y: float, rx: float, ry: float, corners: int = 16) -> Array:
    """Corners of an ellipse (corners, 2)."""
    t = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], -1)


def limb(x0: float, y0: float, x1: float, y1: float, width: float) -> Array:
    """A stroke of a width as a quadrangle (4, 2)."""
    half = width / 2 / (math.hypot(x1 - x0, y1 - y0) + 1e-9)
    dx, dy = (y0 - y1) * half, (x1 - x0) * half
    return np.array([[x0 + dx, y0 + dy], [x1 + dx, y1 + dy], [x1 - dx, y1 - dy], [x0 - dx, y0 - dy]])


def patch(quad: Array, u0: float, u1: float, v0: float, v1: float) -> Array:
    """The part of a quadrangle (4, k) (lower left, lower right, upper right, upper left) between shares u, v of it."""
    corners = ((u0, v0), (u1, v0), (u1, v1), (u0, v1))
    weights = [((1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v) for u, v in corners]
    return np.array(weights) @ quad


def outline(polys: Sequence[Array]) -> Array:
    """The outer contour (N, 2) of the largest connected part of the polygons' union."""
    points = np.concatenate(polys)
    low, span = points.min(0), float(np.ptp(points, axis=0).max()) + 1e-9
    scale = 300 / span
    shape = np.ceil(np.ptp(points, axis=0)[::-1] * scale).astype(int) + 5
    mask = np.zeros(tuple(shape), np.uint8)
    for poly in polys:
        corners = np.round(((poly - low) * scale + 2) * 16).astype(np.int32)
        cv2.fillPoly(mask, [corners], 255, cv2.LINE_8, 4)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    contour = cv2.approxPolyDP(max(contours, key=cv2.contourArea), 0.8, True)
    return (contour.reshape(-1, 2).astype(float) - 2) / scale + low


@dataclass
class Pen:
    """Collects the shapes of one scene, nearer ones over farther ones."""

    camera: Camera
    rng: Generator
    haze: Colour
    sun: float  # -1: from the left, 1: from the right, 0: overcast
    ground: list[Shape] = field(default_factory=list)
    shadows: list[Array] = field(default_factory=list)
    things: list[tuple[float, list[Shape]]] = field(default_factory=list)
    taken: list[tuple[float, float]] = field(default_factory=list)

    def free(self, draw: Callable[[], tuple[float, float]], gap: float = 1.3) -> tuple[float, float]:
        """A place (x, z) drawn at random, if possible where nothing that was placed so before stands or hides it."""
        for _ in range(10):
            x, z = draw()
            if all(abs(x / z - a / b) * min(z, b) > gap * 0.6 or abs(z - b) > 6 * gap for a, b in self.taken):
                break
        self.taken.append((x, z))
        return x, z

    def at(self, z: float, colour: Colour, light: float = 1.0) -> Colour:
        """A colour as seen from z metres away."""
        return mixed(scaled(colour, light), self.haze, 1 - float(np.exp(-z / 160)))

    def lit(self, side: float) -> float:
        """Brightness of a face that looks to the left (-1) or to the right (1)."""
        return 0.86 + 0.26 * side * self.sun

    def add(self, z: float, shapes: list[Shape]) -> None:
        """Put shapes into the picture at a distance."""
        self.things.append((z, shapes))

    def thing(self, z: float, label: str, parts: list[Shape], outline_of: list[Array] | None = None) -> None:
        """Put one object into the picture: painted parts, and the outline of their union as its label."""
        polys = outline_of or [poly for part in parts for poly in part.polys]
        self.add(z, [*parts, Shape([outline(polys)], label, None)])

    def card(self, x: float, z: float, lift: float = 0.0, stretch: float = 1.0) -> Callable[[Array], Array]:
        """Maps an upright plane at (x, z), metres (N, 2), right and up, into the image."""
        foot = self.camera.project(np.array([x, lift, z], float))
        scale = np.array([stretch, -1.0]) * self.camera.focal / z
        return lambda points: foot + points * scale

    def strip(self, x0: float, x1: float, z0: float, z1: float) -> Array:
        """A piece of ground as a polygon that follows the street's bend."""
        z0, z1 = max(z0, 0.7 * self.camera.near), max(z1, 0.75 * self.camera.near)
        ground = np.zeros((2 * CURVE, 3))
        ground[:CURVE, 0], ground[CURVE:, 0] = x0, x1
        ground[:CURVE, 2] = z0 * (z1 / z0) ** STEPS
        ground[CURVE:, 2] = ground[CURVE - 1 :: -1, 2]
        return self.camera.project(ground)

    def plane(self, x: float, y0: float, y1: float, z0: float, z1: float) -> Array:
        """World corners (N, 3) of an upright plane along the street, sampled so that it can follow the bend."""
        world = np.empty((2 * CURVE, 3))
        world[:, 0] = x
        world[:CURVE, 1], world[CURVE:, 1] = y0, y1
        world[:CURVE, 2] = z0 * (z1 / z0) ** STEPS
        world[CURVE:, 2] = world[CURVE - 1 :: -1, 2]
        return world

    def band(self, x: float, y0: float, y1: float, z0: float, z1: float) -> Array:
        """An upright plane along the street as the camera sees it (N, 2)."""
        return self.camera.project(self.plane(x, y0, y1, z0, z1))

    def shadow(self, x0: float, x1: float, z0: float, z1: float, height: float) -> None:
        """What an object over this piece of ground darkens: below it, and beside it where the sun is low."""
        self.shadows.append(self.strip(x0 - 0.1, x1 + 0.1, z0 - 0.1, z1))
        if self.sun:
            away = -self.sun * height * 0.9
            self.shadows.append(self.strip(min(x0, x0 + away), max(x1, x1 + away), z0, z1))

    def box(self, x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, inset: Sequence[float] = (0, 0, 0)
            ) -> dict[str, Array]:  # fmt: skip
        """Faces of a box that the camera sees, as world quadrangles (4, 3): near, side, top.

        inset: how far the upper edge is drawn in at the near end, at the far end, and on both sides, in metres.
        """
        near, far, across = inset
        left, right, front, back = x0 + across, x1 - across, z0 + near, z1 - far
        low = [(x0, y0, z0), (x1, y0, z0), (x1, y0, z1), (x0, y0, z1)]
        high = [(left, y1, front), (right, y1, front), (right, y1, back), (left, y1, back)]
        corners = np.array(low + high, float)
        # where the far end lies to the left of the near one in the picture, the left side shows
        side = [0, 3, 7, 4] if x0 > self.camera.curve * z0 * z1 else [1, 2, 6, 5]
        return {"near": corners[[0, 1, 5, 4]], "side": corners[side], "top": corners[4:]}

    def face(self, quad: Array, colour: Colour, light: float = 1.0, material: int = SMOOTH) -> Shape:
        """A painted world polygon (N, 3)."""
        return Shape(
            [self.camera.project(quad)], None, self.at(float(quad[0, 2] + quad[2, 2]) / 2, colour, light), material
        )

"""Puts a rendered street together: where the road runs, what lines it, who is on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from seg import sample_objects as objects
from seg import sample_pen as draw
from seg import sample_street as street
from seg.sample_pen import Array, Camera, Colour, Pen, Shape

# Classes that one street rarely holds all at once; every scene is given one of these sets, in turn.
TURNS = (
    frozenset({"bus", "motorcycle", "rider", "wall", "terrain"}),
    frozenset({"truck", "train", "bicycle", "rider", "fence"}),
)
EVERYWHERE = frozenset(
    {"road", "sidewalk", "building", "pole", "traffic light", "traffic sign", "vegetation", "sky", "person", "car"}
)
SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((84, 132, 196), (196, 214, 230)), ((120, 150, 190), (222, 226, 228)), ((176, 182, 190), (214, 216, 218)),
    ((140, 146, 154), (190, 192, 194)), ((120, 130, 176), (238, 206, 170)), ((206, 210, 212), (232, 232, 230)),
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One street, without a pixel size: shapes from far to near, and its weather.

    ground lies below the shadows, standing above them; aspect is height / width.
    """

    camera: Camera
    ground: list[Shape]
    shadows: list[Array]
    standing: list[Shape]
    sky: tuple[Colour, Colour]
    clouds: float
    shade: float


@dataclass(frozen=True)
class _Plan:
    """Where things are across the street, in metres from the camera's line."""

    left: float
    right: float
    lane: float
    walk: tuple[float, float]
    setback: tuple[float, float]
    track: float | None

    def kerb(self, side: int) -> float:
        return self.right if side > 0 else -self.left

    def edge(self, side: int) -> float:
        """Distance of the walls and fronts on a side."""
        i = (side + 1) // 2
        return self.kerb(side) + self.walk[i] + self.setback[i]


def compose(rng: Generator, aspect: float, wanted: frozenset[str]) -> Scene:
    """Draw up one street that is meant to show the wanted classes (they may be hidden: the caller looks).

    aspect: height / width of the picture.
    """
    sky = SKIES[int(rng.integers(len(SKIES)))]
    sun = float(rng.choice([-1, 0, 1]) * rng.uniform(0.5, 1))
    reach = min(1.0, 2 * aspect)
    camera = Camera(
        focal=float(rng.uniform(0.72, 0.95)) * reach, centre=float(rng.uniform(0.4, 0.6)),
        horizon=aspect * float(rng.uniform(0.38, 0.5)), height=float(rng.uniform(1.6, 2.3)),
        curve=float(rng.normal(0, 0.0016)), aspect=aspect,
    )  # fmt: skip
    pen = Pen(camera, rng, sky[1], sun)
    lane = float(rng.uniform(2.9, 3.4))
    left = -lane * float(rng.choice([1.5, 1.5, 2.5])) - float(rng.uniform(0, 1.2))
    shoulder = float(rng.uniform(1.9, 2.6) if "train" in wanted else rng.uniform(0.4, 2.4))
    setback = (1.5, 4.5) if "terrain" in wanted else (0.0, 2.5)
    plan = _Plan(
        left=left, right=lane * 0.5 + shoulder, lane=lane,
        walk=(float(rng.uniform(2.0, 3.8)), float(rng.uniform(2.0, 3.8))),
        setback=(float(rng.uniform(*setback)), float(rng.uniform(*setback))),
        track=-lane if "train" in wanted else None,
    )  # fmt: skip
    _ground(pen, plan, "terrain" in wanted)
    _sides(pen, plan, wanted)
    _traffic(pen, plan, wanted)
    _people(pen, plan, wanted)
    _furniture(pen, plan)
    pen.things.sort(key=lambda thing: -thing[0])
    standing = [shape for _, shapes in pen.things for shape in shapes] + _ego(pen)
    return Scene(camera, pen.ground, pen.shadows, standing, sky, float(rng.uniform(0, 1)), 0.45 if sun else 0.75)


def _ground(pen: Pen, plan: _Plan, green: bool) -> None:
    rng, aspect = pen.rng, pen.camera.aspect
    put = pen.ground.append
    full = draw.rectangle(-0.02, 1.02, -0.02, aspect + 0.02)
    put(Shape([full], "sky", (0, 0, 0), draw.SKY))
    below = draw.rectangle(-0.02, 1.02, pen.camera.horizon, aspect + 0.02)
    grass, stone = draw.pick(rng, ((96, 112, 60), (124, 122, 76), (110, 92, 66))), draw.pick(rng, draw.FACADES)
    base = "terrain" if green or rng.random() < 0.6 else "ground"
    put(Shape([below], base, grass if base == "terrain" else stone, draw.GRASS if base == "terrain" else draw.ASPHALT))
    tar = draw.pick(rng, ((92, 92, 94), (116, 112, 108), (74, 76, 82), (134, 128, 122)), tint=2)
    stone = draw.pick(rng, ((150, 146, 140), (128, 122, 116), (168, 156, 140)), tint=3)
    slab = draw.mixed(stone, tar, float(rng.uniform(0, 0.5)))
    for side, i in ((-1, 0), (1, 1)):
        kerb, out = side * plan.kerb(side), side * (plan.kerb(side) + plan.walk[i])
        back = out if green else side * plan.edge(side)
        put(Shape([pen.strip(kerb, back, 2, 400)], "sidewalk", slab, draw.PAVING))
        put(Shape([pen.strip(kerb - side * 0.05, kerb + side * 0.22, 2, 400)], None, draw.scaled(slab, 1.25)))
    put(Shape([pen.strip(plan.left, plan.right, 2, 400)], "road", tar, draw.ASPHALT))
    for side in (-1, 1):
        kerb = side * plan.kerb(side)
        put(Shape([pen.strip(kerb, kerb - side * 0.3, 2, 400)], None, draw.scaled(tar, 0.72)))
    if plan.track is not None:
        bed = draw.scaled(tar, 1.12)
        put(Shape([pen.strip(plan.track - 1.3, plan.track + 1.3, 2, 400)], "rail track", bed, draw.PAVING))
        for x in (-0.75, 0.75):
            put(Shape([pen.strip(plan.track + x - 0.08, plan.track + x + 0.08, 2, 400)], None, (64, 62, 62)))
    _markings(pen, plan, tar)


def _markings(pen: Pen, plan: _Plan, tar: Colour) -> None:
    rng = pen.rng
    white = draw.pick(rng, ((226, 224, 216), (206, 204, 196), (222, 196, 96)))
    dash, gap = float(rng.uniform(2, 4)), float(rng.uniform(2.5, 5))
    lines = np.arange(-plan.lane / 2, plan.left + 1.0, -plan.lane).tolist()
    for n, x in enumerate(lines):
        solid = n == 0 and rng.random() < 0.4
        starts = np.arange(3 + rng.uniform(0, 3), 70, dash + gap).tolist()
        pieces = [(2.0, 200.0)] if solid else [(z, z + dash) for z in starts]
        polys = [pen.strip(x - 0.08, x + 0.08, a, b) for a, b in pieces]
        pen.ground.append(Shape(polys, None, white))
    if rng.random() < 0.5:
        z = float(rng.uniform(9, 16))
        bars = [pen.strip(x, x + 0.5, z, z + 3) for x in np.arange(plan.left + 0.4, plan.right - 0.6, 1.0).tolist()]
        pen.ground.append(Shape(bars, None, white))
    for _ in range(int(rng.integers(0, 4))):  # mended spots
        x, z = float(rng.uniform(plan.left + 1, plan.right - 1)), float(rng.uniform(7, 22))
        dark = draw.scaled(tar, float(rng.choice([0.8, 0.88, 1.12])))
        pen.ground.append(Shape([pen.strip(x - 0.6, x + 0.5, z, z + rng.uniform(0.6, 3))], None, dark, draw.ASPHALT))


def _sides(pen: Pen, plan: _Plan, wanted: frozenset[str]) -> None:
    rng = pen.rng
    _backdrop(pen)
    special = [kind for kind in ("wall", "fence") if kind in wanted]
    side_of_special = int(rng.choice([-1, 1]))
    for side in (-1, 1):
        edge = plan.edge(side)
        z, first, before = 3.0, True, ""
        while z < 80:
            length = float(rng.uniform(9, 22))
            kind = str(rng.choice(["building", "wall", "fence", "park"], p=[0.62, 0.1, 0.1, 0.18]))
            if first and special and side == side_of_special:
                kind, length = special[0], float(rng.uniform(16, 26))
            elif first and side == side_of_special and "terrain" in wanted:
                kind = "park"
            elif first and side != side_of_special:
                kind = "park" if "terrain" in wanted else "building"
                length = float(rng.uniform(7, 12)) if kind == "park" else length
            _segment(pen, kind, side, edge, z, z + length, before != "building")
            z, first, before = z + length, False, kind


def _segment(pen: Pen, kind: str, side: int, edge: float, z0: float, z1: float, open_end: bool) -> None:
    """One stretch of what lines the street; open_end: one sees its near end."""
    rng = pen.rng
    if kind == "building":
        street.building(pen, side, edge, z0, z1, float(rng.uniform(5.5, 16)), open_end)
        return
    for z in np.arange(z0 + rng.uniform(0, 2), min(z1, 50), rng.uniform(4, 7)):
        street.tree(pen, side * (edge + float(rng.uniform(2, 6))), float(z))
    if rng.random() < 0.6:
        street.building(pen, side, edge + float(rng.uniform(7, 11)), z0, z1, float(rng.uniform(5, 10)), open_end)
    if kind == "wall":
        street.wall(pen, side, edge, z0, z1)
    elif kind == "fence":
        street.fence(pen, side, edge, z0, z1)


def _backdrop(pen: Pen) -> None:
    """Far houses and trees, so that the street does not end at a bare horizon."""
    rng = pen.rng
    bend = pen.camera.curve * 105**2
    for x in range(-110, 110, 16):
        if rng.random() < 0.7:
            side, near = (1, x) if x > 0 else (-1, -x - 12)
            street.building(pen, side, max(1.0, near) - side * bend, 104, 108, float(rng.uniform(5, 16)))
        else:
            street.hedge(pen, x - 2 - bend, x + 18 - bend, 102, float(rng.uniform(4, 9)))
    street.hedge(pen, -130.0, 130.0, 110, 4.0)


def _furniture(pen: Pen, plan: _Plan) -> None:
    rng = pen.rng
    for side in (-1, 1):
        line = side * (plan.kerb(side) + 0.45)
        start = float(rng.uniform(7, 12))
        trees = rng.random() < 0.45
        for n, z in enumerate(np.arange(start, 60, float(rng.uniform(10, 16))).tolist()):
            street.lamp_post(pen, side, line, z)
            if trees and n:
                street.tree(pen, line + side * 0.3, z - 5)
        if rng.random() < 0.6:
            street.bin_or_box(pen, line + side * 0.5, float(rng.uniform(8, 25)))
    for n in range(int(rng.integers(2, 4))):
        side = int(rng.choice([-1, 1]))
        x, z = pen.free(_near(rng, side * (plan.kerb(side) + 0.4), 0, (8.5, 13) if n == 0 else (12, 34)))
        street.traffic_light(pen, side, x, z)
    for n in range(int(rng.integers(2, 5))):
        side = int(rng.choice([-1, 1]))
        x, z = pen.free(_near(rng, side * (plan.kerb(side) + 0.7), 0.3, (8, 12) if n == 0 else (11, 34)))
        street.traffic_sign(pen, x, z)


def _near(rng: Generator, x: float, spread: float, z: tuple[float, float]) -> Callable[[], tuple[float, float]]:
    """Draws places around x metres across, between two distances, but not so near that they are out of sight."""

    def place() -> tuple[float, float]:
        across = x + float(rng.uniform(-spread, spread))
        nearest = max(z[0], 2.1 * abs(across))
        return across, float(rng.uniform(nearest, max(z[1], nearest + 4)))

    return place


def _traffic(pen: Pen, plan: _Plan, wanted: frozenset[str]) -> None:
    rng = pen.rng
    lanes = [(0.0, False, 13.0), (-plan.lane, True, 9.0)]
    if plan.left < -2.3 * plan.lane:
        lanes.append((-2 * plan.lane, True, 9.0))
    large = [kind for kind in ("bus", "truck") if kind in wanted or rng.random() < 0.12]
    cars = 0
    for n in rng.permutation(len(lanes)):
        x, oncoming, start = lanes[n]
        z = start + float(rng.uniform(0, 8))
        if plan.track is not None and abs(x - plan.track) < 1:
            objects.train(pen, plan.track, float(rng.uniform(10, 20)))
            continue
        while z < 75:
            if large:
                kind = large.pop()
                (objects.bus if kind == "bus" else objects.truck)(pen, x, z, oncoming)
                z += 14
            elif rng.random() < (0.75 if cars else 0.9):
                objects.car(pen, x + float(rng.uniform(-0.2, 0.2)), z, oncoming)
                cars, z = cars + 1, z + 6
            z += float(rng.uniform(4, 16))
    for side in (-1, 1):
        room = side < 0 or plan.right > 0.5 * plan.lane + 1.4
        if (plan.track is not None and side > 0) or (room and rng.random() < 0.5):
            first = max(float(rng.uniform(8, 16)), 2.2 * plan.kerb(side))
            for n, z in enumerate(np.arange(first, 45, 5.6)):
                if n == 0 or rng.random() < 0.6:
                    objects.car(pen, side * (plan.kerb(side) - 1.05), float(z), side < 0)


def _people(pen: Pen, plan: _Plan, wanted: frozenset[str]) -> None:
    rng = pen.rng
    for kind in ("bicycle", "motorcycle"):
        if kind not in wanted and rng.random() > 0.2:
            continue
        middle, half = (plan.left + plan.right) / 2, (plan.right - plan.left) / 2 - 1.0
        objects.cycle(pen, *pen.free(_near(rng, middle, half, (7.5, 13))), kind, True)
        for _ in range(int(rng.integers(1, 3))):
            side = int(rng.choice([-1, 1]))
            place = pen.free(_near(rng, side * (plan.kerb(side) + 1.4), 0.5, (7.5, 18)))
            objects.cycle(pen, *place, kind, bool(rng.random() < 0.3))
    for n in range(int(rng.integers(3, 9))):
        side = int(rng.choice([-1, 1]))
        walk = plan.walk[(side + 1) // 2]
        spot = _near(rng, side * (plan.kerb(side) + walk / 2 + 0.3), walk / 2 - 0.5, (7, 12) if n < 2 else (10, 32))
        objects.person(pen, *pen.free(spot, 0.9))


def _ego(pen: Pen) -> list[Shape]:
    """The own car's bonnet and, in some scenes, the border that rectification leaves."""
    rng, aspect = pen.rng, pen.camera.aspect
    shapes: list[Shape] = []
    if rng.random() < 0.75:
        rise = aspect * float(rng.uniform(0.03, 0.08))
        x = np.linspace(-0.02, 1.02, 24)
        top = aspect - rise * np.sqrt(np.clip(1 - ((x - 0.5) / 0.56) ** 2, 0, 1))
        bonnet = np.concatenate([np.stack([x, top], -1), [[1.02, aspect + 0.02], [-0.02, aspect + 0.02]]])
        paint = draw.pick(rng, draw.CARS)
        gleam = np.concatenate([np.stack([x, top + rise * 0.2], -1), np.stack([x, top + rise * 0.45], -1)[::-1]])
        shapes.append(Shape([bonnet], "ego vehicle", paint))
        shapes.append(Shape([gleam], None, draw.mixed(paint, pen.haze, 0.5)))
    if rng.random() < 0.25:
        edge = 0.006
        bars = [draw.rectangle(0, 1, 0, edge), draw.rectangle(0, 1, aspect - edge, aspect)]
        bars += [draw.rectangle(0, edge, 0, aspect), draw.rectangle(1 - edge, 1, 0, aspect)]
        shapes.append(Shape(bars, "rectification border", (12, 12, 12)))
    return shapes

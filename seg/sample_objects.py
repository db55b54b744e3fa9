"""Things that move in a rendered street: vehicles, cyclists and people.

Every function puts one thing into a `Pen`: at x metres to the right of the street's line, z metres ahead.
"""

from __future__ import annotations

import numpy as np

from seg import sample_pen as draw
from seg.sample_pen import Array, Colour, Pen, Shape


def _box(pen: Pen, quads: dict[str, Array], colour: Colour, x: float) -> list[Shape]:
    """The visible faces of a box, shaded."""
    side = pen.lit(-1.0 if x > 0 else 1.0)
    return [
        pen.face(quads["top"], colour, 1.18),
        pen.face(quads["side"], colour, side),
        pen.face(quads["near"], colour, 0.92),
    ]


def _wheels(pen: Pen, side: Array, places: tuple[float, ...], radius: float) -> list[Shape]:
    """Wheels below a side face, at shares of its length."""
    length = float(np.abs(side[1, 2] - side[0, 2])) + 1e-6
    shapes = []
    for share in places:
        z, x = side[0, 2] + share * (side[1, 2] - side[0, 2]), side[0, 0]
        for size, colour in ((1.0, draw.RUBBER), (0.55, (140.0, 140.0, 144.0))):
            disc = draw.ellipse(0, radius, min(radius, length / 4) * size, radius * size, 14)
            shapes.append(pen.face(np.stack([np.full(14, x), disc[:, 1], z + disc[:, 0]], -1), colour))
    return shapes


def _lamps(pen: Pen, near: Array, oncoming: bool, v0: float, v1: float, width: float = 0.2) -> list[Shape]:
    """Two lamps on a near face: white ones that come towards the camera, red ones that drive ahead."""
    colour: Colour = (250, 246, 224) if oncoming else (196, 24, 22)
    return [pen.face(draw.patch(near, u, u + width, v0, v1), colour) for u in (0.03, 0.97 - width)]


def _plate(pen: Pen, near: Array, v0: float, v1: float) -> None:
    """A license plate: a label of its own, which is not drawn into label images (its id is negative)."""
    quad = draw.patch(near, 0.36, 0.64, v0, v1)
    white = pen.face(quad, (226, 226, 218))
    pen.add(float(near[0, 2]) - 0.01, [Shape(white.polys, "license plate", white.colour)])


def car(pen: Pen, x: float, z: float, oncoming: bool) -> None:
    """A car; x is its middle, z its near end."""
    rng = pen.rng
    paint, van = draw.pick(rng, draw.CARS), rng.random() < 0.25
    width, length, height = rng.uniform(1.7, 1.9), rng.uniform(3.8, 4.6), rng.uniform(1.4, 1.55) + 0.4 * van
    x0, x1, belt = x - width / 2, x + width / 2, 0.88 + 0.12 * van
    hood = 0.3 if van and not oncoming else (1.15 if oncoming else 0.45)
    pen.shadow(x0, x1, z, z + length, height)
    body = pen.box(x0, x1, 0.22, belt, z, z + length, (0.06, 0.06, 0.04))
    cabin = pen.box(x0 + 0.05, x1 - 0.05, belt, height, z + hood, z + length - (0.2 if van else 0.7), (0.45, 0.4, 0.17))
    if z > draw.FAR:
        return pen.thing(z, "car", _box(pen, body, paint, x) + _box(pen, cabin, draw.GLASS, x))
    parts = _wheels(pen, body["side"], (0.19, 0.8), 0.33)
    under = pen.box(x0 + 0.1, x1 - 0.1, 0.08, 0.3, z + 0.1, z + length)
    parts += [pen.face(under["near"], draw.RUBBER)]
    parts += [pen.face(draw.patch(under["near"], u, u + 0.13, -0.35, 1), draw.RUBBER) for u in (0.0, 0.87)]
    parts += _box(pen, body, paint, x) + _wheels(pen, body["side"], (0.19, 0.8), 0.31)
    parts += _box(pen, cabin, paint, x)
    parts += [pen.face(draw.patch(cabin["side"], u, u + 0.38, 0.12, 0.84), draw.GLASS) for u in (0.08, 0.53)]
    parts += [pen.face(draw.patch(cabin["near"], 0.06, 0.94, 0.1, 0.88), draw.GLASS, 1.1)]
    parts += [pen.face(draw.patch(cabin["near"], 0.06, 0.5, 0.5, 0.88), draw.GLASS, 1.5)]
    parts += _lamps(pen, body["near"], oncoming, 0.55, 0.85)
    parts += [pen.face(draw.patch(body["near"], 0, 1, 0.0, 0.2), draw.scaled(paint, 0.55))]
    pen.thing(z, "car", parts)
    _plate(pen, body["near"], 0.22, 0.4)


def truck(pen: Pen, x: float, z: float, oncoming: bool) -> None:
    """A truck: a cab and a cargo box apart from it, on high wheels."""
    rng = pen.rng
    paint, cargo = draw.pick(rng, draw.CARS), draw.pick(rng, ((225, 225, 220), *draw.CARS, (70, 110, 80)))
    width, length, height = 2.4, float(rng.uniform(6.5, 9)), float(rng.uniform(3.0, 3.6))
    x0, x1 = x - width / 2, x + width / 2
    pen.shadow(x0, x1, z, z + length, height)
    cab_z = (z, z + 1.9) if oncoming else (z + length - 1.9, z + length)
    box_z = (z + 2.1, z + length) if oncoming else (z, z + length - 2.1)
    cab = pen.box(x0 + 0.1, x1 - 0.1, 0.5, 2.7, *cab_z, (0.15, 0.0, 0.06))
    load = pen.box(x0, x1, 1.05, height, *box_z)
    frame = pen.box(x0 + 0.15, x1 - 0.15, 0.55, 1.1, z, z + length)
    parts = _box(pen, frame, (48, 46, 44), x)
    parts += _wheels(pen, frame["side"], (0.13, 0.7, 0.87) if oncoming else (0.12, 0.3, 0.88), 0.5)
    parts += [pen.face(draw.patch(frame["near"], u, u + 0.2, -1.0, 0.4), draw.RUBBER) for u in (0.0, 0.8)]
    front, back = (_box(pen, cab, paint, x), _box(pen, load, cargo, x))
    lines = [
        pen.face(draw.patch(load["side"], u, u + 0.012, 0.02, 0.98), cargo, 0.72) for u in np.linspace(0.1, 0.9, 7)
    ]
    parts += (back + lines + front) if oncoming else (front + back + lines)
    parts += [pen.face(draw.patch(cab["side"], 0.25, 0.85, 0.5, 0.85), draw.GLASS)]
    if oncoming:
        parts += [pen.face(draw.patch(cab["near"], 0.06, 0.94, 0.48, 0.88), draw.GLASS, 1.2)]
        parts += [pen.face(draw.patch(cab["near"], 0.2, 0.8, 0.12, 0.36), (40, 40, 42))]
        parts += _lamps(pen, cab["near"], True, 0.05, 0.18)
    else:
        parts += [pen.face(draw.patch(load["near"], u, u + 0.015, 0.03, 0.97), cargo, 0.6) for u in (0.04, 0.49, 0.94)]
        parts += _lamps(pen, frame["near"], False, 0.4, 0.95)
    pen.thing(z, "truck", parts)


def bus(pen: Pen, x: float, z: float, oncoming: bool) -> None:
    """A bus: a box with a band of windows, doors and a lit destination sign."""
    rng = pen.rng
    paint = draw.pick(rng, ((196, 160, 50), (170, 40, 36), (214, 214, 208), (60, 100, 150), (90, 130, 80)))
    width, length, height = 2.5, float(rng.uniform(9, 12)), float(rng.uniform(2.9, 3.2))
    x0, x1 = x - width / 2, x + width / 2
    pen.shadow(x0, x1, z, z + length, height)
    body = pen.box(x0, x1, 0.35, height, z, z + length, (0.08, 0.0, 0.05))
    parts = _box(pen, body, paint, x) + _wheels(pen, body["side"], (0.2, 0.72), 0.48)
    parts += [pen.face(draw.patch(body["near"], u, u + 0.16, -0.13, 0.02), draw.RUBBER) for u in (0.04, 0.8)]
    parts += [pen.face(draw.patch(body["side"], 0.02, 0.98, 0.42, 0.8), draw.GLASS)]
    parts += [
        pen.face(draw.patch(body["side"], u, u + 0.02, 0.42, 0.8), paint, 0.7) for u in np.linspace(0.14, 0.86, 6)
    ]
    parts += [pen.face(draw.patch(body["side"], u, u + 0.1, 0.04, 0.78), draw.GLASS, 0.8) for u in (0.06, 0.46)]
    parts += [pen.face(draw.patch(body["near"], 0.05, 0.95, 0.36, 0.82), draw.GLASS, 1.2)]
    parts += [pen.face(draw.patch(body["near"], 0.05, 0.45, 0.55, 0.82), draw.GLASS, 1.7)]
    parts += [pen.face(draw.patch(body["near"], 0.2, 0.8, 0.85, 0.96), (30, 28, 26))]
    parts += [pen.face(draw.patch(body["near"], 0.3, 0.7, 0.88, 0.94), (250, 170, 40))]
    parts += _lamps(pen, body["near"], oncoming, 0.08, 0.2, 0.14)
    pen.thing(z, "bus", parts)


def train(pen: Pen, x: float, z: float) -> None:
    """A tram on its track: narrowing nose, articulated cars, a pantograph."""
    rng = pen.rng
    paint = draw.pick(rng, ((200, 60, 46), (206, 206, 200), (196, 170, 60), (70, 120, 100)))
    belt = draw.pick(rng, ((230, 226, 214), (60, 60, 66), (150, 40, 40)))
    width, height = 2.5, 3.3
    x0, x1 = x - width / 2, x + width / 2
    pen.shadow(x0, x1, z, z + 24, height)
    parts: list[Shape] = []
    for start in (z + 17.0, z + 9.0, z + 1.0):
        body = pen.box(x0, x1, 0.25, height, start, start + 7.4, (0.0, 0.0, 0.12))
        joint = pen.box(x0 + 0.15, x1 - 0.15, 0.3, height - 0.2, start + 7.3, start + 8.1)
        parts += [*_box(pen, joint, (40, 40, 44), x), *_box(pen, body, paint, x)]
        parts += [pen.face(draw.patch(body["side"], 0, 1, 0.0, 0.2), (58, 58, 60))]
        parts += [pen.face(draw.patch(body["side"], 0, 1, 0.24, 0.34), belt)]
        parts += [
            pen.face(draw.patch(body["side"], u, u + 0.2, 0.48, 0.82), draw.GLASS) for u in (0.04, 0.28, 0.52, 0.76)
        ]
    nose = pen.box(x0, x1, 0.25, height, z + 0.4, z + 1.2, (0.5, 0.0, 0.42))
    parts += _box(pen, nose, paint, x)
    near = nose["near"]
    parts += [pen.face(draw.patch(near, 0.1, 0.9, 0.42, 0.84), draw.GLASS, 1.2)]
    parts += [
        pen.face(draw.patch(near, 0.0, 1.0, 0.28, 0.38), belt),
        pen.face(draw.patch(near, 0, 1, 0, 0.1), draw.RUBBER),
    ]
    parts += [pen.face(draw.patch(near, 0.32, 0.68, 0.88, 0.97), (250, 180, 60))]
    parts += _lamps(pen, near, True, 0.14, 0.24, 0.12)
    arm = pen.card(x, z + 4.5, height - 0.1)
    for a, b in (((-0.5, 0.0), (0.35, 0.6)), ((0.35, 0.6), (-0.1, 1.1)), ((-0.8, 1.1), (0.7, 1.1))):
        parts.insert(0, Shape([arm(draw.limb(*a, *b, 0.09))], None, pen.at(z, (50, 50, 54))))
    pen.thing(z, "train", parts)


def _figure(pen: Pen, height: float, seated: bool) -> list[tuple[Array, Colour, int]]:
    """Parts of a person, feet (standing) or seat (seated) at the origin, metres."""
    rng = pen.rng
    top, legs, skin = draw.pick(rng, draw.CLOTHES), draw.pick(rng, draw.CLOTHES), draw.pick(rng, draw.SKINS)
    hair = draw.pick(rng, ((40, 30, 26), (90, 64, 40), (150, 130, 100), (24, 22, 22)))
    hip, shoulder, lean = (0.0, 0.6, 0.18) if seated else (0.5 * height, 0.84 * height, 0.0)
    parts: list[tuple[Array, Colour, int]] = []
    if seated:
        for knee in (0.3, 0.36):
            parts.append((draw.limb(0, hip, knee, hip - 0.28, 0.17), legs, draw.CLOTH))
            parts.append((draw.limb(knee, hip - 0.25, knee - 0.16, hip - 0.66, 0.13), legs, draw.CLOTH))
    else:
        stride = float(rng.uniform(0.02, 0.26))
        parts.append((draw.limb(-0.05, hip, -stride, 0.0, 0.17), legs, draw.CLOTH))
        parts.append((draw.limb(0.05, hip, stride, 0.0, 0.17), draw.scaled(legs, 0.8), draw.CLOTH))
        parts += [(draw.rectangle(s - 0.1, s + 0.12, 0, 0.08), draw.RUBBER, draw.SMOOTH) for s in (-stride, stride)]
    torso = np.array([[-0.17, hip - 0.05], [0.17, hip - 0.05], [0.22 + lean, shoulder], [-0.22 + lean, shoulder]])
    parts.append((torso, top, draw.CLOTH))
    swing = 0.4 if seated else float(rng.uniform(-0.1, 0.1))
    for s in (-0.23, 0.23):
        arm = draw.limb(s + lean, shoulder - 0.03, s + swing + lean, hip + 0.05, 0.11)
        parts.append((arm, draw.scaled(top, 0.85), draw.CLOTH))
    head = shoulder + 0.16
    parts.append((draw.limb(lean, shoulder - 0.05, lean * 1.2, head, 0.11), skin, draw.SMOOTH))
    parts.append((draw.ellipse(lean * 1.3, head + 0.01, 0.115, 0.15, 12), skin, draw.SMOOTH))
    cap = draw.pick(rng, draw.CARS) if seated else hair
    parts.append((draw.ellipse(lean * 1.3 - 0.01, head + 0.08, 0.125, 0.1, 12), cap, draw.SMOOTH))
    return parts


def _card_shapes(pen: Pen, parts: list[tuple[Array, Colour, int]], x: float, z: float, lift: float, stretch: float,
                 shift: float = 0.0) -> list[Shape]:  # fmt: skip
    card = pen.card(x, z, lift, stretch)
    offset = np.array([shift, 0.0])
    return [Shape([card(poly + offset)], None, pen.at(z, colour), material) for poly, colour, material in parts]


def person(pen: Pen, x: float, z: float) -> None:
    """Somebody who walks or stands."""
    height = float(pen.rng.uniform(1.5, 1.9))
    mirror = float(pen.rng.choice([-1.25, 1.25]))
    pen.shadow(x - 0.25, x + 0.25, z - 0.1, z + 0.25, height)
    pen.thing(z, "person", _card_shapes(pen, _figure(pen, height, False), x, z, 0.0, mirror))


def _bicycle_parts(rng: np.random.Generator) -> list[tuple[Array, Colour, int]]:
    paint = draw.pick(rng, draw.CARS)
    parts: list[tuple[Array, Colour, int]] = []
    for hub in (-0.52, 0.52):
        t = np.linspace(0, 2 * np.pi, 17)
        ring = np.stack([np.cos(t), np.sin(t)], -1)
        rim = np.concatenate([ring * 0.36, ring[::-1] * 0.28]) + [hub, 0.36]
        parts.append((rim, draw.RUBBER, draw.SMOOTH))
        parts += [(draw.limb(hub - dx, 0.36 - dy, hub + dx, 0.36 + dy, 0.02), (150, 150, 150), draw.SMOOTH)
                  for dx, dy in ((0.3, 0.0), (0.0, 0.3), (0.2, 0.2))]  # fmt: skip
    frame = ((-0.52, 0.36, -0.15, 0.8), (-0.15, 0.8, 0.38, 0.82), (-0.02, 0.34, 0.38, 0.82), (-0.02, 0.34, -0.15, 0.8),
             (-0.52, 0.36, -0.02, 0.34), (0.38, 0.85, 0.52, 0.36))  # fmt: skip
    parts += [(draw.limb(*bar, 0.075), paint, draw.SMOOTH) for bar in frame]
    parts += [(draw.limb(0.38, 0.82, 0.34, 1.04, 0.06), draw.RUBBER, draw.SMOOTH)]
    parts += [(draw.limb(0.22, 1.04, 0.48, 1.04, 0.07), draw.RUBBER, draw.SMOOTH)]
    parts += [(draw.limb(-0.3, 0.95, -0.02, 0.95, 0.09), draw.RUBBER, draw.SMOOTH)]
    return parts


def _motorcycle_parts(rng: np.random.Generator) -> list[tuple[Array, Colour, int]]:
    paint = draw.pick(rng, draw.CARS)
    parts: list[tuple[Array, Colour, int]] = []
    for hub in (-0.72, 0.72):
        parts.append((draw.ellipse(hub, 0.33, 0.34, 0.34), draw.RUBBER, draw.SMOOTH))
        parts.append((draw.ellipse(hub, 0.33, 0.18, 0.18, 12), (150, 150, 152), draw.SMOOTH))
    parts.append((draw.limb(0.4, 1.0, 0.72, 0.33, 0.12), (120, 120, 124), draw.SMOOTH))
    parts.append((draw.limb(-0.72, 0.35, 0.1, 0.35, 0.14), (90, 90, 94), draw.SMOOTH))
    parts.append((np.array([[-0.45, 0.25], [0.42, 0.25], [0.5, 0.7], [-0.5, 0.7]]), (62, 62, 64), draw.SMOOTH))
    parts.append((np.array([[-0.3, 0.6], [0.48, 0.62], [0.5, 0.98], [0.1, 1.0], [-0.1, 0.82]]), paint, draw.SMOOTH))
    parts.append((np.array([[-0.95, 0.72], [-0.2, 0.68], [-0.05, 0.86], [-0.9, 0.9]]), (34, 32, 32), draw.SMOOTH))
    cowl = np.array([[0.42, 0.75], [0.72, 0.8], [0.6, 1.1], [0.4, 1.08]])
    parts.append((cowl, draw.scaled(paint, 1.15), draw.SMOOTH))
    parts.append((draw.limb(0.3, 1.14, 0.5, 1.08, 0.08), draw.RUBBER, draw.SMOOTH))
    parts.append((draw.ellipse(0.68, 0.92, 0.09, 0.1, 10), (250, 244, 214), draw.SMOOTH))
    return parts


def cycle(pen: Pen, x: float, z: float, kind: str, ridden: bool) -> None:
    """A 'bicycle' or 'motorcycle', with a rider or parked."""
    bike = _bicycle_parts(pen.rng) if kind == "bicycle" else _motorcycle_parts(pen.rng)
    stretch = float(pen.rng.choice([-1.0, 1.0]) * pen.rng.uniform(0.7, 1.1))
    seat = 0.95 if kind == "bicycle" else 0.88
    pen.shadow(x - 0.5, x + 0.5, z - 0.15, z + 0.2, 1.7 if ridden else 0.9)
    shapes = _card_shapes(pen, bike, x, z, 0.0, stretch)
    hull = [poly for shape in shapes for poly in shape.polys]
    if kind == "bicycle":  # the ground truth takes wheels as discs, seen through or not
        card = pen.card(x, z, 0.0, stretch)
        hull += [card(draw.ellipse(hub, 0.36, 0.36, 0.36)) for hub in (-0.52, 0.52)]
    pen.thing(z, kind, shapes, hull)
    if ridden:
        figure = _card_shapes(pen, _figure(pen, 1.75, True), x, z, seat, stretch, -0.16)
        pen.thing(z, "rider", figure)

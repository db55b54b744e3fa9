"""Things that stay where they are in a rendered street: facades, walls, fences, trees, poles, lights, signs.

`side` is -1 for the left and 1 for the right of the street; distances are metres, see seg/sample_pen.py.
"""

from __future__ import annotations

import numpy as np

from seg import sample_pen as draw
from seg.sample_pen import Array, Colour, Pen, Shape


def _grid(pen: Pen, corner: Array, along: Array, columns: Array, rows: Array, share: tuple[float, float]) -> Array:
    """Projected rectangles (M, 4, 2) of a facade.

    columns and rows are the cells' starts in metres, share is the filled part of their width and height.
    The facade starts at `corner` (3,) and runs in direction `along` (3,); all cells of a direction are equally large.
    """
    step_u = columns[1] - columns[0] if len(columns) > 1 else 3.0
    step_v = rows[1] - rows[0] if len(rows) > 1 else 3.0
    u, v = (grid.reshape(-1, 1) for grid in np.meshgrid(columns, rows))
    pad_u, pad_v = step_u * (1 - share[0]) / 2, step_v * (1 - share[1]) / 2
    us = u + np.array([pad_u, step_u - pad_u, step_u - pad_u, pad_u])
    vs = v + np.array([pad_v, pad_v, step_v - pad_v, step_v - pad_v])
    world = corner + us[..., None] * along + vs[..., None] * np.array([0.0, 1.0, 0.0])
    return pen.camera.project(world)


def _windows(pen: Pen, corner: Array, along: Array, length: float, height: float, light: float, shop: bool,
             style: tuple[float, float, Colour]) -> list[Shape]:  # fmt: skip
    """Rows of windows with frames, on a ground floor of doors or shop windows."""
    rng = pen.rng
    bay, share_u, frame = style
    base = 3.4 if shop else 0.9
    bays = max(2, round(length / bay))
    columns = np.arange(bays, dtype=float) * (length / bays)
    rows: Array = base + 3.1 * np.arange(max(1, int((height - base - 0.4) / 3.1)), dtype=np.float64)
    if height - base < 2.4:
        return []
    z = float(corner[2] + along[2] * length / 2)
    shapes = []
    if z < draw.FAR:
        frames = _grid(pen, corner, along, columns, rows, (share_u + 0.1, 0.67))
        shapes.append(Shape(frames, None, pen.at(z, frame, light)))
    panes = _grid(pen, corner, along, columns, rows, (share_u, 0.58))
    glass = draw.pick(rng, (draw.GLASS, (84, 98, 112), (44, 46, 50), (110, 124, 138)))
    bright = rng.random(len(panes)) < 0.3
    shapes.append(Shape(panes[~bright], None, pen.at(z, glass)))
    shapes.append(Shape(panes[bright], None, pen.at(z, glass, 1.6)))
    if shop:
        fronts = _grid(pen, corner, along, columns, np.zeros(1), (0.86, 0.78))
        shapes.append(Shape(fronts, None, pen.at(z, draw.scaled(draw.GLASS, rng.uniform(0.7, 2.0)))))
    return shapes


def building(pen: Pen, side: int, x: float, z0: float, z1: float, height: float, gable_shows: bool = True) -> None:
    """A house along the street from z0 to z1, its front at |x| metres beside the street's line."""
    rng = pen.rng
    paint = draw.pick(rng, draw.FACADES)
    material = draw.BRICK if rng.random() < 0.4 else draw.PLASTER
    frame = draw.scaled(paint, float(rng.choice([0.6, 1.3])))
    style = (float(rng.uniform(2.2, 3.6)), float(rng.uniform(0.35, 0.62)), frame)
    shop = bool(rng.random() < 0.5)
    edge, light = side * x, pen.lit(-side)
    depth, eaves, shapes = side * 12.0, float(rng.choice([0.0, 0.0, 2.5])), []
    gable = np.array([[edge, 0, z0], [edge + depth, 0, z0], [edge + depth, height, z0], [edge, height, z0]])
    if eaves:
        gable = np.insert(gable, 3, [edge + depth / 2, height + eaves, z0], axis=0)
        roof = draw.pick(rng, ((120, 66, 52), (82, 78, 80), (96, 84, 74)))
        slope = pen.plane(edge, height - 0.05, height, z0, z1)
        slope[draw.CURVE :, 0], slope[draw.CURVE :, 1] = edge + depth / 2, height + eaves
        shapes.append(Shape([pen.camera.project(slope)], "building", pen.at((z0 + z1) / 2, roof, light), draw.BRICK))
    shapes.append(Shape([pen.camera.project(gable)], "building", pen.at(z0, paint, 0.8), material))
    corner = np.array([edge, 0.0, z0])
    if gable_shows:
        shapes += _windows(pen, corner, np.array([side, 0.0, 0.0]), 12.0, height, 0.8, False, style)
    facade = pen.band(edge, 0, height, z0, z1)
    shapes.append(Shape([facade], "building", pen.at((z0 + z1) / 2, paint, light), material))
    trim = draw.scaled(paint, 1.2)
    for y in (0.0, 3.1, height - 0.35):
        strip = pen.band(edge, y, y + 0.35, z0, z1)
        shapes.append(Shape([strip], None, pen.at((z0 + z1) / 2, draw.scaled(trim, 0.6 if y == 0 else 1.0), light)))
    parts = round((z1 - z0) / 8)
    for start in z0 + np.arange(parts) * (z1 - z0) / max(parts, 1):
        shapes += _windows(
            pen, np.array([edge, 0.0, start]), np.array([0.0, 0.0, 1.0]), (z1 - z0) / parts, height, light, shop, style
        )
    if pen.sun * side > 0:  # the sun stands behind the house
        pen.shadows.append(pen.strip(edge, edge - side * height * 0.45, z0, z1))
    pen.add(z1, shapes)


def wall(pen: Pen, side: int, x: float, z0: float, z1: float) -> None:
    """A free-standing wall: courses of stone, pilasters and a coping, no windows."""
    rng = pen.rng
    height, thick = float(rng.uniform(1.9, 3.2)), 0.4 * side
    paint = draw.pick(rng, draw.FACADES)
    edge, light, middle = side * x, pen.lit(-side), (z0 + z1) / 2
    end = np.array([[edge, 0, z0], [edge + thick, 0, z0], [edge + thick, height, z0], [edge, height, z0]])
    front = pen.band(edge, 0, height, z0, z1)
    shapes = [Shape([pen.camera.project(end)], "wall", pen.at(z0, paint, 0.8), draw.BRICK)]
    shapes += [Shape([front], "wall", pen.at(middle, paint, light), draw.BRICK)]
    for y in np.arange(0.35, height - 0.2, 0.42).tolist():
        shapes.append(Shape([pen.band(edge, y, y + 0.06, z0, z1)], None, pen.at(middle, paint, light * 0.68)))
    posts = [pen.band(edge, 0, height, z, z + 0.5) for z in np.arange(z0, z1 - 0.5, 4.0).tolist()]
    shapes.append(Shape(posts, None, pen.at(middle, paint, light * 0.85), draw.BRICK))
    shapes.append(Shape([pen.band(edge, height - 0.22, height, z0, z1)], None, pen.at(middle, paint, light * 1.3)))
    pen.add(z1, shapes)


def fence(pen: Pen, side: int, x: float, z0: float, z1: float) -> None:
    """A fence one looks through: posts, rails and bars or boards; labelled as a whole."""
    rng = pen.rng
    height, edge = float(rng.uniform(1.5, 2.2)), side * x
    paint = draw.pick(rng, ((60, 64, 62), (150, 150, 148), (112, 80, 54), (214, 212, 204), (52, 82, 62), (34, 34, 36)))
    pitch, width = ((0.36, 0.1), (0.42, 0.3), (0.7, 0.12))[int(rng.integers(3))]
    shapes = []
    for y in (0.2, height * 0.55, height - 0.2):
        rail = pen.band(edge, y, y + 0.11, z0, z1)
        shapes.append(Shape([rail], None, pen.at((z0 + z1) / 2, paint, 0.85)))
    for start, step, thick, light in ((z0, pitch, width, 1.0), (z0, 2.8, 0.26, 0.75)):
        z = np.arange(start, z1, step)
        cells = np.stack([np.stack([np.full_like(z, edge), np.full_like(z, y), z + dz], -1)
                          for y, dz in ((0, 0), (0, thick), (height, thick), (height, 0))], 1)  # fmt: skip
        shapes.append(Shape(pen.camera.project(cells), None, pen.at((z0 + z1) / 2, paint, light)))
    shapes.append(Shape([pen.band(edge, 0, height, z0, z1)], "fence", None))
    pen.add(z1, shapes)


def _blob(rng: np.random.Generator, rx: float, ry: float, rough: float, corners: int = 40) -> Array:
    """A leafy outline (corners, 2) around the origin."""
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    waves = np.array([[3.0], [5.0], [8.0], [13.0]])
    radius = 1 + rough / 2 * (np.sin(waves * t + rng.uniform(0, 6.3, (4, 1))) / waves**0.5).sum(0)
    return np.stack([rx * radius * np.cos(t), ry * radius * np.sin(t)], -1)


def tree(pen: Pen, x: float, z: float) -> None:
    """A tree with a trunk and a crown of clumps."""
    rng = pen.rng
    trunk, rx, ry = float(rng.uniform(1.6, 2.8)), float(rng.uniform(1.2, 2.4)), float(rng.uniform(1.5, 2.9))
    leaf = draw.pick(rng, draw.GREENS)
    card = pen.card(x, z)
    pen.shadow(x - rx * 0.5, x + rx * 0.5, z - 0.4, z + 0.8, trunk + ry)
    crown = np.array([0.0, trunk + ry * 0.85])
    wood = np.array([[-0.22, 0], [0.22, 0], [0.12, trunk + 0.6], [-0.12, trunk + 0.6]])
    shapes = [Shape([card(wood)], "vegetation", pen.at(z, draw.pick(rng, ((84, 68, 54), (104, 96, 84)))), draw.BRICK)]
    shapes.append(Shape([card(_blob(rng, rx, ry, 0.16) + crown)], "vegetation", pen.at(z, leaf, 0.85), draw.LEAVES))
    for _ in range(7 if z < draw.FAR else 0):
        at = crown + rng.uniform(-0.55, 0.55, 2) * (rx, ry)
        light = 0.95 + 0.3 * (at[1] - crown[1]) / ry + 0.12 * pen.sun * (at[0] / rx)
        clump = card(_blob(rng, rx * 0.36, ry * 0.3, 0.25, 20) + at)
        shapes.append(Shape([clump], None, pen.at(z, leaf, light), draw.LEAVES))
    pen.add(z, shapes)


def hedge(pen: Pen, x0: float, x1: float, z: float, height: float) -> None:
    """Bushes side by side across the view."""
    rng, leaf = pen.rng, draw.pick(pen.rng, draw.GREENS)
    card = pen.card((x0 + x1) / 2, z)
    half = (x1 - x0) / 2
    x = np.linspace(-half, half, max(8, int(half * 3)))
    top = height * (0.8 + 0.2 * np.abs(np.sin(x * 1.1 + rng.uniform(0, 6))) + rng.normal(0, 0.04, len(x)))
    points = np.concatenate([np.stack([x, top], -1), [[half, 0.0], [-half, 0.0]]])
    pen.add(z, [Shape([card(points)], "vegetation", pen.at(z, leaf, 0.9), draw.LEAVES)])


def _pole(pen: Pen, x: float, z: float, height: float, colour: Colour, width: float = 0.24) -> None:
    card = pen.card(x, z)
    body = card(draw.rectangle(-width / 2, width / 2, 0, height))
    shine = card(draw.rectangle(-width / 2, -width / 6, 0, height))
    pen.shadow(x - width / 2, x + width / 2, z - 0.1, z + 0.12, height)
    pen.add(z, [Shape([body], "pole", pen.at(z, colour, 0.8)), Shape([shine], None, pen.at(z, colour, 1.25))])


POLES: tuple[Colour, ...] = ((96, 100, 102), (146, 148, 148), (58, 72, 64), (70, 66, 62), (120, 112, 100))


def lamp_post(pen: Pen, side: int, x: float, z: float) -> None:
    """A street lamp whose arm reaches over the street."""
    colour, height = draw.pick(pen.rng, POLES), float(pen.rng.uniform(5.5, 7.5))
    _pole(pen, x, z, height, colour)
    card = pen.card(x, z)
    arm = card(draw.limb(0, height - 0.1, -side * 1.6, height + 0.25, 0.16))
    head = card(draw.rectangle(-side * 2.3, -side * 1.4, height + 0.1, height + 0.34))
    pen.add(z, [Shape([arm], "pole", pen.at(z, colour)), Shape([head], "pole", pen.at(z, colour, 0.7))])


def traffic_light(pen: Pen, side: int, x: float, z: float) -> None:
    """A pole with a housing of three lamps, one of which is lit."""
    rng = pen.rng
    colour, lift = draw.pick(rng, POLES), float(rng.uniform(2.3, 2.9))
    _pole(pen, x, z, lift + 1.4, colour)
    card = pen.card(x - side * 0.08, z)
    housing = draw.pick(rng, ((30, 32, 32), (44, 58, 48), (60, 56, 40)))
    shapes = [Shape([card(draw.rectangle(-0.36, 0.36, lift, lift + 1.6))], "traffic light", pen.at(z, housing))]
    lamps: list[tuple[Colour, Colour]] = [
        ((40, 250, 150), (24, 52, 40)),
        ((255, 196, 60), (62, 52, 24)),
        ((255, 50, 40), (64, 26, 24)),
    ]
    lit = int(rng.integers(3))
    for n, (on, off) in enumerate(lamps):
        disc = card(draw.ellipse(0, lift + 0.28 + 0.52 * n, 0.2, 0.2, 14))
        shapes.append(Shape([disc], None, pen.at(z, on if n == lit else off)))
    pen.add(z, shapes)


def traffic_sign(pen: Pen, x: float, z: float) -> None:
    """A pole with one sign: round, three-cornered, square, rhombic or a tall board."""
    rng = pen.rng
    lift, size = float(rng.uniform(2.2, 2.8)), float(rng.uniform(0.5, 0.62))
    _pole(pen, x, z, lift + size, draw.pick(rng, POLES), 0.2)
    card = pen.card(x, z)
    kinds: list[tuple[int, float, Colour, Colour]] = [
        (20, 0.0, (200, 30, 34), (240, 238, 230)), (20, 0.0, (34, 84, 170), (235, 238, 240)),
        (3, np.pi / 2, (200, 30, 34), (240, 238, 226)), (4, np.pi / 4, (34, 84, 170), (238, 240, 240)),
        (4, 0.0, (244, 242, 232), (240, 196, 40)), (8, np.pi / 8, (190, 30, 34), (190, 30, 34)),
    ]  # fmt: skip
    corners, turn, rim, face = kinds[int(rng.integers(len(kinds)))]
    t = turn + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    unit = np.stack([np.cos(t), np.sin(t)], -1) * size * (1.25 if corners <= 4 else 1.0)
    centre = np.array([0.0, lift + size])
    shapes = [Shape([card(unit + centre)], "traffic sign", pen.at(z, rim))]
    shapes.append(Shape([card(unit * 0.74 + centre)], None, pen.at(z, face)))
    symbol = draw.pick(rng, ((30, 30, 32), (240, 240, 236), (40, 60, 120)))
    mark = draw.limb(-size * 0.35, 0, size * 0.35, float(rng.uniform(-0.2, 0.2)), size * 0.26)
    shapes.append(Shape([card(mark + centre)], None, pen.at(z, symbol)))
    pen.add(z, shapes)


def bin_or_box(pen: Pen, x: float, z: float) -> None:
    """A litter bin or a switch box: 'static', which no score counts."""
    colour = draw.pick(pen.rng, ((70, 84, 74), (120, 120, 118), (90, 70, 56)))
    box = pen.box(x - 0.35, x + 0.35, 0, float(pen.rng.uniform(0.9, 1.3)), z, z + 0.6)
    pen.shadow(x - 0.35, x + 0.35, z, z + 0.6, 1.1)
    faces = [pen.face(box["top"], colour, 1.2), pen.face(box["side"], colour, 0.85), pen.face(box["near"], colour)]
    pen.thing(z, "static", faces)

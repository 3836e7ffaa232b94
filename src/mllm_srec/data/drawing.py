"""Pictures of the sample shop: goods drawn from simple shapes in a named colour and pattern on a light background.

Shapes are lists of points on a square of 100 x 100 units, y downwards. They are painted three times too large and
averaged down, which smooths their edges.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

SIZE = 224
"""Width and height of a picture in pixels."""

_SUPERSAMPLING = 3
_CANVAS = SIZE * _SUPERSAMPLING
_OUTLINE = 1.1
"""Width of outlines in units."""

RGB = {
    "red": (204, 32, 38),
    "orange": (245, 128, 20),
    "yellow": (248, 208, 28),
    "green": (34, 142, 62),
    "blue": (34, 84, 196),
    "purple": (120, 48, 160),
    "pink": (246, 128, 180),
    "black": (38, 38, 42),
}
"""The named colours; a picture's own shade lies within a few percent of one."""

COLOURS = tuple(RGB)
"""The colours of the sample shop."""
PATTERNS = ("plain", "striped", "dotted", "checked")

MORE_RGB = {
    "white": (243, 243, 240),
    "grey": (140, 142, 146),
    "brown": (121, 78, 46),
    "beige": (222, 202, 166),
    "turquoise": (38, 178, 172),
}
"""Colours in which goods are drawn for training only."""

Point = tuple[float, float]
Colour = tuple[int, int, int]

_WHITE: Colour = (253, 253, 251)
_WOOD: Colour = (150, 122, 98)
_METAL: Colour = (138, 142, 148)


def in_shop(kind: str, colour: str, pattern: str) -> bool:
    """Whether the combination is one of the sample shop's; of each kind and colour half of the patterns are.

    What the shop shows is never drawn for training: it is what trained eyes are tested on.
    """
    return colour in COLOURS and (KINDS.index(kind) + COLOURS.index(colour) + PATTERNS.index(pattern)) % 2 == 0


def draw(
    kind: str, colour: str, pattern: str, generator: np.random.Generator, background: Image.Image | None = None
) -> Image.Image:
    """A picture of one good, RGB, `SIZE` x `SIZE` pixels.

    Args:
        kind: a name of `KINDS`.
        colour: a name of `RGB` or `MORE_RGB`.
        pattern: a name of `PATTERNS`.
        generator: varies position, size, shade, background and where the pattern starts, all slightly.
        background: what stands behind the good; the sample shop's is a plain light grey.
    """
    brightness = generator.uniform(0.96, 1.04)
    base = _scaled({**RGB, **MORE_RGB}[colour], brightness)
    grey = int(generator.integers(232, 245))
    warmth = int(generator.integers(-3, 4))
    if background is None:
        image = Image.new("RGB", (_CANVAS, _CANVAS), (grey + warmth, grey, grey - warmth))
    else:
        image = background.resize((_CANVAS, _CANVAS))
    scale = generator.uniform(0.86, 1.0)
    slack = 50 * (1 - scale)
    origin = 50 * (1 - scale) + generator.uniform(-slack, slack, 2)
    pen = _Pen(
        image,
        _cloth(base, pattern, generator.uniform(0, 1, 2), _METAL if colour == "white" else _WHITE),
        base,
        dark=(112, 112, 118) if colour == "black" else _scaled(base, 0.5),
        scale=float(scale),
        origin=(float(origin[0]), float(origin[1])),
    )
    _DRAWINGS[kind](pen)
    return image.reduce(_SUPERSAMPLING)


class _Pen:
    """Paints shapes given in units; `None` as paint means the cloth: the good's colour with its pattern."""

    def __init__(
        self, image: Image.Image, cloth: Image.Image, base: Colour, *, dark: Colour, scale: float, origin: Point
    ) -> None:
        self.base, self.dark = base, dark
        self._image, self._cloth, self._scale, self._origin = image, cloth, scale, origin
        self._draw = ImageDraw.Draw(image)

    def shape(self, points: Sequence[Point], paint: Colour | None = None) -> None:
        """A filled area with an outline."""
        corners = self._pixels(points)
        if paint is None:
            mask = Image.new("1", self._image.size)
            ImageDraw.Draw(mask).polygon(corners, fill=1)
            self._image.paste(self._cloth, mask=mask)
        else:
            self._draw.polygon(corners, fill=paint)
        self._path([*corners, corners[0]], _OUTLINE, self.dark)

    def stroke(self, points: Sequence[Point], width: float, paint: Colour, outlined: bool = True) -> None:
        """A line with round ends, `width` units wide."""
        path = self._pixels(points)
        if outlined:
            self._path(path, width + 2 * _OUTLINE, self.dark)
        self._path(path, width, paint)

    def _path(self, path: list[Point], width: float, paint: Colour) -> None:
        pixels = max(1, round(self._length(width)))
        self._draw.line(path, fill=paint, width=pixels)
        radius = pixels / 2
        for x, y in path:  # round ends and joints
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paint)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        x0, y0 = self._origin
        unit = _CANVAS / 100
        return [((x0 + x * self._scale) * unit, (y0 + y * self._scale) * unit) for x, y in points]

    def _length(self, units: float) -> float:
        return units * self._scale * _CANVAS / 100


def _cloth(base: Colour, pattern: str, start: np.ndarray, paint: Colour) -> Image.Image:
    """The whole canvas in `base` with the pattern in `paint`, shifted by the share `start` (2,) of its period."""
    cloth = Image.new("RGB", (_CANVAS, _CANVAS), base)
    draw = ImageDraw.Draw(cloth)
    # Bands and dots stay smaller than the ground between them, so that the named colour fills most of a good.
    period = _CANVAS * {"plain": 1.0, "striped": 0.1, "dotted": 0.12, "checked": 0.12}[pattern]
    steps = range(-1, math.ceil(_CANVAS / period) + 1)
    first_x, first_y = (float(share) * period for share in start)
    if pattern == "striped":
        for row in steps:
            top = first_y + row * period
            draw.rectangle((0, top, _CANVAS, top + 0.42 * period), fill=paint)
    elif pattern == "dotted":
        radius = 0.27 * period
        for row in steps:
            for column in steps:
                x = first_x + (column + 0.5 * (row % 2)) * period
                y = first_y + row * period
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paint)
    elif pattern == "checked":
        # As woven: a band across and a band down are half paint each, where they cross it is all paint.
        bands = Image.new("L", cloth.size, 0)
        weave = ImageDraw.Draw(bands)
        for step in steps:
            weave.rectangle((0, first_y + step * period, _CANVAS, first_y + (step + 0.25) * period), fill=140)
        for step in steps:
            left, right = first_x + step * period, first_x + (step + 0.25) * period
            weave.rectangle((left, 0, right, _CANVAS), fill=140)
            for crossing in steps:
                top = first_y + crossing * period
                weave.rectangle((left, top, right, top + 0.25 * period), fill=255)
        cloth.paste(paint, mask=bands)
    return cloth


def _scaled(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


# Shapes


def _arc(x: float, y: float, rx: float, ry: float, first: float = 0, last: float = 360) -> list[Point]:
    """Points of an ellipse around (x, y) from angle `first` to `last`, in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(first, last, 61))
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def _box(left: float, top: float, right: float, bottom: float, radius: float) -> list[Point]:
    """Points of a rectangle with round corners."""
    corners = (
        (right - radius, bottom - radius, 0),
        (left + radius, bottom - radius, 90),
        (left + radius, top + radius, 180),
        (right - radius, top + radius, 270),
    )
    return [point for x, y, first in corners for point in _arc(x, y, radius, radius, first, first + 90)]


def _curve(*points: Point) -> list[Point]:
    """A closed smooth line through the points (Catmull-Rom spline)."""
    p = np.asarray(points, dtype=np.float64)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, 16, endpoint=False)[:, None, None]
    line = 0.5 * (
        2 * p
        + (after - before) * t
        + (2 * before - 5 * p + 4 * after - beyond) * t**2
        + (3 * p - before - 3 * after + beyond) * t**3
    )
    return [(float(x), float(y)) for x, y in line.transpose(1, 0, 2).reshape(-1, 2)]


# Goods


def _ball(pen: _Pen) -> None:
    pen.shape(_arc(50, 50, 38, 38))
    pen.stroke([(50, 12), (50, 88)], 1.2, pen.dark, outlined=False)
    pen.stroke([(12, 50), (88, 50)], 1.2, pen.dark, outlined=False)
    seam = _arc(-5.9, 50, 41.9, 41.9, -42.5, 42.5)
    for side in (seam, _mirrored(seam)):
        pen.stroke(side, 1.2, pen.dark, outlined=False)


def _bag(pen: _Pen) -> None:
    pen.stroke(_arc(50, 38, 19, 26, 180, 360), 4, pen.base)
    pen.shape([(18, 37), (82, 37), (91, 88), (9, 88)])
    for x in (31, 69):
        pen.shape(_arc(x, 42, 3, 3), _METAL)
    pen.shape(_box(44, 37, 56, 50, 2), _METAL)


def _chair(pen: _Pen) -> None:
    for top, bottom in (((33, 66), (36, 88)), ((67, 66), (64, 88)), ((24, 68), (19, 96)), ((76, 68), (81, 96))):
        pen.stroke([top, bottom], 3.5, _WOOD)
    for x in (32, 68):
        pen.stroke([(x, 44), (x, 62)], 3.5, _WOOD)
    pen.shape(_box(24, 4, 76, 48, 8))
    pen.shape([(27, 56), (73, 56), (84, 71), (16, 71)])


def _clock(pen: _Pen) -> None:
    pen.stroke(_arc(50, 15, 9, 9, 180, 360), 2.5, _METAL)
    for x in (28, 72):
        pen.shape(_arc(x, 19, 14, 12, 180, 360), _METAL)
        pen.stroke([(x, 84), (x + (x - 50) * 0.35, 94)], 4, _METAL)
    pen.shape(_box(11, 18, 89, 90, 24))
    pen.shape(_arc(50, 54, 23, 23), _WHITE)
    for hour in range(12):
        outer, inner = (_arc(50, 54, r, r)[hour * 5] for r in (20.5, 17.5))
        pen.stroke([inner, outer], 1.3, (60, 60, 64), outlined=False)
    pen.stroke([(50, 54), (50, 39)], 2, (60, 60, 64), outlined=False)
    pen.stroke([(50, 54), (60, 60)], 2.6, (60, 60, 64), outlined=False)


def _dress(pen: _Pen) -> None:
    left = [
        (50, 23),
        (42, 19),
        (40.5, 6),
        (36, 6),
        (35, 24),
        (38, 34),
        (40, 44),
        (30, 64),
        (12, 90),
        (26, 94),
        (50, 95.5),
    ]
    pen.shape([*left, *_mirrored(left)])
    pen.stroke([(40.5, 44), (59.5, 44)], 3, pen.dark, outlined=False)


def _guitar(pen: _Pen) -> None:
    half = [(50, 39), (64, 38), (72, 47), (67, 58), (76, 70), (76, 86), (63, 96), (50, 97)]
    pen.shape(_curve(*half, *_mirrored(half[1:-1])))
    pen.shape([(47, 10), (53, 10), (53, 56), (47, 56)], _WOOD)
    pen.shape([(45, 2), (55, 2), (54, 13), (46, 13)], _WOOD)
    for y in (4.5, 8, 11.5):
        for x in (42, 58):
            pen.shape(_arc(x, y, 1.4, 1.4), _METAL)
    for fret in range(17, 54, 6):
        pen.stroke([(47, fret), (53, fret)], 0.6, (72, 58, 46), outlined=False)
    pen.shape(_arc(50, 60, 7, 7), (50, 44, 40))
    pen.shape(_box(40, 82, 60, 86, 1), (72, 58, 46))
    for string in (48.5, 50, 51.5):
        pen.stroke([(string, 6), (string, 83)], 0.4, (236, 232, 224), outlined=False)


def _hat(pen: _Pen) -> None:
    pen.shape(_arc(50, 70, 46, 15))
    lower, upper = _arc(50, 66, 25, 9, 0, 180), _arc(50, 57, 24.2, 9, 180, 0)
    crown = [*_arc(37, 30, 9, 9, 190, 290), (50, 25), *_arc(63, 30, 9, 9, 250, 350)]
    pen.shape([*lower, *crown])
    pen.shape([*lower, *upper], pen.dark)


def _kite(pen: _Pen) -> None:
    pen.stroke([(50, 70), (55, 76), (49, 83), (56, 90), (52, 97)], 1.2, pen.dark, outlined=False)
    for x, y in ((54, 77), (50, 84), (55, 91)):
        pen.shape([(x - 6, y - 3), (x + 6, y + 3), (x + 6, y - 3), (x - 6, y + 3)], pen.base)
    pen.shape([(50, 3), (82, 31), (50, 71), (18, 31)])
    pen.stroke([(50, 3), (50, 71)], 1.4, pen.dark, outlined=False)
    pen.stroke([(18, 31), (82, 31)], 1.4, pen.dark, outlined=False)


def _lamp(pen: _Pen) -> None:
    pen.stroke([(50, 54), (50, 88)], 3.5, _METAL)
    pen.shape([*_arc(50, 88, 20, 5, 180, 360), (70, 93), (30, 93)], _METAL)
    pen.stroke([(62, 54), (62, 66)], 0.8, pen.dark, outlined=False)
    pen.shape(_arc(62, 68, 1.8, 1.8), _METAL)
    pen.shape([(35, 7), (65, 7), (86, 57), (14, 57)])


def _mug(pen: _Pen) -> None:
    pen.stroke(_arc(70, 53, 16, 17, -90, 90), 6, pen.base)
    pen.shape([(14, 20), *_arc(43, 80, 27, 8, 180, 0), (72, 20)])
    pen.shape(_arc(43, 20, 29, 7), pen.dark)


def _shoe(pen: _Pen) -> None:
    upper = _curve(
        (9, 40), (15, 31), (27, 39), (38, 34), (45, 31), (56, 46), (72, 54), (90, 61), (94, 73), (50, 76), (10, 74)
    )
    pen.shape(upper)
    pen.shape(_box(7, 70, 96, 80, 4), _WHITE)
    for x, y in ((45, 38), (51, 45), (58, 51)):
        pen.stroke([(x + 4, y - 3), (x - 4, y + 5)], 2, _WHITE)


def _t_shirt(pen: _Pen) -> None:
    left = [(50, 20), (43, 18.5), (37, 13), (24, 18), (3, 41), (17, 53), (27, 44), (26, 91)]
    pen.shape([*left, *_mirrored(left)])


def _teapot(pen: _Pen) -> None:
    pen.stroke(_arc(76, 55, 17, 17, -100, 100), 5, pen.base)
    pen.shape(_curve((32, 56), (22, 50), (15, 36), (4, 34), (7, 52), (18, 70), (34, 76)), pen.base)
    pen.shape([(36, 84), (64, 84), (67, 91), (33, 91)], pen.base)
    pen.shape(_arc(50, 60, 31, 27))
    pen.shape(_arc(50, 36, 17, 12, 180, 360), pen.base)
    pen.shape(_arc(50, 20, 5, 5), pen.base)


def _umbrella(pen: _Pen) -> None:
    pen.stroke([(50, 4), (50, 86), *_arc(57, 86, 7, 8, 180, 30)], 2.6, _WOOD)
    canopy = _arc(50, 54, 45, 44, 180, 360)
    scallops = [point for x in (83.75, 61.25, 38.75, 16.25) for point in _arc(x, 54, 11.25, 6, 0, -180)]
    pen.shape([*canopy, *scallops])
    pen.stroke(_arc(50, 54, 22.5, 44, 180, 360), 1, pen.dark, outlined=False)
    pen.stroke([(50, 10), (50, 54)], 1, pen.dark, outlined=False)


def _mirrored(points: Sequence[Point]) -> list[Point]:
    """The points on the other side of the vertical middle, in reverse order."""
    return [(100 - x, y) for x, y in reversed(points)]


_DRAWINGS: dict[str, Callable[[_Pen], None]] = {
    "ball": _ball,
    "bag": _bag,
    "chair": _chair,
    "clock": _clock,
    "dress": _dress,
    "guitar": _guitar,
    "hat": _hat,
    "kite": _kite,
    "lamp": _lamp,
    "mug": _mug,
    "shoe": _shoe,
    "t-shirt": _t_shirt,
    "teapot": _teapot,
    "umbrella": _umbrella,
}

KINDS = tuple(_DRAWINGS)

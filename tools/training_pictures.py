"""What the embedded model's eyes learn from: free photos with captions, and pictures that the project draws.

Nothing of the sample shop occurs here: neither its combinations of kind, colour and pattern, nor its backgrounds.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from mllm_srec.data.drawing import COLOURS, KINDS, MORE_RGB, PATTERNS, RGB, SIZE, draw, in_shop
from mllm_srec.vocabulary import KINDS as NAMES
from mllm_srec.vocabulary import named

SHOP_GREYS = (226, 250)
"""Grounds between these brightnesses are left to the sample shop, whose own lie between 229 and 247."""

FREE = {"CC0-1.0", "MIT"}


@dataclass(frozen=True)
class Seen:
    """A picture with what is known of it; "" where a fact is not known."""

    image: Image.Image
    kind: str
    colour: str = ""
    pattern: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Captioned:
    """A row of captions.csv."""

    path: Path
    kind: str
    name: str
    """The product's own name; for clothing the same as `kind`."""
    source: str
    split: str


def read_captions(folder: Path) -> list[Captioned]:
    """All rows of `folder`/captions.csv.

    Raises:
        ValueError: a picture's licence is not free.
    """
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if closed := {row["licence"] for row in rows} - FREE:
        raise ValueError(f"{folder}/captions.csv: trained weights may not ship with pictures under {sorted(closed)}")
    return [
        Captioned(
            folder / row["image"],
            row["name"] if row["kind"] == "clothing" else row["kind"],
            row["name"],
            row["image"].partition("/")[0],
            row["split"],
        )
        for row in rows
    ]


def photo_views(row: Captioned, views: int, generator: np.random.Generator) -> Iterator[Seen]:
    """The photo as it is, then `views` - 1 changed ones.

    Where its ground is even, the thing is cut out and laid on other grounds, twice as often: catalogues show things so.
    The colour is read off the thing where it could be cut out, else off the picture's middle.
    """
    with Image.open(row.path) as opened:
        image = opened.convert("RGB")
    mask = thing(image)
    for number in range(views if mask is None else 2 * views):
        if number and mask is not None:
            view, colour, pattern = _laid_out(image, mask, generator)
        else:
            view, colour, pattern = (_changed(image, generator) if number else image), "", ""
        yield Seen(view, row.kind, colour or main_colour(view), pattern, row.name)


def thing(image: Image.Image) -> Image.Image | None:
    """A mask of what stands out from an even ground, None where the ground is not even or little is left."""
    lab = _lab(np.asarray(image, dtype=np.float64).reshape(-1, 3)).reshape(image.height, image.width, 3)
    edge = np.concatenate([lab[:6].reshape(-1, 3), lab[:, :6].reshape(-1, 3), lab[:, -6:].reshape(-1, 3)])
    ground = np.median(edge, 0)
    if (np.linalg.norm(edge - ground, axis=1) < 9).mean() < 0.85:
        return None
    apart = (np.linalg.norm(lab - ground, axis=2) > 11).astype(np.uint8) * 255
    mask = Image.fromarray(apart).filter(ImageFilter.MedianFilter(7))
    share = np.asarray(mask).mean() / 255
    return mask if 0.12 < share < 0.75 else None


def _laid_out(image: Image.Image, mask: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str, str]:
    """(the thing on another ground, its colour, its pattern); some things get a pattern painted on."""
    thing_pixels = np.asarray(image)[np.asarray(mask) > 127].astype(np.float64)
    colour = colour_of(thing_pixels)
    pattern = ""
    texture = _texture(image, mask)
    if colour and texture < 2 * PLAIN_TEXTURE and generator.random() < 0.5:
        pattern = str(generator.choice(PATTERNS[1:]))
        image = _painted(image, colour, pattern, generator)
    elif texture < PLAIN_TEXTURE:
        pattern = "plain"
    left, top, right, bottom = mask.getbbox() or (0, 0, *image.size)
    cut, shape = image.crop((left, top, right, bottom)), mask.crop((left, top, right, bottom))
    side = round(max(cut.size) / generator.uniform(0.6, 0.95))
    ground = background(generator).resize((side, side))
    place = (int(generator.integers(side - cut.width + 1)), int(generator.integers(side - cut.height + 1)))
    ground.paste(cut, place, shape.filter(ImageFilter.GaussianBlur(1)))
    if generator.random() < 0.5:
        ground = ground.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ground, colour, pattern


PLAIN_TEXTURE = 7.0
"""Mean distance of brightness (0..255) from its own blur, below which a thing counts as plain."""


def _texture(image: Image.Image, mask: Image.Image) -> float:
    grey = image.convert("L")
    inside = np.asarray(mask.filter(ImageFilter.MinFilter(9))) > 127
    if not inside.any():
        return float("inf")
    rough = np.abs(np.asarray(grey, dtype=np.float64) - np.asarray(grey.filter(ImageFilter.GaussianBlur(4))))
    return float(rough[inside].mean())


def _painted(image: Image.Image, colour: str, pattern: str, generator: np.random.Generator) -> Image.Image:
    """The picture under stripes, dots or checks of a colour unlike its own; folds and shadows show through."""
    period = max(8, round(max(image.size) * generator.uniform(0.05, 0.1)))
    width = generator.uniform(0.3, 0.45)
    y, x = np.mgrid[: image.height, : image.width] / period + generator.random((2, 1, 1))
    if generator.random() < 0.3:
        x, y = y, x
    if pattern == "striped":
        share = (y % 1 < width).astype(np.float64)
    elif pattern == "dotted":
        share = (np.hypot((x + 0.5 * (np.floor(y) % 2)) % 1 - 0.5, y % 1 - 0.5) < 0.28).astype(np.float64)
    else:
        share = 0.5 * ((y % 1 < 0.3).astype(np.float64) + (x % 1 < 0.3))
    dark = colour in ("white", "beige", "yellow", "grey")
    paint = np.array(generator.integers(20, 110, 3) if dark else generator.integers(215, 256, 3), dtype=np.float64)
    pixels = np.asarray(image, dtype=np.float64)
    shade = pixels.mean(-1, keepdims=True) / max(pixels.mean(), 1)
    shown = pixels + 0.9 * share[..., None] * (paint * shade.clip(0.5, 1.2) - pixels)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))


def drawn_views(count: int, generator: np.random.Generator) -> Iterator[Seen]:
    """Drawn goods in combinations and before backgrounds that the sample shop never shows."""
    every = [
        (kind, colour, pattern)
        for kind in KINDS
        for colour in (*COLOURS, *MORE_RGB)
        for pattern in PATTERNS
        if not in_shop(kind, colour, pattern)
    ]
    for number in range(count):
        if number % len(every) == 0:
            order = generator.permutation(len(every))
        kind, colour, pattern = every[int(order[number % len(every)])]
        image = draw(kind, colour, pattern, generator, background(generator))
        if generator.random() < 0.7:
            image = _changed(image, generator)
        yield Seen(image, named(kind, NAMES)[0], colour, pattern, f"{colour} {pattern} {kind}")


def background(generator: np.random.Generator) -> Image.Image:
    """A coloured ground: flat, a gradient, planks, specks or blots; never the sample shop's plain light grey."""
    first, second = (generator.integers(20, 256, 3).astype(np.float64) for _ in range(2))
    chance = generator.random()
    if chance < 0.35:  # studios: near white, or a light grey darker than the sample shop's
        first = np.full(3, generator.choice([generator.uniform(250, 255), generator.uniform(195, 224)]))
        second = first + generator.normal(0, 8, 3)
    elif chance < 0.6:  # rooms are paler than chance
        first = first.mean() + (first - first.mean()) * 0.2 + generator.choice([-60, 0, 60, 90])
    first = first.clip(0, 255)
    second = first + (second - first) * generator.uniform(0, 0.6)
    style = generator.integers(5)
    size = 96
    ramp = np.linspace(0, 1, size)
    if style == 0:
        share = np.zeros((size, size))
    elif style == 1:
        angle = generator.uniform(0, 2 * np.pi)
        share = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp
        share = (share - share.min()) / max(np.ptp(share), 1e-6)
    elif style == 2:
        share = np.repeat((np.arange(size) // int(generator.integers(8, 24)) % 2)[None], size, 0) * 0.5
        share = share.T if generator.random() < 0.5 else share
    elif style == 3:
        share = generator.random((size, size)) * 0.5
    else:
        blots = Image.new("L", (size, size), 0)
        pen = ImageDraw.Draw(blots)
        for _ in range(int(generator.integers(2, 7))):
            x, y, radius = generator.uniform((0, 0, 6), (size, size, 30)).tolist()
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=int(generator.integers(80, 256)))
        share = np.asarray(blots.filter(ImageFilter.GaussianBlur(2))) / 255
    pixels = first + share[..., None] * (second - first) + generator.normal(0, 3, (size, size, 3))
    pixels = pixels.clip(0, 255)
    mean = pixels.mean((0, 1))
    if mean.min() > SHOP_GREYS[0] and mean.max() < SHOP_GREYS[1]:
        return background(generator)
    return Image.fromarray(pixels.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _changed(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Mirrored, cut, a little turned, in another light."""
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if generator.random() < 0.3:
        image = image.rotate(generator.uniform(-12, 12), Image.Resampling.BILINEAR, fillcolor=image.getpixel((2, 2)))
    width, height = image.size
    keep = generator.uniform(0.7, 1, 2)
    left, top = (1 - keep) * generator.random(2)
    box = (left * width, top * height, (left + keep[0]) * width, (top + keep[1]) * height)
    image = image.crop(tuple(round(float(edge)) for edge in box))
    image = ImageEnhance.Brightness(image).enhance(generator.uniform(0.75, 1.2))
    return ImageEnhance.Contrast(image).enhance(generator.uniform(0.85, 1.15))


# Main colour


_SHADES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "black": ((20, 20, 22), (45, 45, 50)),
    "white": ((240, 240, 238), (220, 220, 222)),
    "grey": ((128, 128, 130), (90, 92, 96), (170, 170, 172)),
    "brown": ((110, 70, 42), (80, 52, 34), (150, 100, 62)),
    "beige": ((218, 198, 165), (196, 176, 145)),
    "red": ((190, 30, 40), (130, 25, 35)),
    "orange": ((235, 125, 35),),
    "yellow": ((240, 205, 50), (210, 170, 40)),
    "green": ((50, 140, 65), (95, 105, 60), (120, 165, 80), (30, 75, 50)),
    "turquoise": ((45, 175, 170), (110, 200, 195)),
    "blue": ((35, 80, 180), (30, 40, 80), (110, 150, 205), (70, 95, 130), (20, 20, 240), (25, 28, 50)),
    "purple": ((115, 55, 150), (80, 45, 90), (170, 140, 195)),
    "pink": ((240, 130, 175), (235, 190, 200), (205, 70, 120)),
}
assert set(_SHADES) >= set(RGB) | set(MORE_RGB)


def main_colour(image: Image.Image) -> str:
    """The named colour of the picture's middle, "" if there is none."""
    small = np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    return colour_of(small[8:26, 9:23].reshape(-1, 3))


def colour_of(pixels: np.ndarray, share: float = 0.45) -> str:
    """The named colour of at least `share` of the pixels (N, 3), "" if there is none; a rough label, not by people."""
    if len(pixels) > 2000:
        pixels = pixels[:: len(pixels) // 1000]
    names = [name for name, shades in _SHADES.items() for _ in shades]
    shades = _lab(np.array([shade for of_name in _SHADES.values() for shade in of_name], dtype=np.float64))
    nearest = ((_lab(pixels)[:, None] - shades) ** 2).sum(-1).argmin(1)
    found, counts = np.unique([names[n] for n in nearest], return_counts=True)
    return str(found[counts.argmax()]) if counts.max() >= share * len(pixels) else ""


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (N, 3) in 0..255 -> CIELAB under D65, lightness weighed at half: light and shade change it most."""
    linear = np.where(rgb / 255 > 0.04045, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([0.5 * (116 * f[:, 1] - 16), 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)

"""Pictures: the only place that opens one. A file is not trusted: it yields RGB pixels or a `PictureError`."""

import io
import stat
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import ExifTags, Image

from mllm_srec.errors import MllmSrecError

State = Literal[
    "missing",
    "outside",
    "unreadable",
    "too_large",
    "not_a_picture",
    "too_many_pixels",
    "too_narrow",
    "truncated",
    "damaged",
]
STATES: tuple[State, ...] = get_args(State)
"""What can be wrong with a picture.

missing: there is no such file. outside: its path leads out of the data's folder. unreadable: the system refuses to
read it. too_large: more than `MAX_BYTES`. not_a_picture: not JPEG, PNG, WebP or GIF, whatever the name says.
too_many_pixels: more than `MAX_PIXELS`. too_narrow: a side ratio above `MAX_RATIO`. truncated: the file stops before
its end. damaged: it cannot be decoded.
"""

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000
MAX_RATIO = 20
"""Long side over short side. Reduced for a model, a longer strip would be a few dozen pixels wide."""

MAX_SCANS = 500
"""Scans of a JPEG. Progressive ones have about ten, but each costs a pass over all pixels and takes only 60 bytes."""

_CHECK_SIDE = 64
"""Long side in pixels that `read_picture` decodes to: a JPEG is then read in full but computed at an eighth."""

# Pillow's decoders by first and last bytes of the file; a WebP file tells its length instead.
_MARKS = {
    "JPEG": (b"\xff\xd8\xff", b"\xff\xd9"),
    "PNG": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
    "GIF": (b"GIF8", b"\0;"),
    "WEBP": (b"RIFF", b""),
}

# EXIF orientation: how the stored pixels are turned for display.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(MllmSrecError):
    """A picture cannot be used; `state` is one of `STATES`, the message says what to do."""

    def __init__(self, state: State, message: str) -> None:
        super().__init__(state, message)  # all arguments, so that a copy sent by another process can be rebuilt
        self.state = state

    def __str__(self) -> str:
        return str(self.args[1])


def read_picture(image: str, root: Path) -> bytes:
    """The unchanged bytes of a picture file that `open_picture` is known to open.

    Args:
        image: path relative to `root`, or absolute and inside it; links are followed and must stay inside too.
        root: folder of the data.

    Raises:
        PictureError: with any of `STATES`; the message names `image`.
    """
    try:
        return _read(image, root)
    except PictureError as error:
        raise PictureError(error.state, f"{image}: {error}") from error


def open_picture(data: bytes, max_side: int) -> Image.Image:
    """Decode a JPEG, PNG, WebP or GIF, told apart by content.

    The first frame of an animation, turned as its EXIF orientation says, transparency over white; 16-bit values keep
    their high byte. Colour profiles are not applied. The limits are checked before any pixel is decoded.

    Args:
        data: content of the file.
        max_side: the long side is reduced to this many pixels (at least 1); smaller pictures keep their size.

    Returns:
        An RGB image without metadata.

    Raises:
        PictureError: too_large, not_a_picture, too_many_pixels, too_narrow, truncated or damaged.
    """
    if len(data) > MAX_BYTES:
        raise _too_large(len(data))
    decoder = _decoder(data)
    if decoder is None:
        what = "is not a JPEG, PNG, WebP or GIF picture" if data else "the file is empty"
        raise PictureError("not_a_picture", f"{what}: put such a picture in its place")
    if decoder == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise PictureError("damaged", f"{scans} scans, the limit is {MAX_SCANS}: save the picture again")
    try:
        # Decoding a PNG passes over the checksums of its pixels and over a lost end; verify() does not. It uses up
        # the image, and does nothing for other formats.
        with Image.open(io.BytesIO(data), formats=[decoder]) as header:
            _check_size(*header.size)
            header.verify()
        with Image.open(io.BytesIO(data), formats=[decoder]) as picture:
            return _decode(picture, max_side)
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError("too_many_pixels", _shrink("far too many pixels")) from error
    except Exception as error:  # on hostile data Pillow raises nearly every kind there is
        if _is_cut(data, decoder):
            message = f"the {decoder} data stop before their end: copy or download the file again"
            raise PictureError("truncated", message) from error
        message = f"the {decoder} data cannot be decoded: copy or download the file again, or save it anew as PNG"
        raise PictureError("damaged", message) from error


def add_noise(data: bytes, deviation: float, max_side: int, seed: int) -> bytes:
    """A picture with independent normal noise on every value, as PNG; the same seed gives the same bytes.

    Args:
        data: content of the file, as for `open_picture`.
        deviation: standard deviation of the noise in levels of 0 to 255; what leaves that range is cut off.
        max_side: the long side is reduced to this many pixels first: noise on finer ones would average out where a
            model reduces the picture.

    Raises:
        PictureError: as `open_picture`.
    """
    pixels = np.asarray(open_picture(data, max_side), dtype=np.float64)
    noised = pixels + np.random.default_rng(seed).normal(0.0, deviation, pixels.shape)
    stream = io.BytesIO()
    Image.fromarray(np.rint(noised).clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _read(image: str, root: Path) -> bytes:
    try:
        root = root.resolve()
        path = (root / image).resolve()
        if not path.is_relative_to(root):
            raise PictureError("outside", "lies outside the data's folder: put the file below it")
        status = path.stat()
        # Before opening: that would wait for ever on a pipe and may start something on a device.
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise PictureError("not_a_picture", f"is {what}: name a picture file")
        if status.st_size > MAX_BYTES:
            raise _too_large(status.st_size)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # the file may have grown
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the path
        raise PictureError("missing", "there is no such file: add it or correct the path") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PictureError("unreadable", f"cannot be read ({reason}): correct the path or its permissions") from error
    open_picture(data, _CHECK_SIDE)
    return data


def _decoder(data: bytes) -> str | None:
    for name, (first, _) in _MARKS.items():
        if data.startswith(first) and (name != "WEBP" or data[8:12] == b"WEBP"):
            return name
    return None


def _is_cut(data: bytes, decoder: str) -> bool:
    """Whether the file lacks its end; asked only when decoding failed, since bytes may follow the end."""
    if decoder == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return not data.endswith(_MARKS[decoder][1])


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError("too_many_pixels", _shrink(f"{width} x {height} pixels"))
    if max(width, height) > MAX_RATIO * min(width, height):
        message = f"{width} x {height} pixels is a strip, the sides may differ {MAX_RATIO}-fold: crop the picture"
        raise PictureError("too_narrow", message)


def _shrink(found: str) -> str:
    return f"{found}; the limit is {MAX_PIXELS / 1e6:.0f} million pixels: reduce the picture"


def _too_large(size: int) -> PictureError:
    message = f"{size / 2**20:.1f} MiB, the limit is {MAX_BYTES // 2**20} MiB: reduce the picture"
    return PictureError("too_large", message)


def _decode(picture: Image.Image, max_side: int) -> Image.Image:
    width, height = picture.size
    if (shrink := 2 * max_side / max(width, height)) < 1:
        # Twice the wanted size leaves enough for a smooth reduction below.
        picture.draft(None, (max(1, round(width * shrink)), max(1, round(height * shrink))))
    picture.load()
    turn = _turn(picture)
    rgb = _to_rgb(picture)
    rgb.thumbnail((max_side, max_side))
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info.clear()
    return rgb


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as in browsers, broken metadata is no reason to refuse sound pixels
        return None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's conversion would clip it at 255
        values = np.asarray(picture)
        grey = np.where(values == picture.info.get("transparency", -1), 255, values >> 8)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white

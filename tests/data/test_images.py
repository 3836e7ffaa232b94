"""Pictures: good ones of every kind open as RGB; whatever is wrong with a file becomes a named state, nothing else."""

import copy
import io
import os
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_srec.data.images import MAX_BYTES, MAX_RATIO, MAX_SCANS, STATES, PictureError, open_picture, read_picture
from mllm_srec.errors import MllmSrecError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)

KINDS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "progressive": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP"},
    "lossless": {"format": "WEBP", "lossless": True},
    "gif": {"format": "GIF"},
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def save(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


FILES = {kind: save(NOISE, **options) for kind, options in KINDS.items()}
FILES["animation"] = save(NOISE, format="GIF", save_all=True, append_images=[NOISE.rotate(180)])


def plain(color: tuple[int, int, int], size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, color)


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    """64 x 32 pixels in two colours."""
    image = plain(left, (64, 32))
    image.paste(right, (32, 0, 64, 32))
    return image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, bits: int, color_type: int, rows: bytes, before: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + png_chunk(b"IEND", b"")


def colors(image: Image.Image) -> list[tuple[int, int, int]]:
    """The pixels, row by row."""
    return [tuple(map(int, pixel)) for pixel in np.asarray(image).reshape(-1, 3)]


def state_of(data: bytes, max_side: int = 64) -> str:
    with pytest.raises(PictureError) as caught:
        open_picture(data, max_side)
    return str(caught.value.state)


# Good pictures


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_opens_with_its_pixels(kind: str) -> None:
    image = open_picture(save(halves(RED, BLUE), **KINDS[kind]), 64)
    assert (image.mode, image.size) == ("RGB", (64, 32))
    np.testing.assert_allclose(image.getpixel((8, 16)), RED, atol=8)
    np.testing.assert_allclose(image.getpixel((56, 16)), BLUE, atol=8)
    if kind in ("png", "lossless"):
        assert colors(open_picture(FILES[kind], 64)) == colors(NOISE)


SIZES = [((400, 100), (100, 25)), ((100, 400), (25, 100)), ((101, 50), (100, 50)), ((9, 5), (9, 5))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "expected"), SIZES)
def test_the_long_side_is_reduced_and_never_enlarged(kind: str, size: Any, expected: Any) -> None:
    data = save(plain(GREEN, size), **KINDS[kind])
    assert open_picture(data, 100).size == expected
    assert open_picture(data, 1).size == (1, 1)


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "jpeg"), ("RGB", "png"), ("P", "png"), ("1", "png")])
def test_reduction_averages_colors(mode: str, kind: str) -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    image = open_picture(save(Image.fromarray(stripes).convert(mode), **KINDS[kind]), 16)
    np.testing.assert_allclose(np.asarray(image), 127.5, atol=4)


def test_metadata_is_dropped() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    exif[0x0112] = 6
    for kind in ("jpeg", "png", "webp"):
        data = save(plain(RED), **KINDS[kind], exif=exif, icc_profile=b"profile" * 20)
        assert b"secret" in data
        image = open_picture(data, 64)
        assert image.info == {}
        assert len(image.getexif()) == 0
        assert b"secret" not in save(image, format="PNG")


def test_gray_cmyk_and_one_bit_pictures_become_rgb() -> None:
    gray = open_picture(save(Image.new("L", (4, 4), 100), format="PNG"), 64)
    assert set(colors(gray)) == {(100, 100, 100)}
    cyan = open_picture(save(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), format="JPEG", quality=100), 64)
    np.testing.assert_allclose(np.asarray(cyan)[8, 8], (0, 255, 255), atol=3)
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert colors(open_picture(save(bits, format="PNG"), 64)) == [BLACK, WHITE]


def test_16_bit_pictures_keep_the_high_byte() -> None:
    values = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    data = save(Image.fromarray(values), format="PNG")
    assert np.asarray(open_picture(data, 64))[..., 0].tolist() == [[0, 0, 1], [0x12, 0x80, 0xFF]]
    clear = save(Image.fromarray(values), format="PNG", transparency=0x1234)
    assert np.asarray(open_picture(clear, 64))[..., 2].tolist() == [[0, 0, 1], [0xFF, 0x80, 0xFF]]
    color = png_file(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0x1234, 0xFFFF, 0x00FF))
    assert colors(open_picture(color, 64)) == [(0x12, 0xFF, 0x00)]


@pytest.mark.parametrize("options", [KINDS["png"], KINDS["lossless"] | {"exact": True}])
def test_transparency_lies_over_white(options: dict[str, Any]) -> None:
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 255, 51)])
    # a fifth of blue on white: 255 - 51 = 204 of the other channels
    assert colors(open_picture(save(picture, **options), 64)) == [RED, WHITE, (204, 204, 255)]
    gray = Image.new("LA", (2, 1))
    gray.putdata([(10, 255), (10, 0)])
    assert colors(open_picture(save(gray, **options), 64)) == [(10, 10, 10), WHITE]


@pytest.mark.parametrize(
    ("format", "transparency", "blue"), [("PNG", 1, BLUE), ("GIF", 1, BLUE), ("PNG", b"\xff\0\x33", (204, 204, 255))]
)
def test_transparent_palette_entries_lie_over_white(format: str, transparency: int | bytes, blue: object) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.putdata([0, 1, 2])
    image = open_picture(save(picture, format=format, transparency=transparency), 64)
    assert colors(image) == [RED, WHITE, blue]


@pytest.mark.parametrize("options", [KINDS["gif"], KINDS["lossless"], KINDS["png"], {"format": "MPO"}])
def test_a_file_of_several_pictures_gives_the_first(options: dict[str, Any]) -> None:
    frames = [plain(color) for color in (RED, GREEN, BLUE)]
    data = save(frames[0], **options, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as check:
        assert getattr(check, "n_frames", 1) == 3
    image = open_picture(data, 64)
    np.testing.assert_allclose(np.asarray(image), np.broadcast_to(RED, (6, 8, 3)), atol=8)


# Where row 0 and column 0 of the stored pixels belong (EXIF 2.3, tag Orientation).
ROWS = ["top", "top", "bottom", "bottom", "left", "right", "right", "left"]
COLUMNS = ["left", "right", "right", "left", "top", "top", "bottom", "bottom"]
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_picture_is_turned_as_exif_says(orientation: int) -> None:
    stored = plain(WHITE, (4, 3))
    stored.putpixel((0, 0), RED)
    stored.putpixel((3, 0), GREEN)  # the other end of row 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_picture(save(stored, format="PNG", exif=exif), 64)

    row, column = ROWS[orientation - 1], COLUMNS[orientation - 1]
    assert image.size == ((4, 3) if row in ("top", "bottom") else (3, 4))

    def corner(*sides: str) -> Any:
        return image.getpixel(
            (image.width - 1 if "right" in sides else 0, image.height - 1 if "bottom" in sides else 0)
        )

    assert corner(row, column) == RED
    assert corner(row, OPPOSITE[column]) == GREEN


def test_a_jpeg_from_a_phone_is_reduced_and_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: the left half is the upper one
    image = open_picture(save(halves(RED, BLUE), format="JPEG", quality=95, exif=exif), 16)
    assert image.size == (8, 16)
    np.testing.assert_allclose(image.getpixel((4, 2)), RED, atol=8)
    np.testing.assert_allclose(image.getpixel((4, 13)), BLUE, atol=8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"nonsense", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\xff\xff\xff\xff"])
def test_broken_metadata_does_not_spoil_a_sound_picture(exif: bytes) -> None:
    for kind in ("jpeg", "png", "webp"):
        data = save(plain(RED, (16, 8)), **KINDS[kind], exif=b"Exif\0\0" + exif)
        assert exif in data
        assert open_picture(data, 64).size == (16, 8)


def test_bytes_after_the_end_do_no_harm() -> None:
    for kind, data in FILES.items():
        assert open_picture(data + b"\0" * 100, 64).size == (40, 30), kind


# Not a picture

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
OTHERS = {
    "nothing": b"",
    "text": b"not a picture",
    "html": b"<!doctype html><title>404</title>",
    "svg": SVG,
    "eps": save(plain(RED), format="EPS"),
    "tiff": save(plain(RED), format="TIFF"),
    "bmp": save(plain(RED), format="BMP"),
    "ico": save(plain(RED, (16, 16)), format="ICO"),
    "pdf": save(plain(RED), format="PDF"),
    "wave": b"RIFF\x24\0\0\0WAVEfmt ",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_named_jpg_are_no_pictures(kind: str, tmp_path: Path) -> None:
    assert state_of(OTHERS[kind]) == "not_a_picture"
    (tmp_path / "a.jpg").write_bytes(OTHERS[kind])
    with pytest.raises(PictureError, match=r"^a\.jpg: .*: put such a picture in its place$") as caught:
        read_picture("a.jpg", tmp_path)
    assert caught.value.state == "not_a_picture"


# Limits


def test_too_many_pixels_are_refused_by_the_header_alone() -> None:
    def header(width: int, height: int) -> bytes:
        return png_file(width, height, 8, 2, b"")

    assert state_of(header(8000, 5001)) == "too_many_pixels"
    assert state_of(header(8000, 5000)) == "damaged"  # at the limit: the missing pixels are what is wrong
    for size in [(15_000, 15_000), (2**31 - 1, 2**31 - 1)]:  # beyond Pillow's own limit
        assert state_of(header(*size)) == "too_many_pixels"
    wide = bytearray(FILES["gif"])
    wide[6:10] = struct.pack("<HH", 65535, 65535)
    assert state_of(bytes(wide)) == "too_many_pixels"
    webp = bytearray(FILES["webp"])
    webp[26:30] = struct.pack("<HH", 16_383, 16_383)
    assert state_of(bytes(webp)) == "too_many_pixels"
    jpeg = bytearray(FILES["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    assert state_of(bytes(jpeg)) == "too_many_pixels"


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_pillows_bomb_warning_becomes_the_state(action: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        assert state_of(png_file(10_000, 10_000, 8, 2, b"")) == "too_many_pixels"


def test_a_real_bomb_is_refused_at_once() -> None:
    data = save(Image.new("1", (20_000, 20_000)), format="PNG")
    assert len(data) < 200_000
    start = time.process_time()
    assert state_of(data) == "too_many_pixels"
    assert time.process_time() - start < 0.5


def test_strips_are_refused() -> None:
    for width, height in [(1, 100_000), (100_000, 1), (MAX_RATIO * 3 + 1, 3)]:
        assert state_of(save(plain(RED, (width, height)), format="PNG")) == "too_narrow"
    assert open_picture(save(plain(RED, (MAX_RATIO * 3, 3)), format="PNG"), 64).size == (MAX_RATIO * 3, 3)


def test_too_many_bytes_are_refused() -> None:
    data = FILES["png"]
    assert open_picture(data + b"\0" * (MAX_BYTES - len(data)), 64).size == (40, 30)
    assert state_of(data + b"\0" * (MAX_BYTES - len(data) + 1)) == "too_large"


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = FILES["progressive"]
    last = data.rindex(b"\xff\xda")
    end = data.rindex(b"\xff\xd9")

    def scans(count: int) -> bytes:
        return data[:end] + data[last:end] * (count - data.count(b"\xff\xda")) + data[end:]

    assert open_picture(scans(MAX_SCANS // 10), 64).size == (40, 30)
    assert state_of(scans(MAX_SCANS + 1)) == "damaged"


def test_text_chunks_that_inflate_without_end_are_refused() -> None:
    text = png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"\0" * 50_000_000))
    assert state_of(png_file(1, 1, 8, 0, b"\0\0", before=text)) == "damaged"


# Truncated and damaged


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png", "webp", "lossless"])
def test_every_cut_is_found(kind: str) -> None:
    data = FILES[kind]
    whole = len(data) - 4 if kind == "png" else len(data)  # a PNG's last word is a checksum of nothing
    cuts = {*range(16, whole, 41), *range(whole - 30, whole)}
    assert {state_of(data[:cut]) for cut in cuts} == {"truncated"}


def test_a_gif_cut_within_its_first_frame_is_truncated() -> None:
    data = FILES["gif"]
    # Only the end of the blocks and of the file are left out by a cut of two bytes: all pixels are there.
    assert colors(open_picture(data[:-2], 64)) == colors(open_picture(data, 64))
    assert {state_of(data[:cut]) for cut in range(6, len(data) - 3, 41)} == {"truncated"}


@pytest.mark.parametrize("max_side", [1, 8, 64, 5000])
def test_a_cut_jpeg_is_found_at_any_size(max_side: int) -> None:
    data = save(NOISE.resize((400, 300)), format="JPEG")
    assert state_of(data[: len(data) // 2], max_side) == "truncated"
    assert state_of(data[:-1], max_side) == "truncated"


def test_damage_is_not_called_truncation() -> None:
    with Image.open(io.BytesIO(FILES["gif"])) as image:
        gif = image.tile[0].offset - 1  # the size of the codes
    places = {
        "png": FILES["png"].index(b"IEND") - 5,
        "gif": gif,
        "jpeg": FILES["jpeg"].index(b"\xff\xc0") + 4,
        "webp": 22,
    }
    for kind, place in places.items():
        data = bytearray(FILES[kind])
        data[place] ^= 0xFF
        assert state_of(bytes(data)) == "damaged", kind


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_a_file_it_opens_or_is_refused(kind: str, data: st.DataObject) -> None:
    file = bytearray(FILES[kind])
    place = st.one_of(st.integers(0, 63), st.integers(0, len(file) - 1))  # headers are the weak spot
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4)):
        file[at] = value
    file = file[: data.draw(st.one_of(st.just(len(file)), st.integers(0, len(file))))]
    try:
        image = open_picture(bytes(file), 16)
    except PictureError as error:
        assert error.state in STATES
        assert " object at 0x" not in str(error)
    else:
        assert image.mode == "RGB"
        assert max(image.size) <= 16


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_lack_of_memory_is_a_state_and_an_interruption_is_not(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "convert", stop)
    with pytest.raises(PictureError if error is MemoryError else error):
        open_picture(FILES["png"], 64)


# Files


@pytest.mark.parametrize("kind", FILES)
def test_the_bytes_of_a_file_come_back_unchanged_whatever_its_name(kind: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/b.png", "none", "日本 %_'.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(FILES[kind])
        assert read_picture(name, tmp_path) == FILES[kind]
        assert read_picture(str(path), tmp_path) == FILES[kind]


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    for kind in ("jpeg", "png", "webp", "gif"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / kind).write_bytes(FILES[kind][:-200])
        with pytest.raises(PictureError, match=rf"^sub/{kind}: the .* data stop before their end: copy or download"):
            read_picture(f"sub/{kind}", tmp_path)


def state_of_file(image: str, root: Path) -> str:
    with pytest.raises(PictureError) as caught:
        read_picture(image, root)
    assert str(caught.value).startswith(f"{image}: ")
    return str(caught.value.state)


@pytest.mark.parametrize("image", ["gone.png", "no/such/folder.png", "good.png/below.png", "a\0b.png"])
def test_an_absent_file_is_missing(image: str, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(FILES["png"])
    assert state_of_file(image, tmp_path) == "missing"


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(FILES["png"])
    (tmp_path / "data2").mkdir()  # its name begins with the folder's
    (tmp_path / "data2" / "a.png").write_bytes(FILES["png"])
    (root / "link.png").symlink_to(secret)
    (root / "up").symlink_to(tmp_path)
    images = ["../secret.png", "x/../../secret.png", str(secret), "link.png", "up/secret.png", "../data2/a.png"]
    for image in [*images, "/etc/passwd", "../gone.png"]:
        assert state_of_file(image, root) == "outside", image


def test_links_inside_the_folder_and_to_the_folder_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(FILES["png"])
    (root / "b.png").symlink_to("sub/a.png")
    (tmp_path / "alias").symlink_to(root)
    assert read_picture("b.png", tmp_path / "alias") == FILES["png"]
    assert read_picture("sub/../b.png", root) == FILES["png"]
    assert read_picture(str(tmp_path / "alias" / "b.png"), root) == FILES["png"]
    monkeypatch.chdir(root)
    assert read_picture("b.png", Path()) == FILES["png"]


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    (tmp_path / "folder.png").mkdir()
    for image in ("pipe.png", "folder.png", "", "."):
        assert state_of_file(image, tmp_path) == "not_a_picture"
    assert state_of_file("zero", Path("/dev")) == "not_a_picture"


def test_what_the_system_refuses_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "circle.png").symlink_to("circle.png")
    assert state_of_file("circle.png", tmp_path) == "unreadable"
    (tmp_path / "a.png").write_bytes(FILES["png"])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so a mode would not do
    assert state_of_file("a.png", tmp_path) == "unreadable"


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**30)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Path, "open", never)
    with pytest.raises(PictureError, match=r"^a\.png: 1024\.0 MiB, the limit is 20 MiB: reduce the picture$") as caught:
        read_picture("a.png", tmp_path)
    assert caught.value.state == "too_large"


def test_a_file_that_grew_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(FILES["png"])
    small = path.stat()
    os.truncate(path, 2 * MAX_BYTES)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: small)
    with pytest.raises(PictureError, match=r"^a\.png: 20\.0 MiB, the limit"):
        read_picture("a.png", tmp_path)


def test_the_error_is_the_projects_own_and_survives_a_copy() -> None:
    error = copy.copy(PictureError("damaged", "what to do"))
    assert isinstance(error, MllmSrecError)
    assert (error.state, str(error)) == ("damaged", "what to do")
    assert len(set(STATES)) == 9

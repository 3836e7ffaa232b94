"""The pictures show what they are named after: the colour fills the good, the patterns differ, no good is cut off."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_srec.data.drawing import COLOURS, KINDS, MORE_RGB, PATTERNS, RGB, SIZE, draw, in_shop


def pixels(kind: str, colour: str, pattern: str, seed: int = 0) -> np.ndarray:
    return np.asarray(draw(kind, colour, pattern, np.random.default_rng(seed))).astype(int)


def good(picture: np.ndarray) -> np.ndarray:
    """bool (H, W): what is not background; the background is the colour of the corner."""
    return np.abs(picture - picture[0, 0]).max(axis=2) > 30


def dominant_colour(picture: np.ndarray) -> str:
    """The name nearest to the most frequent colour that is neither background nor white."""
    inside = picture[good(picture) & (picture.min(axis=2) < 225)]
    (block, _), *_ = Counter(map(tuple, (inside // 8).tolist())).most_common(1)
    return min(RGB, key=lambda name: float(np.linalg.norm(np.array(RGB[name]) - 8 * np.array(block) - 4)))


def edges(picture: np.ndarray, axis: int) -> int:
    """Steps of more than 40 between neighbours along an axis (0: downwards, 1: sideways)."""
    return int((np.abs(np.diff(picture, axis=axis)).max(axis=2) > 40).sum())


def test_there_are_enough_kinds_colours_and_patterns() -> None:
    assert len(set(KINDS)) == len(KINDS) >= 12
    assert len(set(COLOURS)) == len(COLOURS) == 8
    assert PATTERNS == ("plain", "striped", "dotted", "checked")


def test_the_shop_has_two_patterns_of_every_kind_and_colour_and_no_other_colours() -> None:
    for kind, colour in itertools.product(KINDS, COLOURS):
        assert sum(in_shop(kind, colour, pattern) for pattern in PATTERNS) == 2
    for kind, colour, pattern in itertools.product(KINDS, MORE_RGB, PATTERNS):
        assert not in_shop(kind, colour, pattern)
    assert in_shop(KINDS[0], COLOURS[0], PATTERNS[0]) and not in_shop(KINDS[0], COLOURS[0], PATTERNS[1])  # even and odd
    for colour, pattern in itertools.product(COLOURS, PATTERNS):
        assert sum(in_shop(kind, colour, pattern) for kind in KINDS) == len(KINDS) / 2
    for kind, pattern in itertools.product(KINDS, PATTERNS):
        assert sum(in_shop(kind, colour, pattern) for colour in COLOURS) == len(COLOURS) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_colour_fills_the_good_on_a_light_neutral_background(kind: str) -> None:
    for colour, pattern in itertools.product(COLOURS, PATTERNS):
        picture = pixels(kind, colour, pattern)
        assert picture.shape == (SIZE, SIZE, 3)
        assert dominant_colour(picture) == colour, (colour, pattern)
        background = picture[0, 0]
        assert background.min() >= 225
        assert np.ptp(background) <= 8
        assert 0.12 < good(picture).mean() < 0.8, (colour, pattern)


@pytest.mark.parametrize("colour", MORE_RGB)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_colour_for_training_fills_the_good_before_a_given_background(colour: str, pattern: str) -> None:
    ground = Image.new("RGB", (10, 10), (200, 255, 0))
    for kind in KINDS:
        picture = np.asarray(draw(kind, colour, pattern, np.random.default_rng(3), ground)).astype(int)
        # Not a nearby one: within the few percent by which a picture's own shade differs.
        wanted = np.array(MORE_RGB[colour])
        near = np.abs(picture[good(picture)] - wanted).max(axis=1) < 0.05 * wanted.max() + 4
        assert near.mean() > 0.2, kind


@pytest.mark.parametrize("colour", MORE_RGB)
def test_a_pattern_shows_on_every_colour_for_training(colour: str) -> None:
    plain, striped = pixels("t-shirt", colour, "plain"), pixels("t-shirt", colour, "striped")
    assert edges(striped, 0) > edges(plain, 0) + 1000


def test_a_background_fills_the_picture_behind_the_good() -> None:
    ground = Image.new("RGB", (4, 4), (10, 20, 200))
    ground.paste((200, 255, 0), (2, 0, 4, 4))
    picture = np.asarray(draw("ball", "red", "plain", np.random.default_rng(0), ground))
    assert (picture[[0, -1], 0] == (10, 20, 200)).all()
    assert (picture[[0, -1], -1] == (200, 255, 0)).all()
    without = np.asarray(draw("ball", "red", "plain", np.random.default_rng(0)))
    assert (picture[SIZE // 2 - 8, SIZE // 2 - 8] == without[SIZE // 2 - 8, SIZE // 2 - 8]).all()  # the same good
    assert ground.size == (4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_patterns_differ_in_their_edges(kind: str) -> None:
    for colour in COLOURS:
        plain, striped, dotted, checked = (pixels(kind, colour, pattern) for pattern in PATTERNS)
        down = {name: edges(p, 0) - edges(plain, 0) for name, p in (("s", striped), ("d", dotted), ("c", checked))}
        side = {name: edges(p, 1) - edges(plain, 1) for name, p in (("s", striped), ("d", dotted), ("c", checked))}
        assert min(down.values()) > 300, colour
        assert min(side["d"], side["c"]) > 200, colour
        # Stripes run sideways only; a check alone has tints between the colour and white.
        assert side["s"] < 0.25 * down["s"], colour
        tint = np.array(RGB[colour]) + (250 - np.array(RGB[colour])) * 140 / 255
        tinted = {name: int((np.abs(p - tint).max(axis=2) < 16).sum()) for name, p in (("d", dotted), ("c", checked))}
        assert tinted["c"] > 3 * tinted["d"] + 500, colour


def test_no_two_kinds_have_the_same_outline() -> None:
    outlines = {kind: good(pixels(kind, "blue", "plain")) for kind in KINDS}
    for one, other in itertools.combinations(KINDS, 2):
        both, either = outlines[one] & outlines[other], outlines[one] | outlines[other]
        assert both.sum() / either.sum() < 0.85, (one, other)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(COLOURS), st.sampled_from(PATTERNS), st.integers(0, 2**32))
def test_no_good_is_cut_off(kind: str, colour: str, pattern: str, seed: int) -> None:
    picture = pixels(kind, colour, pattern, seed)
    frame = good(picture)
    frame[1:-1, 1:-1] = False
    assert not frame.any()
    assert dominant_colour(picture) == colour


def test_a_picture_varies_with_the_generator_and_with_nothing_else() -> None:
    first, again, other = (pixels("mug", "red", "plain", seed) for seed in (1, 1, 2))
    assert (first == again).all()
    ends = [[int(f(np.nonzero(good(p))[axis])) for f in (np.min, np.max) for axis in (0, 1)] for p in (first, other)]
    assert ends[0] != ends[1]  # position or size
    assert (first[0, 0] != other[0, 0]).any()  # background
    assert (first[SIZE // 2, SIZE // 2] != other[SIZE // 2, SIZE // 2]).any()  # shade


@pytest.mark.parametrize("wrong", [("cup", "red", "plain"), ("mug", "crimson", "plain"), ("mug", "red", "wavy")])
def test_an_unknown_name_is_refused(wrong: tuple[str, str, str]) -> None:
    with pytest.raises(KeyError):
        draw(*wrong, np.random.default_rng(0))

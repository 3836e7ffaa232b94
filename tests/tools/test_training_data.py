"""What the embedded model's eyes learn from is free to use and shows nothing of the sample shop."""

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import training_pictures
from PIL import Image
from training_pictures import (
    Captioned,
    background,
    colour_of,
    drawn_views,
    main_colour,
    photo_views,
    read_captions,
    thing,
)
from training_texts import fusion

from mllm_srec.data import sample
from mllm_srec.data.drawing import COLOURS, KINDS, MORE_RGB, PATTERNS, RGB, SIZE, in_shop
from mllm_srec.vocabulary import KINDS as NAMES
from mllm_srec.vocabulary import named

# Drawn pictures


def test_no_combination_of_the_shop_is_drawn_and_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        training_pictures, "draw", lambda *of: (drawn.append(of[:3]), Image.new("RGB", (8, 8), of[4]))[1]
    )
    monkeypatch.setattr(training_pictures, "background", lambda _: "red")
    views = list(drawn_views(3000, np.random.default_rng(0)))
    every = {of for of in itertools.product(KINDS, (*COLOURS, *MORE_RGB), PATTERNS) if not in_shop(*of)}
    assert len(drawn) == len(views) == 3000
    assert set(drawn) == every
    assert len(every) == 224 + 14 * 5 * 4  # the shop's colours in the other patterns, the other colours in all
    assert set(drawn[: len(every)]) == every  # each once before one comes twice
    for (kind, colour, pattern), view in zip(drawn, views, strict=True):
        assert ([view.kind], view.colour, view.pattern) == (named(kind, NAMES), colour, pattern)
        assert view.caption == f"{colour} {pattern} {kind}"


def test_a_drawn_view_is_a_picture() -> None:
    for view in drawn_views(6, np.random.default_rng(1)):
        assert view.image.mode == "RGB"
        assert min(view.image.size) >= 0.7 * SIZE - 1


def test_no_background_has_the_shops_grey() -> None:
    """The shop's grounds are one grey from 232 to 244, warmer or cooler by at most 3."""
    generator = np.random.default_rng(0)
    for _ in range(3000):
        mean = np.asarray(background(generator), dtype=np.float64).mean((0, 1))
        assert not (mean.min() >= 229 and mean.max() <= 247 and np.ptp(mean) <= 6), mean


def test_backgrounds_are_of_many_kinds() -> None:
    generator = np.random.default_rng(2)
    made = [np.asarray(background(generator).resize((16, 16), Image.Resampling.BOX)).astype(int) for _ in range(200)]
    assert {picture.shape for picture in made} == {(16, 16, 3)}
    means = np.array([picture.reshape(-1, 3).mean(0) for picture in made])
    assert means.min() < 60 and means.max() > 220
    assert 0.2 < np.mean(np.ptp(means, axis=1) < 40) < 0.8  # pale ones and coloured ones
    flat = [picture.reshape(-1, 3).std(0).max() < 4 for picture in made]
    assert 0.1 < np.mean(flat) < 0.8  # studios are flat


# Photos

ROW = {"image": "a/1.png", "kind": "apple", "name": "Royal Gala", "licence": "MIT", "split": "train"}


def write_captions(folder: Path, *changes: dict[str, str]) -> Path:
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows(ROW | change for change in changes)
    return folder


def test_captions_are_read_with_their_source(tmp_path: Path) -> None:
    clothing = {"image": "b/2.jpg", "kind": "clothing", "name": "dress", "licence": "CC0-1.0", "split": "test"}
    assert read_captions(write_captions(tmp_path, {}, clothing)) == [
        Captioned(tmp_path / "a/1.png", "apple", "Royal Gala", "a", "train"),
        Captioned(tmp_path / "b/2.jpg", "dress", "dress", "b", "test"),
    ]


@pytest.mark.parametrize("licence", ["CC-BY-NC-4.0", "", "mit-like"])
def test_a_licence_that_is_not_free_is_refused_by_name(tmp_path: Path, licence: str) -> None:
    write_captions(tmp_path, {}, {"licence": licence})
    with pytest.raises(ValueError, match=rf"captions.csv: .* may not ship with pictures under \['{licence}'\]"):
        read_captions(tmp_path)


def test_a_photo_comes_as_it_is_and_then_changed(tmp_path: Path) -> None:
    Image.new("RGB", (40, 60), RGB["red"]).save(tmp_path / "1.png")
    row = Captioned(tmp_path / "1.png", "apple", "Royal Gala", "a", "train")
    first, *others = photo_views(row, 4, np.random.default_rng(0))
    assert (first.image.size, first.image.getcolors()) == ((40, 60), [(2400, RGB["red"])])
    assert len(others) == 3
    assert all(view.image.tobytes() != first.image.tobytes() for view in others)
    for view in (first, *others):
        assert (view.kind, view.pattern, view.caption) == ("apple", "", "Royal Gala")
        assert view.colour == "red"


def blue_shirt(ground: tuple[int, int, int] = (200, 190, 120)) -> Image.Image:
    picture = Image.new("RGB", (120, 120), ground)
    picture.paste(RGB["blue"], (30, 30, 90, 100))
    return picture


def test_a_thing_on_an_even_ground_is_cut_out() -> None:
    mask = thing(blue_shirt())
    assert mask is not None
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    assert max(abs(left - 30), abs(top - 30), abs(right - 90), abs(bottom - 100)) <= 3
    assert thing(Image.new("RGB", (120, 120), "red")) is None  # nothing stands out
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3)).astype(np.uint8)
    assert thing(Image.fromarray(noise)) is None  # no even ground
    speck = Image.new("RGB", (120, 120), "white")
    speck.paste("red", (50, 50, 60, 60))
    assert thing(speck) is None  # too little of it


def test_a_cut_out_thing_comes_on_other_grounds_with_its_own_colour_and_painted_patterns(tmp_path: Path) -> None:
    blue_shirt().save(tmp_path / "1.png")
    row = Captioned(tmp_path / "1.png", "shirt", "shirt", "a", "train")
    first, *others = photo_views(row, 20, np.random.default_rng(0))
    assert first.image.size == (120, 120)
    assert len(others) == 39  # twice as many as were asked for
    assert {view.colour for view in others} == {"blue"}
    assert {view.pattern for view in others} == set(PATTERNS)
    for view in others:
        pixels = np.asarray(view.image).reshape(-1, 3).astype(int)
        near = np.abs(pixels - RGB["blue"]).sum(1) < 30
        assert 0.05 < near.mean() < 0.8
        assert (near.mean() > 0.2) or view.pattern != "plain"


# Main colour


@pytest.mark.parametrize(("name", "rgb"), [*RGB.items(), *MORE_RGB.items()])
def test_a_flat_picture_has_the_colour_it_is_named_after(name: str, rgb: tuple[int, int, int]) -> None:
    assert main_colour(Image.new("RGB", (64, 48), rgb)) == name


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"),
        ((255, 255, 255), "white"),
        ((128, 128, 128), "grey"),
        ((255, 0, 0), "red"),
        ((255, 255, 0), "yellow"),
        ((0, 128, 0), "green"),
        ((128, 0, 128), "purple"),
        ((255, 165, 0), "orange"),
        ((139, 69, 19), "brown"),
        ((64, 224, 208), "turquoise"),
        ((255, 192, 203), "pink"),
        ((245, 222, 179), "beige"),
    ],
)
def test_the_colours_of_the_web_have_their_names(rgb: tuple[int, int, int], name: str) -> None:
    assert main_colour(Image.new("RGB", (32, 32), rgb)) == name


def test_a_colour_is_named_that_fills_enough_of_the_middle() -> None:
    picture = Image.new("RGB", (32, 32), RGB["green"])
    picture.paste(RGB["red"], (9, 8, 23, 26))
    assert main_colour(picture) == "red"  # all of the middle; what lies around does not count
    picture.paste(RGB["blue"], (9, 8, 23, 17))
    assert main_colour(picture) in ("red", "blue")  # half each
    picture.paste(RGB["yellow"], (9, 8, 23, 14))
    picture.paste(RGB["blue"], (9, 14, 23, 20))
    assert main_colour(picture) == ""  # a third each
    pixels = np.array([RGB["red"]] * 3 + [RGB["blue"]] * 2, dtype=np.float64)
    assert colour_of(pixels, share=0.6) == "red"
    assert colour_of(pixels, share=0.61) == ""


# Texts


def given_in(instruction: str) -> dict[str, str]:
    """What the fusion instruction says of the item, by label; its last line is the task."""
    return dict(line.split(": ", 1) for line in instruction.splitlines()[:-1])


def pattern(template: str) -> re.Pattern[str]:
    """A text made from a template of the shop; the name may be any word."""
    values = {
        "name": r"\S+",
        "kind": "|".join(KINDS),
        "material": "|".join({m for groups in sample.MATERIALS.values() for of in groups.values() for m in of}),
        "collection": "|".join(sample.COLLECTIONS),
        "article": "An?",
    }
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?:{values[p]})" if n % 2 else re.escape(p) for n, p in enumerate(parts)), re.I)


def test_no_text_is_made_like_the_shops() -> None:
    titles = [pattern(template) for template in sample._TITLES]
    descriptions = [pattern(template) for template in sample._DESCRIPTIONS]
    closings = [closing.strip() for closing in sample._CLOSINGS if closing]
    generator = np.random.default_rng(0)
    labels: set[str] = set()
    for _ in range(3000):
        instruction, sentence = fusion(generator)
        lines = given_in(instruction)
        labels |= set(lines)
        text = lines.get("Text", "")
        for shown in (lines.get("Title", ""), text, sentence):
            assert not any(of.fullmatch(shown) for of in titles), shown
            assert not any(of.search(shown) for of in descriptions), shown
            assert not any(closing in shown for closing in closings), shown
        assert not any(name in instruction for name in sample._NAMES)
    assert labels == {"Title", "Category", "Text", "Seen in the picture"}


def test_a_text_of_the_shop_would_be_noticed() -> None:
    for item in sample._make_items(224, np.random.default_rng(0)):
        assert any(pattern(of).fullmatch(item.title) for of in sample._TITLES), item.title
        assert any(pattern(of).search(item.description) for of in sample._DESCRIPTIONS), item.description


def test_a_sentence_takes_identity_from_the_text_and_looks_from_the_picture() -> None:
    generator = np.random.default_rng(1)
    without = set()
    for _ in range(500):
        instruction, sentence = fusion(generator)
        lines = given_in(instruction)
        seen, title = lines.get("Seen in the picture", ""), lines.get("Title", "")
        without |= {label for label, value in (("picture", seen), ("text", title)) if not value}
        assert seen or title
        assert sentence.endswith(".") and sentence[0].isupper()
        assert seen.lower() in sentence.lower()
        if title:
            brand, kind = title.split(" ", 1)
            material, use = lines["Text"].split(". ")[0].rstrip(".").split(", ")
            assert sentence.startswith(f"{brand}: ") and kind in sentence
            assert f"made of {material.lower()}, {use}" in sentence
    assert without == {"picture", "text"}


def test_a_contradiction_is_named_where_picture_and_text_differ_and_nowhere_else() -> None:
    generator = np.random.default_rng(2)
    contradicted = 0
    for _ in range(1000):
        instruction, sentence = fusion(generator)
        lines = given_in(instruction)
        seen = lines.get("Seen in the picture", "")
        said = re.search(r"Colour: (\w+)", lines.get("Text", ""))
        differ = bool(said and seen and said[1] != seen.split()[0])
        assert ("the text says" in sentence) == differ, (instruction, sentence)
        if said and differ:
            contradicted += 1
            assert sentence.endswith(f"; the text says {said[1]}.")
    assert contradicted > 50

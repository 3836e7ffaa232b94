"""The sample shop keeps what it promises: same bytes, facts only where the truth says, tastes that can be seen."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_srec.data import sample
from mllm_srec.data.drawing import RGB, in_shop
from mllm_srec.data.readers import read
from mllm_srec.data.sample import COLLECTIONS, COLOURS, KINDS, PATTERNS, write_sample
from mllm_srec.errors import UsageError

COMBINATIONS = 224
"""14 kinds x 8 colours x half of the 4 patterns."""
COLOUR_WORDS = {
    *COLOURS,
    "white",
    "grey",
    "gray",
    "brown",
    "gold",
    "golden",
    "silver",
    "violet",
    "rose",
    "dark",
    "light",
}
PATTERN_WORDS = {
    *PATTERNS,
    *("stripe", "stripes", "dot", "dots", "spotted", "check", "checks", "chequered", "tartan", "plaid", "gingham"),
}


class Shop:
    """What one call of `write_sample` left, read back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truth: dict[str, Any] = json.loads((folder / "truth.json").read_text("utf-8"))
        self.items = self._rows("items.csv")
        self.log: dict[str, list[tuple[str, int]]] = {}
        for row in self._rows("interactions.csv"):
            self.log.setdefault(row["user_id"], []).append((row["item_id"], int(row["timestamp"])))

    def _rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def meets(self, item: str, taste: dict[str, Any], fact: str) -> bool:
        value = self.truth["items"][item][fact]
        if fact == "kind":
            return value in taste["kinds"]
        if fact == "material":
            return value in self.truth["material_groups"][taste["material_group"]]
        return bool(value == taste[fact])

    def share(self, fact: str, weighs: str) -> float:
        """Share of events that meet the taste of their time, over the users who weigh `weighs`."""
        met = []
        for user, events in self.log.items():
            truth = self.truth["users"][user]
            if truth["weighs"] == weighs:
                start = truth["change"]["position"] if truth["change"] else len(events)
                for position, (item, _) in enumerate(events):
                    taste = truth["taste"] if position < start else truth["change"]["taste"]
                    met.append(self.meets(item, taste, fact))
        return float(np.mean(met))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    write_sample(folder)
    return Shop(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return without_pictures(tmp_path_factory.mktemp("large"), 200, 3)


def without_pictures(folder: Path, users: int, seed: int) -> Shop:
    """A shop whose pictures are one pixel, for what does not depend on them."""
    with patch.object(sample, "draw", lambda *_: Image.new("RGB", (1, 1))):
        write_sample(folder, users, seed)
    return Shop(folder)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Files


def test_the_same_arguments_give_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    write_sample(str(tmp_path / "here"), 3, 5)
    wanted = digests(tmp_path / "here")
    assert len(wanted) == 120 + 4
    code = "import sys; from mllm_srec.data.sample import write_sample; write_sample(sys.argv[1], 3, 5)"
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        subprocess.run(
            [sys.executable, "-c", code, str(folder)], check=True, env=os.environ | {"PYTHONHASHSEED": hash_seed}
        )
        assert digests(folder) == wanted


def test_another_seed_or_number_of_users_gives_another_shop(tmp_path: Path) -> None:
    for name, users, seed in (("a", 3, 5), ("b", 3, 6), ("c", 4, 5)):
        write_sample(tmp_path / name, users, seed)
    first, seed, users = (digests(tmp_path / name) for name in "abc")
    assert first.keys() == seed.keys() == users.keys()
    assert not set(first.values()) & set(seed.values())
    assert first["interactions.csv"] != users["interactions.csv"]


def test_the_reader_reads_every_row_and_every_picture_opens(shop: Shop) -> None:
    data = read(shop.folder)
    assert data.skipped.height == 0
    assert data.items.height == COMBINATIONS == len(list((shop.folder / "images").iterdir()))
    assert data.interactions["user_id"].n_unique() == 60
    assert data.interactions.height == sum(map(len, shop.log.values()))
    assert data.root is not None
    for item_id, image in data.items.select("item_id", "image").iter_rows():
        assert Path(image).stem == item_id
        assert (data.root / image).stat().st_size < 16_000
        with Image.open(data.root / image) as picture:
            picture.load()
            assert (picture.size, picture.mode) == ((224, 224), "RGB")
    # The reader's positions are those of the truth.
    for user, events in shop.log.items():
        rows = data.interactions.filter(data.interactions["user_id"] == user)
        assert rows["item_id"].to_list() == [item for item, _ in events]
        assert rows["timestamp"].to_list() == [1000 * time for _, time in events]


def test_every_picture_shows_the_colour_of_the_truth(shop: Shop) -> None:
    for item_id, facts in shop.truth["items"].items():
        with Image.open(shop.folder / "images" / f"{item_id}.png") as picture:
            rgb = np.asarray(picture).astype(int)
        # Neither the background nor white; the corner is background.
        good = rgb[(np.abs(rgb - rgb[0, 0]).max(axis=2) > 30) & (rgb.min(axis=2) < 225)]
        (dominant, _), *_ = Counter(map(tuple, good.tolist())).most_common(1)
        distance = {name: float(np.linalg.norm(np.subtract(RGB[name], dominant))) for name in COLOURS}
        assert min(distance, key=distance.__getitem__) == facts["colour"], item_id


def test_the_readme_says_that_nothing_is_real(shop: Shop) -> None:
    text = " ".join((shop.folder / "README.txt").read_text("utf-8").split())
    for claim in ("drawn by this project", "users are simulated", "no real shop and no real person", "seed 0"):
        assert claim in text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"users": 2}, "users is 2: .* at least 3"), ({"seed": -1}, "seed is -1: choose 0 or more")],
)
def test_too_small_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_sample(tmp_path / "shop", **options)
    assert list(tmp_path.iterdir()) == []


def test_only_a_new_or_empty_folder_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"mine is not empty: choose a new or empty folder"):
        write_sample(tmp_path / "mine", 3)
    with pytest.raises(UsageError, match=r"letter.txt is a file: choose a new or empty folder"):
        write_sample(tmp_path / "mine" / "letter.txt", 3)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]
    (tmp_path / "empty").mkdir()
    without_pictures(tmp_path / "empty", 3, 0)
    without_pictures(tmp_path / "new" / "below", 3, 0)


# Items


@settings(max_examples=12, deadline=None)
@given(st.integers(3, 150), st.integers(0, 2**40))
def test_any_shop_has_the_promised_size_and_every_fact_occurs(users: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shop = without_pictures(Path(folder), users, seed)
    items = list(shop.truth["items"].values())
    assert len(items) == min(COMBINATIONS, max(120, 4 * users))
    assert list(shop.truth["items"]) == [row["item_id"] for row in shop.items]
    for fact, values in (("kind", KINDS), ("colour", COLOURS), ("pattern", PATTERNS), ("collection", COLLECTIONS)):
        assert {item[fact] for item in items} == set(values)
    assert len({(item["kind"], item["colour"], item["pattern"]) for item in items}) == len(items)
    assert all(in_shop(item["kind"], item["colour"], item["pattern"]) for item in items)
    per_kind = Counter(item["kind"] for item in items)
    assert max(per_kind.values()) - min(per_kind.values()) <= 1
    assert sum(user["change"] is not None for user in shop.truth["users"].values()) == users // 3
    weighs = Counter(user["weighs"] for user in shop.truth["users"].values())
    assert sorted(weighs.values()) == sorted((users + spare) // 3 for spare in range(3))
    assert set(shop.log) == set(shop.truth["users"])
    for user, truth in shop.truth["users"].items():
        if truth["change"]:
            position, times = truth["change"]["position"], [time for _, time in shop.log[user]]
            assert 0.4 <= position / len(times) <= 0.7
            assert times[position - 1] < times[position] == truth["change"]["timestamp"]  # never a tie


def test_the_full_shop_has_two_patterns_of_every_kind_and_colour(large: Shop) -> None:
    items = large.truth["items"].values()
    patterns = Counter((item["kind"], item["colour"]) for item in items)
    assert len(patterns) == 14 * 8
    assert set(patterns.values()) == {2}
    assert set(Counter(item["pattern"] for item in items).values()) == {COMBINATIONS // 4}


def test_a_kind_has_all_colours_before_one_comes_twice(tmp_path: Path) -> None:
    items = without_pictures(tmp_path, 3, 4).truth["items"].values()  # 120 items: 8 or 9 of each of the 14 kinds
    for kind in KINDS:
        colours = Counter(item["colour"] for item in items if item["kind"] == kind)
        assert set(colours) == set(COLOURS)
        assert sorted(colours.values())[:7] == [1] * 7


def test_colour_and_pattern_stand_in_no_text(large: Shop) -> None:
    for row in large.items:
        words = set(re.findall(r"[a-z]+", " ".join((row["title"], row["description"], row["category"])).lower()))
        assert not words & COLOUR_WORDS, row
        assert not words & PATTERN_WORDS, row


def test_kind_material_and_collection_stand_in_the_text(large: Shop) -> None:
    titles = {row["title"] for row in large.items}
    assert len(titles) == len(large.items) == COMBINATIONS
    for row in large.items:
        facts = large.truth["items"][row["item_id"]]
        assert facts["kind"] in row["title"].lower()
        assert facts["material"] in row["description"]
        assert facts["collection"] in row["description"]
        department, _, shelf = row["category"].partition(", ")
        assert department and shelf
        assert facts["where"] == {
            "kind": "both",
            "colour": "picture",
            "pattern": "picture",
            "material": "text",
            "collection": "text",
        }


def test_a_material_belongs_to_one_group_and_every_kind_has_all_groups(large: Shop) -> None:
    groups = large.truth["material_groups"]
    assert len(groups) == 3
    everything = [material for materials in groups.values() for material in materials]
    assert len(everything) == len(set(everything))
    group_of = {material: group for group, materials in groups.items() for material in materials}
    seen = {(item["kind"], group_of[item["material"]]) for item in large.truth["items"].values()}
    assert len(seen) == 3 * len(KINDS)


def test_the_number_of_an_item_does_not_tell_its_facts(large: Shop) -> None:
    items = list(large.truth["items"].values())
    for fact, values in (("kind", KINDS), ("colour", COLOURS), ("pattern", PATTERNS)):
        numbers = np.array([values.index(item[fact]) for item in items])
        repeats = [float(np.mean(numbers[step:] == numbers[:-step])) for step in range(1, 33)]
        assert max(repeats) < 1 / len(values) + 0.12, fact


# Users


def test_histories_are_as_long_and_as_irregular_as_promised(large: Shop) -> None:
    lengths, gaps = [], []
    for events in large.log.values():
        items, times = [item for item, _ in events], [time for _, time in events]
        lengths.append(len(events))
        assert len(set(items)) == len(items)
        assert times == sorted(times)
        assert {datetime.fromtimestamp(time, UTC).year for time in times} == {2025}
        assert times[-1] - times[0] > 59 * 86400
        gaps += [later - earlier for earlier, later in pairwise(times)]
    assert set(lengths) <= set(range(8, 25))
    assert min(lengths) == 8 and max(lengths) == 24
    short = np.mean(np.array(gaps) < 86400)
    assert 0.15 < short < 0.5
    assert 0 < gaps.count(0) < 0.06 * len(gaps)


def test_a_change_lies_in_the_middle_and_its_time_is_that_of_the_log(large: Shop) -> None:
    changes = 0
    for user, truth in large.truth["users"].items():
        assert 2 <= len(truth["taste"]["kinds"]) <= 3
        if truth["change"] is None:
            continue
        changes += 1
        events, position = large.log[user], truth["change"]["position"]
        assert 0.4 <= position / len(events) <= 0.7
        assert events[position][1] == truth["change"]["timestamp"] > events[position - 1][1]
        old, new = truth["taste"], truth["change"]["taste"]
        assert not set(old["kinds"]) & set(new["kinds"])
        assert all(old[fact] != new[fact] for fact in ("colour", "pattern", "collection"))
        assert old["material_group"] == new["material_group"]
    assert changes == 66


def test_events_follow_the_taste_of_their_time(large: Shop) -> None:
    met: Counter[tuple[str, str]] = Counter()
    for user, truth in large.truth["users"].items():
        if truth["change"]:
            for position, (item, _) in enumerate(large.log[user]):
                when = "before" if position < truth["change"]["position"] else "after"
                for fact in ("kind", "colour", "pattern", "collection"):
                    met[when, "old"] += large.meets(item, truth["taste"], fact)
                    met[when, "new"] += large.meets(item, truth["change"]["taste"], fact)
    assert met["before", "old"] > 3 * met["before", "new"]
    assert met["after", "new"] > 3 * met["after", "old"]


def test_a_taste_is_visible_in_what_its_user_weighs_but_not_certain(large: Shop) -> None:
    # Chance is 1/8 for a colour or collection, 1/4 for a pattern, 1/3 for a group of materials.
    assert 0.45 < large.share("colour", "picture") < 0.9
    assert 0.45 < large.share("collection", "text") < 0.9
    assert 0.45 < large.share("pattern", "picture") < 0.9
    assert 0.5 < large.share("material", "text") < 0.9
    assert large.share("colour", "text") < 0.25
    assert large.share("collection", "picture") < 0.25
    for fact in ("colour", "collection"):
        assert 0.25 < large.share(fact, "both") < 0.7
    for weighs in ("picture", "text", "both"):
        assert large.share("kind", weighs) > 0.35  # chance is below 3/14


def make_item(popularity: float = 0.0, **facts: str) -> sample._Item:
    values = {"kind": "mug", "colour": "red", "pattern": "plain", "material_group": "natural", "collection": "retro"}
    return sample._Item(
        item_id="i", material="bamboo", title="", description="", popularity=popularity, **(values | facts)
    )


TASTE = sample._Taste(("hat", "mug"), "red", "plain", "natural", "retro")
WEIGHTS = {"kind": 1.0, "colour": 2.0, "pattern": 4.0, "material": 8.0, "collection": 16.0}


def test_utility_is_popularity_plus_the_weights_of_the_facts_met() -> None:
    items = [
        make_item(0.5),
        make_item(kind="hat"),
        make_item(kind="ball"),
        make_item(colour="blue"),
        make_item(pattern="dotted"),
        make_item(material_group="classic"),
        make_item(collection="urban"),
    ]
    assert TASTE.utility(items, WEIGHTS).tolist() == [31.5, 31, 30, 29, 27, 23, 15]


def test_choices_are_drawn_by_softmax_and_never_twice() -> None:
    generator = np.random.default_rng(0)
    # exp(log 3) : 1 : 1 is 3/5, 1/5, 1/5; once the first is gone, 1/2 each.
    items = [make_item(float(np.log(3))), make_item(), make_item()]
    draws = [sample._choose([TASTE] * 3, items, WEIGHTS, generator) for _ in range(4000)]
    assert all(sorted(drawn) == [0, 1, 2] for drawn in draws)
    assert np.mean([drawn[0] == 0 for drawn in draws]) == pytest.approx(0.6, abs=0.03)
    assert np.mean([drawn[1] == 1 for drawn in draws if drawn[0] == 0]) == pytest.approx(0.5, abs=0.04)


def check_taste(count: int, values: Callable[[sample._Taste], object]) -> float:
    generator = np.random.default_rng(1)
    seen = Counter(values(sample._draw_taste(None, generator)) for _ in range(count))
    return max(seen.values()) / count


def test_tastes_are_drawn_evenly() -> None:
    assert check_taste(2000, lambda taste: taste.colour) < 0.16
    assert check_taste(2000, lambda taste: taste.pattern) < 0.29
    assert check_taste(2000, lambda taste: taste.collection) < 0.16
    assert check_taste(2000, lambda taste: taste.material_group) < 0.38

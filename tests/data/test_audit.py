"""Every planted defect of the data is found and counted, and a clean twin of it is not accused."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import Event, make_dataset
from mllm_srec.config import Config
from mllm_srec.data.audit import DAY, SEVERITIES, Finding, audit
from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers import read
from mllm_srec.data.schema import SKIPPED
from mllm_srec.data.split import leave_last_out
from mllm_srec.ingest import ITEM_PICTURES
from mllm_srec.workspace import Workspace

START, NOW = 1_600_000_000_000, 1_700_000_000_000
CLEAN = {"u0": "abcd", "u1": "bcda", "u2": "cdab", "u3": "dabc"}
"""Every item is as popular as any other, and stands at every place."""


def events(items: str) -> list[Event]:
    """One a day, with ratings 1, 2, 3, ..."""
    return [(item, START + n * DAY, float(n + 1)) for n, item in enumerate(items)]


def shop(log: Mapping[str, str | Sequence[Event]], items: Sequence[Mapping[str, str]] = ()) -> Dataset:
    """Users with their items as letters or as events; without `items`, all that occur, with texts."""
    listed = {user: events(of) if isinstance(of, str) else list(of) for user, of in log.items()}
    known = sorted({event[0] for of in listed.values() for event in of})
    made = items or [{"item_id": i, "title": f"title {i}", "description": f"about {i}"} for i in known]
    return make_dataset(Path(), made, listed)


def facts(
    dataset: Dataset, pictures: pl.DataFrame | None = None, tie_rule: str = "file_order", min_history: int = 3
) -> dict[str, Finding]:
    found = audit(dataset, leave_last_out(dataset.histories(), tie_rule, min_history), pictures, NOW)
    names = [finding.name for finding in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def told(finding: Finding) -> tuple[str, int, int, tuple[str, ...]]:
    return finding.severity, finding.count, finding.of, finding.examples


def test_a_clean_shop_is_accused_of_nothing() -> None:
    pictures = pl.DataFrame([(item, item * 64, "ok", "") for item in "abcd"], schema=ITEM_PICTURES, orient="row")
    found = facts(shop(CLEAN), pictures)
    assert {name: finding for name, finding in found.items() if finding.severity != "ok"} == {}
    assert all(finding.remedy == "" and finding.examples == () for finding in found.values())
    assert list(found) == [
        *("time_order", "popularity_order", "last_ties", "ties", "times_at_zero", "times_in_future"),
        *("repeats", "duplicate_rows", "duplicate_users", "constant_ratings", "skipped_rows"),
        *("missing_text", "duplicate_items", "unused_items"),
        *("missing_pictures", "broken_pictures", "duplicate_pictures"),
        *("short_histories", "targets_without_history", "cold_training", "cold_validation", "cold_test"),
        "repeated_targets",
    ]


def test_figures_are_told_in_words() -> None:
    finding = Finding("n", "note", "s", 1, 8, "users", "r", {"by chance": 0.25, "groups": 12345})
    assert finding.figure == "1 of 8 users (12.5%); by chance 0.25; groups 12,345"
    assert Finding("n", "ok", "s", 0, 0, "ratings", "").figure == "0 of 0 ratings"


# Order


def test_a_history_that_runs_backwards_is_an_error() -> None:
    clean = shop(CLEAN)
    backwards = pl.when(pl.col("user_id") == "u2").then(pl.col("timestamp").reverse().over("user_id"))
    log = clean.interactions.with_columns(timestamp=backwards.otherwise("timestamp"))
    assert told(facts(replace(clean, interactions=log))["time_order"]) == ("error", 1, 4, ("u2",))


def test_without_times_the_order_is_the_files_word() -> None:
    untimed = shop({user: [(item, None, None) for item in items] for user, items in CLEAN.items()})
    found = facts(untimed)
    assert told(found["time_order"]) == ("note", 4, 4, ())
    assert not {"last_ties", "ties", "times_at_zero", "times_in_future", "duplicate_rows"} & set(found)


def crowd(order: str, users: int = 80, length: int = 11) -> Dataset:
    """Users who each choose 11 of 80 items, some far more popular than others, and how their histories are ordered."""
    generator = np.random.default_rng(3)
    weights = 1 / np.arange(1.0, 81.0)
    chosen = [generator.choice(80, length, replace=False, p=weights / weights.sum()) for _ in range(users)]
    popularity = np.bincount(np.concatenate(chosen), minlength=80)
    log: dict[str, list[Event]] = {}
    for user, items in enumerate(chosen):
        key = generator.random(length)
        if order != "random":
            # Published histories are sorted by a popularity that was counted elsewhere: nine pairs in ten agree.
            noise = generator.normal(0, 0.1, length) if order == "nearly" else 0
            key = np.log(popularity[items]) * (1 if order == "rising" else -1) + noise
        log[f"u{user:02}"] = [(f"i{item:02}", START + n * DAY, None) for n, item in enumerate(items[key.argsort()])]
    return shop(log)


@pytest.mark.parametrize(("order", "least"), [("falling", 0.99), ("rising", 0.99), ("nearly", 0.95)])
def test_popularity_ordered_histories_are_an_error(order: str, least: float) -> None:
    found = facts(crowd(order))["popularity_order"]
    assert found.severity == "error"
    assert found.of == 80
    assert found.count >= least * 80
    assert len(found.examples) == 3
    falling = found.figures["neighbours in falling popularity"]
    assert (falling < 0.01) if order == "rising" else (falling > 0.8)
    assert found.figures["share by chance"] < 0.03


def test_histories_in_random_order_are_not_accused_of_popularity_order() -> None:
    found = facts(crowd("random"))["popularity_order"]
    assert found.severity == "ok"
    assert found.count <= 3
    assert found.figures["neighbours in falling popularity"] == pytest.approx(0.5, abs=0.05)


def test_short_histories_that_are_sorted_by_chance_are_not_accused() -> None:
    # Of three items of unequal popularity a third of all orders is sorted.
    popular = {f"x{n}": "ab"[: 1 + n % 2] for n in range(12)}
    orders = {f"u{n}": order for n, order in enumerate(["abc", "acb", "bac", "bca", "cab", "cba"])}
    found = facts(shop({**popular, **orders}))["popularity_order"]
    assert found.severity == "ok"
    assert found.count / found.of == pytest.approx(found.figures["share by chance"], abs=0.2)
    assert found.count > 0


def test_three_short_histories_are_too_few_to_accuse() -> None:
    log = {"x": "ab", "y": "a", "u1": "abc", "u2": "abc", "u3": "abc"}
    found = facts(shop(log))["popularity_order"]
    assert told(found) == ("ok", 3, 3, ())
    many = {f"u{n:02}": "abc" for n in range(30)}
    assert facts(shop(log | many))["popularity_order"].severity == "error"


# Times


def at(*steps: int) -> list[Event]:
    return [("abcdefgh"[n], START + 1000 * step, None) for n, step in enumerate(steps)]


def test_ties_by_hand() -> None:
    found = facts(shop({"last": at(0, 7, 7), "first": at(0, 0, 7), "none": at(0, 7, 14)}))
    assert told(found["last_ties"]) == ("warning", 1, 3, ("last",))
    assert told(found["ties"]) == ("note", 2, 6, ("first", "last"))
    few = {f"u{n}": at(0, 7, 14) for n in range(19)}
    assert facts(shop({**few, "last": at(0, 7, 7)}))["last_ties"].severity == "note", "one of twenty"


@pytest.mark.parametrize(("step", "precision"), [(86_400, 86_400), (7_200, 3_600), (120, 60), (7, 1)])
def test_the_precision_of_times(step: int, precision: float) -> None:
    found = facts(shop({"a": at(5, 5 + step, 5 + 3 * step)}))["ties"]
    assert found.figures["precision in seconds"] == precision


def test_times_that_cannot_be() -> None:
    found = facts(shop({**CLEAN, "early": [("a", 0, None), ("b", START, None)], "late": [("a", NOW + 1, None)]}))
    assert told(found["times_at_zero"]) == ("warning", 1, 19, ("early",))
    assert told(found["times_in_future"]) == ("warning", 1, 19, ("late",))
    edges = facts(shop({**CLEAN, "edges": [("a", DAY, None), ("a", NOW, None)]}))
    assert edges["times_at_zero"].severity == edges["times_in_future"].severity == "ok"


# Repeats and copies


def test_repeats_are_counted_whether_they_are_kept_or_dropped() -> None:
    kept = shop({**CLEAN, "u4": "aaba"})
    assert told(facts(kept)["repeats"]) == ("note", 2, 20, ("u4 a", "u4 a"))
    assert told(facts(kept)["repeated_targets"]) == ("warning", 1, 5, ("u4",))
    dropped = facts(kept.with_repeats("first"))
    assert told(dropped["repeats"]) == ("note", 2, 20, ())
    assert dropped["repeats"].figures == {"dropped": 2}
    assert dropped["repeated_targets"].severity == "ok"


def test_rows_that_stand_twice() -> None:
    found = facts(shop({**CLEAN, "u4": [*events("abcd"), events("abcd")[1]]}))
    assert told(found["duplicate_rows"]) == ("warning", 1, 21, ("u4 b",))
    assert facts(shop({**CLEAN, "u4": "abcda"}))["duplicate_rows"].severity == "ok", "another day"


def test_a_duplicated_user_is_found() -> None:
    found = facts(shop({**CLEAN, "copy": CLEAN["u1"]}))
    assert told(found["duplicate_users"]) == ("warning", 2, 5, ("copy = u1",))


def test_a_copy_may_order_ties_otherwise() -> None:
    one = [("a", START, None), ("b", START, None), ("c", START + DAY, None)]
    other = [one[1], one[0], one[2]]
    assert facts(shop({"one": one, "other": other}))["duplicate_users"].count == 2
    untimed = {user: [(item, None, None) for item, *_ in of] for user, of in (("one", one), ("other", other))}
    assert facts(shop(untimed))["duplicate_users"].count == 0, "without times another order is another history"


def test_two_items_in_common_make_no_copy() -> None:
    assert facts(shop({**CLEAN, "x": "ab", "y": "ab"}))["duplicate_users"].severity == "ok"


# Rows, ratings, items


def test_ratings_that_do_not_differ() -> None:
    fives = shop({"a": [(item, START + n, 5.0) for n, item in enumerate("abc")]})
    assert told(facts(fives)["constant_ratings"]) == ("note", 3, 3, ())
    assert told(facts(shop({"a": at(0, 1, 2)}))["constant_ratings"]) == ("ok", 0, 0, ())


def test_rows_that_were_skipped() -> None:
    skipped = pl.DataFrame([("log.csv", 7, "timestamp", "the time is missing")], schema=SKIPPED, orient="row")
    found = facts(replace(shop(CLEAN), skipped=skipped))["skipped_rows"]
    assert told(found) == ("warning", 1, 21, ("log.csv:7",))


def test_texts_that_are_missing_or_stand_twice() -> None:
    items = [
        {"item_id": "a", "title": "Strap Top", "description": "Jersey, soft."},
        {"item_id": "b", "title": "strap  top!", "description": "jersey soft"},
        {"item_id": "c", "title": "Strap Top", "description": "Linen."},
        {"item_id": "d", "title": "", "description": ""},
        {"item_id": "e", "title": " ", "description": ""},
        {"item_id": "f", "title": "Hat", "description": ""},
    ]
    found = facts(shop(CLEAN, items))
    assert told(found["duplicate_items"]) == ("warning", 2, 6, ("a = b",))
    assert told(found["missing_text"]) == ("warning", 2, 6, ("d", "e"))
    assert found["missing_text"].figures == {"without title": 2, "without description": 3}
    assert told(found["unused_items"]) == ("note", 2, 6, ("e", "f"))


def test_pictures_that_are_missing_broken_or_shared() -> None:
    rows = [
        *(("a", "1" * 64, "ok", ""), ("b", "2" * 64, "ok", ""), ("c", "1" * 64, "ok", ""), ("d", "1" * 64, "ok", "")),
        *(("e", None, "none", ""), ("f", None, "remote", "a URL"), ("g", None, "truncated", "cut")),
    ]
    found = facts(shop(CLEAN), pl.DataFrame(rows, schema=ITEM_PICTURES, orient="row"))
    assert told(found["missing_pictures"]) == ("warning", 2, 7, ("e", "f"))
    assert found["missing_pictures"].figures == {"none": 1, "remote": 1}
    assert told(found["broken_pictures"]) == ("warning", 1, 7, ("g: truncated",))
    assert told(found["duplicate_pictures"]) == ("warning", 3, 4, ("a = c = d",))
    assert found["duplicate_pictures"].figures == {"files": 1}


# Targets


def test_cold_targets_by_hand() -> None:
    # Of u4: test target y, validation target x, training target b. What it does not share with others is cold.
    found = facts(shop({**CLEAN, "u4": "abxy"}))
    assert told(found["cold_test"]) == ("warning", 1, 5, ("y",))
    assert told(found["cold_validation"]) == ("warning", 1, 5, ("x",))
    assert told(found["cold_training"]) == ("ok", 0, 5, ())
    # z is two users' last item and no other's: it occurs twice, and never where it may be seen.
    both = facts(shop({**CLEAN, "u4": "abcz", "u5": "bcdz"}))["cold_test"]
    assert told(both) == ("warning", 2, 6, ("z",))
    assert both.figures == {"items": 1}


def test_short_histories() -> None:
    found = facts(shop({**CLEAN, "u4": "ab"}))
    assert told(found["short_histories"]) == ("note", 1, 5, ("u4",))
    assert found["targets_without_history"].count == 0
    nobody = facts(shop({"a": "ab", "b": "ba"}))["short_histories"]
    assert told(nobody) == ("error", 2, 2, ("a", "b"))
    assert nobody.remedy == "there is no test target: give a longer log"


def test_targets_to_which_a_tie_hides_everything() -> None:
    found = facts(shop({**CLEAN, "tied": at(0, 0, 0)}), tie_rule="strict")["targets_without_history"]
    assert told(found) == ("warning", 2, 10, ())


logs = st.dictionaries(
    st.sampled_from(["u1", "u2", "u3", "u4"]),
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.integers(0, NOW + DAY), st.sampled_from([None, 1.0, 5.0])),
        min_size=1,
        max_size=8,
    ),
    min_size=1,
)


@given(logs)
def test_counts_and_figures_are_sound_for_any_log(log: dict[str, list[Event]]) -> None:
    for finding in facts(shop(log)).values():
        assert 0 <= finding.count <= finding.of
        assert len(finding.examples) <= 3
        assert (finding.severity == "ok") == (finding.remedy == "")
        assert finding.severity in SEVERITIES
        values: list[Any] = list(asdict(finding)["figures"].values())
        assert np.isfinite(values).all()


# Real data


@pytest.mark.data
def test_known_facts_of_movielens(real_data: Path, tmp_path: Path) -> None:
    dataset = read(real_data / "ml100k_posters").with_repeats("first")
    workspace = Workspace.create(tmp_path / "ws", Config(), dataset)
    found = facts(workspace.dataset(), workspace.pictures())
    assert found["last_ties"].of == 943
    assert found["last_ties"].count / 943 == pytest.approx(0.44, abs=0.005)
    # Seven and Seven Samurai, two films called Clean Slate.
    assert told(found["duplicate_pictures"]) == ("note", 4, 1424, ("47 = 2019", "433 = 681"))
    for name in ("time_order", "popularity_order", "duplicate_users", "times_at_zero", "times_in_future"):
        assert found[name].severity == "ok", name


@pytest.mark.data
def test_known_facts_of_the_fashion_sample(real_data: Path) -> None:
    raw = read(real_data / "hm_sample")
    kept, found = facts(raw), facts(raw.with_repeats("first"))
    assert told(kept["last_ties"])[:3] == ("warning", 569, 900), "63 %"
    assert told(found["last_ties"])[:3] == ("warning", 558, 900)
    assert found["ties"].figures == {"precision in seconds": 86_400}
    assert told(found["cold_test"])[1:3] == (72, 900)
    assert (found["repeats"].count, found["repeats"].of) == (15_844 - 15_175, 15_844)
    for name in ("time_order", "popularity_order", "duplicate_users", "times_at_zero", "times_in_future"):
        assert found[name].severity == "ok", name

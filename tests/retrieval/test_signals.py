import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec import metrics
from mllm_srec.data.readers import read
from mllm_srec.data.split import leave_last_out
from mllm_srec.retrieval import CoOccurrence, Likeness, Trend, signals
from small_logs import ITEMS, all_of, log, places

DAY = 86_400_000


def dense(fitted: CoOccurrence) -> np.ndarray:
    matrix = np.zeros((len(ITEMS), len(ITEMS)))
    for item in range(len(ITEMS)):
        company, strength = fitted.company(item)
        matrix[item, company] = strength
    return matrix


def test_cooccurrence_by_hand() -> None:
    # popularity: a 3, b 2, c 1; pairs: ab twice, ac and bc once
    fitted = CoOccurrence.fit(log("abc", "ba", "a"), all_of(log("abc", "ba", "a")))
    np.testing.assert_array_equal(fitted.popularity, [3, 2, 1, 0, 0, 0])
    expected = np.zeros((6, 6))
    expected[0, 1] = expected[1, 0] = 2 / np.sqrt(6)
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(3)
    expected[1, 2] = expected[2, 1] = 1 / np.sqrt(2)
    np.testing.assert_allclose(dense(fitted), expected, rtol=1e-6)
    scores = fitted.scores([places("bc"), places("")])
    np.testing.assert_allclose(scores[0, 0], 2 / np.sqrt(6) + 1 / np.sqrt(3) + 3e-6, rtol=1e-6)
    np.testing.assert_allclose(scores[1], 1e-6 * fitted.popularity)
    assert scores.dtype == np.float32


def test_only_the_last_five_items_speak() -> None:
    histories = log("ab", "cd")
    fitted = CoOccurrence.fit(histories, all_of(histories))
    near, far = fitted.scores([places("afedc"), places("afedce")])
    assert near[1] > 0.5, "a is the fifth newest"
    assert far[1] < 0.5, "a is the sixth newest"


def test_pairs_stand_at_most_ten_apart_in_the_last_fifty() -> None:
    filler = "cdcdcdcdc"
    for between, counted in ((9, True), (10, False)):
        histories = log("a" + (filler + "d")[:between] + "b")
        assert bool(dense(CoOccurrence.fit(histories, all_of(histories)))[0, 1]) is counted
    for after, counted in ((48, True), (49, False)):
        histories = log("ab" + "c" * after)
        assert bool(dense(CoOccurrence.fit(histories, all_of(histories)))[0, 1]) is counted


def test_an_event_that_must_not_be_seen_leaves_no_trace() -> None:
    histories = log("abf", "cdf")
    seen = np.array([True, True, False, True, True, False])
    fitted = CoOccurrence.fit(histories, seen)
    assert fitted.popularity[5] == 0
    assert not dense(fitted)[5].any()
    np.testing.assert_array_equal(dense(fitted), dense(CoOccurrence.fit(log("ab", "cd"), np.ones(4, dtype=bool))))


@given(st.lists(st.text("abcdef", min_size=1, max_size=14), min_size=1, max_size=5))
def test_cooccurrence_equals_the_plain_count(users: list[str]) -> None:
    histories = log(*users)
    count, popularity = np.zeros((6, 6)), np.zeros(6)
    for user in users:
        for at, one in enumerate(user):
            popularity[ITEMS.index(one)] += 1
            for other in user[at + 1 : at + 11]:
                if one != other:
                    count[ITEMS.index(one), ITEMS.index(other)] += 1
                    count[ITEMS.index(other), ITEMS.index(one)] += 1
    norm = np.sqrt(np.outer(popularity, popularity))
    expected = np.divide(count, norm, out=np.zeros_like(count), where=norm > 0)
    np.testing.assert_allclose(dense(CoOccurrence.fit(histories, all_of(histories))), expected, rtol=1e-6)


def test_company_is_named_once_with_the_root_of_its_sum() -> None:
    fitted = CoOccurrence.fit(log("abc", "ba", "a"), all_of(log("abc", "ba", "a")))
    items, values = fitted.named(places("bc"))
    assert sorted(items.tolist()) == [0, 1, 2]
    np.testing.assert_allclose(
        values[np.argsort(items)], np.sqrt([2 / np.sqrt(6) + 1 / np.sqrt(3), 1 / np.sqrt(2), 1 / np.sqrt(2)]), rtol=1e-6
    )
    for nothing in ("", "e"):
        assert [len(of) for of in fitted.named(places(nothing))] == [0, 0]


# Likeness


def test_likeness_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], dtype=np.float32)
    fitted = Likeness(vectors)
    for near, cosine in fitted.neighbours(np.array([0, 0])):
        assert near.tolist() == [0, 2, 1, 3]
        np.testing.assert_allclose(cosine, [1, 0.6, 0, 0], rtol=1e-6)
    scores = fitted.scores([np.array([0]), np.array([0, 1]), np.array([], dtype=int)])
    np.testing.assert_allclose(scores[0], [1, 0, 0.6**5, 0], rtol=1e-5)
    np.testing.assert_allclose(scores[1], [0.8, 1, 0.8 * 0.6**5 + 0.8**5, 0], rtol=1e-5)
    np.testing.assert_array_equal(scores[2], 0)


def test_only_the_last_ten_items_have_likes() -> None:
    fitted = Likeness(np.eye(6, dtype=np.float32))
    near, far = fitted.scores([places("a" + "b" * 9), places("a" + "b" * 10)])
    assert near[0] == pytest.approx(0.8**9)
    assert far[0] == 0


@pytest.mark.parametrize("cells", [1, 12, 1 << 24])
def test_the_likest_are_kept_whatever_the_block(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "BLOCK_CELLS", cells)
    monkeypatch.setattr(signals, "NEIGHBOURS", 3)
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fitted = Likeness(vectors)
    fitted.neighbours(np.array([4]))
    for item, (near, cosine) in enumerate(fitted.neighbours(np.arange(7))):
        whole = vectors @ vectors[item]
        assert near.tolist() == np.argsort(-whole, kind="stable")[:3].tolist()
        np.testing.assert_allclose(cosine, whole[near].clip(0), rtol=1e-5)


# Trend


def test_a_trend_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = log("ab", "ac", times=True)  # a, a at day 0; b, c at day 1
    fitted = Trend.fit(histories, all_of(histories))
    assert fitted.moments.tolist() == [0, DAY, DAY + 1]
    faded = math.exp(-1 / 7)
    np.testing.assert_allclose(fitted.values[0], np.zeros(6))
    np.testing.assert_allclose(fitted.values[1], np.sqrt([2 * faded, 0, 0, 0, 0, 0]), rtol=1e-6)
    np.testing.assert_allclose(fitted.values[2], np.sqrt([2 * faded, 1, 1, 0, 0, 0]), rtol=1e-6)
    assert fitted.at(np.array([-5, 0, DAY, DAY + 9]), 4).tolist() == [0, 0, 1, 2]
    assert fitted.at(None, 2).tolist() == [2, 2]


def test_a_trend_without_times_is_popularity() -> None:
    histories = log("ab", "ac")
    fitted = Trend.fit(histories, all_of(histories))
    np.testing.assert_allclose(fitted.values, np.sqrt([[2, 1, 1, 0, 0, 0]]), rtol=1e-6)
    assert fitted.at(None, 1).tolist() == [0]


@given(st.lists(st.tuples(st.sampled_from(ITEMS), st.integers(0, 40)), min_size=2, max_size=12), st.integers(0, 45))
def test_a_trend_never_tells_of_what_is_not_over(events: list[tuple[str, int]], now: int) -> None:
    histories = log("".join(item for item, _ in events), times=True)
    moments = np.sort(np.array([day * DAY for _, day in events]))
    histories = replace(histories, time=moments)
    later = replace(histories, item=np.where(moments >= now * DAY, 5, histories.item))
    one, other = (Trend.fit(of, all_of(of)) for of in (histories, later))
    asked = np.array([now * DAY])
    np.testing.assert_array_equal(one.values[one.at(asked, 1)], other.values[other.at(asked, 1)])


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "popularity", "company"),
    [("ml100k_posters", (0.0859, 0.0444), (0.2057, 0.1042)), ("hm_sample", (0.0115, 0.0050), (0.0353, 0.0206))],
)
def test_real_figures(
    real_data: Path, name: str, popularity: tuple[float, float], company: tuple[float, float]
) -> None:
    # Recall@10 and NDCG@10 that the data's README gives under the same rules.
    histories = read(real_data / name).with_repeats("first").histories()
    split = leave_last_out(histories, "file_order", 3)
    fitted = CoOccurrence.fit(histories, split.seen_test)
    seen = [histories.of(int(u), int(e)) for u, e in zip(split.test.user, split.test.end, strict=True)]
    wanted = histories.item[histories.offsets[split.test.user] + split.test.position]
    for scores, expected in (
        (np.repeat(fitted.popularity[None], len(seen), 0), popularity),
        (fitted.scores(seen), company),
    ):
        places_ = metrics.places(scores, wanted, seen)
        found = (float(metrics.recall(*places_, 10).mean()), float(metrics.ndcg(*places_, 10).mean()))
        assert found == pytest.approx(expected, abs=5e-5)

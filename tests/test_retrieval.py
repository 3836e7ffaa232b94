from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec import metrics
from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.readers import read
from mllm_srec.data.split import leave_last_out
from mllm_srec.errors import DataError
from mllm_srec.retrieval import Content, CoOccurrence, Retriever, choose_content_weight

ITEMS = "abcdef"


def log(*users: str) -> Histories:
    """One string of items per user, oldest first."""
    rows = [(f"u{n}", item) for n, items in enumerate(users) for item in items]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    items = pl.DataFrame({"item_id": list(ITEMS)})
    return Dataset.build("shop", items, frame, has_time=False, root=None).histories()


def all_of(histories: Histories) -> np.ndarray:
    return np.ones(len(histories.item), dtype=bool)


def places(items: str) -> np.ndarray:
    return np.array([ITEMS.index(item) for item in items], dtype=np.int32)


def dense(fitted: CoOccurrence) -> np.ndarray:
    matrix = np.zeros((len(ITEMS), len(ITEMS)))
    for item in range(len(ITEMS)):
        company, strength = fitted.company(item)
        matrix[item, company] = strength
    return matrix


VECTORS = np.eye(6, dtype=np.float32)


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


def test_content_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    scores = Content(vectors).scores([np.array([0]), np.array([0, 1]), np.array([], dtype=int)])
    np.testing.assert_allclose(scores[0], [1, 0, 0.6**3], rtol=1e-6)
    np.testing.assert_allclose(scores[1], [0.8, 1, 0.8 * 0.6**3 + 0.8**3], rtol=1e-6)
    np.testing.assert_array_equal(scores[2], 0)


def test_candidates_leave_the_history_out_and_are_sorted() -> None:
    histories = log("abc", "abd", "e")
    retriever = Retriever.fit(histories, all_of(histories), VECTORS, 0.5)
    history = [places("a"), places("ab")]
    items, scores = retriever.candidates(history, 4)
    assert items.dtype == np.int32
    full = retriever.scores(history)
    for row, values, all_scores, own in zip(items, scores, full, history, strict=True):
        assert not set(row) & set(own)
        np.testing.assert_array_equal(values, all_scores[row])
        left = np.delete(np.arange(6), own)
        best = sorted(left, key=lambda i: (-all_scores[i], i))[:4]
        assert row.tolist() == best
    with pytest.raises(DataError, match="only 4 items are left to recommend, 5 are asked for"):
        retriever.candidates(history, 5)


def test_the_weight_counts() -> None:
    histories = log("ab", "ab", "c")
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=np.float32)
    company = Retriever.fit(histories, all_of(histories), vectors, 0.0)
    content = Retriever.fit(histories, all_of(histories), vectors, 10.0)
    assert company.candidates([places("a")], 1)[0].item() == 1
    assert content.candidates([places("a")], 1)[0].item() == 2
    np.testing.assert_allclose(
        content.scores([places("a")]) - company.scores([places("a")]),
        10 * content.content.scores([places("a")]),
        rtol=1e-6,
    )


@given(st.integers(0, 1000), st.integers(1, 3))
def test_negatives_are_fresh_and_seeded(seed: int, count: int) -> None:
    histories = log("abc", "bcd")
    retriever = Retriever.fit(histories, all_of(histories), VECTORS, 1.0)
    seen, targets = [places("ab"), places("f")], places("ca")
    negatives = retriever.negatives(seen, targets, count, seed)
    assert negatives.shape == (2, count)
    for row, own, target in zip(negatives.tolist(), seen, targets.tolist(), strict=True):
        assert len(set(row)) == count
        assert not set(row) & {*own.tolist(), target}
    np.testing.assert_array_equal(negatives, retriever.negatives(seen, targets, count, seed))


def test_half_of_the_negatives_are_hard() -> None:
    users, catalogue = 40, 400
    ids = [f"i{n:03}" for n in range(catalogue)]
    rows = [(f"u{u:02}", ids[n]) for u in range(users) for n in (0, *range(1 + u % 8, 9 + u % 8))]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    histories = Dataset.build("shop", pl.DataFrame({"item_id": ids}), frame, has_time=False, root=None).histories()
    retriever = Retriever.fit(histories, all_of(histories), np.eye(catalogue, dtype=np.float32), 0.0)
    seen = [np.array([0], dtype=np.int32)] * 50
    negatives = retriever.negatives(seen, np.full(50, 399), 4, 0)
    best = set(retriever.candidates(seen[:1], 16)[0][0].tolist())
    hard = np.isin(negatives, list(best)).sum(1)
    assert (hard >= 2).all()
    assert hard.mean() < 3, "the other half comes from the whole catalogue"


def test_too_small_a_catalogue_has_no_negatives() -> None:
    histories = log("abc")
    retriever = Retriever.fit(histories, all_of(histories), VECTORS, 1.0)
    with pytest.raises(DataError, match=r"only 2 items can be negatives, 3 are asked for: lower training\.negatives"):
        retriever.negatives([places("abc")], places("d"), 3, 0)


def test_nearest_events_names_company_and_kin_or_nothing() -> None:
    histories = log("abc", "ab", "d")
    vectors = np.array([[1, 0], [0, 1], [0.8, 0.6], [1, 0], [0, -1], [-1, 0]], dtype=np.float32)
    retriever = Retriever.fit(histories, all_of(histories), vectors, 1.0)
    # bc and ac: 1/sqrt(2) each; the cosine of a and d is 0.8: among equals the newest counts
    assert retriever.nearest_events(places("dab"), 2) == (1, 0)
    assert retriever.nearest_events(places("d"), 4) == (None, None)
    assert retriever.nearest_events(places(""), 0) == (None, None)


def test_nothing_seen_is_an_error() -> None:
    histories = log("abc")
    with pytest.raises(DataError, match="no event is left to fit the retriever on"):
        Retriever.fit(histories, np.zeros(3, dtype=bool), VECTORS, 1.0)


def test_validation_chooses_the_signal_that_finds_its_targets() -> None:
    # Every user's validation item is the content twin (a-b, c-d, e-f) of the one before; company says nothing.
    twins = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    histories = log("eabc", "acda", "cefa", "eabd")
    split = leave_last_out(histories, "file_order", 3)
    assert choose_content_weight(histories, split, twins, (0.0, 8.0)) == 8.0
    # Identical vectors say nothing, so no weight is better than the smallest.
    same = np.ones((6, 1), dtype=np.float32)
    assert choose_content_weight(histories, split, same, (4.0, 0.0, 2.0)) == 0.0


def test_without_validation_the_weight_is_the_one_nearest_to_one() -> None:
    histories = log("ab")
    split = leave_last_out(histories, "file_order", 3)
    assert choose_content_weight(histories, split, VECTORS, (0.0, 0.5, 4.0)) == 0.5


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

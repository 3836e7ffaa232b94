import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.errors import DataError
from mllm_srec.retrieval import Likeness, Mix, Retriever, sequence, signals
from small_logs import all_of, log, places

EYE = np.eye(6, dtype=np.float32)
COMPANY = Mix(0.0, 0.0, 0.0, 0)


def fitted(histories: Histories, vectors: np.ndarray = EYE, mix: Mix = COMPANY, repeats: bool = False) -> Retriever:
    encoder = sequence.fit(histories, all_of(histories), vectors, mix.epochs, 0) if mix.epochs else None
    return Retriever.fit(histories, all_of(histories), Likeness(vectors), mix, encoder, repeats)


def standardised(row: np.ndarray) -> np.ndarray:
    return row / row.std() if row.std() > 1e-9 else np.zeros_like(row)


@pytest.mark.parametrize("mix", [COMPANY, Mix(2.0, 0.5, 4.0, 2), Mix(0.0, 1.0, 0.0, 2), Mix(1.0, 0.0, 0.25, 2)])
def test_a_score_is_the_sum_of_signals_in_their_deviations(mix: Mix) -> None:
    histories = log("abcd", "bcda", "aef", "fab", times=True)
    vectors = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    of = fitted(histories, vectors, mix)
    day = 86_400_000
    asked = Queries(
        [places("ab"), places("f"), places("")],
        [np.array([0, day]), np.array([0]), np.array([], dtype=np.int64)],
        np.array([2 * day, 9 * day, 0]),
    )
    together = np.sqrt(np.maximum(of.cooccurrence.scores(asked) - 1e-6 * of.popularity, 0))
    alike, trend = of.likeness.scores(asked), of.trend.values[of.trend.at(asked.now, 3)]
    for at, row in enumerate(of.scores(asked)):
        expected = standardised(np.where(together[at] > 1e-4, together[at], 0)) + 1e-4 * of.popularity / 3
        expected += mix.content * standardised(alike[at]) + mix.trend * standardised(trend[at])
        expected += mix.sequence * standardised(of.encoder_scores(asked)[at])
        # What is the same for all items of a user changes no order.
        np.testing.assert_allclose(row - row.mean(), expected - expected.mean(), atol=2e-5)


def test_nobody_knows_is_ordered_by_popularity() -> None:
    of = fitted(log("abc", "ab", "b"), mix=Mix(1.0, 1.0, 1.0, 1))
    items, _ = of.mixed(Mix(1.0, 1.0, 0.0, 1)).candidates([places("")], 3)
    assert items.tolist() == [[1, 0, 2]]


def test_candidates_leave_the_history_out_and_are_sorted() -> None:
    of = fitted(log("abc", "abd", "e"), mix=Mix(0.5, 0.0, 0.0, 0))
    history = [places("a"), places("ab")]
    items, scores = of.candidates(history, 4)
    assert items.dtype == np.int32
    full = of.scores(history)
    for row, values, all_scores, own in zip(items, scores, full, history, strict=True):
        assert not set(row) & set(own)
        np.testing.assert_array_equal(values, all_scores[row])
        left = np.delete(np.arange(6), own)
        assert row.tolist() == sorted(left, key=lambda i: (-all_scores[i], i))[:4]
    with pytest.raises(DataError, match="only 4 items are left to recommend, 5 are asked for"):
        of.candidates(history, 5)


def test_repeats_are_recommended_where_they_may_be() -> None:
    histories = log("abab", "ab")
    history = [places("ab")]
    assert fitted(histories).candidates(history, 4)[0].tolist() == [[2, 3, 4, 5]]
    items, _ = fitted(histories, repeats=True).candidates(history, 6)
    assert set(items[0, :2]) == {0, 1}


@pytest.mark.parametrize("cells", [1, 18])
def test_blocks_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of = fitted(log("abc", "bcd", "def", times=True), mix=Mix(1.0, 1.0, 1.0, 2))
    asked = [places("ab"), places("c"), places("fed"), places("a"), places("e")]
    whole = of.candidates(asked, 3)
    monkeypatch.setattr(signals, "BLOCK_CELLS", cells)
    for one, other in zip(whole, of.candidates(asked, 3), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_the_best_are_those_of_a_stable_sort(rows: list[list[int]], k: int) -> None:
    scores = np.array(rows, dtype=np.float32)
    items, values = signals.best(scores, k)
    np.testing.assert_array_equal(items, np.argsort(-scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(values, np.take_along_axis(scores, items, 1))


def test_a_new_item_is_found_by_its_content() -> None:
    # f stands in no event; its text is that of e.
    vectors = EYE.copy()
    vectors[5] = vectors[4]
    of = fitted(log("abe", "bae", "ab"), vectors, Mix(1.0, 0.0, 0.0, 0))
    assert of.candidates([places("e")], 1)[0].item() != 5, "company comes first"
    assert of.mixed(Mix(4.0, 0.0, 0.0, 0)).candidates([places("e")], 1)[0].item() == 5


@pytest.mark.parametrize("timed", [False, True])
def test_a_score_falls_by_what_is_missing_without_an_event(timed: bool) -> None:
    histories = log("abcd", "bcda", "aef", "fab", times=True)
    vectors = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    of, day = fitted(histories, vectors, Mix(2.0, 0.5, 4.0, 2)), 86_400_000
    history, times = places("abac"), np.array([0, 1, 2, 5]) * day

    def asked(kept: list[int]) -> Queries:
        return Queries([history[kept]], [times[kept]], np.array([6 * day])) if timed else Queries([history[kept]])

    falls = of.falls(asked([0, 1, 2, 3]), [4, 5])
    assert falls.shape == (2, 4) and falls.any()
    whole = of.scores(asked([0, 1, 2, 3]))[0]
    for at, kept in enumerate(([1, 3], [0, 2, 3], [1, 3], [0, 1, 2])):  # a was chosen twice
        np.testing.assert_allclose(falls[:, at], (whole - of.scores(asked(kept))[0])[[4, 5]], atol=1e-5)


def test_what_is_older_than_any_signal_reads_moves_nothing() -> None:
    of = fitted(log("abc", "bca"), mix=Mix(1.0, 1.0, 1.0, 1))
    history = np.concatenate([places("c"), np.tile(places("ab"), sequence.LENGTH // 2)])
    falls = of.falls(Queries([history]), [2])
    assert falls.shape == (1, sequence.LENGTH + 1) and falls[0, 0] == 0 and falls[0, 1:].all()
    assert of.falls(Queries([places("")]), [2, 3]).shape == (2, 0)


def test_nearest_events_names_company_and_kin_or_nothing() -> None:
    histories = log("abc", "ab", "d")
    vectors = np.array([[1, 0], [0, 1], [0.8, 0.6], [1, 0], [0, -1], [-1, 0]], dtype=np.float32)
    of = fitted(histories, vectors, Mix(1.0, 0.0, 0.0, 0))
    # bc and ac: 1/sqrt(2) each; the cosine of a and d is 0.8: among equals the newest counts
    assert of.nearest_events(places("dab"), 2, np.zeros(3), np.zeros(3)) == (1, 0)
    assert of.nearest_events(places("d"), 4, np.ones(1), np.ones(1)) == (None, None)
    assert of.nearest_events(places(""), 0, np.zeros(0), np.zeros(0)) == (None, None)


def test_company_that_has_something_in_common_stands_for_the_rest() -> None:
    of = fitted(log("abc", "bc", "ad"), EYE, Mix(1.0, 0.0, 0.0, 0))
    # Strengths to c: of a 1/sqrt(2*2) = .5, of b 2/sqrt(2*2) = 1, of d none.
    for shared, company in (([0, 0, 0], 1), ([1, 0, 0], 0), ([3, 1, 0], 0), ([1, 1, 9], 1), ([0, 0, 9], 1)):
        assert of.nearest_events(places("abd"), 2, np.array(shared, dtype=float), np.zeros(3))[0] == company, shared


@pytest.mark.parametrize(
    ("shared", "falls", "company"),
    [
        ([1, 1, 0], [0.2, 0.1, 0], 0),  # b occurs with c more often, a moves its score more
        ([1, 3, 0], [0.2, 0.1, 0], 1),  # but has less in common with it
        ([0, 0, 0], [0.2, 0.1, 0], 0),
        ([0, 1, 0], [0.2, 0.0, 0], 1),
        ([1, 1, 1], [-0.2, -0.1, 0], 1),  # none makes it fall: by strength
        ([1, 1, 9], [0.1, 0.2, 9], 1),  # d does not occur with c
    ],
)
def test_of_the_company_that_is_named_which_moves_the_score(
    shared: list[float], falls: list[float], company: int
) -> None:
    of = fitted(log("abc", "bc", "ad"), EYE, Mix(1.0, 0.0, 0.0, 0))
    assert of.nearest_events(places("abd"), 2, np.array(shared, float), np.array(falls, float))[0] == company


@pytest.mark.parametrize(
    ("falls", "kin"), [([0, 0, 0], 0), ([0.1, 0.5, 9], 1), ([0.5, 0.1, 9], 0), ([0.1, 0.11, 0], 0)]
)
def test_of_the_kin_that_is_named_which_moves_the_score(falls: list[float], kin: int) -> None:
    # Cosines to c: of a .8, of b .6, of e -.6, which is never near.
    vectors = np.array([[1, 0], [0, 1], [0.8, 0.6], [1, 0], [0, -1], [-1, 0]], dtype=np.float32)
    of = fitted(log("ab", "d"), vectors, Mix(1.0, 0.0, 0.0, 0))
    assert of.nearest_events(places("abe"), 2, np.zeros(3), np.array(falls, float))[1] == kin


def test_nothing_seen_is_an_error() -> None:
    histories = log("abc")
    with pytest.raises(DataError, match="no event is left to fit the retriever on"):
        Retriever.fit(histories, np.zeros(3, dtype=bool), Likeness(EYE), COMPANY)

"""Negatives: fresh, seeded, in fixed shares of their kinds, with retrieval's scores in the list's deviations."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.data.dataset import Dataset, Queries
from mllm_srec.errors import DataError
from mllm_srec.negatives import DISLIKED, HARD, POPULAR, UNIFORM, Negatives, draw
from mllm_srec.retrieval import Likeness, Mix, Retriever
from small_logs import all_of, log, places

COMPANY = Mix(0.0, 0.0, 0.0, 0)


def fitted(*users: str, repeats: bool = False) -> Retriever:
    histories = log(*users)
    vectors = np.eye(len(histories.items), dtype=np.float32)
    return Retriever.fit(histories, all_of(histories), Likeness(vectors), COMPANY, None, repeats)


@pytest.fixture(scope="module")
def wide() -> Retriever:
    """40 users of 400 items, of which the first 17 are known."""
    ids = [f"i{n:03}" for n in range(400)]
    rows = [(f"u{u:02}", ids[n]) for u in range(40) for n in (0, *range(1 + u % 8, 9 + u % 8))]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    histories = Dataset.build("shop", pl.DataFrame({"item_id": ids}), frame, has_time=False, root=None).histories()
    return Retriever.fit(histories, all_of(histories), Likeness(np.eye(400, dtype=np.float32)), COMPANY, None)


def asked(*histories: str) -> Queries:
    return Queries([places(history) for history in histories])


def many(wide: Retriever, count: int, disliked: list[np.ndarray] | None = None, seed: int = 0) -> Negatives:
    seen = Queries([np.array([0], dtype=np.int32)] * 50)
    return draw(wide, seen, np.full(50, 399), count, 8, seed, disliked)


@given(st.integers(0, 1000), st.integers(1, 3))
def test_negatives_are_fresh_and_seeded(seed: int, count: int) -> None:
    of, seen, targets = fitted("abc", "bcd"), asked("ab", "f"), places("ca")
    negatives = draw(of, seen, targets, count, 3, seed)
    assert negatives.items.shape == negatives.kinds.shape == (2, count)
    assert negatives.retrieval.shape == (2, 1 + count)
    for row, own, target in zip(negatives.items.tolist(), seen, targets.tolist(), strict=True):
        assert len(set(row)) == count
        assert not set(row) & {*own.tolist(), target}
    again = draw(of, seen, targets, count, 3, seed)
    for name in ("items", "kinds", "retrieval"):
        np.testing.assert_array_equal(getattr(negatives, name), getattr(again, name))


def test_another_seed_draws_others(wide: Retriever) -> None:
    assert (many(wide, 6).items != many(wide, 6, seed=1).items).any()


def test_the_kinds_take_turns(wide: Retriever) -> None:
    negatives = many(wide, 8)
    assert (negatives.kinds == [HARD, POPULAR, HARD, UNIFORM] * 2).all()
    seen = Queries([np.array([0], dtype=np.int32)])
    listed = wide.candidates(seen, 8)[0][0]
    assert np.isin(negatives.items[negatives.kinds == HARD], listed).all()
    assert len(set(negatives.items[negatives.kinds == HARD].tolist())) == 8, "drawn from the whole list"
    assert (negatives.items[negatives.kinds == POPULAR] <= 16).all(), "the others have no event"
    assert (negatives.items[negatives.kinds == UNIFORM] > 16).mean() > 0.8, "of 400 items 17 are known"


def test_popular_ones_are_drawn_by_their_events() -> None:
    of = fitted("abc", "abc", "abc", "abd")  # of c and d, which alone are left: 3 and 1 events
    seen = Queries([places("abef")] * 400)
    negatives = draw(of, seen, places("a" * 400), 2, 1, 0)
    popular = negatives.items[negatives.kinds == POPULAR]
    hard = negatives.items[negatives.kinds == HARD]
    assert (hard == places("c")[0]).all()
    assert (popular == places("d")[0]).all(), "c is gone"
    first = draw(of, Queries([places("ef")] * 400), places("a" * 400), 2, 1, 0)
    assert (first.kinds == [POPULAR, UNIFORM]).all(), "the target is the whole list, so no hard one is left"
    share = (first.items[first.kinds == POPULAR] == places("c")[0]).mean()
    assert share == pytest.approx(3 / 8, abs=0.08)  # of the events of b, c and d


def test_what_a_user_rated_low_takes_its_turn_and_leaves_it_where_there_is_none(wide: Retriever) -> None:
    low = [np.array([300, 301], dtype=np.int32), np.zeros(0, dtype=np.int32)] * 25
    negatives = many(wide, 8, low)
    assert negatives.kinds[0].tolist() == [
        *(HARD, DISLIKED, POPULAR, HARD, DISLIKED, UNIFORM),
        *(HARD, POPULAR),
    ]
    assert set(negatives.items[0][negatives.kinds[0] == DISLIKED].tolist()) == {300, 301}
    assert negatives.kinds[1].tolist() == [HARD, POPULAR, HARD, UNIFORM] * 2


def test_retrieval_stands_beside_in_deviations_of_the_list(wide: Retriever) -> None:
    seen, target = Queries([np.array([0], dtype=np.int32)]), np.array([5])
    negatives = draw(wide, seen, target, 6, 8, 0)
    scores, (_, values) = wide.scores(seen)[0], wide.candidates(seen, 8)
    expected = (scores[[5, *negatives.items[0]]] - values[0].mean()) / values[0].std()
    np.testing.assert_allclose(negatives.retrieval[0], expected, rtol=1e-5)
    assert negatives.retrieval[0].std() > 0.1


def test_a_repeated_target_is_no_negative_where_items_may_be_repeated() -> None:
    of = fitted("abc", "bcd", repeats=True)
    negatives = draw(of, asked("ab"), places("a"), 3, 4, 0)
    assert not set(negatives.items[0].tolist()) & set(places("ab").tolist())


def test_too_small_a_catalogue_has_no_negatives() -> None:
    with pytest.raises(DataError, match=r"only 2 items can be negatives, 3 are asked for: lower training\.negatives"):
        draw(fitted("abc"), asked("abc"), places("d"), 3, 3, 0)

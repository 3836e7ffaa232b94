"""Stage 3: readings are fused as validation chose, stored once, refused when useless."""

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fakes import FakeMllm, draw, make_catalogue, make_shop, make_state, shown
from mllm_srec import ranking
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Request
from mllm_srec.prompts import ranking as prompts
from mllm_srec.ranking import (
    PRIORS,
    RIDGE,
    SCORES,
    Candidates,
    Fusion,
    best_fusion,
    check_scores,
    cross_fit,
    fuse,
    item_priors,
    score_lists,
    standardise,
    stored_priors,
)
from mllm_srec.records import ranking_request
from mllm_srec.user_states import NOBODY, UserState
from mllm_srec.workspace import Workspace

CATALOGUE = make_catalogue(
    a="red shoe", b="red hat", c="red hat wool", d="blue shoe", e="blue", f="red hat wool warm shoe"
)
IDS = "".join(CATALOGUE.ids)
STATE = make_state("hat", "red", "wool")
ALONE = Fusion(1.0, 0.0, 0.0, False)


def place(items: str) -> np.ndarray:
    return np.array([IDS.index(item) for item in items], dtype=np.int32)


def read(
    items: Sequence[str],
    retrieval: Sequence[Sequence[float]],
    odds: Sequence[Sequence[float]],
    loglik: Sequence[Sequence[float]],
) -> Candidates:
    values = (np.array(rows, dtype=np.float32) for rows in (retrieval, odds, loglik))
    return Candidates(np.array([place(row) for row in items]), *values)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_shop(tmp_path, [{"item_id": item_id} for item_id in IDS], {"u": [("a", 1, None)]})


# Fusion


def test_standardising_by_hand() -> None:
    made = standardise(np.array([[1.0, 3.0], [5.0, 5.0], [-2.0, 2.0]]))
    np.testing.assert_array_equal(made, [[-1, 1], [0, 0], [-1, 1]])
    np.testing.assert_allclose(standardise(np.array([[0.0, 0.0, 3.0]])), [[-(0.5**0.5), -(0.5**0.5), 2**0.5]])


@given(
    arrays(np.float64, (3, 5), elements=st.integers(-50, 50).map(float)),
    st.floats(0.5, 20),
    st.floats(-30, 30),
)
def test_within_a_user_scale_and_level_do_not_count(scores: np.ndarray, scale: float, level: float) -> None:
    made = standardise(scores)
    np.testing.assert_allclose(made.mean(1), 0, atol=1e-9)
    for row, of_row in zip(scores, made, strict=True):
        assert of_row.std() == (pytest.approx(1) if np.ptp(row) else 0)
    np.testing.assert_allclose(standardise(scores * scale + level), made, atol=1e-9)


PRIORS_BY_HAND = np.array([[5.0, -1.0], [1.0, -1.0], *[[np.nan, np.nan]] * 4], dtype=np.float32)


@pytest.mark.parametrize(
    ("fusion", "fused"),
    [
        (ALONE, [-1, 1]),
        (Fusion(2.0, 0.0, 0.0, True), [-2, 2]),
        (Fusion(1.0, 0.5, 2.0, False), [-1 + 0.5 - 2, 1 - 0.5 + 2]),
        (Fusion(1.0, 0.5, 2.0, True), [-1 - 0.5 - 2, 1 + 0.5 + 2]),  # odds 4 - 5 and 2 - 1
    ],
)
def test_fusion_by_hand(fusion: Fusion, fused: list[float]) -> None:
    candidates = read(["ab"], [[1, 3]], [[4, 2]], [[-3, -1]])
    made = fuse(candidates, PRIORS_BY_HAND, fusion)
    np.testing.assert_allclose(made, [fused])
    assert made.dtype == np.float64


def test_each_candidate_is_read_against_its_own_prior() -> None:
    candidates = read(["ba", "ab"], [[0, 0], [0, 0]], [[2, 2], [2, 2]], [[0, 0], [0, 0]])
    made = fuse(candidates, PRIORS_BY_HAND, Fusion(1.0, 1.0, 0.0, True))
    np.testing.assert_allclose(made, [[1, -1], [-1, 1]])  # b's prior is 1, a's is 5


def test_the_empty_user_may_be_unknown_where_it_is_not_subtracted() -> None:
    candidates = read(["cd"], [[0, 1]], [[1, 2]], [[1, 2]])
    assert np.isfinite(fuse(candidates, PRIORS_BY_HAND, Fusion(1.0, 1.0, 1.0, False))).all()


# Two candidates and one list: standardised, a reading is for the target (1 against -1) or against it.
AGAINST, FOR, MUTE = [[1, 0]], [[0, 1]], [[0, 0]]
NO_PRIORS = np.zeros((6, 2), dtype=np.float32)


def alone(readings: int) -> float:
    """The weight of each of some equal readings that are for the target of the only list: where the slope of
    log(1 + exp(-2 * readings * weight)) + RIDGE * readings * weight ** 2 / 2 is 0, found by halving."""
    low, high = 0.0, 10.0
    for _ in range(80):
        weight = (low + high) / 2
        if RIDGE * weight < 2 / (1 + math.exp(2 * readings * weight)):
            low = weight
        else:
            high = weight
    return low


@pytest.mark.parametrize(
    ("retrieval", "odds", "loglik", "chosen"),
    [
        (AGAINST, FOR, AGAINST, Fusion(0.0, alone(1), 0.0, False)),
        (AGAINST, AGAINST, FOR, Fusion(0.0, 0.0, alone(1), False)),
        (AGAINST, FOR, FOR, Fusion(0.0, alone(2), alone(2), False)),
        (FOR, FOR, MUTE, Fusion(alone(2), alone(2), 0.0, False)),
        (FOR, AGAINST, MUTE, Fusion(alone(1), 0.0, 0.0, False)),
        (FOR, FOR, FOR, Fusion(*[alone(3)] * 3, False)),
        (AGAINST, AGAINST, AGAINST, ALONE),
        (MUTE, MUTE, MUTE, ALONE),
    ],
)
def test_readings_that_are_for_the_target_are_weighed_by_hand(
    retrieval: list[list[int]], odds: list[list[int]], loglik: list[list[int]], chosen: Fusion
) -> None:
    candidates = read(["ab"], retrieval, odds, loglik)
    made, value = best_fusion(candidates, NO_PRIORS, place("b"))
    assert astuple(made) == pytest.approx(astuple(chosen), abs=1e-4)
    apart = 0.0 if chosen == ALONE else float(np.subtract(*fuse(candidates, NO_PRIORS, made)[0, ::-1]))
    assert value.tolist() == pytest.approx([-math.log1p(math.exp(-apart))])


def test_the_empty_user_is_subtracted_where_only_that_informs() -> None:
    priors = NO_PRIORS.copy()
    priors[:2, 1] = [3, 0]  # item a is likely for everybody
    candidates = read(["ab"], AGAINST, AGAINST, [[2, 1]])
    made, _ = best_fusion(candidates, priors, place("b"))
    assert astuple(made) == pytest.approx((0.0, 0.0, alone(1), True), abs=1e-4)
    assert best_fusion(candidates, None, place("b"))[0] == ALONE


def test_the_empty_user_is_left_in_where_it_makes_no_difference() -> None:
    candidates = read(["ab"], AGAINST, FOR, MUTE)
    assert not best_fusion(candidates, NO_PRIORS, place("b"))[0].subtract_empty


def test_only_lists_that_hold_their_target_decide() -> None:
    lost = read(["cd", "cd", "ab"], [[1, 0]] * 3, [[0, 1], [0, 1], [1, 0]], [[1, 0], [1, 0], [0, 1]])
    made, value = best_fusion(lost, NO_PRIORS, place("aab"))
    alone, of_one = best_fusion(read(["ab"], AGAINST, AGAINST, FOR), NO_PRIORS, place("b"))
    assert made == alone and value.tolist() == of_one.tolist()
    nothing = read(["cd"], AGAINST, [[math.nan] * 2], FOR)
    made, value = best_fusion(nothing, NO_PRIORS, place("a"))
    assert made == ALONE and len(value) == 0


def test_more_lists_give_a_reading_more_weight() -> None:
    weights = [
        best_fusion(read(["ab"] * count, AGAINST * count, FOR * count, MUTE * count), NO_PRIORS, place("b" * count))[0]
        for count in (1, 4, 40)
    ]
    assert weights[0].odds < weights[1].odds < weights[2].odds


def test_both_parts_choose_the_weights_and_each_is_fused_by_those_of_the_other() -> None:
    first, second = read(["ab"], AGAINST, FOR, MUTE), read(["ab"] * 3, AGAINST * 3, MUTE * 3, FOR * 3)
    targets = [place("b"), place("bbb")]
    choice, fused = cross_fit([first, second], NO_PRIORS, targets)
    whole = read(["ab"] * 4, AGAINST * 4, FOR + MUTE * 3, MUTE + FOR * 3)
    assert choice == best_fusion(whole, NO_PRIORS, place("bbbb"))[0]
    assert choice.loglik > choice.odds > 0
    # The first part's lists say nothing by the likelihood alone, which the second one chose, and the other way round.
    assert [of_part.shape for of_part in fused] == [(1, 2), (3, 2)]
    assert not np.concatenate(fused).any()
    again, swapped = cross_fit([second, first], NO_PRIORS, targets[::-1])
    assert astuple(again) == pytest.approx(astuple(choice), abs=1e-4)
    assert [of_part.shape for of_part in swapped] == [(3, 2), (1, 2)]


def test_one_part_chooses_but_calibrates_nothing_and_none_leaves_retrieval() -> None:
    only = read(["ab"], AGAINST, FOR, MUTE)
    choice = best_fusion(only, NO_PRIORS, place("b"))[0]
    assert cross_fit([only], NO_PRIORS, [place("b")]) == (choice, [])
    assert cross_fit([], NO_PRIORS, []) == (ALONE, [])


READINGS = arrays(np.float32, (3, 4, 4), elements=st.integers(-3, 3).map(float))


def listed(values: np.ndarray) -> Candidates:
    return Candidates(np.tile(np.arange(4, dtype=np.int32), (4, 1)), *values)


@given(READINGS, st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_no_other_weights_make_the_targets_likelier(values: np.ndarray, wanted: list[int]) -> None:
    target, candidates = np.array(wanted, dtype=np.int32), listed(values)
    made, _ = best_fusion(candidates, None, target)
    weights = np.array(astuple(made)[:3])

    def worth(given: np.ndarray) -> float:
        """The independent form: chances of the targets, list by list, less the ridge."""
        fused = np.exp(fuse(candidates, NO_PRIORS, Fusion(*given.tolist(), False)))
        chances = [row[item] / row.sum() for row, item in zip(fused, target, strict=True)]
        return float(np.log(chances).sum() - RIDGE * (given**2).sum() / 2)

    assert (weights >= 0).all()
    if made == ALONE:
        weights = np.zeros(3)
    for direction in (*np.eye(3), *-np.eye(3), *(weights - np.eye(3)), -weights, np.ones(3)):
        for length in (1e-3, 0.1, 1.0):
            assert worth(np.maximum(weights + length * direction, 0)) <= worth(weights) + 1e-5


@given(READINGS, st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_how_likely_the_best_fusion_makes_its_targets(values: np.ndarray, wanted: list[int]) -> None:
    target, candidates = np.array(wanted, dtype=np.int32), listed(values)
    chosen, value = best_fusion(candidates, None, target)
    held = target < 4
    assert not chosen.subtract_empty
    if not held.any():
        assert chosen == ALONE and len(value) == 0
        return
    fused = np.exp(fuse(candidates, NO_PRIORS, chosen) if chosen != ALONE else np.zeros((4, 4)))[held]
    np.testing.assert_allclose(value, np.log(fused[np.arange(len(fused)), target[held]] / fused.sum(1)), atol=1e-9)


# Priors


def test_priors_are_read_for_the_empty_user_stored_and_reused(workspace: Workspace) -> None:
    mllm, items = FakeMllm(), place("dbf")
    priors = item_priors(workspace, mllm, CATALOGUE, items)
    prefix = shown(ranking_request(NOBODY, CATALOGUE, items).prefix)
    for item in items:
        candidate = CATALOGUE.candidates[item]
        np.testing.assert_allclose(priors[item], [draw(prefix, candidate, "odds"), draw(prefix, candidate)])
    others = np.setdiff1d(np.arange(len(IDS)), items)
    assert np.isnan(priors[others]).all()
    assert (priors.dtype, priors.shape) == (np.float32, (6, 2))
    assert [request.candidates for request in mllm.scored] == [tuple(CATALOGUE.candidates[i] for i in items)]
    again = item_priors(workspace, mllm, CATALOGUE, items)
    np.testing.assert_array_equal(again, priors)
    assert len(mllm.scored) == 1
    item_priors(workspace, mllm, CATALOGUE, place("dbfa"))
    assert mllm.scored[-1].candidates == (CATALOGUE.candidates[0],)


def test_stored_priors_are_the_same_and_write_nothing(workspace: Workspace) -> None:
    items, mllm = place("abdf"), FakeMllm()
    stored = item_priors(workspace, mllm, CATALOGUE, items[:2])
    rows, asked = workspace.rows(PRIORS), len(mllm.scored)
    priors = stored_priors(workspace, mllm, CATALOGUE, items)
    assert mllm.scored[asked:] == [ranking_request(NOBODY, CATALOGUE, items[2:])]
    assert workspace.rows(PRIORS).equals(rows)
    np.testing.assert_array_equal(priors[:2], stored[:2])
    np.testing.assert_array_equal(priors, item_priors(workspace, mllm, CATALOGUE, items))
    asked = len(mllm.scored)
    stored_priors(workspace, mllm, CATALOGUE, items)
    assert len(mllm.scored) == asked


@pytest.mark.parametrize("change", ["model", "item", "ranking prompts", "empty user"])
def test_priors_that_no_longer_hold_are_read_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    item_priors(workspace, FakeMllm(), CATALOGUE, place("ab"))
    mllm, catalogue = FakeMllm("fake-2" if change == "model" else "fake-1"), CATALOGUE
    if change == "item":
        catalogue = replace(CATALOGUE, candidates=["another text.", *CATALOGUE.candidates[1:]])
    if change == "ranking prompts":
        monkeypatch.setattr(prompts, "VERSION", "ranking-next")
    if change == "empty user":
        monkeypatch.setattr(ranking, "NOBODY", replace(NOBODY, profile="is a stranger"))
    fresh = 1 if change == "item" else 2
    stored_priors(workspace, mllm, catalogue, place("ab"))
    assert [len(request.candidates) for request in mllm.scored] == [fresh]
    item_priors(workspace, mllm, catalogue, place("ab"))
    assert [len(request.candidates) for request in mllm.scored] == [fresh, fresh]


# Lists


def states(count: int) -> list[UserState]:
    return [replace(STATE, user_id=f"u{n}", profile=f"likes {n}") for n in range(count)]


LISTS = np.array([place("abc"), place("dcb"), place("fea")])
RETRIEVED = np.arange(9, dtype=np.float32).reshape(3, 3)


def test_each_list_is_read_under_its_own_state_and_keeps_its_place(workspace: Workspace) -> None:
    mllm = FakeMllm()
    made = score_lists(workspace, mllm, CATALOGUE, states(3), LISTS, RETRIEVED, "test", batch=2)
    for row, (state, items) in enumerate(zip(states(3), LISTS, strict=True)):
        prefix = shown(ranking_request(state, CATALOGUE, items).prefix)
        for column, item in enumerate(items):
            candidate = CATALOGUE.candidates[item]
            assert made.odds[row, column] == pytest.approx(draw(prefix, candidate, "odds"))
            assert made.loglik[row, column] == pytest.approx(draw(prefix, candidate))
    np.testing.assert_array_equal(made.items, LISTS)
    np.testing.assert_array_equal(made.retrieval, RETRIEVED)
    assert made.odds.dtype == made.loglik.dtype == np.float32
    assert [request.question for request in mllm.scored] == [prompts.QUESTION] * 3
    assert {json.loads(key)[0] for key in workspace.rows(SCORES)["key"]} == {"test"}


def test_lists_are_reused_and_only_changed_ones_read_again(workspace: Workspace) -> None:
    mllm = FakeMllm()
    first = score_lists(workspace, mllm, CATALOGUE, states(3), LISTS, RETRIEVED, "test")
    order = np.array([2, 0, 1])
    shuffled = score_lists(
        workspace, mllm, CATALOGUE, [states(3)[i] for i in order], LISTS[order], RETRIEVED[order], "test"
    )
    assert len(mllm.scored) == 3
    np.testing.assert_array_equal(shuffled.odds, first.odds[order])
    np.testing.assert_array_equal(shuffled.loglik, first.loglik[order])
    changed = LISTS.copy()
    changed[1] = place("dcf")
    score_lists(workspace, mllm, CATALOGUE, states(3), changed, RETRIEVED, "test")
    moved = [states(3)[0], states(3)[1], replace(states(3)[2], preference="newly turns to wool")]
    score_lists(workspace, mllm, CATALOGUE, moved, changed, RETRIEVED, "test")
    assert mllm.scored[3:] == [
        ranking_request(states(3)[1], CATALOGUE, changed[1]),
        ranking_request(moved[2], CATALOGUE, changed[2]),
    ]
    other = FakeMllm("fake-2")
    score_lists(workspace, other, CATALOGUE, moved, changed, RETRIEVED, "test")
    score_lists(workspace, other, CATALOGUE, moved, changed, RETRIEVED, "validation")
    assert len(other.scored) == 6
    assert workspace.count("scores") == 6


def test_targets_that_share_a_state_share_a_reading(workspace: Workspace) -> None:
    mllm = FakeMllm()
    made = score_lists(workspace, mllm, CATALOGUE, [STATE, STATE], LISTS[[0, 0]], RETRIEVED[:2], "test")
    assert len(mllm.scored) == 1
    np.testing.assert_array_equal(made.odds[0], made.odds[1])


def test_no_lists_are_no_error(workspace: Workspace) -> None:
    made = score_lists(workspace, FakeMllm(), CATALOGUE, [], LISTS[:0], RETRIEVED[:0], "test")
    assert made.odds.shape == made.loglik.shape == (0, 3)


@pytest.mark.parametrize(
    ("odds", "loglik", "message"),
    [
        (math.nan, None, r"odds of Yes that are not finite: try model.dtype=float32"),
        (None, -math.inf, r"log-likelihoods that are not finite: try model.dtype=float32"),
        (0.5, None, r"the same odds of Yes for every candidate"),
        (None, -2.0, r"the same log-likelihoods for every candidate"),
    ],
)
def test_scores_that_cannot_rank_are_refused(
    workspace: Workspace, odds: float | None, loglik: float | None, message: str
) -> None:
    mllm = FakeMllm()
    if odds is not None:
        mllm.odds = lambda before, candidate: odds
    if loglik is not None:
        mllm.likelihood = lambda before, candidate: loglik
    with pytest.raises(ModelError, match=message):
        score_lists(workspace, mllm, CATALOGUE, states(3), LISTS, RETRIEVED, "test")


def test_scores_that_differ_between_users_only_are_refused() -> None:
    good, between = np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([[1.0, 1.0], [2.0, 2.0]])
    check_scores(good, good)
    check_scores(np.ones((2, 1)), np.ones((2, 1)))  # one candidate needs no order
    check_scores(good[0], good[0])
    for odds, loglik in ((between, good), (good, between), (between[0], good[0])):
        with pytest.raises(ModelError, match="for every candidate"):
            check_scores(odds, loglik)


# With a model


def test_a_model_of_transformers_ranks_through_the_same_interface(workspace: Workspace) -> None:
    from tiny_models import tiny_mllm

    mllm = tiny_mllm()
    made = score_lists(workspace, mllm, CATALOGUE, states(3), LISTS, RETRIEVED, "test")
    priors = item_priors(workspace, mllm, CATALOGUE, np.unique(LISTS))
    fused = fuse(made, priors, Fusion(1.0, 1.0, 1.0, True))
    assert np.isfinite(fused).all()
    alone = mllm.score([Request(ranking_request(states(3)[1], CATALOGUE, [2]).prefix, (CATALOGUE.candidates[2],), "?")])
    np.testing.assert_allclose(made.loglik[1, 1], alone[0][0, 1], atol=1e-4)
    asked = len(mllm.prefixes)
    with pytest.MonkeyPatch.context() as patch:  # stored: nothing is read, nor compared with separate prompts again
        patch.setattr(ranking, "check_once", lambda *_: pytest.fail("compared again"))
        again = score_lists(workspace, mllm, CATALOGUE, states(3), LISTS, RETRIEVED, "test")
    np.testing.assert_array_equal(again.odds, made.odds)
    assert len(mllm.prefixes) == asked


def test_a_model_that_packs_wrongly_ranks_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_srec.mllm.pieces import Piece
    from tiny_models import tiny_mllm

    monkeypatch.setattr(Piece, "following", property(lambda piece: len(piece) + 1))
    with pytest.raises(ModelError, match="packed scores differ from those of separate prompts"):
        score_lists(workspace, tiny_mllm(), CATALOGUE, states(3), LISTS, RETRIEVED, "test")
    assert len(workspace.rows(SCORES)) == 0

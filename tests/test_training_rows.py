"""Training rows: targets that retrieval finds, their negatives, and records that know nothing newer than the target."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from fakes import CATALOGUE, IDS, FakeMllm, make_dataset, make_shop, place, users_config
from mllm_srec import rationales, training_rows
from mllm_srec.config import Config, load_config
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Split, Targets, histories_of, leave_last_out, liked_only, target_items
from mllm_srec.errors import MllmSrecError, UsageError
from mllm_srec.negatives import DISLIKED, HARD, POPULAR, UNIFORM, Negatives
from mllm_srec.rationales import Wanted
from mllm_srec.records import TrainingRecord, ranking_request
from mllm_srec.retrieval import Likeness, Mix, Retriever
from mllm_srec.training_rows import TrainingRows, choose_targets, depth_of, draw_rows, make_records
from mllm_srec.user_states import History, UserState, build_state, low_rating
from mllm_srec.workspace import Workspace

NO_TARGETS = Targets(*(np.zeros(0, dtype=np.int64) for _ in range(3)))


def shop(folder: Path, *users: str, ratings: Sequence[Sequence[float]] = (), config: Config | None = None) -> Workspace:
    """Users' items as letters of the catalogue, oldest first, a day apart; `ratings` of the first of them."""
    rated = [*ratings, *([None] * len(items) for items in users[len(ratings) :])]
    log = {
        f"u{n}": [(item, 86_400_000 * at, rating) for at, (item, rating) in enumerate(zip(items, of, strict=True))]
        for n, (items, of) in enumerate(zip(users, rated, strict=True))
    }
    return make_shop(folder, [{"item_id": item} for item in IDS], log, config)


def fitted(histories: Histories, split: Split) -> Retriever:
    vectors = np.eye(len(histories.items), dtype=np.float32)
    return Retriever.fit(histories, split.seen_training, Likeness(vectors), Mix(0.0, 0.0, 0.0, 0), None)


def rows_of(targets: Targets) -> list[tuple[int, int]]:
    return list(zip(targets.user.tolist(), targets.position.tolist(), strict=True))


def configured(*overrides: str) -> Config:
    return load_config(overrides=("training.rows=100", "training.negatives=2", *overrides))


# Targets


@pytest.mark.parametrize(
    ("users", "candidates", "depth"),
    [
        (("abc",), 20, 6),  # nine items, of which the longest history leaves six
        (("abc", "abcdefg"), 20, 2),
        (("abc",), 2, 6),
        (("a",), 2, 8),  # four times two
        (("abcdefghi",), 2, 1),  # never none
    ],
)
def test_the_list_is_no_longer_than_the_longest_history_leaves(
    users: tuple[str, ...], candidates: int, depth: int, tmp_path: Path
) -> None:
    log = shop(tmp_path, *users).dataset().histories()
    assert depth_of(configured(f"retrieval.candidates={candidates}"), log) == depth


def test_only_targets_that_retrieval_finds_are_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_rows, "DEPTH", 1)
    # Third events are training targets: b stands beside a in every list, i in none.
    log = shop(tmp_path, "gabcd", "hbacd", "faicd", "abe", "abe").dataset().histories()
    split = leave_last_out(log, "file_order", 5)
    assert rows_of(split.training) == [(0, 2), (1, 2), (2, 2)]
    found = choose_targets(split.training, fitted(log, split), log, configured("retrieval.candidates=2"))
    assert sorted(rows_of(found)) == [(0, 2), (1, 2)]
    assert "train: retrieval finds 2 of 3 training targets: these are the rows\n" in capsys.readouterr().err
    enough = choose_targets(
        split.training, fitted(log, split), log, configured("retrieval.candidates=2", "training.rows=2")
    )
    assert sorted(rows_of(enough)) == [(0, 2), (1, 2)]
    assert capsys.readouterr().err == ""


@trials(max_examples=40, deadline=None)
@given(
    st.lists(st.permutations(IDS).flatmap(lambda of: st.integers(1, 9).map(lambda n: "".join(of[:n]))), min_size=2),
    st.integers(2, 4),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_targets_are_a_seeded_sample_of_what_the_lists_hold(
    users: list[str], candidates: int, count: int, seed: int
) -> None:
    users = [*users, "abcde"]  # one who leaves events to fit on
    rows = {f"u{n}": [(item, at, None) for at, item in enumerate(items)] for n, items in enumerate(users)}
    log = make_dataset(Path(), [{"item_id": item} for item in IDS], rows).histories()
    split = leave_last_out(log, "file_order", 3)
    config = configured(f"retrieval.candidates={candidates}", f"training.rows={count}", f"seed={seed}")
    retriever = fitted(log, split)
    chosen = choose_targets(split.training, retriever, log, config)
    # Worked out anew: a target is found if fewer items than the list is long are better, ties by position.
    depth, found = depth_of(config, log), set()
    scores = retriever.scores(histories_of(log, split.training)) if len(split.training) else []
    wanted = target_items(log, split.training)
    for at, (of_target, history, item) in enumerate(
        zip(scores, histories_of(log, split.training), wanted, strict=True)
    ):
        better = [other for other in range(9) if (-of_target[other], other) < (-of_target[item], item)]
        if len(set(better) - set(history.tolist())) < depth:
            found.add(rows_of(split.training)[at])
    assert set(rows_of(chosen)) <= found
    assert len(set(rows_of(chosen))) == len(chosen) == min(count, len(found))
    again = choose_targets(split.training, retriever, log, config)
    assert rows_of(again) == rows_of(chosen)


def test_another_seed_takes_other_targets_and_not_all_are_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = shop(tmp_path, *["abcdefg"] * 40).dataset().histories()
    split = leave_last_out(log, "file_order", 3)
    asked: list[int] = []
    retriever, find = fitted(log, split), Retriever.candidates

    def watch(of: Retriever, histories: Any, depth: int) -> Any:
        asked.append(len(histories))
        return find(of, histories, depth)

    monkeypatch.setattr(Retriever, "candidates", watch)
    taken = [
        rows_of(choose_targets(split.training, retriever, log, configured("training.rows=3", f"seed={seed}")))
        for seed in (0, 0, 1)
    ]
    assert taken[0] == taken[1] != taken[2]
    assert (len(taken[0]), asked) == (3, [60] * 3)


def test_without_training_targets_nobody_is_asked(tmp_path: Path) -> None:
    log = shop(tmp_path, "abc").dataset().histories()
    no_retriever: Any = None
    assert len(choose_targets(NO_TARGETS, no_retriever, log, configured())) == 0


# Negatives


def test_rows_have_their_negatives_and_tell_them(tmp_path: Path) -> None:
    log = shop(tmp_path, "abcdef", "bcdefa", "abde").dataset().histories()
    split = leave_last_out(log, "file_order", 5)
    config = configured("training.negatives=3")
    made = draw_rows(split.training, fitted(log, split), log, split, config)
    assert rows_of(made.targets) == [(0, 3), (1, 3)]
    assert made.wanted.tolist() == place("de").tolist()
    assert made.negatives.items.shape == (2, 3)
    for history, target, items in zip(("abc", "bcd"), "de", made.negatives.items, strict=True):
        assert not set(items.tolist()) & set(place(history + target).tolist())
    again = draw_rows(split.training, fitted(log, split), log, split, config)
    np.testing.assert_array_equal(again.negatives.items, made.negatives.items)

    told = list(made.told(log))
    assert [(row["user"], row["position"], row["target"]) for row in told] == [("u0", 3, "d"), ("u1", 3, "e")]
    by_hand = TrainingRows(
        made.targets,
        made.wanted,
        Negatives(
            np.array([place("hi"), place("ga")]), np.array([[HARD, POPULAR], [UNIFORM, DISLIKED]]), np.zeros((2, 3))
        ),
    )
    assert list(by_hand.told(log)) == [
        {"user": "u0", "position": 3, "target": "d", "negatives": ["h", "i"], "kinds": ["hard", "popular"]},
        {"user": "u1", "position": 3, "target": "e", "negatives": ["g", "a"], "kinds": ["uniform", "disliked"]},
    ]


def test_for_the_liked_task_what_a_user_rates_low_later_is_a_negative_and_nothing_of_the_test(tmp_path: Path) -> None:
    # u0 chooses abcdefgh; targets are e and f, of which f alone is rated high... and of u1's the two e and f.
    ratings = [[1, 4, 3, 5, 1, 5, 2, 1], [1, 4, 3, 3, 5, 2, 1, 5]]
    log = shop(tmp_path, "abcdefgh", "abcdefgh", "ihgfed", ratings=ratings).dataset().histories()
    split = leave_last_out(log, "file_order", 7)
    liked = liked_only(log, split)
    assert rows_of(split.training) == [(0, 4), (0, 5), (1, 4), (1, 5)]
    assert rows_of(liked.training) == [(0, 5), (1, 4)]
    for task, kinds in (("liked", [set(), {"f"}]), ("next", [set(), set()])):
        config = configured(f"training.task={task}", "training.negatives=3")
        drawn = draw_rows(liked.training, fitted(log, split), log, liked, config).negatives
        low = [
            {IDS[item] for item, kind in zip(items, of_row, strict=True) if kind == DISLIKED}
            for items, of_row in zip(drawn.items.tolist(), drawn.kinds.tolist(), strict=True)
        ]
        # Of u0, a and e are shown to the target; g and h are validation and test. Of u1, f follows the target.
        assert low == kinds


def test_the_liked_task_needs_ratings(tmp_path: Path) -> None:
    log = shop(tmp_path, "abcdef").dataset().histories()
    split = leave_last_out(log, "file_order", 3)
    with pytest.raises(UsageError, match="the log has no ratings"):
        draw_rows(split.training, fitted(log, split), log, split, configured("training.task=liked"))


# Records


def some_rows(targets: Targets, log: Histories, negatives: str) -> TrainingRows:
    """The same negatives for every target; retrieval says 0.123456 of each target, and 0 of these."""
    count = len(targets)
    retrieval = np.tile(np.array([0.123456, *[0.0] * len(negatives)], np.float32), (count, 1))
    drawn = Negatives(np.tile(place(negatives), (count, 1)), np.zeros((count, len(negatives)), np.int8), retrieval)
    return TrainingRows(targets, target_items(log, targets), drawn)


def records_of(
    workspace: Workspace, rows: TrainingRows, late: int = 0, teacher: FakeMllm | None = None
) -> list[TrainingRecord]:
    """With states as of each target, or `late` events later."""
    log = workspace.dataset().histories()

    def state_of(user: int, position: int, end: int) -> UserState:
        return build_state(History.of(log, user, low_rating(log)), end + late, "", CATALOGUE, users_config())

    return make_records(workspace, CATALOGUE, log, rows, state_of, teacher)


def one_target(position: int, user: int = 0) -> Targets:
    at = np.array([position], dtype=np.int64)
    return Targets(np.array([user], dtype=np.int64), at, at)


def test_a_record_is_the_request_of_its_state_with_two_rationales(tmp_path: Path) -> None:
    workspace = shop(tmp_path, "abcdef", "bcdefa")
    log = workspace.dataset().histories()
    rows = some_rows(Targets(*(np.array(of) for of in ([1, 0], [4, 3], [4, 3]))), log, "hig")
    records = records_of(workspace, rows)
    for record, user, end, target in zip(records, (1, 0), (4, 3), "fd", strict=True):
        state = build_state(History.of(log, user, None), end, "", CATALOGUE, users_config())
        assert record.request == ranking_request(state, CATALOGUE, place(target + "hig"))
        assert [at for at, _ in record.cot] == [0, 1]
        assert [text.rsplit(" ", 1)[1] for _, text in record.cot] == ["Yes", "No"]
        assert record.retrieval == pytest.approx((0.1235, 0.0, 0.0, 0.0))
    assert records[0] != records[1]


def test_without_rationales_there_are_none(tmp_path: Path) -> None:
    workspace = shop(tmp_path, "abcdef", config=configured("training.rationales=none"))
    rows = some_rows(one_target(3), workspace.dataset().histories(), "hi")
    (record,) = records_of(workspace, rows)
    assert record.cot == ()
    assert record.request == records_of(shop(tmp_path / "other", "abcdef"), rows)[0].request
    assert records_of(workspace, some_rows(NO_TARGETS, workspace.dataset().histories(), "hi")) == []


def test_a_teacher_writes_the_rationales_of_the_first_two(tmp_path: Path) -> None:
    workspace = shop(tmp_path, "abcdef", config=configured("training.rationales=model"))
    rows = some_rows(one_target(3), workspace.dataset().histories(), "hi")
    teacher = FakeMllm(say=lambda prompt: "It is blue." if "is Yes" in str(prompt.parts) else "It lacks red.")
    (record,) = records_of(workspace, rows, teacher=teacher)
    assert len(teacher.generated) == 2
    assert record.cot == ((0, "It is blue. Yes"), (1, "It lacks red. No"))


def test_rationales_know_what_was_liked_and_what_was_not_before_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = shop(tmp_path, "abcdefgh", ratings=[[5, 1, 4, 5, 4, 1, 5, 5]])
    asked: list[Wanted] = []

    def watch(workspace: Workspace, teacher: Any, catalogue: Any, wanted: Sequence[Wanted]) -> list[str]:
        asked.extend(wanted)
        return ["why"] * len(wanted)

    monkeypatch.setattr(rationales, "written", watch)
    rows = some_rows(one_target(4), workspace.dataset().histories(), "ih")
    (record,) = records_of(workspace, rows)
    assert record.cot == ((0, "why"), (1, "why"))
    assert [(IDS[one.item], one.chosen) for one in asked] == [("e", True), ("i", False)]
    for one in asked:
        assert one.history.tolist() == place("acd").tolist()
        assert one.disliked.tolist() == place("b").tolist()
        assert one.state.end == 4


@pytest.mark.parametrize("later", ["defg", "dgfe", "hief", "defghi"])
def test_a_record_holds_nothing_newer_than_what_its_target_sees(later: str, tmp_path: Path) -> None:
    made = []
    for name, users in (("one", ("abcdefg", "ghi")), ("other", ("abc" + later, "gfi"))):
        workspace = shop(tmp_path / name, *users)
        rows = some_rows(one_target(3), workspace.dataset().histories(), "hi")
        rows = TrainingRows(rows.targets, place("d"), rows.negatives)  # the target is asked for, the rest is not seen
        made.append(records_of(workspace, rows))
    assert made[0] == made[1]


def test_a_state_that_has_seen_its_target_is_refused(tmp_path: Path) -> None:
    workspace = shop(tmp_path, "abcdefg")
    rows = some_rows(one_target(3), workspace.dataset().histories(), "hi")
    with pytest.raises(MllmSrecError, match=r"'u0': the state after 4 events has seen its target at position 3"):
        records_of(workspace, rows, late=1)
    with pytest.raises(MllmSrecError, match=r"'u0': a history of 3 events for a state that has seen 2: it may hold"):
        records_of(workspace, rows, late=-1)

"""What knows the future is reported, what does not is not; an order that tells something is told from none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import CATALOGUE, IDS, FakeMllm, make_shop
from mllm_srec.config import Config, DataConfig, RetrievalConfig, UsersConfig
from mllm_srec.data.audit import DAY, Finding
from mllm_srec.data.dataset import Histories
from mllm_srec.data.readers import read
from mllm_srec.data.split import Split, global_time, leave_last_out
from mllm_srec.errors import DataError
from mllm_srec.evaluation.checks import Fit, audit_workspace, future_leaks, order_signal
from mllm_srec.evaluation.protocol import Scorer
from mllm_srec.retrieval import CoOccurrence, Likeness, Mix, Retriever, sequence
from mllm_srec.users import STATES, WINDOWS, comprehend
from mllm_srec.windows import HOUR
from mllm_srec.workspace import Workspace

START = 1_600_000_000_000


def log_of(items: Sequence[Sequence[int]], count: int) -> Histories:
    """Users with their items, one a day each, no two at the same time."""
    lengths = [len(own) for own in items]
    return Histories(
        users=[f"u{n}" for n in range(len(items))],
        items=[f"i{n}" for n in range(count)],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item=np.concatenate([np.asarray(own) for own in items]).astype(np.int32),
        time=np.concatenate([START + DAY * np.arange(n) + user for user, n in enumerate(lengths)]).astype(np.int64),
        rating=np.full(sum(lengths), np.nan, np.float32),
    )


def last_out(histories: Histories, tie_rule: str = "file_order") -> Split:
    return leave_last_out(histories, tie_rule, 3)


def leaks(found: Sequence[Finding]) -> dict[str, int]:
    """How many leaks of which kind; every finding is an error if and only if it has counted one."""
    assert all((finding.severity == "error") == (finding.count > 0) for finding in found)
    return {finding.name: finding.count for finding in found}


# Order


def wanderers(users: int = 80, length: int = 20) -> list[list[int]]:
    """Each moves on to the next of twenty shelves of eight items every four events."""
    generator = np.random.default_rng(5)
    found = []
    for _ in range(users):
        first = int(generator.integers(20))
        shelves = [(first + n // 4) % 20 for n in range(length)]
        own: list[int] = []
        for shelf in shelves:
            left = [item for item in range(8 * shelf, 8 * shelf + 8) if item not in own]
            own.append(int(generator.choice(left)))
        found.append(own)
    return found


def test_an_order_that_tells_something_is_seen() -> None:
    histories = log_of(wanderers(), 160)
    found = order_signal(histories, last_out(histories))
    assert (found.severity, found.count, found.of) == ("ok", 80, 80)
    assert found.figures["NDCG@10"] > 2 * found.figures["in random order"]
    assert 0 < found.figures["loss from"] < found.figures["loss"] < found.figures["loss to"]
    assert "these rank them worse" in found.says


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_times_show_no_order(seed: int) -> None:
    generator = np.random.default_rng(seed)
    histories = log_of([generator.permutation(own).tolist() for own in wanderers()], 160)
    found = order_signal(histories, last_out(histories))
    assert (found.severity, found.count, found.of) == ("note", 80, 80)
    assert found.figures["loss from"] <= 0
    assert "no order shows" in found.says
    assert "see that the times are true" in found.remedy


def test_histories_of_five_items_cannot_tell() -> None:
    histories = log_of([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]], 6)
    found = order_signal(histories, last_out(histories))
    assert (found.severity, found.count, found.of) == ("note", 0, 2)
    assert order_signal(log_of([[0, 1]], 2), last_out(log_of([[0, 1]], 2))).of == 0, "no target at all"


def test_order_is_told_from_a_sample_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_srec.evaluation.checks.ORDER_TARGETS", 30)
    histories = log_of(wanderers(), 160)
    found = order_signal(histories, last_out(histories), seed=4)
    assert (found.count, found.of) == (30, 80)
    assert order_signal(histories, last_out(histories), seed=4) == found
    assert order_signal(histories, last_out(histories), seed=5) != found


# Splits


LOG = log_of([[0, 1, 2, 3, 4], [5, 1, 0, 2], [3, 2, 5, 4, 1, 0]], 6)


def test_a_clean_split_leaks_nothing() -> None:
    for split in (last_out(LOG), last_out(LOG, "strict"), global_time(LOG, "file_order", 3)):
        assert leaks(future_leaks(LOG, split)) == {"leak_histories": 0, "leak_masks": 0}


def test_a_target_that_sees_itself_or_a_tie_is_reported() -> None:
    split = last_out(LOG)
    itself = replace(split.test, end=split.test.end + np.array([0, 1, 0]))
    found = future_leaks(LOG, replace(split, test=itself))
    assert leaks(found) == {"leak_histories": 1, "leak_masks": 0}
    assert found[0].examples == ("u1",)
    tied = replace(LOG, time=np.full(15, START))
    under = {rule: replace(last_out(tied), tie_rule=rule) for rule in ("file_order", "strict")}
    asked = sum(len(part) for part in (split.training, split.validation, split.test))
    assert leaks(future_leaks(tied, under["file_order"]))["leak_histories"] == 0
    assert leaks(future_leaks(tied, under["strict"]))["leak_histories"] == asked, "all is tied"


def test_masks_that_show_targets_are_reported() -> None:
    split = last_out(LOG)
    found = future_leaks(LOG, replace(split, seen_test=np.ones(15, dtype=bool)))
    assert leaks(found) == {"leak_histories": 0, "leak_masks": 3}
    assert found[1].examples == ("u0", "u1", "u2")
    # The validation's mask with the test target of u0, its fifth event: behind both of its targets.
    one = split.seen_validation.copy()
    one[4] = True
    assert leaks(future_leaks(LOG, replace(split, seen_validation=one)))["leak_masks"] == 2


def test_under_global_time_no_other_users_later_event_may_be_seen() -> None:
    # Times 0..19 in turn: test targets are event 9 of each, at 18 and 19; u1's own mask ends before both.
    in_turn = np.concatenate([np.arange(0, 20, 2), np.arange(1, 20, 2)])
    histories = replace(log_of([range(10), range(10)], 10), time=in_turn)
    split = global_time(histories, "file_order", 3)
    seen = split.seen_test.copy()
    assert leaks(future_leaks(histories, split))["leak_masks"] == 0
    seen[9] = True  # u0's target at 18: u1's, at 19, is later
    assert leaks(future_leaks(histories, replace(split, seen_test=seen)))["leak_masks"] == 1
    seen[9], seen[19] = False, True  # u1's target at 19: neither is later
    assert leaks(future_leaks(histories, replace(split, seen_test=seen)))["leak_masks"] == 2


times = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9).map(sorted), min_size=1, max_size=5)


@given(times, st.sampled_from(["file_order", "strict"]), st.sampled_from([leave_last_out, global_time]))
def test_no_split_of_ours_leaks(of: list[list[int]], rule: str, protocol: Callable[..., Split]) -> None:
    made = log_of([[at % 4 for at in own] for own in of], 4)
    histories = replace(made, time=np.array([at for own in of for at in own], np.int64))
    try:
        split = protocol(histories, rule, 3)
    except DataError:
        return
    assert not any(leaks(future_leaks(histories, split, fits={"counts": clean})).values())


# What is fitted


def clean(log: Histories, seen: np.ndarray) -> Scorer:
    return CoOccurrence.fit(log, seen).scores


def everything(log: Histories, seen: np.ndarray) -> Scorer:
    """Counts all events, seen or not."""
    return CoOccurrence.fit(log, np.ones_like(seen)).scores


def oracle(log: Histories, seen: np.ndarray) -> Scorer:
    """Gives each history's next item 1: it has looked up what comes after."""
    following = {tuple(log.of(u, n)): log.of(u)[n] for u in range(len(log.users)) for n in range(log.length(u))}

    def score(histories: Sequence[np.ndarray]) -> np.ndarray:
        rows = np.zeros((len(histories), len(log.items)), np.float32)
        for row, history in zip(rows, histories, strict=True):
            if tuple(history) in following:
                row[following[tuple(history)]] = 1
        return rows

    return score


def popular(log: Histories, seen: np.ndarray) -> Scorer:
    counts = np.bincount(log.item[seen], minlength=len(log.items))
    return lambda histories: np.repeat(counts[None], len(histories), 0)


def constant(log: Histories, seen: np.ndarray) -> Scorer:
    return lambda histories: np.zeros((len(histories), len(log.items)))


def last_popular(log: Histories, seen: np.ndarray) -> Scorer:
    """Popularity among the last items of all users, which are the targets."""
    counts = np.bincount(log.item[log.offsets[1:] - 1], minlength=len(log.items))
    return lambda histories: np.repeat(counts[None], len(histories), 0)


def lists(fitted_on: Callable[[np.ndarray], np.ndarray]) -> Fit:
    def fit(log: Histories, seen: np.ndarray) -> Scorer:
        likeness = Likeness(np.ones((len(log.items), 1), np.float32))
        encoder = sequence.fit(log, fitted_on(seen), likeness.vectors, 1, 0)
        retriever = Retriever.fit(log, fitted_on(seen), likeness, Mix(0.0, 1.0, 1.0, 1), encoder)
        return lambda histories: retriever.candidates(histories, 10)[0]

    return fit


@pytest.mark.parametrize("fit", [clean, popular, constant, lists(lambda seen: seen)])
@pytest.mark.parametrize("protocol", [leave_last_out, global_time])
def test_a_scorer_that_keeps_to_its_mask_is_not_accused(fit: Fit, protocol: Callable[..., Split]) -> None:
    histories = log_of(wanderers(30), 160)
    found = future_leaks(histories, protocol(histories, "file_order", 3), fits={"counts": fit})
    assert leaks(found)["leak_counts"] == 0
    assert found[-1].of > 30


@pytest.mark.parametrize("fit", [everything, oracle, last_popular, lists(np.ones_like)])
@pytest.mark.parametrize("protocol", [leave_last_out, global_time])
def test_a_scorer_that_sees_the_future_is_reported(fit: Fit, protocol: Callable[..., Split]) -> None:
    histories = log_of(wanderers(30), 160)
    found = future_leaks(histories, protocol(histories, "file_order", 3), fits={"counts": fit})[-1]
    assert (found.name, found.severity) == ("leak_counts", "error")
    assert found.count > 0
    assert found.examples[0] in histories.users
    assert found.remedy


# What is stored


def shop(folder: Path, data: DataConfig | None = None) -> Workspace:
    """Three users with the same six items, one a day, an hour after each other; states for every number of events."""
    log = {
        f"u{user}": [(item, START + n * DAY + user * HOUR, None) for n, item in enumerate(items)]
        for user, items in enumerate(("abcdef", "bcdefa", "cdaebf"))
    }
    config = Config(
        data=data or DataConfig(),
        users=UsersConfig(window=3, step=2, recent=2),
        retrieval=RetrievalConfig(candidates=3),
    )
    workspace = make_shop(folder, [{"item_id": item, "title": f"title {item}"} for item in IDS], log, config)
    wanted = [(user, end) for user in range(3) for end in range(7)]
    comprehend(workspace, FakeMllm(say=lambda prompt: "wants title"), CATALOGUE, wanted)
    return workspace


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Read only."""
    return shop(tmp_path_factory.mktemp("shop"))


def of_rows(workspace: Workspace, states: pl.DataFrame, windows: pl.DataFrame) -> list[Finding]:
    histories = workspace.dataset().histories()
    return future_leaks(histories, last_out(histories), states, windows)[2:]


def test_states_and_windows_as_made_leak_nothing(stored: Workspace) -> None:
    states, windows = stored.rows(STATES), stored.rows(WINDOWS)
    assert (states.height, windows.height > 3) == (21, True)
    found = of_rows(stored, states, windows)
    assert leaks(found) == {"leak_states": 0, "leak_windows": 0}
    assert [finding.of for finding in found] == [21, windows.height]


STATE = (pl.col("user_id") == "u1") & (pl.col("end") == 4)
"""It knows b, c, d, e; f and a come later."""


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("as_of", pl.lit(START + 4 * DAY)),
        ("recent", pl.lit(["e", "f"])),
        ("typical", pl.lit("a")),
        ("newest", pl.lit("f")),
        ("end", pl.lit(7, pl.Int32)),
        ("user_id", pl.lit("nobody")),
    ],
)
def test_a_state_that_knows_more_than_it_says_is_reported(stored: Workspace, column: str, value: pl.Expr) -> None:
    states, windows = stored.rows(STATES), stored.rows(WINDOWS)
    planted = states.with_columns(pl.when(STATE).then(value).otherwise(pl.col(column)).alias(column))
    found = of_rows(stored, planted, windows)
    assert leaks(found) == {"leak_states": 1, "leak_windows": 0}
    assert found[0].examples == ('["u1", 4]',)


def test_a_state_of_more_events_than_there_are_is_reported() -> None:
    # The next user's first event, which stands where u0's fourth would, is late enough to hide it.
    histories = replace(log_of([[0, 1, 2], [0, 1, 2]], 3), time=np.array([1, 2, 3, 9, 9, 9]))
    row = {"key": "k", "user_id": "u0", "as_of": 3, "recent": ["i2"], "typical": None, "newest": None}
    for end, count in ((3, 0), (4, 1)):
        found = future_leaks(histories, last_out(histories), states=pl.DataFrame([row | {"end": end}]))
        assert leaks(found)["leak_states"] == count


def test_a_state_may_name_old_items_and_old_times(stored: Workspace) -> None:
    states = stored.rows(STATES)
    older = states.with_columns(
        as_of=pl.when(STATE).then(START).otherwise("as_of"), newest=pl.when(STATE).then(pl.lit("b")).otherwise("newest")
    )
    assert leaks(of_rows(stored, older, stored.rows(WINDOWS)))["leak_states"] == 0


def test_a_window_that_knows_a_later_time_is_reported(stored: Workspace) -> None:
    states, windows = stored.rows(STATES), stored.rows(WINDOWS)
    late = windows.with_columns(as_of=pl.when(pl.int_range(pl.len()) == 0).then(pl.col("as_of") + 1).otherwise("as_of"))
    found = of_rows(stored, states, late)
    assert leaks(found) == {"leak_states": 0, "leak_windows": 1}
    assert found[1].examples == (windows["key"][0],)


# All of it


def test_the_audit_of_a_workspace_holds_every_check(stored: Workspace) -> None:
    found = {finding.name: finding for finding in audit_workspace(stored)}
    expected = {"histories": 0, "masks": 0, "states": 0, "windows": 0, "counts": 0, "candidates": 0}
    assert leaks([finding for name, finding in found.items() if name.startswith("leak_")]) == {
        f"leak_{name}": count for name, count in expected.items()
    }
    assert found["leak_states"].of == 21
    assert found["order_signal"].severity == "note", "three users tell nothing"
    assert found["missing_pictures"].count == len(IDS)
    assert found["unused_items"].examples == ("g", "h", "i")
    assert found["popularity_order"].of == 0, "every item that occurs is as popular as the others"


def test_the_audit_follows_the_configured_split(tmp_path: Path) -> None:
    data = DataConfig(protocol="global_time", tie_rule="strict")
    found = {finding.name: finding for finding in audit_workspace(shop(tmp_path, data))}
    # Cuts at the 12th, 14th and 16th of 18 events, each at a time of its own.
    assert (found["cold_test"].of, found["cold_validation"].of) == (2, 2)
    assert found["leak_masks"].severity == "ok"


def test_a_catalogue_that_a_history_exhausts_has_no_lists_to_check(tmp_path: Path) -> None:
    log = {user: [(item, START + n, None) for n, item in enumerate(own)] for user, own in (("a", "abc"), ("b", "bca"))}
    workspace = make_shop(tmp_path, [{"item_id": item} for item in "abc"], log)
    assert "leak_candidates" not in {finding.name for finding in audit_workspace(workspace)}


# Real data


@pytest.mark.data
def test_order_of_real_data(real_data: Path) -> None:
    histories = read(real_data / "ml100k_posters").with_repeats("first").histories()
    split = last_out(histories)
    found = order_signal(histories, split)
    assert (found.severity, found.of) == ("ok", 943)
    assert found.figures["NDCG@10"] == pytest.approx(0.104, abs=0.002)
    generator = np.random.default_rng(0)
    spans = [histories.item[histories.span(user)] for user in range(943)]
    shuffled = replace(histories, item=np.concatenate([generator.permutation(own) for own in spans]))
    assert order_signal(shuffled, last_out(shuffled)).severity == "note"
    fits: dict[str, Fit] = {"counts": clean}
    assert not any(leaks(future_leaks(histories, split, fits=fits)).values())

"""What the sections of `users.py` share: a set's described items, its targets, their states, and readings of them."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from common import SEED, Bench
from users_readings import written

from mllm_srec import items, tastes, user_states
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import UsersConfig, load_config
from mllm_srec.data.dataset import Histories
from mllm_srec.data.readers import read
from mllm_srec.data.sample import write_sample
from mllm_srec.data.split import Split, Targets
from mllm_srec.mllm.base import Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.pipeline import Pipeline
from mllm_srec.progress import say
from mllm_srec.records import ranking_request
from mllm_srec.user_states import History, UserState, Window, build_state, low_rating, read_window
from mllm_srec.windows import window_bounds
from mllm_srec.workspace import Workspace

SAMPLE = "sample"
SETS = ("ml100k_posters", "hm_sample", SAMPLE)
REAL = SETS[:2]
SHOP_USERS, SHOP_SEED = 600, 2


@dataclass(frozen=True)
class Case:
    """A target: item `target` (catalogue position) is chosen next, at `moment`, after events [0, end) of `history`."""

    user: int
    history: History
    end: int
    moment: int | None
    target: int

    @property
    def seen(self) -> np.ndarray:
        """int32 (end,): the items before it, oldest first."""
        return self.history.items[: self.end]


@dataclass(frozen=True)
class Log:
    """One set with its items described, and the model."""

    name: str
    pipeline: Pipeline
    mllm: LocalMllm

    @property
    def catalogue(self) -> Catalogue:
        """Its items."""
        return self.pipeline.catalogue

    @property
    def histories(self) -> Histories:
        """Its log."""
        return self.pipeline.histories

    @property
    def split(self) -> Split:
        """By the workspace's configuration: leave_last_out, file_order."""
        return self.pipeline.split

    @property
    def config(self) -> UsersConfig:
        """How windows are cut and written."""
        return self.pipeline.config.users

    @cached_property
    def low(self) -> float | None:
        """The rating of a dislike."""
        return low_rating(self.histories)

    def history(self, user: int) -> History:
        """All events of user number `user`."""
        return History.of(self.histories, user, self.low)

    def cases(self, targets: Targets) -> list[Case]:
        """The targets with what stands before them."""
        found = []
        for user, position, end in zip(targets.user, targets.position, targets.end, strict=True):
            history = self.history(int(user))
            moment = None if history.time is None else int(history.time[position])
            found.append(Case(int(user), history, int(end), moment, int(history.items[position])))
        return found

    def request(self, state: UserState, candidates: Sequence[int] | np.ndarray) -> Request:
        """The likelihood of candidates under a state; nothing is asked."""
        asked = ranking_request(state, self.catalogue, candidates)
        return Request(asked.prefix, asked.candidates)

    def tokens(self, state: UserState) -> int:
        """Of the prompt before the first candidate."""
        head, _ = self.mllm.renderer.split(self.request(state, ()))
        return len(self.mllm.renderer.ids(head.rstrip(" ")))

    def room(self, case: Case) -> int:
        """The most tokens that a prompt may have before the target's text."""
        text = self.mllm.renderer.neutral(self.catalogue.candidates[case.target])
        return self.mllm.renderer.context - len(self.mllm.renderer.ids(" " + text))


@cache
def opened(bench: Bench, name: str) -> Log:
    """The set's workspace in the work folder, made and described if need be; one that lies there is used as it is."""
    place = bench.work / name
    if not place.exists():
        say(f"{name}: making {place}")
        config = load_config()
        dataset = read(shop(bench) if name == SAMPLE else bench.data / name)
        Workspace.create(place, config, dataset.with_repeats(config.data.repeats))
    workspace = Workspace.open(place)
    items.describe(workspace, bench.trained)
    return Log(name, Pipeline(workspace), bench.trained)


def shop(bench: Bench) -> Path:
    """The folder of the sample shop, written if need be."""
    folder = bench.work / f"{SAMPLE}_shop"
    if not (folder / "interactions.csv").exists():  # written last
        write_sample(folder, users=SHOP_USERS, seed=SHOP_SEED)
    return folder


def sample(bench: Bench, targets: Targets, count: int) -> Targets:
    """`count` seeded targets, or the bench's limit of them, in the order of users."""
    rows = np.random.default_rng(SEED).permutation(len(targets))[: min(count, bench.limit or count)]
    return targets.take(np.sort(rows))


# States


def newest_window(log: Log, history: History, end: int) -> Window:
    """The window that a state after `end` > 0 events reads."""
    return read_window(history, *window_bounds(end, history.time, log.config)[-1], log.catalogue)


def states_of(
    bench: Bench, log: Log, cases: Sequence[Case], label: str, config: UsersConfig | None = None
) -> list[UserState]:
    """The state that every target sees, asked at the target's time."""
    config = config or log.config
    windows = [newest_window(log, case.history, case.end) for case in cases]
    states = []
    for case, summary in zip(cases, written(bench, log.mllm, windows, config, label), strict=True):
        state = build_state(case.history, case.end, summary.text, log.catalogue, config)
        states.append(state if case.moment is None else state.asked_at(case.moment))
    return states


def newest_within(state: UserState, seen: np.ndarray, tokens: Callable[[UserState], int], budget: int) -> UserState:
    """The state with as many of the newest items `seen` (oldest first) as leave its prompt within `budget` tokens."""

    def showing(count: int) -> UserState:
        return replace(state, recent=tuple(seen[len(seen) - count :].tolist()))

    count = bisect_right(range(len(seen) + 1), budget, key=lambda shown: tokens(showing(shown))) - 1
    return showing(max(count, 0))


def with_recent(log: Log, state: UserState, case: Case, recent: int) -> UserState:
    """The state with the target's `recent` newest items, or fewer where the model's context is too short."""
    return newest_within(state, case.seen[max(0, case.end - recent) :], log.tokens, log.room(case))


def without_words(state: UserState) -> UserState:
    """Raw history alone: neither profile nor preference, and no choice in full."""
    return replace(state, profile="", preference="", typical=None, newest=None)


# What a state names


def liked_facts(history: History, start: int, stop: int, catalogue: Catalogue) -> list[set[str]]:
    """Facts of the items of events [start, stop) that were not rated low."""
    return [set(catalogue.facts[history.items[at]]) for at in range(start, stop) if not history.disliked[at]]


def moved_names(state: UserState, history: History, catalogue: Catalogue) -> dict[str, list[str]]:
    """stays, rises, fades, lately -> the names as a state prints them."""
    liked = liked_facts(history, 0, state.end, catalogue)
    return {
        name: tastes.distinct(getattr(state.movement, name), liked, user_states.NAMED)
        for name in ("stays", "rises", "fades", "lately")
    }

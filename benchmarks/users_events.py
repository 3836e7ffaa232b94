"""Section `events`: what one more event costs where all before it is stored, against everything from scratch."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SEED, Bench, at_most, figure, show, shown
from items_speed import timed
from users_common import Log, opened

from mllm_srec import users
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.progress import say
from mllm_srec.windows import closed_until, window_bounds
from mllm_srec.workspace import Workspace

SET = "ml100k_posters"
USERS, STORED, NEXT = 20, 50, 6
"""Users; events that cost everything; at most so many events after them, two steps of the windows."""
CALLS_MARK, CLOSING_MARK, SHARE_MARK = 2, 3, 0.2


@dataclass
class Counted:
    """The model with a count of its work: prompts given to it, tokens read in them, tokens written or scored."""

    mllm: LocalMllm
    calls: int = 0
    tokens: int = 0

    @property
    def identity(self) -> str:
        """The model's."""
        return self.mllm.identity

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """As the model."""
        texts = self.mllm.generate(prompts, max_new_tokens)
        self._count([self.mllm.renderer.text(prompt) for prompt in prompts], texts)
        return texts

    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """As the model."""
        heads = [self.mllm.renderer.split(request)[0] for request in requests]
        self._count(heads, [text for request in requests for text in request.candidates])
        return self.mllm.score(requests)

    def _count(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        self.calls += len(prompts)
        self.tokens += sum(len(self.mllm.renderer.ids(text)) for text in (*prompts, *texts))


@dataclass(frozen=True)
class Cost:
    """Of bringing one user's windows up to `end` events; `closes`: the newest event filled a window."""

    end: int
    closes: bool
    calls: int
    tokens: int
    processor: float
    wall: float


def events(bench: Bench, sets: Sequence[str]) -> dict[str, Any]:
    """Costs of users with at least two events more than `STORED`; nothing if their set is not wanted."""
    if SET not in sets:
        return {}
    log = opened(bench, SET)
    lengths = np.diff(log.histories.offsets)
    long = np.flatnonzero(lengths >= STORED + 2)
    chosen = np.sort(np.random.default_rng(SEED).permutation(long)[: min(USERS, bench.limit or USERS)])
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def scratch() -> Workspace:
            return scratch_of(log, Path(folder) / SET)

        for number, user in enumerate(chosen.tolist(), 1):
            say(f"events: user {number} of {len(chosen)}")
            history = log.history(user)
            made_of = [log.mllm.identity, torch.get_num_threads(), log.config.model_dump_json(), log.catalogue.mark]
            made_of += [history.items.tolist()]
            rows.append(
                bench.kept(f"events-user-{user}", __file__, made_of, lambda user=user: costs_of(scratch(), log, user))
            )
    return summary(chosen.tolist(), rows)


def scratch_of(log: Log, place: Path) -> Workspace:
    """A copy of the set's workspace that knows no user; its log in memory, the model warm."""
    shutil.copytree(log.pipeline.workspace.root, place, ignore=shutil.ignore_patterns("user_*", ".lock", ".writer"))
    log.mllm.generate([Prompt(("What does this person want?",))], 4)
    workspace = Workspace.open(place)
    workspace.dataset().histories()
    return workspace


def costs_of(workspace: Workspace, log: Log, user: int) -> list[dict[str, Any]]:
    """Cost of the first `STORED` events at once, then of each of the next ones."""
    length = len(log.history(user).items)
    ends = range(STORED, min(length, STORED + NEXT) + 1)
    return [asdict(cost_of(workspace, log, user, end)) for end in ends]


def cost_of(workspace: Workspace, log: Log, user: int, end: int) -> Cost:
    """Every window of the user's first `end` events and the state after them, as far as they are not stored."""
    counted, time = Counted(log.mllm), log.history(user).time
    seconds, _ = timed(lambda: users.comprehend(workspace, counted, log.catalogue, [(user, end)], every_window=True))
    before, after = (closed_until(window_bounds(at, time, log.config), log.config) for at in (end - 1, end))
    return Cost(end, after > before, counted.calls, counted.tokens, seconds["processor"], seconds["wall"])


def summary(people: Sequence[int], rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Means over users of the cost from scratch, of one event, and of their ratio."""
    first = [of_user[0] for of_user in rows]
    later = [(user, cost, whole) for user, whole, of in zip(people, first, rows, strict=True) for cost in of[1:]]
    owners = [user for user, _, _ in later]
    closing = [(user, cost["calls"]) for user, cost, _ in later if cost["closes"]]
    calls = figure([cost["calls"] for _, cost, _ in later], owners)
    closing_calls = figure([count for _, count in closing], [user for user, _ in closing])
    shares = {
        name: figure([cost[name] / whole[name] for _, cost, whole in later], owners)
        for name in ("calls", "tokens", "processor", "wall")
    }
    return {
        "users": len(people),
        "events": len(later),
        "from_scratch": {name: figure([cost[name] for cost in first]) for name in shares},
        "one_event": {name: figure([cost[name] for _, cost, _ in later], owners) for name in shares},
        "calls": at_most(calls, CALLS_MARK),
        "calls_when_a_window_closes": at_most(closing_calls, CLOSING_MARK),
        "shares": {
            name: at_most(of, SHARE_MARK) if name in ("tokens", "processor") else of for name, of in shares.items()
        },
    }


def show_events(result: dict[str, Any]) -> None:
    """Costs, then calls."""
    if not result:
        print(f"events: no {SET} among the sets\n")
        return
    rows = [
        (name, *(shown(result[part][name], 2) for part in ("from_scratch", "one_event")), shown(of))
        for name, of in result["shares"].items()
    ]
    title = f"events: {result['users']} users, {STORED} events from scratch, then {result['events']} events one by one"
    show(title, ("cost", f"{STORED} events", "one more event", "ratio"), rows)
    print(f"prompts given to the model per event: {shown(result['calls'])}")
    print(f"where it closes a window: {shown(result['calls_when_a_window_closes'])}\n")

"""Stage 2, temporal user comprehension: windows -> summaries -> dynamic preference and profile (Sci Rep 2025, Fig. 3a).

A state is the user after `end` events: it is made of events [0, end) alone. Windows are anchored at the first event,
so a closed window never changes, and states at several positions of one history share all their closed windows.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mllm_srec.config import UsersConfig
from mllm_srec.data.dataset import Histories
from mllm_srec.errors import StoreError
from mllm_srec.facts import unsupported_words
from mllm_srec.items import Catalogue
from mllm_srec.mllm.base import Mllm, Prompt, Request, check_finite
from mllm_srec.prompts import users as prompts
from mllm_srec.workspace import Job, Table, Workspace, fingerprint

WINDOWS = Table(
    "user_windows",
    pa.schema(
        [
            ("user_id", pa.string()),
            ("start", pa.int32()),
            ("stop", pa.int32()),
            ("summary", pa.string()),
            ("phrases", pa.list_(pa.string())),
            ("weights", pa.list_(pa.float32())),
        ]
    ),
)
STATES = Table(
    "user_states",
    pa.schema(
        [
            ("user_id", pa.string()),
            ("end", pa.int32()),
            ("as_of", pa.int64()),
            ("profile", pa.string()),
            ("preference", pa.string()),
            ("phrases", pa.list_(pa.string())),
            ("recent", pa.list_(pa.string())),
        ]
    ),
)
PHRASES = Table("phrase_priors", pa.schema([("loglik", pa.float32())]))

PHRASES_PER_WINDOW = 6
PHRASES_PER_LINE = 3
NOTICEABLE = 0.05
"""Nats; a phrase whose weight is below is not called a taste."""
MEMORY = 0.5
"""Share of the belief that survives each window."""
DAY = 86_400_000


@dataclass(frozen=True)
class Window:
    """Events [start, stop) of one user with what the model reads: one line and the facts per event."""

    start: int
    stop: int
    lines: tuple[str, ...]
    phrases: tuple[tuple[str, float], ...]
    """What the window's liked items share beyond the catalogue's base rate, with strength in nats."""


@dataclass(frozen=True)
class Summary:
    """A comprehended window: its text and the weight of each phrase."""

    size: int
    closed: bool
    text: str
    weights: dict[str, float]


@dataclass(frozen=True)
class UserState:
    """What ranking knows of a user after `end` events; `as_of` is the time (ms UTC) of the newest of them."""

    user_id: str
    end: int
    as_of: int | None
    profile: str
    preference: str
    phrases: tuple[str, ...]
    """The current tastes by name, strongest first."""
    recent: tuple[int, ...]
    """Catalogue positions of the newest items, oldest first."""


def closed_windows(end: int, config: UsersConfig) -> int:
    """How many windows are full after `end` events."""
    return 0 if end < config.window else (end - config.window) // config.step + 1


def window_bounds(end: int, config: UsersConfig) -> list[tuple[int, int]]:
    """(start, stop) of the windows of events [0, end) that touch its newest `config.last` events.

    Closed windows are [k * step, k * step + window); behind the last closed one stands one open window up to `end`.
    """
    closed = closed_windows(end, config)
    bounds = [(k * config.step, k * config.step + config.window) for k in range(closed)]
    if end > (bounds[-1][1] if bounds else 0):
        bounds.append((closed * config.step, end))
    return [(start, stop) for start, stop in bounds if stop > end - config.last]


def shared_phrases(facts: Sequence[Sequence[str]], base_rate: dict[str, float]) -> list[tuple[str, float]]:
    """Facts that a window's items share beyond the catalogue's base rate, strongest first.

    Strength in nats: s * ln(s / base) with s = count / (size + 1); the + 1 keeps one or two items from proving a taste.
    A fact counts when two items have it, or when the window has fewer than three.
    """
    count = Counter(fact for of_item in facts for fact in set(of_item))
    least = 2 if len(facts) >= 3 else 1
    found = []
    for fact, n in count.items():
        share = n / (len(facts) + 1)
        if n >= least and share > base_rate[fact]:
            found.append((fact, round(share * math.log(share / base_rate[fact]), 4)))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:PHRASES_PER_WINDOW]


def low_rating(histories: Histories) -> float | None:
    """The rating at or below which an event is a dislike: the lowest 30 % of the scale; None without a scale.

    The scale (lowest and highest rating anywhere in the log) is taken as a fact of the data set, like its catalogue.
    """
    rated = histories.rating[~np.isnan(histories.rating)]
    if len(rated) == 0 or rated.min() == rated.max():
        return None
    return float(rated.min() + 0.3 * (rated.max() - rated.min()))


def cut_windows(
    catalogue: Catalogue, items: np.ndarray, disliked: np.ndarray, config: UsersConfig, end: int
) -> list[Window]:
    """The windows of one history as the model will read them; `items` and `disliked` hold at least `end` events."""
    windows = []
    for start, stop in window_bounds(end, config):
        inside = range(start, stop)
        lines = [
            prompts.rated_low(catalogue.lines[items[i]]) if disliked[i] else catalogue.lines[items[i]] for i in inside
        ]
        liked = [catalogue.facts[items[i]] for i in inside if not disliked[i]]
        windows.append(Window(start, stop, tuple(lines), tuple(shared_phrases(liked, catalogue.base_rate))))
    return windows


def phrase_likelihoods(mllm: Mllm, phrases: Sequence[str]) -> list[float]:
    """Mean log-likelihood of each phrase for a person of whom nothing is known."""
    request = Request(Prompt((prompts.EMPTY_WINDOW,)), tuple(phrases))
    return [float(value) for value in check_finite(mllm.score([request])[0][:, 1], "likelihoods of phrases")]


def summarise(
    mllm: Mllm, windows: Sequence[Window], prior: dict[str, float], config: UsersConfig
) -> list[tuple[str, dict[str, float]]]:
    """(summary, phrase weights) of each window.

    `score`: one packed pass per window weighs its phrases; weight = strength * sigmoid(ln p(phrase | window) -
    ln p(phrase | nobody)), both per token: what the model finds no likelier for this person counts half or less.
    `generate`: the model writes the sentence; words that neither items nor phrases hold send it back to the rule.
    """
    if config.summary == "generate":
        asked = [
            Prompt((prompts.summarise(w.lines, [p for p, _ in w.phrases]),), answer=prompts.SUMMARY_ANSWER)
            for w in windows
        ]
        written = [" ".join(text.split()) for text in mllm.generate(asked, config.summary_tokens)]
        weights = [dict(w.phrases) for w in windows]
        kept = []
        for window, text, weight in zip(windows, written, weights, strict=True):
            sound = text and not unsupported_words(text, *window.lines, *weight)
            kept.append((text if sound else prompts.summary(list(weight)[:PHRASES_PER_LINE]), weight))
        return kept
    told = [w for w in windows if w.phrases]
    requests = [Request(Prompt((prompts.window(w.lines),)), tuple(p for p, _ in w.phrases)) for w in told]
    scored = iter(mllm.score(requests) if requests else [])
    summaries = []
    for window in windows:
        weights_of: dict[str, float] = {}
        if window.phrases:
            logliks = check_finite(next(scored)[:, 1], "likelihoods of phrases")
            for (phrase, strength), loglik in zip(window.phrases, logliks, strict=True):
                weights_of[phrase] = round(strength / (1 + math.exp(prior[phrase] - float(loglik))), 4)
        strongest = sorted(weights_of, key=lambda p: (-weights_of[p], p))
        summaries.append((prompts.summary(strongest[:PHRASES_PER_LINE]), weights_of))
    return summaries


def _strongest(weights: dict[str, float], limit: int = PHRASES_PER_LINE) -> list[str]:
    noticeable = [phrase for phrase in weights if weights[phrase] >= NOTICEABLE]
    return sorted(noticeable, key=lambda phrase: (-weights[phrase], phrase))[:limit]


def movement(summaries: Sequence[Summary]) -> tuple[list[str], list[str], list[str]]:
    """(stays, rises, fades): the newest window against the belief built recurrently from those before it.

    Belief b_k = MEMORY * b_(k-1) + (1 - MEMORY) * w_k. A newest window of fewer than three events makes nothing fade.
    """
    belief: dict[str, float] = {}
    for summary in summaries[:-1]:
        names = belief.keys() | summary.weights.keys()
        belief = {p: MEMORY * belief.get(p, 0.0) + (1 - MEMORY) * summary.weights.get(p, 0.0) for p in names}
    now = summaries[-1].weights
    stays = _strongest({p: w for p, w in now.items() if belief.get(p, 0.0) >= NOTICEABLE / 2})
    rises = _strongest({p: w for p, w in now.items() if belief.get(p, 0.0) < NOTICEABLE / 2})
    gone = {p: w for p, w in belief.items() if now.get(p, 0.0) < NOTICEABLE / 2}
    return stays, rises, _strongest(gone) if summaries[-1].size >= 3 else []


def stable_tastes(summaries: Sequence[Summary]) -> list[str]:
    """The strongest phrases on average over the closed windows (over all, while none is closed)."""
    closed = [s for s in summaries if s.closed] or list(summaries)
    total: Counter[str] = Counter()
    for summary in closed:
        total.update({p: w / len(closed) for p, w in summary.weights.items()})
    return _strongest(dict(total), PHRASES_PER_LINE + 1)


def build_state(
    user_id: str,
    items: np.ndarray,
    time: np.ndarray | None,
    disliked: np.ndarray,
    end: int,
    summaries: Sequence[Summary],
    catalogue: Catalogue,
    config: UsersConfig,
) -> UserState:
    """The state after `end` events from its comprehended windows; `items`, `time`, `disliked` are the user's own."""
    if end == 0:
        return UserState(user_id, 0, None, prompts.NOTHING, prompts.NOTHING, (), ())
    stays, rises, fades = movement(summaries)
    low = [catalogue.lines[items[i]] for i in range(max(0, end - config.window), end) if disliked[i]][-2:]
    stable = stable_tastes(summaries)
    closed = closed_windows(end, config)
    settled = (closed - 1) * config.step + config.window if closed else end
    gaps = np.diff(time[max(0, settled - config.last) : settled]) if time is not None else np.array([])
    preference = prompts.preference(stays, rises, fades, low)
    if config.summary == "generate" and summaries[-1].text != prompts.NO_TASTE:
        preference = prompts.in_own_words(preference, summaries[-1].text)
    return UserState(
        user_id=user_id,
        end=end,
        as_of=int(time[end - 1]) if time is not None else None,
        profile=prompts.profile(stable, settled, float(np.median(gaps)) / DAY if len(gaps) else None),
        preference=preference,
        phrases=tuple(dict.fromkeys(stays + rises + stable)),
        recent=tuple(int(i) for i in items[max(0, end - config.recent) : end]) if config.recent else (),
    )


def window_key(user_id: str, start: int, stop: int) -> str:
    """The key of a window's row."""
    return json.dumps([user_id, start, stop], ensure_ascii=False)


def state_key(user_id: str, end: int) -> str:
    """The key of a state's row."""
    return json.dumps([user_id, end], ensure_ascii=False)


def comprehend(workspace: Workspace, mllm: Mllm, catalogue: Catalogue, wanted: Iterable[tuple[int, int]]) -> None:
    """Make or renew windows and states for `wanted` pairs (user index, number of events visible)."""
    config = workspace.config.users
    histories = workspace.dataset().histories()
    low = low_rating(histories)
    pairs = sorted(set(wanted))
    windows: dict[str, tuple[str, Window]] = {}
    keys: dict[tuple[int, int], list[str]] = {}
    for user, end in pairs:
        items, disliked = histories.of(user), disliked_events(histories, user, low)
        for window in cut_windows(catalogue, items, disliked, config, end):
            key = window_key(histories.users[user], window.start, window.stop)
            windows[key] = (histories.users[user], window)
            keys.setdefault((user, end), []).append(key)

    phrases = (
        sorted({p for _, window in windows.values() for p, _ in window.phrases}) if config.summary == "score" else []
    )
    read_by = (prompts.VERSION, mllm.identity)
    written_as = (config.summary, config.summary_tokens)
    workspace.produce(
        PHRASES,
        [Job(phrase, fingerprint(phrase, *read_by), phrase) for phrase in phrases],
        lambda batch: [
            {"status": "ok", "reason": "", "loglik": value}
            for value in phrase_likelihoods(mllm, [job.payload for job in batch])
        ],
        batch=64,
        label="comprehend: phrases",
    )
    prior = {row["key"]: row["loglik"] for row in workspace.rows(PHRASES).iter_rows(named=True)}
    jobs = [
        Job(
            key,
            fingerprint(*window.lines, *(x for pair in window.phrases for x in pair), *read_by, *written_as),
            (user_id, window),
        )
        for key, (user_id, window) in windows.items()
    ]

    def compute(batch: list[Job]) -> list[dict[str, object]]:
        made = summarise(mllm, [job.payload[1] for job in batch], prior, config)
        return [
            {
                "status": "ok",
                "reason": "",
                "user_id": user_id,
                "start": window.start,
                "stop": window.stop,
                "summary": text,
                "phrases": list(weights),
                "weights": list(weights.values()),
            }
            for (user_id, window), (text, weights) in zip((job.payload for job in batch), made, strict=True)
        ]

    workspace.produce(WINDOWS, jobs, compute, batch=workspace.config.model.batch_size, label="comprehend: windows")

    rows = {row["key"]: row for row in workspace.rows(WINDOWS).iter_rows(named=True)}
    state_jobs = []
    for user, end in pairs:
        used = [rows[key] for key in keys.get((user, end), [])]
        marks = [row["fingerprint"] for row in used]
        seen = slice(histories.span(user).start, histories.span(user).start + end)
        events = [histories.item[seen], disliked_events(histories, user, low)[:end]]
        events += [] if histories.time is None else [histories.time[seen]]
        mark = fingerprint(
            *marks, *(int(value) for column in events for value in column), prompts.VERSION, config.model_dump_json()
        )
        state_jobs.append(Job(state_key(histories.users[user], end), mark, (user, end, used)))

    def compose(batch: list[Job]) -> list[dict[str, object]]:
        states = []
        for job in batch:
            user, end, used = job.payload
            time = None if histories.time is None else histories.time[histories.span(user)]
            state = build_state(
                histories.users[user],
                histories.of(user),
                time,
                disliked_events(histories, user, low),
                end,
                [_as_summary(row, config) for row in used],
                catalogue,
                config,
            )
            states.append(
                {
                    "status": "ok",
                    "reason": "",
                    "user_id": state.user_id,
                    "end": end,
                    "as_of": state.as_of,
                    "profile": state.profile,
                    "preference": state.preference,
                    "phrases": list(state.phrases),
                    "recent": [catalogue.ids[i] for i in state.recent],
                }
            )
        return states

    workspace.produce(STATES, state_jobs, compose, batch=256, label="comprehend: states")


def comprehend_history(
    mllm: Mllm,
    catalogue: Catalogue,
    items: np.ndarray,
    config: UsersConfig,
    user_id: str = "",
    time: np.ndarray | None = None,
    disliked: np.ndarray | None = None,
) -> UserState:
    """The state of a history that no workspace holds; nothing is stored."""
    low = np.zeros(len(items), dtype=bool) if disliked is None else disliked
    windows = cut_windows(catalogue, items, low, config, len(items))
    phrases = sorted({p for window in windows for p, _ in window.phrases}) if config.summary == "score" else []
    prior = dict(zip(phrases, phrase_likelihoods(mllm, phrases), strict=True)) if phrases else {}
    made = summarise(mllm, windows, prior, config) if windows else []
    summaries = [
        Summary(w.stop - w.start, w.stop - w.start == config.window, text, weights)
        for w, (text, weights) in zip(windows, made, strict=True)
    ]
    return build_state(user_id, items, time, low, len(items), summaries, catalogue, config)


def load_states(workspace: Workspace, catalogue: Catalogue) -> dict[tuple[str, int], UserState]:
    """All stored states by (user id, end)."""
    place = {item_id: i for i, item_id in enumerate(catalogue.ids)}
    return {
        (row["user_id"], row["end"]): UserState(
            row["user_id"],
            row["end"],
            row["as_of"],
            row["profile"],
            row["preference"],
            tuple(row["phrases"]),
            tuple(place[item_id] for item_id in row["recent"]),
        )
        for row in workspace.rows(STATES).iter_rows(named=True)
    }


def state_of(states: dict[tuple[str, int], UserState], user_id: str, end: int) -> UserState:
    """The state of a user after `end` events.

    Raises:
        StoreError: `comprehend` has not made it.
    """
    if (user_id, end) not in states:
        raise StoreError(f"user {user_id!r} has no state after {end} events: run `mllm-srec comprehend`")
    return states[user_id, end]


def disliked_events(histories: Histories, user: int, low: float | None) -> np.ndarray:
    """bool (n,): the user's events rated `low_rating` or below."""
    ratings = histories.rating[histories.span(user)]
    if low is None:
        return np.zeros(len(ratings), dtype=bool)
    disliked: np.ndarray = np.nan_to_num(ratings, nan=np.inf) <= low
    return disliked


def _as_summary(row: dict[str, object], config: UsersConfig) -> Summary:
    size = int(row["stop"]) - int(row["start"])  # type: ignore[call-overload]
    # Stored as float32: rounded as they were, so that a state is the same whether its windows were stored or not.
    weights = {p: round(w, 4) for p, w in zip(row["phrases"], row["weights"], strict=True)}  # type: ignore[call-overload]
    return Summary(size, size == config.window, str(row["summary"]), weights)

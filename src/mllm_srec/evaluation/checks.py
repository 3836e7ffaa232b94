"""Checks of what an evaluation stands on: does order matter, and does anything know what its target must not show.

Leaks are looked for where they can hide: in what a target sees, in the events that counts may be fitted on, in stored
windows and states, and in whatever is fitted on the log. The last is found by intervention: all that must not be seen
is replaced, the thing is fitted again, and nothing that it says of the same visible histories may change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from mllm_srec import metrics
from mllm_srec.data.audit import Finding, audit, finding
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Split, Targets, global_time, leave_last_out
from mllm_srec.evaluation.protocol import Scorer, histories_of, place_targets
from mllm_srec.retrieval import CoOccurrence, Likeness, Mix, Retriever, sequence
from mllm_srec.retrieval.signals import LAST
from mllm_srec.users import STATES, WINDOWS
from mllm_srec.workspace import Workspace

Fit = Callable[[Histories, np.ndarray], Scorer]
"""(log, mask of the events that may be seen) -> what gives each visible history a row of scores, or of candidates."""

CUTOFF = 10
SHUFFLES = 10
"""Random orders per history, averaged, so that the difference is the order's and not one shuffle's."""
SAMPLES = 1000
ORDER_TARGETS, LEAK_TARGETS = 2000, 256
"""Targets looked at, a seeded sample: enough to tell, and bounded in time."""


def audit_workspace(workspace: Workspace) -> list[Finding]:
    """Facts of the data, whether order matters, and leaks, under the workspace's split.

    Raises:
        DataError, UsageError: the log does not allow the configured split.
    """
    config, dataset = workspace.config, workspace.dataset()
    histories, data = dataset.histories(), config.data
    make = leave_last_out if data.protocol == "leave_last_out" else global_time
    split = make(histories, data.tie_rule, data.min_history)
    fits: dict[str, Fit] = {"counts": lambda log, seen: CoOccurrence.fit(log, seen).scores}
    # No list can be longer than what the longest history leaves.
    k = min(config.retrieval.candidates, len(histories.items) - int(np.diff(histories.offsets).max()))
    if k > 0:
        fits["candidates"] = lambda log, seen: _candidates(log, seen, k)
    return [
        *audit(dataset, split, workspace.pictures()),
        order_signal(histories, split, config.seed),
        *future_leaks(histories, split, workspace.rows(STATES), workspace.rows(WINDOWS), fits, config.seed),
    ]


def order_signal(histories: Histories, split: Split, seed: int = 0) -> Finding:
    """Does it hurt a sequence scorer to see the visible histories in random order?

    The scorer is co-occurrence of the last five items, fitted on the log as it stands; test targets that see more than
    five events are placed with their history as it is and in random orders. If NDCG@10 is not better as it is (95 %
    bootstrap interval of the paired difference over users), there is no order to learn, be it that taste does not
    move, that times are not true, or that the users are too few. An order that is reversed as a whole looks like a
    true one: what stands close together still does.
    """
    generator = np.random.default_rng(seed)
    targets = _sampled(split.test.take(np.flatnonzero(split.test.end > LAST)), ORDER_TARGETS, generator)
    counted, who = (len(targets), len(split.test), "targets"), "test targets that see more than five events"
    if len(targets) == 0:
        return finding("order_signal", "note", who, counted, "only longer histories can tell whether order matters")
    fitted = CoOccurrence.fit(histories, split.seen_test)

    def shuffled(block: Sequence[np.ndarray]) -> np.ndarray:
        return fitted.scores([generator.permutation(history) for history in block])

    kept = _ndcg(histories, targets, fitted.scores)
    mixed = np.mean([_ndcg(histories, targets, shuffled) for _ in range(SHUFFLES)], axis=0)
    loss = metrics.paired_bootstrap(kept, mixed, targets.user, SAMPLES, seed)
    mean, low, high = (round(value, 9) + 0.0 for value in (loss.mean, loss.low, loss.high))  # sums leave a rounding
    matters = low > 0
    return finding(
        "order_signal",
        "ok" if matters else "note",
        f"{who}: in random order these rank them {'worse' if matters else 'no worse, so no order shows'}",
        counted,
        "claim no sequence: see that the times are true, and whether the users are too few to tell",
        {
            f"NDCG@{CUTOFF}": float(kept.mean()),
            "in random order": float(mixed.mean()),
            "loss": mean,
            "loss from": low,
            "loss to": high,
        },
    )


def future_leaks(
    histories: Histories,
    split: Split,
    states: pl.DataFrame | None = None,
    windows: pl.DataFrame | None = None,
    fits: Mapping[str, Fit] | None = None,
    seed: int = 0,
) -> list[Finding]:
    """Is a target, or anything at or after it, in what may be known when it is asked for?

    Args:
        states: rows of `users.STATES`: a state after `end` events may name these events' items and times only.
        windows: rows of `users.WINDOWS`, likewise for events before `stop`.
        fits: what is fitted on the log, by name; the same arguments must give the same rows.

    Returns:
        Findings "leak_histories" and "leak_masks", then "leak_states", "leak_windows" and "leak_NAME" of each fit where
        they are given; an error each where something leaks.
    """
    found = [_visible_leaks(histories, split), _mask_leaks(histories, split)]
    if states is not None:
        found.append(_row_leaks("states", histories, states, "end", ("recent", "typical", "newest")))
    if windows is not None:
        found.append(_row_leaks("windows", histories, windows, "stop", ()))
    found += [_fit_leaks(name, fit, histories, split, seed) for name, fit in (fits or {}).items()]
    return found


def _leak(name: str, says: str, counted: tuple[int, int, str], remedy: str, examples: Sequence[str]) -> Finding:
    return finding(f"leak_{name}", "error" if counted[0] else "ok", says, counted, remedy, examples=examples)


def _visible_leaks(histories: Histories, split: Split) -> Finding:
    """Targets that see themselves or later events of their user; under `strict` also those that see a tie."""
    users: list[int] = []
    total = 0
    for targets, _ in _parts(split):
        total += len(targets)
        leaks = targets.end > targets.position
        if split.tie_rule == "strict" and histories.time is not None:
            start = histories.offsets[targets.user]
            newest = histories.time[start + np.maximum(targets.end, 1) - 1]
            leaks |= (targets.end > 0) & (newest >= histories.time[start + targets.position])
        users += targets.user[leaks].tolist()
    return _leak(
        "histories",
        "targets whose visible history holds them, or an event at or after them",
        (len(users), total, "targets"),
        "cut histories as data.split does",
        [histories.users[user] for user in users],
    )


def _mask_leaks(histories: Histories, split: Split) -> Finding:
    """Targets that a mask lets be seen, or that are not later than all that it lets be seen: of their user and, under
    the global time split, of anyone. A part's mask must not show targets of later parts either."""
    owner = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))
    users: list[int] = []
    total = 0
    parts = _parts(split)
    for at, (_, seen) in enumerate(parts):
        flat = np.flatnonzero(seen)
        newest = np.full(len(histories.users), -1)
        np.maximum.at(newest, owner[flat], flat - histories.offsets[owner[flat]])
        for targets, _ in parts[at:]:
            total += len(targets)
            leaks = newest[targets.user] >= targets.position
            if split.protocol == "global_time" and histories.time is not None and len(flat):
                when = histories.time[histories.offsets[targets.user] + targets.position]
                leaks |= when <= histories.time[flat].max()
            users += targets.user[leaks].tolist()
    return _leak(
        "masks",
        "pairs of a target and a part's mask where counts and models may be fitted on it or on later events",
        (len(users), total, "pairs"),
        "fit on the masks of data.split",
        [histories.users[user] for user in users],
    )


def _row_leaks(name: str, histories: Histories, rows: pl.DataFrame, end: str, items: Sequence[str]) -> Finding:
    """Stored rows that name a later event than the first row[end] of their user: by time, or by an item in a column of
    `items`. What a model wrote is not read: its instruction is made of the same events."""
    number = {user: at for at, user in enumerate(histories.users)}
    place = {item: at for at, item in enumerate(histories.items)}

    def knows_more(row: Mapping[str, Any]) -> bool:
        user, stop = number.get(row["user_id"]), row[end]
        if user is None or stop > histories.length(user):
            return True
        if row["as_of"] is not None and histories.time is not None:
            newest = int(histories.offsets[user]) + stop - 1
            if stop == 0 or row["as_of"] > histories.time[newest]:
                return True
        visible = set(histories.of(user, stop).tolist())
        named = [row[column] for column in items if row[column] is not None]
        ids = [one for value in named for one in (value if isinstance(value, list) else [value])]
        return any(place.get(item) not in visible for item in ids)

    leaks = [row["key"] for row in rows.iter_rows(named=True) if knows_more(row)]
    return _leak(
        name,
        f"stored {name} that name an event behind the last one that they may know",
        (len(leaks), rows.height, name),
        "do not use them: make a new workspace with `mllm-srec ingest`",
        leaks,
    )


def _fit_leaks(name: str, fit: Fit, histories: Histories, split: Split, seed: int) -> Finding:
    """Targets whose row changes when every event that must not be seen becomes one of another item."""
    generator = np.random.default_rng(seed)
    count = len(histories.items)
    other = (histories.item + generator.integers(1, max(count, 2), len(histories.item))) % count
    users: list[int] = []
    total = 0
    for targets, seen in _parts(split):
        if len(targets) == 0 or not seen.any():
            continue
        looked_at = _sampled(targets, LEAK_TARGETS, generator)
        visible = histories_of(histories, looked_at)
        swapped = replace(histories, item=np.where(seen, histories.item, other).astype(histories.item.dtype))
        before, after = (np.asarray(fit(log, seen)(visible), np.float64) for log in (histories, swapped))
        same = np.isclose(before, after, rtol=1e-5, atol=1e-9, equal_nan=True).all(1)
        users += looked_at.user[~same].tolist()
        total += len(looked_at)
    return _leak(
        name,
        f"targets whose {name} change with events that must not be seen",
        (len(users), total, "targets"),
        "fit on the events of the part's mask",
        [histories.users[user] for user in users],
    )


def _parts(split: Split) -> list[tuple[Targets, np.ndarray]]:
    """Targets and mask of training, validation and test."""
    return [
        (split.training, split.seen_training),
        (split.validation, split.seen_validation),
        (split.test, split.seen_test),
    ]


def _sampled(targets: Targets, limit: int, generator: np.random.Generator) -> Targets:
    if len(targets) <= limit:
        return targets
    return targets.take(np.sort(generator.permutation(len(targets))[:limit]))


def _ndcg(histories: Histories, targets: Targets, scorer: Scorer) -> np.ndarray:
    """float64 (T,)."""
    placed = place_targets(histories, targets, scorer)
    return metrics.ndcg(placed.greater, placed.ties, CUTOFF)


def _candidates(log: Histories, seen: np.ndarray, k: int) -> Scorer:
    """Candidate lists by the log alone: items' vectors are made without it. One epoch shows what the encoder saw."""
    likeness = Likeness(np.ones((len(log.items), 1), dtype=np.float32))
    encoder = sequence.fit(log, seen, likeness.vectors, 1, 0)
    retriever = Retriever.fit(log, seen, likeness, Mix(0.0, 1.0, 1.0, 1), encoder)
    return lambda visible: retriever.candidates(visible, k)[0]

"""Splits: which events are targets, how much of its own history each target sees, and what counts may be fitted on.

`end` says how many events of the user are visible to a target. Rule `file_order` shows every event before it; rule
`strict` only those with an earlier time, so that nothing tied with the target is seen.
"""

from dataclasses import dataclass, replace

import numpy as np

from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.errors import DataError, UsageError

TRAINING_SHARE, TRAINING_LAST = 0.25, 10
"""Share of a user's training events, the newest, that become training targets, and how many at most: the rest is left
for counts that have not seen them, and close to the end they share their closed windows with validation and test."""

PART_SHARE = 0.1
"""Share of all events in each of the three newest parts of the global time split (training, validation, test)."""


@dataclass(frozen=True)
class Targets:
    """Events to be predicted. user, position, end: int64 (T,); event `position` of `user` sees events [0, end)."""

    user: np.ndarray
    position: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Targets":
        """The targets at `rows`."""
        return Targets(self.user[rows], self.position[rows], self.end[rows])


@dataclass(frozen=True)
class Split:
    """Targets of the three parts, and per part a mask (N,) of the events that counts and models may have seen.

    No mask holds a target of its own or of a later part.
    """

    protocol: str
    tie_rule: str
    min_history: int
    training: Targets
    validation: Targets
    test: Targets
    seen_training: np.ndarray
    seen_validation: np.ndarray
    seen_test: np.ndarray
    users_too_short: int
    """Users with fewer than `min_history` events: they give no target, their events are still seen."""
    targets_without_history: int
    """Targets left out because too few events are visible to them."""


def histories_of(histories: Histories, targets: Targets) -> Queries:
    """What is visible to each target, oldest first, and when the target is asked for."""
    first = histories.offsets[targets.user]
    spans = [slice(start, start + end) for start, end in zip(first.tolist(), targets.end.tolist(), strict=True)]
    seen = [histories.item[span] for span in spans]
    if histories.time is None:
        return Queries(seen)
    return Queries(seen, [histories.time[span] for span in spans], histories.time[first + targets.position])


def target_items(histories: Histories, targets: Targets) -> np.ndarray:
    """int (T,): catalogue position of each target."""
    items: np.ndarray = histories.item[histories.offsets[targets.user] + targets.position]
    return items


def leave_last_out(histories: Histories, tie_rule: str, min_history: int) -> Split:
    """Per user of n >= min_history events: test is event n - 1, validation n - 2, training targets the newest quarter,
    at most ten, of the events before those.

    Other users' later events are seen: this protocol orders events within each user only.

    Raises:
        UsageError: the tie rule is unknown, or is `strict` for a log without times.
    """
    _check(histories, tie_rule)
    lengths = np.diff(histories.offsets)
    long = np.flatnonzero(lengths >= min_history)
    position = _positions(histories)
    # Position from which on an event belongs to a part; short users give nothing away, so all their events are seen.
    test_from = np.where(lengths >= min_history, lengths - 1, lengths)
    validation_from = np.where(lengths >= min_history, lengths - 2, lengths)
    before = np.maximum(validation_from, 0)
    newest = np.minimum(np.ceil(TRAINING_SHARE * before).astype(np.int64), TRAINING_LAST)
    training_from = np.where(lengths >= min_history, before - newest, lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    is_training = (position >= training_from[owner]) & (position < validation_from[owner])
    flat = np.flatnonzero(is_training)
    candidates = (
        (owner[flat], position[flat]),
        (long, lengths[long] - 2),
        (long, lengths[long] - 1),
    )
    (training, _), (validation, a), (test, b) = (_visible(histories, *of, tie_rule, 1) for of in candidates)
    return Split(
        protocol="leave_last_out",
        tie_rule=tie_rule,
        min_history=min_history,
        training=training,
        validation=validation,
        test=test,
        seen_training=position < training_from[owner],
        seen_validation=position < validation_from[owner],
        seen_test=position < test_from[owner],
        users_too_short=int((lengths < min_history).sum()),
        targets_without_history=a + b,
    )


def global_time(histories: Histories, tie_rule: str, min_history: int) -> Split:
    """Three cuts in time, the same for all users: the newest tenth of the events is the test, the tenth before it the
    validation, the tenth before that gives training targets. Every event after a cut is a target with its user's
    history up to it, if at least min_history - 1 events of the user come before it.

    Raises:
        UsageError: the log has no times, or the tie rule is unknown.
        DataError: the times do not allow three cuts.
    """
    _check(histories, tie_rule)
    if histories.time is None:
        raise UsageError("the log has no times, so it cannot be cut at a time: use data.protocol=leave_last_out")
    ordered, count = np.sort(histories.time), len(histories.time)
    cuts = [int(ordered[min(count - 1, int(count * (1 - PART_SHARE * parts)))]) for parts in (3, 2, 1)]
    if not ordered[0] < cuts[0] < cuts[1] < cuts[2]:
        raise DataError(
            "the events lie at too few different times for a global time split: use data.protocol=leave_last_out"
        )
    position, lengths = _positions(histories), np.diff(histories.offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    parts, dropped = [], []
    for start, stop in ((cuts[0], cuts[1]), (cuts[1], cuts[2]), (cuts[2], int(ordered[-1]) + 1)):
        flat = np.flatnonzero((histories.time >= start) & (histories.time < stop) & (lengths[owner] >= min_history))
        targets, left_out = _visible(histories, owner[flat], position[flat], tie_rule, min_history - 1)
        parts.append(targets)
        dropped.append(left_out)
    return Split(
        protocol="global_time",
        tie_rule=tie_rule,
        min_history=min_history,
        training=parts[0],
        validation=parts[1],
        test=parts[2],
        seen_training=histories.time < cuts[0],
        seen_validation=histories.time < cuts[1],
        seen_test=histories.time < cuts[2],
        users_too_short=int((lengths < min_history).sum()),
        targets_without_history=dropped[1] + dropped[2],
    )


def rated(histories: Histories, high: bool) -> np.ndarray:
    """bool (N,): the events rated in the upper quarter of the log's scale (`high`; 4 and 5 of 5), or in the lower one.

    Raises:
        UsageError: the log has no ratings, or all are the same.
    """
    known = histories.rating[~np.isnan(histories.rating)]
    if len(known) == 0 or known.min() == known.max():
        raise UsageError("the log has no ratings that differ, so nothing says what was liked: use training.task=next")
    low, width = float(known.min()), float(known.max() - known.min())
    rating = np.nan_to_num(histories.rating, nan=low + width / 2)
    found: np.ndarray = rating >= low + 0.75 * width if high else rating <= low + 0.25 * width
    return found


def liked_only(histories: Histories, split: Split) -> Split:
    """The split of the task `liked`: targets are events that were rated high; what may be seen stays.

    Raises:
        UsageError: the log has no ratings.
    """
    high = rated(histories, high=True)

    def kept(targets: Targets) -> Targets:
        return targets.take(np.flatnonzero(high[histories.offsets[targets.user] + targets.position]))

    return replace(split, training=kept(split.training), validation=kept(split.validation), test=kept(split.test))


def _check(histories: Histories, tie_rule: str) -> None:
    if tie_rule not in ("file_order", "strict"):
        raise UsageError(f"tie_rule is {tie_rule!r}: choose file_order or strict")
    if tie_rule == "strict" and histories.time is None:
        raise UsageError("the log has no times, so the rule strict cannot hold: use data.tie_rule=file_order")


def _positions(histories: Histories) -> np.ndarray:
    """int64 (N,): the place of every event in its user's order."""
    positions: np.ndarray = np.arange(len(histories.item)) - np.repeat(
        histories.offsets[:-1], np.diff(histories.offsets)
    )
    return positions


def _visible(
    histories: Histories, user: np.ndarray, position: np.ndarray, tie_rule: str, least: int
) -> tuple[Targets, int]:
    """The targets that see at least `least` events, and how many do not."""
    end = position.astype(np.int64)
    if tie_rule == "strict":
        assert histories.time is not None  # checked before
        flat = histories.offsets[user] + position
        end = np.array(
            [
                np.searchsorted(histories.time[histories.offsets[u] : at + 1], histories.time[at], side="left")
                for u, at in zip(user, flat, strict=True)
            ],
            dtype=np.int64,
        )
    kept = end >= max(least, 1)
    targets = Targets(user[kept].astype(np.int64), position[kept].astype(np.int64), end[kept])
    return targets, int((~kept).sum())

"""Dataset: a checked catalogue and log. Histories: the log as arrays, where a history is a prefix of a user's order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import polars as pl

from mllm_srec.data.schema import INTERACTIONS, ITEM_TEXTS, ITEMS, PLACE, SKIPPED, RowCheck
from mllm_srec.errors import DataError, UsageError


@dataclass(frozen=True)
class Histories:
    """The interactions by user: user u's events are [offsets[u], offsets[u + 1]) of the flat arrays, oldest first.

    users, items: ids, items in the catalogue's order. offsets int64 (U + 1,); item int32 (N,) catalogue positions;
    time int64 (N,) ms UTC, or None for logs without times; rating float32 (N,), NaN where absent.
    """

    users: list[str]
    items: list[str]
    offsets: np.ndarray
    item: np.ndarray
    time: np.ndarray | None
    rating: np.ndarray

    @property
    def has_time(self) -> bool:
        """Whether the log knows times."""
        return self.time is not None

    def span(self, user: int) -> slice:
        """Where the events of user number `user` stand in the flat arrays."""
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def of(self, user: int, end: int | None = None) -> np.ndarray:
        """int32: catalogue positions of the first `end` events (all of them by default) of user number `user`."""
        start, stop = int(self.offsets[user]), int(self.offsets[user + 1])
        return self.item[start : stop if end is None else min(stop, start + end)]

    def length(self, user: int) -> int:
        """How many events user number `user` has."""
        return int(self.offsets[user + 1] - self.offsets[user])


class Queries(Sequence[np.ndarray]):
    """Users who are asked for their next item: a sequence of their histories (int, catalogue positions, oldest first).

    times: per history int64 (n,), ms UTC of its events; None for logs without times and histories from outside.
    now: int64 (B,), ms UTC at which each is asked; None where that is not known.
    """

    def __init__(
        self,
        histories: Sequence[np.ndarray],
        times: Sequence[np.ndarray] | None = None,
        now: np.ndarray | None = None,
    ) -> None:
        self._histories = histories
        self.times = times
        self.now = now

    @classmethod
    def of(cls, histories: "Sequence[np.ndarray] | Queries") -> "Queries":
        """Plain histories as queries without times; queries as they are."""
        return histories if isinstance(histories, Queries) else cls(histories)

    def __len__(self) -> int:
        return len(self._histories)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._histories)

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, at: slice) -> "Queries": ...
    def __getitem__(self, at: int | slice) -> "np.ndarray | Queries":
        if isinstance(at, slice):
            times = None if self.times is None else self.times[at]
            return Queries(self._histories[at], times, None if self.now is None else self.now[at])
        return self._histories[at]


@dataclass(frozen=True)
class Dataset:
    """A catalogue and a log that keep the contract of `schema`.

    items: item_id, title, description, category ("" when absent), image (path below `root`, URL, null), extra (JSON).
    interactions: user_id, item_id, timestamp (ms UTC; null iff not has_time), rating (or null), position (0.. within
    the user); sorted by user, then time, ties in file order.
    """

    name: str
    items: pl.DataFrame
    interactions: pl.DataFrame
    has_time: bool
    root: Path | None
    skipped: pl.DataFrame
    """file, line, column, reason of the raw rows that were left out."""
    repeats: str = "keep"
    repeats_dropped: int = 0

    @classmethod
    def build(
        cls,
        name: str,
        items: pl.DataFrame,
        interactions: pl.DataFrame,
        *,
        has_time: bool,
        root: Path | None,
        check: RowCheck | None = None,
    ) -> "Dataset":
        """Check and sort what a reader delivers.

        Args:
            items: item_id and any of title, description, category, image, extra; may carry `file` and `line`.
            interactions: user_id, item_id, timestamp (Int64 ms, if `has_time`) and, if known, rating, in the file's
                order; may carry `file` and `line`.
            check: the reader's own check, so that one list holds everything that was skipped.

        Raises:
            DataError: nothing is left, or a row is bad and `check` says to stop: an id missing, an item twice, an
                item of the log that is not in the catalogue, a time missing.
        """
        check = check or RowCheck()
        items = _complete(items, ITEMS)
        items = check.keep(items, pl.col("item_id").str.len_chars() > 0, "item_id", "the item has no id")
        items = check.keep(items, pl.col("item_id").is_first_distinct(), "item_id", "item {item_id} stands here twice")
        items = items.with_columns(
            *(pl.col(column).fill_null("").str.strip_chars() for column in ITEM_TEXTS),
            image=pl.when(pl.col("image").str.strip_chars() != "").then(pl.col("image").str.strip_chars()),
            extra=pl.col("extra").fill_null("{}"),
        )
        log = _complete(interactions, INTERACTIONS)
        log = check.keep(log, pl.col("user_id").str.len_chars() > 0, "user_id", "the user has no id")
        log = check.keep(log, pl.col("item_id").str.len_chars() > 0, "item_id", "the item has no id")
        known = pl.col("item_id").is_in(items["item_id"].implode())
        log = check.keep(log, known, "item_id", "item {item_id} of the log is not in the catalogue")
        if has_time:
            log = check.keep(log, pl.col("timestamp").is_not_null(), "timestamp", "the time is missing")
        else:
            log = log.with_columns(timestamp=pl.lit(None, dtype=pl.Int64))
        for frame, what in ((items, "items"), (log, "interactions")):
            if frame.height == 0:
                raise DataError(f"{name}: no {what} left: the file is empty or every row was skipped")
        order = ["user_id", "timestamp"] if has_time else ["user_id"]
        log = log.sort(order, maintain_order=True)
        return cls(
            name=name,
            items=items.select(list(ITEMS)),
            interactions=_number(log.select(list(INTERACTIONS))),
            has_time=has_time,
            root=root,
            skipped=check.skipped(),
        )

    def with_repeats(self, repeats: str) -> "Dataset":
        """`first`: a user's first event with an item only, positions renumbered; `keep`: every repeat.

        Raises:
            UsageError: another word, or `keep` where repeats are dropped already.
        """
        if repeats not in ("first", "keep"):
            raise UsageError(f"repeats is {repeats!r}: choose first or keep")
        if repeats == self.repeats:
            return self
        if repeats == "keep":
            raise UsageError("repeats were dropped from this data set already: read it again to keep them")
        first = self.interactions.filter(pl.struct("user_id", "item_id").is_first_distinct())
        dropped = self.interactions.height - first.height
        return replace(self, interactions=_number(first), repeats=repeats, repeats_dropped=dropped)

    def histories(self) -> Histories:
        """The interactions as arrays; users in the order of their ids."""
        return self._histories

    @cached_property
    def _histories(self) -> Histories:
        log, ids = self.interactions, self.items["item_id"]
        users = log["user_id"].rle()
        lengths = users.struct.field("len").to_numpy()
        place = pl.DataFrame({"item_id": ids, "place": np.arange(len(ids), dtype=np.int32)})
        item = log.select("item_id").join(place, on="item_id", how="left", maintain_order="left")["place"]
        return Histories(
            users=users.struct.field("value").to_list(),
            items=ids.to_list(),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            item=item.to_numpy().astype(np.int32),
            time=log["timestamp"].to_numpy().astype(np.int64) if self.has_time else None,
            rating=log["rating"].fill_null(float("nan")).to_numpy().astype(np.float32),
        )


def no_rows_skipped() -> pl.DataFrame:
    """The empty list of skipped rows."""
    return pl.DataFrame(schema=SKIPPED)


def _complete(frame: pl.DataFrame, columns: Mapping[str, type[pl.DataType]]) -> pl.DataFrame:
    missing = [pl.lit(None, dtype=dtype).alias(name) for name, dtype in columns.items() if name not in frame.columns]
    places = [name for name in PLACE if name in frame.columns]
    casts = [pl.col(name).cast(dtype) for name, dtype in columns.items() if name in frame.columns]
    return frame.select(*casts, *missing, *places)


def _number(log: pl.DataFrame) -> pl.DataFrame:
    return log.with_columns(position=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id"))

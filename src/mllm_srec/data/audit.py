"""Audit: facts of the data that decide what a figure is worth, each with its size, examples and a remedy.

What a `Dataset` no longer knows is not claimed: readers sort by time, so how the file was ordered cannot be told, only
whether the order that stands is the order in time. A time that is plausible but wrong (shuffled, made up) leaves no
trace here; whether the order tells anything at all is asked by `evaluation.checks.order_signal`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import polars as pl

from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.split import Split, Targets

Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""ok: nothing found. note: worth knowing. warning: figures mean less than they seem to. error: they mean nothing."""

EXAMPLES = 3
LEAST_EVENTS = 3
"""Shorter histories say nothing of an order, and are alike by chance."""
SORTED_FROM = 0.8 - 1e-9  # a correlation of four fifths, of which rounding may leave less, counts
"""Absolute rank correlation of order and popularity from which a history counts as sorted by popularity."""
SHUFFLES = 10
"""Random orders per history that tell how many would count as sorted by chance."""
DAY = 86_400_000
PRECISIONS = (86_400.0, 3_600.0, 60.0, 1.0, 0.001)
"""Seconds; the first that divides all differences of times is the log's precision."""


@dataclass(frozen=True)
class Finding:
    """One checked fact: `count` of `of` `unit` are what `says` says; "" as remedy where there is nothing to do."""

    name: str
    severity: Severity
    says: str
    count: int
    of: int
    unit: str
    remedy: str
    figures: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name."""
    examples: tuple[str, ...] = ()
    """At most three ids, or ids joined by "=" that are the same."""

    @property
    def figure(self) -> str:
        """Count, share and further numbers in words."""
        share = f" ({self.count / self.of:.1%})" if self.of else ""
        more = "".join(f"; {name} {_number(value)}" for name, value in self.figures.items())
        return f"{self.count:,} of {self.of:,} {self.unit}{share}{more}"


def audit(
    dataset: Dataset, split: Split, pictures: pl.DataFrame | None = None, now: int | None = None
) -> list[Finding]:
    """All facts of a data set, in a fixed order.

    Args:
        split: of `dataset.histories()`; says which targets are cold.
        pictures: item_id, sha256, state, reason as `Workspace.pictures` gives them; None leaves pictures out.
        now: ms UTC, beyond which a time lies in the future; None: the clock's.
    """
    log, histories = dataset.interactions.sort("user_id", "position"), dataset.histories()
    now = time.time_ns() // 1_000_000 if now is None else now
    return [
        _time_order(log, dataset.has_time),
        _popularity_order(log),
        *(_times(log, now) if dataset.has_time else []),
        *_repeats(log, dataset),
        _duplicate_users(log, dataset.has_time),
        _ratings(log),
        _skipped(dataset),
        *_items(dataset.items, log),
        *(_pictures(pictures) if pictures is not None else []),
        *_targets(histories, split),
    ]


def graded(count: int, of: int, warning_from: float) -> Severity:
    """ok for none, warning from that share of `of` on, note below."""
    if count == 0:
        return "ok"
    return "warning" if count >= warning_from * of else "note"


def finding(
    name: str,
    severity: Severity,
    says: str,
    counted: tuple[int, int, str],
    remedy: str,
    figures: Mapping[str, float] | None = None,
    examples: Sequence[str] = (),
) -> Finding:
    """A `Finding` of `counted` = (count, of, unit), without remedy and examples where it is ok."""
    if severity == "ok":
        remedy, examples = "", ()
    return Finding(name, severity, says, *counted, remedy, dict(figures or {}), tuple(examples[:EXAMPLES]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


# The log


def _time_order(log: pl.DataFrame, has_time: bool) -> Finding:
    users = log["user_id"].n_unique()
    if not has_time:
        return finding(
            "time_order",
            "note",
            "users whose order is the file's alone, the log has no times",
            (users, users, "users"),
            "make sure that the file lists each user's events oldest first",
        )
    wrong = log.filter(pl.col("timestamp").diff().over("user_id") < 0)["user_id"].unique().sort()
    return finding(
        "time_order",
        "error" if len(wrong) else "ok",
        "users with an event that is earlier than the one before it",
        (len(wrong), users, "users"),
        "sort by time: make the workspace again with `mllm-srec ingest`",
        examples=wrong.to_list(),
    )


def _popularity_order(log: pl.DataFrame) -> Finding:
    """Histories sorted by popularity, against as many as random orders of the same histories would give.

    Excess: (share - chance) / (1 - chance). It is believed from three standard deviations of chance on.
    """
    log = log.select("user_id", "position", pl.len().over("item_id").cast(pl.Int64).alias("popularity"))
    found = _order_by_popularity(log).sort(pl.col("rho").abs(), "user_id", descending=[True, False])
    users, is_sorted = found.height, found["rho"].abs() >= SORTED_FROM
    generator, by_chance = np.random.default_rng(0), 0
    for _ in range(SHUFFLES if users else 0):
        shuffled = log.with_columns(position=pl.Series(generator.random(log.height)))
        by_chance += int((_order_by_popularity(shuffled)["rho"].abs() >= SORTED_FROM).sum())
    count = int(is_sorted.sum())
    share, chance = count / max(users, 1), by_chance / max(SHUFFLES * users, 1)
    excess = (share - chance) / max(1 - chance, 1e-9)
    sure = share - chance > 3 * np.sqrt(chance * (1 - chance) / max(users, 1))
    step = log.select(pl.col("popularity").diff().over("user_id")).to_series().drop_nulls()
    pairs = int((step != 0).sum())
    return finding(
        "popularity_order",
        "error" if sure and excess >= 0.5 else "warning" if sure and excess >= 0.1 else "ok",
        "users whose history is sorted by the popularity of its items",
        (count, users, "users"),
        "the next item is only a more or a less popular one: find the log's true times",
        {"share by chance": chance, "neighbours in falling popularity": int((step < 0).sum()) / max(pairs, 1)},
        found.filter(is_sorted)["user_id"].to_list(),
    )


def _order_by_popularity(log: pl.DataFrame) -> pl.DataFrame:
    """user_id, rho: Spearman of position and popularity, for users with enough events and unequal popularity."""
    by_user = log.group_by("user_id").agg(
        pl.corr("position", "popularity", method="spearman").alias("rho"),
        pl.len().alias("events"),
        pl.col("popularity").n_unique().alias("levels"),
    )
    return by_user.filter(pl.col("events") >= LEAST_EVENTS, pl.col("levels") > 1).select("user_id", "rho")


def _times(log: pl.DataFrame, now: int) -> list[Finding]:
    times, users = log["timestamp"], log["user_id"].n_unique()
    tied = log.select("user_id", (pl.col("timestamp").diff().over("user_id") == 0).fill_null(False).alias("tied"))
    at_end = tied.group_by("user_id", maintain_order=True).agg(pl.col("tied").last()).filter("tied")["user_id"]
    since_first = times - times.min()
    precision = next(s for s in PRECISIONS if (since_first % round(1000 * s) == 0).all())
    pairs = int(tied["tied"].sum())
    early, late = log.filter(times < DAY), log.filter(times > now)
    return [
        finding(
            "last_ties",
            graded(len(at_end), users, 0.1),
            "users whose last two events have the same time",
            (len(at_end), users, "users"),
            "which of them is the last is the file's word: report the tie rule, and figures under `strict` as well",
            examples=at_end.to_list(),
        ),
        finding(
            "ties",
            graded(pairs, log.height - users, 2.0),
            "events at the same time as their user's event before",
            (pairs, log.height - users, "events"),
            "the order within a tie is the file's: do not read a sequence into it",
            {"precision in seconds": precision},
            tied.filter("tied")["user_id"].unique(maintain_order=True).to_list(),
        ),
        finding(
            "times_at_zero",
            graded(early.height, log.height, 0.0),
            "events on 1970-01-01, where an empty time ends up",
            (early.height, log.height, "events"),
            "give the true times, or leave these rows out",
            examples=early["user_id"].unique(maintain_order=True).to_list(),
        ),
        finding(
            "times_in_future",
            graded(late.height, log.height, 0.0),
            "events in the future",
            (late.height, log.height, "events"),
            "correct the times or their unit (seconds, milliseconds)",
            examples=late["user_id"].unique(maintain_order=True).to_list(),
        ),
    ]


def _repeats(log: pl.DataFrame, dataset: Dataset) -> list[Finding]:
    pair, whole = ["user_id", "item_id"], ["user_id", "item_id", "timestamp"]
    again = log.filter(~pl.struct(pair).is_first_distinct())
    count, events = again.height + dataset.repeats_dropped, log.height + dataset.repeats_dropped
    found = [
        finding(
            "repeats",
            graded(count, events, 2.0),
            "events with an item that the user had before",
            (count, events, "events"),
            "they are dropped" if dataset.repeats == "first" else "a masked repeat cannot be hit: data.repeats=first",
            {"dropped": dataset.repeats_dropped},
            [f"{user} {item}" for user, item in again.select(pair).head(EXAMPLES).iter_rows()],
        )
    ]
    if dataset.has_time:
        copies = log.filter(~pl.struct(whole).is_first_distinct())
        found.append(
            finding(
                "duplicate_rows",
                graded(copies.height, log.height, 0.01),
                "events that repeat user, item and time of another",
                (copies.height, log.height, "events"),
                "drop them, or keep the first event with an item only: data.repeats=first",
                examples=[f"{user} {item}" for user, item in copies.select(pair).head(EXAMPLES).iter_rows()],
            )
        )
    return found


def _duplicate_users(log: pl.DataFrame, has_time: bool) -> Finding:
    ordered = log.sort("user_id", "timestamp", "item_id") if has_time else log  # a copy may order ties otherwise
    histories = ordered.group_by("user_id", maintain_order=True).agg(
        pl.col("item_id").str.join("\x1f").alias("items"), pl.len().alias("events")
    )
    long = histories.filter(pl.col("events") >= LEAST_EVENTS)
    alike = long.group_by("items", maintain_order=True).agg("user_id").filter(pl.col("user_id").list.len() > 1)
    count = int(alike["user_id"].list.len().sum())
    return finding(
        "duplicate_users",
        graded(count, long.height, 0.0),
        "users with the whole history of another user",
        (count, long.height, "users"),
        "keep one of each: a copy in training gives the test away",
        examples=_equal(alike["user_id"]),
    )


def _ratings(log: pl.DataFrame) -> Finding:
    rated = log["rating"].drop_nulls()
    constant = len(rated) > 0 and rated.n_unique() == 1
    return finding(
        "constant_ratings",
        "note" if constant else "ok",
        "ratings that all have the same value",
        (len(rated) if constant else 0, len(rated), "ratings"),
        "no dislike can be told from them",
    )


def _skipped(dataset: Dataset) -> Finding:
    count = dataset.skipped.height
    read = count + dataset.interactions.height + dataset.repeats_dropped + dataset.items.height
    return finding(
        "skipped_rows",
        graded(count, read, 0.01),
        "raw rows that were left out as bad",
        (count, read, "rows"),
        "see Workspace.dataset().skipped for file, line and reason",
        examples=[f"{file}:{line}" for file, line in dataset.skipped.select("file", "line").head(EXAMPLES).iter_rows()],
    )


# The catalogue


def _items(items: pl.DataFrame, log: pl.DataFrame) -> list[Finding]:
    bare = items.filter(pl.col("title") == "", pl.col("description") == "")["item_id"]
    unused = items.filter(~pl.col("item_id").is_in(log["item_id"].unique().implode()))["item_id"]
    normal = items.select(
        "item_id", *(_normalised(pl.col(name)).alias(name) for name in ("title", "description"))
    ).filter((pl.col("title") != "") | (pl.col("description") != ""))
    same = normal.group_by("title", "description", maintain_order=True).agg("item_id")
    same = same.filter(pl.col("item_id").list.len() > 1)
    count = int(same["item_id"].list.len().sum())
    return [
        finding(
            "missing_text",
            graded(len(bare), items.height, 0.05),
            "items without title and description",
            (len(bare), items.height, "items"),
            "add texts: only pictures and the log speak for these items",
            {
                "without title": int((items["title"] == "").sum()),
                "without description": int((items["description"] == "").sum()),
            },
            bare.to_list(),
        ),
        finding(
            "duplicate_items",
            graded(count, items.height, 0.05),
            "items with title and description of another, case and punctuation aside",
            (count, items.height, "items"),
            "join the ids if they are one product: a right answer counts as wrong under its other id",
            {"groups": same.height},
            _equal(same["item_id"]),
        ),
        finding(
            "unused_items",
            graded(len(unused), items.height, 2.0),
            "items without any event",
            (len(unused), items.height, "items"),
            "they can be recommended by their content only",
            examples=unused.to_list(),
        ),
    ]


def _normalised(text: pl.Expr) -> pl.Expr:
    return text.str.to_lowercase().str.replace_all(r"[\W_]+", " ").str.strip_chars()


def _pictures(pictures: pl.DataFrame) -> list[Finding]:
    absent = pictures.filter(pl.col("state").is_in(["none", "remote", "missing"]))
    broken = pictures.filter(~pl.col("state").is_in(["ok", "none", "remote", "missing"]))
    shown = pictures.filter(pl.col("sha256").is_not_null())
    same = shown.group_by("sha256", maintain_order=True).agg("item_id").filter(pl.col("item_id").list.len() > 1)
    count = int(same["item_id"].list.len().sum())
    states = dict(absent.group_by("state").len().sort("state").iter_rows())
    return [
        finding(
            "missing_pictures",
            graded(absent.height, pictures.height, 0.05),
            "items without a picture file",
            (absent.height, pictures.height, "items"),
            "put the files beside the data (URLs are not fetched) and make the workspace again",
            states,
            absent["item_id"].to_list(),
        ),
        finding(
            "broken_pictures",
            graded(broken.height, pictures.height, 0.0),
            "items whose picture cannot be used",
            (broken.height, pictures.height, "items"),
            "replace the files: Workspace.pictures() says what is wrong with each",
            examples=[f"{item}: {state}" for item, state in broken.select("item_id", "state").iter_rows()],
        ),
        finding(
            "duplicate_pictures",
            graded(count, shown.height, 0.05),
            "items that show the very file of another item",
            (count, shown.height, "items"),
            "one of them may show something else than it is: look at them",
            {"files": same.height},
            _equal(same["item_id"]),
        ),
    ]


def _equal(groups: pl.Series) -> list[str]:
    """The first groups of ids, each joined by "=", at most three of its ids."""
    return [" = ".join(group[:EXAMPLES]) for group in groups.head(EXAMPLES).to_list()]


# What evaluation asks of both


def _targets(histories: Histories, split: Split) -> list[Finding]:
    users, asked = len(histories.users), len(split.validation) + len(split.test)
    short = [name for name, n in zip(histories.users, np.diff(histories.offsets), strict=True) if n < split.min_history]
    found = [
        finding(
            "short_histories",
            "error" if len(split.test) == 0 else graded(len(short), users, 0.5),
            f"users with fewer than {split.min_history} events, who give no target",
            (len(short), users, "users"),
            "give a longer log" if len(split.test) else "there is no test target: give a longer log",
            examples=short,
        ),
        finding(
            "targets_without_history",
            graded(split.targets_without_history, asked + split.targets_without_history, 0.05),
            "validation and test targets left out because too few events are visible to them",
            (split.targets_without_history, asked + split.targets_without_history, "targets"),
            "expected under the tie rule `strict` and for users who are new after a cut; report their number",
        ),
    ]
    parts = (
        ("training", split.training, split.seen_training),
        ("validation", split.validation, split.seen_validation),
        ("test", split.test, split.seen_test),
    )
    for part, targets, seen in parts:
        known = np.zeros(len(histories.items), dtype=bool)
        known[histories.item[seen]] = True
        wanted = _items_of(histories, targets)
        cold = np.unique(wanted[~known[wanted]])
        count = int((~known[wanted]).sum())
        found.append(
            finding(
                f"cold_{part}",
                graded(count, len(targets), 0.05),
                f"{part} targets whose item occurs in no event that may be seen",
                (count, len(targets), "targets"),
                "counts cannot find them, only content can: report cold items apart",
                {"items": len(cold)},
                [histories.items[i] for i in cold[:EXAMPLES]],
            )
        )
    test = zip(split.test.user.tolist(), split.test.end.tolist(), _items_of(histories, split.test), strict=True)
    repeated = [user for user, end, item in test if (histories.of(user, end) == item).any()]
    found.append(
        finding(
            "repeated_targets",
            graded(len(repeated), len(split.test), 0.0),
            "test targets that their own visible history holds",
            (len(repeated), len(split.test), "targets"),
            "they are masked and cannot be hit: make the workspace with data.repeats=first",
            examples=[histories.users[user] for user in repeated],
        )
    )
    return found


def _items_of(histories: Histories, targets: Targets) -> np.ndarray:
    items: np.ndarray = histories.item[histories.offsets[targets.user] + targets.position]
    return items

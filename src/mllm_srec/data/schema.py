"""The columns every reader must deliver, and the check that names a bad row or skips and lists it."""

from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from mllm_srec.errors import DataError

ITEM_TEXTS = ("title", "description", "category")
ITEMS = {
    "item_id": pl.String,
    "title": pl.String,
    "description": pl.String,
    "category": pl.String,
    "image": pl.String,
    "extra": pl.String,
}
INTERACTIONS = {
    "user_id": pl.String,
    "item_id": pl.String,
    "timestamp": pl.Int64,
    "rating": pl.Float32,
    "position": pl.Int32,
}
SKIPPED = {"file": pl.String, "line": pl.Int64, "column": pl.String, "reason": pl.String}
PLACE = ("file", "line")
"""Columns that say where a raw row stands; readers add them, `Dataset.build` drops them."""

OnBadRow = Literal["stop", "skip"]


@dataclass
class RowCheck:
    """Applies one rule after the other to frames that carry `file` and `line`; keeps the list of what was skipped."""

    on_bad_row: OnBadRow = "stop"
    _bad: list[pl.DataFrame] = field(default_factory=list)

    def keep(self, frame: pl.DataFrame, good: pl.Expr, column: str, reason: str) -> pl.DataFrame:
        """The rows where `good` holds (null counts as bad).

        `reason` may name a value of the row in braces: "{item_id} is not in items.csv".

        Raises:
            DataError: a row is bad and `on_bad_row` is "stop"; the message names file, line, column and remedy.
        """
        mask = frame.select(good.fill_null(False).alias("good"))["good"]
        if mask.all():
            return frame
        bad = frame.filter(~mask)
        rows = [
            {
                "file": row.get("file", ""),
                "line": row.get("line", 0),
                "column": column,
                "reason": reason.format(**row),
            }
            for row in (bad.head(1) if self.on_bad_row == "stop" else bad).iter_rows(named=True)
        ]
        if self.on_bad_row == "stop":
            first = rows[0]
            more = f" ({bad.height} such rows)" if bad.height > 1 else ""
            raise DataError(
                f"{first['file']} line {first['line']}, column {column}: {first['reason']}{more}. "
                "Correct the file, or skip such rows with --on-bad-row skip (they are counted and listed)."
            )
        self._bad.append(pl.DataFrame(rows, schema=SKIPPED))
        return frame.filter(mask)

    def skipped(self) -> pl.DataFrame:
        """file, line, column, reason of every row left out so far."""
        return pl.concat([pl.DataFrame(schema=SKIPPED), *self._bad])

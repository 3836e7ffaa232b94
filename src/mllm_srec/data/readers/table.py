"""The project's own layout: interactions and items as CSV or Parquet, pictures in a folder."""

from pathlib import Path

import polars as pl

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers.common import (
    find_file,
    look_up,
    pictures_in,
    read_ids,
    read_log,
    read_parquet,
    read_text_table,
    require,
)
from mllm_srec.data.schema import ITEM_TEXTS, PLACE, RowCheck
from mllm_srec.errors import UsageError

FILES = "a folder with interactions.csv and items.csv (or .parquet), pictures in images/"
LOG = ("interactions.csv", "interactions.parquet")
CATALOGUE = ("items.csv", "items.parquet")


def matches(path: Path) -> bool:
    """Whether `path` is a folder with a log of this layout."""
    return any((path / name).is_file() for name in LOG)


def read(path: Path, check: RowCheck) -> Dataset:
    """Read interactions (user_id, item_id[, timestamp][, rating]) and items (item_id[, title, description, category,
    image]).

    timestamp is unix time in seconds or milliseconds (told by the median), or ISO 8601 text; without that column the
    order of the file counts. Further columns of items become its `extra`. Without a column `image`, an item's picture
    is images/<item_id>.jpg (.jpeg, .png, .webp, .gif).
    """
    if not path.is_dir():
        raise UsageError(f"{path} is a file: the table format wants the folder that holds {LOG[0]} and {CATALOGUE[0]}")
    items = read_ids(_read(find_file(path, *CATALOGUE), check, "item_id"), check, "item_id")
    if "image" not in items.columns:
        items = items.with_columns(image=look_up("item_id", pictures_in(path, "images")))
    others = [name for name in items.columns if name not in ("item_id", "image", *ITEM_TEXTS, *PLACE)]
    if others:
        items = items.with_columns(extra=pl.struct(others).struct.json_encode())
    raw = _read(find_file(path, *LOG), check, "user_id", "item_id")
    has_time = "timestamp" in raw.columns
    log = read_log(
        raw,
        check,
        user="user_id",
        item="item_id",
        time="timestamp" if has_time else None,
        rating="rating" if "rating" in raw.columns else None,
        known=items["item_id"],
    )
    return Dataset.build(path.resolve().name, items, log, has_time=has_time, root=path, check=check)


def _read(path: Path, check: RowCheck, *needed: str) -> pl.DataFrame:
    frame = read_parquet(path) if path.suffix == ".parquet" else read_text_table(path, check)
    require(frame.columns, path.name, *needed)
    return frame

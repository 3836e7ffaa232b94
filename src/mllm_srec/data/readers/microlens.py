"""MicroLens (short videos): pairs of users and items, titles and covers, as its authors publish them."""

from pathlib import Path

import polars as pl

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers.common import look_up, pictures_in, read_ids, read_log, read_text_table, require
from mllm_srec.data.schema import PLACE, RowCheck
from mllm_srec.errors import DataError, UsageError

FILES = "a folder with *_pairs.tsv or *_pairs.csv and *_titles.csv, pictures in *_covers/ or images/"


def matches(path: Path) -> bool:
    """Whether `path` is a folder with a file of pairs."""
    return path.is_dir() and any(path.glob("*_pairs.[ct]sv"))


def read(path: Path, check: RowCheck) -> Dataset:
    """Read pairs and titles.

    *_pairs.tsv holds a user and that user's items, oldest first, separated by spaces, and no times; *_pairs.csv holds
    the columns user, item and, if known, timestamp.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is a file: the microlens format wants {FILES}")
    file = _one(path, "*_titles.csv")
    titles = read_text_table(file, check)
    require(titles.columns, file.name, "item", "title")
    covers = [folder.name for folder in sorted(path.glob("*_covers")) if folder.is_dir()]
    pictures = {stem: picture for below in ["images", *covers] for stem, picture in pictures_in(path, below).items()}
    items = read_ids(titles, check, "item")
    items = items.select("item_id", "title", look_up("item_id", pictures).alias("image"), *PLACE)
    pairs = _one(path, "*_pairs.[ct]sv")
    raw = _read_sequences(pairs, check) if pairs.suffix == ".tsv" else read_text_table(pairs, check)
    require(raw.columns, pairs.name, "user", "item")
    has_time = "timestamp" in raw.columns
    time = "timestamp" if has_time else None
    log = read_log(raw, check, user="user", item="item", time=time, known=items["item_id"])
    return Dataset.build(path.resolve().name, items, log, has_time=has_time, root=path, check=check)


def _read_sequences(path: Path, check: RowCheck) -> pl.DataFrame:
    raw = read_text_table(path, check, separator="\t", quote=False, columns=("user", "item"))
    raw = check.keep(raw, pl.col("item").str.strip_chars() != "", "item", "user {user} has no items")
    items = pl.col("item").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
    return raw.with_columns(item=items).explode("item")


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{folder} holds {' and '.join(p.name for p in found)}: keep one of them")
    present = ", ".join(sorted(p.name for p in folder.iterdir()))
    raise DataError(f"{folder}: there is no {pattern}. The files found: {present}")

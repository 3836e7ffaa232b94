"""RecBole's atomic files: NAME.inter and, optionally, NAME.item; tabs, and a header of name:type."""

from pathlib import Path

import polars as pl

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers.common import items_of, read_ids, read_log, read_text_table, require
from mllm_srec.data.schema import PLACE, RowCheck
from mllm_srec.errors import DataError

FILES = "NAME.inter, or a folder with one, and optionally NAME.item beside it"
NAMES = {
    "title": ("title", "name", "movie_title", "item_name", "product_name"),
    "description": ("description", "desc"),
    "category": ("category", "categories", "genre", "genres", "class"),
}
"""Our column -> the names it goes by in published .item files, the first one present counts."""


def matches(path: Path) -> bool:
    """Whether `path` is a .inter file or a folder with one."""
    return path.suffix == ".inter" if path.is_file() else any(path.glob("*.inter"))


def read(path: Path, check: RowCheck) -> Dataset:
    """Read user_id, item_id and, if present, timestamp (seconds or ms, told by the median) and rating.

    Without NAME.item the catalogue is the items of the log, without text. Columns of NAME.item that are not named in
    `NAMES` become `extra`.
    """
    if path.is_dir():
        found = sorted(path.glob("*.inter"))
        if len(found) != 1:
            listed = ", ".join(p.name for p in found) or "none"
            raise DataError(f"{path} must hold one .inter file, it holds {listed}: name the file instead of the folder")
        path = found[0]
    catalogue = path.with_suffix(".item")
    items = _read_items(catalogue, check) if catalogue.is_file() else None
    raw, _ = _read(path, check)
    require(raw.columns, path.name, "user_id", "item_id")
    has_time = "timestamp" in raw.columns
    log = read_log(
        raw,
        check,
        user="user_id",
        item="item_id",
        time="timestamp" if has_time else None,
        rating="rating" if "rating" in raw.columns else None,
        known=None if items is None else items["item_id"],
    )
    items = items_of(log) if items is None else items
    return Dataset.build(path.stem, items, log, has_time=has_time, root=None, check=check)


def _read_items(path: Path, check: RowCheck) -> pl.DataFrame:
    frame, types = _read(path, check)
    require(frame.columns, path.name, "item_id")
    items = read_ids(frame, check, "item_id")
    source = {ours: next((name for name in names if name in items.columns), None) for ours, names in NAMES.items()}
    texts = {ours: pl.col(name) for ours, name in source.items() if name}
    if source["category"] and types[source["category"]] == "token_seq":
        # A token_seq is separated by spaces, unless the category came with commas of its own.
        name = texts["category"]
        spaced = name.str.strip_chars().str.replace_all(r"\s+", ", ")
        texts["category"] = pl.when(name.str.contains(",", literal=True)).then(name).otherwise(spaced)
    others = [name for name in items.columns if name not in ("item_id", *PLACE, *source.values())]
    extra = pl.struct(others).struct.json_encode() if others else pl.lit("{}")
    return items.select("item_id", *PLACE, extra.alias("extra"), **texts)


def _read(path: Path, check: RowCheck) -> tuple[pl.DataFrame, dict[str, str]]:
    """The columns by name, and the type of each ("" where the header gives none)."""
    frame = read_text_table(path, check, separator="\t", quote=False)
    header = {raw: raw.partition(":") for raw in frame.columns if raw not in PLACE}
    names = [name.strip() for name, _, _ in header.values()]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path.name}: two columns are called {name}: rename one")
    types = {name.strip(): kind.strip() for name, _, kind in header.values()}
    return frame.rename({raw: name.strip() for raw, (name, _, _) in header.items()}), types

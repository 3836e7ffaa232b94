"""Fill a new workspace's folder: the data's tables, every local picture once, the facts and the configuration."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lancedb
import polars as pl
import pyarrow as pa
from lancedb.index import BTree

from mllm_srec.config import Config, dump_config
from mllm_srec.data.dataset import Dataset
from mllm_srec.data.images import PictureError, read_picture
from mllm_srec.progress import Bar
from mllm_srec.store_files import atomic_write

CONFIG, FACTS, STORE = "config.yaml", "dataset.json", "store"

PICTURE_BATCH = 32 * 2**20
"""Bytes of pictures held in memory before they are written."""

PICTURES = pa.schema([("sha256", pa.string()), ("data", pa.binary())])
ITEM_PICTURES = {"item_id": pl.String, "sha256": pl.String, "state": pl.String, "reason": pl.String}


def fill(folder: Path, config: Config, dataset: Dataset) -> None:
    """Write everything that a workspace holds before its first stage; config.yaml comes last.

    Raises:
        OSError, RuntimeError: a write failed; LanceDB raises the latter.
    """
    store = lancedb.connect(folder / STORE)
    frames = {
        "items": dataset.items,
        "interactions": dataset.interactions,
        "skipped": dataset.skipped,
        "item_pictures": _store_pictures(store, dataset),
    }
    for name, frame in frames.items():
        store.create_table(name, frame.with_row_index("row").to_arrow())  # a scan's order is not promised
    facts = {
        "name": dataset.name,
        "has_time": dataset.has_time,
        "repeats": dataset.repeats,
        "repeats_dropped": dataset.repeats_dropped,
        "users": dataset.interactions["user_id"].n_unique(),
        **{name: frame.height for name, frame in frames.items()},
    }
    atomic_write(folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False))
    atomic_write(folder / CONFIG, dump_config(config))


def _store_pictures(store: Any, dataset: Dataset) -> pl.DataFrame:
    """Store every local picture once, in batches; returns item_id, sha256, state, reason per item."""
    table = store.create_table("pictures", schema=PICTURES)
    batch: dict[str, bytes] = {}
    size, stored = 0, set[str]()
    rows: list[tuple[str, str | None, str, str]] = []

    def write() -> None:
        nonlocal size
        if batch:
            table.add(pa.table({"sha256": list(batch), "data": list(batch.values())}, schema=PICTURES))
        batch.clear()
        size = 0

    items = dataset.items
    with Bar("ingest: pictures", items.height) as bar:
        for item_id, image in items.select("item_id", "image").iter_rows():
            bar.advance(1)
            if image is None:
                rows.append((item_id, None, "none", ""))
            elif image.lower().startswith(("http://", "https://")):
                rows.append((item_id, None, "remote", f"{image} is not fetched: put the file beside the data"))
            elif dataset.root is None:
                rows.append((item_id, None, "missing", f"{image}: the data has no folder"))
            else:
                try:
                    data = read_picture(image, dataset.root)
                except PictureError as error:
                    rows.append((item_id, None, error.state, str(error)))
                    continue
                sha256 = hashlib.sha256(data).hexdigest()
                rows.append((item_id, sha256, "ok", ""))
                if sha256 not in stored:
                    stored.add(sha256)
                    batch[sha256] = data
                    size += len(data)
                    if size >= PICTURE_BATCH:
                        write()
    write()
    if stored:
        table.create_index("sha256", config=BTree())
    return pl.DataFrame(rows, schema=ITEM_PICTURES, orient="row")

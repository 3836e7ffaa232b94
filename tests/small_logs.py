"""Small logs for the tests of retrieval: a string of items per user, oldest first."""

import numpy as np
import polars as pl

from mllm_srec.data.dataset import Dataset, Histories

ITEMS = "abcdef"


def log(*users: str, times: bool = False) -> Histories:
    """One string of items per user; with `times` the n-th event of each is n days after the first."""
    rows = [(f"u{n}", item, 86_400_000 * at) for n, items in enumerate(users) for at, item in enumerate(items)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": list(ITEMS)})
    return Dataset.build("shop", items, frame, has_time=times, root=None).histories()


def all_of(histories: Histories) -> np.ndarray:
    return np.ones(len(histories.item), dtype=bool)


def places(items: str) -> np.ndarray:
    return np.array([ITEMS.index(item) for item in items], dtype=np.int32)

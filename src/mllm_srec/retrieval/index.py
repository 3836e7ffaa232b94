"""An index over item vectors of catalogues too large to be scored whole: LanceDB's IVF-PQ, inner product, on disk."""

from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfPq

from mllm_srec.progress import say
from mllm_srec.store_files import fingerprint, storing

EXACT = 100_000
"""Items up to which every item is scored."""
PER_PARTITION = 2000
"""Items per partition, about."""
DIMENSIONS_PER_CODE = 2
PROBES, REFINE = 50, 3
"""Partitions looked into, and how many times as many items as asked for are compared by their full vectors."""


class ItemIndex:
    """The items with the largest inner product with a query, nearly always."""

    def __init__(self, folder: Path, vectors: np.ndarray) -> None:
        """Open the index of `vectors` float32 (I, D) in `folder`; it is built if it is not there.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        count, width = vectors.shape
        self._padding = -width % (2 * DIMENSIONS_PER_CODE)
        name = f"items-{fingerprint(np.ascontiguousarray(vectors).tobytes())[:24]}"
        with storing(str(folder)):
            store = lancedb.connect(folder)
            if name in store.list_tables().tables:
                self._table = store.open_table(name)
            else:
                padded = np.pad(vectors.astype(np.float32), ((0, 0), (0, self._padding)))
                flat = pa.FixedSizeListArray.from_arrays(pa.array(padded.ravel()), padded.shape[1])
                rows = pa.table({"item": pa.array(np.arange(count, dtype=np.int32)), "vector": flat})
                self._table = store.create_table(name, rows)
            if not self._table.list_indices():
                say(f"retrieve: {count:,} items are indexed")
                config = IvfPq(
                    distance_type="dot",
                    num_partitions=max(1, count // PER_PARTITION),
                    num_sub_vectors=(width + self._padding) // DIMENSIONS_PER_CODE,
                )
                self._table.create_index("vector", config=config)

    def search(self, queries: np.ndarray, k: int) -> list[np.ndarray]:
        """Per query of `queries` float32 (B, D): item positions, int64 (at most k,), best first."""
        if len(queries) == 0:
            return []
        padded = np.pad(queries.astype(np.float32), ((0, 0), (0, self._padding)))
        found = (
            self._table.search(list(padded) if len(padded) > 1 else padded[0], vector_column_name="vector")
            .distance_type("dot")
            .nprobes(PROBES)
            .refine_factor(REFINE)
            .limit(k)
            .select(["item", "_distance"])  # without the distance LanceDB warns at every query
            .to_arrow()
        )
        items = found["item"].to_numpy().astype(np.int64)
        if len(padded) == 1:
            return [items]
        query, distance = found["query_index"].to_numpy(), found["_distance"].to_numpy()
        order = np.lexsort((items, distance, query))
        starts = np.searchsorted(query[order], np.arange(1, len(padded)))
        return np.split(items[order], starts)

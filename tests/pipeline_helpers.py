"""What the tests of the pipeline share: changed workspaces, small shops, an encoder without weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mllm_srec import catalogue, items, users
from mllm_srec.config import load_config
from mllm_srec.data.readers import read
from mllm_srec.evaluation import protocol
from mllm_srec.ranking import PRIORS, SCORES
from mllm_srec.workspace import Workspace


class LetterEncoder:
    """Counts of letters in place of a sentence encoder."""

    identity = "letters"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.lower().count(chr(97 + i)) + 0.1 for i in range(26)] for text in texts])
        vectors: np.ndarray = (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)
        return vectors


def changed(folder: Path, *overrides: str) -> Workspace:
    workspace = Workspace.open(folder)
    workspace.save_config(load_config(folder / "config.yaml", overrides=overrides))
    return workspace


def produced(workspace: Workspace) -> dict[str, pl.DataFrame]:
    tables = (items.ITEM_TEXTS, catalogue.EMBEDDINGS, users.WINDOWS, users.STATES, SCORES, PRIORS)
    return {table.name: workspace.rows(table) for table in tables}


def watch_places(monkeypatch: pytest.MonkeyPatch) -> dict[str, protocol.Places]:
    """Fills with the places of every system when `evaluate` compares them."""
    seen: dict[str, protocol.Places] = {}
    compare = protocol.compare

    def watch(systems: dict[str, protocol.Places], *rest: Any) -> Any:
        seen.update(systems)
        return compare(systems, *rest)

    monkeypatch.setattr(protocol, "compare", watch)
    return seen


def table_data(folder: Path, events: dict[str, list[tuple[str, int]]], count: int = 16) -> Path:
    """A shop without pictures: items i0, i1 ..., events (item, time in seconds) per user."""
    folder.mkdir()
    kinds = ("red hat", "blue shoe", "green bag")
    rows = "".join(f"i{n},{kinds[n % 3]} number {n},{kinds[n % 3].split()[1]}s\n" for n in range(count))
    (folder / "items.csv").write_text("item_id,title,category\n" + rows)
    log = "".join(f"{user},{item},{1_700_000_000 + at}\n" for user, of in events.items() for item, at in of)
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + log)
    return folder


def make(tmp_path: Path, data: Path, settings: tuple[str, ...], *overrides: str) -> Workspace:
    config = load_config(overrides=(*settings, "retrieval.candidates=5", *overrides))
    return Workspace.create(tmp_path / "made", config, read(data).with_repeats(config.data.repeats))


def walk(users_count: int = 6, length: int = 5) -> dict[str, list[tuple[str, int]]]:
    """User n goes from item n upwards; all users' events interleave in time."""
    return {
        f"u{n}": [(f"i{(n + step) % 16}", 1000 * step + 10 * n) for step in range(length)] for n in range(users_count)
    }

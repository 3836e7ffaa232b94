"""The workspace: one folder with the configuration, the data, the pictures and every row that a stage has produced.

    config.yaml    the configuration of the next command
    dataset.json   name, counts and other facts of the data
    store/         LanceDB: items, interactions, skipped, pictures, item_pictures, and one table per produced kind
    runs/NAME/     files of a run, with a manifest once it is finished

Rows are upserted by key with a fingerprint of everything they were made from, so a command that was interrupted, or
runs again after a change, computes only what is missing or no longer holds.
"""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import lancedb
import polars as pl
import pyarrow as pa
from filelock import FileLock, Timeout

from mllm_srec.config import Config, build_config, dump_config, read_yaml
from mllm_srec.data.dataset import Dataset
from mllm_srec.errors import StoreError
from mllm_srec.ingest import CONFIG, FACTS, STORE, fill
from mllm_srec.progress import Bar, clock, say
from mllm_srec.store_files import atomic_write, fingerprint, read_manifest, storing, sync_folder, write_manifest

__all__ = [
    "Counts",
    "Job",
    "Table",
    "Workspace",
    "atomic_write",
    "fingerprint",
    "read_manifest",
    "write_manifest",
]

RUNS, LOCK, WRITER = "runs", ".lock", ".writer"

COMMIT_ROWS = 256
COMMIT_SECONDS = 2.0
KEEP_VERSIONS = timedelta(minutes=5)
"""Older versions of a table are dropped; a reader, which takes no lock, is done with one in seconds."""

ROW = pa.schema([("key", pa.string()), ("fingerprint", pa.string()), ("status", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Table:
    """A kind of produced rows: key, fingerprint, status and reason, then `columns`."""

    name: str
    columns: pa.Schema

    @property
    def schema(self) -> pa.Schema:
        """All columns as stored."""
        return pa.schema([*ROW, *self.columns])


@dataclass(frozen=True)
class Job:
    """A row to be: its key, the fingerprint of what it is made from, and what `compute` needs to make it."""

    key: str
    fingerprint: str
    payload: Any


@dataclass(frozen=True)
class Counts:
    """What `produce` did: rows reused, rows made ("ok" or "skipped"), rows with status "error"."""

    reused: int
    made: int
    failed: int


class Workspace:
    """One folder on disk. Reading needs no lock; writing takes one, so that only one process writes.

    Attributes:
        root: the folder.
        config: the configuration in config.yaml.
    """

    def __init__(self, root: Path, config: Config) -> None:
        """Use `create` or `open`."""
        self.root = root
        self.config = config
        self._lock = FileLock(root / LOCK, timeout=0)
        self._store = lancedb.connect(root / STORE)

    @classmethod
    def create(cls, path: str | Path, config: Config, dataset: Dataset) -> "Workspace":
        """Store `dataset`, its local pictures and `config` in a new folder.

        It is filled beside its place, as `.NAME.partial`, and renamed at the end: no half workspace can be opened.

        Raises:
            StoreError: the folder is not empty, is being made by another process, or cannot be written.
        """
        root = Path(path).resolve()
        with storing(str(path)):
            if root.exists() and not (root.is_dir() and not any(root.iterdir())):
                raise StoreError(f"{path} exists and is not an empty folder: choose a new one, or delete it first")
            partial = root.with_name(f".{root.name}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            with _locked(FileLock(partial / LOCK, timeout=0), partial):
                _clear(partial)  # what a killed process left
                try:
                    fill(partial, config, dataset)
                    partial.rename(root)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                sync_folder(root.parent)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> "Workspace":
        """The workspace at `path`.

        Raises:
            StoreError: the folder is no workspace.
            UsageError: config.yaml has been edited into something that is not a configuration.
        """
        root = Path(path).resolve()
        for part in (CONFIG, FACTS, STORE):
            if not (root / part).exists():
                raise StoreError(f"{path} is not a workspace ({part} is missing): run `mllm-srec ingest DATA {path}`")
        return cls(root, build_config(read_yaml(root / CONFIG), str(root / CONFIG)))

    def save_config(self, config: Config) -> None:
        """Replace config.yaml.

        Raises:
            StoreError: it cannot be written, or another process is writing to the workspace.
        """
        with self.writing():
            atomic_write(self.root / CONFIG, dump_config(config))
            self.config = config

    def configured(self, config: Config) -> "Workspace":
        """The same folder, rows and lock under another configuration; config.yaml stays as it is."""
        other = copy(self)
        other.config = config
        return other

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the workspace's lock; it may be nested, and ends with the process, however that ends.

        Raises:
            StoreError: another process holds it.
        """
        with _locked(self._lock, self.root):
            yield

    def dataset(self) -> Dataset:
        """The data as stored; read once. `root` is None: pictures come from `picture`."""
        return self._dataset

    @cached_property
    def _dataset(self) -> Dataset:
        try:
            facts = json.loads((self.root / FACTS).read_text(encoding="utf-8"))
            return Dataset(
                name=facts["name"],
                items=self._stored_frame("items"),
                interactions=self._stored_frame("interactions"),
                has_time=facts["has_time"],
                root=None,
                skipped=self._stored_frame("skipped"),
                repeats=facts["repeats"],
                repeats_dropped=facts["repeats_dropped"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{self.root / FACTS} is damaged ({error}): make the workspace again") from error

    def pictures(self) -> pl.DataFrame:
        """item_id, sha256, state, reason in the catalogue's order.

        state: "ok" (only then sha256 is set), "none" (no picture given), "remote" (a URL, not fetched), "missing", or
        what `PictureError.state` says is wrong with the file; `reason` says it in words.
        """
        return self._stored_frame("item_pictures")

    def picture(self, sha256: str) -> bytes:
        """A picture file's bytes.

        Raises:
            ValueError: `sha256` is not 64 hex digits.
            StoreError: no such picture is stored.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256 in hex")
        with self._reading("pictures"):
            found = self._picture_table.search().where(f"sha256 = '{sha256}'").limit(1).to_arrow()
        if found.num_rows == 0:
            raise StoreError(f"{self.root} holds no picture {sha256}: make the workspace again")
        data: bytes = found["data"][0].as_py()
        return data

    @cached_property
    def _picture_table(self) -> Any:
        return self._open_table("pictures")

    def rows(self, table: Table) -> pl.DataFrame:
        """All stored rows, sorted by key: key, fingerprint, status, reason and the table's columns.

        Raises:
            StoreError: the table cannot be read, or another version of mllm-srec gave it other columns.
        """
        stored = self._produced(table)
        with self._reading(table.name):
            return _frame(table.schema.empty_table() if stored is None else stored.to_arrow()).sort("key")

    def row(self, table: Table, key: str) -> dict[str, Any] | None:
        """One stored row by its key, None if there is none."""
        stored = self._produced(table)
        if stored is None:
            return None
        escaped = key.replace("'", "''")
        with self._reading(table.name):
            found: list[dict[str, Any]] = stored.search().where(f"key = '{escaped}'").limit(1).to_list()
        return found[0] if found else None

    def count(self, table_name: str) -> int:
        """How many rows a table holds, 0 if there is none."""
        stored = self._open_table(table_name)
        return 0 if stored is None else int(stored.count_rows())

    def run(self, name: str) -> Path:
        """The folder of run `name`, made if need be."""
        folder = self.root / RUNS / name
        with storing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def produce(
        self,
        table: Table,
        jobs: Sequence[Job],
        compute: Callable[[list[Job]], list[dict[str, object]]],
        batch: int,
        label: str,
    ) -> Counts:
        """Bring `table` up to date with `jobs`; rows of other keys stay untouched.

        `jobs` is cut into batches of `batch`, always at the same places, and `compute` gets a batch's stale jobs:
        those without a row, with another fingerprint, or whose row has status "error". A batch is stored whole or
        not at all, so what an interrupted run makes equals what an undisturbed one makes. What is finished is stored
        also when `compute` raises or the user interrupts.

        Args:
            compute: gives one dictionary per job, in order: "status" ("ok", "skipped", "error"), "reason" and the
                table's columns.
            label: names the work on stderr.

        Raises:
            StoreError: the store cannot be written or another process is writing; rows stored before stay.
            ValueError: two jobs have the same key.
            AssertionError: `compute` gave something else than it must.
        """
        keys = [job.key for job in jobs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{label}: two jobs have the key {Counter(keys).most_common(1)[0][0]!r}")
        if not _stale(jobs, self._marks(table)):  # no lock: where nothing is written, another process may hold it
            say(f"{label}: {len(jobs):,} rows reused")
            return Counts(len(jobs), 0, 0)
        with self.writing():
            marks = self._marks(table)
            stale = _stale(jobs, marks)
            reused = len(jobs) - len(stale)
            pending = _Pending(self._made_table(table), table, self._place(table.name), set(marks))
            failed = 0
            with Bar(label, len(stale)) as bar:
                try:
                    for start in range(0, len(jobs), batch):
                        due = [job for job in jobs[start : start + batch] if job.key in stale]
                        if due:
                            rows = _checked(table, due, compute(due), label)
                            failed += sum(row["status"] == "error" for row in rows)
                            pending.add(rows)
                            bar.advance(len(due))
                finally:
                    pending.commit()
                pending.compact()
            made = len(stale) - failed
            say(f"{label}: {made:,} rows made, {reused:,} reused, {failed:,} failed in {clock(bar.seconds)}")
            return Counts(reused, made, failed)

    def _marks(self, table: Table) -> dict[str, str | None]:
        """Key -> fingerprint; None for a row with status "error", which is as good as out of date."""
        stored = self._produced(table)
        if stored is None:
            return {}
        with self._reading(table.name):
            frame = _frame(stored.search().select(["key", "fingerprint", "status"]).to_arrow())
        return {key: None if status == "error" else mark for key, mark, status in frame.iter_rows()}

    def _produced(self, table: Table) -> Any:
        stored = self._open_table(table.name)
        if stored is not None and not stored.schema.equals(table.schema):
            raise StoreError(
                f"table {table.name} in {self.root} has the columns of another version of mllm-srec: "
                "make a new workspace with `mllm-srec ingest`"
            )
        return stored

    def _made_table(self, table: Table) -> Any:
        with storing(self._place(table.name)):
            found = self._open_table(table.name)
            if found is not None:
                return found
            # What a process left that was killed while it made the table: neither to be opened nor to be made.
            shutil.rmtree(self._place(table.name), ignore_errors=True)
            return self._store.create_table(table.name, schema=table.schema)

    def _open_table(self, name: str) -> Any:
        with self._reading(name):
            try:
                return self._store.open_table(name)
            except ValueError as error:
                if "not found" in str(error):  # LanceDB has no class for it
                    return None
                raise StoreError(f"{self._place(name)} cannot be read: {error}") from error

    def _stored_frame(self, name: str) -> pl.DataFrame:
        table = self._open_table(name)
        if table is None:
            raise StoreError(f"{self._place(name)} is missing: make the workspace again with `mllm-srec ingest`")
        with self._reading(name):
            return _frame(table.to_arrow()).sort("row").drop("row")

    def _place(self, name: str) -> str:
        return f"{self.root / STORE / name}.lance"

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise StoreError(
                f"{self._place(name)} cannot be read ({error}): if its files are damaged, make the workspace again"
            ) from error


class _Pending:
    """Finished rows on their way into a table."""

    def __init__(self, stored: Any, table: Table, place: str, known: set[str]) -> None:
        self._stored, self._table, self._place, self._known = stored, table, place, known
        self._rows: list[dict[str, object]] = []
        self._committed = time.monotonic()

    def add(self, rows: list[dict[str, object]]) -> None:
        self._rows += rows
        if len(self._rows) >= COMMIT_ROWS or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        # Taken out first: after a failed or interrupted write nobody knows what is stored, so it is not tried twice.
        rows, self._rows = self._rows, []
        self._committed = time.monotonic()
        if not rows:
            return
        data = pa.Table.from_pylist(rows, schema=self._table.schema)
        keys = {str(row["key"]) for row in rows}
        with storing(self._place):
            if keys & self._known:
                upsert = self._stored.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
                upsert.execute(data)
            else:  # the same, without looking up the keys: six times faster at 100,000 rows
                self._stored.add(data)
        self._known |= keys

    def compact(self) -> None:
        with storing(self._place):
            # delete_unverified: the lock is held, so unknown files come from a killed process, not from another writer.
            self._stored.optimize(cleanup_older_than=KEEP_VERSIONS, delete_unverified=True)


def _checked(table: Table, jobs: list[Job], made: list[dict[str, object]], label: str) -> list[dict[str, object]]:
    if len(made) != len(jobs):
        raise AssertionError(f"{label}: compute gave {len(made)} rows for {len(jobs)} jobs")
    expected = {"status", "reason", *table.columns.names}
    for job, row in zip(jobs, made, strict=True):
        if set(row) != expected:
            raise AssertionError(f"{label}: row {job.key!r} has {sorted(row)}, table {table.name} {sorted(expected)}")
        if row["status"] not in ("ok", "skipped", "error"):
            raise AssertionError(f"{label}: row {job.key!r} has status {row['status']!r}")
    return [{"key": job.key, "fingerprint": job.fingerprint, **row} for job, row in zip(jobs, made, strict=True)]


def _frame(data: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(data)
    assert isinstance(frame, pl.DataFrame)  # a Series would come from an array only
    return frame


@contextmanager
def _locked(lock: FileLock, folder: Path) -> Iterator[None]:
    """Hold `lock`; who holds it is written beside it, since the lock's own file may be emptied by those who try."""
    with storing(str(folder)):
        try:
            lock.acquire()
        except Timeout:
            pid = (folder / WRITER).read_text() if (folder / WRITER).exists() else "?"
            raise StoreError(f"another process (pid {pid}) writes to {folder}: wait until it ends") from None
    try:
        atomic_write(folder / WRITER, str(os.getpid()))
        yield
    finally:
        lock.release()


def _stale(jobs: Sequence[Job], marks: Mapping[str, str | None]) -> set[str]:
    """Keys of the jobs that have no row made of the same."""
    return {job.key for job in jobs if marks.get(job.key) != job.fingerprint}


def _clear(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.name in (STORE, RUNS):
            shutil.rmtree(entry)
        elif entry.name not in (LOCK, WRITER):
            entry.unlink()

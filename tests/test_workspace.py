"""The workspace: what is stored comes back; whatever interrupts a command, finished rows stay and nothing else does."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from lancedb.table import LanceTable

from mllm_srec import progress, workspace
from mllm_srec.config import Config, UsersConfig
from mllm_srec.data.dataset import Dataset
from mllm_srec.data.schema import RowCheck
from mllm_srec.errors import StoreError, UsageError
from mllm_srec.workspace import (
    Counts,
    Job,
    Table,
    Workspace,
    fingerprint,
)

WORDS = Table("words", pa.schema([("text", pa.string()), ("vector", pa.list_(pa.float32()))]))
ODD_KEYS = ["it's", 'a "b"', "日本語 🎈", "back\\slash", "%_;--", " "]


def png(grey: int, width: int = 8, height: int = 8) -> bytes:
    """A grey picture, written by hand: PNG is a signature and three chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + bytes([grey]) * width for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def make_dataset(root: Path | None = None, images: list[str | None] | None = None) -> Dataset:
    """Three users, as many items as `images`, the catalogue not in alphabetical order."""
    images = images or [None, None, None]
    ids = [f"i{len(images) - n}" for n in range(len(images))]
    check = RowCheck("skip")
    log = pl.DataFrame(
        {
            "user_id": ["u'2", "u1", "u1", "日本", "u1", "u1"],
            "item_id": [ids[0], ids[1], ids[0], ids[-1], ids[0], "nowhere"],
            "timestamp": [5, 7, 3, 1, 9, 10],
            "rating": pl.Series([None, 4.5, 1.0, None, 2.0, 1.0], dtype=pl.Float32),
            "file": ["log.csv"] * 6,
            "line": range(2, 8),
        }
    )
    items = pl.DataFrame(
        {"item_id": ids, "title": [f"title {i}" for i in ids], "image": images},
        {"image": pl.String} | {"item_id": pl.String, "title": pl.String},
    )
    return Dataset.build("small shop", items, log, has_time=True, root=root, check=check).with_repeats("first")


@pytest.fixture
def shop(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "ws", Config(seed=3), make_dataset())


def make_jobs(count: int, version: str = "1") -> list[Job]:
    return [Job(f"k{n:05}", fingerprint(n, version), n) for n in range(count)]


class Compute:
    """Makes a row from a job's number and the batch it came in; remembers the batches."""

    def __init__(self, fail_at: int | None = None, raises: type[BaseException] = RuntimeError) -> None:
        self.batches: list[list[int]] = []
        self.fail_at, self.raises = fail_at, raises

    def __call__(self, jobs: list[Job]) -> list[dict[str, object]]:
        numbers = [job.payload for job in jobs]
        if self.fail_at in numbers:
            raise self.raises("the model stumbled")
        self.batches.append(numbers)
        return [
            {"status": "ok", "reason": "", "text": f"{n} of {numbers}", "vector": np.full(2, n, dtype=np.float32)}
            for n in numbers
        ]


# Creating and opening


def test_a_data_set_comes_back_as_it_was(shop: Workspace) -> None:
    wanted, got = make_dataset(), shop.dataset()
    for name in ("items", "interactions", "skipped"):
        assert getattr(got, name).equals(getattr(wanted, name)), name
        assert getattr(got, name).schema == getattr(wanted, name).schema, name
    assert got.skipped.height == 1
    assert (got.name, got.has_time, got.repeats, got.repeats_dropped) == ("small shop", True, "first", 1)
    assert got.histories().items == ["i3", "i2", "i1"]  # the catalogue's order, not the alphabet's
    assert shop.dataset() is got
    facts = json.loads((shop.root / "dataset.json").read_text())
    assert (facts["users"], facts["items"], facts["interactions"], facts["skipped"]) == (3, 3, 4, 1)
    assert (shop.count("interactions"), shop.count("nothing")) == (4, 0)


def test_open_reads_the_configuration_that_was_saved(shop: Workspace) -> None:
    assert Workspace.open(shop.root).config == Config(seed=3)
    shop.save_config(Config(users=UsersConfig(window=7)))
    assert shop.config.users.window == 7
    assert Workspace.open(shop.root).config == shop.config
    (shop.root / "config.yaml").write_text("users: {widnow: 7}\n")
    with pytest.raises(UsageError, match=r"config.yaml: unknown key 'users.widnow': did you mean 'window'"):
        Workspace.open(shop.root)


def test_a_new_workspace_needs_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Workspace.create(tmp_path / "empty", Config(), make_dataset())
    with pytest.raises(StoreError, match=r"not an empty folder: choose a new one"):
        Workspace.create(tmp_path / "empty", Config(), make_dataset())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="not an empty folder"):
        Workspace.create(tmp_path / "file", Config(), make_dataset())
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(StoreError, match="cannot write"):
        Workspace.create(tmp_path / "file" / "below", Config(), make_dataset())


@pytest.mark.parametrize("lost", ["config.yaml", "dataset.json", "store"])
def test_what_is_not_a_workspace_is_refused(shop: Workspace, lost: str) -> None:
    (shop.root / lost).rename(shop.root / "elsewhere")
    with pytest.raises(StoreError, match=r"not a workspace \(.* is missing\): run `mllm-srec ingest DATA"):
        Workspace.open(shop.root)


def test_a_failed_ingest_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("mllm_srec.ingest.dump_config", full)
        with pytest.raises(StoreError, match=r"disk full while writing .*ws: free space"):
            Workspace.create(tmp_path / "ws", Config(), make_dataset())
    assert list(tmp_path.iterdir()) == []
    Workspace.create(tmp_path / "ws", Config(), make_dataset())


def test_what_a_killed_ingest_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".ws.partial"
    (left / "store" / "items.lance").mkdir(parents=True)
    (left / "dataset.json").write_text("{")
    made = Workspace.create(tmp_path / "ws", Config(), make_dataset())
    assert made.dataset().items.height == 3
    assert [path.name for path in tmp_path.iterdir()] == ["ws"]


# Pictures


def test_pictures_are_stored_once_and_bad_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_srec.ingest.PICTURE_BATCH", 1)  # every picture is a batch
    data = tmp_path / "data"
    data.mkdir()
    for name, content in {
        "a.png": png(10),
        "copy.png": png(10),
        "b.png": png(200),
        "words.png": b"not a picture",
    }.items():
        (data / name).write_bytes(content)
    images = ["a.png", None, "https://shop.example/a.png", "gone.png", "copy.png", "words.png", "b.png", "../a.png"]
    made = Workspace.create(tmp_path / "ws", Config(), make_dataset(data, images))
    frame = made.pictures()
    assert frame["item_id"].to_list() == [f"i{n}" for n in range(8, 0, -1)]
    expected = ["ok", "none", "remote", "missing", "ok", "not_a_picture", "ok", "outside"]
    assert frame["state"].to_list() == expected
    assert [sha256 is not None for sha256 in frame["sha256"]] == [state == "ok" for state in expected]
    assert [reason != "" for reason in frame["reason"]] == [state not in ("ok", "none") for state in expected]
    assert made.count("pictures") == 2
    first, copy, other = (frame["sha256"][n] for n in (0, 4, 6))
    assert first == copy
    assert made.picture(first) == png(10)
    assert made.picture(other) == png(200)
    with pytest.raises(StoreError, match="holds no picture 0000"):
        made.picture("0" * 64)
    with pytest.raises(ValueError, match="not a SHA-256"):
        made.picture("x' OR 1=1 --")


def test_a_local_picture_of_data_without_a_folder_is_missing(tmp_path: Path) -> None:
    made = Workspace.create(tmp_path / "ws", Config(), make_dataset(None, ["a.png", None]))
    assert made.pictures()["state"].to_list() == ["missing", "none"]


# Producing


def test_rows_are_made_once(shop: Workspace) -> None:
    assert shop.rows(WORDS).is_empty()
    assert shop.rows(WORDS).columns == ["key", "fingerprint", "status", "reason", "text", "vector"]
    jobs, compute = make_jobs(10)[::-1], Compute()
    assert shop.produce(WORDS, jobs, compute, 4, "words") == Counts(0, 10, 0)
    assert compute.batches == [[9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]
    rows = shop.rows(WORDS)
    assert rows["key"].to_list() == [f"k{n:05}" for n in range(10)]
    assert rows["vector"].to_list() == [[n, n] for n in range(10)]
    assert rows["fingerprint"].to_list() == [job.fingerprint for job in jobs[::-1]]
    assert shop.rows(Table("others", WORDS.columns)).schema == rows.schema

    again = Compute()
    assert Workspace.open(shop.root).produce(WORDS, jobs, again, 4, "words") == Counts(10, 0, 0)
    assert again.batches == []
    assert shop.produce(WORDS, [], again, 4, "words") == Counts(0, 0, 0)


def test_only_stale_rows_are_made_again_in_their_own_batches(shop: Workspace) -> None:
    jobs = make_jobs(10)
    shop.produce(WORDS, jobs, Compute(), 4, "words")
    before = shop.rows(WORDS)
    changed = [replace(job, fingerprint="new") if job.payload in (1, 3, 8) else job for job in jobs if job.payload != 5]
    changed.append(Job("more", "new", 10))
    compute = Compute()
    assert shop.produce(WORDS, changed, compute, 4, "words") == Counts(6, 4, 0)
    assert compute.batches == [[1, 3], [8], [10]]  # 5 is gone, so the batches are 0-3, 4 6 7 8, 9 10
    after = shop.rows(WORDS)
    assert after.height == 11
    untouched = ~pl.col("key").is_in(["k00001", "k00003", "k00008", "more"])
    assert after.filter(untouched).equals(before.filter(~pl.col("key").is_in(["k00001", "k00003", "k00008"])))
    assert after.filter(pl.col("key") == "k00003")["text"].item() == "3 of [1, 3]"


def test_failed_rows_are_tried_again_and_skipped_ones_are_not(shop: Workspace) -> None:
    def half(jobs: list[Job]) -> list[dict[str, object]]:
        rows = Compute()(jobs)
        rows[0] |= {"status": "error", "reason": "no answer"}
        rows[1] |= {"status": "skipped", "reason": "nothing to say"}
        return rows

    assert shop.produce(WORDS, make_jobs(3), half, 3, "words") == Counts(0, 2, 1)
    assert shop.rows(WORDS)["status"].to_list() == ["error", "skipped", "ok"]
    compute = Compute()
    assert shop.produce(WORDS, make_jobs(3), compute, 3, "words") == Counts(2, 1, 0)
    assert compute.batches == [[0]]
    assert shop.rows(WORDS)["status"].to_list() == ["ok", "skipped", "ok"]


def test_keys_are_never_part_of_a_query(shop: Workspace) -> None:
    jobs = [Job(key, "1", n) for n, key in enumerate(ODD_KEYS)]
    shop.produce(WORDS, jobs, Compute(), 4, "words")
    assert shop.produce(WORDS, jobs, Compute(), 4, "words").reused == len(ODD_KEYS)
    shop.produce(WORDS, [replace(job, fingerprint="2") for job in jobs], Compute(), 4, "words")
    assert shop.rows(WORDS)["key"].to_list() == sorted(ODD_KEYS)
    assert set(shop.rows(WORDS)["fingerprint"]) == {"2"}
    found = [shop.row(WORDS, key) for key in ODD_KEYS]
    assert [row and (row["key"], row["vector"]) for row in found] == [(k, [n] * 2) for n, k in enumerate(ODD_KEYS)]
    assert [shop.row(WORDS, key) for key in ("it's' OR key != '", "it", "")] == [None] * 3
    assert shop.row(Table("others", WORDS.columns), ODD_KEYS[0]) is None  # no such table yet


@pytest.mark.parametrize("raises", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_goes_on_to_the_same_rows(
    tmp_path: Path, shop: Workspace, monkeypatch: pytest.MonkeyPatch, raises: type[BaseException]
) -> None:
    monkeypatch.setattr(workspace, "COMMIT_ROWS", 8)
    undisturbed = Workspace.create(tmp_path / "other", Config(), make_dataset())
    undisturbed.produce(WORDS, make_jobs(50), Compute(), 4, "words")

    with pytest.raises(raises, match="stumbled"):
        shop.produce(WORDS, make_jobs(50), Compute(fail_at=29, raises=raises), 4, "words")
    assert shop.count("words") == 28  # the batch in flight was 28-31; what was finished is stored
    compute = Compute()
    assert shop.produce(WORDS, make_jobs(50), compute, 4, "words") == Counts(28, 22, 0)
    assert compute.batches[0] == [28, 29, 30, 31]
    assert shop.rows(WORDS).equals(undisturbed.rows(WORDS))


@pytest.mark.parametrize(("seconds", "stored"), [(30.0, [0, 0, 0]), (0.0, [0, 1, 2])])
def test_slow_rows_are_committed_by_time(
    shop: Workspace, monkeypatch: pytest.MonkeyPatch, seconds: float, stored: list[int]
) -> None:
    monkeypatch.setattr(workspace, "COMMIT_SECONDS", seconds)
    seen = []

    def watch(jobs: list[Job]) -> list[dict[str, object]]:
        seen.append(shop.count("words"))
        return Compute()(jobs)

    shop.produce(WORDS, make_jobs(3), watch, 1, "words")
    assert seen == stored
    assert shop.count("words") == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 rows for 1 jobs"),
        ([{"status": "ok", "reason": "", "text": "a"}], "row 'k00000' has"),
        ([{"status": "ok", "reason": "", "text": "a", "vector": [], "txet": ""}], "row 'k00000' has"),
        ([{"status": "fine", "reason": "", "text": "a", "vector": []}], "status 'fine'"),
    ],
)
def test_a_stage_that_breaks_the_contract_is_stopped(
    shop: Workspace, rows: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        shop.produce(WORDS, make_jobs(1), lambda jobs: rows, 4, "words")
    assert shop.count("words") == 0


def test_two_jobs_with_one_key_are_refused(shop: Workspace) -> None:
    with pytest.raises(ValueError, match="words: two jobs have the key 'k00001'"):
        shop.produce(WORDS, [*make_jobs(3), Job("k00001", "x", 1)], Compute(), 4, "words")


def test_a_table_of_another_version_is_refused(shop: Workspace) -> None:
    shop.produce(WORDS, make_jobs(2), Compute(), 4, "words")
    changed = Table("words", pa.schema([("text", pa.string())]))
    for use in (lambda: shop.rows(changed), lambda: shop.produce(changed, make_jobs(2), Compute(), 4, "words")):
        with pytest.raises(StoreError, match=r"columns of another version .* make a new workspace"):
            use()
    assert shop.count("words") == 2


def test_30_000_rows_take_seconds(shop: Workspace) -> None:
    numbers = Table("numbers", pa.schema([("n", pa.int64())]))
    start = time.monotonic()
    counts = shop.produce(
        numbers,
        make_jobs(30_000),
        lambda jobs: [{"status": "ok", "reason": "", "n": job.payload} for job in jobs],
        64,
        "numbers",
    )
    assert counts.made == 30_000
    assert shop.rows(numbers)["n"].to_list() == list(range(30_000))
    assert shop.produce(numbers, make_jobs(30_000), Compute(), 64, "numbers").reused == 30_000
    assert time.monotonic() - start < 20  # about 1.5 s on an idle core


# Other processes

WRITE = """
import sys, time
import pyarrow as pa
from mllm_srec.workspace import Job, Table, Workspace, fingerprint
table = Table("words", pa.schema([("text", pa.string())]))
def compute(jobs):
    print(jobs[0].payload, flush=True)
    time.sleep(0.002)
    return [{"status": "ok", "reason": "", "text": str([job.payload for job in jobs])} for job in jobs]
jobs = [Job(f"k{n:05}", fingerprint(n), n) for n in range(100_000)]
Workspace.open(sys.argv[1]).produce(table, jobs, compute, 10, "words")
"""


def test_a_killed_writer_is_refused_company_keeps_its_rows_and_releases_the_lock(shop: Workspace) -> None:
    table = Table("words", pa.schema([("text", pa.string())]))
    jobs = [Job(f"k{n:05}", fingerprint(n), n) for n in range(3000)]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(shop.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        for line in writer.stdout:  # three commits
            if int(line) >= 800:
                break
        with (
            pytest.raises(StoreError, match=rf"another process \(pid {writer.pid}\) writes to .*: wait until it ends"),
            shop.writing(),
        ):
            pass
        read = shop.rows(table)  # a reader needs no lock
        writer.send_signal(signal.SIGKILL)
    finally:
        writer.kill()
        writer.communicate()
    stored = shop.count("words")
    assert 700 < read.height <= stored < 3000
    assert stored % 10 == 0  # a batch is stored whole or not at all

    made: list[int] = []

    def compute(batch: list[Job]) -> list[dict[str, object]]:
        made.append(len(batch))
        return [{"status": "ok", "reason": "", "text": str([job.payload for job in batch])} for job in batch]

    assert shop.produce(table, jobs, compute, 10, "words") == Counts(stored, 3000 - stored, 0)
    assert set(made) == {10}
    texts = [str(list(range(n - n % 10, n - n % 10 + 10))) for n in range(3000)]
    assert shop.rows(table)["text"].to_list() == texts


def test_the_lock_nests_and_is_released(shop: Workspace) -> None:
    with shop.writing():
        with shop.writing():
            shop.produce(WORDS, make_jobs(1), Compute(), 4, "words")
        with (
            pytest.raises(StoreError, match=rf"another process \(pid {os.getpid()}\)"),
            Workspace.open(shop.root).writing(),
        ):
            pass
        other = Workspace.open(shop.root)
        assert other.produce(WORDS, make_jobs(1), Compute(), 4, "words") == Counts(1, 0, 0)  # reading needs no lock
        with pytest.raises(StoreError, match="another process"):
            other.produce(WORDS, make_jobs(2), Compute(), 4, "words")
    with Workspace.open(shop.root).writing():
        pass


# Full disks and damage

FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), writer/structural.rs:258:9"),
]


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("method", ["add", "merge_insert", "optimize"])
def test_a_full_disk_is_said_and_the_store_stays_whole(
    shop: Workspace, monkeypatch: pytest.MonkeyPatch, error: Exception, method: str
) -> None:
    monkeypatch.setattr(workspace, "COMMIT_ROWS", 4)
    shop.produce(WORDS, make_jobs(6), Compute(), 4, "words")
    calls = []

    def full(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    jobs = make_jobs(8, "2" if method == "merge_insert" else "1")
    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, method, full)
        with pytest.raises(
            StoreError, match=r"disk full while writing .*words.lance: free space, then run the same command again"
        ):
            shop.produce(WORDS, jobs, Compute(), 4, "words")
    assert len(calls) == 1
    assert shop.rows(WORDS).height == (8 if method == "optimize" else 6)
    assert shop.produce(WORDS, jobs, Compute(), 4, "words").failed == 0
    assert shop.rows(WORDS)["fingerprint"].to_list() == [job.fingerprint for job in jobs]


def test_another_failure_of_the_disk_names_the_place(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(LanceTable, "add", broken)
    with pytest.raises(StoreError, match=r"cannot write .*words.lance: .*Input/output error"):
        shop.produce(WORDS, make_jobs(6), Compute(), 4, "words")


def test_a_damaged_table_names_the_place(shop: Workspace) -> None:
    shop.produce(WORDS, make_jobs(6), Compute(), 4, "words")
    for file in (shop.root / "store" / "words.lance" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StoreError, match=r"words.lance cannot be read"):
        Workspace.open(shop.root).rows(WORDS)


def test_run_makes_its_folder(shop: Workspace) -> None:
    assert shop.run("main") == shop.root / "runs" / "main"
    assert shop.run("main").is_dir()


# Progress


def test_lines_tell_counts_rate_and_time_left(
    shop: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def slow(jobs: list[Job]) -> list[dict[str, object]]:
        now[0] += 1.0 * len(jobs)
        return Compute()(jobs)

    shop.produce(WORDS, make_jobs(5), slow, 5, "first")
    capsys.readouterr()
    shop.produce(WORDS, make_jobs(20), slow, 1, "words")
    assert capsys.readouterr().err.splitlines() == [
        "words 13 %  2/15  1.0 rows/s  0:13 left",
        "words 80 %  12/15  1.0 rows/s  0:03 left",
        "words: 15 rows made, 5 reused, 0 failed in 0:15",
    ]
    shop.produce(WORDS, make_jobs(20), slow, 1, "words")
    assert capsys.readouterr().err == "words: 20 rows reused\n"

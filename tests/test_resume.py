"""Kill -9 at any point, then the same command again: the same rows, adapter and figures as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from mllm_srec import catalogue, items, ranking, users
from mllm_srec.config import load_config
from mllm_srec.errors import StoreError
from mllm_srec.pipeline import Pipeline
from mllm_srec.workspace import Counts, Job, Table, Workspace

TABLES = (
    items.ITEM_TEXTS,
    catalogue.EMBEDDINGS,
    users.WINDOWS,
    users.STATES,
    ranking.SCORES,
    ranking.PRIORS,
)

DRIVER = """
import sys, time
from pathlib import Path

import torch
from transformers import Trainer

torch.set_num_threads(1)
folder, place, nth, ready = sys.argv[1:]
from mllm_srec import cli, items, tuning, users, workspace

workspace.COMMIT_ROWS = 8
calls = 0


def stand_still_at(owner, name):
    does = getattr(owner, name)

    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == int(nth):
            Path(ready).touch()
            time.sleep(600)
        return does(*arguments, **options)

    setattr(owner, name, wrapped)


stand_still_at(
    *{
        "describe": (items, "_look"),
        "comprehend": (users, "summarise"),
        "train": (tuning, "row_loss"),
        "checkpoint": (Trainer, "_save_optimizer_and_scheduler"),
        "adapter": (tuning, "write_manifest"),
    }[place]
)
sys.argv = ["mllm-srec", "run", folder]
cli.main()
"""


def kill_at(folder: Path, place: str, nth: int, ready: Path) -> None:
    """Run until the `nth` call of `place` begins, then kill -9."""
    ready.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), place, str(nth), str(ready)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, f"{place} was not reached: {process.stdout.read() if process.stdout else ''}"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL


def rows(folder: Path) -> dict[str, pl.DataFrame]:
    workspace = Workspace.open(folder)
    return {table.name: workspace.rows(table) for table in TABLES}


def run_again(folder: Path) -> None:
    """The rest of the run, in this process."""
    assert Pipeline(Workspace.open(folder)).run() == json.loads((folder / "runs/main/metrics.json").read_text())


def assert_equal(one: Path, other: Path) -> None:
    """Every produced row, the adapter, the choices and the figures."""
    left, right = rows(one), rows(other)
    for name in left:
        assert left[name].equals(right[name]), name
    for name in ("metrics.json", "choices.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (one / "runs/main" / name).read_bytes() == (other / "runs/main" / name).read_bytes(), name
    files = [sorted(p.relative_to(f).as_posix() for p in (f / "runs").rglob("*")) for f in (one, other)]
    assert files[0] == files[1]


def test_a_run_killed_in_every_stage_ends_like_an_undisturbed_one(
    ingested: Path, finished: Path, tmp_path: Path
) -> None:
    folder, ready = shutil.copytree(ingested, tmp_path / "ws"), tmp_path / "ready"
    run = folder / "runs/main"
    whole = rows(finished)

    kill_at(folder, "describe", 6, ready)
    with Workspace.open(folder).writing():  # its lock went with it
        described = rows(folder)["item_texts"]
    assert described.height == 40  # five batches of eight, each committed
    assert described.equals(whole["item_texts"].filter(pl.col("key").is_in(described["key"].implode())))
    kill_at(folder, "describe", 4, ready)
    assert rows(folder)["item_texts"].height == 64  # went on, and was stopped again

    kill_at(folder, "comprehend", 2, ready)
    stored = rows(folder)
    assert stored["item_texts"].equals(whole["item_texts"])
    assert 0 < stored["user_windows"].height < whole["user_windows"].height
    assert stored["user_states"].is_empty()

    kill_at(folder, "train", 4, ready)  # two rows per step: one step is done, the second half done
    states = rows(folder)["user_states"]
    assert not states.is_empty()  # the others of the whole run are those that only its report tells of
    assert states.equals(whole["user_states"].filter(pl.col("key").is_in(states["key"].implode())))
    assert [path.name for path in (run / "adapter/checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (run / "adapter/manifest.json").exists()
    assert not (run / "manifest.json").exists()

    run_again(folder)
    assert_equal(folder, finished)


def test_a_checkpoint_killed_half_written_is_not_trusted(finished: Path, copied: Path, tmp_path: Path) -> None:
    run = copied / "runs/main"
    shutil.rmtree(run / "adapter")
    kill_at(copied, "checkpoint", 2, tmp_path / "ready")  # weights of the second step are there, its state is not
    assert (run / "adapter/checkpoints/checkpoint-2/adapter_model.safetensors").exists()
    assert not (run / "adapter/checkpoints/checkpoint-2/trainer_state.json").exists()
    run_again(copied)
    assert_equal(copied, finished)


def test_an_adapter_killed_before_its_manifest_is_finished_again(finished: Path, copied: Path, tmp_path: Path) -> None:
    run = copied / "runs/main"
    shutil.rmtree(run / "adapter")
    kill_at(copied, "adapter", 1, tmp_path / "ready")
    assert (run / "adapter/adapter_model.safetensors").exists()
    assert not (run / "adapter/manifest.json").exists()
    run_again(copied)
    assert_equal(copied, finished)


def test_an_adapter_of_other_rows_or_settings_is_not_evaluated(copied: Path) -> None:
    pipeline = Pipeline(Workspace.open(copied))
    pipeline.workspace.save_config(load_config(copied / "config.yaml", overrides=("training.learning_rate=0.01",)))
    with pytest.raises(StoreError, match=r"adapter is missing or was trained on other rows.*run `mllm-srec train WS`"):
        Pipeline(Workspace.open(copied)).evaluate()
    shutil.rmtree(copied / "runs/main/adapter")
    with pytest.raises(StoreError, match="adapter is missing"):
        Pipeline(Workspace.open(copied)).evaluate()


def test_a_table_that_was_half_made_is_made_anew(copied: Path) -> None:
    workspace = Workspace.open(copied)
    half = copied / "store" / "notes.lance" / "_versions"
    half.mkdir(parents=True)
    (half / "1.manifest.tmp").write_bytes(b"\0")
    notes = Table("notes", pa.schema([("text", pa.string())]))
    made = workspace.produce(
        notes,
        [Job("k", "f", None)],
        lambda jobs: [{"status": "ok", "reason": "", "text": "kept"} for _ in jobs],
        1,
        "notes",
    )
    assert made == Counts(0, 1, 0)
    assert Workspace.open(copied).rows(notes)["text"].to_list() == ["kept"]

"""Training under `accelerate launch`: two processes on the CPU end as one does, and only the first one writes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from launched_training import ROWS, VALUES
from mllm_srec import tuning
from mllm_srec.pipeline import Pipeline
from mllm_srec.workspace import read_manifest
from pipeline_helpers import changed
from test_tuning import ADAPTER, Interrupt, settings
from tiny_models import tiny_mllm


def launch(*command: object) -> str:
    """stderr of `accelerate launch` with two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Of the launcher's switches this is the one that starts more than one process without MPI; without GPUs they are
    # the CPU's.
    switches = f"--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --main_process_port {port}"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *switches.split(), "--dynamo_backend", "no"]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    ended = subprocess.run(
        [*launcher, *map(str, command)],
        env={**os.environ, **here},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]  # the launcher's is 0 only if that of every process is
    return ended.stderr


def assert_equal(one: Path, two: Path, rounding: float = 1e-4) -> None:
    """Adapters of one and of two processes: the same files, losses, looks and weights."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for name in ("losses.json", "looks.json"):
        told = [json.loads((folder / name).read_text()) for folder in (one, two)]
        assert [row["step"] for row in told[0]] == [row["step"] for row in told[1]]
        for row, other in zip(*told, strict=True):
            assert row.keys() == other.keys()
            for key, value in row.items():
                assert value == pytest.approx(other[key], abs=rounding)
    weights = [load_file(folder / ADAPTER) for folder in (one, two)]
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weights[1][name], weight, atol=rounding)
    assert read_manifest(one)["fingerprint"] == read_manifest(two)["fingerprint"]


def test_two_processes_learn_as_one_and_end_together(tmp_path: Path) -> None:
    said = launch(Path(__file__).parent / "launched_training.py", tmp_path / "two")
    left = iter(VALUES)
    mllm = tiny_mllm()
    tuning.train(mllm, ROWS, settings(accumulate=2), tmp_path / "one", look=lambda: [next(left)])
    assert_equal(tmp_path / "one", tmp_path / "two")
    # Six rows four times, two per step: twelve steps.
    assert len(json.loads((tmp_path / "two" / "losses.json").read_text())) == 12
    assert said.count("train: step 6 of 12: log-likelihood on validation 0.5000") == 1


def test_the_command_trains_with_two_processes(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Pipeline(changed(copied, "retrieval.candidates=30"))  # so that validation lists hold their target
    run.comprehend()
    shutil.copytree(copied, tmp_path / "two")
    more = "training.epochs=2"
    said = launch("-m", "mllm_srec.cli", "train", tmp_path / "two", "--set", more)
    assert "Traceback" not in said and "error" not in said
    Pipeline(changed(copied, more)).train()
    folders = [root / "runs/main" for root in (copied, tmp_path / "two")]
    assert_equal(*(folder / "adapter" for folder in folders))
    assert (folders[0] / "training_rows.jsonl").read_bytes() == (folders[1] / "training_rows.jsonl").read_bytes()
    assert len(list(folders[1].rglob(ADAPTER))) == 1
    assert (copied / "config.yaml").read_bytes() == (tmp_path / "two" / "config.yaml").read_bytes()
    # What two processes have trained, one does not train again.
    monkeypatch.setattr(tuning, "row_loss", Interrupt(1, AssertionError))
    Pipeline(changed(tmp_path / "two", more)).train()

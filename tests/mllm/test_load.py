import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import is_torchvision_available

from mllm.openai_server import OpenAiServer
from mllm_srec.config import ModelConfig
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.load import FILES, load_mllm, model_folder, trainable, weights_identity
from mllm_srec.mllm.remote import RemoteMllm
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
def test_a_saved_folder_loads_and_answers_alike(kind: str, tmp_path: Path) -> None:
    made, mllm = tiny_mllm(kind), load_mllm(config(save(tmp_path, kind)))
    np.testing.assert_array_equal(mllm.score(ASKED)[0], made.score(ASKED)[0])
    prefix = ASKED[0].prefix
    assert mllm.generate([prefix], 4) == made.generate([prefix], 4)
    np.testing.assert_array_equal(mllm.loglik([prefix], ["a shoe"]), made.loglik([prefix], ["a shoe"]))
    np.testing.assert_array_equal(mllm.embed([prefix]), made.embed([prefix]))
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
@pytest.mark.parametrize(("kind", "name"), [("qwen3_vl", "Qwen3VLProcessor"), ("smolvlm", "SmolVLMProcessor")])
def test_pictures_need_no_torchvision(kind: str, name: str, tmp_path: Path) -> None:
    save(tmp_path / "made", kind)
    processor = load_mllm(config(tmp_path / "made")).renderer.processor
    assert type(processor).__name__ == name
    assert not hasattr(processor, "video_processor")
    # Released folders say how the processor looks at films, which nobody asks for here.
    settings = json.loads((tmp_path / "made" / "processor_config.json").read_text())
    settings["video_processor"] = {"video_processor_type": "SomeVideoProcessor", "num_frames": 64}
    (tmp_path / "made" / "processor_config.json").write_text(json.dumps(settings))
    assert not hasattr(load_mllm(config(tmp_path / "made")).renderer.processor, "video_processor")


def test_a_package_that_the_processor_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "smolvlm")
    (tmp_path / "model.safetensors").unlink()  # said before the weights are looked at
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ModelError, match=r"model '.*' needs the package num2words: pip install num2words$"):
        load_mllm(config(tmp_path))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("X requires the Y library. You can install it with pip: `pip install y-z.w`. Note"), "y-z.w: pip"),
        (ImportError("`pip install --upgrade accelerate`"), "accelerate: pip"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "timm: pip"),
    ],
)
def test_any_missing_package_is_named(
    error: ImportError, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise error

    save(tmp_path)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(ModelError, match=f"needs the package {told} install"):
        load_mllm(config(tmp_path))


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


# A server


def test_a_server_is_spoken_to_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-1")
    with OpenAiServer() as server:
        mllm = load_mllm(config("m", server=f"{server.url}/v1", api_key_variable="SHOP_KEY"))
        assert isinstance(mllm, RemoteMllm)
        assert mllm.generate([Prompt(("hello",))], 4) == ["fine"]
        assert mllm.identity.startswith("server:m:")
        assert server.requests[0]["model"] == "m"
        assert server.headers[0]["Authorization"] == "Bearer sk-1"


@pytest.mark.parametrize("value", [None, ""])
def test_a_key_that_is_not_there_is_said_before_anything_is_sent(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("hf_mistaken", raising=False)
    if value is not None:
        monkeypatch.setenv("hf_mistaken", value)
    with pytest.raises(ModelError, match=r"variable that model\.api_key_variable names is not set") as error:
        load_mllm(config("m", server="http://127.0.0.1:1", api_key_variable="hf_mistaken"))
    assert "mistaken" not in str(error.value)


def test_a_model_behind_a_server_is_not_trained(tmp_path: Path) -> None:
    local = load_mllm(config(save(tmp_path)))
    assert trainable(local) is local
    with pytest.raises(
        ModelError, match=r"behind a server cannot be trained: set training\.rows=0, or train it in this"
    ):
        trainable(load_mllm(config("m", server="http://127.0.0.1:1")))

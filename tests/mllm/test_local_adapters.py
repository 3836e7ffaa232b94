import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.local import LocalMllm
from tiny_models import KINDS, SHAPE, drawing, tiny_mllm, tiny_model, tiny_tokenizer

ASKED = [Request(Prompt((drawing("red"), "Item: ")), ("a red shoe", "a blue shirt"), "\nYes or No?")]
# Inputs and outputs of a layer's linear parts: q, k, v, o of attention; gate, up, down behind it.
SIZES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def train(mllm: LocalMllm, folder: Path, top_layers: int = 2, seed: int = 3) -> np.ndarray:
    """Give a fresh adapter weights as training would, save it; the scores it makes."""
    peft_model = mllm.attach_adapter(rank=2, top_layers=top_layers, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in mllm.model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    peft_model.save_pretrained(str(folder))
    return mllm.score(ASKED)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_an_adapter_gives_back_the_exact_model(kind: str, tmp_path: Path) -> None:
    mllm = tiny_mllm(kind)
    state = {name: weight.clone() for name, weight in mllm.model.state_dict().items()}
    before = mllm.score(ASKED)[0]
    assert not mllm.has_adapter
    adapted = train(mllm, tmp_path)
    assert mllm.has_adapter
    assert np.abs(adapted - before).min() > 1e-3
    mllm.drop_adapter()
    mllm.drop_adapter()  # once more is fine
    assert not mllm.has_adapter
    np.testing.assert_array_equal(mllm.score(ASKED)[0], before)
    after = mllm.model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(weight, state[name]) for name, weight in after.items())
    assert not any(weight.requires_grad for weight in mllm.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_the_trained_scores(kind: str, tmp_path: Path) -> None:
    adapted = train(tiny_mllm(kind), tmp_path)
    mllm = tiny_mllm(kind)
    mllm.load_adapter(tmp_path)
    np.testing.assert_allclose(mllm.score(ASKED)[0], adapted, atol=1e-5)
    assert not any(weight.requires_grad for weight in mllm.model.parameters())
    assert not mllm.model.training
    # An adapter takes the place of another, and is not laid over it.
    train(mllm, tmp_path / "other", seed=4)
    mllm.load_adapter(tmp_path)
    np.testing.assert_allclose(mllm.score(ASKED)[0], adapted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_layers", "layers"), [(1, {2}), (2, {1, 2}), (1000, {0, 1, 2})])
def test_only_the_language_models_top_layers_are_adapted(
    kind: str, top_layers: int, layers: set[int], tmp_path: Path
) -> None:
    train(tiny_mllm(kind), tmp_path, top_layers)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".safetensors"}
    language = "text_model" if kind in ("idefics3", "smolvlm") else "language_model"
    names = {name.split(".lora_")[0] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {
        f"base_model.model.model.{language}.layers.{layer}.{'mlp' if part[0] in 'gud' else 'self_attn'}.{part}"
        for layer in layers
        for part in LINEAR
    }


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    before = mllm.score(ASKED)[0]
    first = []
    for seed in (1, 1, 2):
        mllm.attach_adapter(rank=2, top_layers=1, seed=seed)
        np.testing.assert_array_equal(mllm.score(ASKED)[0], before)
        weights = [weight for weight in mllm.model.parameters() if weight.requires_grad]
        assert sum(weight.numel() for weight in weights) == sum(2 * (taken + given) for taken, given in SIZES)
        first.append(weights[0].detach().clone())
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_the_identity_tells_weights_type_and_adapter(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    train(mllm, tmp_path / "a")
    assert mllm.identity == "tiny-llava-0:float32:in training"
    train(mllm, tmp_path / "b", seed=5)
    mllm.drop_adapter()
    assert mllm.identity == "tiny-llava-0:float32"
    seen = {mllm.identity, tiny_mllm(seed=1).identity}
    for folder in ("a", "b", "a"):
        mllm.load_adapter(tmp_path / folder)
        seen.add(mllm.identity)
    model, processor = tiny_model()
    half = LocalMllm(model.to(torch.bfloat16), processor, "tiny-llava-0")
    seen.add(half.identity)
    half.load_adapter(tmp_path / "a")
    assert half.identity.replace("bfloat16", "float32") == mllm.identity
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert len(seen) == 5


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    train(tiny_mllm(), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    mllm = tiny_mllm()
    with pytest.raises(ModelError, match=r"holds no adapter \(adapter_model\.safetensors\): train again"):
        mllm.load_adapter(tmp_path)
    assert not mllm.has_adapter


@pytest.mark.parametrize("trained_for", ["idefics3", "more layers", "wider layers", "cut"])
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(trained_for: str, tmp_path: Path) -> None:
    if trained_for in KINDS:
        train(tiny_mllm(trained_for), tmp_path)
    else:
        tokens = len(tiny_tokenizer("llava"))
        changed = {"more layers": {"num_hidden_layers": 4}, "wider layers": {"intermediate_size": 64}}
        text = LlamaConfig(vocab_size=tokens, **{**SHAPE, **changed.get(trained_for, {})})
        train(LocalMllm(*tiny_model("llava", text=text), "other"), tmp_path)
    if trained_for == "cut":
        file = tmp_path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    mllm = tiny_mllm()
    before, names = mllm.score(ASKED)[0], list(mllm.model.state_dict())
    with pytest.raises(ModelError, match="does not fit the model: train again"):
        mllm.load_adapter(tmp_path)
    assert not mllm.has_adapter
    assert list(mllm.model.state_dict()) == names
    np.testing.assert_array_equal(mllm.score(ASKED)[0], before)


def test_without_adapter_the_model_reads_as_it_was_loaded(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    request = Request(Prompt(("a red mug",)), ("a blue mug", "a hat"), "Yes or No?")
    plain, identity = mllm.score([request])[0], mllm.identity
    peft_model = mllm.attach_adapter(4, 2, seed=0)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    mllm.load_adapter(tmp_path)
    adapted, with_adapter = mllm.score([request])[0], mllm.identity
    assert np.abs(adapted - plain).max() > 1e-3
    assert with_adapter != identity
    with mllm.without_adapter():
        np.testing.assert_allclose(mllm.score([request])[0], plain, atol=1e-6)
        assert mllm.identity == identity
    np.testing.assert_allclose(mllm.score([request])[0], adapted, atol=1e-6)
    assert mllm.identity == with_adapter


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_the_weights_an_adapter_gives_the_same_scores(kind: str, tmp_path: Path) -> None:
    train(tiny_mllm(kind), tmp_path)
    adapted, merged, by_peft = (tiny_mllm(kind) for _ in range(3))
    plain = merged.score(ASKED)[0]
    adapted.load_adapter(tmp_path)
    # By hand: W + alpha / r * B A, where alpha is twice the rank.
    weights = load_file(tmp_path / "adapter_model.safetensors")
    layers = dict(merged.model.named_modules())
    with torch.no_grad():
        for name, down in weights.items():
            if name.endswith(".lora_A.weight"):
                up = weights[name.replace(".lora_A.", ".lora_B.")]
                layers[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")].weight += 2 * up @ down
    by_peft.load_adapter(tmp_path)
    whole = LocalMllm(by_peft._peft.merge_and_unload(), by_peft.renderer.processor, "merged")
    for other in (merged, whole):
        assert not any("lora_" in name for name, _ in other.model.named_parameters())
        np.testing.assert_allclose(other.score(ASKED)[0], adapted.score(ASKED)[0], atol=1e-4)
    assert np.abs(plain - adapted.score(ASKED)[0]).min() > 1e-3


# The head start


@pytest.fixture
def head_start(tmp_path: Path) -> Path:
    """A folder with an adapter of rank 2 for two layers, in half precision as it is shipped."""
    train(tiny_mllm(), tmp_path / "head_start")
    file = tmp_path / "head_start" / "adapter_model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file)
    return tmp_path / "head_start"


def test_a_fresh_adapter_takes_the_head_starts_weights(head_start: Path) -> None:
    loaded, begun = tiny_mllm(), tiny_mllm()
    loaded.load_adapter(head_start)
    begun.head_start = head_start
    begun.attach_adapter(rank=2, top_layers=2, seed=9)
    begun.take_head_start()
    np.testing.assert_allclose(begun.score(ASKED)[0], loaded.score(ASKED)[0], atol=1e-5)
    wanted = {name: weight.float() for name, weight in load_file(head_start / "adapter_model.safetensors").items()}
    taken = {name: weight for name, weight in begun._peft.named_parameters() if weight.requires_grad}
    assert len(taken) == len(wanted) == 28
    for name, weight in taken.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, wanted[name.replace(".default", "")])


@pytest.mark.parametrize(("rank", "layers"), [(4, 2), (2, 1), (2, 3)])
def test_a_head_start_of_another_form_changes_nothing_and_this_is_said(
    rank: int, layers: int, head_start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mllm = tiny_mllm()
    before = mllm.score(ASKED)[0]
    mllm.head_start = head_start
    mllm.attach_adapter(rank=rank, top_layers=layers, seed=9)
    mllm.take_head_start()
    np.testing.assert_array_equal(mllm.score(ASKED)[0], before)
    assert capsys.readouterr().err == "train: without the head start, which is for rank 16 and the last 12 layers\n"


def test_a_model_without_head_start_begins_afresh(head_start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mllm = tiny_mllm()
    assert mllm.head_start_identity == ""
    before = mllm.score(ASKED)[0]
    mllm.attach_adapter(rank=2, top_layers=2, seed=9)
    mllm.take_head_start()
    np.testing.assert_array_equal(mllm.score(ASKED)[0], before)
    assert capsys.readouterr().err == ""
    other = tiny_mllm()
    other.head_start = head_start
    digest = hashlib.sha256((head_start / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert other.head_start_identity == digest[:16]

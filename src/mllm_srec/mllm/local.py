"""A Hugging Face image-text-to-text model in this process."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mllm_srec.errors import ModelError
from mllm_srec.mllm import asking, attention, scoring
from mllm_srec.mllm.base import Answer, Picture, Prompt, Question, Request
from mllm_srec.mllm.pieces import Piece
from mllm_srec.mllm.rendering import Renderer
from mllm_srec.progress import say

IN_TRAINING = "in training"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD_ROWS = 512
"""Positions whose logits over the whole vocabulary stand in memory at once."""


class LocalMllm:
    """`generate`, `ask`, `score`, `loglik` and `embed` over a loaded model; see `mllm.base.Mllm` for the contract."""

    def __init__(self, model: Any, processor: Any, base_identity: str, batch_size: int = 32) -> None:
        """Wrap a model in evaluation mode and its processor; `base_identity` is the content hash of its weights."""
        self.model = model.eval()
        self.model.requires_grad_(False)
        text_config = model.config.get_text_config(decoder=True)
        self.renderer = Renderer(processor, getattr(text_config, "max_position_embeddings", None))
        self.batch_size = batch_size
        self._base_identity = base_identity
        self._adapter_identity = ""
        self._peft: Any = None
        self.prefixes: scoring.Recent[scoring.Prefix] = scoring.Recent(scoring.KEPT_BYTES["prefixes"])
        self.looks: scoring.Recent[Piece] = scoring.Recent(scoring.KEPT_BYTES["looks"])
        self.head_start: Path | None = None
        """Folder of the adapter that a training begins with, for a model that ships with one."""
        self.checked: set[str] = set()
        """Identities whose packed scores were compared with separate prompts (`guard.check_once`)."""
        self.model.get_decoder().set_attn_implementation(attention.NAME)

    @property
    def identity(self) -> str:
        """Weights, data type and adapter."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return ":".join(part for part in (self._base_identity, dtype, self._adapter_identity) if part)

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter is attached."""
        return self._peft is not None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.model.device)

    # -- reading and writing ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy continuations in batches of `batch_size`, prompts with and without pictures apart."""
        answers = [""] * len(prompts)
        for rows, inputs in self._batches(prompts, "left"):
            self.renderer.check_length(int(inputs["attention_mask"].sum(1).max()) + max_new_tokens)
            with _accepted():
                made = self.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.renderer.tokenizer.pad_token_id,
                )
            new = made[:, inputs["input_ids"].shape[1] :]
            for row, text in zip(
                rows, self.renderer.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                answers[row] = text.strip()
        return answers

    @torch.inference_mode()
    def ask(self, prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int) -> list[list[Answer]]:
        """Every question to every prefix; see `asking.ask`."""
        return asking.ask(self, prefixes, questions, max_new_tokens)

    @torch.inference_mode()
    def loglik(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> np.ndarray:
        """float32 (N,): mean log-likelihood per token of each continuation.

        Raises:
            ModelError: a continuation is empty.
        """
        tokens = [self.renderer.ids(self.renderer.neutral(text)) for text in continuations]
        if len(tokens) != len(prompts) or not all(tokens):
            raise ModelError("loglik needs one continuation with text per prompt")
        values = np.zeros(len(prompts), dtype=np.float32)
        for rows, inputs in self._batches(prompts, "right"):
            lengths = inputs["attention_mask"].sum(1)
            extended = _append(inputs, lengths, [tokens[row] for row in rows], self.renderer.tokenizer.pad_token_id)
            self.renderer.check_length(int(extended["attention_mask"].sum(1).max()))
            hidden = self.read(**extended, use_cache=False)
            for at, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
                wanted = torch.tensor(tokens[row], device=self.device)
                likelihoods = self.token_logliks(hidden[at, length - 1 : length - 1 + len(wanted)], wanted)
                values[row] = float(likelihoods.mean())
        return values

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float32 (N, D): mean last hidden state of each prompt, L2-normalised."""
        vectors: list[Any] = [None] * len(prompts)
        for rows, inputs in self._batches(prompts, "right"):
            hidden = self.read(**inputs, use_cache=False).float()
            weights = inputs["attention_mask"][..., None].float()
            pooled = nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
            for row, vector in zip(rows, pooled.cpu().numpy(), strict=True):
                vectors[row] = vector
        return np.array(vectors, dtype=np.float32)

    # -- packed rows --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """float32 (C_i, 2) per request: odds of "Yes", mean log-likelihood; see `scoring.score`."""
        return scoring.score(self, requests)

    @property
    def keeps_prefixes(self) -> bool:
        """Whether what was read stays true: not while an adapter is trained."""
        return self._adapter_identity != IN_TRAINING

    def label_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 (N, 2): logits of "Yes" and "No" at hidden states (N, D)."""
        rows = self._head.weight[list(self.renderer.label_ids)].float()
        bias = self._head.bias
        offset = 0.0 if bias is None else bias[list(self.renderer.label_ids)].float()
        return torch.as_tensor(hidden.float() @ rows.T + offset)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 (N, V): logits over the vocabulary at hidden states (N, D)."""
        return torch.as_tensor(self._head(hidden)).float()

    # -- adapters -----------------------------------------------------------------------------------------------------

    def attach_adapter(self, rank: int, top_layers: int, seed: int) -> Any:
        """Attach a fresh LoRA adapter to the last `top_layers` layers of the language model; returns the peft model.

        Vision tower and projector keep their weights: the adapter learns to read users, not pictures.
        """
        from peft import LoraConfig, get_peft_model

        self.drop_adapter()
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=self._adapted_modules(top_layers)
        )
        self._peft = get_peft_model(self.model, config)
        self._adapter_identity = IN_TRAINING
        return self._peft

    @cached_property
    def head_start_identity(self) -> str:
        """Content hash of the head start's weights; "" without one."""
        if self.head_start is None:
            return ""
        return hashlib.sha256((self.head_start / ADAPTER_WEIGHTS).read_bytes()).hexdigest()[:16]

    def take_head_start(self) -> None:
        """Give the attached adapter the head start's weights; said and left out where it has another form."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        if self.head_start is None:
            return
        shapes = {name: tuple(w.shape) for name, w in get_peft_model_state_dict(self._peft).items()}
        weights = load_file(self.head_start / ADAPTER_WEIGHTS)
        if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
            say("train: without the head start, which is for rank 16 and the last 12 layers")
            return
        set_peft_model_state_dict(self._peft, {name: weight.float() for name, weight in weights.items()})

    def load_adapter(self, folder: Path) -> None:
        """Attach the adapter saved in `folder` (safetensors) for use.

        Raises:
            ModelError: there is none in this format, or it was trained for another model.
        """
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load

        self.drop_adapter()
        file = folder / ADAPTER_WEIGHTS
        if not file.is_file():
            raise ModelError(f"{folder} holds no adapter ({file.name}): train again")
        weights = file.read_bytes()
        try:
            config = LoraConfig.from_pretrained(str(folder))
            config.base_model_name_or_path = None  # peft would warn where the same model lies in another folder
            self._peft = get_peft_model(self.model, config)
            result = set_peft_model_state_dict(self._peft, load(weights))
            unfilled = [name for name in result.missing_keys if "lora_" in name]
            if result.unexpected_keys or unfilled:
                raise ValueError(f"unknown or missing weights: {[*result.unexpected_keys, *unfilled][:3]}")
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            self.drop_adapter()
            raise ModelError(f"the adapter in {folder} does not fit the model: train again ({error})") from error
        self._adapter_identity = hashlib.sha256(weights).hexdigest()[:16]
        self.model.eval()
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self.model.dtype)

    def drop_adapter(self) -> None:
        """Take the adapter off; the weights are those loaded at first."""
        if self._peft is not None:
            self.model = self._peft.unload()
            self._peft, self._adapter_identity = None, ""

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Read and write as the model was loaded, `identity` included, for as long as the context lasts."""
        if self._peft is None:
            yield
            return
        attached, self._adapter_identity = self._adapter_identity, ""
        try:
            with self._peft.disable_adapter():
                yield
        finally:
            self._adapter_identity = attached

    def _adapted_modules(self, top_layers: int) -> list[str]:
        decoder = self.model.get_decoder()
        prefix = next(name for name, module in self.model.named_modules() if module is decoder)
        first = max(0, len(decoder.layers) - top_layers)
        names = []
        for i in range(first, len(decoder.layers)):
            inside = decoder.layers[i].named_modules()
            names += [f"{prefix}.layers.{i}.{name}" for name, module in inside if isinstance(module, nn.Linear)]
        if not names:
            raise ModelError("found no linear layers in the language model to adapt")
        return names

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Any:
        """The model without its head: ids to hidden states."""
        return self.model.model

    def read(self, **inputs: Any) -> torch.Tensor:
        """(B, L, D): last hidden states of inputs that may hold pictures."""
        with _accepted():
            return torch.as_tensor(self.core(**inputs).last_hidden_state)

    @property
    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    def fill_cache(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """A cache that holds the prefixes (B, P) of `inputs`, and their last hidden states (B, P, D).

        Raises:
            ModelError: the model cannot keep them so that they can be read from again and again.
        """
        cache = self._plain_cache()
        hidden = self.read(**inputs, position_ids=positions, cache=cache, use_cache=True)
        # Models swallow a keyword they do not know, and all that is read behind the prefix would be wrong.
        if cache.get_seq_length() != inputs["input_ids"].shape[1]:
            raise ModelError("the model did not fill the cache it was given: install transformers 5.24 or later")
        return cache, hidden

    def positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions (B, P) of right-padded inputs, or (3, B, P) with pictures under M-RoPE."""
        if "image_grid_thw" in inputs and hasattr(self.core, "get_rope_index"):
            positions, _ = self.core.get_rope_index(
                inputs["input_ids"],
                inputs["mm_token_type_ids"],
                image_grid_thw=inputs["image_grid_thw"],
                attention_mask=inputs.get("attention_mask"),
            )
            return torch.as_tensor(positions)
        rows, length = inputs["input_ids"].shape
        return torch.arange(length, device=self.device).expand(rows, -1)

    def check_plain(self) -> None:
        """See that every layer of the language model has plain full attention.

        Raises:
            ModelError: sliding windows, recurrent layers: a packed row would not say what separate prompts say.
        """
        self._plain_cache()

    def _plain_cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
            raise ModelError("packed rows need a model with plain full attention in every layer: choose another model")
        return cache

    def _batches(self, prompts: Sequence[Prompt], side: str) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        pictures = [[part for part in prompt.parts if isinstance(part, Picture)] for prompt in prompts]
        for looking in (True, False):
            rows = [i for i, of_prompt in enumerate(pictures) if bool(of_prompt) is looking]
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                texts = [self.renderer.text(prompts[i]) for i in part]
                yield part, self.on_device(self.renderer.encode(texts, [pictures[i] for i in part], side))

    def on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Model inputs where the model runs, in its data type.

        Raises:
            ModelError: the pictures have not as many tokens as the model will make features of them (Qwen-VL, whose
                positions are counted from both; the other models compare them when they read).
        """
        if "image_grid_thw" in inputs:
            merged = self.model.config.vision_config.spatial_merge_size**2
            features = int(inputs["image_grid_thw"].prod(-1).sum()) // merged
            tokens = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
            if tokens != features:
                raise ModelError(
                    f"the model's processor wrote {tokens} picture tokens where the model makes {features} features: "
                    "the two do not belong together, fetch the model again or choose another"
                )
        return {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }

    def token_logliks(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """float32 (N,): log-likelihood of token wanted[n] at hidden states (N, D)."""
        return self.own_logits(hidden, wanted) - self.normalisers(hidden)

    def own_logits(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """(N,): logit of token wanted[n] at hidden states (N, D), computed in float32 whatever the model's type."""
        parts = []
        for states, tokens in zip(torch.split(hidden, HEAD_ROWS), torch.split(wanted, HEAD_ROWS), strict=True):
            own = (states.float() * self._head.weight[tokens].float()).sum(-1)
            parts.append(own if self._head.bias is None else own + self._head.bias[tokens].float())
        return torch.cat(parts)

    def normalisers(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 (N,): logarithm of the sum over the vocabulary's exponentiated logits at hidden states (N, D)."""
        return torch.cat([self.logits(states).logsumexp(-1) for states in torch.split(hidden, HEAD_ROWS)])


@contextmanager
def _accepted() -> Iterator[None]:
    """What transformers finds wrong with inputs, as an error for people: picture tokens and features not as many."""
    try:
        yield
    except ValueError as error:
        raise ModelError(
            f"the model refuses what its processor made of a prompt: {error}; if the two do not belong together, fetch "
            "the model again or choose another"
        ) from error


def _append(
    inputs: dict[str, torch.Tensor], lengths: torch.Tensor, tails: Sequence[Sequence[int]], pad: int
) -> dict[str, torch.Tensor]:
    """Right-padded inputs with `tails` behind each row's own tokens."""
    rows, old = inputs["input_ids"].shape
    width = int(max(length + len(tail) for length, tail in zip(lengths.tolist(), tails, strict=True)))
    extended = dict(inputs)
    for name, value in inputs.items():
        if value.shape[:2] == (rows, old) and not value.is_floating_point():
            filled = value.new_full((rows, max(width, old)), pad if name == "input_ids" else 0)
            filled[:, :old] = value
            extended[name] = filled[:, :width] if width >= old else filled
    for row, (length, tail) in enumerate(zip(lengths.tolist(), tails, strict=True)):
        extended["input_ids"][row, length : length + len(tail)] = torch.tensor(tail, device=lengths.device)
        extended["attention_mask"][row, length : length + len(tail)] = 1
    return extended

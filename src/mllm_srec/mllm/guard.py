"""At a run's start: packed scores are compared with separate prompts, so that no layer scores nonsense in silence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mllm_srec.errors import ModelError
from mllm_srec.mllm import scoring
from mllm_srec.mllm.base import Candidate, Picture, Request, check_finite

if TYPE_CHECKING:
    from mllm_srec.mllm.local import LocalMllm

USERS = 2
LIMIT = 1e-3
"""Largest difference in float32, in nats: rounding stays a tenth below, another mask or position far above."""
SHARE = 0.5
"""Largest mean difference in the run's own type, as a share of the separate scores' deviation."""
FLOAT32_PARAMETERS = 1_000_000_000
"""Models with more are compared in the run's own type: a float32 copy may not fit."""


def check_packing(mllm: "LocalMllm", requests: Sequence[Request]) -> float:
    """Largest difference between packed scores and separate prompts, over two users and three candidates each.

    What the first request asks for counts, odds and likelihood, in every way of reading: in one go, with the prefix
    read alone, with the prefix kept. The separate prompts go through the model's own forward pass: no packed row, no
    kept keys, no positions given.

    Raises:
        ModelError: packed and separate scores differ, are not finite, or are the same for every candidate.
    """
    chosen = [request for request in map(_few, requests) if len(request.candidates) > 1][:USERS]
    if not chosen:
        return 0.0
    asked = [bool(chosen[0].question), chosen[0].likelihood]
    exact = sum(parameter.numel() for parameter in mllm.model.parameters()) <= FLOAT32_PARAMETERS
    with _in_float32(mllm) if exact else nullcontext():
        mllm.prefixes.clear()
        with torch.inference_mode():
            ways = [scoring.score(mllm, chosen, short) for short in (scoring.SHORT_TOKENS, 0, 0)]
        separate = np.concatenate([separate_scores(mllm, request) for request in chosen])
        mllm.prefixes.clear()
    packed = np.stack([np.concatenate(way) for way in ways])
    packed, separate = packed[..., asked], separate[:, asked]
    check_finite(packed, "packed scores")
    check_finite(separate, "scores of separate prompts")
    of_users = np.split(separate, np.cumsum([len(request.candidates) for request in chosen])[:-1])
    if np.all([np.ptp(part, axis=0) == 0 for part in of_users], axis=0).any():
        raise ModelError("the model gives every candidate the same score: the prompt does not reach it")
    apart = np.abs(packed - separate)
    worst, typical, spread = float(apart.max()), apart.mean((0, 1)), separate.std(0)
    if exact and worst > LIMIT:
        raise ModelError(
            f"packed scores differ from those of separate prompts by {worst:.2g} in float32, where up to {LIMIT:g} is "
            "rounding: this model cannot be read in packed rows as it is; report it, and choose another model"
        )
    if not exact and (typical > SHARE * spread).any():
        raise ModelError(
            f"packed scores differ from those of separate prompts by {typical.max():.2g} on average, too much beside "
            f"the scores' own deviation of {spread.min():.2g}: report it, and choose another model or "
            "model.dtype=float32"
        )
    return worst


def check_once(mllm: "LocalMllm", requests: Sequence[Request]) -> None:
    """`check_packing`, once per process for the same weights and adapter; nothing to compare does not count.

    Raises:
        ModelError: as `check_packing`.
    """
    if mllm.identity not in mllm.checked:
        check_packing(mllm, requests)
        if any(len(_few(request).candidates) > 1 for request in requests):
            mllm.checked.add(mllm.identity)


@torch.inference_mode()
def separate_scores(mllm: "LocalMllm", request: Request) -> np.ndarray:
    """float32 (C, 2): what `score` says of a request, from one ordinary prompt per candidate."""
    renderer = mllm.renderer
    encoded = renderer.encode_request(request)
    head, _ = renderer.split(request)
    prefix = encoded.prefix["input_ids"][0].tolist()
    scores = np.full((len(encoded.candidates), 2), np.nan, dtype=np.float32)
    for number, tokens in enumerate(encoded.candidates):
        text, own = renderer.candidate(request.candidates[number])
        pictures = [part for part in request.prefix.parts if isinstance(part, Picture)] + own
        lead = " " if head.endswith(" ") else ""
        # Pictures come with the whole text; tokens are those of the pieces, which may be cut where a text is not.
        inputs = renderer.encode([head.rstrip(" ") + lead + text], [pictures], "right")
        ids = [*prefix, *tokens, *encoded.behind[number]]
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.tensor(
                [[token == mllm.model.config.image_token_id for token in ids]]
            ).int()
        hidden = mllm.read(**mllm.on_device(inputs), use_cache=False)[0]
        if request.question:
            yes, no = mllm.label_logits(hidden[-1:])[0].tolist()
            scores[number, 0] = yes - no
        if request.likelihood:
            at = [place for place, token in enumerate(tokens) if token not in renderer.special_ids]
            states = hidden[torch.tensor(at, device=hidden.device) + len(prefix) - 1]
            wanted = torch.tensor([tokens[place] for place in at], device=hidden.device)
            scores[number, 1] = float(mllm.token_logliks(states, wanted).mean())
    return scores


def _few(request: Request) -> Request:
    """The shortest, a middle and the longest candidate: their lengths differ where the request's do."""
    first = {(candidate, request.note(at)): at for at, candidate in reversed([*enumerate(request.candidates)])}
    by_length = sorted(first.values(), key=lambda at: _text_length(request.candidates[at]))
    places = sorted({0, len(by_length) // 2, len(by_length) - 1} if by_length else ())
    kept = [by_length[place] for place in places]
    notes = tuple(request.notes[at] for at in kept) if request.notes else ()
    return replace(request, candidates=tuple(request.candidates[at] for at in kept), notes=notes)


def _text_length(candidate: Candidate) -> int:
    parts = (candidate,) if isinstance(candidate, str) else candidate
    return sum(len(part) for part in parts if isinstance(part, str))


@contextmanager
def _in_float32(mllm: "LocalMllm") -> Iterator[None]:
    """The model's weights in float32 for as long as the context lasts; afterwards the very same tensors as before."""
    held = [(tensor, tensor.data) for tensor in (*mllm.model.parameters(), *mllm.model.buffers())]
    try:
        for tensor, data in held:
            if data.is_floating_point() and data.dtype != torch.float32:
                tensor.data = data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data

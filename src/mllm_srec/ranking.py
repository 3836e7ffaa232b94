"""Stage 3, ranking: readings of the packed pass and their fusion with retrieval.

Readings per candidate: the odds of "Yes", and the mean log-likelihood of its text; each also minus the same reading for
the empty user, which takes out what the item says for itself. Fusion adds within-user standardised scores, so weighted
that validation's targets are likeliest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain, combinations

import numpy as np
import pyarrow as pa

from mllm_srec.catalogue import Catalogue
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Mllm, Picture, Request, check_finite, told
from mllm_srec.mllm.guard import check_once
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.newton import minimise
from mllm_srec.prompts import ranking as prompts
from mllm_srec.records import ranking_request
from mllm_srec.user_states import NOBODY, UserState
from mllm_srec.users import state_key
from mllm_srec.workspace import Job, Table, Workspace, fingerprint

SCORES = Table("scores", pa.schema([("odds", pa.list_(pa.float32())), ("loglik", pa.list_(pa.float32()))]))
PRIORS = Table("item_priors", pa.schema([("odds", pa.float32()), ("loglik", pa.float32())]))

RIDGE = 2.0
"""On the fusion's weights, in nats over all lists: few lists give no reading a large weight."""
LIKELIER = 1e-9
"""Nats per list; less is rounding."""


@dataclass(frozen=True)
class Fusion:
    """The frozen choice: weights of retrieval and of the two readings, and whether the empty user is subtracted."""

    retrieval: float
    odds: float
    loglik: float
    subtract_empty: bool


@dataclass(frozen=True)
class Candidates:
    """Candidate lists with what every reading says of them.

    items int32 (B, K) catalogue positions; retrieval, odds, loglik float32 (B, K).
    """

    items: np.ndarray
    retrieval: np.ndarray
    odds: np.ndarray
    loglik: np.ndarray


def standardise(scores: np.ndarray) -> np.ndarray:
    """(B, K) scores with mean 0 and deviation 1 within each row; a row that is constant but for rounding becomes 0."""
    centred = scores - scores.mean(1, keepdims=True)
    deviation = centred.std(1, keepdims=True)
    rounding = np.finfo(np.float32).eps * np.abs(scores).max(1, keepdims=True, initial=0.0)  # readings are float32
    standardised: np.ndarray = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > rounding)
    return standardised


def fuse(candidates: Candidates, priors: np.ndarray, fusion: Fusion) -> np.ndarray:
    """float64 (B, K) fused scores; `priors` float32 (I, 2) are the empty user's odds and log-likelihoods per item."""
    odds, loglik = candidates.odds.astype(np.float64), candidates.loglik.astype(np.float64)
    if fusion.subtract_empty:
        odds = odds - priors[candidates.items, 0]
        loglik = loglik - priors[candidates.items, 1]
    retrieval = standardise(candidates.retrieval.astype(np.float64))
    fused: np.ndarray = fusion.retrieval * retrieval
    fused += fusion.odds * standardise(odds) + fusion.loglik * standardise(loglik)
    return fused


RETRIEVAL_ALONE = Fusion(1.0, 0.0, 0.0, False)


def cross_fit(
    parts: Sequence[Candidates], priors: np.ndarray, targets: Sequence[np.ndarray]
) -> tuple[Fusion, list[np.ndarray]]:
    """The choice of `best_fusion` on the lists of all parts; and of each of two parts the fused scores (B, K) by what
    the other one alone would choose: scores of lists that did not choose their own weights, for calibration. None of
    these if there is one part.

    Args:
        parts: lists of at most two samples of users.
        targets: by part, int (B,), catalogue positions.
    """
    if not parts:
        return RETRIEVAL_ALONE, []
    together = Candidates(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Candidates))
    )
    choice = best_fusion(together, priors, np.concatenate(targets))[0]
    if len(parts) == 1:
        return choice, []
    others = [best_fusion(part, priors, of_part)[0] for part, of_part in zip(parts, targets, strict=True)][::-1]
    return choice, [fuse(part, priors, other) for part, other in zip(parts, others, strict=True)]


def best_fusion(candidates: Candidates, priors: np.ndarray | None, target: np.ndarray) -> tuple[Fusion, np.ndarray]:
    """The weights that make the targets likeliest, where a candidate's chance is the softmax of its list's fused scores
    (conditional logit: McFadden 1974), with a ridge.

    Likelihood and not NDCG, whose steps over the few lists that hold their target are mostly chance. No weight is
    negative: what would speak against its own reading is left out. The empty user is subtracted where that is likelier.
    A target outside its list says nothing of the weights.

    Args:
        priors: as for `fuse`; None: the empty user is not subtracted.
        target: int (B,), catalogue positions.

    Returns:
        The choice, retrieval alone if no list holds its target or nothing tells it; and float64 (B',), the
        log-likelihood of the target in each list that holds it (nats; where nothing tells them, of any item).
    """
    inside = candidates.items == target[:, None]
    held = inside.any(1)
    if not held.any():
        return RETRIEVAL_ALONE, np.zeros(0)
    subset = Candidates(
        *(values[held] for values in (candidates.items, candidates.retrieval, candidates.odds, candidates.loglik))
    )
    place, best = inside[held].argmax(1), -np.inf
    chosen, likely = RETRIEVAL_ALONE, _log_likelihoods(np.zeros(subset.items.shape), place)
    for subtract in (False,) if priors is None else (False, True):
        known = np.zeros((0, 2)) if priors is None else priors
        parts = [fuse(subset, known, Fusion(a, b, c, subtract)) for a, b, c in np.eye(3)]
        inputs = np.stack(parts, axis=-1)
        weights, worth = _likeliest(inputs, place)
        weights = weights.round(4)
        if weights.any() and worth > best + LIKELIER:
            best, likely = worth, _log_likelihoods(inputs @ weights, place)
            retrieval, odds, loglik = map(float, weights)
            chosen = Fusion(retrieval, odds, loglik, subtract)
    return chosen, likely


def _likeliest(inputs: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (M,), none negative, of float64 inputs (B, K, M) whose targets stand at `place` (B,), and the mean
    log-likelihood less the ridge.

    The best ones are those of some of the inputs fitted freely: of all subsets there are few.
    """
    count = inputs.shape[-1]
    chosen, best = np.zeros(count), float(_log_likelihoods(inputs @ np.zeros(count), place).mean())
    for kept in chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1)):
        weights, value = _fit(inputs[..., kept], place)
        if weights.min() >= 0 and value > best + LIKELIER:
            chosen, best = np.zeros(count), value
            chosen[list(kept)] = weights
    return chosen, best


def _fit(inputs: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, float]:
    """As `_likeliest`, with weights of any sign."""
    lists, ridge = np.arange(len(inputs)), RIDGE / len(inputs)

    def loss(weights: np.ndarray) -> float:
        return float(ridge * weights @ weights / 2 - _log_likelihoods(inputs @ weights, place).mean())

    def slopes(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weighed = np.exp(_log_softmax(inputs @ weights))[..., None] * inputs
        means = weighed.sum(1)
        gradient = (means - inputs[lists, place]).mean(0) + ridge * weights
        spread = np.einsum("bkm,bkn->mn", weighed, inputs) - means.T @ means
        return gradient, spread / len(inputs) + ridge * np.eye(len(weights))

    weights = minimise(loss, slopes, np.zeros(inputs.shape[-1]))
    return weights, -loss(weights)


def _log_likelihoods(scores: np.ndarray, place: np.ndarray) -> np.ndarray:
    """float64 (B,): the log of the softmax of each list of (B, K) at `place`."""
    likely: np.ndarray = _log_softmax(scores)[np.arange(len(scores)), place]
    return likely


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logs


def item_priors(
    workspace: Workspace, mllm: Mllm, catalogue: Catalogue, items: np.ndarray, scope: str = ""
) -> np.ndarray:
    """float32 (I, 2): odds and mean log-likelihood of `items` (positions) for the empty user; NaN for all others.

    They are stored and reused; those of another `scope` (a run beside the main one) stay.
    """

    def key(item: int) -> str:
        return json.dumps([scope, catalogue.ids[item]], ensure_ascii=False) if scope else catalogue.ids[item]

    jobs = [Job(key(i), _mark(mllm, ranking_request(NOBODY, catalogue, [i])), int(i)) for i in items]

    def compute(batch: list[Job]) -> list[dict[str, object]]:
        scores = mllm.score([ranking_request(NOBODY, catalogue, [job.payload for job in batch])])[0]
        return [{"status": "ok", "reason": "", "odds": float(odds), "loglik": float(loglik)} for odds, loglik in scores]

    workspace.produce(PRIORS, jobs, compute, batch=64, label="rank: items for the empty user")
    priors = np.full((len(catalogue.ids), 2), np.nan, dtype=np.float32)
    rows = {row["key"]: row for row in workspace.rows(PRIORS).iter_rows(named=True)}
    for i in items:
        priors[i] = rows[key(i)]["odds"], rows[key(i)]["loglik"]
    return priors


def stored_priors(workspace: Workspace, mllm: Mllm, catalogue: Catalogue, items: np.ndarray) -> np.ndarray:
    """As `item_priors` without writing: stored rows where they still hold, the others computed for this call."""
    rows = {row["key"]: row for row in workspace.rows(PRIORS).iter_rows(named=True)}
    priors = np.full((len(catalogue.ids), 2), np.nan, dtype=np.float32)
    missing = []
    for i in items:
        row = rows.get(catalogue.ids[i])
        if row and row["fingerprint"] == _mark(mllm, ranking_request(NOBODY, catalogue, [i])):
            priors[i] = row["odds"], row["loglik"]
        else:
            missing.append(int(i))
    if missing:
        priors[missing] = mllm.score([ranking_request(NOBODY, catalogue, missing)])[0]
    return priors


def _mark(mllm: Mllm, request: Request) -> str:
    words = [told((part,)) if isinstance(part, Picture) else part for part in request.prefix.parts]
    return fingerprint(*words, *map(told, request.candidates), *request.notes, prompts.VERSION, mllm.identity)


def score_lists(
    workspace: Workspace,
    mllm: Mllm,
    catalogue: Catalogue,
    states: Sequence[UserState],
    items: np.ndarray,
    retrieval: np.ndarray,
    label: str,
    batch: int = 4,
) -> Candidates:
    """Read every candidate list `items` (B, K) under its user's state; stored and reused by fingerprint.

    Before anything is scored, the packed scores of the first two lists are compared with separate prompts.

    Raises:
        ModelError: packed and separate scores differ; scores are not finite, or are all equal within every list.
    """
    keys, jobs = [], {}
    for state, row in zip(states, items, strict=True):
        request = ranking_request(state, catalogue, row)
        keys.append(json.dumps([label, state_key(state.user_id, state.end)], ensure_ascii=False))
        # Targets tied in time share a state, and with it a list.
        jobs[keys[-1]] = Job(keys[-1], _mark(mllm, request), request)

    def compute(batch_jobs: list[Job]) -> list[dict[str, object]]:
        if isinstance(mllm, LocalMllm):
            check_once(mllm, [job.payload for job in batch_jobs])
        scores = mllm.score([job.payload for job in batch_jobs])
        return [{"status": "ok", "reason": "", "odds": s[:, 0].tolist(), "loglik": s[:, 1].tolist()} for s in scores]

    workspace.produce(SCORES, list(jobs.values()), compute, batch=batch, label=f"rank: {label}")
    rows = {row["key"]: row for row in workspace.rows(SCORES).iter_rows(named=True)}
    odds = np.array([rows[key]["odds"] for key in keys], dtype=np.float32).reshape(items.shape)
    loglik = np.array([rows[key]["loglik"] for key in keys], dtype=np.float32).reshape(items.shape)
    check_scores(odds, loglik)
    return Candidates(items, retrieval, odds, loglik)


def check_scores(odds: np.ndarray, loglik: np.ndarray) -> None:
    """Refuse scores (..., K) that cannot rank.

    Raises:
        ModelError: not finite, or all equal within every list.
    """
    for name, values in (("odds of Yes", odds), ("log-likelihoods", loglik)):
        check_finite(values, name)
        if values.size and values.shape[-1] > 1 and (np.ptp(values, axis=-1) == 0).all():
            raise ModelError(f"the model gave the same {name} for every candidate: the prompt does not reach it")

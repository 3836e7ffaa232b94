"""What validation chooses: the encoder's epochs, then the weights of the signals beside co-occurrence."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mllm_srec import metrics
from mllm_srec.config import RetrievalConfig
from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.data.split import Targets, histories_of, target_items
from mllm_srec.retrieval import sequence
from mllm_srec.retrieval.retriever import Mix, Retriever
from mllm_srec.retrieval.sequence import SequenceEncoder
from mllm_srec.retrieval.signals import Likeness, rows_at_once

CUTOFF = 10
TARGETS, CELLS = 2000, 1 << 26
"""Validation targets looked at, at most, and their rows of the catalogue's width together."""
PATIENCE = 3
"""Looks at validation without a better one until the encoder's training ends."""
SWEEPS = 4
UNCHOSEN_EPOCHS = 30
"""Where no validation target can say it."""


@dataclass(frozen=True)
class Chosen:
    """The choice, the encoder after the chosen epochs on what validation may see, and its NDCG@10 by epoch."""

    mix: Mix
    encoder: SequenceEncoder | None
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Asked:
    """Validation targets: who asks, and int (T,), the items to be found; `repeats`: also among those of the history."""

    queries: Queries
    wanted: np.ndarray
    repeats: bool

    @classmethod
    def of(cls, histories: Histories, targets: Targets, repeats: bool, seed: int) -> "Asked":
        """The targets, or a seeded sample of them where they are many or the catalogue is large."""
        most = max(1, min(TARGETS, CELLS // len(histories.items)))
        if len(targets) > most:
            drawn = np.random.default_rng(seed).permutation(len(targets))[:most]
            targets = targets.take(np.sort(drawn))
        return cls(histories_of(histories, targets), target_items(histories, targets), repeats)

    def ndcg(self, scores: np.ndarray) -> float:
        """Mean NDCG@10 of scores (T, I), to nine digits, so that rounding decides nothing."""
        total = 0.0
        step = rows_at_once(scores.shape[1])
        for start in range(0, len(self.wanted), step):
            rows = slice(start, start + step)
            masked = None if self.repeats else self.queries[rows]
            total += float(metrics.ndcg(*metrics.places(scores[rows], self.wanted[rows], masked), CUTOFF).sum())
        return round(total / len(self.wanted), 9)


def choose(
    histories: Histories,
    seen: np.ndarray,
    targets: Targets,
    likeness: Likeness,
    config: RetrievalConfig,
    seed: int = 0,
) -> Chosen:
    """By NDCG@10 on validation `targets` (at most 2,000), everything fitted on the events of mask `seen` before them.

    The encoder ends after three looks without a better one and is the best it was; then weight after weight is moved to
    its best value until none moves. Without targets there is nothing to choose by: the weights nearest to 1, no trend,
    30 epochs.
    """
    if len(targets) == 0:
        one = _nearest(sorted(config.weights), 1.0)
        epochs = min(config.epochs, UNCHOSEN_EPOCHS)
        if not epochs:
            return Chosen(Mix(one, 0.0, 0.0, 0), None, ())
        return Chosen(Mix(one, one, 0.0, epochs), sequence.fit(histories, seen, likeness.vectors, epochs, seed), ())
    asked = Asked.of(histories, targets, config.repeats, seed)
    encoder, curve = (
        train(histories, seen, likeness.vectors, config.epochs, asked, seed) if config.epochs else (None, ())
    )
    mix = weigh(Retriever.fit(histories, seen, likeness, Mix(0, 0, 0, 0), encoder), asked, config.weights)
    if not mix.sequence or not curve:
        return Chosen(replace(mix, epochs=0), None, curve)
    return Chosen(replace(mix, epochs=best_epoch(curve)), encoder, curve)


def train(
    histories: Histories, seen: np.ndarray, vectors: np.ndarray, epochs: int, asked: Asked, seed: int
) -> tuple[SequenceEncoder, tuple[tuple[int, float], ...]]:
    """The encoder as it was at its best look, and all looks: (epoch, NDCG@10 of the encoder alone)."""
    curve: list[tuple[int, float]] = []
    kept: dict[str, Tensor] = {}

    def check(encoder: SequenceEncoder, epoch: int) -> bool:
        curve.append((epoch, asked.ndcg(encoder.queries(asked.queries) @ encoder.items().T)))
        looks = [number for number, _ in curve]
        best = looks.index(best_epoch(curve))
        if best == len(curve) - 1:
            kept.update(copy.deepcopy(encoder.state_dict()))
        return len(curve) - 1 - best >= PATIENCE

    encoder = sequence.fit(histories, seen, vectors, epochs, seed, "retrieve: choosing", check)
    encoder.load_state_dict(kept)
    return encoder.eval(), tuple(curve)


def best_epoch(curve: Sequence[tuple[int, float]]) -> int:
    """The epoch with the best NDCG; of equals the first."""
    return max(curve, key=lambda look: (look[1], -look[0]))[0]


def weigh(retriever: Retriever, asked: Asked, values: Sequence[float]) -> Mix:
    """Coordinate ascent over `values` from all ones and no trend; a weight moves to its best value, of equals the
    smallest. Without an encoder the sequence has no weight.
    """
    nothing = Mix(0.0, 0.0, 0.0, 0)
    together = retriever.mixed(nothing).scores(asked.queries)
    # A mix is a sum of the signals' rows, each made once.
    rows = {
        signal: retriever.mixed(mix).scores(asked.queries) - together
        for signal, mix in (
            ("content", replace(nothing, content=1.0)),
            ("sequence", replace(nothing, sequence=1.0)),
            ("trend", replace(nothing, trend=1.0)),
        )
        if signal != "sequence" or retriever.encoder is not None
    }
    ascending = sorted(values)
    weights = {signal: _nearest(ascending, 0.0 if signal == "trend" else 1.0) for signal in rows}
    for _ in range(SWEEPS):
        before = dict(weights)
        for signal in rows:
            rest = together.copy()
            for other, weight in weights.items():
                if other != signal and weight:
                    rest += np.float32(weight) * rows[other]
            found = {value: asked.ndcg(rest + np.float32(value) * rows[signal]) for value in ascending}
            weights[signal] = max(ascending, key=lambda value: (found[value], -value))
        if weights == before:
            break
    return Mix(weights["content"], weights.get("sequence", 0.0), weights["trend"], 0)


def _nearest(ascending: Sequence[float], wanted: float) -> float:
    return min(ascending, key=lambda value: (abs(value - wanted), value))

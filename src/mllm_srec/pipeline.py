"""The stages in order: describe, comprehend, retrieve, train, evaluate; each resumable, all of them in `run`."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mllm_srec import __version__, items, ranking, retrieval, tuning, users
from mllm_srec.config import Config
from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.split import Split, Targets, global_time, leave_last_out
from mllm_srec.errors import DataError
from mllm_srec.evaluation import protocol
from mllm_srec.mllm.load import load_mllm
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.text_encoder import TextEncoder
from mllm_srec.recommender import ADAPTER, CHOICES, RUN, Choices
from mllm_srec.records import training_record
from mllm_srec.workspace import Workspace, atomic_write, write_manifest

RERANKED = "MLLM-SRec"
RETRIEVED = "retrieval"


@dataclass(frozen=True)
class Chosen:
    """The targets a run works on: a seeded sample of each part of the split."""

    training: Targets
    choosing: Targets
    test: Targets


class Pipeline:
    """One workspace, its data in memory, and the stages over it. Every stage may be called again at any time."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.config: Config = workspace.config
        self.dataset: Dataset = workspace.dataset()
        self.histories: Histories = self.dataset.histories()
        split = leave_last_out if self.config.data.protocol == "leave_last_out" else global_time
        self.split: Split = split(self.histories, self.config.data.tie_rule, self.config.data.min_history)
        if len(self.split.test) == 0:
            raise DataError(
                f"no user has the {self.config.data.min_history} events that a test target needs: "
                "give a longer log or lower data.min_history (at least 3)"
            )
        self.chosen = self._choose()

    @cached_property
    def mllm(self) -> LocalMllm:
        """The model, loaded at first use."""
        return load_mllm(self.config.model)

    @cached_property
    def catalogue(self) -> items.Catalogue:
        """The described items."""
        return items.Catalogue.load(self.workspace)

    @cached_property
    def embeddings(self) -> np.ndarray:
        """float32 (I, D): the items' text embeddings."""
        return items.embed(self.workspace, TextEncoder(), self.catalogue)

    def describe(self) -> None:
        """Stage 1: one row per item in `item_texts`."""
        items.describe(self.workspace, self.mllm)
        self.__dict__.pop("catalogue", None)

    def comprehend(self) -> None:
        """Stage 2: the states of every target this run trains, chooses and tests on."""
        parts = (self.chosen.training, self.chosen.choosing, self.chosen.test)
        wanted = [(int(u), int(e)) for part in parts for u, e in zip(part.user, part.end, strict=True)]
        users.comprehend(self.workspace, self.mllm, self.catalogue, wanted)

    def retrieve(self) -> float:
        """Embed the catalogue and choose the content weight on validation; it is stored with the run's choices."""
        weight = retrieval.choose_content_weight(
            self.histories, self.split, self.embeddings, self.config.retrieval.content_weights
        )
        folder = self.workspace.run(RUN)
        fusion = Choices.read(folder).fusion if (folder / CHOICES).exists() else ranking.Fusion(0.0, 0.0, False)
        atomic_write(folder / CHOICES, Choices(weight, fusion).dump())
        return weight

    def train(self) -> None:
        """Stage 3: LoRA on packed rows. Negatives come from a retriever that has not seen the training targets."""
        if self.config.training.rows == 0 or len(self.chosen.training) == 0:
            return
        targets, states = self.chosen.training, users.load_states(self.workspace, self.catalogue)
        retriever = self._retriever(self.split.seen_training)
        seen, wanted = protocol.histories_of(self.histories, targets), protocol.target_items(self.histories, targets)
        negatives = retriever.negatives(seen, wanted, self.config.training.negatives, self.config.seed)
        records = [
            training_record(
                users.state_of(states, self.histories.users[user], int(end)),
                self.catalogue,
                int(position),
                int(positive),
                [int(i) for i in row],
                history,
            )
            for user, position, end, positive, row, history in zip(
                targets.user, targets.position, targets.end, wanted, negatives, seen, strict=True
            )
        ]
        tuning.train(self.mllm, records, self.config, self.workspace.run(RUN) / ADAPTER)

    def evaluate(self) -> dict[str, Any]:
        """Choose the fusion on validation, refit, and look at the test once; returns what metrics.json holds."""
        folder = self.workspace.run(RUN)
        if (folder / ADAPTER / "manifest.json").exists() and not self.mllm.has_adapter:
            self.mllm.load_adapter(folder / ADAPTER)
        weight = Choices.read(folder).content_weight
        priors = ranking.item_priors(self.workspace, self.mllm, self.catalogue)
        states = users.load_states(self.workspace, self.catalogue)

        choosing = self._read(
            self.chosen.choosing, self._retriever(self.split.seen_validation, weight), states, "validation"
        )
        fusion = ranking.choose_fusion(choosing, priors, protocol.target_items(self.histories, self.chosen.choosing))
        atomic_write(folder / CHOICES, Choices(weight, fusion).dump())

        test = self.chosen.test
        retriever = self._retriever(self.split.seen_test, weight)
        read = self._read(test, retriever, states, "test")
        places = {
            "popularity": self._place(lambda block: np.repeat(retriever.popularity[None], len(block), 0)),
            "co-occurrence": self._place(retriever.cooccurrence.scores),
            "content": self._place(retriever.content.scores),
            RETRIEVED: self._place(retriever.scores),
        }
        wanted = protocol.target_items(self.histories, test)
        for name, choice in (
            ("MLLM odds alone", ranking.Fusion(1.0, 0.0, fusion.subtract_empty)),
            ("MLLM likelihood alone", ranking.Fusion(0.0, 1.0, fusion.subtract_empty)),
        ):
            alone = ranking.fuse(read, priors, choice) - ranking.standardise(read.retrieval.astype(np.float64))
            places[name] = protocol.place_reranked(places[RETRIEVED], read.items, alone, wanted)
        fused = ranking.fuse(read, priors, fusion)
        places[RERANKED] = protocol.place_reranked(places[RETRIEVED], read.items, fused, wanted)

        held = (read.items == wanted[:, None]).any(1)
        result = {
            "version": __version__,
            "conditions": protocol.conditions(self.dataset, self.split, test, self.config),
            "choices": json.loads(Choices(weight, fusion).dump()),
            "choosing_targets": len(self.chosen.choosing),
            "training_rows": len(self.chosen.training) * self.config.training.epochs if self.mllm.has_adapter else 0,
            "targets_among_candidates": float(held.mean()),
            "reference": RETRIEVED,
            "systems": protocol.compare(places, RETRIEVED, test.user, self.config),
        }
        atomic_write(folder / "metrics.json", json.dumps(result, indent=2))
        write_manifest(folder, {"version": __version__, "model": self.mllm.identity})
        return result

    def run(self) -> dict[str, Any]:
        """All stages; what is done already is reused."""
        self.describe()
        self.comprehend()
        self.retrieve()
        self.train()
        return self.evaluate()

    def _choose(self) -> Chosen:
        generator = np.random.default_rng(self.config.seed)
        evaluation = self.config.evaluation
        validation = self.split.validation
        # One half of the validation users chooses; the other is left for calibration.
        people = generator.permutation(np.unique(validation.user))
        choosers = people[: max(1, len(people) // 2)] if len(people) else people
        half = np.flatnonzero(np.isin(validation.user, choosers))
        return Chosen(
            training=_sample(self.split.training, self.config.training.rows, generator),
            choosing=_sample(validation.take(half), evaluation.choosing_users, generator),
            test=_sample(self.split.test, evaluation.users, generator),
        )

    def _retriever(self, seen: np.ndarray, weight: float | None = None) -> retrieval.Retriever:
        if weight is None:
            weight = Choices.read(self.workspace.run(RUN)).content_weight
        return retrieval.Retriever.fit(self.histories, seen, self.embeddings, weight)

    def _place(self, scorer: protocol.Scorer) -> protocol.Places:
        return protocol.place_targets(self.histories, self.chosen.test, scorer)

    def _read(
        self,
        targets: Targets,
        retriever: retrieval.Retriever,
        states: dict[tuple[str, int], users.UserState],
        label: str,
    ) -> ranking.Candidates:
        of_targets = [
            users.state_of(states, self.histories.users[user], int(end))
            for user, end in zip(targets.user, targets.end, strict=True)
        ]
        listed, scores = retriever.candidates(
            protocol.histories_of(self.histories, targets), self.config.retrieval.candidates
        )
        return ranking.score_lists(self.workspace, self.mllm, self.catalogue, of_targets, listed, scores, label)


def _sample(targets: Targets, limit: int | None, generator: np.random.Generator) -> Targets:
    if limit is None or len(targets) <= limit:
        return targets
    return targets.take(np.sort(generator.permutation(len(targets))[:limit]))

"""The stages in order: describe, retrieve, comprehend, train, evaluate; each resumable, all of them in `run`.

Retrieval comes before comprehension because it says which states are needed: reranking cannot move a target that is not
among its candidates, so neither its user's state nor its list is read by the model.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from mllm_srec import __version__, catalogue, items, ranking, retrieval, tuning, users
from mllm_srec.config import Config
from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.split import Split, Targets, global_time, leave_last_out
from mllm_srec.errors import DataError, StoreError
from mllm_srec.evaluation import protocol, report, slices
from mllm_srec.mllm.load import load_mllm, trainable
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.mllm.text_encoder import TextEncoder
from mllm_srec.progress import say
from mllm_srec.recommender import ADAPTER, CHOICES, RUN, Choices, attach_adapter, encoder_file, index_folder
from mllm_srec.records import TrainingRecord, training_record
from mllm_srec.retrieval import sequence
from mllm_srec.user_states import History, UserState, build_state, disliked_events, low_rating
from mllm_srec.workspace import Workspace, atomic_write, fingerprint, write_manifest

RERANKED = "MLLM-SRec"
RETRIEVED = "retrieval"


@dataclass(frozen=True)
class Chosen:
    """The targets a run works on: a seeded sample of each part of the split."""

    training: Targets
    choosing: Targets
    test: Targets


SLICED_AT = 10
"""Cutoff of the metric that is told by slices."""


@dataclass(frozen=True)
class Lists:
    """Candidate lists of targets: items int32 and scores float32 (T, K); held bool (T,), the target is among them."""

    items: np.ndarray
    scores: np.ndarray
    held: np.ndarray


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
    def mllm(self) -> LocalMllm | RemoteMllm:
        """The model, loaded at first use.

        Raises:
            ModelError: it is behind a server and the configuration wants to train it.
        """
        mllm = load_mllm(self.config.model)
        return trainable(mllm) if self.config.training.rows else mllm

    @cached_property
    def catalogue(self) -> catalogue.Catalogue:
        """The described items."""
        return catalogue.Catalogue.load(self.workspace)

    @cached_property
    def embeddings(self) -> np.ndarray:
        """float32 (I, D): the items' embeddings."""
        if self.config.items.embedding == "model":
            return catalogue.embed_fused(self.workspace, self.mllm, self.catalogue)
        return catalogue.embed(self.workspace, TextEncoder(), self.catalogue)

    @cached_property
    def likeness(self) -> retrieval.Likeness:
        """Which items' embeddings are close to each other."""
        return retrieval.Likeness(self.embeddings)

    def describe(self) -> None:
        """Stage 1: one row per item in `item_texts`."""
        self.mllm.drop_adapter()  # descriptions and states are made, and looked up, by the model as it was loaded
        items.describe(self.workspace, self.mllm)
        for stale in ("catalogue", "embeddings", "likeness"):
            self.__dict__.pop(stale, None)

    def retrieve(self) -> retrieval.Mix:
        """Embed the catalogue and let validation choose the retriever's mix; it is stored with the run's choices."""
        folder, config, targets = self.workspace.run(RUN), self.config.retrieval, self.split.validation
        mark = sequence.made_of(self.histories, self.split.seen_validation, self.embeddings, self.config.seed)
        asked = (of.tobytes() for of in (targets.user, targets.position, targets.end))
        made_of = fingerprint(mark, *asked, config.model_dump_json(exclude={"candidates"}))
        before = self._chosen_before()
        if before and before.made_of == made_of:
            return before.retrieval
        chosen = retrieval.choose(
            self.histories, self.split.seen_validation, targets, self.likeness, config, self.config.seed
        )
        if chosen.encoder is not None:
            sequence.write(chosen.encoder, encoder_file(folder, "validation"), mark, chosen.mix.epochs)
        fusion = before.fusion if before else ranking.Fusion(1.0, 0.0, 0.0, False)
        atomic_write(folder / CHOICES, Choices(chosen.mix, made_of, chosen.curve, fusion).dump())
        return chosen.mix

    def _chosen_before(self) -> Choices | None:
        """The run's choices; None without any, or if they are damaged: they are then made again."""
        folder = self.workspace.run(RUN)
        if not (folder / CHOICES).exists():
            return None
        try:
            return Choices.read(folder)
        except StoreError as error:
            say(f"retrieve: {error}")
            return None

    def comprehend(self) -> None:
        """Stage 2: the states of the training targets, and of the targets whose candidates hold them."""
        wanted = [self.chosen.training]
        for targets, part in ((self.chosen.choosing, "validation"), (self.chosen.test, "test")):
            held = self._lists(targets, self._retriever(part)).held
            wanted.append(targets.take(np.flatnonzero(held)))
        pairs = [(int(u), int(e)) for part in wanted for u, e in zip(part.user, part.end, strict=True)]
        self.mllm.drop_adapter()
        users.comprehend(self.workspace, self.mllm, self.catalogue, pairs)

    def timeline(self, user_id: str) -> tuple[list[users.Step], UserState]:
        """Stage 2 for one user of the log: every window with its text, and the state after all events."""
        self.mllm.drop_adapter()
        steps = users.timeline(self.workspace, self.mllm, self.catalogue, user_id)
        return steps, users.state(self.workspace, user_id, mllm=self.mllm, catalogue=self.catalogue)

    def train(self) -> None:
        """Stage 3: LoRA on packed rows; nothing with training.rows=0 or without training targets."""
        records = self._records()
        if records:
            tuning.train(trainable(self.mllm), records, self.config, self.workspace.run(RUN) / ADAPTER)

    def evaluate(self) -> dict[str, Any]:
        """Choose the fusion on validation, refit, and look at the test once; returns what metrics.json holds.

        Raises:
            StoreError: an earlier stage has not been run, or what it made no longer holds.
        """
        folder = self.workspace.run(RUN)
        self.mllm.drop_adapter()
        records = self._records()
        if records and tuning.made_of(folder / ADAPTER) != tuning.mark(trainable(self.mllm), records, self.config):
            raise StoreError(
                f"{folder / ADAPTER} is missing or was trained on other rows, weights or settings: run "
                "`mllm-srec train WS` first, or rank without fine-tuning by --set training.rows=0"
            )
        attach_adapter(self.mllm, folder, self.config)
        choices = Choices.read(folder)
        choosing, test = self.chosen.choosing, self.chosen.test
        retriever = self._retriever("test")
        lists = {
            "validation": self._lists(choosing, self._retriever("validation")),
            "test": self._lists(test, retriever),
        }
        read = {
            label: self._read(targets, lists[label], label)
            for label, targets in (("validation", choosing), ("test", test))
        }
        shown = np.unique(np.concatenate([of_part.items.ravel() for of_part in read.values()]))
        priors = ranking.item_priors(self.workspace, self.mllm, self.catalogue, shown)
        held = lists["validation"].held
        if not held.any():
            say("evaluate: no validation list holds its target, so the model gets no weight beside retrieval")
        wanted = protocol.target_items(self.histories, choosing)[held]
        fusion = ranking.choose_fusion(read["validation"], priors, wanted)
        choices = replace(choices, fusion=fusion)
        atomic_write(folder / CHOICES, choices.dump())

        places = {
            "popularity": self._place(lambda block: np.repeat(retriever.popularity[None], len(block), 0)),
            "co-occurrence": self._place(retriever.cooccurrence.scores),
            "content": self._place(retriever.likeness.scores),
            "sequence encoder": self._place(retriever.encoder_scores),
            RETRIEVED: self._place(retriever.scores),
        }
        if retriever.encoder is None:
            places.pop("sequence encoder")
        rows = (
            ("MLLM odds alone", ranking.Fusion(0.0, 1.0, 0.0, fusion.subtract_empty)),
            ("MLLM likelihood alone", ranking.Fusion(0.0, 0.0, 1.0, fusion.subtract_empty)),
            (RERANKED, fusion),
        )
        wanted, listed = protocol.target_items(self.histories, test), lists["test"]
        for name, choice in rows:
            fused = np.zeros(listed.items.shape)
            fused[listed.held] = ranking.fuse(read["test"], priors, choice)
            places[name] = protocol.place_reranked(places[RETRIEVED], listed.items, fused, wanted)

        result = {
            "version": __version__,
            "conditions": protocol.conditions(self.dataset, self.split, test, self.config),
            "choices": json.loads(choices.dump()),
            "choosing_targets": len(choosing),
            "choosing_targets_among_candidates": int(held.sum()),
            "training_rows": len(self.chosen.training) * self.config.training.epochs if self.mllm.has_adapter else 0,
            "targets_among_candidates": float(listed.held.mean()),
            "reference": RETRIEVED,
            "systems": protocol.compare(places, RETRIEVED, test.user, self.config),
            "slices": self._slices(places, test),
        }
        atomic_write(folder / "metrics.json", json.dumps(result, indent=2))
        ranked = report.Ranked(test, listed.items, listed.scores, listed.held, fused, read["test"].odds, places)
        report.write_report(
            self.workspace, self.mllm, self.histories, self.split, self.catalogue, result, ranked, retriever
        )
        write_manifest(folder, {"version": __version__, "model": self.mllm.identity})
        return result

    def run(self) -> dict[str, Any]:
        """All stages; what is done already is reused."""
        self.describe()
        self.retrieve()
        self.comprehend()
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

    def _retriever(self, part: str) -> retrieval.Retriever:
        """Fitted on what `part` ("training", "validation", "test") may see; its encoder is kept in the run's folder."""
        seen: np.ndarray = getattr(self.split, f"seen_{part}")
        folder = self.workspace.run(RUN)
        mix, encoder = Choices.read(folder).retrieval, None
        if mix.epochs:
            file = encoder_file(folder, part)
            mark = sequence.made_of(self.histories, seen, self.embeddings, self.config.seed)
            encoder = sequence.load(file, self.embeddings, mark, mix.epochs)
            if encoder is None:
                label = f"retrieve: {part}"
                encoder = sequence.fit(self.histories, seen, self.embeddings, mix.epochs, self.config.seed, label)
                sequence.write(encoder, file, mark, mix.epochs)
        fitted = retrieval.Retriever.fit(
            self.histories, seen, self.likeness, mix, encoder, self.config.retrieval.repeats
        )
        return fitted.indexed(index_folder(self.workspace.root))

    def _slices(self, places: dict[str, protocol.Places], test: Targets) -> dict[str, Any]:
        """For whom the reranked lists are better than retrieval's, and for which items."""
        metric, evaluation = f"NDCG@{SLICED_AT}", self.config.evaluation
        shown = set(self.workspace.pictures().filter(pl.col("sha256").is_not_null())["item_id"])
        missing = np.array([item not in shown for item in self.histories.items])
        changed, pictures = self._tastes(test)
        cuts = (
            slices.cold_items(self.histories, self.split.seen_test, test),
            slices.item_popularity(self.histories, self.split.seen_test, test),
            slices.history_length(test),
            slices.target_picture(self.histories, test, missing),
            slices.changed_taste(changed),
            slices.minded(pictures),
        )
        ours, theirs = (protocol.per_target(places[name], (SLICED_AT,))[metric] for name in (RERANKED, RETRIEVED))
        return {"system": RERANKED, "metric": metric} | {
            labels.cut: slices.by_slice(ours, labels, test.user, evaluation.bootstrap, self.config.seed, theirs)
            for labels in cuts
        }

    def _tastes(self, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
        """bool (T,), whether the preference that a target sees claims a change, and bool (T,), whether more of the
        user's choices meet the profile's tastes by what pictures alone tell than by texts alone: counts, no model."""
        low, changed, pictures = low_rating(self.histories), [], []
        for user, end in zip(targets.user.tolist(), targets.end.tolist(), strict=True):
            history = History.of(self.histories, user, low)
            state = build_state(history, end, "", self.catalogue, self.config.users)
            changed.append(bool(state.movement.rises or state.movement.fades))
            by_picture, by_text, _ = state.by_origin
            pictures.append(by_picture > by_text)
        return np.array(changed, dtype=bool), np.array(pictures, dtype=bool)

    def _place(self, scorer: protocol.Scorer) -> protocol.Places:
        return protocol.place_targets(self.histories, self.chosen.test, scorer, self.config.retrieval.repeats)

    def _records(self) -> list[TrainingRecord]:
        """The training rows. Negatives come from a retriever that has not seen the training targets."""
        targets = self.chosen.training
        if len(targets) == 0:
            return []
        states, low = users.load_states(self.workspace, self.catalogue), low_rating(self.histories)
        retriever = self._retriever("training")
        seen, wanted = protocol.histories_of(self.histories, targets), protocol.target_items(self.histories, targets)
        negatives = retriever.negatives(seen, wanted, self.config.training.negatives, self.config.seed)
        return [
            training_record(
                self._state(states, int(user), int(position), int(end)),
                self.catalogue,
                int(position),
                int(positive),
                [int(i) for i in row],
                history[~disliked_events(self.histories, user, low)[: len(history)]],
            )
            for user, position, end, positive, row, history in zip(
                targets.user, targets.position, targets.end, wanted, negatives, seen, strict=True
            )
        ]

    def _state(self, states: dict[tuple[str, int], UserState], user: int, position: int, end: int) -> UserState:
        """The state that a target sees, asked at the target's time."""
        state = users.state_of(states, self.histories.users[user], end)
        if self.histories.time is None:
            return state
        return state.asked_at(int(self.histories.time[self.histories.offsets[user] + position]))

    def _lists(self, targets: Targets, retriever: retrieval.Retriever) -> Lists:
        seen = protocol.histories_of(self.histories, targets)
        items_of_lists, scores = retriever.candidates(seen, self.config.retrieval.candidates)
        wanted = protocol.target_items(self.histories, targets)
        return Lists(items_of_lists, scores, (items_of_lists == wanted[:, None]).any(1))

    def _read(self, targets: Targets, lists: Lists, label: str) -> ranking.Candidates:
        """What the model says of the lists that hold their target; rows in the order of those."""
        states = users.load_states(self.workspace, self.catalogue)
        part = targets.take(np.flatnonzero(lists.held))
        of_targets = [
            self._state(states, int(user), int(position), int(end))
            for user, position, end in zip(part.user, part.position, part.end, strict=True)
        ]
        return ranking.score_lists(
            self.workspace,
            self.mllm,
            self.catalogue,
            of_targets,
            lists.items[lists.held],
            lists.scores[lists.held],
            label,
        )


def _sample(targets: Targets, limit: int | None, generator: np.random.Generator) -> Targets:
    if limit is None or len(targets) <= limit:
        return targets
    return targets.take(np.sort(generator.permutation(len(targets))[:limit]))

"""The stages in order: describe, retrieve, comprehend, train, evaluate; each resumable, all of them in `run`.

Retrieval comes before comprehension because it says which states are needed: reranking cannot move a target that is not
among its candidates, so neither its user's state nor its list is read by the model.
"""

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import polars as pl

from mllm_srec import (
    __version__,
    calibration,
    catalogue,
    items,
    ranking,
    rationales,
    retrieval,
    training_rows,
    tuning,
    users,
)
from mllm_srec.config import Config
from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.split import Split, Targets, global_time, leave_last_out, liked_only
from mllm_srec.errors import DataError, StoreError
from mllm_srec.evaluation import honesty, protocol, report, robustness, slices
from mllm_srec.mllm.load import load_mllm, trainable
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.mllm.text_encoder import TextEncoder
from mllm_srec.progress import say
from mllm_srec.recommender import ADAPTER, CHOICES, RUN, Choices, attach_adapter, encoder_file, index_folder
from mllm_srec.records import TrainingRecord, ranking_request
from mllm_srec.retrieval import sequence
from mllm_srec.user_states import History, UserState, build_state, low_rating
from mllm_srec.workspace import Workspace, atomic_write, fingerprint, write_manifest

RERANKED = "MLLM-SRec"
RETRIEVED = "retrieval"


ROWS = "training_rows.jsonl"
PLACES = "places.parquet"
LOOKED_AT, LOOKED_AMONG = 60, 12
"""Validation lists at most that say during a training how good the adapter is, and candidates of each."""
SLICED_AT = 10
"""Cutoff of the metric that is told by slices."""


@dataclass(frozen=True)
class Lists:
    """Candidate lists of targets: items int32 and scores float32 (T, K); held bool (T,), the target is among them."""

    items: np.ndarray
    scores: np.ndarray
    held: np.ndarray


class Pipeline:
    """One workspace, its data in memory, and the stages over it. Every stage may be called again at any time.

    Items' texts and users' states are the workspace's; what is chosen, trained and measured is of one run.
    """

    def __init__(self, workspace: Workspace, run: str = RUN) -> None:
        self.workspace = workspace
        self.folder = workspace.run(run)
        self.is_main = run == RUN
        self.scope = "" if self.is_main else run
        """Under which the model's readings are stored: none for the main run's."""
        self.config: Config = workspace.config
        self.dataset: Dataset = workspace.dataset()
        self.histories: Histories = self.dataset.histories()
        split = leave_last_out if self.config.data.protocol == "leave_last_out" else global_time
        self.split: Split = split(self.histories, self.config.data.tie_rule, self.config.data.min_history)
        if self.config.training.task == "liked":
            self.split = liked_only(self.histories, self.split)
        if len(self.split.test) == 0:
            raise DataError(
                f"no user has the {self.config.data.min_history} events that a test target needs: "
                "give a longer log or lower data.min_history (at least 3)"
            )
        self.chosen = protocol.Chosen.of(self.split, self.config)
        self.places: dict[str, protocol.Places] = {}
        """Of the test targets by system, once `evaluate` has run."""

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
        for stale in ("catalogue", "embeddings", "likeness", "training_targets", "_rows"):
            self.__dict__.pop(stale, None)

    def retrieve(self) -> retrieval.Mix:
        """Embed the catalogue and let validation choose the retriever's mix; it is stored with the run's choices."""
        folder, config, targets = self.folder, self.config.retrieval, self.split.validation
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
        fusion = before.fusion if before else ranking.RETRIEVAL_ALONE
        atomic_write(folder / CHOICES, Choices(chosen.mix, made_of, chosen.curve, fusion).dump())
        return chosen.mix

    def _chosen_before(self) -> Choices | None:
        """The run's choices; None without any, or if they are damaged: they are then made again."""
        if not (self.folder / CHOICES).exists():
            return None
        try:
            return Choices.read(self.folder)
        except StoreError as error:
            say(f"retrieve: {error}")
            return None

    def comprehend(self) -> None:
        """Stage 2: the states of the training targets, and of the targets whose candidates hold them."""
        wanted = [self.training_targets]
        retrievers = {part: self._retriever(part) for part in ("validation", "test")}
        for name, targets in self.chosen.parts.items():
            held = self._lists(targets, retrievers["test" if name == "test" else "validation"]).held
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
        """Stage 3: LoRA on packed rows; nothing with training.rows=0 or without training targets.

        Of several objectives the one stays whose adapter is best on validation.
        """
        objectives = self.config.training.objectives
        with tuning.main_process_first():
            records = self._records()
            if not records:
                return
            mllm, look = trainable(self.mllm), self._look()
        if tuning.is_main_process():
            atomic_write(self.folder / ROWS, "\n".join(map(json.dumps, self._rows.told(self.histories))) + "\n")
        folders = {objective: self.folder / f"{ADAPTER}-{objective}" for objective in objectives}
        if len(objectives) == 1:
            tuning.train(mllm, records, self.config, self.folder / ADAPTER, objectives[0], look)
            return
        for objective, folder in folders.items():
            tuning.train(mllm, records, self.config, folder, objective, look)
        best = max(objectives, key=lambda objective: tuning.validated(folders[objective]))
        if not tuning.is_main_process():
            return
        why = "no validation list holds its target: it is the first" if look is None else "the best on validation"
        say(f"train: objective {best} stays, {why}")
        shutil.rmtree(self.folder / ADAPTER, ignore_errors=True)
        shutil.copytree(folders[best], self.folder / ADAPTER)

    def _look(self) -> tuning.Look | None:
        """How likely the targets of some validation lists are, in nats, fused as is best for them; None without any.

        The lists are cut to the target and a few others, drawn once: more lists say more than longer ones.
        """
        lists = self._lists(self.chosen.choosing, self._retriever("validation"))
        rows = np.flatnonzero(lists.held)[:LOOKED_AT]
        if len(rows) == 0:
            return None
        some = Lists(lists.items[rows], lists.scores[rows], lists.held[rows])
        part = self.chosen.choosing.take(rows)
        wanted = protocol.target_items(self.histories, part)
        others = np.random.default_rng(self.config.seed).random(some.items.shape) + (some.items == wanted[:, None])
        kept = np.sort(np.argsort(-others, axis=1)[:, :LOOKED_AMONG], axis=1)
        shown, retrieved = (np.take_along_axis(values, kept, axis=1) for values in (some.items, some.scores))
        states = self._states(part, some)
        requests = [ranking_request(state, self.catalogue, row) for state, row in zip(states, shown, strict=True)]

        def look() -> list[float]:
            scores = np.stack(self.mllm.score(requests))
            read = ranking.Candidates(shown, retrieved, scores[..., 0], scores[..., 1])
            likely: list[float] = ranking.best_fusion(read, None, wanted)[1].tolist()
            return likely

        return look

    def evaluate(self, robustness_too: bool = False) -> dict[str, Any]:
        """Choose the fusion on validation, refit, and look at the test once; returns what metrics.json holds.

        With `robustness_too` test lists are read again with pictures missing, swapped and noised.

        Raises:
            StoreError: an earlier stage has not been run, or what it made no longer holds.
        """
        folder = self.folder
        self.mllm.drop_adapter()
        records = self._records()
        objectives = self.config.training.objectives
        marks = {tuning.mark(trainable(self.mllm), records, self.config, of) for of in objectives} if records else set()
        if records and tuning.made_of(folder / ADAPTER) not in marks:
            raise StoreError(
                f"{folder / ADAPTER} is missing or was trained on other rows, weights or settings: run "
                "`mllm-srec train WS` first, or rank without fine-tuning by --set training.rows=0"
            )
        attach_adapter(self.mllm, folder, self.config)
        choices = Choices.read(folder)
        choosing, calibrating, test = self.chosen.choosing, self.chosen.calibrating, self.chosen.test
        retriever, before = self._retriever("test"), self._retriever("validation")
        lists = {
            "validation": self._lists(choosing, before),
            "calibration": self._lists(calibrating, before),
            "test": self._lists(test, retriever),
        }
        read = {label: self._read(targets, lists[label], label) for label, targets in self.chosen.parts.items()}
        wanted = {
            label: protocol.target_items(self.histories, targets)[lists[label].held]
            for label, targets in self.chosen.parts.items()
        }
        is_target = {label: of_part.items == wanted[label][:, None] for label, of_part in read.items()}
        halves = [label for label in ("validation", "calibration") if len(wanted[label])]
        if not halves:
            say("evaluate: no validation list holds its target, so the model gets no weight beside retrieval")
        priors = self._priors(*(read[label] for label in halves))
        fusion, cross_fitted = ranking.cross_fit(
            [read[label] for label in halves], priors, [wanted[label] for label in halves]
        )
        calibrated = None
        if cross_fitted:
            told = np.concatenate([is_target[label] for label in halves])
            calibrated = calibration.fit(np.concatenate(cross_fitted), told)
        if fusion.subtract_empty:
            priors = self._priors(*read.values())
        choices = replace(choices, fusion=fusion, calibration=calibrated)
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
        aimed_at, listed = protocol.target_items(self.histories, test), lists["test"]
        for name, choice in rows:
            fused = np.zeros(listed.items.shape)
            fused[listed.held] = ranking.fuse(read["test"], priors, choice)
            places[name] = protocol.place_reranked(places[RETRIEVED], listed.items, fused, aimed_at)
        self.places = places
        protocol.write_places(folder / PLACES, places, self.histories, test)

        result = {
            "version": __version__,
            "conditions": protocol.conditions(self.dataset, self.split, test, self.config),
            "choices": json.loads(choices.dump()),
            "choosing_targets": len(choosing) + len(calibrating),
            "choosing_targets_among_candidates": sum(len(wanted[label]) for label in halves),
            "training_rows": len(self.training_targets) * self.config.training.epochs if self.mllm.has_adapter else 0,
            "targets_among_candidates": float(listed.held.mean()),
            "reference": RETRIEVED,
            "calibration": _reliability(calibrated, fused[listed.held], is_target["test"]),
            "systems": protocol.compare(places, RETRIEVED, test.user, self.config),
            "slices": self._slices(places, test),
        }
        checked = honesty.ReadLists(
            test.take(np.flatnonzero(listed.held)), self._states(test, listed), read["test"], priors, fusion
        )
        given = (self.workspace, self.mllm, self.catalogue, self.histories, checked)
        if self.config.evaluation.honesty_lists and self.is_main:
            result["honesty"] = honesty.measure(*given, retriever.popularity, self.scope)
        if robustness_too:
            result["robustness"] = robustness.measure(*given)
        atomic_write(folder / "metrics.json", json.dumps(result, indent=2))
        ranked = report.Ranked(test, listed.items, listed.scores, listed.held, fused, read["test"].odds, places)
        if self.is_main:
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

    def _retriever(self, part: str) -> retrieval.Retriever:
        """Fitted on what `part` ("training", "validation", "test") may see; its encoder is kept in the run's folder."""
        seen: np.ndarray = getattr(self.split, f"seen_{part}")
        folder = self.folder
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

    @cached_property
    def training_targets(self) -> Targets:
        """The events that fine-tuning learns from; none with training.rows=0."""
        if not self.config.training.rows or not len(self.split.training):
            return self.split.training.take(np.zeros(0, dtype=np.int64))
        retriever = self._retriever("training")
        return training_rows.choose_targets(self.split.training, retriever, self.histories, self.config)

    @cached_property
    def _rows(self) -> training_rows.TrainingRows:
        retriever = self._retriever("training")
        return training_rows.draw_rows(self.training_targets, retriever, self.histories, self.split, self.config)

    def _records(self) -> list[TrainingRecord]:
        if not self.config.training.rows:
            return []
        states = users.load_states(self.workspace, self.catalogue)  # says if an earlier stage is missing
        if not len(self.training_targets):
            return []
        teacher = rationales.load_teacher(self.config) if self.config.training.rationales == "model" else None
        return training_rows.make_records(
            self.workspace, self.catalogue, self.histories, self._rows, partial(self._state, states), teacher
        )

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

    def _states(self, targets: Targets, lists: Lists) -> list[UserState]:
        """What is told of the user of each list that holds its target."""
        states, part = users.load_states(self.workspace, self.catalogue), targets.take(np.flatnonzero(lists.held))
        who = zip(part.user.tolist(), part.position.tolist(), part.end.tolist(), strict=True)
        return [self._state(states, user, position, end) for user, position, end in who]

    def _priors(self, *lists: ranking.Candidates) -> np.ndarray:
        """float32 (I, 2): the empty user's readings of the items of these lists; NaN for all others."""
        shown = np.unique(np.concatenate([of_part.items.ravel() for of_part in lists] or [np.zeros(0, np.int32)]))
        return ranking.item_priors(self.workspace, self.mllm, self.catalogue, shown, self.scope)

    def _read(self, targets: Targets, lists: Lists, label: str) -> ranking.Candidates:
        """What the model says of the lists that hold their target; rows in the order of those."""
        return ranking.score_lists(
            self.workspace,
            self.mllm,
            self.catalogue,
            self._states(targets, lists),
            lists.items[lists.held],
            lists.scores[lists.held],
            f"{self.scope}: {label}" if self.scope else label,
        )


def _reliability(
    calibrated: calibration.Calibration | None, scores: np.ndarray, is_target: np.ndarray
) -> dict[str, float] | None:
    """How far the chances stated for the test's candidates are from what happened, in lists that hold their target."""
    if calibrated is None or is_target.size == 0:
        return None
    chances, rate = calibrated.chances(scores), float(is_target.mean())
    return {
        "lists": len(is_target),
        "base_rate": rate,
        "ece": calibration.expected_error(chances, is_target),
        "brier": calibration.brier(chances, is_target),
        "brier_of_base_rate": rate * (1 - rate),
    }

"""Recommender: the stages behind one object, for users of the log and for a history from outside."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from mllm_srec.calibration import Calibration
from mllm_srec.catalogue import Catalogue, load_embeddings
from mllm_srec.config import Config
from mllm_srec.data.dataset import Queries
from mllm_srec.errors import StoreError, UsageError
from mllm_srec.mllm.load import load_mllm, trainable
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.ranking import Candidates, Fusion, check_scores, fuse, stored_priors
from mllm_srec.reasons import Reason, Sentence, explain
from mllm_srec.records import ranking_request, shared_information
from mllm_srec.retrieval import Likeness, Mix, Retriever, SequenceEncoder
from mllm_srec.retrieval import sequence as encoders
from mllm_srec.user_states import History, UserState, low_rating
from mllm_srec.users import comprehend_history
from mllm_srec.workspace import Workspace, read_manifest

RUN = "main"
CHOICES = "choices.json"
ADAPTER = "adapter"
ENCODERS = "encoders"


@dataclass(frozen=True)
class Choices:
    """What validation chose and the test and the service then use."""

    retrieval: Mix
    made_of: str
    """Fingerprint of what the mix was chosen by."""
    retriever_epochs: tuple[tuple[int, float], ...]
    """(epoch, NDCG@10 on validation) of the sequence encoder."""
    fusion: Fusion
    calibration: Calibration | None = None
    """From fused scores to the chance of being the next item, among lists that hold it."""

    @classmethod
    def read(cls, folder: Path) -> "Choices":
        """Read `choices.json` of a run.

        Raises:
            StoreError: nothing has been chosen yet, or the file is damaged.
        """
        try:
            values = json.loads((folder / CHOICES).read_text(encoding="utf-8"))
            curve = tuple((int(epoch), float(ndcg)) for epoch, ndcg in values["retriever_epochs"])
            stated = values["calibration"]
            calibration = None if stated is None else Calibration(**stated)
            return cls(Mix(**values["retrieval"]), values["made_of"], curve, Fusion(**values["fusion"]), calibration)
        except FileNotFoundError:
            raise StoreError(f"{folder / CHOICES} is missing: run `mllm-srec retrieve WS` first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder / CHOICES} is damaged ({error}): run `mllm-srec retrieve WS` again") from error

    def dump(self) -> str:
        """The text that `read` understands."""
        return json.dumps(asdict(self), indent=2)


def encoder_file(folder: Path, part: str) -> Path:
    """Where run `folder` keeps the encoder fitted on what `part` ("training", "validation", "test") may see."""
    return folder / ENCODERS / f"{part}.safetensors"


def index_folder(root: Path) -> Path:
    """Where a workspace keeps the indices of a large catalogue; no part of a run, built again where missing."""
    return root / "index"


def load_encoder(folder: Path, mix: Mix, vectors: np.ndarray) -> SequenceEncoder | None:
    """The encoder that lists are made with: the test's, which has seen all but the newest events; None if the mix has
    none. What a user did after that is read, though it was not learnt from.

    Raises:
        StoreError: it is missing, damaged, or of another catalogue.
    """
    if not mix.epochs:
        return None
    encoder = encoders.load(encoder_file(folder, "test"), vectors)
    if encoder is None:
        raise StoreError(
            f"{encoder_file(folder, 'test')} is missing, damaged or of another catalogue: run `mllm-srec evaluate WS`"
        )
    return encoder


def attach_adapter(mllm: LocalMllm | RemoteMllm, run: Path, config: Config) -> None:
    """Put the adapter trained in folder `run` on the model; none with `training.rows` 0 or where none was trained.

    Raises:
        StoreError: the adapter's files are damaged, or it was trained on another model.
    """
    mllm.drop_adapter()
    adapter = run / ADAPTER
    if config.training.rows and (adapter / "manifest.json").exists():
        made_for = read_manifest(adapter)["model"]
        if made_for != mllm.identity:
            about = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            raise StoreError(
                f"{adapter} was trained on another model, {about['base_model_name_or_path']} ({made_for}), than "
                f"{config.model.name} ({mllm.identity}): run `mllm-srec train WS` again"
            )
        trainable(mllm).load_adapter(adapter)


@dataclass(frozen=True)
class Recommendation:
    """One place of a list."""

    item_id: str
    title: str
    score: float
    """Fused score, for comparing inside this list only: an item that is d above another is e^d times as likely, as far
    as validation could tell."""
    retrieval: float
    odds: float
    """Log-odds of Yes over No."""
    chance: float | None = None
    """The chance of being the next item, if it is among those ranked; None where validation could not calibrate it."""
    reason: str | None = None
    reason_by: str | None = None
    """"model" (its words passed the check) or "evidence" (composed from facts and events)."""
    facts: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    sentences: tuple[Sentence, ...] = ()
    """The reason sentence by sentence, each with the facts and events that it names."""


@dataclass(frozen=True)
class Answer:
    """A list with what the system knows of the user."""

    user: str | None
    profile: str
    preference: str
    recent: tuple[str, ...]
    """Titles of the newest choices, oldest first."""
    items: tuple[Recommendation, ...]


class Recommender:
    """Ranked items with reasons, from a workspace that `run` has finished.

    Example:
        >>> recommender = Recommender(Workspace.open("shop"))        # doctest: +SKIP
        >>> recommender.recommend(user="u17", k=5, explain=True)     # doctest: +SKIP
        >>> recommender.recommend(history=["i3", "i9"], k=5)         # doctest: +SKIP
    """

    def __init__(self, workspace: Workspace, mllm: LocalMllm | RemoteMllm | None = None) -> None:
        """Load data, choices, retriever (fitted on every event) and, unless given, the model with the run's adapter.

        Raises:
            StoreError: the workspace has no finished run.
        """
        folder = workspace.run(RUN)
        if not (folder / "manifest.json").exists():
            raise StoreError(f"{workspace.root} has no finished run: run `mllm-srec run {workspace.root}` first")
        read_manifest(folder)
        self.workspace = workspace
        self.config = workspace.config
        self.choices = Choices.read(folder)
        self.dataset = workspace.dataset()
        self.histories = self.dataset.histories()
        self.catalogue = Catalogue.load(workspace)
        vectors = load_embeddings(workspace, self.catalogue)
        self.retriever = Retriever.fit(
            self.histories,
            np.ones(len(self.histories.item), dtype=bool),
            Likeness(vectors),
            self.choices.retrieval,
            load_encoder(folder, self.choices.retrieval, vectors),
            self.config.retrieval.repeats,
        ).indexed(index_folder(workspace.root))
        self.mllm = mllm or load_mllm(self.config.model)
        if mllm is None:
            attach_adapter(self.mllm, folder, self.config)
        self._place = {item_id: i for i, item_id in enumerate(self.catalogue.ids)}
        self._users = {user_id: i for i, user_id in enumerate(self.histories.users)}
        self._low = low_rating(self.histories)

    def recommend(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int = 10,
        explain: bool = False,
    ) -> Answer:
        """The `k` best items for a user of the log, or for a `history` of item ids (oldest first) from outside.

        At most `retrieval.candidates` items are ranked by the model; a longer list goes on in retrieval order.

        Raises:
            UsageError: not exactly one of `user` and `history`; an unknown user or item; `k` below 1.
        """
        if (user is None) == (history is None):
            raise UsageError("give exactly one of user=... and history=[...]")
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        if user is not None:
            asked, disliked, state = self._known(user)
        else:
            asked, state = self._outside(history or [])
            disliked = np.zeros(len(asked[0]), dtype=bool)
        return self._answer(user, asked, disliked, state, k, explain)

    def _known(self, user: str) -> tuple[Queries, np.ndarray, UserState]:
        if user not in self._users:
            near = get_close_matches(user, self._users, n=3)
            raise UsageError(
                f"unknown user {user!r}"
                + (f": did you mean {', '.join(near)}?" if near else ".")
                + " For somebody new, give a history of item ids (--history)."
            )
        number = self._users[user]
        history = History.of(self.histories, number, self._low)
        with self.mllm.without_adapter():  # as `comprehend` does it: the adapter has learnt to rank, not to summarise
            state = comprehend_history(self.mllm, self.catalogue, history, self.config.users, workspace=self.workspace)
        if self.histories.time is not None:  # asked at the end of the log
            state = state.asked_at(int(self.histories.time.max()))
        times = None if self.histories.time is None else [self.histories.time[self.histories.span(number)]]
        return Queries([history.items], times), history.disliked, state

    def _outside(self, history: Sequence[str]) -> tuple[Queries, UserState]:
        unknown = [item_id for item_id in history if item_id not in self._place]
        if unknown:
            near = get_close_matches(unknown[0], self._place, n=3)
            raise UsageError(
                f"{len(unknown)} of {len(history)} items are not in the catalogue (first: {unknown[0]!r}"
                + (f"; close: {', '.join(near)}" if near else "")
                + "): correct the ids or leave them out"
            )
        items = np.array([self._place[item_id] for item_id in history], dtype=np.int32)
        with self.mllm.without_adapter():
            return Queries([items]), comprehend_history(
                self.mllm, self.catalogue, History.outside(items), self.config.users
            )

    def _answer(
        self, user: str | None, asked: Queries, disliked: np.ndarray, state: UserState, k: int, reasons: bool
    ) -> Answer:
        shown = self._rank(asked, state, k)[:k]
        said: Sequence[Reason | None] = [None] * len(shown)
        if reasons:
            said = self._reasons(state, asked, disliked, [item for item, *_ in shown])
        rows = self.dataset.items
        return Answer(
            user=user,
            profile=state.profile,
            preference=state.preference,
            recent=tuple(self.catalogue.lines[i] for i in state.recent),
            items=tuple(
                Recommendation(
                    item_id=self.catalogue.ids[item],
                    title=str(rows["title"][item]) or self.catalogue.candidates[item],
                    score=score,
                    retrieval=base,
                    odds=odds,
                    chance=self._chance(score),
                    reason=why.text if why else None,
                    reason_by=why.by if why else None,
                    facts=why.facts if why else (),
                    events=why.events if why else (),
                    sentences=why.sentences if why else (),
                )
                for (item, score, base, odds), why in zip(shown, said, strict=True)
            ),
        )

    def _chance(self, score: float) -> float | None:
        stated = self.choices.calibration
        return None if stated is None or np.isnan(score) else float(stated.chances(np.array(score)))

    def _rank(self, asked: Queries, state: UserState, k: int) -> list[tuple[int, float, float, float]]:
        """(catalogue position, fused score, retrieval score, odds) of at least `k` items, if there are as many left."""
        barred = set() if self.retriever.repeats else set(asked[0].tolist())
        depth = min(max(k, self.config.retrieval.candidates), len(self.catalogue.ids) - len(barred))
        if depth == 0:
            return []
        listed, retrieval = self.retriever.candidates(asked, depth)
        ranked = min(self.config.retrieval.candidates, depth)
        head = listed[:, :ranked]
        scores = self.mllm.score([ranking_request(state, self.catalogue, head[0])])[0]
        if len({self.catalogue.candidates[i] for i in head[0]}) > 1:  # else equal scores are what they should be
            check_scores(scores[:, 0], scores[:, 1])
        if self.choices.fusion.subtract_empty and len(asked[0]):
            priors = stored_priors(self.workspace, self.mllm, self.catalogue, head[0])
        else:  # of the empty user itself exactly zero is left, not the rounding error of two readings
            priors = np.zeros((len(self.catalogue.ids), 2), dtype=np.float32)
            priors[head[0]] = scores
        read = Candidates(head, retrieval[:, :ranked], scores[None, :, 0], scores[None, :, 1])
        fused = fuse(read, priors, self.choices.fusion)[0]
        order = np.argsort(-fused, kind="stable")
        best = [(int(head[0, j]), float(fused[j]), float(retrieval[0, j]), float(scores[j, 0])) for j in order]
        best += [
            (int(listed[0, j]), float("nan"), float(retrieval[0, j]), float("nan"))
            for j in range(ranked, listed.shape[1])
        ]
        return best

    def _reasons(self, state: UserState, asked: Queries, disliked: np.ndarray, items: list[int]) -> list[Reason]:
        history = asked[0]
        liked, together, similar = history[~disliked], [], []
        falls = self.retriever.falls(asked, items)[:, ~disliked]
        for item, falling in zip(items, falls, strict=True):
            shared = shared_information(self.catalogue, item, liked)
            company, kin = self.retriever.nearest_events(liked, item, shared, falling)
            together.append(company)
            similar.append(kin)
        return explain(self.mllm, self.catalogue, state, liked, items, together, similar, history[disliked], falls)

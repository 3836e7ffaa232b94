"""Honesty checks: does the list hang on what it is said to hang on, and on nothing else?

Each check reads a sample of the test lists once more with one thing changed: the pictures, the order of the history,
whose preference is told. Candidates and retrieval scores stay, so that only what the model reads differs. What is asked
is how much NDCG@10 the change costs: nothing lost means that the thing was not used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mllm_srec import metrics
from mllm_srec.catalogue import Catalogue
from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.split import Targets, target_items
from mllm_srec.facts import Fact, merge, said_in
from mllm_srec.items import CANDIDATE_WORDS, ITEM_TEXTS, Item, first_words, load_items, visual_summary
from mllm_srec.mllm.base import told
from mllm_srec.mllm.guard import LIMIT
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.progress import Bar, say
from mllm_srec.prompts import items as item_prompts
from mllm_srec.prompts import ranking as prompts
from mllm_srec.ranking import Candidates, Fusion, fuse, item_priors, score_lists
from mllm_srec.records import ranking_request
from mllm_srec.user_states import History, UserState, low_rating
from mllm_srec.users import comprehend_history
from mllm_srec.workspace import Counts, Job, Table, Workspace

CUTOFF = 10
METRIC = f"NDCG@{CUTOFF} of the fused list, inside the sampled lists"
ROUNDING = {"float32": LIMIT, "bfloat16": 0.15}
"""Nats by which the same prompt differs when it is read in other company (mllm.guard, docs/performance.md)."""

DESCRIBED, SUMMARISED = (
    f"{what} are made by rule on both sides: the run's own are written by the model"
    for what in ("the items' descriptions", "the windows' summaries")
)
NO_PICTURES = "fewer than two items have a picture that can be read"


@dataclass(frozen=True)
class ReadLists:
    """The H test lists that hold their target, K candidates each, as the run read and fused them.

    Attributes:
        targets: whose lists they are.
        states: what the model was told of each user.
        read: the candidates and their readings, (H, K).
        priors: float32 (I, 2), the empty user's readings of the items of these lists.
        fusion: what validation chose.
    """

    targets: Targets
    states: Sequence[UserState]
    read: Candidates
    priors: np.ndarray
    fusion: Fusion

    def sample(self, count: int, seed: int) -> "ReadLists":
        """At most `count` lists, drawn by the seed, one per user and moment: targets tied in time share a list."""
        moments = np.unique(np.stack([self.targets.user, self.targets.end]), axis=1, return_index=True)[1]
        rows = np.sort(np.random.default_rng(seed).permutation(moments)[:count])
        of = self.read
        read = Candidates(of.items[rows], of.retrieval[rows], of.odds[rows], of.loglik[rows])
        states = [self.states[row] for row in rows]
        return replace(self, targets=self.targets.take(rows), states=states, read=read)


class Disturbed(Workspace):
    """A workspace with other pictures. What is produced here stays in memory; the folder is only read."""

    def __init__(
        self, workspace: Workspace, pictures: Mapping[str, str | None], data: Mapping[str, bytes] | None = None
    ) -> None:
        """Give the items named in `pictures` the picture of that hash, None: none; `data` holds new pictures' bytes."""
        super().__init__(workspace.root, workspace.config)
        self._base, self._pictures, self._data = workspace, pictures, data or {}
        self._made: dict[str, dict[str, dict[str, Any]]] = {}

    def dataset(self) -> Dataset:
        """The undisturbed data."""
        return self._base.dataset()

    def pictures(self) -> pl.DataFrame:
        """As `Workspace.pictures`, with the disturbed ones in their places."""
        rows = self._base.pictures().to_dicts()
        for row in rows:
            if row["item_id"] in self._pictures:
                row["sha256"] = self._pictures[row["item_id"]]
                row["state"] = "ok" if row["sha256"] else "missing"
        return pl.DataFrame(rows, schema=self._base.pictures().schema)

    def picture(self, sha256: str) -> bytes:
        """A new picture's bytes, or a stored one's."""
        return self._data[sha256] if sha256 in self._data else self._base.picture(sha256)

    def put(self, table: Table, rows: Sequence[dict[str, Any]]) -> None:
        """Let `rows`, by their keys, stand in for stored ones."""
        self._made.setdefault(table.name, {}).update({row["key"]: row for row in rows})

    def rows(self, table: Table) -> pl.DataFrame:
        """As `Workspace.rows`: stored rows, and in their places those made here."""
        stored, made = self._base.rows(table), list(self._made.get(table.name, {}).values())
        new = pl.from_arrow(pa.Table.from_pylist(made, schema=table.schema))
        assert isinstance(new, pl.DataFrame)
        return pl.concat([stored.filter(~pl.col("key").is_in([row["key"] for row in made])), new]).sort("key")

    def produce(self, table: Table, jobs: Sequence[Job], compute: Any, batch: int, label: str) -> Counts:
        """As `Workspace.produce`, into memory."""
        marks = dict(self.rows(table).select("key", "fingerprint").iter_rows())
        due = [job for job in jobs if marks.get(job.key) != job.fingerprint]
        failed = 0
        with Bar(label, len(due)) as bar:
            for start in range(0, len(due), batch):
                part = due[start : start + batch]
                made = compute(part)
                failed += sum(row["status"] == "error" for row in made)
                keys = ({"key": job.key, "fingerprint": job.fingerprint} for job in part)
                self.put(table, [key | row for key, row in zip(keys, made, strict=True)])
                bar.advance(len(part))
        return Counts(len(jobs) - len(due), len(due) - failed, failed)


@dataclass(frozen=True)
class Reading:
    """Lists as they were read once more: what tells their prompts apart, and the metric per list, float64 (L,)."""

    prompts: list[tuple[str, ...]]
    """Per list the prefix, then the candidates, pictures by their hashes."""
    ndcg: np.ndarray


class Study:
    """The sampled lists, and how they are read again."""

    def __init__(
        self,
        workspace: Workspace,
        mllm: LocalMllm | RemoteMllm,
        catalogue: Catalogue,
        histories: Histories,
        lists: ReadLists,
        scope: str,
    ) -> None:
        self.workspace, self.mllm, self.catalogue, self.histories = workspace, mllm, catalogue, histories
        self.config = workspace.config
        self.lists = lists.sample(self.config.evaluation.honesty_lists, self.config.seed)
        self.users = self.lists.targets.user
        self.scope = f"{scope}: honesty" if scope else "honesty"
        wanted = target_items(histories, self.lists.targets)
        self._place = (self.lists.read.items == wanted[:, None]).argmax(1)
        given = self._prompts(catalogue, self.lists.states)
        self.as_read = Reading(given, self.ndcg(self.lists.read, self.lists.priors))

    def generator(self) -> np.random.Generator:
        """A fresh one for each check, so that none hangs on those before it."""
        return np.random.default_rng(self.config.seed)

    def ndcg(self, read: Candidates, priors: np.ndarray) -> np.ndarray:
        """float64 (L,): NDCG of the target's place in its fused list."""
        return metrics.ndcg(*metrics.places(fuse(read, priors, self.lists.fusion), self._place), CUTOFF)

    def reread(
        self,
        label: str,
        catalogue: Catalogue | None = None,
        states: Sequence[UserState] | None = None,
        workspace: Workspace | None = None,
    ) -> Reading:
        """The lists under another catalogue or other states; lists whose prompts stay the same keep their readings.

        Candidates that all read the same are not asked about: they cannot be told apart.
        """
        catalogue, workspace = catalogue or self.catalogue, workspace or self.workspace
        states, of = states or self.lists.states, self.lists.read
        given = self._prompts(catalogue, states)
        changed = np.array([new != old for new, old in zip(given, self.as_read.prompts, strict=True)])
        alike = np.array([len(set(candidates)) == 1 for _, *candidates in given])
        odds, loglik = of.odds.copy(), of.loglik.copy()
        odds[changed & alike] = loglik[changed & alike] = 0.0
        due = np.flatnonzero(changed & ~alike)
        if len(due):
            found = score_lists(
                workspace,
                self.mllm,
                catalogue,
                [states[at] for at in due.tolist()],
                of.items[due],
                of.retrieval[due],
                f"{self.scope}: {label}",
            )
            odds[due], loglik[due] = found.odds, found.loglik
        priors = self._priors(label, workspace, catalogue)
        return Reading(given, self.ndcg(replace(of, odds=odds, loglik=loglik), priors))

    def compare(self, before: Reading, after: Reading) -> dict[str, Any]:
        """What the change from `before` to `after` does: means, paired difference, lists whose prompt changed."""
        changed = sum(new != old for new, old in zip(after.prompts, before.prompts, strict=True))
        return self.difference(before.ndcg, after.ndcg) | {"lists_changed": changed}

    def difference(self, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
        """Means of a metric per list, and their paired difference with its interval."""
        paired = metrics.paired_bootstrap(after, before, self.users, self.config.evaluation.bootstrap, self.config.seed)
        return {
            "before": float(before.mean()),
            "after": float(after.mean()),
            "gain": paired.mean,
            "gain_low": paired.low,
            "gain_high": paired.high,
            "p": paired.p_value,
        }

    def _prompts(self, catalogue: Catalogue, states: Sequence[UserState]) -> list[tuple[str, ...]]:
        made = []
        for state, row in zip(states, self.lists.read.items, strict=True):
            request = ranking_request(state, catalogue, row)
            made.append((told(request.prefix.parts), *map(told, request.candidates)))
        return made

    def _priors(self, label: str, workspace: Workspace, catalogue: Catalogue) -> np.ndarray:
        """The empty user's readings of what `catalogue` tells of the items; items that read the same share one."""
        priors = self.lists.priors.copy()
        if not self.lists.fusion.subtract_empty or catalogue is self.catalogue:
            return priors
        items = np.unique(self.lists.read.items).tolist()
        known = {_shown(self.catalogue, i): priors[i] for i in items}
        new = {_shown(catalogue, i): i for i in items if _shown(catalogue, i) not in known}
        if new:
            chosen = np.array(list(new.values()))
            found = item_priors(workspace, self.mllm, catalogue, chosen, f"{self.scope}: {label}")
            known |= {text: found[i] for text, i in new.items()}
        for i in items:
            priors[i] = known[_shown(catalogue, i)]
        return priors


def measure(
    workspace: Workspace,
    mllm: LocalMllm | RemoteMllm,
    catalogue: Catalogue,
    histories: Histories,
    lists: ReadLists,
    popularity: np.ndarray,
    scope: str = "",
) -> dict[str, Any]:
    """The honesty checks over at most evaluation.honesty_lists of the lists; what was read is stored and reused.

    Args:
        mllm: as it ranked, with its adapter.
        popularity: (I,), events per item that could be seen.
        scope: name of a run beside the main one.

    Returns:
        What metrics.json may hold: `ndcg` of the lists as they are; per check the paired difference that the change
        makes ("gain", below 0 where it costs), or "left_out" with the reason; {} where no list holds its target.
    """
    if len(lists.targets) == 0:
        say("honesty: no test list holds its target, so there is nothing to check")
        return {}
    study = Study(workspace, mllm, catalogue, histories, lists, scope)
    config = workspace.config
    interval = metrics.bootstrap(study.as_read.ndcg, study.users, config.evaluation.bootstrap, config.seed)
    return {
        "metric": METRIC,
        "lists": len(study.lists.targets),
        "lists_held": len(lists.targets),
        "people": len(np.unique(study.users)),
        "ndcg": asdict(interval),
        "label_prior": _label_prior(study),
        "order_shuffled": _order(study),
        **_pictures(study),
        "history_shuffled": _history(study),
        "preference_of_another": _preference(study),
        "popularity": _popularity(study, popularity),
    }


def derangement(count: int, generator: np.random.Generator) -> np.ndarray:
    """int64 (count,): a random circle through all, so that nobody keeps his own.

    Raises:
        ValueError: there are fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} cannot be exchanged: nobody may keep his own, so there must be two")
    order = generator.permutation(count)
    giver = np.empty(count, dtype=np.int64)
    giver[order] = np.roll(order, 1)
    return giver


def spearman(scores: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """float64 (L,): rank correlation within each list of (L, K), ties at their mean rank; NaN where one is constant."""
    one, two = (np.array([_ranks(row) for row in values]) for values in (scores, popularity))
    one, two = one - one.mean(1, keepdims=True), two - two.mean(1, keepdims=True)
    norm = np.sqrt((one**2).sum(1) * (two**2).sum(1))
    found: np.ndarray = np.divide((one * two).sum(1), norm, out=np.full(len(norm), np.nan), where=norm > 0)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(count) - (count - 1) / 2)[which]
    return ranks


def _shown(catalogue: Catalogue, item: int) -> tuple[str, str | None]:
    return catalogue.candidates[item], catalogue.pictures[item] if catalogue.shown.picture else None


def _label_prior(study: Study) -> dict[str, Any]:
    """How far the model says Yes before it reads anything, beside what it says to the lists."""
    nothing = replace(study.catalogue, ids=[""], candidates=[prompts.candidate("", "", "")], pictures=[None])
    empty = item_priors(study.workspace, study.mllm, nothing, np.zeros(1, np.int64), f"{study.scope}: label prior")
    odds = study.lists.read.odds.astype(np.float64)
    return {
        "empty": float(empty[0, 0]),
        "chance": float(1 / (1 + np.exp(-np.float64(empty[0, 0])))),
        "mean": float(odds.mean()),
        "deviation": float(odds.std()),
    }


def _order(study: Study) -> dict[str, Any]:
    """The same lists in another order: no score may move by more than rounding."""
    of, model = study.lists.read, study.config.model
    order = np.argsort(study.generator().random(of.items.shape), axis=1)
    found = score_lists(
        study.workspace,
        study.mllm,
        study.catalogue,
        study.lists.states,
        np.take_along_axis(of.items, order, 1),
        np.take_along_axis(of.retrieval, order, 1),
        f"{study.scope}: order shuffled",
    )
    odds, loglik = of.odds.copy(), of.loglik.copy()
    np.put_along_axis(odds, order, found.odds, 1)
    np.put_along_axis(loglik, order, found.loglik, 1)
    largest = float(max(np.abs(odds - of.odds).max(), np.abs(loglik - of.loglik).max()))
    # What a server computes in is not known.
    rounding = ROUNDING["bfloat16" if model.server else model.dtype]
    after = study.ndcg(replace(of, odds=odds, loglik=loglik), study.lists.priors)
    return study.difference(study.as_read.ndcg, after) | {
        "largest": largest,
        "rounding": rounding,
        "moved": largest > rounding,
    }


def _pictures(study: Study) -> dict[str, Any]:
    """Texts without what the pictures showed, and with what another item's picture showed."""
    catalogue, rule = study.catalogue, study.config.items.fusion == "generate"
    usable = [item for item, sha256 in zip(catalogue.ids, catalogue.pictures, strict=True) if sha256]
    if len(usable) < 2:
        return {name: {"left_out": NO_PICTURES} for name in ("pictures_missing", "pictures_swapped")}
    giver = [usable[at] for at in derangement(len(usable), study.generator())]
    before = study.as_read
    if rule:
        before = study.reread("texts by rule", retold(study.workspace, dict(zip(usable, usable, strict=True))))
    missing = study.reread("pictures missing", retold(study.workspace, dict.fromkeys(usable)))
    swapped = study.reread("pictures swapped", retold(study.workspace, dict(zip(usable, giver, strict=True))))
    note = {"note": DESCRIBED} if rule else {}
    return {
        "pictures_missing": study.compare(before, missing) | note,
        "pictures_swapped": study.compare(before, swapped) | note,
    }


def retold(workspace: Workspace, giver: Mapping[str, str | None]) -> Catalogue:
    """The catalogue with each item of `giver` having the picture of the item named there, or none.

    What a picture showed is taken from the stored rows, not asked again; texts are composed by rule, and what the
    item's own text contradicts is left out as ever.
    """
    stored = {row["key"]: row for row in workspace.rows(ITEM_TEXTS).iter_rows(named=True)}
    hashes = dict(workspace.pictures().select("item_id", "sha256").iter_rows())
    disturbed = Disturbed(workspace, {item: hashes[of] if of else None for item, of in giver.items()})
    rows = []
    for item in load_items(workspace):
        of = giver.get(item.item_id)
        seen = {one["question"]: one["answer"] for one in stored[of]["seen"]} if of else {}
        rows.append(_retell(item, stored[item.item_id], seen))
    disturbed.put(ITEM_TEXTS, rows)
    return Catalogue.load(disturbed)


def _retell(item: Item, row: dict[str, Any], seen: Mapping[str, str]) -> dict[str, Any]:
    """An item's row as stage 1 would compose it had its picture shown `seen`."""
    facts = merge(seen, said_in(item.title, item.category, item.description), tuple(seen))
    facts += [
        Fact(fact["attribute"], fact["value"], "text")
        for fact in row["facts"]
        if fact["origin"] != "picture" and fact["attribute"] not in seen
    ]
    visual = visual_summary(seen, facts)
    description = item_prompts.compose(first_words(item.description, CANDIDATE_WORDS), visual)
    return row | {
        "seen": [{"question": name, "answer": answer} for name, answer in seen.items()],
        "visual": visual,
        "description": description,
        "fused_by": "rule",
        "facts": [asdict(fact) for fact in facts],
    }


def _history(study: Study) -> dict[str, Any]:
    """States of the same events in random order, the rule's summary on both sides."""
    ordered, shuffled = _states(study, None), _states(study, study.generator())
    before = study.reread("history as it is", states=ordered)
    note = {"note": SUMMARISED} if study.config.users.summary == "generate" else {}
    return study.compare(before, study.reread("history shuffled", states=shuffled)) | note


def _states(study: Study, generator: np.random.Generator | None) -> list[UserState]:
    """The states with summaries by rule; with a generator, of the visible events in its order at the same times."""
    config = study.config.users.model_copy(update={"summary": "compose"})
    low, made = low_rating(study.histories), []
    for user, state in zip(study.users.tolist(), study.lists.states, strict=True):
        history, end = History.of(study.histories, user, low), state.end
        if generator is not None:
            order = generator.permutation(end)
            history = replace(history, items=history.items[order], disliked=history.disliked[order])
        made.append(replace(comprehend_history(None, study.catalogue, history, config, end), waited=state.waited))
    return made


def _preference(study: Study) -> dict[str, Any]:
    """Own newest choices under another user's profile, preference and shown choices."""
    people, first, number = np.unique(study.users, return_index=True, return_inverse=True)
    if len(people) < 2:
        return {"left_out": "the lists are of one user"}
    giver = first[derangement(len(people), study.generator())][number]
    states = [
        replace(
            study.lists.states[of],
            user_id=own.user_id,
            end=own.end,
            as_of=own.as_of,
            recent=own.recent,
            window_start=own.window_start,
            waited=own.waited,
        )
        for of, own in zip(giver, study.lists.states, strict=True)
    ]
    return study.compare(study.as_read, study.reread("preference of another", states=states))


def _popularity(study: Study, popularity: np.ndarray) -> dict[str, Any]:
    """Per score its mean rank correlation with popularity inside a list; lists where one is constant have none."""
    read, lists = study.lists.read, study.lists
    scores = {
        "retrieval": read.retrieval,
        "odds": read.odds,
        "likelihood": read.loglik,
        "fused": fuse(read, lists.priors, lists.fusion),
    }
    found: dict[str, Any] = {}
    for name, values in scores.items():
        correlation = spearman(values, popularity[read.items])
        known = ~np.isnan(correlation)
        if not known.any():
            found[name] = {"left_out": "the scores or the popularity are the same for all candidates of every list"}
            continue
        interval = metrics.bootstrap(
            correlation[known], study.users[known], study.config.evaluation.bootstrap, study.config.seed
        )
        found[name] = asdict(interval) | {"lists": int(known.sum())}
    return found

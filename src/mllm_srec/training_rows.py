"""Training rows: which targets are learnt from, their negatives, their rationales, and the packed records of these."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_srec import rationales
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import Config
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Split, Targets, histories_of, rated, target_items
from mllm_srec.mllm.base import Mllm
from mllm_srec.negatives import KINDS, Negatives, draw
from mllm_srec.progress import say
from mllm_srec.rationales import Wanted
from mllm_srec.records import TrainingRecord, training_record
from mllm_srec.retrieval import Retriever
from mllm_srec.user_states import UserState, disliked_events, low_rating
from mllm_srec.workspace import Workspace

DEPTH = 4
"""A target is learnt from if retrieval has it among this many times as many items as are reranked, and hard negatives
are drawn from the same. Were targets taken that no such list holds, whatever is far from the history would be right:
items like that would stand in a row only where they were chosen."""
LOOKED_THROUGH = 20
"""Targets looked through, at most, for each row that is asked for."""
REASONED = 2
"""Candidates of a row, from the first on, that have a rationale."""


@dataclass(frozen=True)
class TrainingRows:
    """targets (T,), their items int (T,), and their negatives."""

    targets: Targets
    wanted: np.ndarray
    negatives: Negatives

    def told(self, histories: Histories) -> Iterator[dict[str, object]]:
        """What each row asks, for whoever wants to know: user, position, target, negatives and their kinds."""
        names, users, targets = histories.items, histories.users, self.targets
        for at, (user, position) in enumerate(zip(targets.user.tolist(), targets.position.tolist(), strict=True)):
            yield {
                "user": users[user],
                "position": position,
                "target": names[int(self.wanted[at])],
                "negatives": [names[int(item)] for item in self.negatives.items[at]],
                "kinds": [KINDS[kind] for kind in self.negatives.kinds[at]],
            }


def depth_of(config: Config, histories: Histories) -> int:
    """Length of the list that a training target must be in: what the longest history leaves at most."""
    left = len(histories.items) - int(np.diff(histories.offsets).max())
    return max(1, min(DEPTH * config.retrieval.candidates, left))


def choose_targets(targets: Targets, retriever: Retriever, histories: Histories, config: Config) -> Targets:
    """At most `training.rows` of the training `targets`, a seeded sample of those that retrieval finds.

    Args:
        retriever: has seen none of them.
    """
    generator, rows = np.random.default_rng(config.seed), config.training.rows
    some = targets.take(generator.permutation(len(targets))[: LOOKED_THROUGH * rows])
    if len(some) == 0:
        return some
    listed, _ = retriever.candidates(histories_of(histories, some), depth_of(config, histories))
    found = np.flatnonzero((listed == target_items(histories, some)[:, None]).any(1))
    if len(found) < rows:
        say(f"train: retrieval finds {len(found):,} of {len(some):,} training targets: these are the rows")
    return some.take(found[:rows])


def draw_rows(
    targets: Targets, retriever: Retriever, histories: Histories, split: Split, config: Config
) -> TrainingRows:
    """The chosen targets with their negatives, from a `retriever` that has seen none of them."""
    queries, wanted = histories_of(histories, targets), target_items(histories, targets)
    low = _rated_low(targets, histories, split) if config.training.task == "liked" else None
    depth = depth_of(config, histories)
    drawn = draw(retriever, queries, wanted, config.training.negatives, depth, config.seed, low)
    return TrainingRows(targets, wanted, drawn)


def _rated_low(targets: Targets, histories: Histories, split: Split) -> list[np.ndarray]:
    """Per target the items that its user rated low at or after it, before validation: none of them is shown."""
    low = rated(histories, high=False) & split.seen_validation
    found = []
    for user, end in zip(targets.user.tolist(), targets.end.tolist(), strict=True):
        span = histories.span(user)
        later = slice(span.start + end, span.stop)
        found.append(histories.item[later][low[later]])
    return found


def make_records(
    workspace: Workspace,
    catalogue: Catalogue,
    histories: Histories,
    rows: TrainingRows,
    state_of: Callable[[int, int, int], UserState],
    teacher: Mllm | None,
) -> list[TrainingRecord]:
    """The packed records of `rows`; rationales as training.rationales says.

    Args:
        state_of: the state that (user, position, end) sees.
        teacher: the larger model that writes rationales; without one they come from the evidence.
    """
    low, targets = low_rating(histories), rows.targets
    states = [
        state_of(user, position, end)
        for user, position, end in zip(
            targets.user.tolist(), targets.position.tolist(), targets.end.tolist(), strict=True
        )
    ]
    items = np.concatenate([rows.wanted[:, None], rows.negatives.items], axis=1)
    seen = list(histories_of(histories, targets))
    disliked = [
        disliked_events(histories, user, low)[: len(history)]
        for user, history in zip(targets.user.tolist(), seen, strict=True)
    ]
    reasoned = REASONED if workspace.config.training.rationales != "none" else 0
    asked = [
        Wanted(state, int(item), history[~bad], at == 0, history[bad])
        for state, of_row, history, bad in zip(states, items, seen, disliked, strict=True)
        for at, item in enumerate(of_row[:reasoned])
    ]
    texts = _by_row(rationales.written(workspace, teacher, catalogue, asked), len(states))
    return [
        training_record(state, catalogue, position, [int(item) for item in of_row], of_texts, tuple(beside))
        for state, position, of_row, of_texts, beside in zip(
            states, targets.position.tolist(), items, texts, rows.negatives.retrieval.round(4).tolist(), strict=True
        )
    ]


def _by_row(texts: Sequence[str], rows: int) -> list[Sequence[str]]:
    each = len(texts) // rows if rows else 0
    return [texts[at * each : (at + 1) * each] for at in range(rows)]

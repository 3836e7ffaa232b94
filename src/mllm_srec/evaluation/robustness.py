"""Robustness: what missing, swapped or noised pictures do to the lists, and whether more is then seen than is there.

The study of hallucination of the method's paper (Sci Rep 2025), over the lists that `honesty` reads. It describes items
again and reads each list up to nine times, so it is run only when it is asked for, and nothing of it is stored.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_srec.catalogue import Catalogue
from mllm_srec.data.dataset import Histories
from mllm_srec.data.images import add_noise
from mllm_srec.evaluation.honesty import METRIC, Disturbed, ReadLists, Study, derangement
from mllm_srec.facts import VOCABULARIES
from mllm_srec.items import ITEM_TEXTS, describe
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.progress import say
from mllm_srec.prompts import items as prompts
from mllm_srec.vocabulary import NEAR_COLOURS
from mllm_srec.workspace import Workspace

SHARES = (0.1, 0.3, 0.5)
DISTURBANCES = ("missing", "swapped", "noised")
NOISE, NOISED_SIDE = 64.0, 256
"""Standard deviation of the noise in levels of 0 to 255; long side in pixels that a picture is reduced to before."""
UNSUPPORTED = (
    "a fact said to be seen in a picture where the undisturbed picture showed another value of the same attribute, or "
    "the item's text names another one; compared are options of a question and names of the vocabulary, near colours "
    "count as equal"
)


def measure(
    workspace: Workspace,
    mllm: LocalMllm | RemoteMllm,
    catalogue: Catalogue,
    histories: Histories,
    lists: ReadLists,
) -> dict[str, Any]:
    """The sampled lists with a share of the pictures of their items missing, swapped among each other, or noised.

    The touched items are described again, in memory; what is known of the users stays. Of one kind, what is touched at
    a smaller share is touched at a larger one too.

    Args:
        mllm: as it ranked, with its adapter; items are described without it.

    Returns:
        What metrics.json may hold: per share and kind the paired difference in NDCG@10 that the disturbance makes, and
        of the touched items how many facts are said to be seen and how many of these are `UNSUPPORTED`, before and
        after; {} where no list holds its target.

    Raises:
        PictureError: a stored picture cannot be opened any more.
    """
    if len(lists.targets) == 0 or not workspace.config.evaluation.honesty_lists:
        say("robustness: no test list holds its target, or evaluation.honesty_lists is 0: there is nothing to disturb")
        return {}
    study = Study(workspace, mllm, catalogue, histories, lists, "")
    shown = {int(i) for i in study.lists.read.items.ravel()}
    shown.update(i for state in study.lists.states for i in (state.typical, state.newest) if i is not None)
    usable = np.array([i for i in sorted(shown) if catalogue.pictures[i]], dtype=np.int64)
    order = study.generator().permutation(usable)
    return {
        "metric": METRIC,
        "lists": len(study.lists.targets),
        "items_with_picture": len(usable),
        "unsupported": UNSUPPORTED,
        "disturbed": [
            {"share": share, "kind": kind} | _disturb(study, order[: round(share * len(order))], kind)
            for share in SHARES
            for kind in DISTURBANCES
        ],
    }


def _disturb(study: Study, touched: np.ndarray, kind: str) -> dict[str, Any]:
    workspace, catalogue = study.workspace, study.catalogue
    if len(touched) < (2 if kind == "swapped" else 1):
        return {"items": 0, "left_out": f"pictures that would be touched: {len(touched)}"}
    ids, hashes = [catalogue.ids[i] for i in touched], [str(catalogue.pictures[i]) for i in touched]
    data: dict[str, bytes] = {}
    given: list[str | None] = [None] * len(touched)
    if kind == "swapped":
        given = [hashes[at] for at in derangement(len(touched), study.generator())]
    elif kind == "noised":
        # The picture's hash is the seed: each has noise of its own, the same at every share.
        made = [add_noise(workspace.picture(sha256), NOISE, NOISED_SIDE, int(sha256, 16)) for sha256 in hashes]
        given = [hashlib.sha256(content).hexdigest() for content in made]
        data = dict(zip(map(str, given), made, strict=True))
    disturbed = Disturbed(workspace, dict(zip(ids, given, strict=True)), data)
    with study.mllm.without_adapter():  # as items were described at first
        counts = describe(disturbed, study.mllm)
    read = study.reread(f"{kind} {len(touched)}", Catalogue.load(disturbed), workspace=disturbed)
    before, after = (
        {row["key"]: row["facts"] for row in of.rows(ITEM_TEXTS).iter_rows(named=True)} for of in (workspace, disturbed)
    )
    return {
        "items": len(touched),
        "failed": counts.failed,
        **study.compare(study.as_read, read),
        "facts_before": _counted([unsupported(before[item], before[item]) for item in ids]),
        "facts_after": _counted([unsupported(before[item], after[item]) for item in ids]),
    }


def _counted(items: Sequence[tuple[int, int]]) -> dict[str, float | None]:
    """Of all items together; the rate is None where nothing was seen."""
    wrong, seen = sum(of[0] for of in items), sum(of[1] for of in items)
    return {"seen": seen, "unsupported": wrong, "rate": wrong / seen if seen else None}


def unsupported(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many of the facts said to be seen in a picture are `UNSUPPORTED`, and how many there are.

    Args:
        before: `facts` of an item's row as its undisturbed picture was read.
        after: the same as the disturbed picture was.
    """
    showed = {fact["attribute"]: fact["value"] for fact in before if fact["origin"] != "text"}
    seen = [fact for fact in after if fact["origin"] != "text"]
    wrong = [
        fact["contradicted"] or contradicts(fact["attribute"], fact["value"], showed.get(fact["attribute"], ""))
        for fact in seen
    ]
    return sum(wrong), len(seen)


def contradicts(attribute: str, one: str, other: str) -> bool:
    """Whether a thing cannot look both ways. Only names that the question or the vocabulary knows are compared: others
    may be two words for the same."""
    known = {*prompts.QUESTIONS[attribute].options, *VOCABULARIES.get(attribute, ())}
    near = attribute == "colour" and frozenset((one, other)) in NEAR_COLOURS
    return one != other and {one, other} <= known and not near

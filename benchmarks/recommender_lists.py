"""What the sections of `recommender.py` share: finished workspaces, and what the model says of candidate lists.

What the model says is kept in the work folder; it is made again when the code of this file changes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from common import Bench, batches
from users_common import Case, Log, states_of

from mllm_srec import ranking
from mllm_srec.config import Config, UsersConfig, load_config
from mllm_srec.data.dataset import Dataset, Queries
from mllm_srec.data.readers import read
from mllm_srec.mllm.base import Picture, Request, told
from mllm_srec.mllm.guard import check_once
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.pipeline import Pipeline
from mllm_srec.progress import Bar, say
from mllm_srec.prompts import ranking as prompts
from mllm_srec.ranking import Candidates, Fusion
from mllm_srec.recommender import RUN, Choices, attach_adapter
from mllm_srec.records import ranking_request
from mllm_srec.user_states import NOBODY, UserState
from mllm_srec.workspace import Workspace

LISTS, ITEMS = 16, 64
"""Lists that are kept together; items of the empty user that are read together."""

Places = Mapping[str, Path]
"""Set -> where `make real` puts its workspace."""


@cache
def opened(bench: Bench, place: Path) -> Log:
    """A real set's workspace with its run finished; one that lies there is used as it is."""
    return finished(place, lambda: read(bench.data / place.name), load_config())


def finished(place: Path, dataset: Callable[[], Dataset], config: Config) -> Log:
    """The workspace at `place`, made and run through all stages where it is not, and the model as the run ranks."""
    if not place.exists():
        say(f"{place.name}: making {place}")
        Workspace.create(place, config, dataset().with_repeats(config.data.repeats))
    workspace = Workspace.open(place)
    pipeline = Pipeline(workspace)
    if not (workspace.run(RUN) / "manifest.json").exists():
        say(f"{place.name}: running all stages in {place}")
        pipeline.run()
    mllm = pipeline.mllm
    assert isinstance(mllm, LocalMllm)
    attach_adapter(mllm, workspace.run(RUN), workspace.config)
    return Log(place.name, pipeline, mllm)


def queries_of(cases: Sequence[Case]) -> Queries:
    """The cases as retrieval is asked; moments are known for all of them or for none."""
    seen = [case.seen for case in cases]
    times = [case.history.time[: case.end] for case in cases if case.history.time is not None]
    moments = [case.moment for case in cases if case.moment is not None]
    if len(times) < len(cases) or len(moments) < len(cases):
        return Queries(seen)
    return Queries(seen, times, np.array(moments, dtype=np.int64))


def states(
    bench: Bench, log: Log, cases: Sequence[Case], label: str, config: UsersConfig | None = None
) -> list[UserState]:
    """The state that every target sees; texts come from the model as it was loaded, which has not learnt to rank."""
    with log.mllm.without_adapter():
        return states_of(bench, log, cases, f"{log.name} {label}", config)


def by_rule(log: Log) -> UsersConfig:
    """States without the model: windows are summarised by rule."""
    return log.config.model_copy(update={"summary": "compose"})


def read_lists(
    bench: Bench, log: Log, of: Sequence[UserState], items: np.ndarray, retrieval: np.ndarray, label: str
) -> Candidates:
    """What the model says of every list.

    Args:
        of: B states.
        items: int (B, K), catalogue positions.
        retrieval: float (B, K), retrieval's scores of them.
    """
    requests = [ranking_request(state, log.catalogue, row) for state, row in zip(of, items, strict=True)]
    found = readings(bench, log, requests, label)
    scores = np.array(found, dtype=np.float32).reshape(*items.shape, 2)
    return Candidates(items, retrieval, scores[..., 0], scores[..., 1])


def readings(bench: Bench, log: Log, requests: Sequence[Request], label: str) -> list[list[list[float]]]:
    """Per request its candidates' (odds, log-likelihood); kept for every `LISTS` requests."""
    found: list[list[list[float]]] = []

    def score(batch: Sequence[Request]) -> list[list[list[float]]]:
        check_once(log.mllm, batch)
        return [scores.tolist() for scores in log.mllm.score(batch)]

    with Bar(f"{log.name} {label}", len(requests)) as bar:
        for batch in batches(requests, LISTS):
            words = [word for request in batch for word in told_of(request)]
            made_of = [log.mllm.identity, prompts.VERSION, *words]
            # By what is asked alone: equal requests of other sections are read once.
            found += bench.kept("recommender-readings", __file__, made_of, lambda batch=batch: score(batch))
            bar.advance(len(batch))
    return found


def told_of(request: Request) -> list[str]:
    """All that a request tells the model, pictures by their hash."""
    parts = [told((part,)) if isinstance(part, Picture) else part for part in request.prefix.parts]
    return [request.prefix.system, *parts, *map(told, request.candidates), request.question]


def systems(bench: Bench, log: Log, candidates: Candidates) -> dict[str, np.ndarray]:
    """float64 (B, K) per system: retrieval, the readings alone, and their fusion as validation chose it."""
    chosen = Choices.read(log.pipeline.folder).fusion
    nobodys = np.zeros((len(log.catalogue.ids), 2), dtype=np.float32)
    if chosen.subtract_empty:
        items = np.unique(candidates.items)
        requests = [ranking_request(NOBODY, log.catalogue, batch) for batch in batches(items, ITEMS)]
        found = readings(bench, log, requests, "items, nobody")
        nobodys[items] = np.concatenate([np.array(of_request, dtype=np.float32) for of_request in found])
    fusions = {
        "odds": Fusion(0.0, 1.0, 0.0, chosen.subtract_empty),
        "likelihood": Fusion(0.0, 0.0, 1.0, chosen.subtract_empty),
        "fused": chosen,
    }
    alone = {"retrieval": candidates.retrieval.astype(np.float64)}
    return alone | {name: ranking.fuse(candidates, nobodys, fusion) for name, fusion in fusions.items()}

"""The ladder of ablations: from titles to the full system, one part more on each rung, and two predecessors beside it.

Every rung is fine-tuned on the same training targets with the same seed and measured on the same targets and
candidates: the retriever is main's, the users' states are the workspace's. So neighbours differ by one part alone.

    runs/ladder/NAME/        a rung's run: adapter, choices, metrics, and the place of every target
    runs/ladder/mllm-msr/    a copy of the workspace: this one's states are of other windows; its run is inside
    runs/ladder/ladder.json  what `run` returns
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_srec import __version__, metrics, tuning
from mllm_srec.catalogue import EMBEDDINGS
from mllm_srec.config import PRESETS, Config, build_config
from mllm_srec.errors import StoreError, UsageError
from mllm_srec.evaluation.protocol import Places, per_target
from mllm_srec.ingest import CONFIG, FACTS, STORE
from mllm_srec.items import ITEM_TEXTS
from mllm_srec.pipeline import RERANKED, RETRIEVED, Pipeline
from mllm_srec.progress import say
from mllm_srec.ranking import PRIORS, SCORES
from mllm_srec.recommender import ADAPTER, CHOICES, ENCODERS, Choices
from mllm_srec.store_files import storing
from mllm_srec.users import STATES
from mllm_srec.workspace import Workspace, atomic_write, fingerprint

BASE, FULL = "titles", "+CoT"
RUNGS: dict[str, dict[str, dict[str, Any]]] = {
    BASE: {
        "ranking": {"item": "title", "preference": False, "profile": False, "facts": False, "picture": False},
        "training": {"rationales": "none"},
    },
    "+SV": {"ranking": {"item": "visual"}},
    "+SVI": {"ranking": {"item": "description"}},
    "+dynamic preference": {"ranking": {"preference": True}},
    "+profile": {"ranking": {"profile": True}},
    FULL: {"ranking": {"facts": True}, "training": {"rationales": "evidence"}},
}
"""What each rung changes of the one before; the first one of the workspace's configuration. The last one adds both
forms of step 3: counted before the answer, and written."""
PREDECESSORS = {"TALLRec": "tallrec", "MLLM-MSR": "mllm-msr"}
"""Presets laid over the workspace's configuration."""

READINGS = {"fused": RERANKED, "odds alone": "MLLM odds alone"}
"""Of which lists figures are told, by the name of the system in metrics.json."""
CUTOFF = 10

FOLDER = "ladder"
MEASURED = "measured.json"
COPIED = "copied.txt"


@dataclass(frozen=True)
class Measured:
    """Of one rung: conditions and choices of its evaluation, and the place of every target by system."""

    told: dict[str, Any]
    places: dict[str, Places]


def configurations(config: Config) -> dict[str, Config]:
    """The configuration of every rung, in order, and of the predecessors, by name.

    Example:
        >>> list(configurations(Config()))
        ['titles', '+SV', '+SVI', '+dynamic preference', '+profile', '+CoT', 'TALLRec', 'MLLM-MSR']
    """
    rungs: dict[str, Config] = {}
    below = config
    for name, change in RUNGS.items():
        below = rungs[name] = _changed(below, change)
    return rungs | {name: _changed(config, PRESETS[preset]) for name, preset in PREDECESSORS.items()}


def _changed(config: Config, change: dict[str, dict[str, Any]]) -> Config:
    values = config.model_dump()
    for section, keys in change.items():
        values[section] |= keys
    return build_config(values)


def run(workspace: Workspace) -> dict[str, Any]:
    """Fine-tune and measure every rung and write ladder.json; a rung that was made of the same things is reused.

    Returns:
        "conditions" and "targets_among_candidates" as in metrics.json; "fusion": by rung, what validation chose;
        "systems": for each of `READINGS` what `compare` gives.

    Raises:
        StoreError: describe, retrieve or comprehend have not been run, or another process is writing.
        UsageError: the configuration trains nothing.
        ModelError: the model is behind a server, so it cannot be trained.
    """
    if not workspace.config.training.rows:
        raise UsageError(
            "every rung of the ladder is fine-tuned: set training.rows above 0, e.g. --set training.rows=300"
        )
    with workspace.writing():
        main = Pipeline(workspace)
        lender = main.folder
        measured: dict[str, Measured] = {}
        for name, config in configurations(workspace.config).items():
            say(f"ladder: {name}")
            rung = _pipeline(main, config, name)
            _lend(lender, rung.folder)
            if config == workspace.config:  # so it reads the same lists with the same model
                _lend_adapter(main.folder, rung.folder)
                rung.scope = main.scope
            if rung.workspace.root != workspace.root:
                rung.comprehend()
            measured[name] = _measure(rung)
            lender = rung.folder  # it has the encoder of the training part, which main may not have fitted
        result = {
            "version": __version__,
            "conditions": measured[FULL].told["conditions"],
            "targets_among_candidates": measured[FULL].told["targets_among_candidates"],
            "fusion": {name: of_rung.told["fusion"] for name, of_rung in measured.items()},
            "systems": {
                reading: compare(
                    {RETRIEVED: measured[BASE].places[RETRIEVED]}
                    | {name: of_rung.places[system] for name, of_rung in measured.items()},
                    main.chosen.test.user,
                    workspace.config.evaluation.bootstrap,
                    workspace.config.seed,
                )
                for reading, system in READINGS.items()
            },
        }
        atomic_write(workspace.run(FOLDER) / "ladder.json", json.dumps(result, indent=2, allow_nan=False))
        return result


def compare(places: dict[str, Places], users: np.ndarray, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Figures of every row and its gains in NDCG@10, from places of the same targets.

    Args:
        places: by row, from the first to the last: retrieval, the rungs, the predecessors.
        users: int (T,), whose target it is.
        samples: of the bootstrap over users.

    Returns:
        Per row "Recall@10" and "NDCG@10" with mean, low and high (95 %), and of NDCG@10 the paired gains "over_before"
        (a rung over the row before it), "over_base" and "full_over" (the full system over a predecessor): gain, low,
        high, p, and "relative", the gain as a share of the other's mean (None where that is 0).
    """
    values = {name: per_target(of_row, (CUTOFF,)) for name, of_row in places.items()}
    ndcg = {name: of_row[f"NDCG@{CUTOFF}"] for name, of_row in values.items()}

    def gain(name: str, other: str) -> dict[str, Any]:
        paired = metrics.paired_bootstrap(ndcg[name], ndcg[other], users, samples, seed)
        below = float(ndcg[other].mean())
        return {
            "gain": paired.mean,
            "low": paired.low,
            "high": paired.high,
            "p": paired.p_value,
            "relative": paired.mean / below if below else None,
        }

    table: dict[str, dict[str, Any]] = {}
    before = ""
    for name, of_row in values.items():
        row: dict[str, Any] = {
            metric: asdict(metrics.bootstrap(of_row[metric], users, samples, seed))
            for metric in (f"Recall@{CUTOFF}", f"NDCG@{CUTOFF}")
        }
        if before and name in RUNGS:
            row["over_before"] = gain(name, before)
        if name != BASE:
            row["over_base"] = gain(name, BASE)
        if name in PREDECESSORS:
            row["full_over"] = gain(FULL, name)
        table[name], before = row, name
    return table


def _pipeline(main: Pipeline, config: Config, name: str) -> Pipeline:
    """The rung's run; model and embeddings are those of `main`, which no rung changes."""
    slug = re.sub(r"[^a-z]+", "-", name.lower()).strip("-")
    if config.users == main.config.users:
        rung = Pipeline(main.workspace.configured(config), f"{FOLDER}/{slug}")
    else:
        rung = Pipeline(_copied(main.workspace, main.workspace.run(FOLDER) / slug).configured(config), slug)
    rung.mllm, rung.embeddings, rung.likeness = main.mllm, main.embeddings, main.likeness
    return rung


def _copied(workspace: Workspace, root: Path) -> Workspace:
    """A copy of the workspace for states of other windows: a state's row is found by user and end alone.

    It is filled beside its place and renamed at the end, and made again when the items' texts have changed.
    """
    made_of = fingerprint(
        *(mark for table in (ITEM_TEXTS, EMBEDDINGS) for mark in workspace.rows(table)["fingerprint"])
    )
    if not (root / COPIED).exists() or (root / COPIED).read_text(encoding="utf-8") != made_of:
        partial = root.with_name(f".{root.name}.partial")
        left_out = shutil.ignore_patterns(*(f"{table.name}.lance" for table in (STATES, SCORES, PRIORS)))
        with storing(str(root)):
            for folder in (root, partial):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(workspace.root / STORE, partial / STORE, ignore=left_out)
            for file in (CONFIG, FACTS):
                shutil.copy(workspace.root / file, partial / file)
            atomic_write(partial / COPIED, made_of)
            partial.rename(root)
    return Workspace.open(root)


def _lend(lender: Path, folder: Path) -> None:
    """Give the run in `folder` the retriever of the run in `lender`: what validation chose, and the fitted encoders.

    Raises:
        StoreError: the lender has chosen nothing, or a file cannot be written.
    """
    choices = Choices.read(lender)
    try:
        same = Choices.read(folder).retrieval == choices.retrieval
    except StoreError:  # none yet, or damaged
        same = False
    if not same:
        (folder / MEASURED).unlink(missing_ok=True)  # it holds a fusion that is no longer in the choices
        atomic_write(folder / CHOICES, choices.dump())
    if (lender / ENCODERS).exists():
        with storing(str(folder / ENCODERS)):
            shutil.copytree(lender / ENCODERS, folder / ENCODERS, dirs_exist_ok=True)


def _lend_adapter(lender: Path, folder: Path) -> None:
    """Give a rung that is configured as the workspace is what the run in `lender` has learnt, if it has learnt nothing
    itself; whether that is of the same rows training finds out."""
    if tuning.made_of(folder / ADAPTER) is None and tuning.made_of(lender / ADAPTER) is not None:
        with storing(str(folder / ADAPTER)):
            for of_objective in lender.glob(f"{ADAPTER}*"):
                shutil.copytree(of_objective, folder / of_objective.name, dirs_exist_ok=True)


def _measure(rung: Pipeline) -> Measured:
    """Fine-tune and evaluate.

    Training comes first although an evaluation may be there: it finds out whether the adapter is of these rows.
    """
    rung.train()
    mix = json.dumps(asdict(Choices.read(rung.folder).retrieval))
    made_of = fingerprint(__version__, rung.config.model_dump_json(), mix, tuning.made_of(rung.folder / ADAPTER))
    file = rung.folder / MEASURED
    kept = _kept(file, made_of)
    if kept is not None:
        say("ladder: what was measured is reused")
        return kept
    file.unlink(missing_ok=True)  # the run's manifest would list what is replaced below
    result = rung.evaluate()
    told = {key: result[key] for key in ("conditions", "targets_among_candidates")}
    measured = Measured(
        told | {"fusion": result["choices"]["fusion"]},
        {name: rung.places[name] for name in (RETRIEVED, *READINGS.values())},
    )
    places = {name: {"greater": of.greater.tolist(), "ties": of.ties.tolist()} for name, of in measured.places.items()}
    atomic_write(file, json.dumps({"made_of": made_of, "told": measured.told, "places": places}))
    return measured


def _kept(file: Path, made_of: str) -> Measured | None:
    """What was measured of the same things; None if nothing was, or if the file is damaged."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["made_of"] != made_of:
            return None
        return Measured(
            stored["told"],
            {
                name: Places(np.array(of["greater"], dtype=np.int64), np.array(of["ties"], dtype=np.int64))
                for name, of in stored["places"].items()
            },
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        say(f"ladder: {file} is damaged ({type(error).__name__}: {error}): the rung is evaluated again")
        return None

"""Our cheap rows and the peers' models on the same splits, by our metrics, in one table.

    python benchmarks/peers/run.py --data ../shared/data [--sets hm_sample] [--protocols global_time]
                                   [--models EASE,SASRec] [--work build/peers]

`make peers DATA=FOLDER` also makes the peers' environment. Every system is fitted on the same seen events, chosen on
validation by NDCG@10, refitted, and asked once for the test (`choosing.py`); RecTools' own metrics of the same scores
must agree with ours. What is finished is kept, so a killed run goes on where it was. `--limit N` takes the first N
users: a quick look, no result.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

sys.path.append(str(Path(__file__).resolve().parents[1]))

import ours
from choosing import CUTOFF, choose_and_refit, places, words
from common import Figure, difference, figure, machine
from exchange import (
    PARTS,
    PEERS,
    RESULTS,
    SCORES,
    TIE_RULES,
    Asked,
    Part,
    metrics_file,
    named,
    read_json,
    write_array,
    write_json,
)

from mllm_srec import metrics
from mllm_srec.config import load_config
from mllm_srec.data.dataset import Dataset, Histories
from mllm_srec.data.readers import read
from mllm_srec.data.split import Split, Targets, global_time, leave_last_out
from mllm_srec.evaluation import protocol
from mllm_srec.mllm.text_encoder import TextEncoder
from mllm_srec.progress import say

HERE = Path(__file__).resolve().parent
PYTHON = HERE / ".venv" / "bin" / "python"
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Else glibc gives the logits' memory back after every batch, and fetching it anew takes a quarter of the time."""
SETS = ("ml100k_posters", "hm_sample")
PROTOCOLS = {"leave_last_out": leave_last_out, "global_time": global_time}
CUTOFFS = (10, 20, 50, 100)
"""Of Recall."""
AGREE = 1e-9
"""How far RecTools' metrics may be from ours where the target is tied with nothing."""
COLUMNS = (
    "data, protocol, ties", "system", "NDCG@10", "p", "Recall@10", "p", "@20", "@50", "@100",
    "chosen on validation", "fit, s", "choosing, s",
)  # fmt: skip

Systems = Mapping[str, Mapping[str, Any]]
"""System -> what `choosing.choose_and_refit` says of it for one tie rule."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with ml100k_posters/ and hm_sample/")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated, default: all")
    parser.add_argument("--protocols", default=",".join(PROTOCOLS), help="comma-separated, default: all")
    parser.add_argument("--models", default=",".join(PEERS), help="the peers, comma-separated, default: all")
    parser.add_argument("--work", type=Path, default=Path("build/peers"))
    parser.add_argument("--limit", type=int, default=0, help="first users that are looked at; 0: all")
    options = parser.parse_args()
    sets, protocols, models = (text.split(",") for text in (options.sets, options.protocols, options.models))
    for what, given, known in (("set", sets, SETS), ("protocol", protocols, PROTOCOLS), ("model", models, PEERS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {what} {unknown[0]!r}: choose from {', '.join(known)}")
    rows = []
    for name in sets:
        place = options.work / f"{name}-{options.limit or 'all'}"
        dataset = first_users(read(options.data / name).with_repeats("first"), options.limit)
        vectors = embedded(dataset, place)
        for of in protocols:
            say(f"{name}, {of}")
            rows += measured(dataset, vectors, of, models, place / of)
            write_json(options.work / "table.json", {"machine": machine(), "limit": options.limit, "rows": rows})
    print(markdown(rows))


def measured(
    dataset: Dataset, vectors: np.ndarray, of: str, models: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """All rows of one data set under one protocol; its files go to `folder`."""
    histories, least = dataset.histories(), load_config().data.min_history
    parts = exported(histories, {rule: PROTOCOLS[of](histories, rule, least) for rule in TIE_RULES})
    for name, part in parts.items():
        part.write(folder / f"{name}.npz")
    cheap = {name: choose_and_refit(name, system, parts, folder) for name, system in ours.systems(vectors).items()}
    call("rectools_models.py", str(folder), "--models", ",".join(models))
    results = read_json(folder / RESULTS) | cheap
    of_rules = {
        rule: {name: of_system[rule] for name, of_system in results.items()}
        for rule, asked in parts["test"].asked.items()
        if len(asked)
    }
    files = {rule: {name: found["file"] for name, found in systems.items()} for rule, systems in of_rules.items()}
    write_json(folder / SCORES, files)
    call("rectools_metrics.py", str(folder))
    rows = []
    for rule, systems in of_rules.items():
        conditions = {"data": dataset.name, "protocol": of, "tie_rule": rule}
        rows += compared(conditions, systems, parts["test"].asked[rule], folder)
    return rows


def call(program: str, *arguments: str) -> None:
    """Run one of the programs beside this one in the peers' environment.

    Raises:
        SystemExit: the environment has not been made.
    """
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is missing: make the peers' environment by `make peers DATA=FOLDER`")
    subprocess.run([str(PYTHON), str(HERE / program), *arguments], check=True, env=os.environ | KEEP_MEMORY)


# What goes out


def first_users(dataset: Dataset, limit: int) -> Dataset:
    """The data of the first `limit` users (0: all) over the whole catalogue."""
    if not limit:
        return dataset
    users = dataset.interactions["user_id"].unique(maintain_order=True).head(limit)
    return replace(dataset, interactions=dataset.interactions.filter(pl.col("user_id").is_in(users.implode())))


def embedded(dataset: Dataset, folder: Path) -> np.ndarray:
    """float32 (I, D), L2-normalised: sentence vectors of "title. category. description", kept in `folder`."""
    encoder = TextEncoder()
    columns = dataset.items.select("title", "category", "description")
    texts = [". ".join(text for text in row if text) for row in columns.iter_rows()]
    file = folder / f"{named('vectors', encoder.identity, texts)}.npy"
    if not file.exists():
        say(f"{dataset.name}: {len(texts)} texts are embedded")
        write_array(file, encoder.encode(texts))
    vectors: np.ndarray = np.load(file)
    return vectors


def exported(histories: Histories, splits: Mapping[str, Split]) -> dict[str, Part]:
    """Validation and test of the splits that tie rules make of one log.

    Raises:
        ValueError: the log has no times, or the splits let different events be seen, so that one fit cannot serve all.
    """
    if histories.time is None:
        raise ValueError("the log has no times: systems that look at them could not be compared")
    owner = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))
    parts = {}
    for name in PARTS:
        masks = [getattr(split, f"seen_{name}") for split in splits.values()]
        if any((mask != masks[0]).any() for mask in masks):
            raise ValueError(f"{', '.join(splits)} see different events before the {name}")
        asked = {rule: asked_of(histories, getattr(split, name)) for rule, split in splits.items()}
        seen = (of_event[masks[0]] for of_event in (owner, histories.item, histories.time))
        parts[name] = Part(len(histories.items), *seen, asked)
    return parts


def asked_of(histories: Histories, targets: Targets) -> Asked:
    """The targets with what is visible to them; the log has times."""
    assert histories.time is not None
    first = histories.offsets[targets.user]
    spans = [slice(start, start + end) for start, end in zip(first, targets.end, strict=True)]
    return Asked(
        user=targets.user,
        target=protocol.target_items(histories, targets).astype(np.int32),
        now=histories.time[first + targets.position],
        offsets=np.concatenate([[0], np.cumsum(targets.end)]).astype(np.int64),
        history=np.concatenate([np.zeros(0, dtype=np.int32), *(histories.item[span] for span in spans)]),
        time=np.concatenate([np.zeros(0, dtype=np.int64), *(histories.time[span] for span in spans)]),
    )


# What comes back


def compared(conditions: dict[str, Any], systems: Systems, asked: Asked, folder: Path) -> list[dict[str, Any]]:
    """A row per system: conditions, choices and, per metric, the mean with its interval over users and the two-sided p
    of the paired difference to the row with the best NDCG@10 (None for that row itself).

    Raises:
        ValueError: RecTools' metrics differ from ours.
    """
    values, untied = {}, {}
    for name, of in systems.items():
        file = folder / of["file"]
        greater, ties = places(np.load(file, mmap_mode="r"), asked)
        untied[name] = agreement(name, np.load(metrics_file(file)), greater, ties)
        values[name] = {f"NDCG@{CUTOFF}": metrics.ndcg(greater, ties, CUTOFF)}
        values[name] |= {f"Recall@{k}": metrics.recall(greater, ties, k) for k in CUTOFFS}
    best = max(values, key=lambda name: float(values[name][f"NDCG@{CUTOFF}"].mean()))
    return [
        {
            **conditions,
            "targets": len(asked),
            "users": len(np.unique(asked.user)),
            "system": name,
            "chosen": words(systems[name]["settings"]),
            "fit_seconds": systems[name]["seconds"],
            "choosing_seconds": systems[name]["choosing_seconds"],
            "untied": untied[name],
            "metrics": {metric: figure(per, asked.user.tolist()) for metric, per in of_system.items()},
            "p": {
                metric: None if name == best else difference(per, values[best][metric], asked.user)["p"]
                for metric, per in of_system.items()
            },
        }
        for name, of_system in values.items()
    ]


def agreement(name: str, theirs: np.ndarray, greater: np.ndarray, ties: np.ndarray) -> int:
    """How many targets are tied with nothing; there RecTools' NDCG@10 and Recall@10, float64 (2, T), must be ours.

    Raises:
        ValueError: they are not.
    """
    mine = np.stack([metrics.ndcg(greater, ties, CUTOFF), metrics.recall(greater, ties, CUTOFF)])
    alone = ties == 0
    far = np.flatnonzero(alone & ~(np.abs(mine - theirs) <= AGREE).all(0))
    if len(far):
        raise ValueError(
            f"{name}: RecTools' NDCG@{CUTOFF} and Recall@{CUTOFF} of target {far[0]} are {theirs[:, far[0]].tolist()}, "
            f"ours {mine[:, far[0]].tolist()}; so of {len(far)} targets"
        )
    return int(alone.sum())


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table of all rows, and what it says of ties."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    before = ""
    for row in rows:
        block = f"{row['data']}, {row['protocol']}, {row['tie_rule']}: {row['targets']} targets"
        of, p = row["metrics"], row["p"]
        cells = [
            "" if block == before else block,
            row["system"],
            interval(of["NDCG@10"]),
            in_words(p["NDCG@10"]),
            interval(of["Recall@10"]),
            in_words(p["Recall@10"]),
            *(short(of[f"Recall@{k}"]["value"]) for k in CUTOFFS[1:]),
            row["chosen"],
            f"{row['fit_seconds']:.1f}",
            f"{row['choosing_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        before = block
    untied, asked = (sum(row[name] for row in rows) for name in ("untied", "targets"))
    lines += [
        "",
        "p: two-sided, paired bootstrap over users, against the block's row with the best NDCG@10; intervals 95 %.",
        f"RecTools' NDCG@10 and Recall@10 of the same scores are ours to {AGREE:g} where a target is untied, "
        f"{untied} of {asked} times; elsewhere ours are the expectation over random orders.",
    ]
    return "\n".join(lines)


def short(value: float) -> str:
    """.1042"""
    return f"{value:.4f}".removeprefix("0")


def interval(of: Figure) -> str:
    """.1042 [.0938, .1151]"""
    return f"{short(of['value'])} [{short(of['low'])}, {short(of['high'])}]"


def in_words(p: float | None) -> str:
    """A p-value, or that this is the best row."""
    return "best" if p is None else f"{p:.3f}"


if __name__ == "__main__":
    main()

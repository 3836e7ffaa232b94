"""`mllm-srec evaluate --ladder`: what is printed, as a table and for programs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Command
from mllm_srec import Workspace, ladder
from mllm_srec.evaluation.protocol import Places

PLACES = {
    "retrieval": (2, 2, 10, 10),
    "titles": (10, 10, 10, 10),
    "+SV": (2, 2, 10, 10),
    "+SVI": (2, 2, 10, 10),
    "+dynamic preference": (2, 2, 2, 2),
    "+profile": (2, 2, 2, 2),
    "+CoT": (0, 0, 2, 2),
    "TALLRec": (10, 10, 10, 10),
    "MLLM-MSR": (0, 2, 2, 10),
}
"""Of four people's targets: NDCG@10 of place 0 is 1, of place 2 it is 1/2, of place 10 nothing."""


def measured() -> dict[str, Any]:
    places = {name: Places(np.array(of), np.zeros(4, np.int64)) for name, of in PLACES.items()}
    table = ladder.compare(places, np.arange(4), 100, 0)
    conditions = {"data": "shop", "targets": 4, "users": 4, "reranked": 8, "intervals": "95 %, by hand"}
    return {
        "conditions": conditions,
        "targets_among_candidates": 0.75,
        "systems": {"fused": table, "odds alone": table},
    }


def test_a_ladder_is_printed_with_what_each_part_adds(
    command: Command, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Workspace] = []
    monkeypatch.setattr(ladder, "run", lambda workspace: seen.append(workspace) or measured())
    ended = command("evaluate", copied, "--ladder", "--set", "training.negatives=2")
    assert ended.code == 0, ended.err
    assert [workspace.config.training.negatives for workspace in seen] == [2]
    assert Workspace.open(copied).config.training.negatives == 2
    cells = {line.split("│")[1].strip(): line for line in ended.out.splitlines() if line.startswith("│")}
    assert list(cells) == list(PLACES)
    assert " 1.0000 [1.0000, 1.0000] " in cells["+CoT"] and " 0.7500 [" in cells["+CoT"]
    assert "+0.2500 (+100.0%, p = " in cells["+dynamic preference"]  # over the row before
    assert "+0.2500 (+50.0%, p = " in cells["+CoT"] and "+0.7500 (p = 0.0" in cells["+CoT"]  # no share of nothing
    assert "+CoT over TALLRec: +0.7500 (p = 0.0" in ended.out
    assert "+CoT over MLLM-MSR: +0.2500 (+50.0%, p = " in ended.out
    for reading in ("fused", "odds alone"):
        assert ended.out.count(f"shop, {reading}: 4 targets of 4 users") == 1
    assert "The first 8 of retrieval are reranked on every rung and hold 75.0% of the targets." in ended.out
    assert max(map(len, ended.out.splitlines())) <= 150


def test_a_ladder_as_json_is_what_was_measured(command: Command, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "run", lambda _: measured())
    ended = command("evaluate", copied, "--ladder", "--json")
    assert json.loads(ended.out, parse_constant=pytest.fail) == measured()


def test_a_ladder_that_trains_nothing_is_wrong_use(command: Command, copied: Path) -> None:
    ended = command("evaluate", copied, "--ladder", "--set", "training.rows=0")
    assert ended.code == 2
    assert "error: every rung of the ladder is fine-tuned: set training.rows above 0" in ended.err

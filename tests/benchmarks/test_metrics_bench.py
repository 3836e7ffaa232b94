"""The lists, the comparison and the table of `metrics_speed.py`, without the peers' environment."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_srec import metrics

sys.path += [str(Path(__file__).parents[2] / "benchmarks" / folder) for folder in ("", "peers")]

import exchange
import metrics_speed as bench

USERS = 60
SYSTEMS = {"RecTools": 7, "ranx": USERS}
"""Of how many users each gives values."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 users; a catalogue in which most lists draw an item twice at first; blocks that do not divide the users."""
    for name, value in {"USERS": USERS, "ITEMS": 5000, "BLOCK": 16, "CHECKED": 7}.items():
        monkeypatch.setattr(bench, name, value)


def written_out(items: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(M, U): the metrics by their definitions for one relevant item."""
    formulas: dict[str, Callable[[int], float]] = {
        "HR": lambda rank: 1,
        "Recall": lambda rank: 1,
        "NDCG": lambda rank: 1 / math.log2(1 + rank),
        "MRR": lambda rank: 1 / rank,
        "MAP": lambda rank: 1 / rank,
    }
    values = np.zeros((len(bench.METRICS), len(items)))
    for user, (row, wanted) in enumerate(zip(items.tolist(), target.tolist(), strict=True)):
        rank = row.index(wanted) + 1 if wanted in row else math.inf
        for at, (name, k) in enumerate(bench.METRICS):
            if rank <= k:
                values[at, user] = formulas[name](int(rank))
    return values


def peers_environment(changed: Callable[[np.ndarray, list[float]], None] | None = None) -> Callable[[str, str], None]:
    """What the peers' program would write, the last system's values and means of the last round `changed`."""

    def call(program: str, folder: str) -> None:
        assert program == "metrics_of_others.py"
        place = Path(folder)
        wanted = exchange.read_json(place / "wanted.json")
        assert wanted == {"metrics": [list(pair) for pair in bench.METRICS], "rounds": 3, "checked": 7}
        values = written_out(np.load(place / "items.npy"), np.load(place / "target.npy"))
        found: dict[str, list[dict[str, Any]]] = {}
        for name, compared in SYSTEMS.items():
            means = [values.mean(1).tolist() for _ in range(3)]
            of_users = values[:, :compared].copy()
            if changed and name == "ranx":
                changed(of_users, means[2])
            seconds = [(2.0, 100.0), (1.0, 300.0), (5.0, 200.0)]
            found[name] = [
                {"making": making, "metrics": of, "means": mean}
                for (making, of), mean in zip(seconds, means, strict=True)
            ]
            exchange.write_array(place / f"{name}.npy", of_users)
        exchange.write_json(place / "others.json", found)

    return call


# Lists


def test_lists_hold_different_items_and_half_of_them_their_target_at_any_place() -> None:
    items, target = bench.drawn_lists()
    assert items.shape == (USERS, 100) and items.dtype == target.dtype == np.int32
    assert items.min() >= 0 and items.max() < 5000
    assert all(len(set(row)) == 100 for row in items.tolist())
    assert items.flags.c_contiguous
    again = bench.drawn_lists()
    np.testing.assert_array_equal(again[0], items)
    np.testing.assert_array_equal(again[1], target)


def test_targets_stand_at_all_places_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "USERS", 4000)
    items, target = bench.drawn_lists()
    inside = items == target[:, None]
    assert inside.any(1).mean() == pytest.approx(0.5, abs=0.04)
    places = inside.argmax(1)[inside.any(1)]
    assert np.bincount(places // 10, minlength=10) / len(places) == pytest.approx(np.full(10, 0.1), abs=0.03)


def test_our_metrics_of_the_lists_are_their_definitions() -> None:
    items, target = bench.drawn_lists()
    ours = bench.of_places(*metrics.places_in_lists(items, target))
    np.testing.assert_allclose(np.stack(ours), written_out(items, target), rtol=0, atol=1e-12)


# Scores of the whole catalogue


def test_places_of_whole_catalogues_are_checked_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(bench.whole_catalogue()) == 3
    right, rows = metrics.places, []

    def wrong_in_the_last(scores: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        greater, ties = right(scores, target)
        rows.append(len(scores))
        return greater + (len(scores) == 12), ties

    monkeypatch.setattr(metrics, "places", wrong_in_the_last)
    with pytest.raises(ValueError, match="not those of their order"):
        bench.whole_catalogue()
    assert rows == [16, 16, 16, 12]


# The comparison


def test_equal_metrics_are_measured_and_put_into_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "call", peers_environment())
    monkeypatch.setattr(sys, "argv", ["metrics_speed.py", "--json"])
    bench.main()
    result = json.loads(capsys.readouterr().out)
    assert result["users"] == USERS and result["faster_than_all"]
    assert list(result["means"]) == result["metrics"] and len(result["metrics"]) == 14
    assert result["means"]["MRR@100"] == result["means"]["MAP@100"] > 0
    ours, rectools, ranx, full = result["rows"]
    assert (ours["system"], full["system"]) == (bench.LISTS, bench.FULL)
    assert ours["difference"] is None and 0 <= ranx["difference"] < 1e-12
    assert (rectools["compared"], ranx["compared"]) == (7, USERS)
    assert ranx["metrics"] == {"value": 200, "least": 100, "most": 300}
    # Medians of the rounds' own sums: 102, 301, 205.
    assert ranx["making"]["value"] == 2 and ranx["together"] == {"value": 205, "least": 102, "most": 301}


def test_the_table_by_hand() -> None:
    rows = [
        bench.row(bench.LISTS, [{"making": 0.0, "metrics": 0.5}], 0, None),
        bench.row("ranx", [{"making": 9.0, "metrics": 6.0}], 2000, 2e-16),
        bench.row(bench.FULL, [{"making": 0.0, "metrics": 7.0}], 0, None),
    ]
    result = {
        "users": 2000, "items": 300, "list_length": 100, "rounds": 1, "metrics": ["HR@10", "MRR@100"], "rows": rows,
        "machine": {"processor": "abacus"}, "faster_than_all": False,
    }  # fmt: skip
    lines = bench.markdown(result).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert {len(row) for row in cells} == {len(bench.COLUMNS)}
    half, six = "0.500 (0.500 to 0.500)", "6.000 (6.000 to 6.000)"
    assert cells[2] == [bench.LISTS, half, "none", half, "", "", ""]
    assert cells[3] == [
        "ranx", six, "9.000 (9.000 to 9.000)", "15.000 (15.000 to 15.000)", "12, with its input 30", "2,000", "2.0e-16",
    ]  # fmt: skip
    text = " ".join(lines[5:])
    assert "2,000 users" in text and "HR@10, MRR@100: 2 means" in text and "abacus" in text
    assert "are not faster" in text


@pytest.mark.parametrize(("ours", "faster"), [(199.0, True), (201.0, False)])
def test_being_faster_is_measured_against_the_others_without_their_input(
    ours: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "call", peers_environment())
    monkeypatch.setattr(bench, "timed", lambda work: ours)  # theirs: 200, and 205 with their input
    assert bench.measured()["faster_than_all"] is faster


def value_off(values: np.ndarray, means: list[float]) -> None:
    values[3, -1] += 1e-8


def value_missing(values: np.ndarray, means: list[float]) -> None:
    values[3, 0] = np.nan


def mean_off(values: np.ndarray, means: list[float]) -> None:
    means[3] += 1e-8


@pytest.mark.parametrize("changed", [value_off, value_missing, mean_off])
def test_a_metric_that_is_not_ours_is_an_error(
    changed: Callable[[np.ndarray, list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "call", peers_environment(changed))
    with pytest.raises(ValueError, match=r"ranx: HR@100 differs from ours by (1e-08|nan), more than 1e-09"):
        bench.measured()


def test_without_the_peers_environment_the_way_to_make_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PYTHON", tmp_path / "python")
    with pytest.raises(SystemExit, match="make bench-metrics"):
        bench.call("metrics_of_others.py", "folder")

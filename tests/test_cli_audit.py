"""`mllm-srec audit WS`: a table and JSON of findings; an error ends with 1, a warning does not."""

import json
from pathlib import Path

import polars as pl

from conftest import Command
from fakes import Event, make_shop
from mllm_srec.users import STATES
from mllm_srec.workspace import Job, Workspace

START, DAY = 1_600_000_000_000, 86_400_000
ITEMS = [{"item_id": item, "title": f"title [bold]{item}"} for item in "abcdefgh"]


def shop(folder: Path, *users: str) -> Path:
    """Users with their items, one a day."""
    log: dict[str, list[Event]] = {
        f"u{n}": [(item, START + day * DAY, None) for day, item in enumerate(own)] for n, own in enumerate(users)
    }
    return make_shop(folder, ITEMS, log).root


def severities(out: str) -> dict[str, str]:
    return {found["name"]: found["severity"] for found in json.loads(out)["findings"]}


def test_the_audit_of_a_finished_workspace_finds_no_error(command: Command, finished: Path) -> None:
    ended = command("audit", finished)
    assert ended.code == 0
    assert "Audit of shop" in ended.out
    for part in ("severity", "finding", "figure", "what to do", "popularity_order", "leak_states", "leak_candidates"):
        assert part in ended.out
    assert "0 error, " in ended.out
    told = json.loads(command("audit", finished, "--json").out)
    assert (told["data"], told["protocol"], told["tie_rule"]) == ("shop", "leave_last_out", "file_order")
    found = {finding["name"]: finding for finding in told["findings"]}
    assert "error" not in {finding["severity"] for finding in found.values()}
    assert found["leak_states"]["of"] > 0
    assert found["duplicate_pictures"]["severity"] == found["missing_pictures"]["severity"] == "ok"


def test_warnings_end_with_0_and_name_examples(command: Command, tmp_path: Path) -> None:
    folder = shop(tmp_path, "abcd", "bcda", "cdab", "dabc", "abcd")
    ended = command("audit", folder)
    assert ended.code == 0
    assert "e.g. u0 = u4" in ended.out
    found = severities(command("audit", folder, "--json").out)
    assert (found["duplicate_users"], found["missing_pictures"]) == ("warning", "warning")


def test_histories_in_popularity_order_end_with_1(command: Command, tmp_path: Path) -> None:
    # The more popular of its items comes first in every history: a in all, b in most, ...
    ordered = [*["abcdefgh"] * 2, *["abcdefg"] * 2, *["abcdef"] * 2, *["abcde"] * 2, *["abcd"] * 2, *["abc"] * 2]
    ended = command("audit", shop(tmp_path, *ordered), "--json")
    assert ended.code == 1
    assert severities(ended.out)["popularity_order"] == "error"


def test_a_state_that_knows_the_future_ends_with_1(command: Command, copied: Path) -> None:
    assert command("audit", copied).code == 0
    workspace = Workspace.open(copied)
    row = workspace.rows(STATES).filter(pl.col("end") > 0).to_dicts()[0]
    key = row["key"]
    row = {name: value for name, value in row.items() if name not in ("key", "fingerprint")}
    planted = row | {"as_of": row["as_of"] + 1}
    workspace.produce(STATES, [Job(key, "planted", None)], lambda _: [planted], batch=1, label="plant")
    ended = command("audit", copied)
    assert ended.code == 1
    assert "leak_states" in ended.out
    assert "1 error, " in ended.out
    assert f"e.g. {key}" in ended.out


def test_a_folder_that_is_no_workspace(command: Command, tmp_path: Path) -> None:
    ended = command("audit", tmp_path)
    assert ended.code == 1
    assert "is not a workspace" in ended.err

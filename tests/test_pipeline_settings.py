"""The pipeline under other splits, other data and other settings."""

import json
from pathlib import Path

import pytest

from mllm_srec import items, pipeline, users
from mllm_srec.config import load_config
from mllm_srec.errors import DataError, UsageError
from mllm_srec.pipeline import Pipeline
from mllm_srec.recommender import Recommender
from mllm_srec.workspace import Workspace, read_manifest
from pipeline_helpers import LetterEncoder, changed, make, produced, table_data, walk


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "TextEncoder", LetterEncoder)


def test_without_training_rows_the_model_ranks_as_it_was_loaded(copied: Path) -> None:
    before = json.loads((copied / "runs/main/metrics.json").read_text())
    workspace = changed(copied, "training.rows=0")
    untrained = Pipeline(workspace)
    result = untrained.run()
    assert not untrained.mllm.has_adapter  # though the folder still holds one
    assert (before["training_rows"], result["training_rows"]) == (6, 0)
    assert result["systems"]["retrieval"] == before["systems"]["retrieval"]
    assert read_manifest(copied / "runs/main")["model"] == untrained.mllm.identity
    assert not Recommender(workspace).mllm.has_adapter


def test_a_global_time_split_tests_on_the_newest_events(
    tmp_path: Path, settings: tuple[str, ...], letters: None
) -> None:
    data = table_data(tmp_path / "data", walk(8, 10))
    run = Pipeline(make(tmp_path, data, settings, "data.protocol=global_time", "training.rows=4"))
    result = run.run()
    assert result["conditions"]["protocol"] == "global_time"
    assert result["training_rows"] == 4
    # 80 events at 80 times; the newest 8 are one per user: event 9 of each.
    assert result["conditions"]["targets"] == 8
    assert run.chosen.test.position.tolist() == [9] * 8
    time = run.histories.time
    assert time is not None
    first = time[run.histories.offsets[run.chosen.test.user] + 9].min()
    assert not run.split.seen_test[time >= first].any()
    assert run.split.seen_test[time < first].all()


def test_a_strict_history_holds_nothing_tied_with_its_target(
    tmp_path: Path, settings: tuple[str, ...], letters: None
) -> None:
    events = walk(6, 6)
    events["u0"][-2:] = [("i9", 7000), ("i10", 7000)]  # validation and test at the same time
    data = table_data(tmp_path / "data", events)
    run = Pipeline(make(tmp_path, data, settings, "data.tie_rule=strict", "training.rows=0"))
    result = run.run()
    assert result["conditions"]["tie_rule"] == "strict"
    assert run.chosen.test.position.tolist() == [5] * 6
    assert run.chosen.test.end.tolist() == [4, 5, 5, 5, 5, 5]
    states = users.load_states(run.workspace, run.catalogue)
    assert ("u0", 5) not in states

    run.workspace.save_config(load_config(run.workspace.root / "config.yaml", overrides=("data.tie_rule=file_order",)))
    assert Pipeline(run.workspace).chosen.test.end.tolist() == [5] * 6


def test_rules_that_need_times_refuse_a_log_without(tmp_path: Path, settings: tuple[str, ...], letters: None) -> None:
    data = table_data(tmp_path / "data", walk())
    log = (data / "interactions.csv").read_text().splitlines()
    (data / "interactions.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in log))
    workspace = make(tmp_path, data, settings, "training.rows=3")
    for override in ("data.tie_rule=strict", "data.protocol=global_time"):
        with pytest.raises(UsageError, match=r"the log has no times, so .*: use data\."):
            Pipeline(changed_in_memory(workspace, override))
    assert Pipeline(workspace).run()["conditions"]["targets"] == 6


def changed_in_memory(workspace: Workspace, override: str) -> Workspace:
    other = Workspace.open(workspace.root)
    other.config = load_config(workspace.root / "config.yaml", overrides=(override,))
    return other


def test_a_log_without_long_enough_users_is_refused(tmp_path: Path, settings: tuple[str, ...]) -> None:
    workspace = make(tmp_path, table_data(tmp_path / "data", walk(6, 2)), settings)
    with pytest.raises(DataError, match=r"no user has the 3 events that a test target needs: .*lower data.min_history"):
        Pipeline(workspace)


def test_short_users_give_no_target_but_count(tmp_path: Path, settings: tuple[str, ...], letters: None) -> None:
    events = walk(6, 5) | {"short": [("i1", 50), ("i2", 60)]}
    run = Pipeline(make(tmp_path, table_data(tmp_path / "data", events), settings, "training.rows=0"))
    result = run.run()
    assert (result["conditions"]["targets"], result["conditions"]["users_too_short"]) == (6, 1)
    assert run.split.seen_test[run.histories.span(run.histories.users.index("short"))].all()


def test_pictures_that_cannot_be_used_are_no_hindrance(
    tmp_path: Path, settings: tuple[str, ...], letters: None
) -> None:
    data = table_data(tmp_path / "data", walk())
    (data / "images").mkdir()
    (data / "images/i0.png").write_bytes(b"not a picture")
    (data / "images/i1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (data / "images/i2.jpg").symlink_to("/etc/hostname")
    workspace = make(tmp_path, data, settings, "training.rows=0")
    run = Pipeline(workspace)
    run.run()
    texts = {row["key"]: row for row in workspace.rows(items.ITEM_TEXTS).iter_rows(named=True)}
    assert [texts[f"i{n}"]["picture"] for n in range(4)] == ["not_a_picture", "truncated", "outside", "none"]
    assert {row["status"] for row in texts.values()} == {"ok"}
    assert {row["visual"] for row in texts.values()} == {""}


def test_every_produced_row_is_fine(finished: Path) -> None:
    workspace = Workspace.open(finished)
    for name, frame in produced(workspace).items():
        assert frame.height > 0, name
        assert set(frame["status"]) == {"ok"}, name
    assert workspace.rows(items.ITEM_TEXTS)["key"].to_list() == sorted(workspace.dataset().items["item_id"])

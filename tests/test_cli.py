"""The command line: what is printed, which code it ends with, and what bad input leaves behind: nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lancedb.table import LanceTable
from PIL import Image

from conftest import Command
from mllm_srec import Recommender, Workspace, __version__
from mllm_srec.config import load_config
from mllm_srec.data.images import MAX_RATIO
from mllm_srec.recommender import Recommendation
from mllm_srec.users import WINDOWS

STAGES = ("describe", "comprehend", "retrieve", "train", "evaluate", "run")


def set_all(overrides: tuple[str, ...]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


HEADER = "user_id,item_id,timestamp"
EVENTS = [f"u{u},i{(u + e) % 12},{1_700_000_000 + 1000 * e + u}" for u in range(5) for e in range(4)]
KINDS = ("hat", "shoe", "bag", "belt")
ITEMS = [f"i{n},{KINDS[n % 4]} number {n},{KINDS[n % 4]}s" for n in range(12)]


def lines(*parts: str) -> str:
    return "\n".join(parts) + "\n"


def write_shop(folder: Path, items: str | bytes | None = None, log: str | bytes | None = None) -> Path:
    """Twelve items, five users of four events; `items` and `log` replace a file's content."""
    folder.mkdir(exist_ok=True)
    items = lines("item_id,title,category", *ITEMS) if items is None else items
    log = lines(HEADER, *EVENTS) if log is None else log
    for name, content in (("items.csv", items), ("interactions.csv", log)):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# Help


def test_help_loads_no_heavy_library_and_answers_at_once() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['mllm-srec', '--help']\n"
        "from mllm_srec import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    code = ended.code\n"
        "heavy = {'torch', 'transformers', 'lancedb', 'polars', 'pyarrow', 'numpy', 'PIL', 'peft'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), 'code:', code)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 1.5  # about 0.3 s on an idle core
    assert done.stdout.endswith("heavy: [] code: 0\n")
    for name in (*STAGES, "sample", "ingest", "audit", "recommend", "doctor"):
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", [*STAGES, "sample", "ingest", "audit", "recommend", "doctor"])
def test_every_command_explains_itself(command: Command, name: str) -> None:
    ended = command(name, "--help")
    assert ended.code == 0
    assert "Usage: " in ended.out


@pytest.mark.parametrize("arguments", [("nonsense",), ("run",), ("recommend", "ws", "-k", "0"), ("sample", "--users")])
def test_wrong_use_ends_with_2(command: Command, arguments: tuple[str, ...]) -> None:
    assert command(*arguments).code == 2


# From raw files to lists


def test_sample_writes_a_shop_and_no_second_one_over_it(command: Command, tmp_path: Path) -> None:
    ended = command("sample", tmp_path / "shop", "--users", 5, "--seed", 3)
    assert f"Sample shop in {tmp_path / 'shop'}: pictures are drawn, users are simulated" in ended.out
    users = {line.split(",")[0] for line in (tmp_path / "shop/interactions.csv").read_text().splitlines()[1:]}
    assert len(users) == 5
    again = command("sample", tmp_path / "shop")
    assert (again.code, again.err) == (
        2,
        f"error: {tmp_path / 'shop'} is not empty: choose a new or empty folder for the sample shop\n",
    )


def test_ingest_reports_what_it_read_and_run_does_the_rest(
    command: Command, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    data, folder = write_shop(tmp_path / "data"), tmp_path / "ws"
    ended = command("ingest", data, folder, *set_all(settings))
    assert ended.code == 0, ended.err
    assert ended.out == (
        "data: 5 users, 12 items, 20 interactions; repeats: first (0 dropped); pictures: 12 none; rows skipped: 0\n"
    )
    ran = command("run", folder, "--set", "retrieval.candidates=4", "--set", "training.rows=2", "--examples", 1)
    assert ran.code == 0, ran.err
    assert "data: 5 targets of 5 users, 12 items" in ran.out
    for system in ("popularity", "co-occurrence", "content", "retrieval", "MLLM odds alone", "MLLM-SRec"):
        assert f" {system} " in ran.out
    assert "NDCG@10 [95 %]" in ran.out
    assert "leave_last_out, ties in time: file_order, repeats: first" in ran.out
    assert ran.out.count("\nUser ") == 1
    assert "\nUser u0\n" in ran.out
    assert "(by evidence)" in ran.out or "(by model)" in ran.out
    assert (folder / "runs/main/manifest.json").exists()


def test_stages_one_by_one_end_where_run_ends(command: Command, finished: Path, ingested: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ingested, tmp_path / "ws")
    for stage in ("describe", "retrieve", "comprehend", "train"):
        ended = command(stage, folder)
        assert ended.code == 0, ended.err
        assert ("chosen on validation: content=" in ended.out) == (stage == "retrieve")
    ended = command("evaluate", folder, "--json")
    result = json.loads(ended.out, parse_constant=pytest.fail)
    assert result == json.loads((finished / "runs/main/metrics.json").read_text())
    assert result == json.loads((folder / "runs/main/metrics.json").read_text())


@pytest.mark.parametrize("preset", ["tallrec", "mllm-msr"])
def test_ingest_takes_the_preset_of_a_predecessor(command: Command, tmp_path: Path, preset: str) -> None:
    ended = command("ingest", write_shop(tmp_path / "data"), tmp_path / "ws", "--preset", preset)
    assert ended.code == 0, ended.err
    assert Workspace.open(tmp_path / "ws").config == load_config(preset=preset)


def test_run_prints_json_for_programs(command: Command, copied: Path) -> None:
    ended = command("run", copied, "--json")
    assert json.loads(ended.out, parse_constant=pytest.fail) == json.loads(
        (copied / "runs/main/metrics.json").read_text()
    )
    assert "rows reused" in ended.err


def test_a_changed_key_is_kept_in_the_workspace(command: Command, copied: Path) -> None:
    assert command("describe", copied, "--set", "items.questions=[]").code == 0
    assert Workspace.open(copied).config.items.questions == ()


def test_repeats_cannot_be_changed_after_reading(command: Command, copied: Path) -> None:
    before = (copied / "config.yaml").read_bytes()
    ended = command("run", copied, "--set", "data.repeats=keep")
    assert ended.code == 2
    assert "error: data.repeats is applied when data is read: make a new workspace with `mllm-srec ingest`" in ended.err
    assert (copied / "config.yaml").read_bytes() == before


# Lists


def test_recommend_shows_a_list_for_a_user_of_the_log(command: Command, finished: Path) -> None:
    ended = command("recommend", finished, "--user", "u002", "-k", 12, "--explain")
    assert ended.code == 0, ended.err
    wanted = Recommender(Workspace.open(finished)).recommend(user="u002", k=12, explain=True)
    printed = ended.out.splitlines()
    assert printed[:3] == ["", "User u002", f"  profile:    {wanted.profile}"]
    for place, item in enumerate(wanted.items, start=1):
        score = f"{item.score:+.2f}" if place <= 8 else "not read by the model"
        at = printed.index(f"  {place:2d}. {item.title}  [{item.item_id}]  {score}")
        assert printed[at + 1] == f"      {item.reason} (by {item.reason_by})"


def test_recommend_takes_a_history_from_outside(command: Command, finished: Path) -> None:
    ended = command("recommend", finished, "--history", " i0003, i0009,", "-k", 3)
    assert ended.code == 0, ended.err
    assert "\nUser (history from outside)\n" in ended.out
    wanted = Recommender(Workspace.open(finished)).recommend(history=["i0003", "i0009"], k=3)
    assert [f"[{item.item_id}]" in ended.out for item in wanted.items] == [True] * 3
    assert " (by " not in ended.out


def test_recommend_serves_somebody_without_a_history(command: Command, finished: Path) -> None:
    ended = command("recommend", finished, "--history", "", "-k", 2)
    assert ended.code == 0, ended.err
    assert "  profile:    shows no taste yet" in ended.out


def test_recommend_prints_json_with_the_documented_keys(command: Command, finished: Path) -> None:
    ended = command("recommend", finished, "--user", "u001", "-k", 12, "--json", "--explain")
    answer = json.loads(ended.out, parse_constant=pytest.fail)
    assert list(answer) == ["user", "profile", "preference", "recent", "items"]
    assert answer["user"] == "u001"
    assert len(answer["items"]) == 12
    for place, item in enumerate(answer["items"]):
        assert list(item) == list(Recommendation.__dataclass_fields__)
        assert (item["score"] is None) == (item["odds"] is None) == (place >= 8)
        assert item["reason"]
    plain = json.loads(command("recommend", finished, "--history", "i0001", "--json").out)
    assert (plain["user"], len(plain["items"])) == (None, 10)
    assert {item["reason"] for item in plain["items"]} == {None}


@pytest.mark.parametrize("arguments", [(), ("--user", "u001", "--history", "i0001")])
def test_recommend_wants_a_user_or_a_history(command: Command, finished: Path, arguments: tuple[str, ...]) -> None:
    ended = command("recommend", finished, *arguments)
    assert (ended.code, ended.err) == (2, "error: give exactly one of --user and --history\n")


def test_doctor_names_versions_and_the_state_of_a_workspace(
    command: Command, finished: Path, ingested: Path, tmp_path: Path
) -> None:
    plain = command("doctor")
    assert f"mllm-srec {__version__}, python {sys.version.split()[0]}" in plain.out
    assert all(f"  {name} " in plain.out for name in ("torch", "transformers", "peft", "lancedb", "polars", "pillow"))
    assert "device: " in plain.out
    assert "embedded model: " in plain.out
    done = command("doctor", finished)
    assert "  item_texts: 120 rows" in done.out
    assert "  run main: finished" in done.out
    fresh = shutil.copytree(ingested, tmp_path / "ws")
    new = command("doctor", fresh)
    assert "  user_states: 0 rows" in new.out
    assert f"  run main: not finished: mllm-srec run {fresh}" in new.out
    assert command("doctor", tmp_path).code == 1


# Bad input: what is wrong, where, what to do; and nothing is left

BAD_DATA = {
    "missing column": (
        {"log": "user_id,item,timestamp\nu0,i0,1700000000\n"},
        "interactions.csv: there is no column item_id. The columns found: user_id, item, timestamp. Is item meant?",
    ),
    "wrong type": (
        {"log": lines(HEADER, *EVENTS, "u1,i1,yesterday")},
        "interactions.csv line 22, column timestamp: 'yesterday' is not a unix time in seconds. Correct the file, or",
    ),
    "time NaN": (
        {"log": lines(HEADER, *EVENTS, "u1,i1,NaN")},
        "interactions.csv line 22, column timestamp: 'NaN' is not a unix time in seconds",
    ),
    "rating NaN": (
        {"log": lines(HEADER + ",rating", *(f"{line},4" for line in EVENTS), "u1,i1,1700000000,nan")},
        "interactions.csv line 22, column rating: the rating 'nan' is not a finite number",
    ),
    "item twice": (
        {"items": "item_id,title\n" + "".join(f"i{n % 12},hat {n}\n" for n in range(13))},
        "items.csv line 14, column item_id: item i0 stands here twice. Correct the file, or skip such rows with --on-b",
    ),
    "unknown item": (
        {"log": lines(HEADER, *EVENTS, "u1,i99,1700000000")},
        "interactions.csv line 22, column item_id: item i99 of the log is not in the catalogue",
    ),
    "no user": (
        {"log": lines(HEADER, *EVENTS, ",i1,1700000000")},
        "interactions.csv line 22, column user_id: the user has no id",
    ),
    "empty log": ({"log": ""}, "interactions.csv is empty"),
    "empty items": ({"items": ""}, "items.csv is empty"),
    "log without rows": ({"log": HEADER + "\n"}, "no interactions left: the file is empty or every row was skipped"),
    "no text": ({"log": b"user_id,item_id\nu1,\xff\xfe\n"}, "line 2 is not UTF-8 text: save the file as UTF-8"),
}


@pytest.mark.parametrize(("files", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_named_with_its_place_and_no_workspace_is_made(
    command: Command, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    data = write_shop(tmp_path / "data", **files)
    ended = command("ingest", data, tmp_path / "ws")
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert message in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert command("ingest", write_shop(data), tmp_path / "ws").code == 0


def test_skipped_rows_are_counted_and_listed(command: Command, tmp_path: Path) -> None:
    bad = ["u1,i99,1700000000", "u1,i1,NaN", "u1,,1700000000"]
    data = write_shop(tmp_path / "data", log=lines(HEADER, *EVENTS, *bad))
    assert command("ingest", data, tmp_path / "ws", "--on-bad-row", "stop").code == 1
    ended = command("ingest", data, tmp_path / "ws", "--on-bad-row", "skip")
    assert ended.code == 0
    assert "20 interactions" in ended.out
    assert ended.out.endswith("rows skipped: 3\n")
    for line in (
        "  skipped interactions.csv line 22, item_id: item i99 of the log is not in the catalogue",
        "  skipped interactions.csv line 23, timestamp: 'NaN' is not a unix time in seconds",
        "  skipped interactions.csv line 24, item_id: the item has no id",
    ):
        assert line in ended.err.splitlines()
    assert "more" not in ended.err
    assert Workspace.open(tmp_path / "ws").dataset().skipped["line"].sort().to_list() == [22, 23, 24]


def test_a_long_list_of_skipped_rows_says_where_the_rest_is(command: Command, tmp_path: Path) -> None:
    bad = [f"u1,nowhere{n},1700000000" for n in range(13)]
    data = write_shop(tmp_path / "data", log=lines(HEADER, *EVENTS, *bad))
    ended = command("ingest", data, tmp_path / "ws", "--on-bad-row", "skip")
    assert ended.err.count("  skipped interactions.csv line ") == 10
    assert ended.err.endswith(f"  ... and 3 more: Workspace.open('{tmp_path / 'ws'}').dataset().skipped\n")


def test_another_word_for_bad_rows_is_refused(command: Command, tmp_path: Path) -> None:
    ended = command("ingest", write_shop(tmp_path / "data"), tmp_path / "ws", "--on-bad-row", "ignore")
    assert ended.code == 2
    assert "'data.on_bad_row': Input should be 'stop' or 'skip' (got 'ignore')" in ended.err
    assert not (tmp_path / "ws").exists()


def test_bad_pictures_are_counted_by_state_and_run_goes_on(
    command: Command, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    names = ["good.png", "gone.png", "words.png", "cut.png", "../secret.png", "strip.png", "https://a.example/b.png"]
    rows = [f"i{n},hat {n},{names[n] if n < len(names) else ''}" for n in range(12)]
    data = write_shop(tmp_path / "data", items=lines("item_id,title,image", *rows))
    Image.new("RGB", (40, 30), "red").save(data / "good.png")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "secret.png")
    Image.new("RGB", (30 * (MAX_RATIO + 1), 30), "red").save(data / "strip.png")
    (data / "words.png").write_text("not a picture")
    (data / "cut.png").write_bytes((data / "good.png").read_bytes()[:-20])
    ended = command("ingest", data, tmp_path / "ws", *set_all(settings))
    assert ended.code == 0, ended.err
    states = "1 missing, 5 none, 1 not_a_picture, 1 ok, 1 outside, 1 remote, 1 too_narrow, 1 truncated"
    assert f"pictures: {states};" in ended.out
    ran = command("run", tmp_path / "ws", "--set", "retrieval.candidates=4", "--set", "training.rows=0", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["conditions"]["targets"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--user", "u0001"), "error: unknown user 'u0001': did you mean u001"),
        (("--user", ""), "error: unknown user ''. For somebody new, give a history of item ids (--history)."),
        (("--history", "i0001,i00012"), "error: 1 of 2 items are not in the catalogue (first: 'i00012'; close: i0012"),
    ],
)
def test_unknown_users_and_items_are_answered_with_near_names(
    command: Command, finished: Path, arguments: tuple[str, ...], message: str
) -> None:
    ended = command("recommend", finished, *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_configuration_key_changes_nothing(command: Command, copied: Path, stage: str) -> None:
    before = (copied / "config.yaml").read_bytes()
    ended = command(stage, copied, "--set", "users.windw=5")
    assert ended.code == 2
    assert ended.err == (
        f"error: {copied}/config.yaml, --set users.windw=5: unknown key 'users.windw': did you mean 'window'?\n"
    )
    assert (copied / "config.yaml").read_bytes() == before


def test_an_unknown_key_of_a_configuration_file_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("trainin: {rows: 3}\n")
    ended = command("ingest", write_shop(tmp_path / "data"), tmp_path / "ws", "--config", tmp_path / "c.yaml")
    assert (ended.code, ended.err) == (
        2,
        f"error: {tmp_path}/c.yaml: unknown key 'trainin': did you mean 'training'?\n",
    )
    assert not (tmp_path / "ws").exists()


def test_histories_that_are_too_short_are_said(command: Command, tmp_path: Path, settings: tuple[str, ...]) -> None:
    log = lines(HEADER, *(line for n, line in enumerate(EVENTS) if n % 4 < 2))
    assert command("ingest", write_shop(tmp_path / "data", log=log), tmp_path / "ws", *set_all(settings)).code == 0
    ended = command("run", tmp_path / "ws")
    assert ended.code == 1
    assert "error: no user has the 3 events that a test target needs: give a longer log or lower" in ended.err
    assert Workspace.open(tmp_path / "ws").dataset().interactions.height == 10


@pytest.mark.parametrize("arguments", [("run",), ("recommend", "--user", "u001"), ("doctor",)])
def test_what_is_no_workspace_is_said(command: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ended = command(arguments[0], tmp_path / "gone", *arguments[1:])
    assert ended.code == 1
    assert "gone is not a workspace (config.yaml is missing): run `mllm-srec ingest DATA " in ended.err
    assert not (tmp_path / "gone").exists()


def test_a_model_that_cannot_be_had_is_said(command: Command, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = command("describe", copied, "--set", f"model.name={tmp_path / 'empty'}")
    assert ended.code == 1
    assert f"error: model '{tmp_path / 'empty'}' cannot be loaded" in ended.err


# Disks, neighbours, interruptions


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    command: Command, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    figures = (copied / "runs/main/metrics.json").read_bytes()
    windows = Workspace.open(copied).rows(WINDOWS)
    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, "merge_insert", full)
        ended = command("run", copied, "--set", "users.summary_tokens=8")
    assert ended.code == 1
    assert f"error: disk full while writing {copied}/store/" in ended.err
    assert ": free space, then run the same command again; finished rows are kept\n" in ended.err
    assert windows.equals(Workspace.open(copied).rows(WINDOWS))
    back = ("--set", "users.window=6", "--set", "users.step=3", "--json")
    with monkeypatch.context() as patch:
        patch.setattr("mllm_srec.store_files.os.fsync", full)
        ended = command("run", copied, *back)
    assert ended.code == 1
    assert f"error: disk full while writing {copied}" in ended.err
    assert (copied / "runs/main/metrics.json").read_bytes() == figures
    assert command("run", copied, *back).out.strip() == figures.decode()


def test_a_second_process_on_a_workspace_is_sent_away(command: Command, copied: Path) -> None:
    hold = (
        "import sys\nfrom mllm_srec.workspace import Workspace\n"
        "with Workspace.open(sys.argv[1]).writing():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(copied)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = (copied / "config.yaml").read_bytes()
        for stage in STAGES:
            ended = command(stage, copied, "--set", "users.last=3")
            assert ended.code == 1
            assert f"error: another process (pid {holder.pid}) writes to {copied}: wait until it ends\n" in ended.err, (
                stage
            )
        assert (copied / "config.yaml").read_bytes() == before
        assert command("recommend", copied, "--user", "u001", "-k", 1).code == 0  # a reader needs no lock
    finally:
        holder.communicate()
    assert command("run", copied, "--examples", 0).code == 0


def test_ctrl_c_ends_with_130_and_says_that_rows_are_kept(
    command: Command, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_srec.items.describe", lambda *_: signal.default_int_handler(signal.SIGINT, None))
    ended = command("run", copied)
    assert ended.code == 130
    assert "stopped; finished rows are kept, the same command goes on from there\n" in ended.err


def test_an_unreadable_file_is_said_without_a_traceback(
    command: Command, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere.bin")

    monkeypatch.setattr("mllm_srec.items.describe", broken)
    ended = command("run", copied)
    assert (ended.code, ended.err) == (1, "error: Input/output error: somewhere.bin\n")


def test_the_installed_module_ends_with_the_errors_code(tmp_path: Path) -> None:
    data = write_shop(tmp_path / "data", log="")
    for arguments, code in ((["ingest", str(data), str(tmp_path / "ws")], 1), (["recommend", str(tmp_path)], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "mllm_srec.cli", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1

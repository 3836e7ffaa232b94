"""The ladder: rungs that differ by one part, the same targets and candidates on all of them, and a run that goes on."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from conftest import Command
from mllm_srec import ladder, ranking, users
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import Config, build_config, load_config
from mllm_srec.errors import StoreError, UsageError
from mllm_srec.evaluation import report
from mllm_srec.evaluation.protocol import Places
from mllm_srec.pipeline import Pipeline
from mllm_srec.recommender import Choices
from mllm_srec.workspace import Workspace, read_manifest
from pipeline_helpers import changed, produced

SMALL = ("training.rows=2", "training.save_steps=25", "retrieval.candidates=16", "evaluation.users=12")
RUNGS = ["titles", "+SV", "+SVI", "+dynamic preference", "+profile", "+CoT"]
SLUGS = ["titles", "sv", "svi", "dynamic-preference", "profile", "cot", "tallrec"]
ROWS = ["retrieval", *RUNGS, "TALLRec", "MLLM-MSR"]


class Climbed(NamedTuple):
    """A workspace whose ladder was run from end to end, the same before that, and what `run` returned. Read only."""

    folder: Path
    before: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Climbed:
    """Main's figures are those of `SMALL` settings."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("ladder") / "ws"))
    main = Pipeline(changed(folder, *SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: None)
        for stage in ("comprehend", "train", "evaluate"):
            getattr(main, stage)()
    before = Path(shutil.copytree(folder, folder.with_name("before")))
    return Climbed(folder, before, ladder.run(Workspace.open(folder)))


@pytest.fixture
def again(climbed: Climbed, tmp_path: Path) -> Path:
    """The same workspace to write to."""
    return Path(shutil.copytree(climbed.folder, tmp_path / "ws"))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the folders of the runs that are evaluated, by their last name."""
    folders: list[str] = []
    evaluate = Pipeline.evaluate

    def watch(self: Pipeline) -> dict[str, Any]:
        folders.append(self.folder.name)
        return evaluate(self)

    monkeypatch.setattr(Pipeline, "evaluate", watch)
    return folders


# Configurations


def parts(config: Config) -> tuple[object, ...]:
    shown = config.ranking
    return shown.item, shown.preference, shown.profile, shown.facts, shown.picture, config.training.rationales


def test_each_rung_has_one_part_more_than_the_one_before() -> None:
    base = build_config({"seed": 5, "training": {"rows": 7, "negatives": 4}, "ranking": {"picture": True}})
    rungs = ladder.configurations(base)
    assert list(rungs) == [*RUNGS, "TALLRec", "MLLM-MSR"]
    assert [parts(rungs[name]) for name in RUNGS] == [
        ("title", False, False, False, False, "none"),
        ("visual", False, False, False, False, "none"),
        ("description", False, False, False, False, "none"),
        ("description", True, False, False, False, "none"),
        ("description", True, True, False, False, "none"),
        ("description", True, True, True, False, "evidence"),
    ]
    for name in RUNGS:  # all else is as configured
        as_before = {"ranking": base.ranking, "training": base.training}
        assert rungs[name].model_copy(update=as_before) == base
        assert rungs[name].training.model_copy(update={"rationales": base.training.rationales}) == base.training


def test_the_last_rung_is_the_default() -> None:
    assert ladder.configurations(Config())["+CoT"] == Config()


def test_predecessors_are_their_presets_with_all_else_as_configured() -> None:
    base = build_config({"seed": 5, "training": {"rows": 7, "negatives": 4}, "users": {"windows": "session"}})
    found = ladder.configurations(base)
    for name, preset in (("TALLRec", "tallrec"), ("MLLM-MSR", "mllm-msr")):
        config, alone = found[name], load_config(preset=preset)
        assert config.ranking == alone.ranking
        assert config.training == alone.training.model_copy(update={"rows": 7})
        assert config.seed == 5
    assert found["TALLRec"].users == base.users
    assert found["MLLM-MSR"].users == Config().users.model_copy(update={"window": 3, "step": 3})


# Figures


def at(*greater: int) -> Places:
    return Places(np.array(greater), np.zeros(len(greater), np.int64))


def test_figures_and_gains_by_hand() -> None:
    """NDCG@10 of place 0 is 1, of place 2 it is 1/2, of place 10 nothing; three users with one target each."""
    places = {
        "retrieval": at(10, 10, 10),
        "titles": at(10, 2, 2),
        "+SV": at(2, 2, 2),
        "+CoT": at(0, 0, 2),
        "TALLRec": at(0, 0, 0),
        "MLLM-MSR": at(0, 2, 2),
    }
    table = ladder.compare(places, np.arange(3), 200, 0)
    assert list(table) == list(places)
    ndcg = [row["NDCG@10"]["mean"] for row in table.values()]
    assert ndcg == pytest.approx([0, 1 / 3, 1 / 2, 5 / 6, 1, 2 / 3])
    assert [row["Recall@10"]["mean"] for row in table.values()] == pytest.approx([0, 2 / 3, 1, 1, 1, 1])

    def gains(key: str) -> dict[str, tuple[float, float | None]]:
        return {name: (row[key]["gain"], row[key]["relative"]) for name, row in table.items() if key in row}

    assert gains("over_before") == {
        "titles": (pytest.approx(1 / 3), None),  # there is no share of nothing
        "+SV": (pytest.approx(1 / 6), pytest.approx(1 / 2)),
        "+CoT": (pytest.approx(1 / 3), pytest.approx(2 / 3)),
    }
    assert gains("over_base") == {
        "retrieval": (pytest.approx(-1 / 3), pytest.approx(-1)),
        "+SV": (pytest.approx(1 / 6), pytest.approx(1 / 2)),
        "+CoT": (pytest.approx(1 / 2), pytest.approx(3 / 2)),
        "TALLRec": (pytest.approx(2 / 3), pytest.approx(2)),
        "MLLM-MSR": (pytest.approx(1 / 3), pytest.approx(1)),
    }
    assert gains("full_over") == {
        "TALLRec": (pytest.approx(-1 / 6), pytest.approx(-1 / 6)),
        "MLLM-MSR": (pytest.approx(1 / 6), pytest.approx(1 / 4)),
    }
    sure = table["+SV"]["NDCG@10"]  # all users alike: nothing to be unsure of
    assert (sure["low"], sure["high"]) == pytest.approx((0.5, 0.5), abs=1e-12)


def test_a_gain_for_every_user_is_significant_and_one_for_some_is_not() -> None:
    users_of = np.arange(40)
    low, high, mixed = np.full(40, 2), np.zeros(40, np.int64), np.resize([0, 2, 10], 40)
    table = ladder.compare({"retrieval": at(*low), "titles": at(*high), "+SV": at(*mixed)}, users_of, 500, 0)
    assert table["titles"]["over_before"]["p"] == pytest.approx(2 / 501)
    sure = table["titles"]["over_before"]
    assert (sure["low"], sure["high"]) == pytest.approx((0.5, 0.5), abs=1e-12)
    against = ladder.compare({"retrieval": at(*low), "titles": at(*mixed)}, users_of, 500, 0)
    assert against["titles"]["over_before"]["p"] > 0.05


def test_gains_are_paired_by_user_whose_targets_stay_together() -> None:
    """Two users, one with all the gain: a resample of the other alone has none, however many targets there are."""
    users_of = np.repeat([0, 1], 20)
    titles = at(*np.where(users_of == 0, 0, 2))
    gain = ladder.compare({"retrieval": at(*np.full(40, 2)), "titles": titles}, users_of, 200, 0)["titles"][
        "over_before"
    ]
    assert (gain["low"], gain["high"]) == pytest.approx((0, 0.5), abs=1e-12)
    assert gain["p"] == pytest.approx(0.5, abs=0.2)


# The run


def test_every_rung_stands_beside_its_neighbours(climbed: Climbed) -> None:
    folder, result = climbed.folder, climbed.result
    assert result == json.loads((folder / "runs/ladder/ladder.json").read_text(), parse_constant=pytest.fail)
    assert list(result["systems"]) == ["fused", "odds alone"]
    for rows in result["systems"].values():
        assert list(rows) == ROWS
        for name, row in rows.items():
            for metric in ("Recall@10", "NDCG@10"):
                assert 0 <= row[metric]["low"] <= row[metric]["mean"] <= row[metric]["high"] <= 1
            assert {key for key in row if "over" in key} == {
                *(["over_before"] if name in RUNGS else []),
                *(["over_base"] if name != "titles" else []),
                *(["full_over"] if name in ("TALLRec", "MLLM-MSR") else []),
            }
    assert list(result["fusion"]) == ROWS[1:]
    assert result["conditions"]["targets"] == 12
    main = json.loads((folder / "runs/main/metrics.json").read_text())
    assert result["conditions"] == main["conditions"]
    assert result["targets_among_candidates"] == main["targets_among_candidates"]


def metrics_of(folder: Path) -> dict[str, dict[str, Any]]:
    of_rungs = {slug: folder / "runs/ladder" / slug / "metrics.json" for slug in SLUGS}
    of_rungs["mllm-msr"] = folder / "runs/ladder/mllm-msr/runs/mllm-msr/metrics.json"
    return {slug: json.loads(path.read_text()) for slug, path in of_rungs.items()}


def test_candidates_are_those_of_main_on_every_rung(climbed: Climbed) -> None:
    folder, result = climbed.folder, climbed.result
    main = json.loads((folder / "runs/main/metrics.json").read_text())
    for slug, of_rung in metrics_of(folder).items():
        for system in ("popularity", "co-occurrence", "content", "sequence encoder", "retrieval"):
            assert of_rung["systems"][system] == main["systems"][system], (slug, system)
        assert of_rung["choices"]["retrieval"] == main["choices"]["retrieval"]
        assert of_rung["training_rows"] == 2
    for rows in result["systems"].values():
        for metric, interval in main["systems"]["retrieval"].items():
            if metric in rows["retrieval"]:
                assert rows["retrieval"][metric] == interval


def test_rows_are_those_of_the_rungs_metrics(climbed: Climbed) -> None:
    folder, result = climbed.folder, climbed.result
    of_rungs = metrics_of(folder).values()
    for reading, system in (("fused", "MLLM-SRec"), ("odds alone", "MLLM odds alone")):
        for name, of_rung in zip(ROWS[1:], of_rungs, strict=True):
            told, row = of_rung["systems"][system], result["systems"][reading][name]
            for metric in ("Recall@10", "NDCG@10"):
                assert row[metric] == {key: told[metric][key] for key in ("mean", "low", "high")}, (name, metric)


def test_the_last_rung_is_what_main_is_made_of_the_same_things(climbed: Climbed) -> None:
    folder = climbed.folder
    main = json.loads((folder / "runs/main/metrics.json").read_text())
    assert metrics_of(folder)["cot"]["systems"] == main["systems"]
    adapters = [read_manifest(folder / "runs" / run / "adapter")["fingerprint"] for run in ("main", "ladder/cot")]
    assert adapters[0] == adapters[1]


def test_no_two_rungs_read_the_same(climbed: Climbed) -> None:
    folder = climbed.folder
    run = folder / "runs/ladder"
    folders = [*(run / slug for slug in SLUGS), run / "mllm-msr/runs/mllm-msr"]
    assert len({read_manifest(of_rung / "adapter")["fingerprint"] for of_rung in folders}) == len(folders)


def test_main_is_left_as_it_was(climbed: Climbed) -> None:
    before, after = climbed.before, climbed.folder
    files = [file.relative_to(before) for file in sorted(before.rglob("*")) if file.is_file()]
    assert sum(file.parts[0] == "runs" for file in files) > 5
    for file in files:
        if file.parts[0] != "store" and not file.name.startswith("."):
            assert (after / file).read_bytes() == (before / file).read_bytes(), file
    rows, now = produced(Workspace.open(before)), produced(Workspace.open(after))
    for name, of_table in rows.items():
        added = now[name].filter(~now[name]["key"].is_in(of_table["key"].to_list()))
        assert now[name].height - added.height == of_table.height
        assert (added.height > 0) == (name in ("scores", "item_priors")), name
        assert now[name].join(added, on="key", how="anti").equals(of_table), name


def test_states_of_blocks_that_do_not_overlap_are_the_copys_own(climbed: Climbed) -> None:
    folder = climbed.folder
    main, copied = Workspace.open(folder), Workspace.open(folder / "runs/ladder/mllm-msr")
    blocks = users.load_states(copied, Catalogue.load(copied))
    assert {state.window_start % 3 for state in blocks.values()} == {0}
    overlapping = users.load_states(main, Catalogue.load(main))
    assert set(blocks) <= set(overlapping)
    assert all(state.end - state.window_start <= 3 for state in blocks.values())
    assert any(state.end - state.window_start > 3 for state in overlapping.values())


# Going on


def test_a_second_run_measures_nothing_again(
    climbed: Climbed, again: Path, evaluated: list[str], command: Command
) -> None:
    ended = command("evaluate", again, "--ladder", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out, parse_constant=pytest.fail) == climbed.result
    assert evaluated == []
    assert ended.err.count("ladder: what was measured is reused") == 8


def test_what_is_missing_damaged_or_stale_is_made_again_and_nothing_else(
    climbed: Climbed, again: Path, evaluated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rungs = again / "runs/ladder"
    adapter = rungs / "dynamic-preference/adapter/adapter_model.safetensors"
    weights = adapter.read_bytes()
    (rungs / "titles/measured.json").unlink()
    (rungs / "sv/measured.json").write_text('{"made_of"')
    (rungs / "svi/measured.json").write_text("[]")
    adapter.write_bytes(b"no weights")
    (rungs / "profile/choices.json").write_text("{}")
    (rungs / "mllm-msr/copied.txt").write_text("of other texts")
    assert ladder.run(Workspace.open(again)) == climbed.result
    assert evaluated == ["titles", "sv", "svi", "profile", "mllm-msr"]
    assert adapter.read_bytes() == weights
    for slug in SLUGS:
        read_manifest(rungs / slug)  # every file is as its manifest says
    assert Choices.read(rungs / "profile") == Choices.read(climbed.folder / "runs/ladder/profile")
    said = capsys.readouterr().err
    for slug in ("sv", "svi"):
        assert f"ladder: {rungs / slug / 'measured.json'} is damaged (" in said


def test_an_interrupted_ladder_goes_on(
    climbed: Climbed, again: Path, evaluated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for left in ("cot", "mllm-msr"):
        shutil.rmtree(again / "runs/ladder" / left)
    (again / "runs/ladder/.mllm-msr.partial/store/item_texts.lance").mkdir(parents=True)  # a copy that was cut off
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "score_lists", lambda *_: signal.default_int_handler(signal.SIGINT, None))
        with pytest.raises(KeyboardInterrupt):
            ladder.run(Workspace.open(again))
    assert evaluated == ["cot"]
    trained = (again / "runs/ladder/cot/adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert ladder.run(Workspace.open(again)) == climbed.result
    assert evaluated == ["cot", "cot", "mllm-msr"]
    assert (again / "runs/ladder/cot/adapter/adapter_model.safetensors").stat().st_mtime_ns == trained
    assert not (again / "runs/ladder/.mllm-msr.partial").exists()


def test_a_rung_configured_as_main_neither_learns_nor_reads_again_what_main_has(
    climbed: Climbed, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(again / "runs/ladder/cot")
    assert ladder.run(Workspace.open(again)) == climbed.result
    said = capsys.readouterr().err
    assert said.count("train: adapter of") == len(climbed.result["fusion"])
    read_again = [line for line in said.splitlines() if line.startswith("rank: ")]
    assert {line.split(":")[1].strip() for line in read_again} == {
        "validation",
        "calibration",
        "test",
        "items for the empty user",
    }
    assert all(line.endswith("rows reused") for line in read_again)
    shutil.rmtree(again / "runs/ladder/cot")
    shutil.rmtree(again / "runs/main/adapter")
    assert ladder.run(Workspace.open(again)) == climbed.result  # one seed, one adapter
    assert capsys.readouterr().err.count("train: adapter of") == len(climbed.result["fusion"]) - 1


def test_other_settings_are_measured_again(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(self: Pipeline) -> None:
        raise RuntimeError(f"{self.folder.name} is evaluated with {self.config.evaluation.bootstrap}")

    monkeypatch.setattr(Pipeline, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="titles is evaluated with 150"):
        ladder.run(changed(again, "evaluation.bootstrap=150"))


# What it needs


def test_a_ladder_that_trains_nothing_is_refused(copied: Path) -> None:
    with pytest.raises(UsageError, match=r"every rung of the ladder is fine-tuned: set training\.rows above 0"):
        ladder.run(changed(copied, "training.rows=0"))
    assert not (copied / "runs/ladder").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("store/item_texts.lance", "120 of 120 items have no description .*: run `mllm-srec describe`"),
        ("runs/main/choices.json", "runs/main/choices.json is missing: run `mllm-srec retrieve WS` first"),
        ("store/user_states.lance", r"has no state after \d+ events: run `mllm-srec comprehend`"),
    ],
)
def test_stages_that_are_not_done_are_named(copied: Path, missing: str, message: str) -> None:
    path = copied / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StoreError, match=message):
        ladder.run(Workspace.open(copied))
    assert not (copied / "runs/ladder/ladder.json").exists()

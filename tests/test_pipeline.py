"""The stages in order: each reuses what holds, refuses to run too early, and lets no figure depend on the future."""

import csv
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_srec import catalogue, items, pipeline, training_rows, users
from mllm_srec.data.split import Targets
from mllm_srec.errors import StoreError
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.pipeline import RERANKED, RETRIEVED, Lists, Pipeline
from mllm_srec.ranking import RETRIEVAL_ALONE
from mllm_srec.recommender import Choices
from mllm_srec.records import TrainingRecord
from mllm_srec.retrieval import Retriever
from mllm_srec.workspace import Workspace, read_manifest
from pipeline_helpers import LetterEncoder, changed, produced, watch_places

SYSTEMS = [
    "popularity",
    "co-occurrence",
    "content",
    "sequence encoder",
    "retrieval",
    "MLLM odds alone",
    "MLLM likelihood alone",
    "MLLM-SRec",
]


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "TextEncoder", LetterEncoder)


# Running twice


def test_a_second_run_asks_the_model_nothing_and_finds_the_same(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked")

    for method in ("generate", "ask", "score", "loglik", "embed", "read"):
        monkeypatch.setattr(LocalMllm, method, refuse)
    monkeypatch.setattr("mllm_srec.mllm.text_encoder.TextEncoder.encode", refuse)
    before = (copied / "runs/main/metrics.json").read_bytes()
    adapter = (copied / "runs/main/adapter/adapter_model.safetensors").read_bytes()
    again = Pipeline(Workspace.open(copied))
    assert again.run() == json.loads(before)
    assert again.run() == json.loads(before)  # with the adapter still on the model
    assert (copied / "runs/main/metrics.json").read_bytes() == before
    assert (copied / "runs/main/adapter/adapter_model.safetensors").read_bytes() == adapter


def test_two_runs_from_nothing_find_the_same(finished: Path, ingested: Path, tmp_path: Path) -> None:
    shutil.copytree(ingested, tmp_path / "ws")
    other = Pipeline(Workspace.open(tmp_path / "ws"))
    other.run()
    one, two = produced(Workspace.open(finished)), produced(other.workspace)
    for name in one:
        assert one[name].equals(two[name]), name
    for file in ("metrics.json", "choices.json", "adapter/adapter_model.safetensors"):
        assert (finished / "runs/main" / file).read_bytes() == (tmp_path / "ws/runs/main" / file).read_bytes(), file


def test_a_changed_key_of_users_remakes_states_and_no_items(copied: Path) -> None:
    before = produced(Workspace.open(copied))
    workspace = changed(copied, "users.recent=1")
    made = Pipeline(workspace)
    made.describe()
    made.comprehend()
    after = produced(workspace)
    for name in ("item_texts", "item_embeddings", "scores", "item_priors"):
        assert after[name].equals(before[name]), name
    assert before["user_states"]["key"].equals(after["user_states"]["key"])
    # States that only the report tells of are made again when it is.
    targets = made.training_targets
    training = {
        users.state_key(made.histories.users[u], int(e)) for u, e in zip(targets.user, targets.end, strict=True)
    }
    remade = after["user_states"]["fingerprint"] != before["user_states"]["fingerprint"]
    old, new = before["user_states"].filter(remade), after["user_states"].filter(remade)
    assert training < set(new["key"])
    assert new["recent"].list.len().max() == 1 < old["recent"].list.len().max()
    assert old.drop("fingerprint", "recent").equals(new.drop("fingerprint", "recent"))


def test_a_changed_key_of_items_remakes_their_texts(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Workspace.open(copied).rows(items.ITEM_TEXTS)
    workspace = changed(copied, "items.questions=[]")
    monkeypatch.setattr(LocalMllm, "generate", lambda *_: pytest.fail("without questions nothing is asked"))
    Pipeline(workspace).describe()
    after = workspace.rows(items.ITEM_TEXTS)
    assert not set(before["fingerprint"]) & set(after["fingerprint"])
    assert set(after["visual"]) == {""}


# Out of order


@pytest.mark.parametrize(
    ("done", "stage", "message"),
    [
        ([], "retrieve", "120 of 120 items have no description .*: run `mllm-srec describe`"),
        ([], "train", "items have no description .*: run `mllm-srec describe`"),
        ([], "comprehend", "choices.json is missing: run `mllm-srec retrieve WS` first"),
        ([], "evaluate", "items have no description .*: run `mllm-srec describe`"),
        (["describe"], "comprehend", "choices.json is missing: run `mllm-srec retrieve WS` first"),
        (["describe"], "train", r"(no state after \d+ events: run `mllm-srec comprehend`|choices.json is missing)"),
        (["describe", "retrieve"], "train", r"user 'u\d+' has no state after \d+ events: run `mllm-srec comprehend`"),
        (["describe", "retrieve"], "evaluate", r"has no state after \d+ events: run `mllm-srec comprehend`"),
    ],
)
def test_a_stage_that_comes_too_early_names_the_one_before(
    ingested: Path, finished: Path, tmp_path: Path, done: list[str], stage: str, message: str
) -> None:
    shutil.copytree(ingested, tmp_path / "ws")
    for name, of_stage in (("item_texts.lance", "describe"), ("item_embeddings.lance", "retrieve")):
        if of_stage in done:  # as the stage left it in a finished workspace
            shutil.copytree(finished / "store" / name, tmp_path / "ws/store" / name)
    if "retrieve" in done:
        (tmp_path / "ws/runs/main").mkdir(parents=True)
        shutil.copy(finished / "runs/main/choices.json", tmp_path / "ws/runs/main")
    early = Pipeline(Workspace.open(tmp_path / "ws"))
    with pytest.raises(StoreError, match=message):
        getattr(early, stage)()
    assert not (tmp_path / "ws/runs/main/metrics.json").exists()


def test_choosing_retrieval_again_keeps_the_fusion(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Choices.read(copied / "runs/main")
    workspace = changed(copied, "retrieval.weights=[3]")
    mix = Pipeline(workspace).retrieve()
    assert (mix.content, mix.sequence, mix.trend) == (3, 3, 3)
    after = Choices.read(copied / "runs/main")
    assert after == Choices(mix, after.made_of, before.retriever_epochs, before.fusion)
    assert after.made_of != before.made_of
    monkeypatch.setattr(pipeline.retrieval, "choose", None)
    assert Pipeline(workspace).retrieve() == mix, "what was chosen by the same things is not chosen again"


def test_damaged_choices_are_made_again(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Choices.read(copied / "runs/main")
    (copied / "runs/main/choices.json").write_text('{"content_weight": 1}')
    assert Pipeline(Workspace.open(copied)).retrieve() == before.retrieval
    assert "choices.json is damaged" in capsys.readouterr().err
    after = Choices.read(copied / "runs/main")
    assert (after.made_of, after.retriever_epochs) == (before.made_of, before.retriever_epochs)


# Figures


def test_metrics_stand_beside_their_conditions(finished: Path, settings: tuple[str, ...]) -> None:
    result = json.loads((finished / "runs/main/metrics.json").read_text(), parse_constant=pytest.fail)
    assert {
        "data": "shop",
        "users": 24,
        "items": 120,
        "targets": 24,
        "protocol": "leave_last_out",
        "tie_rule": "file_order",
        "repeats": "first",
        "repeats_dropped": 0,
        "min_history": 3,
        "users_too_short": 0,
        "reranked": 8,
        "model": settings[0].removeprefix("model.name="),
        "seed": 0,
    }.items() <= result["conditions"].items()
    assert list(result["systems"]) == SYSTEMS
    assert (result["reference"], result["training_rows"], result["choosing_targets"]) == (RETRIEVED, 6, 24)
    assert result["choices"] == json.loads((finished / "runs/main/choices.json").read_text())
    for system, row in result["systems"].items():
        for metric, values in row.items():
            assert 0 <= values["low"] <= values["mean"] <= values["high"] <= 1, (system, metric)
            assert ("gain" in values) == (system != RETRIEVED)
    assert read_manifest(finished / "runs/main")["model"].endswith(
        read_manifest(finished / "runs/main/adapter")["files"]["adapter_model.safetensors"]["sha256"][:16]
    )


def test_slices_of_every_cut_make_up_the_whole(finished: Path) -> None:
    result = json.loads((finished / "runs/main/metrics.json").read_text())
    told = result["slices"]
    assert (told.pop("system"), told.pop("metric")) == (SYSTEMS[-1], "NDCG@10")
    assert list(told) == ["item", "item popularity", "history length", "picture of the item", "taste", "user"]
    whole = result["systems"][SYSTEMS[-1]]["NDCG@10"]
    for cut, of_cut in told.items():
        filled = [row for row in of_cut.values() if row["n"]]
        assert sum(row["n"] for row in filled) == result["conditions"]["targets"], cut
        for value in ("mean", "gain"):
            total = sum(row["n"] * row[value] for row in filled) / result["conditions"]["targets"]
            assert total == pytest.approx(whole[value], abs=1e-9), cut
    assert told["picture of the item"]["missing"] == {"n": 0, "users": 0}  # every item of the shop is drawn


def test_users_are_told_apart_by_what_their_states_say(finished: Path) -> None:
    run = Pipeline(Workspace.open(finished))
    targets = run.chosen.test
    changed_tastes, pictures = run._tastes(targets)
    states = users.load_states(run.workspace, run.catalogue)
    stored = [
        (at, (run.histories.users[u], int(e))) for at, (u, e) in enumerate(zip(targets.user, targets.end, strict=True))
    ]
    known = [(at, states[key]) for at, key in stored if key in states]
    assert known and len(changed_tastes) == len(pictures) == len(targets)
    for at, state in known:  # what a model wrote has no part in either
        assert changed_tastes[at] == bool(state.movement.rises or state.movement.fades)
        assert pictures[at] == (state.by_origin[0] > state.by_origin[1])


def by_hand(data: Path, embeddings: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Recall@k, NDCG@k and MRR of popularity, co-occurrence and content, from the files alone, in plain loops."""
    with (data / "items.csv").open() as file:
        catalogue = [row["item_id"] for row in csv.DictReader(file)]
    histories: dict[str, list[tuple[int, str]]] = {}
    with (data / "interactions.csv").open() as file:
        for row in csv.DictReader(file):
            histories.setdefault(row["user_id"], []).append((int(row["timestamp"]), row["item_id"]))
    ordered = {user: [item for _, item in sorted(of, key=lambda pair: pair[0])] for user, of in histories.items()}
    visible = {user: of[:-1] for user, of in ordered.items()}
    popularity = Counter(itertools.chain(*visible.values()))
    together: Counter[tuple[str, str]] = Counter()
    for of in visible.values():
        for (a, one), (b, other) in itertools.combinations(enumerate(of[-50:]), 2):
            if b - a <= 10 and one != other:
                together[one, other] += 1
                together[other, one] += 1

    def company(history: list[str], item: str) -> float:
        strength = [
            together[past, item] / math.sqrt(popularity[past] * popularity[item])
            for past in history[-5:]
            if together[past, item]
        ]
        return sum(strength) + 1e-6 * popularity[item]

    def content(history: list[str], item: str) -> float:
        return sum(
            0.8**age * max(float(embeddings[past].astype(np.float64) @ embeddings[item].astype(np.float64)), 0.0) ** 5
            for age, past in enumerate(history[:-11:-1])
        )

    scorers: dict[str, Callable[[list[str], str], float]] = {
        "popularity": lambda history, item: popularity[item],
        "co-occurrence": company,
        "content": content,
    }
    table: dict[str, dict[str, float]] = {}
    for name, scorer in scorers.items():
        values: dict[str, list[float]] = {}
        for user, history in visible.items():
            wanted = scorer(history, ordered[user][-1])
            rivals = [scorer(history, i) for i in catalogue if i not in history and i != ordered[user][-1]]
            above = sum(rival > wanted + 5e-7 for rival in rivals)
            level = sum(abs(rival - wanted) <= 5e-7 for rival in rivals)
            ranks = range(above + 1, above + level + 2)  # each as likely as the others
            for k in (5, 10, 20):
                values.setdefault(f"Recall@{k}", []).append(np.mean([r <= k for r in ranks]))
                values.setdefault(f"NDCG@{k}", []).append(np.mean([(r <= k) / math.log2(r + 1) for r in ranks]))
            values.setdefault("MRR", []).append(np.mean([1 / r for r in ranks]))
        table[name] = {metric: float(np.mean(of)) for metric, of in values.items()}
    return table


def test_the_plain_systems_equal_a_computation_from_the_files(finished: Path, shop_data: Path) -> None:
    rows = Workspace.open(finished).rows(catalogue.EMBEDDINGS)
    vectors = {key: np.array(vector) for key, vector in rows.select("key", "vector").iter_rows()}
    measured = json.loads((finished / "runs/main/metrics.json").read_text())["systems"]
    for system, row in by_hand(shop_data, vectors).items():
        assert {metric: measured[system][metric]["mean"] for metric in row} == pytest.approx(row, abs=1e-9), system


def test_reranking_moves_only_targets_inside_their_list(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = watch_places(monkeypatch)
    evaluated = Pipeline(Workspace.open(copied))
    k, targets = 8, evaluated.chosen.test
    evaluated.evaluate()
    held = evaluated._lists(targets, evaluated._retriever("test")).held
    assert 0 < held.sum() < len(targets)
    retrieved = places[RETRIEVED]
    for name in ("MLLM odds alone", "MLLM likelihood alone", RERANKED):
        reranked = places[name]
        assert (reranked.greater[held] + reranked.ties[held] <= k).all()
        assert (reranked.greater[~held] >= k).all()
        same = ~held & (retrieved.greater >= k)
        assert same.any()
        assert (reranked.greater[same] == retrieved.greater[same]).all()
        assert (reranked.ties[same] == retrieved.ties[same]).all()
    assert (places["MLLM odds alone"].greater != retrieved.greater)[held].any()


def test_fewer_test_targets_are_a_seeded_part_of_them(copied: Path) -> None:
    everyone = Pipeline(Workspace.open(copied)).chosen.test
    some = Pipeline(changed(copied, "evaluation.users=7", "evaluation.choosing_users=3"))
    again = Pipeline(Workspace.open(copied))
    other = Pipeline(changed(copied, "seed=1"))
    assert len(everyone) == 24
    assert (len(some.chosen.test), len(some.chosen.choosing)) == (7, 3)
    assert some.chosen.test.user.tolist() == again.chosen.test.user.tolist() != other.chosen.test.user.tolist()
    assert set(some.chosen.test.user) < set(everyone.user)
    some.comprehend()
    result = some.evaluate()
    assert (result["conditions"]["targets"], result["choosing_targets"]) == (7, 4)


def test_where_no_validation_list_holds_its_target_retrieval_stays_and_no_chance_is_stated(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Pipeline(Workspace.open(copied))
    whole, test = run._lists, run._lists(run.chosen.test, run._retriever("test"))

    def nothing_held(targets: Targets, retriever: Retriever) -> Lists:
        lists = whole(targets, retriever)
        return lists if targets is run.chosen.test else replace(lists, held=np.zeros_like(lists.held))

    monkeypatch.setattr(run, "_lists", nothing_held)
    result = run.evaluate()
    assert test.held.any()
    assert "evaluate: no validation list holds its target" in capsys.readouterr().err
    choices = Choices.read(run.folder)
    assert (choices.fusion, choices.calibration) == (RETRIEVAL_ALONE, None)
    assert (result["choosing_targets_among_candidates"], result["calibration"]) == (0, None)
    # Their lists are retrieval's; ties may be broken within a list.
    assert result["systems"][SYSTEMS[-1]]["NDCG@10"]["mean"] == pytest.approx(
        result["systems"][RETRIEVED]["NDCG@10"]["mean"], abs=1e-6
    )


def test_no_user_is_in_both_halves_of_validation(finished: Path) -> None:
    chosen = Pipeline(Workspace.open(finished)).chosen
    assert len(chosen.choosing) == len(chosen.calibrating) == 12
    assert not set(chosen.choosing.user) & set(chosen.calibrating.user)
    assert (chosen.choosing.position == chosen.choosing.end).all()
    assert len(Pipeline(Workspace.open(finished)).training_targets) == 6


# The future


def test_nothing_of_validation_or_test_is_in_a_training_record(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    asked: list[Any] = []
    made: list[TrainingRecord] = []
    make_record, write = training_rows.training_record, training_rows.rationales.written

    def watch(*arguments: Any) -> TrainingRecord:
        calls.append(arguments)
        return make_record(*arguments)

    def watch_rationales(workspace: Any, teacher: Any, items_read: Any, wanted: Any) -> list[str]:
        asked.extend(wanted)
        return write(workspace, teacher, items_read, wanted)

    monkeypatch.setattr(training_rows, "training_record", watch)
    monkeypatch.setattr(training_rows.rationales, "written", watch_rationales)
    monkeypatch.setattr(pipeline.tuning, "train", lambda mllm, records, *_: made.extend(records))
    trained = Pipeline(changed(copied, "training.rows=1000"))
    trained.comprehend()
    trained.train()
    histories = trained.histories
    number = {user: at for at, user in enumerate(histories.users)}
    assert len(made) == len(calls) > 24
    assert len(asked) == 2 * len(calls)
    for at, (state, items_read, position, shown, rationales, _) in enumerate(calls):
        user = number[state.user_id]
        validation = histories.length(user) - 2
        own = histories.of(user)
        assert state.end <= position < validation
        assert state.recent == tuple(own[max(0, state.end - 10) : state.end])
        assert state.as_of == histories.time[histories.span(user)][state.end - 1]
        positive, *negatives = shown
        assert positive == own[position]
        assert not set(negatives) & {positive, *own[: state.end].tolist()}
        assert len(set(negatives)) == 3
        assert items_read.ids == histories.items
        assert len(rationales) == 2
        for of_row, chosen in zip(asked[2 * at : 2 * at + 2], (True, False), strict=True):
            assert of_row.state == state and of_row.chosen == chosen
            assert sorted([*of_row.history, *of_row.disliked]) == sorted(own[: state.end])


def test_negatives_and_lists_come_from_what_their_targets_may_know(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: dict[str, list[np.ndarray]] = {}
    encoded: list[np.ndarray] = []
    fit, fit_encoder = pipeline.retrieval.Retriever.fit, pipeline.sequence.fit
    stage = ""

    def watch(histories: Any, seen: np.ndarray, *rest: Any) -> Any:
        masks.setdefault(stage, []).append(seen)
        return fit(histories, seen, *rest)

    def watch_encoder(histories: Any, seen: np.ndarray, *rest: Any) -> Any:
        encoded.append(seen)
        return fit_encoder(histories, seen, *rest)

    shutil.rmtree(copied / "runs/main/encoders")
    (copied / "runs/main/choices.json").unlink()
    monkeypatch.setattr(pipeline.retrieval.Retriever, "fit", watch)
    monkeypatch.setattr(pipeline.sequence, "fit", watch_encoder)
    monkeypatch.setattr(pipeline.tuning, "train", lambda *_: None)
    drawers: list[Any] = []

    def watch_drawer(make: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(targets: Any, retriever: Any, *rest: Any) -> Any:
            drawers.append(retriever)
            return make(targets, retriever, *rest)

        return drawn

    for name in ("choose_targets", "draw_rows"):
        monkeypatch.setattr(training_rows, name, watch_drawer(getattr(training_rows, name)))
    run = Pipeline(Workspace.open(copied))
    for stage in ("retrieve", "comprehend", "train", "evaluate"):  # read by `watch`
        getattr(run, stage)()
    training = run.split.training
    first = {user: int(training.position[training.user == user].min()) for user in training.user.tolist()}
    for user, (start, stop) in enumerate(itertools.pairwise(run.histories.offsets)):
        (choosing,) = masks["retrieve"]
        assert not choosing[stop - 2 : stop].any()
        assert not run.split.seen_training[start + first[user] : stop].any()
        assert run.split.seen_training[start : start + first[user]].all()
        assert not any(mask[stop - 1] for of_stage in masks.values() for mask in of_stage)
        assert not any(mask[stop - 2] for mask in masks["train"]), "training looks at validation lists"
        assert not any(mask[stop - 1] for mask in encoded)
    counts = np.bincount(run.histories.item[run.split.seen_training], minlength=len(run.histories.items))
    assert len(drawers) == 2
    for retriever in drawers:
        np.testing.assert_array_equal(retriever.popularity, counts)
    # One encoder per part, each fitted once and then kept.
    of_parts = (run.split.seen_validation, run.split.seen_training, run.split.seen_test)
    assert len(encoded) == 3
    for seen, part in zip(encoded, of_parts, strict=True):
        np.testing.assert_array_equal(seen, part)


def test_a_run_ends_with_a_report_and_a_model_card(finished: Path) -> None:
    run = finished / "runs/main"
    page, card = ((run / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    measured = json.loads((run / "metrics.json").read_text())
    gain = measured["systems"]["MLLM-SRec"]["NDCG@10"]
    assert f"{gain['mean']:.3f}" in page and f"{gain['mean']:.3f}" in card
    assert "leave-last-out" in page and "not kept" not in page
    losses = json.loads((run / "adapter/losses.json").read_text())
    assert [row["step"] for row in losses] == [1, 2, 3]  # six rows, two per step
    assert all(row["loss"] > 0 for row in losses)
    assert {"report.html", "MODEL_CARD.md", "encoders/test.safetensors"} <= set(read_manifest(run)["files"])

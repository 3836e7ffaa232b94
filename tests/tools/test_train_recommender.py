"""What the head start is taught: users before one of their choices, nothing newer, and the weights that are shipped."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_recommender
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from train_recommender import NEGATIVES, first_place, lesson
from training_users import Simulated, simulate

from fakes import FakeMllm
from mllm_srec import tuning
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.records import TrainingRecord, ranking_request
from mllm_srec.training_rows import REASONED
from tiny_models import tiny_mllm

SEEDS = st.integers(0, 2**32 - 1)
ADAPTER = "adapter_model.safetensors"


def watched(seed: int) -> tuple[TrainingRecord, Simulated, tuple[Any, ...]]:
    """A lesson, whose user it is about, and what its record was made of."""
    users: list[Simulated] = []
    made: list[tuple[Any, ...]] = []
    make_record = train_recommender.training_record

    def watch_users(generator: np.random.Generator) -> Simulated:
        users.append(simulate(generator))
        return users[-1]

    def watch_record(*arguments: Any) -> TrainingRecord:
        made.append(arguments)
        return make_record(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_recommender, "simulate", watch_users)
        patch.setattr(train_recommender, "training_record", watch_record)
        record = lesson(np.random.default_rng(seed))
    return record, users[-1], made[-1]


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_lesson_asks_for_a_liked_choice_among_what_was_not_chosen_up_to_then(seed: int) -> None:
    record, user, (state, catalogue, end, items, told) = watched(seed)
    history = user.history
    assert catalogue is user.catalogue
    assert items[0] == history.items[end] and not history.disliked[end]
    assert len(set(items)) == len(items) == 1 + NEGATIVES
    assert not set(items[1:]) & set(history.items[: end + 1].tolist())
    assert record.request == ranking_request(state, catalogue, items)
    assert [at for at, _ in record.cot] == list(range(REASONED))
    assert [text.rsplit(" ", 1)[1] for text in told] == ["Yes", "No"]
    assert record.retrieval == ()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_lesson_knows_nothing_newer_than_the_choice(seed: int) -> None:
    record, user, (state, catalogue, end, _, told) = watched(seed)
    history = user.history
    assert history.time is not None
    assert (state.end, state.as_of) == (end, history.time[end - 1])
    assert state.waited == history.time[end] - history.time[end - 1]
    known = set(history.items[:end].tolist())
    assert set(state.recent) <= known
    assert {state.typical, state.newest} - {None} <= known
    newer = {catalogue.lines[item] for item in history.items[end + 1 :]} - {catalogue.lines[item] for item in known}
    listed = record.request.prefix.parts[0].split("\n")  # type: ignore[union-attr]
    assert not {f"- {line}" for line in newer} & set(listed)
    for text in told:
        assert not any(f"like {line}" in text for line in newer)


def test_lessons_are_seeded_and_differ() -> None:
    one, again = (lesson(np.random.default_rng(5)) for _ in range(2))
    assert one == again
    generator = np.random.default_rng(5)
    several = [lesson(generator) for _ in range(12)]
    assert several[0] == one
    assert len({str(record) for record in several}) == 12
    prefixes = [str(record.request.prefix.parts[0]) for record in several]
    assert len({prefix.count("\n- ") for prefix in prefixes}) > 3  # as many last choices as users may configure


def test_half_of_the_negatives_are_near_to_the_last_choices_and_not_the_nearest() -> None:
    near, far, nearest = [], [], 0
    for seed in range(40):
        _, user, (_, catalogue, end, items, _) = watched(seed)
        facts, last = catalogue.facts, user.history.items[max(0, end - 5) : end]

        def close(item: int, facts: Any = facts, last: Any = last) -> float:
            return float(np.mean([len(facts[item].keys() & facts[other].keys()) for other in last]))

        hard, rest = items[1 : 1 + NEGATIVES // 2], items[1 + NEGATIVES // 2 :]
        near.append(np.mean([close(item) for item in hard]))
        far.append(np.mean([close(item) for item in rest]))
        free = set(range(len(facts))) - set(user.history.items[: end + 1].tolist())
        nearest += set(hard) == set(sorted(free, key=close)[-NEGATIVES // 2 :])
    assert np.mean(near) > np.mean(far) + 0.1  # in facts shared with a choice
    assert nearest < 10


def asked(*candidates: str) -> TrainingRecord:
    return TrainingRecord(Request(Prompt(("Item: ",)), candidates, "?"), ())


def test_the_share_of_first_places_and_the_loss_by_hand() -> None:
    odds = {"one": 1.0, "none": 0.0, "nil": 0.0, "minus": -1.0}
    mllm: Any = FakeMllm(odds=lambda before, candidate: odds[candidate])
    assert first_place(mllm, [asked("one", "none", "minus")]) == (
        1.0,
        pytest.approx(math.log(math.e + 1 + 1 / math.e) - 1),
    )
    # A tie of two is half a first place; behind another one is none.
    share, loss = first_place(mllm, [asked("none", "nil", "minus"), asked("minus", "nil", "one")])
    assert share == pytest.approx(0.25)
    total = math.log(2 + 1 / math.e) + math.log(math.e + 1 + 1 / math.e) + 1
    assert loss == pytest.approx(total / 2)


def test_what_is_shipped_is_a_head_start_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_recommender, "load_mllm", lambda config: tiny_mllm())
    monkeypatch.setattr(train_recommender, "HELD", 3)
    work, out = tmp_path / "work", tmp_path / "out"
    arguments = ["train_recommender.py", "--work", str(work), "--out", str(out), "--rows", "12"]
    monkeypatch.setattr(sys, "argv", arguments)
    train_recommender.main()
    assert {path.name for path in out.iterdir()} == {ADAPTER, "adapter_config.json", "figures.json"}
    figures = json.loads((out / "figures.json").read_text())
    assert figures == json.loads(capsys.readouterr().out)
    assert figures["rows"] == 12
    assert figures["chance"] == [pytest.approx(1 / 9), pytest.approx(math.log(9))]
    assert figures["before"] != figures["after"]
    shipped, trained = load_file(out / ADAPTER), load_file(work / "adapter" / ADAPTER)
    for name, weight in trained.items():
        assert shipped[name].dtype == torch.bfloat16
        torch.testing.assert_close(shipped[name].float(), weight, atol=0, rtol=2**-8)

    mllm = tiny_mllm()
    mllm.head_start = out
    mllm.attach_adapter(rank=16, top_layers=12, seed=0)
    mllm.take_head_start()
    assert "without the head start" not in capsys.readouterr().err
    held = [lesson(np.random.default_rng([12, number])) for number in range(3)]
    assert first_place(mllm, held)[1] == pytest.approx(figures["after"][1], abs=0.05)

    # What is trained is not trained again.
    before = (out / ADAPTER).read_bytes()
    monkeypatch.setattr(tuning, "row_loss", lambda *_: pytest.fail("trained again"))
    train_recommender.main()
    assert (out / ADAPTER).read_bytes() == before
    assert json.loads((out / "figures.json").read_text()) == figures

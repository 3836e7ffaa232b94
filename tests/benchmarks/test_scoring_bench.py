"""The measures of benchmarks/scoring.py by known answers, and its ways to score on a tiny model."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_srec.mllm import attention
from mllm_srec.mllm import scoring as packing
from mllm_srec.mllm.local import LocalMllm
from tiny_models import tiny_mllm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import common
import scoring as program
import scoring_ways as ways

TOLERANCE = 1e-4
SEGMENTS = (20, 14, 25, 17, 12, 30)


@pytest.fixture(scope="module")
def mllm() -> LocalMllm:
    return tiny_mllm("llava")


def bench(folder: Path, limit: int = 0) -> common.Bench:
    return common.Bench(folder, folder, limit)


# Samples


def test_a_sample_has_exact_lengths_and_no_special_tokens(mllm: LocalMllm) -> None:
    sample = ways.draw(mllm, 40, SEGMENTS, [1, 2])
    assert [len(prompt) for prompt in sample.prompts] == [40 + length for length in SEGMENTS]
    assert all(prompt[:40] == sample.prefix and prompt[-11:] == sample.question for prompt in sample.prompts)
    assert not {token for prompt in sample.prompts for token in prompt} & mllm.renderer.special_ids
    assert ways.draw(mllm, 40, SEGMENTS, [1, 2]) == sample != ways.draw(mllm, 40, SEGMENTS, [1, 3])
    assert sample.first(2).prompts == sample.prompts[:2]


def test_a_segment_needs_room_for_a_candidate(mllm: LocalMllm) -> None:
    assert len(ways.draw(mllm, 5, [12], [0]).candidates[0]) == 1
    with pytest.raises(ValueError, match="11 tokens"):
        ways.draw(mllm, 5, [20, 11], [0])


# The ways


@pytest.mark.parametrize("short", [True, False])
def test_all_ways_give_the_log_odds_of_the_whole_model(
    mllm: LocalMllm, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SHORT_TOKENS", 512 if short else 0)
    sample = ways.draw(mllm, 40, SEGMENTS, [5])
    yes, no = mllm.renderer.label_ids
    with torch.inference_mode():
        logits = [mllm.model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in sample.prompts]
    odds = np.array([float(row[yes] - row[no]) for row in logits])
    assert odds.std() > 0.1  # so that a candidate in another one's place would be seen
    named: dict[str, Callable[[], np.ndarray]] = {
        "packed": lambda: ways.packed(mllm, sample),
        "prefix kept": lambda: ways.packed(mllm, sample, forget=False),
        **{
            way: lambda way=way: getattr(ways, way)(mllm, sample)  # type: ignore[misc]
            for way in ("with_likelihood", "per_candidate", "padded_batch", "generate30")
        },
    }
    for name, way in named.items():
        assert np.abs(way() - odds).max() <= TOLERANCE, name
    assert len(mllm.prefixes) == (0 if short else 1)


def test_a_kept_prefix_is_read_again_only_where_it_is_forgotten(
    mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ways.draw(mllm, 40, SEGMENTS, [6])
    ways.packed(mllm, sample, short=0)
    monkeypatch.setattr(packing, "_read_prefix", lambda *_: pytest.fail("read again"))
    ways.packed(mllm, sample, forget=False, short=0)
    with pytest.raises(pytest.fail.Exception, match="read again"):
        ways.packed(mllm, sample, short=0)


def test_generate30_generates_thirty_tokens(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    plain = mllm.model.generate

    def generate(**given: Any) -> Any:
        made = plain(**given)
        lengths.append(made.sequences.shape[1] - given["input_ids"].shape[1])
        return made

    monkeypatch.setattr(mllm.model, "generate", generate)
    ways.generate30(mllm, ways.draw(mllm, 20, [15, 13], [0]))
    assert lengths == [30, 30]


def test_every_form_gives_the_same_log_odds_and_leaves_no_trace(mllm: LocalMllm) -> None:
    before = attention.merged, dict(packing.ROW_TOKENS)
    sample = ways.draw(mllm, 40, [25] * 6, [7])  # more than a batch of 4
    expected = ways.per_candidate(mllm, sample)
    found = ways.forms(mllm, sample)
    assert len(found) == 2 * len(ways.BUDGETS) + 1
    for name, form in [*found.items(), *found.items()]:  # a form leaves prefix and cache to the next one
        assert np.abs(form() - expected).max() <= TOLERANCE, name
    assert (attention.merged, dict(packing.ROW_TOKENS)) == before


def test_a_form_is_the_one_that_its_name_says(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = attention.masked

    def masked(*given: Any) -> torch.Tensor:
        rows.append(given[0].shape[2])
        return plain(*given)

    monkeypatch.setattr(attention, "masked", masked)
    found = ways.forms(mllm, ways.draw(mllm, 40, [100] * 6, [8]))
    for name, form in found.items():
        if not name.startswith("masked"):
            form()
    assert not rows
    found["masked, rows of 512"]()
    found["masked, rows of 1024"]()
    layers = 3
    assert rows == [500] * layers + [100] * layers + [600] * layers


def test_a_timing_is_the_mean_of_its_calls(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert ways.timed(mllm, lambda: calls.append(1) or len(calls), 3) == (2.0, 3)  # type: ignore[func-returns-value]


# Rounds

POINT = program.Point(
    30, 4, segment=14, rounds=3, slow=(("generate30", 1), ("per_candidate", 2), ("padded_batch", 9)), headline=True
)


def test_a_round_scales_what_it_timed_on_fewer_candidates(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "CALLS", 8)
    repeated: list[int] = []

    def timed(_: LocalMllm, work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
        repeated.append(repeats)
        return 2.0, work()

    monkeypatch.setattr(ways, "timed", timed)
    found = program.one_round(mllm, POINT, 1)
    assert found["seconds"] == {
        "packed": 2,
        "prefix kept": 2,
        "packed + likelihood": 2,
        "generate30": 8,  # one of four
        "per_candidate": 4,  # two of four
        "padded_batch": 2,  # all four
    }
    assert sorted(repeated) == [1, 1, 1, 2, 2, 2, 2]  # once: generate30, the prefill's rows, the second request
    assert found["tokens_per_second"] == 6 * 512 / 2
    assert set(found["differences"]) == set(found["seconds"]) - {"per_candidate"}
    assert max(found["differences"].values()) <= TOLERANCE < found["deviation"]


def test_every_round_begins_with_another_way(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(way: str) -> Callable[..., np.ndarray]:
        return lambda *_, **__: order.append(way) or np.zeros(4, dtype=np.float32)  # type: ignore[func-returns-value]

    for way in ("packed", "with_likelihood", "generate30", "per_candidate", "padded_batch", "prefill"):
        monkeypatch.setattr(ways, way, noted(way))
    firsts = set()
    for number in range(6):
        order.clear()
        program.one_round(mllm, program.Point(30, 4, segment=14), number)
        ran = order[4:]  # behind the warm-up
        assert len(ran) == len(set(ran)) == 6
        firsts.add(ran[0])
    assert len(firsts) == 6


def test_differences_are_the_largest_over_what_both_scored() -> None:
    odds = {
        "per_candidate": np.array([1.0, 2.0, 3.0]),
        "packed": np.array([1.0, 2.5, 2.0, 99.0]),
        "generate30": np.array([0.75]),
    }
    assert program.differences(odds) == {"packed": 1.0, "generate30": 0.25}


# Summaries


def a_round(packed: float, rate: float = 100.0, **others: float) -> dict[str, Any]:
    seconds = {
        "packed": packed,
        "packed + likelihood": packed * 1.5,
        "padded_batch": 12.0,
        "per_candidate": 12.0,
        "generate30": 36.0,
        **others,
    }
    apart = {way: packed / 100 for way in seconds if way != "per_candidate"}
    return {"seconds": seconds, "tokens_per_second": rate, "differences": apart, "deviation": packed / 10}


def test_ratios_are_the_medians_of_the_rounds_own_ratios() -> None:
    point = program.Point(40, 4, segment=15, slow=POINT.slow, headline=True)  # 100 tokens, 60 of candidates
    rounds = [
        a_round(2.0, 100.0, **{"prefix kept": 0.6}),  # limit 1 s, candidates only 0.6 s
        a_round(3.0, 50.0, **{"prefix kept": 2.4}),  # 2 s, 1.2 s
        a_round(1.0, 125.0, **{"prefix kept": 0.6}),  # 0.8 s, 0.48 s
    ]
    found = program.summary(point, rounds)
    assert found["seconds"]["limit"] == {"value": 1.0, "least": 0.8, "most": 2.0}
    assert found["tokens_per_second"] == {"value": 100.0, "least": 50.0, "most": 125.0}
    ratios = found["ratios"]
    assert ratios["padded_batch / packed"] == {"value": 6, "least": 4, "most": 12, "mark": 5, "met": True}
    assert ratios["per_candidate / packed"] == {"value": 6, "least": 4, "most": 12, "mark": 5.5, "met": True}
    assert ratios["generate30 / packed"] == {"value": 18, "least": 12, "most": 36, "mark": 20, "met": False}
    assert ratios["limit / packed"] == {"value": 2 / 3, "least": 0.5, "most": 0.8, "mark": 0.85, "met": False}
    assert ratios["packed + likelihood / packed"] == {"value": 1.5, "least": 1.5, "most": 1.5}
    kept = ratios[program.KEPT]
    assert (kept["value"], kept["least"], kept["most"]) == pytest.approx((1.25, 1, 2))
    assert (kept["mark"], kept["met"]) == ("at most 1.2", False)
    assert found["differences"]["packed"] == 0.03 and found["deviation"] == 0.2
    assert found["rounds"] == 3 and program.GROWTH not in ratios


def test_what_was_scaled_says_of_how_many() -> None:
    found = program.summary(program.Point(40, 4, slow=POINT.slow), [a_round(2.0)])
    scaled = {way: of["scaled_from"] for way, of in found["seconds"].items() if "scaled_from" in of}
    assert scaled == {"generate30": 1, "per_candidate": 2}


@pytest.mark.parametrize(("packed", "met"), [(12.0, True), (12.6, True), (13.0, False)])
def test_packed_may_be_a_twentieth_slower_than_a_padded_batch(packed: float, met: bool) -> None:
    ratios = program.summary(program.Point(40, 4), [a_round(packed)])["ratios"]
    assert ratios["padded_batch / packed"]["met"] is met
    assert [name for name, of in ratios.items() if "mark" in of] == ["padded_batch / packed"]


@pytest.mark.parametrize(("packed", "value", "met"), [(10.0, 1.0, True), (11.0, 1.1, True), (12.0, 1.2, False)])
def test_the_cost_per_candidate_is_compared_with_that_of_the_first(packed: float, value: float, met: bool) -> None:
    point = program.Point(40, 1000, part=100)
    growth = program.summary(point, [a_round(packed, part=1.0)])["ratios"][program.GROWTH]
    assert growth["value"] == pytest.approx(value) and growth["met"] is met


def test_forms_are_compared_with_the_fastest_of_their_round() -> None:
    rounds = [
        {"seconds": {"merged": 2.0, "masked": 3.0}, "differences": {"merged": 0.1, "masked": 0.3}},
        {"seconds": {"merged": 4.0, "masked": 2.0}, "differences": {"merged": 0.2, "masked": 0.1}},
        {"seconds": {"merged": 1.0, "masked": 2.0}, "differences": {"merged": 0.1, "masked": 0.1}},
    ]
    found = program.forms_summary(rounds)
    assert found["to the fastest"]["merged"] == {"value": 1.0, "least": 1.0, "most": 2.0}
    assert found["to the fastest"]["masked"] == {"value": 1.5, "least": 1.0, "most": 2.0}
    assert found["seconds"]["merged"]["value"] == 2.0 and found["differences"] == {"merged": 0.2, "masked": 0.3}


# Resuming


def test_a_finished_round_is_not_measured_again(
    mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def one_round(_: LocalMllm, __: program.Point, number: int) -> dict[str, Any]:
        measured.append(number)
        return a_round(number + 1.0)

    monkeypatch.setattr(program, "one_round", one_round)
    point = program.Point(40, 4, rounds=2)
    first = program.measure(bench(tmp_path), mllm, point, 0)
    assert measured == [0, 1] and first["seconds"]["packed"]["value"] == 1.5
    assert program.measure(bench(tmp_path), mllm, point, 0) == first and measured == [0, 1]
    assert program.measure(bench(tmp_path), mllm, point, 3)["rounds"] == 3 and measured == [0, 1, 2]
    program.measure(bench(tmp_path), mllm, program.Point(41, 4, rounds=1), 0)
    monkeypatch.setattr(mllm, "batch_size", 8)
    program.measure(bench(tmp_path), mllm, point, 1)
    assert measured == [0, 1, 2, 0, 0]


def test_a_limit_takes_fewer_candidates_and_rounds(
    mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "one_round", lambda *_: a_round(1.0, **{"prefix kept": 1.0, "part": 1.0}))
    monkeypatch.setattr(program.one_round, "__name__", "one_round")

    def seen(limit: int, rounds: int) -> list[tuple[int, int, int]]:
        found = program.points(bench(tmp_path, limit), mllm, rounds)
        return [(of["prefix"], of["candidates"], of["rounds"]) for of in found]

    assert seen(2, 0) == [(400, 2, 2), (400, 1, 2), (100, 2, 2), (1000, 2, 2), (2000, 2, 2)]
    assert seen(4, 1)[:2] == [(400, 4, 1), (400, 1, 1)]
    others = [(400, 1, 3), (400, 10, 3), (400, 200, 3), (400, 1000, 3), (100, 50, 3), (1000, 50, 3), (2000, 50, 3)]
    assert seen(0, 0) == [(400, 50, 5), *others]


# Memory


def test_memory_beyond_the_model_is_seen(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    small = program.watched(mllm, 8)
    assert all(of["met"] and abs(of["value"]) < 0.2 for of in small.values()), small

    def greedy(_: LocalMllm, sample: ways.Sample, **__: bool) -> int:
        return int(np.ones(50_000_000 * (len(sample.candidates) > 4), dtype=np.int64).sum())  # 0.4 GB

    monkeypatch.setattr(ways, "packed", greedy)
    monkeypatch.setattr(program, "MEMORY_MARK_GB", 0.3)
    found = program.watched(mllm, 8)
    assert 0.35 < found["packed"]["value"] < 0.5 and not found["packed"]["met"]


# Showing


def test_tables_mark_what_was_scaled_or_missed(capsys: pytest.CaptureFixture[str]) -> None:
    point = program.Point(40, 4, slow=POINT.slow, headline=True)
    program.show_points([program.summary(point, [a_round(2.0, **{"prefix kept": 1.0})])])
    told = capsys.readouterr().out
    assert "36*" in told and "12*" in told and "2*" not in told.replace("12*", "")
    assert "18.00 (18.00 to 18.00)  misses 20.0" in told and "6.00 (6.00 to 6.00)  meets 5.0" in told


def test_sections_on_a_tiny_model(
    mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(program, "load", lambda *given: asked.append(given) or mllm)  # type: ignore[func-returns-value]
    monkeypatch.setattr(program, "POINTS", (POINT,))
    monkeypatch.setattr(program, "FORMS_PREFIXES", (40,))
    given = [
        "scoring.py",
        "--work",
        str(tmp_path),
        "--limit",
        "3",
        "--rounds",
        "1",
        "--sections",
        "points,parity,forms",
    ]
    monkeypatch.setattr(sys, "argv", [*given, "--json"])
    program.main()
    found = json.loads(capsys.readouterr().out)
    assert asked == [("cpu",), ("cpu", "float32")]
    assert list(found["sections"]) == ["points", "parity", "forms"] and found["model"] == mllm.identity
    (point,) = found["sections"]["points"]
    assert (point["candidates"], point["rounds"]) == (3, 1) and max(point["differences"].values()) <= TOLERANCE
    parity = found["sections"]["parity"]["differences"]
    assert all(of["met"] for of in parity.values()) and {"packed", "prefix kept", "generate30"} <= set(parity)
    (forms,) = found["sections"]["forms"]
    assert max(forms["differences"].values()) <= TOLERANCE
    monkeypatch.setattr(sys, "argv", given)
    program.main()
    told = capsys.readouterr().out
    assert "points: prefix 30, 3 candidates" in told and "parity: float32" in told and "repeated cache" in told


def test_parity_misses_where_a_way_is_wrong(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ways.padded_batch
    monkeypatch.setattr(ways, "padded_batch", lambda *given: plain(*given) + np.float32(0.01))
    found = program.compare(mllm, 30, SEGMENTS)["differences"]
    assert not found["padded_batch"]["met"] and found["packed"]["met"]


def test_an_unknown_section_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scoring.py", "--sections", "points,speed"])
    with pytest.raises(SystemExit):
        program.main()
    assert "unknown section 'speed': choose from points, parity, forms, memory" in capsys.readouterr().err

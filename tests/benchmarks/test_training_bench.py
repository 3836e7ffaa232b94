"""The measures of benchmarks/training.py by known answers, and every section on a tiny model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_srec.mllm.local import LocalMllm
from tiny_models import tiny_mllm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import common
import training

SMALL = training.Layout(prefix=24, candidates=3, segment=6)
WORKS = [*training.WAYS, training.READING, training.PREFILL]


@pytest.fixture
def mllm() -> LocalMllm:
    return tiny_mllm("llava")


@pytest.fixture
def run(mllm: LocalMllm, tmp_path: Path) -> training.Run:
    made = training.Run(common.Bench(tmp_path, tmp_path, 0), "cpu", 2)
    made.__dict__.update(layout=SMALL, mllm=mllm, exact=mllm)
    return made


# Rows


def test_the_ceiling_is_the_ratio_of_tokens() -> None:
    assert (training.Layout().packed, training.Layout().separate) == (1140, 5940)
    assert training.Layout().ceiling == pytest.approx(5.2105, abs=1e-4)
    assert training.Layout(candidates=10).ceiling == 5.5
    assert (SMALL.packed, SMALL.separate, SMALL.ceiling) == (42, 90, 90 / 42)


@pytest.mark.parametrize(("limit", "candidates"), [(0, 9), (1, 2), (2, 2), (5, 5), (50, 9)])
def test_a_limit_leaves_at_least_the_two_candidates_that_a_loss_needs(limit: int, candidates: int) -> None:
    assert training.Run(common.Bench(Path(), Path(), limit), "cpu", 1).layout.candidates == candidates


def test_a_row_has_the_lengths_of_its_layout_and_no_special_tokens(mllm: LocalMllm) -> None:
    row = training.make_row(mllm, SMALL)
    assert len(row.prefix) == 24 and [len(segment) for segment in row.segments] == [6, 6, 6]
    assert not mllm.renderer.special_ids & {*row.prefix, *(token for segment in row.segments for token in segment)}
    assert training.make_row(mllm, SMALL) == row


# Equal losses and gradients


@pytest.mark.parametrize("way", [training.CHECKPOINTED, training.ALONE, training.BATCH])
def test_every_way_gives_the_packed_rows_loss_and_gradients(mllm: LocalMllm, way: str) -> None:
    row = training.make_row(mllm, SMALL)
    packed = training.gradients(mllm, row, training.PACKED)
    assert all(of.abs().max() > 0 for of in packed[1].values())
    found = training.apart(training.gradients(mllm, row, way), packed)
    assert found["loss"] < 1e-4 and found["gradients"] < 1e-4


def test_a_lost_token_is_seen_in_loss_and_gradients(mllm: LocalMllm) -> None:
    row = training.make_row(mllm, SMALL)
    short = training.Row(row.prefix[1:], row.segments)
    found = training.apart(
        training.gradients(mllm, short, training.PACKED), training.gradients(mllm, row, training.ALONE)
    )
    assert found["loss"] > 1e-3 and found["gradients"] > 1e-2


def test_gradients_differ_by_the_worst_tensors_greatest_difference() -> None:
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.1])}
    theirs = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.2])}
    assert training.apart((1.0, ours), (3.0, theirs)) == {"loss": 2.0, "gradients": 1.5}
    broken = training.apart((1.0, ours), (3.0, theirs | {"b": torch.tensor([float("nan")])}))
    assert not common.at_most({"value": broken["gradients"]}, training.PARITY)["met"]
    with pytest.raises(ValueError, match="same tensors"):
        training.apart((1.0, ours), (3.0, {"a": theirs["a"]}))


def test_checkpointed_layers_are_read_twice_and_those_below_the_adapter_once(mllm: LocalMllm) -> None:
    row = training.make_row(mllm, SMALL)
    decoder = mllm.model.get_decoder()
    read: list[tuple[int, bool]] = []
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.register_forward_hook(
            lambda _, __, out, number=number: read.append((number, out[0].requires_grad))
        )
    plain = [(0, False), (1, False), (2, True)]
    with training.adapted(mllm, 1) as tensors:
        optimizer = torch.optim.AdamW(tensors.values())
        for way, expected in ((training.CHECKPOINTED, [*plain, (2, True)]), (training.PACKED, plain)):
            training.step(mllm, row, way, optimizer)
            assert read == expected
            read.clear()
    assert not decoder.training and not mllm.has_adapter


# Rounds


def a_round(packed: float, alone: float, batch: float) -> dict[str, dict[str, float]]:
    """Of a step one half is forward, a quarter each backward and the optimiser."""
    steps = {training.PACKED: packed, training.CHECKPOINTED: 2 * packed, training.ALONE: alone, training.BATCH: batch}
    phases = {way: {"forward": step / 2, "backward": step / 4, "optimizer": step / 4} for way, step in steps.items()}
    prefill = training.PREFILL_ROWS * training.PREFILL_TOKENS / 84  # 84 tokens per second
    return phases | {training.READING: {"forward": packed / 4}, training.PREFILL: {"forward": prefill}}


def test_ratios_of_speed_are_the_medians_of_the_rounds() -> None:
    found = training.medians([a_round(2, 10, 8), a_round(4, 8, 12), a_round(1, 6, 10)], SMALL, all_layers=True)
    ratios = found["ratios"]
    faster = {"value": 4, "least": 2, "most": 6, "mark": 4, "met": True}
    assert ratios["faster separate way / packed"] == faster
    assert ratios[f"{training.ALONE} / packed"] == {"value": 5, "least": 2, "most": 6}
    assert ratios[f"{training.CHECKPOINTED} / packed"]["value"] == 2
    assert found["users_per_second"][training.PACKED] == {"value": 0.5, "least": 0.25, "most": 1}
    assert found["seconds"][training.BATCH]["step"]["value"] == 10
    assert found["seconds"][training.BATCH]["backward"]["value"] == 2.5
    # 42 tokens in three quarters of 2 seconds, without the optimiser's
    assert found["tokens_per_second"]["packed, forward and backward"]["value"] == 28
    assert found["tokens_per_second"][training.READING]["value"] == 84
    share = ratios["forward and backward / plain prefill"]
    assert share["value"] == pytest.approx(1 / 3) and share["met"]
    assert ratios["forward only / plain prefill"]["value"] == pytest.approx(1)


def test_a_miss_is_told_and_the_share_is_a_mark_for_all_layers_only() -> None:
    ratios = training.medians([a_round(4, 12, 20)], SMALL, all_layers=True)["ratios"]
    assert not ratios["faster separate way / packed"]["met"]
    assert ratios["forward and backward / plain prefill"]["value"] == pytest.approx(1 / 6)
    assert not ratios["forward and backward / plain prefill"]["met"]
    ratios = training.medians([a_round(4, 12, 20)], SMALL, all_layers=False)["ratios"]
    assert ratios["faster separate way / packed"]["mark"] == 4
    assert "mark" not in ratios["forward and backward / plain prefill"]


def test_every_round_begins_with_another_way_and_has_them_all(mllm: LocalMllm) -> None:
    row = training.make_row(mllm, SMALL)
    orders = [list(training.one_round(mllm, row, 1, number)) for number in (0, 1, 6)]
    assert set(orders[0]) == set(WORKS)
    assert orders[1] == orders[0][1:] + orders[0][:1] and orders[2] == orders[0]


def test_the_peak_counts_what_was_given_back_before_it_ends() -> None:
    def work() -> None:
        torch.ones(12_500_000)  # 50 MB

    assert 45 < common.peak("cpu", work) < 60
    assert common.peak("cpu", lambda: None) < 5


def test_the_peak_counts_what_memory_freed_before_could_hold() -> None:
    torch.ones(8_000_000)  # 32 MB: blocks up to this size come from the heap from now on
    blocks = [torch.ones(5_000_000) for _ in range(8)]  # 160 MB
    del blocks[:-1]  # the heap cannot shrink below the last
    assert 45 < common.peak("cpu", lambda: torch.ones(12_500_000)) < 60


# Sections


@pytest.mark.parametrize("name", training.SECTIONS)
def test_a_section_is_told_again_without_the_model(
    name: str, run: training.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, show = training.SECTIONS[name]
    first = measure(run)
    show(first)
    told = capsys.readouterr().out

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    for work in ("one_round", "step", "gradients"):
        monkeypatch.setattr(training, work, refuse)
    assert measure(run) == first
    show(first)
    assert capsys.readouterr().out == told != ""
    assert not run.mllm.has_adapter
    run.__dict__["layout"] = training.Layout(24, 4, 6)
    with pytest.raises(AssertionError, match="measured again"):
        measure(run)


def test_parity_is_a_mark_in_float32_only(run: training.Run) -> None:
    found = training.parity(run)
    marked = found.pop("float32, packed against separate")
    assert all(of["met"] and of["mark"] == "at most 0.0001" for of in marked.values())
    assert {type(value) for of in found.values() for value in of.values()} == {float}


def test_the_profile_shares_out_the_time_of_the_step(run: training.Run) -> None:
    found = training.profile(run)
    shares = [op["share"] for op in found["ops"]]
    assert len(shares) == training.OPS and shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1
    assert "aten::mm" in {op["name"] for op in found["ops"]}
    assert found["ops"][0]["seconds"] == pytest.approx(shares[0] * found["seconds"])


@pytest.fixture
def program(
    mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Standard output of the program called with these arguments."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(training.Run, "_load", lambda *_: mllm)
        monkeypatch.setattr(sys, "argv", ["training.py", "--work", str(tmp_path), *arguments])
        training.main()
        return capsys.readouterr().out

    return call


def test_the_program_prints_one_object(program: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(training.SECTIONS, "memory")  # takes longest
    found: dict[str, Any] = json.loads(program("--json", "--limit", "2", "--rounds", "1"))
    assert list(found["sections"]) == ["speed", "parity", "profile"]
    assert (found["model"], found["device"], found["limit"]) == ("tiny-llava-0:float32", "cpu", 2)
    speed = found["sections"]["speed"]
    assert speed["layout"]["packed"] == 720 and list(speed["adapters"]) == ["last 12 layers", "all layers"]


@pytest.mark.parametrize("arguments", [("--rounds", "0"), ("--limit", "-1"), ("--device", "tpu")])
def test_arguments_that_measure_nothing_are_refused(program: Callable[..., str], arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        program(*arguments)

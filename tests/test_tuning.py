import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft.utils.save_and_load
import pytest
import torch
from safetensors.torch import load_file

from fakes import CATALOGUE, make_state
from mllm.separate_prompts import separate
from mllm_srec import tuning
from mllm_srec.config import Config, Objective, TrainingConfig
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.pieces import Piece
from mllm_srec.prompts import ranking as prompts
from mllm_srec.records import TrainingRecord, explain_questions, ranking_request, training_record
from mllm_srec.tuning import ANSWER_WEIGHT, COT_WEIGHT, row_loss, train
from tiny_models import KINDS, drawing, tiny_mllm, tiny_tokenizer

SHIRT, SHOE, HAT = "a blue shirt", "a red shoe", "a green hat"
ADAPTER = "adapter_model.safetensors"


def record(
    liked: str = "red", positive: str = SHOE, negatives: tuple[str, ...] = (SHIRT, HAT), *parts: Any
) -> TrainingRecord:
    prefix = Prompt((*parts, f"The user likes {liked}.\nItem: "), system=prompts.SYSTEM)
    cot = ((0, f"It meets the taste for {liked}. Yes"), (1, "None of its facts meets the known taste. No"))
    return TrainingRecord(Request(prefix, (positive, *negatives), prompts.QUESTION), cot)


RECORDS = [record(), record("blue", SHIRT, (HAT, SHOE)), record("green", HAT, (SHOE, SHIRT))]


def settings(**changes: Any) -> Config:
    training = {"epochs": 4, "rank": 4, "top_layers": 2, "learning_rate": 1e-2, "accumulate": 1, "save_steps": 2}
    return Config(training=TrainingConfig(**{**training, **changes}))


@pytest.fixture
def mllm() -> LocalMllm:
    return tiny_mllm()


# The loss


@torch.no_grad()
def expected_loss(mllm: LocalMllm, row: TrainingRecord, objective: Objective = "both") -> float:
    """The loss from ordinary prompts, one per candidate and one per rationale, through the model's own logits."""
    shown, asked = mllm.renderer, row.request

    def logits(parts: tuple[Any, ...], behind: list[int]) -> torch.Tensor:
        prompt = Prompt(parts, system=asked.prefix.system)
        pictures = [part for part in parts if not isinstance(part, str)]
        inputs = shown.encode([shown.text(prompt)], [pictures], "right")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([behind], dtype=torch.long)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(behind)))
        return torch.as_tensor(mllm.model(**inputs).logits[0])

    def listwise(readings: list[float]) -> float:
        beside = row.retrieval or (0.0,) * len(readings)
        values = [value + 0.5 * own for value, own in zip(readings, beside, strict=True)]
        return math.log(sum(map(math.exp, values))) - values[0]

    yes, no = shown.label_ids
    *front, last = asked.prefix.parts
    odds, answers = [], []
    for at, candidate in enumerate(asked.candidates):
        told = logits((*front, f"{last}{candidate}{asked.note(at)}{prompts.QUESTION}"), [])[-1]
        odds.append(float(told[yes] - told[no]))
        answers.append(float(-told.log_softmax(-1)[no if at else yes]))
    losses = []
    for at, text in row.cot:
        words = [*shown.ids(shown.lead + text), shown.tokenizer.eos_token_id]
        thinking = f"{last}{asked.candidates[at]}{prompts.QUESTION_COT}"
        told = logits((*front, thinking), words).log_softmax(-1)[-len(words) - 1 : -1]
        losses += [-float(told[place, token]) for place, token in enumerate(words)]
    answer = (answers[0] + float(np.mean(answers[1:] or answers))) / 2
    rationale = float(np.mean(losses)) if losses else 0.0
    likelihoods = [10 * float(value) for value in separate(mllm, asked)[:, 1]]
    return {
        "odds": listwise(odds),
        "likelihood": listwise(likelihoods),
        "listwise": listwise(odds) + listwise(likelihoods),
        "sft": answer + rationale,
        "both": listwise(odds) + ANSWER_WEIGHT * answer + COT_WEIGHT * rationale,
    }[objective]


NOTES = ("\nShares 1 of 2 with the newest choice: shoe.", "", "\nagainst it hat.")


@pytest.mark.parametrize(
    ("objective", "told_apart"),
    # Rationales are of the last two alone, notes of no likelihood, and what retrieval says is beside lists.
    [("odds", 4), ("likelihood", 3), ("listwise", 4), ("sft", 5), ("both", 6)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_loss_is_that_of_ordinary_prompts(kind: str, objective: Objective, told_apart: int) -> None:
    mllm = tiny_mllm(kind)
    rows = [
        record(),
        record("red", SHOE, (SHIRT, HAT), drawing("red"), "\n"),
        replace(record(), cot=()),
        replace(record(), cot=((2, "None. No"),)),
        replace(record(), retrieval=(-1.0, 0.5, 2.0)),
        replace(record(), request=replace(record().request, notes=NOTES)),
    ]
    losses = [float(row_loss(mllm, row, objective)) for row in rows]
    np.testing.assert_allclose(losses, [expected_loss(mllm, row, objective) for row in rows], atol=1e-4)
    assert len({round(loss, 4) for loss in losses}) == told_apart


@pytest.mark.parametrize("objective", get_args(Objective))
def test_the_loss_covers_answers_and_rationales_only_and_of_lists_what_they_read(
    objective: Objective, mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(record(), request=replace(record().request, notes=NOTES), retrieval=(0.0, 1.0, 2.0))
    kept: list[torch.Tensor] = []

    def leaves(*given: Any) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        last, hidden, ends = read_segments(*given)
        kept.extend(states.detach().requires_grad_() for states in (last, hidden))
        return kept[0], kept[1], ends

    read_segments = tuning.read_segments
    monkeypatch.setattr(tuning, "read_segments", leaves)
    row_loss(mllm, row, objective).backward()
    foretells = [
        set() if states.grad is None else set(states.grad.abs().sum(1).nonzero()[:, 0].tolist()) for states in kept
    ]

    # By hand: a token is foretold by the one before it; rationales stand behind all candidates.
    shown, encoded = mllm.renderer, mllm.renderer.encode_request(row.request)
    answers: set[int] = set()
    candidates: set[int] = set()
    rationales: set[int] = set()
    start = 0
    for own, behind in zip(encoded.candidates, encoded.behind, strict=True):
        candidates |= set(range(start, start + len(own) - 1))
        start += len(own) + len(behind)
        answers.add(start - 1)
    assert len({len(behind) for behind in encoded.behind}) == 3
    thinking = len(shown.encode_request(replace(row.request, notes=(), question=prompts.QUESTION_COT)).behind[0])
    for at, text in row.cot:
        words, first = len(shown.ids(shown.lead + text)), start + len(encoded.candidates[at]) + thinking
        rationales |= set(range(first - 1, first + words))  # the last one foretells the end
        start = first + words
    told = {"odds": answers, "likelihood": candidates, "listwise": answers | candidates}
    assert foretells[1] == told.get(objective, answers | rationales)
    assert foretells[0] == ({0} if objective in ("likelihood", "listwise") else set())


def read_by(mllm: LocalMllm, call: Callable[[], object]) -> list[int]:
    """The tokens that the language model is given, in order."""
    given: list[int] = []
    handle = mllm.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: given.extend(inputs[0].flatten().tolist())
    )
    try:
        call()
    finally:
        handle.remove()
    return given


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_ranking_read_the_same_tokens_up_to_the_label(kind: str) -> None:
    mllm, items = tiny_mllm(kind), [2, 3, 1]
    state = replace(make_state("hat", "red"), newest=1, waited=3_600_000)
    texts = ["It meets the taste for hat. Yes", "It lacks red. No"]
    row = training_record(state, CATALOGUE, state.end, items, texts)
    assert len(set(row.request.notes)) == 3
    trained = read_by(mllm, lambda: row_loss(mllm, row))
    encoded = mllm.renderer.encode_request(row.request)
    prefix = encoded.prefix["input_ids"][0].tolist()
    assert trained[: len(prefix)] == prefix

    ranked = read_by(mllm, lambda: mllm.score([ranking_request(state, CATALOGUE, items)]))
    segments = [own + behind for own, behind in zip(encoded.candidates, encoded.behind, strict=True)]
    assert trained[: len(ranked)] == prefix + [token for segment in segments for token in segment]
    assert ranked == prefix + [token for segment in sorted(segments, key=len) for token in segment]

    prompt, questions = explain_questions(state, CATALOGUE, items[:2])
    rest = trained[len(ranked) :]
    for question, text in zip(questions, texts, strict=True):
        asked = read_by(mllm, lambda question=question: mllm.ask([prompt], [question], 1))
        label = mllm.renderer.ids(mllm.renderer.lead + text)
        length = len(asked) - len(prefix) + len(label)
        assert prefix + rest[:length] == asked + label
        rest = rest[length:]
    assert rest == []


def test_where_ranking_shows_pictures_rationales_stand_where_reasons_are_asked(
    mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = CATALOGUE.shown.model_copy(update={"picture": True})
    pictures = ["red", "blue", None, "red"]
    shop = replace(CATALOGUE, pictures=pictures, shown=shown, open_picture=lambda colour: drawing(colour).data)
    state = make_state("hat", "red")
    row = training_record(state, shop, state.end, [3, 2, 1], ["Why. Yes", "Why not. No"])
    assert [isinstance(candidate, str) for candidate in row.request.candidates] == [False, True, False]
    read_segments, segments = tuning.read_segments, []

    def watch(*given: Any) -> Any:
        segments.extend([token for piece in pieces for token in piece.ids.tolist()] for pieces in given[2])
        return read_segments(*given)

    monkeypatch.setattr(tuning, "read_segments", watch)
    row_loss(mllm, row)
    prompt, questions = explain_questions(state, shop, [3, 2])
    prefix = mllm.renderer.encode_request(row.request).prefix["input_ids"].shape[1]
    for segment, question, (_, text) in zip(segments[3:], questions, row.cot, strict=True):
        asked = read_by(mllm, lambda question=question: mllm.ask([prompt], [question], 1))[prefix:]
        assert segment == asked + mllm.renderer.ids(mllm.renderer.lead + text)


def test_a_model_that_knows_nothing_pays_the_logarithms(mllm: LocalMllm) -> None:
    torch.nn.init.zeros_(mllm.model.lm_head.weight)
    vocabulary = math.log(len(tiny_tokenizer("llava")))
    assert float(row_loss(mllm, record())) == pytest.approx(math.log(3) + 0.1 * vocabulary + 0.1 * vocabulary, abs=1e-5)
    assert float(row_loss(mllm, replace(record(), cot=()))) == pytest.approx(math.log(3) + 0.1 * vocabulary, abs=1e-5)


def test_one_positive_weighs_as_much_as_all_negatives(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ANSWER_WEIGHT", 0.0)
    listwise = [float(row_loss(mllm, replace(record("red", SHOE, (SHIRT,) * n), cot=()))) for n in (1, 3)]
    monkeypatch.setattr(tuning, "ANSWER_WEIGHT", 1.0)
    whole = [float(row_loss(mllm, replace(record("red", SHOE, (SHIRT,) * n), cot=()))) for n in (1, 3)]
    # The same negative three times: the answers' part of the loss stays, the list grows.
    assert whole[0] - listwise[0] == pytest.approx(whole[1] - listwise[1], abs=1e-4)
    assert listwise[1] > listwise[0]


def test_the_positive_is_the_first_candidate(mllm: LocalMllm) -> None:
    first, other = (
        float(row_loss(mllm, replace(row, cot=()))) for row in (record(), record("red", SHIRT, (SHOE, HAT)))
    )
    odds = mllm.score([record().request])[0][:, 0]
    assert (first < other) == (odds[0] > odds[1])


# Training


def test_the_loss_falls_on_separable_records(mllm: LocalMllm, tmp_path: Path) -> None:
    before = sum(float(row_loss(mllm, row)) for row in RECORDS)
    train(mllm, RECORDS, settings(epochs=10, top_layers=3, rank=8, learning_rate=2e-2), tmp_path / "adapter")
    assert sum(float(row_loss(mllm, row)) for row in RECORDS) < 0.6 * before
    for row in RECORDS:
        assert mllm.score([row.request])[0][:, 0].argmax() == 0
    # The answer follows the taste, not the words of the item.
    swapped = [replace(row.request, candidates=(SHIRT, SHOE, HAT)) for row in RECORDS]
    assert [int(scores[:, 0].argmax()) for scores in mllm.score(swapped)] == [1, 0, 2]


def test_the_adapter_is_saved_with_its_facts(
    mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*_: object, **__: object) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", asked)
    folder = tmp_path / "adapter"
    base = mllm.identity
    before = mllm.score([RECORDS[0].request])[0]
    train(mllm, RECORDS, settings(), folder)
    assert {path.name for path in folder.iterdir()} == {ADAPTER, "adapter_config.json", "losses.json", "manifest.json"}
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["rows"] == 4 * len(RECORDS)
    assert 0 < facts["training_loss"] < 10
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"
    assert {name.split(".")[5] for name in load_file(folder / ADAPTER)} == {"1", "2"}
    assert mllm.has_adapter
    assert mllm.identity.startswith(f"{base}:")
    assert not any(weight.requires_grad for weight in mllm.model.parameters())
    scores = mllm.score([RECORDS[0].request])[0]
    fresh = tiny_mllm()
    fresh.load_adapter(folder)
    assert fresh.identity == mllm.identity
    np.testing.assert_array_equal(fresh.score([RECORDS[0].request])[0], scores)
    mllm.drop_adapter()
    np.testing.assert_array_equal(mllm.score([RECORDS[0].request])[0], before)
    assert capsys.readouterr().out == ""  # the Trainer's own tables are not wanted


class Interrupt:
    """row_loss that stops the training at its call number `at`."""

    def __init__(self, at: int, raises: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls, self._at, self._raises = 0, at, raises

    def __call__(self, mllm: LocalMllm, row: TrainingRecord, objective: Objective = "both") -> torch.Tensor:
        self.calls += 1
        if self.calls == self._at:
            raise self._raises("stopped")
        return row_loss(mllm, row, objective)


@pytest.mark.parametrize(("accumulate", "stops"), [(1, [6]), (1, [2, 9]), (2, [8]), (4, [12])])
def test_an_interrupted_training_ends_with_the_same_bytes(
    accumulate: int, stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(accumulate=accumulate, save_steps=1 if accumulate > 1 else 2)
    train(tiny_mllm(), RECORDS, config, tmp_path / "undisturbed")
    total = 4 * len(RECORDS)
    for stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "row_loss", Interrupt(stop))
            mllm = tiny_mllm()
            with pytest.raises(KeyboardInterrupt, match="stopped"):
                train(mllm, RECORDS, config, tmp_path / "adapter")
        assert not mllm.has_adapter
        assert not (tmp_path / "adapter" / "manifest.json").exists()
    left = sorted((tmp_path / "adapter" / "checkpoints").glob("checkpoint-*"))
    assert left
    # What a process that was killed while it wrote leaves behind.
    (tmp_path / "adapter" / "checkpoints" / "checkpoint-98").mkdir()
    (tmp_path / "adapter" / "checkpoints" / "checkpoint-99").mkdir()
    (tmp_path / "adapter" / "checkpoints" / "checkpoint-99" / "trainer_state.json").write_text('{"epoch"')

    counting = Interrupt(-1)
    monkeypatch.setattr(tuning, "row_loss", counting)
    train(tiny_mllm(), RECORDS, config, tmp_path / "adapter")
    assert 0 < counting.calls < total
    first, again = (tmp_path / name / ADAPTER for name in ("undisturbed", "adapter"))
    assert first.read_bytes() == again.read_bytes()
    assert not (tmp_path / "adapter" / "checkpoints").exists()


def test_unchanged_records_reuse_the_adapter(
    mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(mllm, RECORDS, settings(epochs=1), tmp_path)
    identity = mllm.identity
    monkeypatch.setattr(tuning, "row_loss", Interrupt(1, AssertionError))
    for again in (mllm, tiny_mllm()):
        train(again, list(RECORDS), settings(epochs=1), tmp_path)
        assert again.identity == identity
    assert "train: adapter of 3 rows reused" in capsys.readouterr().err


RED, BLUE = drawing("red"), drawing("blue")


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("records", [*RECORDS[:2], record("wool")]),
        ("records", RECORDS[::-1]),
        ("records", RECORDS[:2]),
        ("records", [replace(RECORDS[0], cot=()), *RECORDS[1:]]),
        ("records", [record("red", SHOE, (SHIRT, HAT), RED), *RECORDS[1:]]),
        ("config", settings(epochs=1, rank=2)),
        ("config", settings(epochs=1).model_copy(update={"seed": 1})),
        ("model", tiny_mllm(seed=1)),
    ],
)
def test_what_made_the_adapter_makes_it_anew(
    change: str, value: Any, mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"model": mllm, "records": RECORDS, "config": settings(epochs=1)}
    train(made["model"], made["records"], made["config"], tmp_path)
    before = (tmp_path / ADAPTER).read_bytes()
    made[change] = value
    counting = Interrupt(-1)
    monkeypatch.setattr(tuning, "row_loss", counting)
    train(made["model"], made["records"], made["config"], tmp_path)
    assert counting.calls == len(made["records"])
    assert (tmp_path / ADAPTER).read_bytes() != before


def test_records_are_told_apart_by_their_pictures_and_by_where_they_are_cut(mllm: LocalMllm, tmp_path: Path) -> None:
    def with_candidates(*candidates: str) -> TrainingRecord:
        return TrainingRecord(replace(RECORDS[0].request, candidates=candidates), ())

    moved = replace(RECORDS[0].request, prefix=Prompt(("a", "b")), candidates=("c",))
    records = [
        record("red", SHOE, (SHIRT,), RED),
        record("red", SHOE, (SHIRT,), BLUE),
        with_candidates("a", "b"),
        with_candidates("a b"),
        TrainingRecord(moved, ()),
        TrainingRecord(replace(moved, prefix=Prompt(("a",)), candidates=("b", "c")), ()),
    ]
    assert len({tuning._content(one) for one in records}) == len(records)
    assert tuning._content(record()) == tuning._content(record())


def test_checkpoints_of_other_records_are_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "row_loss", Interrupt(6))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_mllm(), RECORDS, settings(), tmp_path)
    counting = Interrupt(-1)
    monkeypatch.setattr(tuning, "row_loss", counting)
    train(tiny_mllm(), RECORDS[::-1], settings(), tmp_path)
    assert counting.calls == 4 * len(RECORDS)


@pytest.mark.parametrize("at", [1, 6])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_training(
    at: int, value: float, mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def broken(model: LocalMllm, row: TrainingRecord, objective: Objective) -> torch.Tensor:
        calls[0] += 1
        return row_loss(model, row, objective) * (value if calls[0] == at else 1)

    monkeypatch.setattr(tuning, "row_loss", broken)
    before = mllm.score([RECORDS[0].request])[0]
    with pytest.raises(
        ModelError, match=r"loss is not finite: lower training\.learning_rate or use model\.dtype=float32"
    ):
        train(mllm, RECORDS, settings(), tmp_path)
    assert calls[0] == at
    assert not mllm.has_adapter
    assert not (tmp_path / "manifest.json").exists()
    np.testing.assert_array_equal(mllm.score([RECORDS[0].request])[0], before)


def test_bfloat16_weights_are_trained_by_a_float32_adapter(tmp_path: Path) -> None:
    half = tiny_mllm()
    half.model.to(torch.bfloat16)
    before = sum(float(row_loss(half, row)) for row in RECORDS)
    train(half, RECORDS, settings(epochs=10, top_layers=3), tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / ADAPTER).values()} == {torch.float32}
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert sum(float(row_loss(half, row)) for row in RECORDS) < 0.6 * before


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_checkpointed_layers_learn_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, reads = [], []
    for checkpointing in (False, True):
        mllm, calls = tiny_mllm(kind), [0]

        def count(*_: Any, calls: list[int] = calls) -> None:
            calls[0] += 1

        mllm.model.get_decoder().layers[-1].self_attn.q_proj.register_forward_hook(count)
        train(mllm, RECORDS, settings(gradient_checkpointing=checkpointing, rank=4), tmp_path / str(checkpointing))
        trained.append(load_file(tmp_path / str(checkpointing) / ADAPTER))
        reads.append(calls[0])
        assert not any(module.training for module in mllm.model.modules())
    assert reads[1] == reads[0] + 4 * len(RECORDS)  # once more for every row's backward pass
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, atol=1e-5, rtol=1e-4)


def test_rows_that_read_otherwise_than_separate_prompts_are_not_trained_on(
    mllm: LocalMllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Piece, "following", property(lambda piece: len(piece) + 1))
    with pytest.raises(ModelError, match="packed scores differ from those of separate prompts"):
        train(mllm, RECORDS, settings(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3"])
def test_other_models_learn_too(kind: str, tmp_path: Path) -> None:
    mllm = tiny_mllm(kind)
    rows = [record("red", SHOE, (SHIRT, HAT), RED, "\n"), record("red", SHIRT, (SHOE, HAT), BLUE, "\n")]
    before = sum(float(row_loss(mllm, row)) for row in rows)
    train(mllm, rows, settings(epochs=15, top_layers=3), tmp_path)
    assert sum(float(row_loss(mllm, row)) for row in rows) < 0.6 * before  # only the picture tells the rows apart


@pytest.mark.embedded
def test_a_towers_batch_statistics_are_left_alone(tmp_path: Path) -> None:
    from mllm_srec.config import ModelConfig
    from mllm_srec.mllm.load import load_mllm

    mllm = load_mllm(ModelConfig(dtype="float32", device="cpu"))
    state = {name: weight.clone() for name, weight in mllm.model.state_dict().items()}
    assert any("running_mean" in name for name in state)
    train(mllm, [record("red", SHOE, (SHIRT,), RED, "\n")], settings(epochs=2, top_layers=1), tmp_path)
    mllm.drop_adapter()
    assert all(torch.equal(weight, state[name]) for name, weight in mllm.model.state_dict().items())

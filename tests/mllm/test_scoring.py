"""Packed scores and training rows against ordinary prompts, for every kind of model."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separate_prompts import alone, close, separate
from torch import nn
from transformers import MistralConfig

from mllm_srec.errors import ModelError
from mllm_srec.mllm import local, scoring
from mllm_srec.mllm.attention import PackedRow
from mllm_srec.mllm.base import Candidate, Picture, Prompt, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.packing import chunks
from mllm_srec.mllm.pieces import text_piece
from mllm_srec.mllm.scoring import candidate_pieces, read_segments
from tiny_models import KINDS, SHAPE, drawing, tiny_mllm, tiny_model, tiny_tokenizer

WORDS = ("a red shoe", "a blue shirt with stripes", "hat", "wool", "a green hat. It is warm, and made of cotton")
QUESTION = "\nAnswer Yes or No."
SYSTEM = "You predict which item a user chooses next."
RED, BLUE, GREEN = drawing("red"), drawing("blue", (96, 40)), drawing("green", (40, 64))
PICTURES = {"text": (), "picture": (RED,), "two pictures": (RED, "\nand ", BLUE, "\n")}
SHOWN: tuple[Candidate, ...] = (
    ("a red shoe ", RED),
    (BLUE, "a blue shirt with ", "stripes"),
    "hat",
    ("wool", BLUE, "and", GREEN),
    (GREEN, RED, "a green hat. It is warm, and made of cotton"),
)
CANDIDATES = {"text": WORDS, "pictures": SHOWN}


@cache
def tiny(kind: str) -> LocalMllm:
    return tiny_mllm(kind)


def request(
    pictures: Iterable[str | Picture] = (),
    liked: str = "warm colours",
    words: tuple[Candidate, ...] = WORDS,
    question: str = QUESTION,
) -> Request:
    return Request(Prompt((*pictures, f"The user likes {liked}.\nItem: "), system=SYSTEM), words, question)


# Packed scoring


def set_rows(patch: pytest.MonkeyPatch, short: int, tokens: int) -> None:
    patch.setattr(scoring, "SHORT_TOKENS", short)
    patch.setattr(scoring, "ROW_TOKENS", {"cpu": tokens})


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_are_those_of_separate_prompts(
    kind: str, pictures: str, candidates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm, asked = tiny(kind), request(PICTURES[pictures], words=CANDIDATES[candidates])
    expected = separate(mllm, asked)
    for short, tokens in ((10_000, 2048), (0, 1), (0, 45), (0, 2048)):  # in one go; rows of one, a few, all candidates
        set_rows(monkeypatch, short, tokens)
        mllm.prefixes.clear()
        for _ in range(2):  # the second time the prefix is kept
            close(mllm.score([asked])[0], expected)
        assert len(mllm.prefixes) == (short == 0)


def test_the_rows_of_these_tests_differ() -> None:
    encoded = tiny("llava").renderer.encode_request(request())
    lengths = [len(candidate) + len(encoded.behind[0]) for candidate in encoded.candidates]
    assert [len(chunks(sorted(lengths), limit)) for limit in (1, 45, 2048)] == [5, 3, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_and_a_candidates_picture_move_its_score(kind: str) -> None:
    mllm = tiny(kind)
    text, seen, other = (
        mllm.score([request(words=(words, "hat"))])[0] for words in ("wool", (RED, "wool"), (drawing("blue"), "wool"))
    )
    assert np.abs(text - seen)[0].min() > 1e-3
    assert np.abs(other - seen)[0].min() > 1e-3
    close(text[1], seen[1])
    changed = mllm.score([request(liked="blue", words=SHOWN)])[0]
    assert np.abs(changed - mllm.score([request(words=SHOWN)])[0]).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_tokens_of_a_candidates_text_count_as_its_likelihood(kind: str) -> None:
    mllm = tiny(kind)
    asked = request(words=(("wool ", RED),))
    encoded = mllm.renderer.encode_request(asked)
    special = [token in mllm.renderer.special_ids for token in encoded.candidates[0]]
    words = len(mllm.renderer.ids(" wool "))
    assert not any(special[: words - 1])  # a last space may be one token with what follows
    assert sum(special) > 3
    close(mllm.score([asked])[0], separate(mllm, asked))


def test_what_is_not_asked_for_is_not_a_number() -> None:
    mllm, asked = tiny("llava"), request(words=SHOWN)
    whole = mllm.score([asked])[0]
    odds = mllm.score([replace(asked, likelihood=False)])[0]
    assert np.isnan(odds[:, 1]).all()
    close(odds[:, 0], whole[:, 0])
    likelihood = mllm.score([replace(asked, question="")])[0]
    assert np.isnan(likelihood[:, 0]).all()
    close(likelihood[:, 1], whole[:, 1])


def test_odds_alone_need_no_head_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    monkeypatch.setattr(mllm, "logits", lambda hidden: pytest.fail("the whole vocabulary was weighed"))
    assert np.isfinite(mllm.score([replace(request(), likelihood=False)])[0][:, 0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_tell_candidates_prefixes_and_pictures_apart(kind: str) -> None:
    mllm = tiny(kind)
    first, other, seen, blue = mllm.score(
        [request(), request(liked="blue"), request((RED,)), request((drawing("blue"),))]
    )
    for column in (0, 1):
        assert np.diff(np.sort(first[:, column])).min() > 1e-3
    for changed in (other, seen):
        assert np.abs(changed - first).min(1).max() > 1e-2
    assert np.abs(blue - seen).max(0).min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_requests_do_not_touch_each_other(kind: str) -> None:
    mllm = tiny(kind)
    asked = [request((RED,)), request(liked="blue"), request((RED,), words=WORDS[:1]), request((BLUE,))]
    for together, single in zip(mllm.score(asked), asked, strict=True):
        close(together, mllm.score([single])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_long_requests_share_nothing_to_the_last_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, short=0, tokens=60)
    mllm = tiny(kind)
    asked = [request((RED,)), request(liked="blue", words=SHOWN), request((RED,), words=WORDS[:1]), request((BLUE,))]
    mllm.prefixes.clear()
    together = mllm.score(asked)
    assert len(mllm.prefixes) == 3
    for of_request, single in zip(together, asked, strict=True):
        np.testing.assert_array_equal(mllm.score([single])[0], of_request)  # kept
        mllm.prefixes.clear()
        np.testing.assert_array_equal(mllm.score([single])[0], of_request)  # read again


def test_short_requests_share_rows_up_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny("llava")
    asked = [request(liked=liked) for liked in ("blue", "red", "warm colours", "wool")]
    rows: list[int] = []
    read_row = scoring.read_row

    def count(mllm: LocalMllm, row: PackedRow, spans: Any) -> torch.Tensor:
        rows.append(len(row.blocks))
        return read_row(mllm, row, spans)

    monkeypatch.setattr(scoring, "read_row", count)
    encoded = mllm.renderer.encode_request(asked[2])  # the longest
    one = encoded.prefix["input_ids"].shape[1] + sum(len(ids + encoded.behind[0]) for ids in encoded.candidates)
    expected = [separate(mllm, single) for single in asked]
    for tokens, shape in ((10_000, [4]), (2 * one, [2, 2]), (one, [1] * 4)):
        set_rows(monkeypatch, 10_000, tokens)
        rows.clear()
        for scores, wanted in zip(mllm.score(asked), expected, strict=True):
            close(scores, wanted)
        assert rows == shape


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(10)),
    count=st.integers(1, 10),
    tokens=st.integers(1, 200),
    short=st.sampled_from([0, 200, 10_000]),
    others=st.integers(0, 2),
)
def test_a_candidates_score_does_not_depend_on_its_neighbours(
    kind: str, order: list[int], count: int, tokens: int, short: int, others: int
) -> None:
    mllm, kept, every = tiny(kind), order[:count], (*WORDS, *SHOWN)
    whole = mllm.score([request((RED,), words=every)])[0]
    with pytest.MonkeyPatch.context() as patch:
        set_rows(patch, short, tokens)
        asked = [*[request(liked="blue")] * others, request((RED,), words=tuple(every[i] for i in kept))]
        part = mllm.score(asked)[-1]
    close(part, whole[kept])


def test_the_same_candidate_twice_has_one_score() -> None:
    scores = tiny("idefics3").score([request(words=("hat", "wool", "hat"))])[0]
    close(scores[2], scores[0])
    assert np.abs(scores[1] - scores[0]).max() > 1e-2


def test_a_candidate_of_one_token_has_a_likelihood() -> None:
    mllm = tiny("llava")
    asked = request(words=("a",))
    assert len(mllm.renderer.encode_request(asked).candidates[0]) == 1
    close(mllm.score([asked])[0], separate(mllm, asked))


@pytest.mark.parametrize("layers", [0, 1])
def test_a_model_whose_layers_do_not_take_the_row_is_refused(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    for layer in mllm.model.get_decoder().layers[layers:]:
        forward = layer.self_attn.forward
        monkeypatch.setattr(layer.self_attn, "forward", lambda *a, f=forward, packed_row=None, **k: f(*a, **k))
    with pytest.raises(ModelError, match=r"layers do not take a packed row: install transformers 5\.24"):
        mllm.score([request()])


def test_a_model_that_does_not_read_through_its_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    other = tiny_mllm("llava").model.get_decoder()
    monkeypatch.setattr(mllm.model, "get_decoder", lambda: other)
    with pytest.raises(ModelError, match="does not read through the language model that it names"):
        mllm.score([request((RED,))])


def test_no_requests_and_no_candidates_have_no_scores() -> None:
    assert tiny("llava").score([]) == []
    assert tiny("llava").score([request(words=())])[0].shape == (0, 2)


def test_a_head_with_a_bias_counts_it() -> None:
    model, processor = tiny_model("llava")
    model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, model.lm_head.out_features))
    mllm = LocalMllm(model, processor, "biased")
    close(mllm.score([request()])[0], separate(mllm, request()))
    assert np.abs(mllm.score([request()])[0] - tiny("llava").score([request()])[0]).min() > 1e-3


def test_many_positions_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny("llava")
    whole = mllm.score([request()])[0]
    monkeypatch.setattr(local, "HEAD_ROWS", 3)
    close(mllm.score([request()])[0], whole)


def test_bfloat16_scores_are_near_and_float32() -> None:
    model, processor = tiny_model("llava")
    mllm = LocalMllm(model.to(torch.bfloat16), processor, "x")
    scores = mllm.score([request((RED,))])[0]
    assert scores.dtype == np.float32
    assert np.abs(scores - tiny("llava").score([request((RED,))])[0]).max() < 0.5
    assert mllm.identity == "x:bfloat16"


def test_sliding_windows_are_refused() -> None:
    text = MistralConfig(vocab_size=len(tiny_tokenizer("llava")), sliding_window=4, **SHAPE)
    mllm = LocalMllm(*tiny_model("llava", text=text), "sliding")
    encoded = mllm.renderer.encode_request(request())
    segments = [[text_piece(ids)] for ids in encoded.candidates]
    for use in (lambda: mllm.score([request()]), lambda: read_segments(mllm, encoded, segments)):
        with pytest.raises(ModelError, match="plain full attention in every layer: choose another model"):
            use()
    assert mllm.generate([Prompt(("Hello",))], 2) == mllm.generate([Prompt(("Hello",))], 2)
    text.sliding_window = None
    full = LocalMllm(*tiny_model("llava", text=text), "full")
    close(full.score([request()])[0], separate(full, request()))


# Training rows


def training_row(mllm: LocalMllm, asked: Request) -> tuple[torch.Tensor, list[int]]:
    encoded = mllm.renderer.encode_request(asked)
    question = text_piece(encoded.behind[0])
    pieces = candidate_pieces(mllm, asked, encoded)
    _, hidden, ends = read_segments(mllm, encoded, [[piece, question] for piece in pieces])
    return hidden, ends


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_row_reads_what_scoring_reads(kind: str, pictures: str) -> None:
    mllm = tiny(kind)
    asked = request(PICTURES[pictures])
    encoded = mllm.renderer.encode_request(asked)
    segments = [candidate + encoded.behind[0] for candidate in encoded.candidates]
    hidden, ends = training_row(mllm, asked)
    assert hidden.shape == (sum(map(len, segments)), SHAPE["hidden_size"])
    assert ends == np.cumsum([len(segment) for segment in segments]).tolist()
    length = encoded.prefix["input_ids"].shape[1]
    with torch.no_grad():
        for end, segment in zip(ends, segments, strict=True):
            logits = mllm.logits(hidden[end - len(segment) : end])
            torch.testing.assert_close(logits, alone(mllm, encoded, segment)[length:], atol=1e-4, rtol=0)
        labels = mllm.label_logits(hidden[torch.tensor(ends) - 1])
        whole = mllm.logits(hidden[torch.tensor(ends) - 1])
    torch.testing.assert_close(labels, whole[:, list(mllm.renderer.label_ids)])
    close((labels[:, 0] - labels[:, 1]).numpy(), mllm.score([asked])[0][:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_row_with_pictures_in_its_candidates_reads_what_scoring_reads(kind: str) -> None:
    mllm, asked = tiny(kind), request((BLUE,), words=SHOWN)
    with torch.no_grad():
        hidden, ends = training_row(mllm, asked)
        labels = mllm.label_logits(hidden[torch.tensor(ends) - 1])
    close((labels[:, 0] - labels[:, 1]).numpy(), separate(mllm, asked)[:, 0])


def to_train(kind: str) -> tuple[LocalMllm, dict[str, torch.nn.Parameter]]:
    """A model with an adapter whose factors are both not 0: a fresh one's second factor is."""
    mllm = tiny_mllm(kind)
    mllm.attach_adapter(rank=2, top_layers=2, seed=1)
    weights = {name: weight for name, weight in mllm.model.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return mllm, weights


def gradients(loss: torch.Tensor, weights: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def loss_of_row(mllm: LocalMllm, asked: Request) -> torch.Tensor:
    hidden, ends = training_row(mllm, asked)
    yes = mllm.renderer.label_ids[0]
    return -mllm.logits(hidden[torch.tensor(ends) - 1]).log_softmax(-1)[:, yes].sum()


@pytest.mark.parametrize("pictures", ["text", "picture"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_gradient_is_the_sum_over_its_examples(kind: str, pictures: str) -> None:
    mllm, weights = to_train(kind)
    asked = request(PICTURES[pictures])
    encoded = mllm.renderer.encode_request(asked)
    yes = mllm.renderer.label_ids[0]
    row = gradients(loss_of_row(mllm, asked), weights)
    single = [
        gradients(-alone(mllm, encoded, candidate + encoded.behind[0])[-1].log_softmax(-1)[yes], weights)
        for candidate in encoded.candidates
    ]
    assert len(weights) == 2 * 2 * 7
    for name, gradient in row.items():
        expected = torch.stack([one[name] for one in single]).sum(0)
        assert expected.abs().max() > 1e-4, name
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_give_the_same_gradients(kind: str) -> None:
    mllm, weights = to_train(kind)
    asked = request((RED,), words=SHOWN)
    plain = gradients(loss_of_row(mllm, asked), weights)
    decoder = mllm.model.get_decoder()
    mllm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    decoder.train()
    calls: list[int] = []
    handle = decoder.layers[-1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(loss_of_row(mllm, asked), weights)
    handle.remove()
    assert len(calls) == 2  # once forward, once for the backward pass
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-4)


# What is kept


class Weight:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_the_value_used_longest_ago_goes_first() -> None:
    recent: scoring.Recent[Weight] = scoring.Recent(10)
    for key, size in (("a", 4), ("b", 4)):
        recent.put(key, Weight(size))
    assert recent.get("a") is not None  # b is now the older one
    recent.put("c", Weight(3))
    assert [recent.get(key) is not None for key in "abc"] == [True, False, True]
    recent.put("a", Weight(7))  # a again, larger: just fits beside c
    assert [recent.get(key) is not None for key in "ac"] == [True, True]
    recent.put("d", Weight(11))  # larger than all of it
    assert [recent.get(key) is not None for key in "acd"] == [True, True, False]
    recent.clear()
    assert len(recent) == 0
    recent.put("e", Weight(10))
    assert recent.get("e") is not None


def test_a_kept_prefix_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, short=0, tokens=2048)
    mllm, asked = tiny_mllm("llava"), request((RED,))
    tokens: list[int] = []
    mllm.model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: tokens.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    encoded = mllm.renderer.encode_request(asked)
    prefix = encoded.prefix["input_ids"].shape[1]
    behind = sum(len(candidate + encoded.behind[0]) for candidate in encoded.candidates)
    first = mllm.score([asked])[0]
    assert tokens[-2:] == [prefix, behind]
    tokens.clear()
    np.testing.assert_array_equal(mllm.score([asked])[0], first)
    assert tokens == [behind]
    (kept,) = mllm.prefixes._kept.values()
    # Keys and values: layers x heads x tokens x width x 4 bytes each, and one hidden state.
    assert kept.nbytes == 2 * 3 * 2 * prefix * 8 * 4 + 32 * 4


@pytest.mark.parametrize(
    "other",
    [
        request((RED,), liked="blue"),
        request((BLUE,)),
        replace(request((RED,)), prefix=replace(request((RED,)).prefix, system="Be short.")),
    ],
    ids=["text", "picture", "system"],
)
def test_another_prefix_is_not_taken_for_a_kept_one(other: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, short=0, tokens=2048)
    mllm = tiny_mllm("llava")
    mllm.score([request((RED,))])
    close(mllm.score([other])[0], separate(mllm, other))


def test_other_weights_do_not_read_kept_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, short=0, tokens=2048)
    mllm, weights = to_train("llava")
    asked = request((RED,))
    assert not mllm.keeps_prefixes
    training = mllm.score([asked])[0]
    close(training, separate(mllm, asked))
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(2)
    close(mllm.score([asked])[0], separate(mllm, asked))
    assert np.abs(mllm.score([asked])[0] - training).max() > 1e-2
    assert len(mllm.prefixes) == 0
    mllm._peft.save_pretrained(str(tmp_path), save_embedding_layers=False)
    mllm.drop_adapter()
    plain = mllm.score([asked])[0]
    assert len(mllm.prefixes) == 1
    mllm.load_adapter(tmp_path)
    adapted = mllm.score([asked])[0]
    assert np.abs(adapted - plain).max() > 1e-2
    close(adapted, separate(mllm, asked))
    with mllm.without_adapter():
        close(mllm.score([asked])[0], plain)
    assert len(mllm.prefixes) == 2


def test_a_candidates_picture_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    looked: list[int] = []
    mllm.model.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    first = mllm.score([request(words=(("wool ", RED), ("hat ", BLUE)))])[0]
    assert len(looked) == 2
    again = mllm.score([request(words=(("hat ", BLUE), ("wool ", RED), ("hat", RED)))])[0]
    assert len(looked) == 3
    close(again[:2], first[::-1])


def test_what_was_kept_for_scoring_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm, weights = to_train("qwen3_vl")
    asked = request((RED,), words=SHOWN)
    expected = gradients(loss_of_row(mllm, asked), weights)
    mllm.looks.clear()
    mllm.score([asked])
    assert len(mllm.looks) == 4
    for name, gradient in gradients(loss_of_row(mllm, asked), weights).items():
        torch.testing.assert_close(gradient, expected[name])

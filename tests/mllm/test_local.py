from collections.abc import Iterable
from functools import cache, partial
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
from mllm_srec.mllm import local
from mllm_srec.mllm.base import Mllm, Picture, Prompt, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.packing import chunks
from mllm_srec.mllm.rendering import EncodedRequest
from tiny_models import KINDS, SHAPE, drawing, tiny_mllm, tiny_model, tiny_tokenizer

WORDS = ("a red shoe", "a blue shirt with stripes", "hat", "wool", "a green hat. It is warm, and made of cotton")
QUESTION = "\nAnswer Yes or No."
SYSTEM = "You predict which item a user chooses next."
RED, BLUE = drawing("red"), drawing("blue", (96, 40))
PICTURES = {"text": (), "picture": (RED,), "two pictures": (RED, "\nand ", BLUE, "\n")}


@cache
def tiny(kind: str) -> LocalMllm:
    return tiny_mllm(kind)


def request(
    pictures: Iterable[str | Picture] = (), liked: str = "warm colours", words: tuple[str, ...] = WORDS
) -> Request:
    return Request(Prompt((*pictures, f"The user likes {liked}.\nItem: "), system=SYSTEM), words, QUESTION)


def test_it_keeps_the_interface() -> None:
    checked: Mllm = tiny("llava")
    assert checked.identity == "tiny-llava-0:float32"


# Packed scoring


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 45, 640])
def test_packed_scores_are_those_of_separate_prompts(
    kind: str, pictures: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "chunks", partial(chunks, limit=limit))
    mllm, asked = tiny(kind), request(PICTURES[pictures])
    close(mllm.score([asked])[0], separate(mllm, asked))


def test_the_chunks_of_these_tests_differ() -> None:
    encoded = tiny("llava").renderer.encode_request(request())
    lengths = [len(candidate) + len(encoded.question) for candidate in encoded.candidates]
    assert [len(chunks(lengths, limit)) for limit in (1, 45, 640)] == [5, 3, 1]


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
        np.testing.assert_array_equal(together, mllm.score([single])[0])


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(5)), count=st.integers(1, 5), limit=st.integers(1, 120))
def test_a_candidates_score_does_not_depend_on_its_neighbours(
    kind: str, order: list[int], count: int, limit: int
) -> None:
    mllm, kept = tiny(kind), order[:count]
    whole = mllm.score([request((RED,))])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "chunks", partial(chunks, limit=limit))
        part = mllm.score([request((RED,), words=tuple(WORDS[i] for i in kept))])[0]
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


def test_a_model_that_ignores_its_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny("llava")
    forward = mllm.model.model.forward
    monkeypatch.setattr(mllm.model.model, "forward", lambda cache=None, **inputs: forward(**inputs))
    with pytest.raises(ModelError, match=r"did not fill the cache it was given: install transformers 5\.24"):
        mllm.score([request()])


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
    for use in (lambda: mllm.score([request()]), lambda: mllm.read_row(encoded, encoded.candidates)):
        with pytest.raises(ModelError, match="plain full attention in every layer: choose another model"):
            use()
    assert mllm.generate([Prompt(("Hello",))], 2) == mllm.generate([Prompt(("Hello",))], 2)
    text.sliding_window = None
    full = LocalMllm(*tiny_model("llava", text=text), "full")
    close(full.score([request()])[0], separate(full, request()))


# Training rows


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_row_reads_what_scoring_reads(kind: str, pictures: str) -> None:
    mllm = tiny(kind)
    asked = request(PICTURES[pictures])
    encoded = mllm.renderer.encode_request(asked)
    segments = [candidate + encoded.question for candidate in encoded.candidates]
    hidden, packed = mllm.read_row(encoded, segments)
    assert hidden.shape == (sum(map(len, segments)), SHAPE["hidden_size"])
    assert packed.ids.tolist() == [token for segment in segments for token in segment]
    length = encoded.prefix["input_ids"].shape[1]
    with torch.no_grad():
        for start, segment in zip(packed.starts, segments, strict=True):
            logits = mllm.logits(hidden[start : start + len(segment)])
            torch.testing.assert_close(logits, alone(mllm, encoded, segment)[length:], atol=1e-4, rtol=0)
        ends = torch.tensor([*packed.starts[1:], len(packed.ids)]) - 1
        labels = mllm.label_logits(hidden[ends])
    torch.testing.assert_close(labels, mllm.logits(hidden[ends])[:, list(mllm.renderer.label_ids)])
    close((labels[:, 0] - labels[:, 1]).detach().numpy(), mllm.score([asked])[0][:, 0])


@pytest.mark.parametrize("pictures", ["text", "picture"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_gradient_is_the_sum_over_its_examples(kind: str, pictures: str) -> None:
    mllm = tiny_mllm(kind)
    mllm.attach_adapter(rank=2, top_layers=2, seed=1)
    weights = {name: weight for name, weight in mllm.model.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # a fresh adapter's second factor is 0: half of the gradients would be
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    encoded = mllm.renderer.encode_request(request(PICTURES[pictures]))
    segments = [candidate + encoded.question for candidate in encoded.candidates]
    yes = mllm.renderer.label_ids[0]

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    hidden, packed = mllm.read_row(encoded, segments)
    ends = torch.tensor([*packed.starts[1:], len(packed.ids)]) - 1
    row = gradients(-mllm.logits(hidden[ends]).log_softmax(-1)[:, yes].sum())
    single = [gradients(-alone(mllm, encoded, segment)[-1].log_softmax(-1)[yes]) for segment in segments]
    assert len(weights) == 2 * 2 * 7
    for name, gradient in row.items():
        expected = torch.stack([one[name] for one in single]).sum(0)
        assert expected.abs().max() > 1e-4, name
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


# Generating


@torch.no_grad()
def greedy(mllm: LocalMllm, prompt: Prompt, steps: int) -> str:
    shown = mllm.renderer
    pictures = [part for part in prompt.parts if isinstance(part, Picture)]
    inputs = shown.encode([shown.text(prompt)], [pictures], "right")
    encoded = EncodedRequest({k: v for k, v in inputs.items() if k != "attention_mask"}, [], [])
    made: list[int] = []
    while len(made) < steps:
        token = (
            int(alone(mllm, encoded, made)[-1].argmax()) if made else int(mllm.model(**inputs).logits[0, -1].argmax())
        )
        if token == shown.tokenizer.eos_token_id:
            break
        made.append(token)
    return str(shown.tokenizer.decode(made, skip_special_tokens=True)).strip()


ASKED = [
    Prompt(("What is it?",), answer="It is a"),
    Prompt((RED, "What is in the picture?"), system="Be short."),
    Prompt(("The user likes warm colours. " * 3,)),
    Prompt((BLUE, "and", RED, "\nWhich one?"), answer="The"),
    Prompt((RED,)),
    Prompt(("Yes",), system=SYSTEM),
]


@pytest.mark.parametrize("kind", KINDS)
def test_generating_is_greedy_whatever_the_batch(kind: str) -> None:
    mllm = tiny(kind)
    expected = [greedy(mllm, prompt, 6) for prompt in ASKED]
    assert mllm.generate(ASKED, 6) == expected
    assert [mllm.generate([prompt], 6)[0] for prompt in ASKED] == expected
    assert mllm.generate(ASKED[::-1], 6) == expected[::-1]
    assert len(set(expected)) == len(ASKED)


def test_generating_stops_at_the_end_token() -> None:
    model, processor = tiny_model("llava")
    mllm = LocalMllm(model, processor, "x")
    asked = ASKED[0]
    first = greedy(mllm, asked, 1)
    token = int(mllm.model(**mllm.renderer.encode([mllm.renderer.text(asked)], [()], "left")).logits[0, -1].argmax())
    assert first
    model.generation_config.eos_token_id = token
    long = ASKED[2]
    assert mllm.generate([asked, long], 8)[1] == mllm.generate([long], 8)[0]
    assert mllm.generate([asked], 8) == [first]


def test_generating_leaves_the_next_scores_alone() -> None:
    for kind in KINDS:  # Qwen-VL keeps offsets of the last pictures
        mllm = tiny_mllm(kind)
        before = mllm.score([request((RED,)), request()]), mllm.embed(ASKED), mllm.loglik(ASKED, WORDS[:1] * 6)
        mllm.generate([ASKED[3]], 3)
        after = mllm.score([request((RED,)), request()]), mllm.embed(ASKED), mllm.loglik(ASKED, WORDS[:1] * 6)
        for left, right in zip([*before[0], *before[1:]], [*after[0], *after[1:]], strict=True):
            np.testing.assert_array_equal(left, right)


def test_nothing_asked_is_nothing_made() -> None:
    mllm = tiny("llava")
    assert mllm.generate([], 4) == []
    assert mllm.loglik([], []).shape == (0,)


# Likelihoods


@torch.no_grad()
def told(mllm: LocalMllm, prompt: Prompt, continuation: str) -> float:
    shown = mllm.renderer
    pictures = [part for part in prompt.parts if isinstance(part, Picture)]
    inputs = shown.encode([shown.text(prompt)], [pictures], "right")
    encoded = EncodedRequest({k: v for k, v in inputs.items() if k != "attention_mask"}, [], [])
    tokens = shown.ids(continuation)
    logits = alone(mllm, encoded, tokens).log_softmax(-1)
    start = inputs["input_ids"].shape[1] - 1
    return sum(float(logits[start + at, token]) for at, token in enumerate(tokens)) / len(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_single_prompts(kind: str) -> None:
    mllm = tiny(kind)
    said = [" shoe", "a red shoe with stripes, warm and made of wool", " a", "hat", " a blue shirt.", "No"]
    expected = np.array([told(mllm, *pair) for pair in zip(ASKED, said, strict=True)], dtype=np.float32)
    close(mllm.loglik(ASKED, said), expected)
    close(np.concatenate([mllm.loglik([prompt], [text]) for prompt, text in zip(ASKED, said, strict=True)]), expected)
    assert np.diff(np.sort(expected)).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_moves_the_likelihood_of_an_answer(kind: str) -> None:
    mllm = tiny(kind)
    red, blue = mllm.loglik([Prompt((drawing(c), "What is it?")) for c in ("red", "blue")], [" shoe"] * 2)
    assert abs(red - blue) > 1e-2


@pytest.mark.parametrize(("prompts", "continuations"), [(1, []), (1, ["a", "b"]), (2, ["a", ""]), (1, ["\ue000"])])
def test_a_likelihood_of_nothing_is_refused(prompts: int, continuations: list[str]) -> None:
    with pytest.raises(ModelError, match="one continuation with text per prompt"):
        tiny("llava").loglik(ASKED[:1] * prompts, continuations)


def test_a_continuation_cannot_bring_special_tokens() -> None:
    mllm = tiny("llava")
    assert mllm.loglik(ASKED[:1], ["a </s>"]) == mllm.loglik(ASKED[:1], ["a /s>"])


# Vectors


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_have_length_one_and_do_not_feel_padding(kind: str) -> None:
    mllm = tiny(kind)
    vectors = mllm.embed(ASKED)
    assert vectors.shape == (len(ASKED), SHAPE["hidden_size"])
    close(np.linalg.norm(vectors, axis=1), np.ones(len(ASKED), dtype=np.float32))
    close(vectors, np.concatenate([mllm.embed([prompt]) for prompt in ASKED]))
    similar = vectors @ vectors.T - np.eye(len(ASKED), dtype=np.float32)
    assert similar.max() < 0.999


def test_a_vector_is_the_mean_of_the_last_hidden_states() -> None:
    mllm = tiny("llava")
    inputs = mllm.renderer.encode([mllm.renderer.text(ASKED[0])], [()], "right")
    with torch.no_grad():
        mean = mllm.model(**inputs, output_hidden_states=True).hidden_states[-1][0].mean(0)
    close(mllm.embed(ASKED[:1])[0], (mean / mean.norm()).numpy())


@pytest.mark.parametrize("use", ["generate", "loglik", "embed"])
def test_batches_are_no_larger_than_set(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny("llava")
    sizes: list[int] = []
    encode = mllm.renderer.encode

    def watch(texts: list[str], pictures: Any, side: str) -> dict[str, torch.Tensor]:
        sizes.append(len(texts))
        return encode(texts, pictures, side)

    monkeypatch.setattr(mllm.renderer, "encode", watch)
    asked = [Prompt((word,)) for word in WORDS] + [Prompt((RED,))]
    arguments: dict[str, Any] = {"generate": (1,), "loglik": (["a"] * 6,), "embed": ()}
    getattr(mllm, use)(asked, *arguments[use])
    assert sizes == [1, 4, 1]

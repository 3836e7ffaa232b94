from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from separate_prompts import alone, close

from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Mllm, Picture, Prompt, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.rendering import EncodedRequest
from tiny_models import KINDS, SHAPE, drawing, tiny_mllm, tiny_model

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

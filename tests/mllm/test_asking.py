from collections.abc import Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separate_prompts import alone, close
from torch import nn
from transformers import MistralConfig

from mllm_srec.errors import ModelError
from mllm_srec.mllm import asking, local
from mllm_srec.mllm.asking import EncodedQuestion, encode_question, read, weigh
from mllm_srec.mllm.base import Answer, Picture, Prompt, Question, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.packing import chunks
from mllm_srec.mllm.rendering import EncodedRequest
from tiny_models import KINDS, SHAPE, drawing, tiny_mllm, tiny_model, tiny_tokenizer

RED, BLUE = drawing("red"), drawing("blue", (96, 40))
PREFIXES = [
    Prompt((RED,)),
    Prompt(("The user likes warm colours.",), system="You predict which item a user chooses next."),
    Prompt(("Lately: ", RED, "\nand ", BLUE, "\nItem: "), system="Be short."),
    Prompt(("Item: ",)),
    Prompt((BLUE, "a shirt")),
    Prompt(("a red shoe, a blue shirt, a green hat with stripes. " * 2 + "No",)),
    Prompt((BLUE,)),
    Prompt(("Yes",)),
]
CHOICES = [
    Question("\nWhich colour?", "Its colour is", ("red", "blue with stripes", "green", "warm")),
    Question(" Will the user choose it?", "", ("Yes", "No", "Maybe not")),
    Question("", "It is made of", ("cotton and wool", "wool", "summer")),
]
WORDS = [Question("\nWhat is in the picture?", "It is a"), Question("", "The"), Question(" Why?")]
MIXED = [WORDS[0], *CHOICES[:2], WORDS[1], CHOICES[2], WORDS[2]]


def fresh(kind: str) -> LocalMllm:
    """A model that never writes an image token: no text with one too many could be read again as a whole."""
    mllm = tiny_mllm(kind)
    with torch.no_grad():
        mllm.model.get_output_embeddings().weight[mllm.model.config.image_token_id] = 0
    return mllm


@cache
def tiny(kind: str) -> LocalMllm:
    return fresh(kind)


def whole(mllm: LocalMllm, prefix: Prompt, question: Question) -> EncodedRequest:
    """The ordinary prompt, never cut: prefix, question and the words the answer begins with."""
    prompt = Prompt((*prefix.parts, question.ask), prefix.system, question.answer)
    pictures = [part for part in prompt.parts if isinstance(part, Picture)]
    inputs = mllm.renderer.encode([mllm.renderer.text(prompt)], [pictures], "right")
    return EncodedRequest({name: value for name, value in inputs.items() if name != "attention_mask"}, [], [])


@torch.no_grad()
def told(mllm: LocalMllm, prefix: Prompt, question: Question, option: str) -> float:
    encoded = whole(mllm, prefix, question)
    tokens = mllm.renderer.ids((" " if question.answer else mllm.renderer.lead) + option)
    start = encoded.prefix["input_ids"].shape[1] - 1
    logliks = alone(mllm, encoded, tokens).log_softmax(-1)
    return sum(float(logliks[start + at, token]) for at, token in enumerate(tokens))


@torch.no_grad()
def greedy(mllm: LocalMllm, prefix: Prompt, question: Question, steps: int) -> tuple[list[int], list[float]]:
    """Tokens and their log-likelihoods, every step by a pass over the whole text."""
    encoded, made, logliks = whole(mllm, prefix, question), [], []
    ends = mllm.model.generation_config.eos_token_id
    for _ in range(steps):
        logits = alone(mllm, encoded, made) if made else mllm.model(**encoded.prefix).logits[0]
        values = logits[-1].log_softmax(-1)
        token = int(values.argmax())
        if token in (ends if isinstance(ends, list) else [ends]):
            break
        made.append(token)
        logliks.append(float(values[token]))
    return made, logliks


def said(mllm: LocalMllm, tokens: Sequence[int]) -> str:
    return str(mllm.renderer.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def same(left: list[list[Answer]], right: list[list[Answer]]) -> None:
    assert [len(row) for row in left] == [len(row) for row in right]
    for one, other in zip(chain(*left), chain(*right), strict=True):
        assert one.text == other.text
        assert abs(one.loglik - other.loglik) < 1e-4
        close(one.options, other.options)


# Options


@cache
def expected(kind: str) -> list[list[np.ndarray]]:
    mllm = tiny(kind)
    return [
        [np.array([told(mllm, prefix, question, o) for o in question.options], np.float32) for question in CHOICES]
        for prefix in PREFIXES
    ]


@pytest.mark.parametrize("limit", [1, 40, 640])
@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_of_options_are_those_of_separate_prompts(
    kind: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "chunks", partial(chunks, limit=limit))
    made = tiny(kind).ask(PREFIXES, CHOICES, 4)
    for answers, of_prefix in zip(made, expected(kind), strict=True):
        for answer, question, values in zip(answers, CHOICES, of_prefix, strict=True):
            close(answer.options, values)
            assert answer.text == question.options[int(values.argmax())]
            assert answer.loglik == answer.options.max()


@pytest.mark.parametrize("kind", KINDS)
def test_these_options_are_of_one_token_and_of_more_and_no_two_prefixes_agree(kind: str) -> None:
    encoded = [encode_question(tiny(kind).renderer, question, "", "tail") for question in CHOICES]
    assert {len(option) > 1 for question in encoded for option in question.options} == {True, False}
    assert [len(chunks([q.size for q in encoded], limit)) for limit in (1, 40, 640)] == [3, 2, 1]
    first = np.array([np.concatenate(of_prefix) for of_prefix in expected(kind)])
    distances = np.abs(first[:, None] - first).max(-1) + np.eye(len(first))
    assert distances.min() > 1e-2


def test_an_option_of_one_token_costs_none() -> None:
    renderer = tiny("llava").renderer
    one = Question("\nWhich?", "It is", ("a",))
    many = Question("\nWhich?", "It is", ("a", "the", "in", "red"))
    assert encode_question(renderer, one, "", "").size == encode_question(renderer, many, "", "").size


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_options_likelihood_does_not_depend_on_what_is_asked_beside_it(kind: str, data: st.DataObject) -> None:
    mllm = tiny(kind)
    kept = data.draw(st.lists(st.sampled_from(range(len(CHOICES))), min_size=1, max_size=4))
    orders = [data.draw(st.lists(st.sampled_from(CHOICES[i].options), min_size=1, unique=True)) for i in kept]
    rows = data.draw(st.lists(st.sampled_from(range(len(PREFIXES))), min_size=1, max_size=6))
    asked = [Question(CHOICES[i].ask, CHOICES[i].answer, tuple(o)) for i, o in zip(kept, orders, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "chunks", partial(chunks, limit=data.draw(st.integers(1, 150))))
        made = mllm.ask([PREFIXES[row] for row in rows], asked, 1)
    for row, answers in zip(rows, made, strict=True):
        for i, order, answer in zip(kept, orders, answers, strict=True):
            close(answer.options, expected(kind)[row][i][[CHOICES[i].options.index(option) for option in order]])


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_logarithms_of_probabilities(kind: str) -> None:
    mllm = tiny(kind)
    size = mllm.model.get_output_embeddings().out_features
    every = [[token] for token in range(size)]
    behind = [[7, token] for token in range(size)]
    with torch.no_grad():
        cached = read(mllm, ["USER: a red shoe", "USER: a"], [[], []], 0)
        first, second = weigh(mllm, cached, [EncodedQuestion([9, 10], options) for options in (every, behind)])
    assert first.shape == second.shape == (2, size)
    close(np.exp(first).sum(1), np.ones(2, np.float32))
    close(np.exp(second).sum(1), np.exp(first[:, 7]))


def test_many_positions_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "HEAD_ROWS", 3)
    for answers, of_prefix in zip(tiny("llava").ask(PREFIXES, CHOICES, 1), expected("llava"), strict=True):
        close(np.concatenate([answer.options for answer in answers]), np.concatenate(of_prefix))


def test_a_head_with_a_bias_counts_it() -> None:
    mllm = fresh("llava")
    mllm.model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, mllm.model.lm_head.out_features))
    made = mllm.ask(PREFIXES[:1], CHOICES[:1], 1)[0][0].options
    close(made, np.array([told(mllm, PREFIXES[0], CHOICES[0], o) for o in CHOICES[0].options], np.float32))
    assert np.abs(made - expected("llava")[0][0]).min() > 1e-3


def test_bfloat16_likelihoods_are_near_and_float32() -> None:
    mllm = fresh("llava")
    mllm.model.to(torch.bfloat16)
    answer = mllm.ask(PREFIXES[:1], CHOICES[:1], 1)[0][0]
    assert answer.options.dtype == np.float32
    assert 0 < np.abs(answer.options - expected("llava")[0][0]).max() < 0.5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("red", "green", "red with stripes"), "'red' and 'red with stripes'"),
        (("red with stripes", "red"), "'red with stripes' and 'red'"),
        (("wool", "hat", "wool"), "'wool' and 'wool'"),
        (("hat </s>", "hat /s>"), "'hat </s>' and 'hat /s>'"),
    ],
)
@pytest.mark.parametrize("answer", ["It is", ""])
def test_an_option_that_begins_another_is_refused(options: tuple[str, ...], named: str, answer: str) -> None:
    with pytest.raises(ModelError, match=f"of the options {named} of the question 'Which one\\?' one is the beginning"):
        tiny("llava").ask(PREFIXES, [WORDS[0], Question("\nWhich one?", answer, options)], 1)


@pytest.mark.parametrize("empty", ["", " ", "\ue000"])
def test_an_option_without_text_is_refused(empty: str) -> None:
    with pytest.raises(ModelError, match=r"option number 1 of the question 'Which one\?' has no text"):
        tiny("llava").ask(PREFIXES, [Question("\nWhich one?", "It is", ("red", empty))], 1)


# Own words


@pytest.mark.parametrize("kind", KINDS)
def test_own_words_are_those_of_reading_the_whole_text_at_every_step(kind: str) -> None:
    mllm = tiny(kind)
    texts = set()
    for prefix, answers in zip(PREFIXES, mllm.ask(PREFIXES, WORDS, 5), strict=True):
        for question, answer in zip(WORDS, answers, strict=True):
            tokens, logliks = greedy(mllm, prefix, question, 5)
            assert answer.text == said(mllm, tokens)
            assert abs(answer.loglik - sum(logliks) / len(logliks)) < 1e-4
            assert answer.options.shape == (0,)
            assert answer.options.dtype == np.float32
            texts.add(answer.text)
    assert len(texts) > len(PREFIXES)


@pytest.mark.parametrize("kind", KINDS)
def test_own_words_are_what_generate_writes_behind_the_whole_prompt(kind: str) -> None:
    mllm = tiny(kind)
    made = mllm.ask(PREFIXES, WORDS, 6)
    for at, question in enumerate(WORDS):
        prompts = [Prompt((*prefix.parts, question.ask), prefix.system, question.answer) for prefix in PREFIXES]
        assert [answers[at].text for answers in made] == mllm.generate(prompts, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_written_at_once_answer_as_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny(kind)
    passes: list[int] = []
    forward = mllm.core.forward

    def count(*given: Any, **named: Any) -> Any:
        passes.append(len(named["input_ids"]))
        return forward(*given, **named)

    twice = [Prompt((f"The user likes {liked}.",)) for liked in ("blue", "warm colours")]
    for prefixes, size, rows in ((PREFIXES[:1], 8, 3), (twice, 4, 4), (twice, 8, 6), (twice, 1, 1)):
        monkeypatch.setattr(mllm, "batch_size", size)
        alone = [[mllm.ask([prefix], [question], 5)[0][0] for question in MIXED] for prefix in prefixes]
        monkeypatch.setattr(mllm.core, "forward", count)
        together = mllm.ask(prefixes, MIXED, 5)
        monkeypatch.setattr(mllm.core, "forward", forward)
        assert max(passes) == rows
        passes.clear()
        for answers, singles in zip(together, alone, strict=True):
            for answer, single in zip(answers, singles, strict=True):
                assert answer.text == single.text
                np.testing.assert_allclose(answer.options, single.options, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_question_is_about_is_read_before_it_in_tokens_of_its_own(kind: str) -> None:
    mllm = tiny(kind)
    prefix, about, asked = PREFIXES[0], "a shoe.", "\nWhy?"
    (answer,) = mllm.ask([prefix], [Question(asked, about=about)], 5)[0]
    joined = mllm.ask([prefix], [Question(about + asked)], 5)[0][0]
    renderer = mllm.renderer
    head, tail = renderer.split(Request(prefix, ()))
    spaces = head[len(head.rstrip(" ")) :]
    encoded = asking.encode_question(renderer, Question(asked, about=about), spaces, tail)
    request = renderer.encode_request(Request(prefix, (about,), asked))
    assert encoded.segment == request.candidates[0] + request.behind[0]
    if encoded.segment == renderer.ids(spaces + about + asked + tail):
        assert answer.text == joined.text


def ending(kind: str, *ends: int) -> LocalMllm:
    """A model that ends at these tokens too."""
    mllm = fresh(kind)
    mllm.model.generation_config.eos_token_id = [mllm.renderer.tokenizer.eos_token_id, *ends]
    return mllm


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_stops_at_any_end_token_and_the_others_go_on(kind: str) -> None:
    free = [greedy(tiny(kind), prefix, WORDS[0], 6) for prefix in PREFIXES]
    ends = [free[0][0][0], free[1][0][2], free[4][0][1]]
    mllm = ending(kind, *ends)
    lengths = []
    for (tokens, logliks), (answer,) in zip(free, mllm.ask(PREFIXES, WORDS[:1], 6), strict=True):
        count = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        assert answer.text == said(mllm, tokens[:count])
        assert abs(answer.loglik - (sum(logliks[:count]) / count if count else 0)) < 1e-4
        lengths.append(count)
    assert min(lengths) == 0
    assert 6 in lengths
    assert set(lengths) & {1, 2}


def test_the_tokenizers_own_end_token_ends_too() -> None:
    mllm = fresh("llava")
    tokens, _ = greedy(mllm, PREFIXES[1], WORDS[0], 4)
    mllm.model.generation_config.eos_token_id = None
    mllm.renderer.tokenizer.eos_token = mllm.renderer.tokenizer.convert_ids_to_tokens(tokens[2])
    assert mllm.ask(PREFIXES[1:2], WORDS[:1], 4)[0][0].text == said(mllm, tokens[:2])


def passes(mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collects (rows, tokens) of every pass of the model."""
    seen: list[tuple[int, int]] = []
    forward = mllm.core.forward

    def watch(**inputs: Any) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(mllm.core, "forward", watch)
    return seen


def test_no_pass_is_made_once_every_row_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, _ = greedy(tiny("llava"), PREFIXES[1], WORDS[0], 3)
    mllm = ending("llava", tokens[2])
    assert tokens[2] not in tokens[:2]
    seen = passes(mllm, monkeypatch)
    mllm.ask([PREFIXES[1]] * 2, WORDS[:1], 50)
    assert [rows for rows, _ in seen] == [2] * 4
    assert [count for _, count in seen[2:]] == [1, 1]  # the third token ends, and is not read


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_answer_has_no_more_tokens_than_allowed(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = fresh("llava")
    seen = passes(mllm, monkeypatch)
    answer = mllm.ask(PREFIXES[1:2], WORDS[:1], count)[0][0]
    assert answer.text == said(mllm, greedy(tiny("llava"), PREFIXES[1], WORDS[0], count)[0])
    assert len(seen) == 1 + count
    assert (answer.text, answer.loglik) == ("", 0.0) if count == 0 else answer.loglik < 0


# Batches and questions


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_order_do_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = fresh(kind)
    made = mllm.ask(PREFIXES, MIXED, 3)
    same([answers[::-1] for answers in mllm.ask(PREFIXES[::-1], MIXED[::-1], 3)][::-1], made)
    for size in (1, 3, 32):
        monkeypatch.setattr(mllm, "batch_size", size)
        same(mllm.ask(PREFIXES, MIXED, 3), made)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_leave_the_prefix_as_it_was(kind: str) -> None:
    mllm = tiny(kind)
    made = mllm.ask(PREFIXES, MIXED + MIXED, 3)
    same([answers[: len(MIXED)] for answers in made], [answers[len(MIXED) :] for answers in made])
    single = [mllm.ask(PREFIXES, [question], 3) for question in MIXED]
    same([[answers[row][0] for answers in single] for row in range(len(PREFIXES))], mllm.ask(PREFIXES, MIXED, 3))


def test_a_batch_of_prefixes_is_read_once_and_all_options_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = fresh("llava")
    seen = passes(mllm, monkeypatch)
    mllm.ask([*PREFIXES[1::2], PREFIXES[1], PREFIXES[0]], CHOICES, 1)
    # "Item: " gives its space to the question, so its question is not the others'.
    assert [rows for rows, _ in seen] == [4, 4, 1, 1, 1, 1]


def test_prefixes_with_and_without_pictures_are_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm, batches = fresh("llava"), []
    encode = mllm.renderer.encode

    def watch(texts: list[str], pictures: list[list[Picture]], side: str) -> dict[str, torch.Tensor]:
        batches.append([len(of_text) for of_text in pictures])
        return encode(texts, pictures, side)

    monkeypatch.setattr(mllm.renderer, "encode", watch)
    mllm.ask([prefix for prefix in PREFIXES if prefix.parts[-1] != "\nItem: "], CHOICES, 1)
    assert sorted(batches) == [[0], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_moves_what_is_answered(kind: str) -> None:
    red, blue = tiny(kind).ask([Prompt((drawing("red"),)), Prompt((drawing("blue"),))], CHOICES, 1)
    for one, other in zip(red, blue, strict=True):
        assert np.abs(one.options - other.options).max() > 1e-2


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_an_attached_adapter_answers(kind: str) -> None:
    mllm = fresh(kind)
    mllm.attach_adapter(rank=2, top_layers=2, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in mllm.model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    for at in (0, 1):
        (options, words) = mllm.ask(PREFIXES[at : at + 1], [CHOICES[0], WORDS[0]], 4)[0]
        close(options.options, np.array([told(mllm, PREFIXES[at], CHOICES[0], o) for o in CHOICES[0].options], "f4"))
        assert words.text == said(mllm, greedy(mllm, PREFIXES[at], WORDS[0], 4)[0])
        assert np.abs(options.options - expected(kind)[at][0]).max() > 1e-2


def test_nothing_asked_is_nothing_answered() -> None:
    mllm = tiny("llava")
    assert mllm.ask([], MIXED, 3) == []
    assert mllm.ask(PREFIXES, [], 3) == [[] for _ in PREFIXES]


def test_a_question_without_words_continues_the_answer_itself() -> None:
    mllm = tiny("llava")
    answer = mllm.ask(PREFIXES[1:2], [Question("")], 4)[0][0]
    assert answer.text == mllm.generate(PREFIXES[1:2], 4)[0] != ""


def test_spaces_at_the_end_of_a_prefix_are_kept() -> None:
    mllm = tiny("idefics3")
    question = Question("What is it?", "It is", ("red", "a blue shirt"))
    asked = [Prompt((f"Item:{' ' * count}",)) for count in range(4)]
    made = np.array([answers[0].options for answers in mllm.ask(asked, [question], 1)])
    close(made, np.array([[told(mllm, prompt, question, o) for o in question.options] for prompt in asked], "f4"))
    assert np.abs(made[:, None] - made).max(-1)[~np.eye(4, dtype=bool)].min() > 1e-3


def test_a_template_that_ends_otherwise_for_some_prefixes_is_followed() -> None:
    mllm = fresh("llava")
    mllm.renderer.processor.chat_template = (
        "{% for message in messages if message['role'] == 'user' %}USER: "
        "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% endfor %}{% for message in messages if message['role'] == 'system' %}\n"
        "{{ message['content'][0]['text'] }}{% endfor %}\nASSISTANT:"
    )
    asked = [Prompt(("a red shoe",), system=system) for system in ("Be short.", "", "It is warm.")]
    made = np.array([answers[0].options for answers in mllm.ask(asked, CHOICES[:1], 1)])
    close(made, np.array([[told(mllm, prompt, CHOICES[0], o) for o in CHOICES[0].options] for prompt in asked], "f4"))
    assert np.abs(made[:, None] - made).max(-1)[~np.eye(3, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_cannot_bring_special_tokens(kind: str) -> None:
    mllm = tiny(kind)
    image, end = mllm.renderer.tokenizer.convert_ids_to_tokens(
        [mllm.model.config.image_token_id, mllm.renderer.tokenizer.eos_token_id]
    )
    harmful = Question(f"\n{image}Which{end}?", f"It {end} is", (f"red{image}", f"{end}blue"))
    harmless = Question(f"\n{image[1:]}Which{end[1:]}?", f"It {end[1:]} is", (f"red{image[1:]}", f"{end[1:]}blue"))
    spread = Prompt(("a shoe" + image[:-1],)), Question(image[-1] + " Which?", "It is", ("red", "blue"))
    for prefix in PREFIXES[:2]:
        one, other = (mllm.ask([prefix], [question], 1)[0][0] for question in (harmful, harmless))
        np.testing.assert_array_equal(one.options, other.options)
        assert one.text in harmful.options
    made = encode_question(mllm.renderer, harmful, "", "")
    special = set(mllm.renderer.tokenizer.all_special_ids)
    assert not special & {token for tokens in (made.segment, *made.options) for token in tokens}
    assert np.isfinite(mllm.ask([spread[0]], [spread[1]], 1)[0][0].options).all()


# Refusals


def test_a_prefix_that_begins_the_answer_is_refused() -> None:
    with pytest.raises(ModelError, match="a shared prefix cannot begin the answer"):
        tiny("llava").ask([PREFIXES[0], Prompt(("a",), answer="It is")], WORDS, 1)


def test_a_model_that_ignores_its_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = fresh("llava")
    forward = mllm.core.forward
    monkeypatch.setattr(mllm.core, "forward", lambda cache=None, **inputs: forward(**inputs))
    with pytest.raises(ModelError, match="did not fill the cache it was given"):
        mllm.ask(PREFIXES, CHOICES, 1)


def test_sliding_windows_are_refused() -> None:
    text = MistralConfig(vocab_size=len(tiny_tokenizer("llava")), sliding_window=4, **SHAPE)
    mllm = LocalMllm(*tiny_model("llava", text=text), "sliding")
    with pytest.raises(ModelError, match="plain full attention in every layer: choose another model"):
        mllm.ask(PREFIXES, WORDS, 1)
    text.sliding_window = None
    full = LocalMllm(*tiny_model("llava", text=text), "full")
    made = full.ask(PREFIXES[1:2], CHOICES[:1], 1)[0][0].options
    close(made, np.array([told(full, PREFIXES[1], CHOICES[0], o) for o in CHOICES[0].options], np.float32))

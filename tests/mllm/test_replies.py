"""What a reply says: its own words, the option it names with the likelihoods of all, the odds of Yes."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm.openai_server import completion, entry
from mllm_srec.mllm.base import Question
from mllm_srec.mllm.replies import LOWEST, Reply, RequestError, choice, log_odds, own_start, own_words, read_reply

COLOURS = ("red", "beige", "blue")
PACKAGES = ("in a bottle", "in a carton", "loose")
IN, A, CARTON = ("in", math.log(0.9)), (" a", math.log(0.8)), (" carton", math.log(0.6))


def reply(text: str, tokens: Any = (), tops: Any = ()) -> Reply:
    return read_reply(completion(text, tokens, tops))


# Tokens


def test_a_reply_is_read_with_its_tokens() -> None:
    read = reply("Hé", [("H", -0.5), ("é", -1.0)], [[("H", -0.5), ("h", -2.0)]])
    assert read.text == "Hé"
    assert [(token.text, token.size, token.loglik) for token in read.tokens] == [("H", 1, -0.5), ("é", 2, -1.0)]
    assert read.tokens[0].top == (("H", -0.5), ("h", -2.0))
    assert reply("a").tokens == ()


def test_tokens_without_bytes_and_alternatives_are_read() -> None:
    made = completion("é", [("é", -1.0)])
    made["choices"][0]["logprobs"]["content"] = [{"token": "é", "logprob": -1.0, "bytes": None, "top_logprobs": None}]
    assert [(token.size, token.top) for token in read_reply(made).tokens] == [(2, ())]


@pytest.mark.parametrize("bad", [None, "high", float("nan"), 3.0])
def test_a_logprob_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(RequestError, match="no chat completion"):
        reply("a", [("a", -1.0)], [[("b", bad)]])


def test_minus_infinity_is_bounded_and_half_characters_are_replaced() -> None:
    assert reply("a", [("a", -math.inf)]).tokens[0].loglik == LOWEST
    assert reply("a\ud83d").text == "a?"


# Own words


@pytest.mark.parametrize(
    ("text", "beginning", "own"),
    [
        ("a red shoe", "", "a red shoe"),
        ("It is red", "It is", "red"),
        (" it IS\nred.", "It is", "red."),
        ("It isn't red", "It is", "It isn't red"),
        ("red, it is", "It is", "red, it is"),
        ("The picture shows a hat", "The picture shows a", "hat"),
        ("The picture shows an apple", "The picture shows a", "apple"),
        ("The picture shows apples", "The picture shows a", "The picture shows apples"),
        ('The words are "SALE"', 'The words are "', 'SALE"'),
        ("a.c", "a.", "c"),
        ("abc", "a.", "abc"),
        ("It is", "It is", ""),
    ],
)
def test_a_repeated_beginning_is_taken_off(text: str, beginning: str, own: str) -> None:
    assert text[own_start(reply(text), beginning) :].strip() == own
    assert own_words(reply(text), Question("?", beginning)).text == own


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_beginning_breaks_the_reading(text: str, beginning: str) -> None:
    if text.strip():
        assert 0 <= own_start(Reply(text, ()), beginning) <= len(text)


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_reply_is_named(text: Any) -> None:
    for read in (own_words, choice):
        with pytest.raises(RequestError, match="the reply holds no text"):
            read(reply(text), Question("?", options=("a",)))


def test_own_words_have_no_likelihood_even_where_tokens_have() -> None:
    made = own_words(reply("dark red", [("dark", -1.0), (" red", -2.0)]), Question("?", "It is"))
    assert (made.text, made.loglik, made.options.shape) == ("dark red", None, (0,))


# Options


def test_one_token_tells_the_options_apart() -> None:
    top = [("Red", 0.5), (" red", 0.2), ("b", 0.1), ("be", 0.05), ("x", 0.02)]
    top = [(text, math.log(p)) for text, p in top]
    made = choice(reply("Red.", [("Red", math.log(0.5)), (".", -1.0)], [top]), Question("?", options=COLOURS))
    assert made.text == "red"
    assert made.options.dtype == np.float32
    # "b" begins two of them and tells nothing; the least that was given bounds blue
    np.testing.assert_allclose(np.exp(made.options), [0.7, 0.05, 0.02], rtol=1e-6)
    assert made.loglik == made.options[0]


def test_what_a_server_calls_impossible_stays_finite() -> None:
    made = choice(reply("red", [("red", 0.0)], [[("red", 0.0), ("blue", -math.inf)]]), Question("?", options=COLOURS))
    np.testing.assert_array_equal(made.options, [0, LOWEST, LOWEST])


def test_tokens_of_a_repeated_beginning_and_of_the_end_tell_nothing() -> None:
    red, blue = (" red", math.log(0.6)), (" blue", math.log(0.3))
    tokens = [("It", -3.0), (" is", -3.0), red, ("<|im_end|>", -3.0)]
    tops = [[("blue", -0.1)], [("blue", -0.1)], [red, blue], [("blue", -0.1)]]
    made = choice(reply("It is red", tokens, tops), Question("?", "It is", ("red", "blue")))
    assert made.text == "red"
    np.testing.assert_allclose(np.exp(made.options), [0.6, 0.3], rtol=1e-6)


def test_options_that_begin_alike_are_told_apart_where_they_part() -> None:
    tops = [[IN, ("l", math.log(0.05))], [A], [CARTON, (" bottle", math.log(0.3)), (" box", math.log(0.1))]]
    made = choice(reply("in a carton", [IN, A, CARTON], tops), Question("?", options=PACKAGES))
    assert made.text == "in a carton"
    np.testing.assert_allclose(np.exp(made.options), [0.72 * 0.3, 0.72 * 0.6, 0.05], rtol=1e-6)


def test_the_likeliest_option_is_the_answer_however_it_is_written() -> None:
    top = [("blue", math.log(0.4)), ("Red", math.log(0.3)), ("red", math.log(0.25))]
    made = choice(reply("blue", top[:1], [top]), Question("?", options=COLOURS))
    assert made.text == "red"
    np.testing.assert_allclose(np.exp(made.options), [0.55, 0.25, 0.4], rtol=1e-6)


@pytest.mark.parametrize("text", ["red", " Red.", '"RED"', "**red**", "It is red!", "it is: red"])
def test_an_option_is_known_in_any_dress(text: str) -> None:
    assert choice(reply(text), Question("?", "It is", COLOURS)).text == "red"


@pytest.mark.parametrize("text", ["reddish", "red and blue", "not red", "green", "re", "...", "The colour is red"])
def test_a_reply_that_is_no_option_is_none(text: str) -> None:
    made = choice(reply(text, [(text, -0.1)], [[("red", -1.0)]]), Question("?", "It is", COLOURS))
    assert (made.text, made.loglik) == ("", None)
    np.testing.assert_array_equal(made.options, np.full(3, -np.inf, np.float32))


def test_without_logprobs_the_choice_has_no_likelihood() -> None:
    for tokens in ([], [("blue", -0.1), ("?", -1.0)][1:]):
        made = choice(reply("blue", tokens), Question("?", options=COLOURS))
        assert (made.text, made.loglik) == ("blue", None)
        np.testing.assert_array_equal(made.options, np.full(3, np.nan, np.float32))


@given(
    st.lists(st.sampled_from(["r", "re", "red", " Red", "b", "bl", "be", "blue", "x", "\n"]), min_size=1, unique=True),
    st.integers(0, 10**6),
)
def test_a_known_option_is_never_below_the_bound_and_all_are_finite(texts: list[str], seed: int) -> None:
    texts = list(dict.fromkeys(["red", *texts]))
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(texts) + 1))[:-1]
    top = [(text, float(np.log(p))) for text, p in zip(texts, shares, strict=True)]
    made = choice(reply("red", top[:1], [top]), Question("?", options=COLOURS))
    least = min(loglik for _, loglik in top)
    assert np.isfinite(made.options).all()
    assert (made.options >= np.float32(least) - 1e-4).all()
    assert np.exp(made.options[made.options > np.float32(least) + 1e-4]).sum() <= 1 + 1e-4
    assert made.loglik == made.options[COLOURS.index(made.text)] == made.options.max() >= np.float32(top[0][1]) - 1e-4


# Yes and No


def odds(*top: tuple[str, float]) -> float:
    return log_odds(read_reply(completion("", [top[0]], [top])))


def test_the_odds_are_those_of_the_first_token() -> None:
    assert odds(("Yes", -0.5), ("No", -2.0)) == 1.5
    assert odds(("no", -0.5), (" YES", -2.0), ("maybe", -9.0)) == -1.5
    half = math.log(0.25)
    assert odds(("Yes", half), (" yes", half), ("No", math.log(0.1))) == pytest.approx(math.log(0.5 / 0.1))


def test_a_missing_label_is_bounded_by_the_least_that_is_given() -> None:
    assert odds(("Yes", -0.5), ("Maybe", -3.0), ("Item", -4.0)) == 3.5
    assert odds(("Maybe", -0.5), ("No", -1.0), ("Item", -4.0)) == -3.0


def test_neither_label_is_no_score() -> None:
    with pytest.raises(RequestError, match="neither Yes nor No is among the 2 likeliest") as error:
        odds(("Maybe", -0.5), ("yesterday", -3.0))
    assert error.value.of == "row"


@pytest.mark.parametrize("tokens", [[], [entry("Yes", -0.1)]])
def test_a_server_without_logprobs_is_named(tokens: list[Any]) -> None:
    made = completion("Yes")
    made["choices"][0]["logprobs"] = {"content": tokens}
    with pytest.raises(RequestError, match="the reply has no logprobs") as error:
        log_odds(read_reply(made))
    assert error.value.of == "server"

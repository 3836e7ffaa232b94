"""Stage 1: only what the picture shows and the text says gets into a description, and only changed rows are made."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeMllm, make_shop, png, shown
from mllm_srec.config import Config, ItemsConfig, ModelConfig, Questions
from mllm_srec.errors import ModelError
from mllm_srec.items import ITEM_TEXTS, describe, domain_of, first_words, load_items
from mllm_srec.mllm.base import Answer, PartialFailure, Prompt, Question
from mllm_srec.prompts import items as prompts
from mllm_srec.workspace import Counts, Workspace

RED, BLUE = png("red"), png("blue")
RED_HASH, BLUE_HASH = hashlib.sha256(RED).hexdigest(), hashlib.sha256(BLUE).hexdigest()

SHOP = [
    {"item_id": "both", "title": "Trail  shoe\nlow", "description": "Light sole.", "category": "Shoes", "image": "red"},
    {"item_id": "text", "title": "Wool scarf", "description": "Warm for winter.", "category": "Scarves"},
    {"item_id": "picture", "image": "blue"},
    {"item_id": "empty"},
    {"item_id": "lost", "image": "gone"},
    {"item_id": "broken", "title": "Hat", "image": "broken"},
]
FILES = {"red": RED, "blue": BLUE, "broken": b"not a picture"}
LOG = {"u": [("both", 1, None), ("text", 2, None)]}

KIND, COLOUR, PATTERN, MATERIAL = (prompts.QUESTIONS[n].answer for n in ("kind", "colour", "pattern", "material"))
SEES = {(RED_HASH, KIND): "Running shoe. It is", (RED_HASH, COLOUR): "red", (BLUE_HASH, KIND): "blue bag"}


@dataclass
class Eyes(FakeMllm):
    """Knows the two pictures; own words are unlikely without one. Fails where it is told to, by what it is shown."""

    sees: Any = field(default_factory=lambda: SEES)
    likelihood: Any = lambda before, text: -9.0
    fails: tuple[str, ...] = ()

    def ask(self, prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int) -> list[list[Answer]]:
        return self._whole(prefixes, super().ask(prefixes, questions, max_new_tokens))

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return self._whole(prompts, super().generate(prompts, max_new_tokens))

    def _whole(self, prompts: Sequence[Prompt], results: list[Any]) -> list[Any]:
        errors = {
            r: "HTTP 500" for r, prompt in enumerate(prompts) if any(text in shown(prompt) for text in self.fails)
        }
        if errors:
            raise PartialFailure([None if row in errors else result for row, result in enumerate(results)], errors)
        return results


def shop(folder: Path, batch_size: int = 4, **settings: object) -> Workspace:
    config = Config(items=ItemsConfig.model_validate(settings), model=ModelConfig(batch_size=batch_size))
    return make_shop(folder, SHOP, LOG, config, FILES)


def one(folder: Path, config: Config | None = None, **item: str) -> Workspace:
    """A shop of one item."""
    return make_shop(folder, [{"item_id": "a", **item}], {"u": [("a", 1, None)]}, config, FILES)


def rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in workspace.rows(ITEM_TEXTS).to_dicts()}


def facts(row: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    return [(fact["attribute"], fact["value"], fact["origin"], fact["contradicted"]) for fact in row["facts"]]


def asked_of(mllm: FakeMllm, before: str) -> list[str]:
    """The answers' first words of the questions behind this prefix."""
    return [question.answer for prefix, question in mllm.asked if shown(prefix) == before]


# Words


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("one  two\nthree", 3, "one two three"),
        ("", 3, ""),
        ("one two, three", 2, "one two ..."),
        ("A red shoe. It has laces and more", 5, "A red shoe."),
        ("One two three. Four", 3, "One two three."),
        ("Really? Yes, why not", 2, "Really?"),
        ("Go! All the others stay behind", 5, "Go! All the others stay ..."),
    ],
)
def test_first_words_end_at_a_sentence_that_keeps_half(text: str, count: int, expected: str) -> None:
    assert first_words(text, count) == expected


@given(st.text("ab.,! "), st.integers(1, 6))
def test_first_words_are_a_beginning_of_at_most_count_words(text: str, count: int) -> None:
    cut = first_words(text, count)
    if cut != " ".join(text.split()):
        assert len(cut.removesuffix(" ...").split()) <= count < len(text.split())
        assert " ".join(text.split()).startswith(cut.removesuffix(" ..."))


# Describing


def test_every_item_gets_one_row_with_its_state(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    counts = describe(workspace, Eyes())
    assert counts == Counts(reused=0, made=6, failed=0)
    made = rows(workspace)
    assert {key: (row["visual"], row["description"]) for key, row in made.items()} == {
        "both": ("red running shoe", "Light sole. Picture: red running shoe."),
        "text": ("", "Warm for winter."),
        "picture": ("blue bag", "Picture: blue bag."),
        "empty": ("", ""),
        "lost": ("", ""),
        "broken": ("", ""),
    }
    assert {key: facts(row) for key, row in made.items() if row["facts"]} == {
        "both": [("kind", "pair of shoes", "both", False), ("colour", "red", "picture", False)],
        "picture": [("kind", "bag", "picture", False)],
        "broken": [("kind", "hat", "text", False)],
    }
    assert {row["fused_by"] for row in made.values()} == {"rule"}
    assert {row["cleaned"] for row in made.values()} == {""}
    states = ["ok", "none", "ok", "none", "missing", "not_a_picture"]
    assert [made[str(item["item_id"])]["picture"] for item in SHOP] == states
    assert {key: row["reason"] for key, row in made.items() if row["status"] == "skipped"} == {
        "empty": "no text, picture none",
        "lost": "no text, picture missing",
    }


def test_what_the_picture_did_not_give_is_no_part_of_the_row(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    describe(workspace, Eyes(likelihood=lambda before, text: -0.5))  # as likely without the picture
    made = rows(workspace)
    assert made["both"]["visual"] == "red"  # an option, judged by its own share
    assert facts(made["both"]) == [("kind", "pair of shoes", "text", False), ("colour", "red", "picture", False)]
    assert (made["picture"]["status"], made["picture"]["reason"]) == (
        "skipped",
        "no text, nothing seen in the picture",
    )


def test_a_catalogue_without_pictures_asks_nothing(tmp_path: Path) -> None:
    asked = FakeMllm()
    workspace = one(tmp_path, title="Red hat", description="A striped hat.")
    describe(workspace, asked)
    assert asked.calls() == 0
    assert facts(rows(workspace)["a"]) == [
        ("kind", "hat", "text", False),
        ("colour", "red", "text", False),
        ("pattern", "striped", "text", False),
    ]


def test_a_likelihood_that_is_not_finite_stops_with_the_fix(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    with pytest.raises(ModelError, match=r"answers.*not finite: try model.dtype=float32"):
        describe(workspace, Eyes(likelihood=lambda before, text: float("nan")))
    assert rows(workspace) == {}


# Questions


@pytest.mark.parametrize(
    ("category", "domain"),
    [
        ("Women > T-Shirt", "fashion"),
        ("Animation, Comedy", "films"),
        ("Sci-Fi", "films"),
        ("Grocery/Snacks", "food"),
        ("Home, Kitchen", "goods"),
        ("Sports, Shoes", "fashion"),  # the domains' order, not the path's
        ("Topology", "general"),
        ("", "general"),
    ],
)
def test_a_category_tells_the_domain(category: str, domain: str) -> None:
    assert domain_of(category) == domain


def test_each_item_is_asked_the_questions_of_its_domain(tmp_path: Path) -> None:
    catalogue = [
        {"item_id": "film", "title": "F", "category": "Drama", "image": "red"},
        {"item_id": "food", "title": "G", "category": "Fruit", "image": "blue"},
        {"item_id": "film2", "title": "H", "category": "Thriller", "image": "blue"},
        {"item_id": "bare", "title": "I", "category": "Drama"},
    ]
    config = Config(items=ItemsConfig(questions=get_args(Questions)))
    workspace = make_shop(tmp_path, catalogue, {"u": [("film", 1, None)]}, config, FILES)
    eyes = Eyes()
    describe(workspace, eyes)
    films, food = ([prompts.QUESTIONS[name].answer for name in prompts.DOMAINS[d]] for d in ("films", "food"))
    assert asked_of(eyes, f"Picture: <{RED_HASH}>") == films
    assert asked_of(eyes, f"Picture: <{BLUE_HASH}>") in (films + food, food + films)
    assert sorted(asked_of(eyes, prompts.NO_PICTURE)) == sorted([*films, *food[:-1]])  # `text` is in both


def test_a_given_domain_holds_for_all_and_only_the_chosen_questions_are_asked(tmp_path: Path) -> None:
    workspace = shop(tmp_path, domain="fashion", questions=("material", "kind", "scene"))
    eyes = Eyes()
    describe(workspace, eyes)
    for sha256 in (RED_HASH, BLUE_HASH):
        assert asked_of(eyes, f"Picture: <{sha256}>") == [KIND, MATERIAL]  # fashion has no scene


def test_a_domain_without_a_chosen_question_asks_nothing(tmp_path: Path) -> None:
    workspace = shop(tmp_path, domain="films", questions=("colour",))
    eyes = Eyes()
    describe(workspace, eyes)
    assert eyes.calls() == 0
    assert rows(workspace)["both"]["visual"] == ""


def test_the_picture_free_prompt_is_asked_once_and_each_answer_weighed_once(tmp_path: Path) -> None:
    catalogue = [{"item_id": f"i{n}", "title": "T", "image": "red" if n % 2 else "blue"} for n in range(9)]
    config = Config(model=ModelConfig(batch_size=2))
    workspace = make_shop(tmp_path, catalogue, {"u": [("i0", 1, None)]}, config, FILES)
    eyes = Eyes()
    assert describe(workspace, eyes).made == 9
    assert asked_of(eyes, prompts.NO_PICTURE) == [KIND, COLOUR, PATTERN]
    assert len(eyes.asked) == 3 + 9 * 3
    assert sorted(text for _, text in eyes.weighed) == [" Running shoe. It is", " blue bag"]


def test_a_film_takes_no_colour_from_its_plot(tmp_path: Path) -> None:
    config = Config(items=ItemsConfig(questions=("scene", "colour")))
    film = {"title": "Night", "category": "Drama", "description": "A black car, a red hat."}
    workspace = one(tmp_path, config, **film, image="red")
    describe(workspace, Eyes())
    row = rows(workspace)["a"]
    assert row["visual"] == "running shoe"
    assert facts(row) == [("scene", "running shoe", "picture", False)]


# Picture against text


@pytest.mark.parametrize("fusion", ["compose", "generate"])
def test_contradictions_stay_marked_are_counted_and_are_not_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fusion: str
) -> None:
    catalogue = [
        {"item_id": "kind", "title": "Wool hat", "image": "blue"},
        {"item_id": "colour", "title": "Green shoe", "image": "red"},
        {"item_id": "fine", "title": "Red shoe", "image": "red"},
    ]
    config = Config(items=ItemsConfig(fusion=fusion))
    workspace = make_shop(tmp_path, catalogue, {"u": [("kind", 1, None)]}, config, FILES)
    eyes = Eyes(sees=SEES | {(BLUE_HASH, COLOUR): "blue"})
    describe(workspace, eyes)
    made = rows(workspace)
    assert facts(made["kind"]) == [
        ("kind", "bag", "picture", True),
        ("kind", "hat", "text", True),
        ("colour", "blue", "picture", False),
    ]
    assert facts(made["colour"]) == [
        ("kind", "pair of shoes", "both", False),
        ("colour", "red", "picture", True),
        ("colour", "green", "text", True),
    ]
    assert [made[key]["visual"] for key in ("kind", "colour", "fine")] == ["blue", "running shoe", "red running shoe"]
    assert {a["question"]: a["answer"] for a in made["colour"]["seen"]} == {"kind": "running shoe", "colour": "red"}
    assert not any("bag" in shown(prompt) for prompt in eyes.generated)  # the fusing model is not told either
    said = "describe: picture and text contradict each other in 2 of 3 items"
    assert said in capsys.readouterr().err.splitlines()
    describe(workspace, eyes)
    assert said not in capsys.readouterr().err  # nothing was made


def test_a_kind_that_no_vocabulary_knows_stays_beside_the_texts(tmp_path: Path) -> None:
    workspace = one(tmp_path, title="Rain jacket", image="blue")
    describe(workspace, Eyes(sees={(BLUE_HASH, KIND): "yellow poncho"}))
    row = rows(workspace)["a"]
    assert row["visual"] == "yellow poncho"
    assert facts(row) == [("kind", "yellow poncho", "picture", False), ("kind", "jacket or coat", "text", False)]


def test_cleaned_texts_are_named_in_the_row_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue = [
        {"item_id": "a", "title": "<b>Red</b> hat", "description": "Soft\u200b wool.", "category": "Hats"},
        {"item_id": "b", "title": "Cap", "category": "<i>Hats</i>"},
        {"item_id": "c", "title": "Scarf"},
    ]
    workspace = make_shop(tmp_path, catalogue, {"u": [("a", 1, None)]})
    describe(workspace, FakeMllm())
    made = rows(workspace)
    assert {key: row["cleaned"] for key, row in made.items()} == {"a": "html, invisible", "b": "html", "c": ""}
    assert made["a"]["description"] == "Soft wool."
    assert [(item.title, item.category) for item in load_items(workspace)][:2] == [("Red hat", "Hats"), ("Cap", "Hats")]
    assert "describe: taken out of texts: html (2 items), invisible (1 items)" in capsys.readouterr().err.splitlines()


# Fusing


def test_a_sentence_with_invented_words_falls_back_to_the_rule(tmp_path: Path) -> None:
    def write(prompt: Prompt) -> str:
        text = shown(prompt)
        if "Trail shoe" in text:
            return "This is a red trail shoe with\n a light sole."
        return "A golden scarf." if "scarf" in text else ""

    workspace = shop(tmp_path, fusion="generate", text_words=5)
    eyes = Eyes(say=write)
    describe(workspace, eyes)
    made = rows(workspace)
    told = {key: (row["description"], row["fused_by"]) for key, row in made.items()}
    assert told["both"] == ("This is a red trail shoe with a light sole.", "model")
    assert told["text"] == ("Warm for winter.", "rule")
    assert told["picture"] == ("Picture: blue bag.", "rule")
    assert all(prompt.system == prompts.FUSE_SYSTEM for prompt in eyes.generated)
    lines = "Title: Trail shoe low\nCategory: Shoes\nText: Light sole.\nSeen in the picture: red running shoe\n"
    assert lines in shown(eyes.generated[0])


def test_an_item_of_which_nothing_is_known_is_not_written_about(tmp_path: Path) -> None:
    workspace = shop(tmp_path, fusion="generate")
    eyes = Eyes(say=lambda prompt: "It is")
    describe(workspace, eyes)
    made = rows(workspace)
    assert [made[key]["status"] for key in ("empty", "lost", "broken")] == ["skipped", "skipped", "ok"]
    assert len(eyes.generated) == 4

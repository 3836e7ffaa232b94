"""Stage 1: only what the picture shows and the text says gets into a description, and only changed rows are made."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeEncoder, FakeMllm, make_shop, png, shown, vectors
from mllm_srec import items
from mllm_srec.config import Config, ItemsConfig, ModelConfig
from mllm_srec.errors import ModelError, StoreError
from mllm_srec.items import (
    ITEM_TEXTS,
    MIN_EVIDENCE,
    MIN_LOGLIK,
    Catalogue,
    category_facts,
    clean_answer,
    describe,
    embed,
    first_words,
    keyword_facts,
    load_embeddings,
    load_items,
    unsupported_words,
)
from mllm_srec.mllm.base import Prompt
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


def shop(folder: Path, batch_size: int = 4, **settings: object) -> Workspace:
    config = Config(items=ItemsConfig.model_validate(settings), model=ModelConfig(batch_size=batch_size))
    return make_shop(folder, SHOP, LOG, config, FILES)


def look(prompt: Prompt) -> str:
    """A model that knows the two pictures and, asked to fuse, repeats what it was given."""
    text = shown(prompt)
    if "<" in text:
        return "red shoe, on the floor" if RED_HASH in text else "blue bag. It is"
    return ""


def sees(before: str, continuation: str) -> float:
    """Pictures make every answer likelier by three nats."""
    return -1.0 if "<" in before else -4.0


def rows(workspace: Workspace) -> dict[str, dict[str, object]]:
    return {row["key"]: row for row in workspace.rows(ITEM_TEXTS).to_dicts()}


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


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" A Red shoe. It is on the floor", "a red shoe"),
        ("woman with a hat", "woman"),
        ("poster of the", "poster"),
        ("t-shirt (cotton)", "t-shirt"),
        ("withered rose", "withered rose"),
        ("the", ""),
        ("\n?", ""),
    ],
)
def test_an_answer_is_what_it_names_first(said: str, answer: str) -> None:
    assert clean_answer(said) == answer


def test_words_that_no_source_holds_are_unsupported() -> None:
    assert unsupported_words("A red leather shoe", "Shoe, leathern", "red") == []
    assert unsupported_words("A golden leather shoe", "Leather shoe") == ["golden"]
    assert unsupported_words("shoes and bags", "shoe bag") == ["shoes", "bags"]  # the first five letters decide
    assert unsupported_words("one of those", "") == ["those"]
    assert unsupported_words("This is with them about their", "") == []  # function words say nothing about an item
    assert unsupported_words("Золотой сапог", "сапог") == ["золотой"]
    assert unsupported_words("", "") == []


@pytest.mark.parametrize(
    ("category", "facts"),
    [
        ("Animation, Comedy", ["animation", "comedy"]),
        ("Women > Shoes|Boots/Shoes;  X", ["women", "shoes", "boots"]),
        ("", []),
    ],
)
def test_category_facts_are_the_parts_each_once(category: str, facts: list[str]) -> None:
    assert category_facts(category) == facts


def test_keywords_are_held_by_three_texts_and_at_most_a_fifth() -> None:
    texts = ["filler"] * 20
    texts[0] = "the rare wool, warm wool"
    for at, word in ((1, "warm wool"), (2, "warm wool"), (3, "warm rare")):
        texts[at] = word
    # of 20 texts: warm 4 (a fifth), wool 3, rare 2 (too few), filler 16 (too many), "the" is no content word
    assert keyword_facts(texts)[:5] == [["warm", "wool"], ["warm", "wool"], ["warm", "wool"], ["warm"], []]
    assert keyword_facts(texts, limit=1)[0] == ["warm"]
    assert keyword_facts([]) == []


# Describing


def test_every_item_gets_one_row_with_its_state(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    counts = describe(workspace, FakeMllm(say=look, likelihood=sees))
    assert counts == Counts(reused=0, made=6, failed=0)
    made = rows(workspace)
    assert {key: (row["visual"], row["description"]) for key, row in made.items()} == {
        "both": ("red shoe", "Light sole. Picture: red shoe."),
        "text": ("", "Warm for winter."),
        "picture": ("blue bag", "Picture: blue bag."),
        "empty": ("", ""),
        "lost": ("", ""),
        "broken": ("", ""),
    }
    assert {row["fused_by"] for row in made.values()} == {"rule"}
    assert {key: row["picture"] for key, row in made.items()} == {
        "both": "ok",
        "text": "none",
        "picture": "ok",
        "empty": "none",
        "lost": "missing",
        "broken": "not_a_picture",
    }
    assert {key: row["reason"] for key, row in made.items() if row["status"] == "skipped"} == {
        "empty": "no text, picture none",
        "lost": "no text, picture missing",
    }


@pytest.mark.parametrize(("gain", "seen"), [(MIN_EVIDENCE, "red shoe"), (MIN_EVIDENCE - 0.01, ""), (-1.0, "")])
def test_an_answer_that_is_as_likely_without_the_picture_was_not_seen(tmp_path: Path, gain: float, seen: str) -> None:
    workspace = shop(tmp_path)
    asked = FakeMllm(say=look, likelihood=lambda before, _: -1.0 if "<" in before else -1.0 - gain)
    describe(workspace, asked)
    assert rows(workspace)["both"]["visual"] == seen
    assert rows(workspace)["picture"]["reason"] == ("" if seen else "no text, nothing seen in the picture")
    question = "\nWhat is in the picture?The picture shows a"
    answers = (" red shoe", " blue bag")
    assert set(asked.weighed) == {("Picture: none" + question, answer) for answer in answers} | {
        (f"Picture: <{sha256}>" + question, answer)
        for sha256, answer in zip((RED_HASH, BLUE_HASH), answers, strict=True)
    }


@pytest.mark.parametrize(("likelihood", "seen"), [(MIN_LOGLIK, "red shoe"), (MIN_LOGLIK - 0.01, "")])
def test_an_answer_that_is_unlikely_even_with_the_picture_was_not_seen(
    tmp_path: Path, likelihood: float, seen: str
) -> None:
    workspace = shop(tmp_path)
    describe(workspace, FakeMllm(say=look, likelihood=lambda before, _: likelihood if "<" in before else -9.0))
    assert rows(workspace)["both"]["visual"] == seen


def test_each_question_is_asked_about_each_picture_and_each_answer_kept_once(tmp_path: Path) -> None:
    workspace = shop(tmp_path, batch_size=32, questions=("kind", "colours", "pattern", "style"))
    answers = {"What is in": "shoe", "colours": "red", "pattern": "red", "style": "..."}
    asked = FakeMllm(say=lambda prompt: next(a for q, a in answers.items() if q in shown(prompt)), likelihood=sees)
    describe(workspace, asked)
    assert rows(workspace)["both"]["visual"] == "shoe, red"
    assert len(asked.generated) == 2 * 4
    assert {prompt.answer for prompt in asked.generated} == {q.answer for q in prompts.QUESTIONS.values()}


def test_a_catalogue_without_pictures_asks_nothing(tmp_path: Path) -> None:
    asked = FakeMllm()
    workspace = make_shop(tmp_path, [{"item_id": "a", "title": "A"}], {"u": [("a", 1, None)]})
    describe(workspace, asked)
    assert asked.calls() == 0


@pytest.mark.parametrize("where", ["<", "none"])
def test_a_likelihood_that_is_not_finite_stops_with_the_fix(tmp_path: Path, where: str) -> None:
    broken = FakeMllm(say=look, likelihood=lambda before, _: float("nan") if where in before else -1.0)
    with pytest.raises(ModelError, match=r"answers.*not finite: try model.dtype=float32"):
        describe(shop(tmp_path), broken)


def test_a_sentence_with_invented_words_falls_back_to_the_rule(tmp_path: Path) -> None:
    def write(prompt: Prompt) -> str:
        text = shown(prompt)
        if "<" in text:
            return look(prompt)
        if "Trail shoe" in text:
            return "This is a red trail shoe with\n a light sole."
        return "A golden scarf." if "scarf" in text else ""

    workspace = shop(tmp_path, fusion="generate", text_words=5)
    asked = FakeMllm(say=write, likelihood=sees)
    describe(workspace, asked)
    made = rows(workspace)
    told = {key: (row["description"], row["fused_by"]) for key, row in made.items()}
    assert told["both"] == ("This is a red trail shoe with a light sole.", "model")
    assert told["text"] == ("Warm for winter.", "rule")
    assert told["picture"] == ("Picture: blue bag.", "rule")
    fusing = [prompt for prompt in asked.generated if prompt.system == prompts.FUSE_SYSTEM]
    assert "Title: Trail shoe low\nCategory: Shoes\nText: Light sole.\nSeen in the picture: red shoe\n" in shown(
        fusing[0]
    )


def test_an_item_of_which_nothing_is_known_is_not_written_about(tmp_path: Path) -> None:
    workspace = shop(tmp_path, fusion="generate")
    asked = FakeMllm(say=lambda prompt: look(prompt) or "It is", likelihood=sees)
    describe(workspace, asked)
    made = rows(workspace)
    assert [made[key]["status"] for key in ("empty", "lost", "broken")] == ["skipped", "skipped", "ok"]
    assert sum(prompt.system == prompts.FUSE_SYSTEM for prompt in asked.generated) == 4


@pytest.mark.parametrize(
    ("change", "made"),
    [("nothing", 0), ("model", 6), ("settings", 6), ("version", 6), ("other section", 0)],
)
def test_rows_are_made_again_only_when_what_made_them_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, made: int
) -> None:
    workspace = shop(tmp_path)
    describe(workspace, FakeMllm(say=look, likelihood=sees))
    before = workspace.rows(ITEM_TEXTS)
    again = FakeMllm("fake-2" if change == "model" else "fake-1", say=look, likelihood=sees)
    if change == "settings":
        workspace.save_config(workspace.config.model_copy(update={"items": ItemsConfig(text_words=9)}))
    if change == "other section":
        workspace.save_config(workspace.config.model_copy(update={"seed": 9}))
    if change == "version":
        monkeypatch.setattr(prompts, "VERSION", "items-next")
    assert describe(workspace, again) == Counts(reused=6 - made, made=made, failed=0)
    assert len(again.generated) == (2 if made else 0)
    assert workspace.rows(ITEM_TEXTS).drop("fingerprint").equals(before.drop("fingerprint"))


@pytest.mark.parametrize(
    ("changed", "looked_at"),
    [
        ({"title": "Bag"}, BLUE_HASH),
        ({"description": "Large."}, BLUE_HASH),
        ({"category": "Bags"}, BLUE_HASH),
        ({"picture_sha256": RED_HASH}, RED_HASH),
        ({"picture_sha256": None, "picture_state": "missing"}, None),
    ],
)
def test_only_the_item_that_changed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], looked_at: str | None
) -> None:
    workspace = shop(tmp_path)
    describe(workspace, FakeMllm(say=look, likelihood=sees))
    catalogue = [replace(item, **changed) if item.item_id == "picture" else item for item in load_items(workspace)]
    monkeypatch.setattr(items, "load_items", lambda _: catalogue)
    again = FakeMllm(say=look, likelihood=sees)
    assert describe(workspace, again) == Counts(reused=5, made=1, failed=0)
    asked = [f"Picture: <{looked_at}>\nWhat is in the picture?The picture shows a"] if looked_at else []
    assert [shown(prompt) for prompt in again.generated] == asked


# The catalogue


def test_the_catalogue_keeps_the_datasets_order_and_tells_every_item_in_one_line(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    describe(workspace, FakeMllm(say=look, likelihood=sees))
    catalogue = Catalogue.load(workspace)
    assert catalogue.ids == ["both", "text", "picture", "empty", "lost", "broken"]
    assert catalogue.lines == [
        "Trail shoe low (Shoes)",
        "Wool scarf (Scarves)",
        *["item without text"] * 3,
        "Hat",
    ]
    assert catalogue.candidates == [
        "Trail shoe low. Shoes. Light sole. Picture: red shoe.",
        "Wool scarf. Scarves. Warm for winter.",
        "Picture: blue bag.",
        "item without text.",
        "item without text.",
        "Hat.",
    ]
    assert catalogue.embedding_texts == [
        "Trail shoe low. Shoes. Light sole.",
        "Wool scarf. Scarves. Warm for winter.",
        "Picture: blue bag.",
        "",
        "",
        "Hat",
    ]


def test_facts_come_from_category_text_and_picture_with_their_share_of_the_catalogue(tmp_path: Path) -> None:
    shop_items = [
        {"item_id": f"i{n}", "title": "Wool hat" if n < 3 else "Thing", "category": "Hats, Shoe" if n < 2 else ""}
        for n in range(16)
    ]
    shop_items[0]["image"] = "red"
    workspace = make_shop(tmp_path, shop_items, {"u": [("i0", 1, None)]}, pictures=FILES)
    describe(workspace, FakeMllm(say=lambda prompt: "Shoe", likelihood=sees))
    catalogue = Catalogue.load(workspace)
    assert catalogue.facts[:4] == [
        ["hats", "shoe", "hat", "wool"],
        ["hats", "shoe", "hat", "wool"],
        ["hat", "wool"],
        [],
    ]
    assert catalogue.base_rate == {"hats": 2 / 16, "shoe": 2 / 16, "hat": 3 / 16, "wool": 3 / 16}


def test_a_missing_description_is_named(tmp_path: Path) -> None:
    workspace = shop(tmp_path, batch_size=2)

    def stumble(prompt: Prompt) -> str:
        if BLUE_HASH in shown(prompt):
            raise RuntimeError("out of memory")
        return look(prompt)

    with pytest.raises(RuntimeError):
        describe(workspace, FakeMllm(say=stumble, likelihood=sees))
    with pytest.raises(StoreError, match=r"4 of 6 items have no description \(first: 'picture'\): run `mllm-srec desc"):
        Catalogue.load(workspace)
    again = FakeMllm(say=look, likelihood=sees)
    assert describe(workspace, again) == Counts(reused=2, made=4, failed=0)
    assert len(Catalogue.load(workspace).ids) == 6


def test_embeddings_are_stored_in_the_catalogues_order_and_reused(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    describe(workspace, FakeMllm(say=look, likelihood=sees))
    catalogue = Catalogue.load(workspace)
    with pytest.raises(StoreError, match=r"6 items have no embedding \(first: 'both'\): run `mllm-srec retrieve`"):
        load_embeddings(workspace, catalogue)
    encoder = FakeEncoder()
    made = embed(workspace, encoder, catalogue)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, vectors(catalogue.embedding_texts))
    np.testing.assert_array_equal(load_embeddings(workspace, catalogue), made)
    embed(workspace, encoder, catalogue)
    assert encoder.encoded == catalogue.embedding_texts
    changed = [*catalogue.embedding_texts[:-1], "Cap"]
    embed(workspace, encoder, replace(catalogue, embedding_texts=changed))
    assert encoder.encoded[6:] == ["Cap"]
    other = FakeEncoder("encoder-2")
    embed(workspace, other, catalogue)
    assert len(other.encoded) == 6

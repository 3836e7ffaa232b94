"""One code path for every kind of model: what a picture becomes is counted, and nothing is cut off in silence."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes import make_shop, png
from mllm_srec.catalogue import Catalogue
from mllm_srec.config import Config, ItemsConfig, ModelConfig
from mllm_srec.errors import ModelError
from mllm_srec.items import ITEM_TEXTS, describe
from mllm_srec.mllm.base import Picture, Prompt, Question, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.pieces import text_piece
from mllm_srec.mllm.rendering import Renderer
from mllm_srec.mllm.scoring import read_segments
from tiny_models import KINDS, drawing, tiny_mllm, tiny_model

RED = drawing("red")
SEEING = Prompt((RED, "What is in the picture?"))
BLIND = Prompt(("What is in the picture?",))
ASKED = [Question("\nWhat?"), Question("\nWhich one?", options=("a hat", "b"))]

USES: dict[str, Callable[[LocalMllm, Prompt], object]] = {
    "generate": lambda mllm, prompt: mllm.generate([prompt], 2),
    "ask": lambda mllm, prompt: mllm.ask([prompt], ASKED, 2),
    "score": lambda mllm, prompt: mllm.score([Request(prompt, ("a shoe", "a hat"), "Yes or No?")]),
    "loglik": lambda mllm, prompt: mllm.loglik([prompt], ["a shoe"]),
    "embed": lambda mllm, prompt: mllm.embed([prompt]),
}


def image_token(mllm: LocalMllm) -> str:
    return str(mllm.renderer.processor.image_token)


# Pictures that the template loses or repeats


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shown", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_template_shows_every_picture_once_or_is_refused(kind: str, shown: int, use: str) -> None:
    mllm = tiny_mllm(kind)
    token = image_token(mllm)
    template = mllm.renderer.processor.chat_template
    assert template.count(token) == 1
    USES[use](mllm, SEEING)
    mllm.renderer.processor.chat_template = template.replace(token, token * shown)
    with pytest.raises(ModelError, match=rf"shows {shown} pictures \({re.escape(token)}\) of a prompt that has 1: "):
        USES[use](mllm, SEEING)
    USES[use](mllm, BLIND)


def test_a_template_of_text_alone_is_refused_only_where_there_is_a_picture() -> None:
    mllm = tiny_mllm("llava")
    mllm.renderer.processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endfor %}{% endfor %}:"
    )
    assert len(mllm.generate([BLIND], 2)) == 1
    with pytest.raises(ModelError, match=r"shows 0 pictures \(<image>\) of a prompt that has 1"):
        mllm.generate([BLIND, SEEING], 2)


def test_a_template_that_shows_a_picture_where_there_is_none_is_refused() -> None:
    mllm = tiny_mllm("llava")
    mllm.renderer.processor.chat_template += "<image>"
    with pytest.raises(ModelError, match=r"shows 1 pictures .* of a prompt that has 0"):
        mllm.embed([BLIND])


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompts_lost_picture_is_not_made_up_for_by_another_prompts_second(kind: str) -> None:
    mllm = tiny_mllm(kind)
    token = image_token(mllm)
    assert mllm.renderer.encode([f"{token}a", f"{token}b"], [[RED], [RED]], "right")
    with pytest.raises(ModelError, match=r"shows 2 pictures .* of a prompt that has 1"):
        mllm.renderer.encode([f"{token}{token}a", "b"], [[RED], [RED]], "right")


# Tokens and features


def write_other_tokens(mllm: LocalMllm, kind: str) -> None:
    """The processor of a model that makes other features of a picture."""
    processor = mllm.renderer.processor
    if kind.startswith("llava"):
        processor.num_additional_image_tokens += 2
    elif kind.startswith("qwen"):
        processor.image_processor.merge_size = 1
    else:
        processor.image_seq_len += 1


# Of a picture of 64 x 64 pixels: tokens as the processor writes them, features as the model makes them.
COUNTS = {
    "llava": "tokens: 18",
    "llava_next": "tokens: 90, features: 88",
    "idefics3": "tokens: 25, features: 20",
    "smolvlm": "tokens: 25, features: 20",
    "qwen2_5_vl": "81 picture tokens where the model makes 20 features",
    "qwen3_vl": "64 picture tokens where the model makes 16 features",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_that_writes_other_tokens_than_the_model_makes_features_is_refused(kind: str, use: str) -> None:
    mllm = tiny_mllm(kind)
    write_other_tokens(mllm, kind)
    with pytest.raises(ModelError, match=f"{COUNTS[kind]}.*fetch the model again or choose another"):
        USES[use](mllm, SEEING)
    USES[use](mllm, BLIND)


# Length


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("prompt", [SEEING, BLIND], ids=["picture", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_fits_the_context_to_the_token(
    kind: str, prompt: Prompt, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm = tiny_mllm(kind)
    needs: list[int] = []
    check = mllm.renderer.check_length
    monkeypatch.setattr(mllm.renderer, "check_length", lambda tokens: (needs.append(tokens), check(tokens)))
    USES[use](mllm, prompt)
    mllm.renderer.context = max(needs)
    USES[use](mllm, prompt)
    mllm.renderer.context -= 1
    monkeypatch.setattr(mllm.model.model, "forward", lambda *_, **__: pytest.fail("it was read"))
    numbers = rf"needs {max(needs)} tokens, .* context is {max(needs) - 1} tokens long: lower users\.last or items\."
    with pytest.raises(ModelError, match=numbers):
        USES[use](mllm, prompt)


@pytest.mark.parametrize("use", USES)
def test_the_whole_prompt_counts(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    needs: list[int] = []
    monkeypatch.setattr(mllm.renderer, "check_length", needs.append)
    USES[use](mllm, BLIND)
    renderer, prompt = mllm.renderer, len(mllm.renderer.ids(mllm.renderer.text(BLIND)))
    asked, weighed = (
        len(renderer.ids(renderer.text(Prompt((*BLIND.parts, words))) + more))
        for words, more in (("\nWhat?", ""), ("\nWhich one?", " a hat"))
    )
    scored = renderer.text(Prompt((*BLIND.parts, "a shoe", "Yes or No?")))
    assert (
        max(needs)
        == {
            "generate": prompt + 2,
            "ask": max(asked + 2, weighed),
            "score": len(renderer.ids(scored)),
            "loglik": prompt + len(renderer.ids("a shoe")),
            "embed": prompt,
        }[use]
    )


def test_the_smaller_of_the_models_and_the_tokenizers_limit_counts() -> None:
    model, processor = tiny_model("llava")
    limits = []
    for of_model, of_tokenizer in ((100, 200), (200, 100), (100, int(1e30))):
        model.config.text_config.max_position_embeddings = of_model
        processor.tokenizer.model_max_length = of_tokenizer
        limits.append(LocalMllm(model, processor, "tiny").renderer.context)
    assert limits == [100, 100, 100]
    assert Renderer(processor).context == int(1e30)


def test_the_longest_candidate_counts() -> None:
    mllm = tiny_mllm("llava")
    short, long = (Request(BLIND, words, "?") for words in (("a hat", "a"), ("a", "a hat with stripes", "a hat")))
    encoded = mllm.renderer.encode_request(short)
    mllm.renderer.context = encoded.prefix["input_ids"].shape[1] + len(encoded.candidates[0]) + len(encoded.behind[0])
    mllm.score([short])
    with pytest.raises(ModelError, match=rf"context is {mllm.renderer.context} tokens long"):
        mllm.score([short, long])


def test_a_training_row_is_as_long_as_its_longest_segment() -> None:
    mllm = tiny_mllm("llava")
    encoded = mllm.renderer.encode_request(Request(BLIND, ("a",)))
    length = encoded.prefix["input_ids"].shape[1]
    mllm.renderer.context = length + 3
    read_segments(mllm, encoded, [[text_piece([5, 6, 7])], [text_piece([5]), text_piece([6, 7])]])
    with pytest.raises(ModelError, match=f"needs {length + 4} tokens"):
        read_segments(mllm, encoded, [[text_piece([5])], [text_piece([5, 6, 7, 8])]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_a_tokenizer_that_truncates_of_itself_loses_nothing(kind: str) -> None:
    mllm = tiny_mllm(kind)
    tokenizer = mllm.renderer.tokenizer
    texts = [mllm.renderer.text(SEEING)]
    whole = mllm.renderer.encode(texts, [[RED]], "right")["input_ids"].tolist()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.init_kwargs |= {"truncation": True, "max_length": 8}
    assert mllm.renderer.encode(texts, [[RED]], "right")["input_ids"].tolist() == whole
    assert len(mllm.renderer.encode([mllm.renderer.text(BLIND)], [()], "right")["input_ids"][0]) > 8


# From the shop to its descriptions


SHOP: list[dict[str, str | None]] = [
    {"item_id": "both", "title": "Red shoe", "description": "Light sole.", "category": "Shoes", "image": "wide"},
    {"item_id": "picture", "image": "tall"},
    {"item_id": "text", "title": "Wool scarf", "description": "Warm.", "category": "Scarves"},
    {"item_id": "small", "title": "Blue hat", "image": "small"},
    {"item_id": "broken", "title": "Green hat", "image": "broken"},
    {"item_id": "empty"},
]
FILES = {
    "wide": drawing("red", (96, 40)).data,
    "tall": drawing("blue", (30, 90)).data,
    "small": png("blue"),
    "broken": b"not a picture",
}


@pytest.mark.parametrize("fusion", ["compose", "generate"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_item_of_a_shop_is_described(kind: str, fusion: str, tmp_path: Path) -> None:
    items = ItemsConfig.model_validate({"fusion": fusion, "answer_tokens": 2, "description_tokens": 8})
    config = Config(items=items, model=ModelConfig(batch_size=4))
    workspace = make_shop(tmp_path, SHOP, {"u": [("both", 1, None), ("text", 2, None)]}, config, FILES)
    mllm = tiny_mllm(kind)
    seen: list[Picture] = []
    encode = mllm.renderer.encode

    def watch(texts: list[str], pictures: list[list[Picture]], side: str) -> Any:
        seen.extend(picture for of_text in pictures for picture in of_text)
        return encode(texts, pictures, side)

    mllm.renderer.encode = watch  # type: ignore[method-assign, assignment]
    assert describe(workspace, mllm).made == len(SHOP)
    rows = {row["key"]: row for row in workspace.rows(ITEM_TEXTS).to_dicts()}
    assert {key: row["status"] for key, row in rows.items()} == {
        "both": "ok",
        "picture": "ok" if rows["picture"]["description"] else "skipped",
        "text": "ok",
        "small": "ok",
        "broken": "ok",
        "empty": "skipped",
    }
    assert {picture.data for picture in seen} == {FILES["wide"], FILES["tall"], FILES["small"]}
    assert Catalogue.load(workspace).ids == [item["item_id"] for item in SHOP]

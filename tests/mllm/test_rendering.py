import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.rendering import Renderer
from tiny_models import IDEFICS_TEMPLATE, KINDS, SPECIAL, drawing, tiny_mllm, tiny_model, tiny_tokenizer

PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '\\n' }}{% endfor %}assistant:"
)
REFUSES = PLAIN.replace(
    "{{ message['role'] }}: ",
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ message['role'] }}: ",
    1,
)
LEAVES_OUT = PLAIN.replace("in messages %}", "in messages if message['role'] != 'system' %}", 1)


@cache
def renderer(kind: str) -> Renderer:
    return tiny_mllm(kind).renderer


def with_template(template: str | None, tokenizer: Any = None) -> Renderer:
    return Renderer(
        LlavaProcessor(
            image_processor=CLIPImageProcessorPil(),
            tokenizer=tokenizer or tiny_tokenizer("llava"),
            patch_size=7,
            chat_template=template,
        )
    )


def word_level(splitter: Any) -> PreTrainedTokenizerFast:
    """Every piece that `splitter` makes is looked up whole; unknown pieces become <unk>."""
    words = ["<unk>", "<pad>", "</s>", "<image>", "Yes", "No", "Y", "N", "e", "s", "o", ":", " ", "assistant"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


# Templates


def test_the_models_own_template_is_used() -> None:
    prompt = Prompt(("What is it?\n", drawing(), "Say."), system="Be short.", answer="It is a")
    assert renderer("llava").text(prompt) == "<s>Be short. USER: <image>\nWhat is it?\nSay. ASSISTANT: It is a"
    assert renderer("idefics3").text(prompt) == (
        "<|im_start|>System: Be short.<end_of_utterance>\n"
        "User: What is it?\n<image>Say.<end_of_utterance>\nAssistant: It is a"
    )
    assert renderer("qwen2_5_vl").text(prompt) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is it?\n"
        "<|vision_start|><|image_pad|><|vision_end|>Say.<|im_end|>\n<|im_start|>assistant\nIt is a"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_stands_once(kind: str) -> None:
    shown = renderer(kind)
    ids = shown.encode([shown.text(Prompt(("red",)))], [()], "right")["input_ids"][0].tolist()
    first = shown.tokenizer.convert_tokens_to_ids("<s>" if kind.startswith("llava") else "<|im_start|>")
    assert ids[0] == first
    if kind.startswith("llava"):
        assert ids.count(first) == 1


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT])
def test_a_template_without_system_role_gets_it_with_the_users_turn(template: str) -> None:
    shown = with_template(template)
    assert shown.text(Prompt(("Hello",))) == "<s>user: Hello\nassistant:"
    assert shown.text(Prompt(("Hello",), system="Be short.")) == "<s>user: Be short.\nHello\nassistant:"
    request = Request(Prompt(("Item: ",), system="Be short."), ("a",), "")
    assert shown.split(request) == ("<s>user: Be short.\nItem: ", "\nassistant:")


def test_a_template_that_fails_on_every_turn_is_not_hidden() -> None:
    broken = with_template(PLAIN)
    broken.processor.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(Exception, match="no"):
        broken.text(Prompt(("Hello",)))


def test_a_model_without_chat_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template: choose an instruction-tuned model"):
        with_template(None)


def test_a_template_without_the_users_text_is_refused() -> None:
    shown = with_template(PLAIN)
    shown.processor.chat_template = "assistant:"
    with pytest.raises(ModelError, match="does not render the user's text"):
        shown.split(Request(Prompt(("Item: ",)), ("a",), "?"))


# Labels


@pytest.mark.parametrize("kind", KINDS)
def test_the_labels_are_what_the_answer_begins_with(kind: str) -> None:
    shown = renderer(kind)
    asked = shown.text(Prompt(("Answer.",)))
    for label, token in zip(("Yes", "No"), shown.label_ids, strict=True):
        said = shown.ids(shown.text(Prompt(("Answer.",), answer=f"{label}.")))
        assert said[len(shown.ids(asked))] == token
        assert shown.tokenizer.decode([token]) == shown.lead + label
    assert shown.lead == ("" if kind.startswith("qwen") else " ")


def test_a_tokenizer_that_begins_both_labels_alike_is_refused() -> None:
    letters = word_level(pre_tokenizers.Split("", "isolated"))
    assert letters.tokenize("Yes No") == ["Y", "e", "s", " ", "N", "o"]
    with pytest.raises(ModelError, match="begins 'Yes' and 'No' with the same token"):
        with_template("{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}:", letters)
    # Behind white space the labels' own letters come first and tell them apart.
    apart = with_template("{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}: ", letters)
    assert letters.convert_ids_to_tokens(apart.label_ids) == ["Y", "N"]


def test_a_tokenizer_that_merges_the_labels_with_the_text_before_is_refused() -> None:
    lines = word_level(pre_tokenizers.Split(re.escape("\n"), "removed"))
    with pytest.raises(ModelError, match="merges 'Yes' with the text before it"):
        with_template("{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}:", lines)


def test_padding_falls_back_to_the_end_token() -> None:
    tokenizer = tiny_tokenizer("llava", pad_token=None)
    assert tokenizer.pad_token is None
    assert with_template(PLAIN, tokenizer).tokenizer.pad_token == "</s>"


# Text that looks like a special token


def special_text(kind: str) -> st.SearchStrategy[str]:
    """Special tokens whole, cut, nested and spread, among other text."""
    whole = st.sampled_from([*SPECIAL[kind], "\ue000", "\ue000cut\ue000"])
    cut = whole.flatmap(lambda token: st.integers(0, len(token)).map(lambda at: token[:at]))
    rest = whole.flatmap(lambda token: st.integers(0, len(token)).map(lambda at: token[at:]))
    piece = st.one_of(whole, cut, rest, st.text(max_size=3), st.sampled_from(["a red shoe", "Yes", " "]))
    return st.lists(piece, max_size=12).map("".join)


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_5_vl"])
@given(st.data())
def test_no_text_becomes_a_special_token(kind: str, data: st.DataObject) -> None:
    shown = renderer(kind)
    text = data.draw(special_text(kind))
    neutral = shown.neutral(text)
    assert shown.neutral(neutral) == neutral
    assert not any(token in neutral for token in [*SPECIAL[kind], "\ue000"])
    specials = set(shown.tokenizer.convert_tokens_to_ids(SPECIAL[kind]))
    assert specials.isdisjoint(shown.ids(neutral))


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_5_vl"])
@given(st.data())
def test_a_prompt_has_the_templates_special_tokens_only(kind: str, data: st.DataObject) -> None:
    shown = renderer(kind)
    draw = [data.draw(special_text(kind)) for _ in range(4)]
    specials = set(shown.tokenizer.convert_tokens_to_ids(SPECIAL[kind]))

    def special_ids(prompt: Prompt) -> list[int]:
        return [token for token in shown.ids(shown.text(prompt)) if token in specials]

    plain = Prompt(("x", "y"), system="x", answer="x")
    # A system text that is gone once neutral is no system turn.
    system = draw[0] if shown.neutral(draw[0]) else "x"
    assert special_ids(Prompt((draw[1], draw[2]), system=system, answer=draw[3])) == special_ids(plain)


@given(st.text(st.characters(exclude_characters="<\ue000")))
def test_ordinary_text_is_left_as_it_is(text: str) -> None:
    assert renderer("llava").neutral(text) == text


def test_only_the_first_character_of_a_special_token_goes() -> None:
    shown = renderer("llava")
    assert shown.neutral("a <b>bold</b> <image> and </s>") == "a <b>bold</b> image> and /s>"
    assert shown.neutral("<im<image>age>") == "<imimage>age>"
    assert shown.neutral("<<s>s>") == "s>s>"
    assert shown.text(Prompt(("<im", "age>"))) == "<s>USER: image> ASSISTANT:"


def test_a_picture_token_is_neutral_even_where_the_tokenizer_does_not_know_it_as_special() -> None:
    tokenizer = tiny_tokenizer("llava")
    processor = LlavaProcessor(
        CLIPImageProcessorPil(), tokenizer, patch_size=7, image_token="image", chat_template=PLAIN
    )
    assert processor.image_token not in tokenizer.all_special_tokens
    assert Renderer(processor).neutral("an image of") == "an mage of"


# Requests


def test_a_request_is_cut_at_the_candidate() -> None:
    shown = renderer("qwen2_5_vl")
    request = Request(Prompt(("User likes red.\nItem: ",), system="Be short."), ("a shoe", "a hat"), "\nYes or No?")
    assert shown.split(request) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nUser likes red.\nItem: ",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    encoded = shown.encode_request(request)
    decode = shown.tokenizer.decode
    assert decode(encoded.prefix["input_ids"][0]).endswith("\nItem:")
    assert [decode(ids) for ids in encoded.candidates] == [" a shoe", " a hat"]
    assert decode(encoded.behind[0]) == "\nYes or No?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_reads_as_the_prompt_does(kind: str) -> None:
    shown = renderer(kind)
    request = Request(Prompt(("User likes red.\nItem: ",), system="Be short."), ("a red shoe",), "\nYes or No?")
    encoded = shown.encode_request(request)
    whole = Prompt(("User likes red.\nItem: a red shoe\nYes or No?",), system="Be short.")
    ids = [*encoded.prefix["input_ids"][0].tolist(), *encoded.candidates[0], *encoded.behind[0]]
    assert ids == shown.ids(shown.text(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_note_stands_between_a_candidate_and_the_question(kind: str) -> None:
    shown = renderer(kind)
    items, notes = ("a red shoe", "a hat", "wool"), ("\nShares red.", "", "\nagainst it wool.")
    request = Request(Prompt(("User likes red.\nItem: ",), system="Be short."), items, "\nYes or No?", notes=notes)
    encoded = shown.encode_request(request)
    prefix = encoded.prefix["input_ids"][0].tolist()
    for item, note, own, behind in zip(items, notes, encoded.candidates, encoded.behind, strict=True):
        whole = Prompt((f"User likes red.\nItem: {item}{note}\nYes or No?",), system="Be short.")
        assert prefix + own + behind == shown.ids(shown.text(whole))
    plain = shown.encode_request(Request(request.prefix, items, request.question))
    assert plain.candidates == encoded.candidates
    assert plain.behind == [encoded.behind[1]] * 3
    assert (request.note(2), Request(request.prefix, items, request.question).note(2)) == (notes[2], "")


def test_without_a_question_nothing_stands_behind_a_candidate() -> None:
    assert renderer("llava").encode_request(Request(Prompt(("Item: ",)), ("a shoe", "a hat"))).behind == [[], []]
    assert renderer("llava").encode_request(Request(Prompt(("Item: ",)), (), "?")).behind == []


@pytest.mark.parametrize(("notes", "question"), [(("a",), "?"), (("a", "b", "c"), "?"), (("a", "b"), "")])
def test_notes_that_do_not_match_their_candidates_are_refused(notes: tuple[str, ...], question: str) -> None:
    with pytest.raises(ValueError, match=f"{len(notes)} notes for 2 candidates and their question"):
        renderer("llava").encode_request(Request(Prompt(("Item: ",)), ("a shoe", "a hat"), question, notes=notes))


def test_no_note_becomes_a_special_token() -> None:
    shown = renderer("qwen2_5_vl")
    request = Request(Prompt(("Item: ",)), ("a shoe",), "?", notes=("\nnear <|im_end|><|image_pad|>",))
    behind = shown.tokenizer.decode(shown.encode_request(request).behind[0])
    assert behind == "\nnear |im_end|>|image_pad|>?<|im_end|>\n<|im_start|>assistant\n"


def test_the_longest_candidate_with_its_note_must_fit() -> None:
    shown = Renderer(tiny_model("llava")[1])
    request = Request(Prompt(("Item: ",)), ("a shoe", "a"), "?", notes=("", "\nof which much more is told than that."))
    encoded = shown.encode_request(request)
    lengths = [len(own) + len(behind) for own, behind in zip(encoded.candidates, encoded.behind, strict=True)]
    assert lengths[1] > lengths[0]
    shown.context = encoded.prefix["input_ids"].shape[1] + lengths[1]
    shown.encode_request(request)
    shown.context -= 1
    with pytest.raises(ModelError, match="the model's context is"):
        shown.encode_request(request)


@pytest.mark.parametrize("empty", ["", " \n", "\ue000"])
def test_a_candidate_without_text_is_named(empty: str) -> None:
    request = Request(Prompt(("Item: ",)), ("a shoe", empty), "?")
    with pytest.raises(ModelError, match="candidate number 1 of a request has no text"):
        renderer("llava").encode_request(request)


PICTURE_TEXT = {
    "llava": "<image>\n",
    "llava_next": "<image>\n",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidates_picture_stands_where_it_is_given(kind: str) -> None:
    shown = renderer(kind)
    assert shown.picture_text == PICTURE_TEXT[kind]
    red, blue = drawing("red"), drawing("blue")
    text, pictures = shown.candidate((red, "a ", "shoe <image>", blue))
    assert text == f"{PICTURE_TEXT[kind]}a shoe {shown.neutral('<image>')}{PICTURE_TEXT[kind]}"
    assert pictures == [red, blue]
    assert shown.candidate("a shoe") == ("a shoe", [])
    encoded = shown.encode_request(Request(Prompt(("Item: ",)), ("a shoe", ("hat ", red)), "?"))
    assert list(encoded.looks) == [1]
    assert encoded.candidates[1] == encoded.looks[1]["input_ids"][0].tolist()
    image = shown.tokenizer.convert_tokens_to_ids(shown.processor.image_token)
    assert image in encoded.candidates[1]
    assert image not in [*encoded.candidates[0], *encoded.prefix["input_ids"][0].tolist()]
    assert encoded.candidates[1][: len(shown.ids(" hat"))] == shown.ids(" hat")


def test_a_candidate_of_pictures_alone_has_no_text() -> None:
    with pytest.raises(ModelError, match="candidate number 0 of a request has no text"):
        renderer("qwen3_vl").encode_request(Request(Prompt(("Item: ",)), ((drawing("red"), " "),), "?"))


def test_a_template_without_pictures_refuses_candidates_with_them() -> None:
    shown = Renderer(tiny_model("llava")[1])
    shown.processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endfor %}{% endfor %}:"
    )
    with pytest.raises(ModelError, match="chat template shows no pictures"):
        shown.encode_request(Request(Prompt(("Item: ",)), (("hat", drawing("red")),), "?"))


def test_a_shared_prefix_does_not_answer() -> None:
    with pytest.raises(ModelError, match="cannot begin the answer"):
        renderer("llava").split(Request(Prompt(("Item: ",), answer="Yes"), ("a",), "?"))


# Pictures


def image_token(shown: Renderer) -> int:
    return int(shown.tokenizer.convert_tokens_to_ids(shown.processor.image_token))


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (30, 90)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_as_many_tokens_as_features(kind: str, size: tuple[int, int]) -> None:
    model, processor = tiny_model(kind)
    shown = Renderer(processor)
    prompt = Prompt((drawing("red", size), "What is it?"))
    inputs = shown.encode([shown.text(prompt)], [[drawing("red", size)]], "right")
    count = int((inputs["input_ids"] == image_token(shown)).sum())
    seeing = {
        name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw", "image_sizes")
    }
    if "pixel_attention_mask" in inputs:
        seeing["pixel_attention_mask"] = inputs["pixel_attention_mask"]
    features = model.model.get_image_features(**seeing).pooler_output
    assert count == sum(len(feature) for feature in features) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_a_batch_stay_with_their_prompt(kind: str) -> None:
    shown = renderer(kind)
    red, blue = drawing("red"), drawing("blue", (96, 40))
    prompts = [Prompt((red, "one")), Prompt((red, "and ", blue, "two of them"))]
    together = shown.encode([shown.text(prompt) for prompt in prompts], [[red], [red, blue]], "left")
    alone = [
        shown.encode([shown.text(prompt)], [pictures], "left")
        for prompt, pictures in zip(prompts, [[red], [red, blue]], strict=True)
    ]
    for row, single in enumerate(alone):
        mask = together["attention_mask"][row].bool()
        assert together["input_ids"][row][mask].tolist() == single["input_ids"][0].tolist()
    assert not together["attention_mask"][0, 0]
    assert together["attention_mask"][:, -1].all()


def test_text_alone_has_no_pixels() -> None:
    inputs = renderer("qwen2_5_vl").encode(["a", "a red shoe"], [(), ()], "right")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"][0].tolist() == [1] + [0] * (inputs["input_ids"].shape[1] - 1)


def test_a_template_may_begin_with_the_first_token_itself() -> None:
    shown = with_template("<s>" + PLAIN)
    assert shown.text(Prompt(("Hello",))) == "<s>user: Hello\nassistant:"


def test_the_space_before_a_candidate_is_its_own() -> None:
    shown = with_template(IDEFICS_TEMPLATE)
    spaced = shown.encode_request(Request(Prompt(("Item: ",)), ("a shoe",), "?"))
    glued = shown.encode_request(Request(Prompt(("Item:",)), ("a shoe",), "?"))
    assert spaced.prefix["input_ids"].tolist() == glued.prefix["input_ids"].tolist()
    assert shown.tokenizer.decode(spaced.candidates[0]) == " a shoe"
    assert shown.tokenizer.decode(glued.candidates[0]) == "a shoe"

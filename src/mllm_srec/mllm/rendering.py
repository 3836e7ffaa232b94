"""Prompts become token ids: the model's own chat template, neutralised text, label tokens checked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import jinja2
import torch

from mllm_srec.data.images import open_picture
from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Candidate, Part, Picture, Prompt, Request

MAX_SIDE = 1024
"""Long side in pixels that a picture is reduced to before the model's own processing."""

_PRIVATE = "\ue000"
_CUT = f"{_PRIVATE}cut{_PRIVATE}"
"""A private-use character marks where the template's text is cut; `Renderer.neutral` takes it out of all other text."""

LABELS = ("Yes", "No")


@dataclass(frozen=True)
class EncodedRequest:
    """A request as tokens: the prefix's model inputs (batch of 1), the candidates' ids, and those of what stands behind
    each of them: its note and the question.

    `looks` holds the model inputs (batch of 1) of the candidates that have pictures, by their number.
    """

    prefix: dict[str, torch.Tensor]
    candidates: list[list[int]]
    behind: list[list[int]]
    looks: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)


class Renderer:
    """Turns prompts into model inputs with a transformers processor."""

    def __init__(self, processor: Any, context: int | None = None) -> None:
        """Find the label tokens and check that one token tells "Yes" from "No".

        `context` is how many positions the language model was trained for, where that is known; the tokenizer's own
        limit counts where it is smaller. `lead` is what stands between the template's end and an answer: a space, or
        nothing after white space.

        Raises:
            ModelError: the tokenizer does not separate the labels by their first token, or has no chat template.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # A tokenizer without a limit says 1e30.
        self.context = min(context or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        if getattr(processor, "chat_template", None) is None:
            raise ModelError("the model's processor has no chat template: choose an instruction-tuned model")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        special = set(self.tokenizer.all_special_tokens) | {
            str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        # The processor replaces these in the text, whatever the tokenizer makes of them.
        special |= {str(getattr(processor, f"{kind}_token", "")) for kind in ("image", "video", "audio")}
        self.special_ids = frozenset(self.tokenizer.convert_tokens_to_ids(list(special - {"", "None"})))
        longest_first = sorted(special - {"", "None"}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, [*longest_first, _PRIVATE])))
        # Templates without a first token of their own leave it to the tokenizer.
        bos = self.tokenizer.bos_token
        self._bos = bos if bos and self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id else ""
        self.lead, self.label_ids = self._find_labels()

    def neutral(self, text: str) -> str:
        """`text` in which no special token of the model can occur: each loses its first character."""
        found = 1
        while found:  # what is left of one token may complete another
            text, found = self._special.subn(lambda match: match[0][1:], text)
        return text

    def text(self, prompt: Prompt) -> str:
        """The prompt in the model's chat template, up to and with the words the answer begins with."""
        begun = self.lead + self.neutral(prompt.answer) if prompt.answer else ""
        return self._template(self.neutral(prompt.system), self._content(prompt)) + begun

    def split(self, request: Request) -> tuple[str, str]:
        """(head, tail): the template's text before the candidate, and behind the question."""
        if request.prefix.answer:
            raise ModelError("a shared prefix cannot begin the answer")
        content = [*self._content(request.prefix), {"type": "text", "text": _CUT}]
        head, cut, tail = self._template(self.neutral(request.prefix.system), content).partition(_CUT)
        if not cut:
            raise ModelError("the model's chat template does not render the user's text")
        return head, tail

    def encode(self, texts: Sequence[str], pictures: Sequence[Sequence[Picture]], side: str) -> dict[str, torch.Tensor]:
        """Model inputs of a padded batch (`side` is "left" or "right"); either every text has pictures or none.

        Nothing is truncated.

        Raises:
            ModelError: a text shows more or fewer pictures than it has, or is longer than the model's context.
        """
        self._check_pictures(texts, pictures)
        if not any(pictures):
            self.tokenizer.padding_side = side
            encoded = self.tokenizer(
                list(texts), add_special_tokens=False, padding=True, truncation=False, return_tensors="pt"
            )
        else:
            images = [[open_picture(picture.data, MAX_SIDE) for picture in of_text] for of_text in pictures]
            options = {"add_special_tokens": False, "padding": True, "truncation": False, "padding_side": side}
            try:
                encoded = self.processor(text=list(texts), images=images, text_kwargs=options, return_tensors="pt")
            except ValueError as error:
                raise ModelError(f"the model's processor refuses a prompt with pictures: {error}") from error
        self.check_length(int(encoded["attention_mask"].sum(1).max()))
        return {
            name: value
            for name, value in encoded.items()
            if isinstance(value, torch.Tensor) and name != "token_type_ids"
        }

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, without any special token of its own."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode_request(self, request: Request) -> EncodedRequest:
        """Tokens of a request. A space at the end of the head moves to the candidates: tokens begin with it.

        Raises:
            ModelError: a candidate has no text, a picture is not shown as it should be, or the prefix with its longest
                candidate and the question is longer than the model's context.
        """
        head, tail = self.split(request)
        lead = " " if head.endswith(" ") else ""
        pictures = [part for part in request.prefix.parts if isinstance(part, Picture)]
        prefix = self.encode([head.rstrip(" ")], [pictures], "right")
        candidates, looks = [], {}
        for number, candidate in enumerate(request.candidates):
            text, shown = self.candidate(candidate)
            if not text.replace(self.picture_text if shown else "", "").strip():
                raise ModelError(f"candidate number {number} of a request has no text")
            if shown:
                looks[number] = self.encode([lead + text], [shown], "right")
                candidates.append(looks[number]["input_ids"][0].tolist())
            else:
                candidates.append(self.ids(lead + text))
        behind = self.behind(request, tail)
        longest = max((len(own) + len(more) for own, more in zip(candidates, behind, strict=True)), default=0)
        self.check_length(prefix["input_ids"].shape[1] + longest)
        return EncodedRequest(prefix, candidates, behind, looks)

    def behind(self, request: Request, tail: str) -> list[list[int]]:
        """Per candidate the tokens of its note, the question and the template's `tail`; none without a question.

        Raises:
            ValueError: there are notes, but not one per candidate, or no question that they could stand before.
        """
        if request.notes and (len(request.notes) != len(request.candidates) or not request.question):
            raise ValueError(f"{len(request.notes)} notes for {len(request.candidates)} candidates and their question")
        if not request.question:
            return [[] for _ in request.candidates]
        question = self.ids(self.neutral(request.question) + tail)
        notes = [request.note(number) for number in range(len(request.candidates))]
        return [[*(self.ids(self.neutral(note)) if note else []), *question] for note in notes]

    def candidate(self, candidate: Candidate) -> tuple[str, list[Picture]]:
        """A candidate's text with a place for each of its pictures, and the pictures."""
        parts: tuple[Part, ...] = (candidate,) if isinstance(candidate, str) else candidate
        text, pictures = "", []
        for picture, group in groupby(parts, lambda part: isinstance(part, Picture)):
            of_group = list(group)
            if picture:
                text += self.picture_text * len(of_group)
                pictures += [part for part in of_group if isinstance(part, Picture)]
            else:
                text += self.neutral("".join(map(str, of_group)))
        return text, pictures

    @cached_property
    def picture_text(self) -> str:
        """What the chat template writes for a picture between texts.

        Templates that move all pictures to the turn's beginning would show a candidate's picture to all others; what
        they write there for one picture is written in its place instead.

        Raises:
            ModelError: the template does not show pictures.
        """
        text, image = {"type": "text", "text": _CUT}, {"type": "image"}
        shown = self._apply([{"role": "user", "content": [text, image, text]}])
        _, between, _ = shown.split(_CUT)
        if not between:
            plain = self._apply([{"role": "user", "content": [text, text]}])
            before = _shared(shown, plain)
            behind = _shared(shown[before:][::-1], plain[before:][::-1])
            between = shown[before : len(shown) - behind]
        if not between:
            raise ModelError("the model's chat template shows no pictures: choose another model")
        return between

    def check_length(self, tokens: int) -> None:
        """See that a prompt of so many tokens, with all that is read or written behind it, fits the model.

        Raises:
            ModelError: it is longer than the model's context.
        """
        if tokens > self.context:
            raise ModelError(
                f"a prompt needs {tokens:,} tokens, its pictures and its answer included, but the model's context is "
                f"{self.context:,} tokens long: lower users.last or items.text_words, give smaller pictures, or choose "
                "a model with a longer context"
            )

    def _check_pictures(self, texts: Sequence[str], pictures: Sequence[Sequence[Picture]]) -> None:
        """Text by text, for transformers compares the sums over a batch: one text's loss may be another one's gain."""
        token = getattr(self.processor, "image_token", None)
        if token is None:  # the model itself compares tokens and features
            return
        for text, of_text in zip(texts, pictures, strict=True):
            shown = text.count(token)
            if shown != len(of_text):
                raise ModelError(
                    f"the model's chat template shows {shown} pictures ({token}) of a prompt that has {len(of_text)}: "
                    "choose a model whose chat template shows every picture once"
                )

    def _template(self, system: str, content: list[dict[str, str]]) -> str:
        user = {"role": "user", "content": content}
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, user] if system else [user]
        try:
            text = self._apply(messages)
            if system.strip() in text:
                return text
        except (jinja2.TemplateError, TypeError):
            if not system:
                raise
        # Templates that know no system role refuse it or leave it out: it becomes the first line of the user's turn.
        return self._apply([{"role": "user", "content": [{"type": "text", "text": system + "\n"}, *content]}])

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        text = str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return text if text.startswith(self._bos) else self._bos + text

    def _content(self, prompt: Prompt) -> list[dict[str, str]]:
        content: list[dict[str, str]] = []
        for picture, parts in groupby(prompt.parts, lambda part: isinstance(part, Picture)):
            if picture:
                content += [{"type": "image"} for _ in parts]
            else:  # joined first: a special token may be spread over two parts
                content.append({"type": "text", "text": self.neutral("".join(map(str, parts)))})
        return content

    def _find_labels(self) -> tuple[str, tuple[int, int]]:
        tail = self._template("", [{"type": "text", "text": "Answer Yes or No."}])
        lead = "" if tail[-1:].isspace() else " "
        begun = self.ids(tail)
        found = []
        for label in LABELS:
            whole = self.ids(tail + lead + label)
            if whole[: len(begun)] != begun or len(whole) == len(begun):
                raise ModelError(f"the model's tokenizer merges {label!r} with the text before it")
            found.append(whole[len(begun)])
        if found[0] == found[1]:
            raise ModelError(f"the model's tokenizer begins {LABELS[0]!r} and {LABELS[1]!r} with the same token")
        return lead, (found[0], found[1])


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

"""The language model's lesson: LoRA layers, and the losses of questions, sentences, users, contrast and drift."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from training_features import COLOUR_NAMES, GOODS, PATTERN_NAMES, Features
from training_texts import fusion
from training_users import next_choice, window

from mllm_srec.mllm.base import Prompt, Request
from mllm_srec.mllm.packing import pack, row_mask
from mllm_srec.mllm.rendering import Renderer
from mllm_srec.prompts import items as prompts
from mllm_srec.prompts.users import SUMMARY_ANSWER

RANK, LORA_SCALE, TOP_LAYERS = 16, 2.0, 12
TEMPERATURE = 0.1
PHRASES = {
    "kind": ("What does the picture show?", "Name the main thing in the picture.", "What is this?"),
    "colour": ("What colour is it?", "Name the main colour of the thing."),
    "pattern": ("What pattern does it have?", "Is it plain, striped, dotted or checked?"),
}
"""Other words for the questions of `prompts.items`, which are asked most."""


class Lora(nn.Module):
    """A frozen linear layer plus a trained one of low rank, kept in float32 and computed in the layer's type."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.randn(RANK, layer.in_features) / math.sqrt(layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK))
        self.on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        plain = self.layer(x)
        if not self.on:
            return plain
        return plain + functional.linear(functional.linear(x, self.a.to(x.dtype)), (LORA_SCALE * self.b).to(x.dtype))


def attach(decoder: Any) -> dict[str, Lora]:
    """Put a `Lora` in the place of every linear layer of the language model's last `TOP_LAYERS` layers.

    The picture's tokens are words already; what is to be learnt, to say them, stands high up, and two thirds of the
    backward pass are saved.
    """
    first = len(decoder.layers) - TOP_LAYERS
    found = [
        (f"layers.{i}.{name}", layer)
        for i in range(first, len(decoder.layers))
        for name, layer in decoder.layers[i].named_modules()
        if isinstance(layer, nn.Linear)
    ]
    made = {}
    for name, layer in found:
        above, _, last = name.rpartition(".")
        made[name] = Lora(layer)
        setattr(decoder.get_submodule(above), last, made[name])
    return made


class Teacher:
    """Makes rows of questions behind a picture and reads the loss on their answers."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.table = model, model.model.multi_modal_projector
        self.decoder, self.renderer = model.model.language_model, Renderer(processor)
        self.end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        picture = Prompt(("\ue001",))
        # What stands before the picture, and behind the question.
        text = self.renderer.text(picture)
        before, _, self.behind = text.partition("\ue001")
        self.blind = self.renderer.ids(before + prompts.NO_PICTURE)
        self.before = self.renderer.ids(before + prompts.PICTURE)

    def question(self, name: str, generator: np.random.Generator) -> list[int]:
        """Tokens of a question up to where its answer begins."""
        asked = prompts.QUESTIONS[name].ask
        if generator.random() < 0.3:
            asked = PHRASES[name][int(generator.integers(len(PHRASES[name])))]
        return self.renderer.ids(prompts.ask(asked) + self.behind + prompts.QUESTIONS[name].answer)

    def answer(self, text: str) -> list[int]:
        """Tokens of an answer with its end."""
        return [*self.renderer.ids(f" {text}"), self.end]

    def answers(self, features: Features) -> list[list[list[int]]]:
        """Tokens of what is known of each picture's kind, colour and pattern."""
        known = ((GOODS, features.kind), (COLOUR_NAMES, features.colour), (PATTERN_NAMES, features.pattern))
        return [[self.answer(names[n]) if n >= 0 else [] for n in numbers.tolist()] for names, numbers in known]

    def loss(self, prefix: torch.Tensor, questions: Sequence[list[int]], answers: Sequence[Sequence[list[int]]]) -> Any:
        """Mean loss per answer token. prefix (B, P, D); answers[q][b], [] where it is not known."""
        sizes = [max(map(len, of_question)) for of_question in answers]
        rows, length = prefix.shape[:2]
        packed = pack([[*question, *[self.end] * size] for question, size in zip(questions, sizes, strict=True)])
        ids = packed.ids.repeat(rows, 1)
        wanted = torch.full_like(ids, -100)
        for start, question, of_question in zip(packed.starts, questions, answers, strict=True):
            first = start + len(question)
            for row, tokens in enumerate(of_question):
                ids[row, first : first + len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
                # The token at a place is foretold by the place before it.
                wanted[row, first - 1 : first - 1 + len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
        embeds = torch.cat([prefix, self.decoder.embed_tokens(ids)], 1)
        positions = torch.cat([torch.arange(length), length + packed.place])[None].expand(rows, -1)
        hidden = self.decoder(
            inputs_embeds=embeds,
            attention_mask=row_mask(packed, length, embeds.dtype).expand(rows, -1, -1, -1),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, length:]
        told = wanted >= 0
        logits = self.model.lm_head(hidden[told]).float()
        return functional.cross_entropy(logits, wanted[told])

    def prefix(self, pooled: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """(B, P, D): the template's begin and the picture's tokens."""
        tokens = self.table.tokens(pooled, low.float()).to(torch.bfloat16)
        begin = self.decoder.embed_tokens(torch.tensor(self.before))
        return torch.cat([begin.expand(len(tokens), -1, -1), tokens], 1)

    def embed_rows(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, D), L2-normalised mean of the last hidden states, as `LocalMllm.embed` gives it."""
        hidden = self.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state.float()
        return functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def contrast(self, features: Features) -> Any:
        """Symmetric InfoNCE between pictures and their captions; equal captions are no negatives of each other.

        Each side is centred first, as `items.load_embeddings` does: what all prompts share says nothing.
        """
        behind = self.renderer.ids(self.behind)
        prefix = self.prefix(features.pooled, features.low)
        tail = self.decoder.embed_tokens(torch.tensor(behind)).expand(len(prefix), -1, -1)
        pictures = torch.cat([prefix, tail], 1)
        looked = self.embed_rows(pictures, torch.ones(pictures.shape[:2], dtype=torch.long))
        texts = [self.renderer.ids(self.renderer.text(Prompt((caption,)))) for caption in features.caption]
        size = max(map(len, texts))
        ids = torch.tensor([[*text, *[self.end] * (size - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (size - len(text)) for text in texts])
        read = self.embed_rows(self.decoder.embed_tokens(ids), mask)
        same = torch.tensor([[a == b for b in features.caption] for a in features.caption])
        looked, read = (functional.normalize(side - side.mean(0), dim=-1) for side in (looked, read))
        scores = (looked @ read.T / TEMPERATURE).masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -1e4)
        return (
            functional.cross_entropy(scores, torch.arange(len(same)))
            + functional.cross_entropy(scores.T, torch.arange(len(same)))
        ) / 2

    def written(self, generator: np.random.Generator) -> Any:
        """Loss of one fused sentence."""
        given, sentence = fusion(generator)
        begin = self.renderer.ids(self.renderer.text(Prompt((given,), system=prompts.FUSE_SYSTEM)))
        return self.follows(begin, [*self.renderer.ids(sentence), self.end])

    def summarised(self, generator: np.random.Generator) -> Any:
        """Loss of the true summaries of two simulated users' windows, as `users.summarise` asks for them."""
        losses = []
        for _ in range(2):
            instruction, told = window(generator)
            begin = self.renderer.ids(self.renderer.text(Prompt((instruction,), answer=SUMMARY_ANSWER)))
            losses.append(self.follows(begin, self.answer(f"{told}.")))
        return torch.stack(losses).mean()

    def chosen(self, generator: np.random.Generator) -> Any:
        """Loss of a simulated user's next item: minus the likelihood that `LocalMllm.score` reads."""
        prefix, candidate = next_choice(generator)
        encoded = self.renderer.encode_request(Request(prefix, (candidate,)))
        return self.follows(encoded.prefix["input_ids"][0].tolist(), encoded.candidates[0])

    def follows(self, begin: Sequence[int], tokens: list[int]) -> Any:
        """Mean loss per token of `tokens` behind `begin`."""
        prefix = self.decoder.embed_tokens(torch.tensor([begin[:-1]]))
        return self.loss(prefix, [[begin[-1]]], [[tokens]])

    def drift(self, text: str, layers: dict[str, Lora]) -> Any:
        """KL divergence per token of the trained model from what it was, on a text without pictures."""
        ids = torch.tensor([self.renderer.ids(text)[:96]])
        with torch.no_grad():
            for layer in layers.values():
                layer.on = False
            before = self.model.lm_head(self.decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
            for layer in layers.values():
                layer.on = True
        after = self.model.lm_head(self.decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
        return (
            functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
            / ids.numel()
        )

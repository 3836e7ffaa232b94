"""The speed of packed scoring with the embedded model, in bfloat16, against the other ways to score candidates.

    python benchmarks/scoring.py [--sections points,parity] [--work build/bench] [--device cuda] [--json]

Every way gives the log-odds of "Yes" over "No" per candidate, on seeded tokens of exact lengths:
  generate30     30 tokens generated per candidate, batch 1, the first one's logits read (the predecessor's way)
  per_candidate  a plain forward pass per candidate, batch 1
  padded_batch   plain forward passes over batches of prompts
  packed         what `mllm.score` does; + likelihood: with the candidates' likelihoods from the same pass
  limit          unique tokens / the rate of plain prefill in rows of 512 tokens, measured in the same round
In every round each way runs once, in another order. The first three are timed on a few candidates only and scaled:
marked with a * and `scaled_from`. Finished rounds are kept in the work folder, so a killed run goes on where it was.
`--limit N` takes N candidates and N rounds at most: a quick look, no result. Threads are those of the environment
(OMP_NUM_THREADS). Section memory needs Linux (/proc) where it is not on a GPU.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scoring_ways as ways
import torch
from common import SEED, Bench, at_most, machine, peak, report, show
from items_speed import spread

from mllm_srec.config import ModelConfig
from mllm_srec.mllm import attention, local, pieces, scoring
from mllm_srec.mllm.load import load_mllm
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.progress import say

SEGMENT = 60
CALLS = 4
"""Candidates that a timing takes in at least: where a point has fewer, calls are repeated (not those of generate30)."""
MARKS = {
    "padded_batch / packed": 5.0,
    "per_candidate / packed": 5.5,
    "generate30 / packed": 20.0,
    "limit / packed": 0.85,
}
"""At the headline point."""
SLOWEST = 0.95
"""Least padded_batch / packed at every other point."""
KEPT, GROWTH = "prefix kept / candidates only", "per candidate, all / the first 100"
KEPT_MARK, GROWTH_MARK = 1.2, 1.1
PARITY_PREFIX, PARITY_SEGMENTS, PARITY_MARK = 400, (60, 45, 72, 31, 60, 90, 52, 66), 1e-4
FORMS_PREFIXES, FORMS_CANDIDATES, FORMS_ROUNDS = (400, 2000), 50, 3
MEMORY_PREFIX, MEMORY_CANDIDATES, MEMORY_MARK_GB = 400, 1000, 1.5


@dataclass(frozen=True)
class Point:
    """What is scored, and in how many rounds; prefix and segment (a candidate with its question) in tokens.

    slow: how many candidates the slow ways are timed on at most. part: the packed way is also timed on so many of the
    candidates. headline: it has the marks, and the second request of the same user is timed.
    """

    prefix: int
    candidates: int
    segment: int = SEGMENT
    rounds: int = 3
    slow: tuple[tuple[str, int], ...] = (("generate30", 4), ("per_candidate", 16), ("padded_batch", 16))
    part: int = 0
    headline: bool = False

    @property
    def name(self) -> str:
        """In words."""
        return f"prefix {self.prefix}, {self.candidates} candidates"

    @property
    def tokens(self) -> int:
        """Unique ones: the prefix once, and every segment."""
        return self.prefix + self.candidates * self.segment

    @property
    def timed_on(self) -> dict[str, int]:
        """By slow way: how many candidates."""
        return {way: min(count, self.candidates) for way, count in self.slow}


POINTS = (
    Point(400, 50, rounds=5, slow=(("generate30", 10), ("per_candidate", 50), ("padded_batch", 50)), headline=True),
    *(Point(400, candidates) for candidates in (1, 10, 200)),
    Point(400, 1000, part=100),
    *(Point(prefix, 50) for prefix in (100, 1000, 2000)),
)


# Section points


def points(bench: Bench, mllm: LocalMllm, rounds: int) -> list[dict[str, Any]]:
    """All points; with a limit, those that are left with so few candidates."""
    chosen: dict[str, Point] = {}
    for point in POINTS:
        if bench.limit and point.candidates > bench.limit:
            point = replace(point, candidates=bench.limit, part=0)
        chosen.setdefault(point.name, point)
    return [measure(bench, mllm, point, rounds) for point in chosen.values()]


def measure(bench: Bench, mllm: LocalMllm, point: Point, rounds: int) -> dict[str, Any]:
    """The summary of a point's rounds, each kept when finished."""
    return summary(point, _rounds(bench, mllm, point, rounds or point.rounds, one_round))


def _rounds(
    bench: Bench, mllm: LocalMllm, point: Point, count: int, one: Callable[[LocalMllm, Point, int], Any]
) -> list[Any]:
    count = min(count, bench.limit or count)
    made_of = _made_of(mllm, point)
    results = []
    for number in range(count):
        say(f"{point.name}: round {number + 1} of {count}")
        name = f"scoring-{one.__name__}-{point.prefix}-{point.candidates}-{number}"
        results.append(bench.kept(name, __file__, made_of, lambda number=number: one(mllm, point, number)))  # type: ignore[misc]
    return results


def _made_of(mllm: LocalMllm, what: object) -> list[object]:
    """All that a kept result depends on, the code that is measured too."""
    modules = (ways, scoring, attention, pieces, local)
    code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules]
    return [mllm.identity, mllm.batch_size, mllm.device, torch.get_num_threads(), what, *code]


def one_round(mllm: LocalMllm, point: Point, number: int) -> dict[str, Any]:
    """Seconds of every way for all candidates, in an order of the round's own, and how far their log-odds are apart."""
    sample = _draw(mllm, point, number)
    work: dict[str, Callable[[], np.ndarray]] = {
        "packed": lambda: ways.packed(mllm, sample),
        "packed + likelihood": lambda: ways.with_likelihood(mllm, sample),
    }
    for way, count in point.timed_on.items():
        few = sample.first(count)
        work[way] = lambda way=way, few=few: getattr(ways, way)(mllm, few)  # type: ignore[misc]
    for warm_up in (ways.packed, ways.with_likelihood, ways.per_candidate, ways.padded_batch):
        warm_up(mllm, sample.first(2))
    row = ways.draw(mllm, ways.PREFILL_TOKENS, [point.segment], [SEED, number]).prefix
    seconds: dict[str, float] = {}
    odds: dict[str, np.ndarray] = {}
    for way in _turned([*work, "prefill"], number):
        if way == "prefill":
            seconds[way], _ = ways.timed(mllm, lambda: ways.prefill(mllm, row))
            continue
        repeats = 1 if way == "generate30" else max(1, CALLS // point.candidates)
        taken, odds[way] = ways.timed(mllm, work[way], repeats)
        seconds[way] = taken * point.candidates / point.timed_on.get(way, point.candidates)
        if way == "packed" and point.headline:  # the same user again, right behind
            seconds["prefix kept"], odds["prefix kept"] = ways.timed(
                mllm, lambda: ways.packed(mllm, sample, forget=False)
            )
        if way == "packed" and point.part:
            seconds["part"], _ = ways.timed(mllm, lambda: ways.packed(mllm, sample.first(point.part)))
    return {
        "seconds": seconds,
        "tokens_per_second": ways.PREFILL_ROWS * ways.PREFILL_TOKENS / seconds.pop("prefill"),
        "differences": differences(odds),
        "deviation": float(odds["per_candidate"].std()),
    }


def _draw(mllm: LocalMllm, point: Point, number: int) -> ways.Sample:
    seed = [SEED, point.prefix, point.candidates, number]
    return ways.draw(mllm, point.prefix, [point.segment] * point.candidates, seed)


def _turned(names: Sequence[str], number: int) -> list[str]:
    start = number % len(names)
    return [*names[start:], *names[:start]]


def differences(odds: dict[str, np.ndarray]) -> dict[str, float]:
    """By way: the largest difference of its log-odds from `per_candidate`'s, over the candidates that both scored."""
    apart = {}
    for way, values in odds.items():
        if way != "per_candidate":
            count = min(len(values), len(odds["per_candidate"]))
            apart[way] = float(np.abs(values[:count] - odds["per_candidate"][:count]).max())
    return apart


def summary(point: Point, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over a point's rounds: seconds, and ratios, each the median of the rounds' own ratios; with the marks."""
    seconds = {way: np.array([of["seconds"][way] for of in rounds]) for way in rounds[0]["seconds"]}
    rate = np.array([of["tokens_per_second"] for of in rounds])
    seconds["limit"] = point.tokens / rate
    shown = {way: spread(values) for way, values in seconds.items()}
    for way, count in point.timed_on.items():
        if count < point.candidates:
            shown[way]["scaled_from"] = count
    compared = ("padded_batch", "per_candidate", "generate30", "limit", "packed + likelihood")
    ratios = {f"{way} / packed": spread(seconds[way] / seconds["packed"]) for way in compared}
    for name, least in (MARKS if point.headline else {"padded_batch / packed": SLOWEST}).items():
        ratios[name] |= {"mark": least, "met": ratios[name]["value"] >= least}
    if point.headline:
        alone = point.candidates * point.segment / rate
        ratios[KEPT] = at_most(spread(seconds["prefix kept"] / alone), KEPT_MARK)
    if point.part:
        each, of_part = seconds["packed"] / point.candidates, seconds["part"] / point.part
        ratios[GROWTH] = at_most(spread(each / of_part), GROWTH_MARK)
    return {
        "prefix": point.prefix,
        "candidates": point.candidates,
        "segment": point.segment,
        "rounds": len(rounds),
        "seconds": shown,
        "tokens_per_second": spread(rate),
        "ratios": ratios,
        "differences": {way: max(of["differences"][way] for of in rounds) for way in rounds[0]["differences"]},
        "deviation": float(np.median([of["deviation"] for of in rounds])),
    }


def show_points(result: Sequence[dict[str, Any]]) -> None:
    """Seconds, ratios with their marks, and how far the ways are apart."""
    named = ("packed", "packed + likelihood", "padded_batch", "per_candidate", "generate30", "limit")
    rows = [
        (of["prefix"], of["candidates"], of["rounds"], *(_seconds(of["seconds"][way]) for way in named))
        for of in result
    ]
    show(
        "points: seconds, medians of the rounds (*: timed on fewer candidates and scaled)",
        ("prefix", "candidates", "rounds", *named),
        rows,
    )
    for of in result:
        rows = [(name, in_words(ratio)) for name, ratio in of["ratios"].items()]
        rate = f"plain prefill {of['tokens_per_second']['value']:.0f} tokens per second"
        show(f"points: prefix {of['prefix']}, {of['candidates']} candidates ({rate})", ("ratio", "rounds"), rows)
    apart = tuple(result[0]["differences"])
    rows = [
        (of["prefix"], of["candidates"], *(f"{of['differences'][way]:.3f}" for way in apart), f"{of['deviation']:.3f}")
        for of in sorted(result, key=lambda of: (of["prefix"], of["candidates"]))
    ]
    show(
        "points: largest difference of log-odds from per_candidate's, and those' standard deviation",
        ("prefix", "candidates", *apart, "deviation"),
        rows,
    )


def _seconds(of: dict[str, Any]) -> str:
    return f"{of['value']:.3g}{'*' if 'scaled_from' in of else ''}"


def in_words(of: dict[str, Any]) -> str:
    """A `spread`, with its mark."""
    text = f"{of['value']:.2f} ({of['least']:.2f} to {of['most']:.2f})"
    return text + (f"  {'meets' if of['met'] else 'misses'} {of['mark']}" if "mark" in of else "")


# Section parity


def parity(bench: Bench, mllm: LocalMllm, rounds: int) -> dict[str, Any]:
    """In float32: how far every way is from prompts of their own, on candidates of unequal length."""
    exact = load(mllm.device.type, "float32")
    return compare(exact, PARITY_PREFIX, PARITY_SEGMENTS)


def compare(mllm: LocalMllm, prefix: int, segments: Sequence[int]) -> dict[str, Any]:
    """The largest difference of log-odds from per_candidate's, by way."""
    sample = ways.draw(mllm, prefix, segments, [SEED])
    odds = {"packed": ways.packed(mllm, sample), "prefix kept": ways.packed(mllm, sample, forget=False)}
    odds["packed + likelihood"] = ways.with_likelihood(mllm, sample)
    odds |= {way: getattr(ways, way)(mllm, sample) for way in ("per_candidate", "padded_batch", "generate30")}
    return {
        "prefix": prefix,
        "segments": list(segments),
        "deviation": float(odds["per_candidate"].std()),
        "differences": {way: at_most({"value": value}, PARITY_MARK) for way, value in differences(odds).items()},
    }


def show_parity(result: dict[str, Any]) -> None:
    """One table."""
    rows = [
        (way, f"{of['value']:.2g}  {'meets' if of['met'] else 'misses'} {of['mark']}")
        for way, of in result["differences"].items()
    ]
    show(
        f"parity: float32, prefix {result['prefix']}, segments of {', '.join(map(str, result['segments']))} tokens; "
        f"standard deviation of the log-odds {result['deviation']:.2f}",
        ("way", "largest difference from per_candidate"),
        rows,
    )


# Section forms


def forms(bench: Bench, mllm: LocalMllm, rounds: int) -> list[dict[str, Any]]:
    """The candidates' pass behind a kept prefix, by form of attention."""
    results = []
    for prefix in FORMS_PREFIXES:
        candidates = min(bench.limit or FORMS_CANDIDATES, FORMS_CANDIDATES)
        point = Point(prefix, candidates)
        of_point = _rounds(bench, mllm, point, rounds or FORMS_ROUNDS, forms_round)
        results.append({"prefix": prefix, "candidates": candidates, "rounds": len(of_point), **forms_summary(of_point)})
    return results


def forms_round(mllm: LocalMllm, point: Point, number: int) -> dict[str, Any]:
    """Seconds by form, in an order of the round's own, and how far the log-odds are from per_candidate's."""
    sample = _draw(mllm, point, number)
    work = ways.forms(mllm, sample)
    seconds: dict[str, float] = {}
    odds = {"per_candidate": ways.per_candidate(mllm, sample.first(point.timed_on["per_candidate"]))}
    for name in _turned(list(work), number):
        seconds[name], odds[name] = ways.timed(mllm, work[name])
    return {"seconds": {name: seconds[name] for name in work}, "differences": differences(odds)}


def forms_summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by form, and as a ratio to the fastest one of the same round."""
    seconds = {name: np.array([of["seconds"][name] for of in rounds]) for name in rounds[0]["seconds"]}
    fastest = np.min(list(seconds.values()), axis=0)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "to the fastest": {name: spread(values / fastest) for name, values in seconds.items()},
        "differences": {name: max(of["differences"][name] for of in rounds) for name in seconds},
    }


def show_forms(result: Sequence[dict[str, Any]]) -> None:
    """A table per prefix."""
    for of in result:
        rows = [
            (name, in_words(seconds), in_words(of["to the fastest"][name]), f"{of['differences'][name]:.3f}")
            for name, seconds in of["seconds"].items()
        ]
        show(
            f"forms: {of['candidates']} candidates behind a kept prefix of {of['prefix']}, {of['rounds']} rounds",
            ("form", "seconds", "to the round's fastest", "largest difference from per_candidate"),
            rows,
        )


# Section memory


def memory(bench: Bench, mllm: LocalMllm, rounds: int) -> dict[str, Any]:
    """What scoring many candidates takes beyond the loaded model, in a process of its own."""
    count = min(bench.limit or MEMORY_CANDIDATES, MEMORY_CANDIDATES)
    command = [sys.executable, __file__, "--memory", str(count), "--device", mllm.device.type]

    def measured() -> Any:
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    above = bench.kept("scoring-memory", __file__, _made_of(mllm, count), measured)
    return {"prefix": MEMORY_PREFIX, "candidates": count, "above_start_gb": above}


def watched(mllm: LocalMllm, count: int) -> dict[str, Any]:
    """GB beyond what is held after a small call, by way: resident memory, or the GPU's."""
    sample = ways.draw(mllm, MEMORY_PREFIX, [SEGMENT] * count, [SEED])
    above = {}
    for way, work in (("packed", ways.packed), ("packed + likelihood", ways.with_likelihood)):
        work(mllm, sample.first(4))
        grown = peak(mllm.device.type, partial(work, mllm, sample)) / 1e3
        above[way] = at_most({"value": grown}, MEMORY_MARK_GB)
    return above


def show_memory(result: dict[str, Any]) -> None:
    """One table."""
    rows = [
        (way, f"{of['value']:.2f} GB  {'meets' if of['met'] else 'misses'} {of['mark']}")
        for way, of in result["above_start_gb"].items()
    ]
    title = f"memory: one call with prefix {result['prefix']}, {result['candidates']} candidates of {SEGMENT} tokens"
    show(title, ("way", "most above the loaded model"), rows)


SECTIONS: dict[str, tuple[Callable[[Bench, LocalMllm, int], Any], Callable[[Any], None]]] = {
    "points": (points, show_points),
    "parity": (parity, show_parity),
    "forms": (forms, show_forms),
    "memory": (memory, show_memory),
}


def load(device: str, dtype: str = "bfloat16") -> LocalMllm:
    """The embedded model."""
    mllm = load_mllm(ModelConfig.model_validate({"name": "embedded", "device": device, "dtype": dtype}))
    assert isinstance(mllm, LocalMllm)
    return mllm


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, default: all")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--limit", type=int, default=0, help="0: everything")
    parser.add_argument("--rounds", type=int, default=0, help="of every point; 0: 5 at the headline point, else 3")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)  # the process that section memory watches
    options = parser.parse_args()
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    mllm = load(options.device)
    if options.memory:
        print(json.dumps(watched(mllm, options.memory)))
        return
    head = machine() | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {})
    result = {"machine": head, "model": mllm.identity, "limit": options.limit}
    bench = Bench(Path(), options.work, options.limit)
    report(result, {"model": mllm.identity}, SECTIONS, names, options.json, bench, mllm, options.rounds)


if __name__ == "__main__":
    main()

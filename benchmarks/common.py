"""What the benchmarks of the stages share: models, kept results, figures with intervals, pictures, tables."""

import ctypes
import hashlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
import transformers
from items_memory import status
from PIL import Image
from rich.console import Console
from rich.table import Table

from mllm_srec import items, metrics
from mllm_srec.config import Config, ItemsConfig, ModelConfig, load_config
from mllm_srec.data.dataset import Dataset
from mllm_srec.data.images import read_picture
from mllm_srec.data.readers import read
from mllm_srec.mllm.base import Picture
from mllm_srec.mllm.load import load_mllm
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.progress import say
from mllm_srec.prompts import items as prompts
from mllm_srec.store_files import atomic_write, fingerprint
from mllm_srec.workspace import Workspace

SAMPLES, SEED = 1000, 0
"""Of every bootstrap."""
TOKENS = ItemsConfig().answer_tokens

Figure = dict[str, Any]
"""value, low, high (95 %), n; with a mark (the least value, or words) also mark and met."""
T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """One run: where the data are, where results are kept, and how much of the data is looked at (0: all)."""

    data: Path
    work: Path
    limit: int

    @cached_property
    def trained(self) -> LocalMllm:
        """The model as it ships."""
        return _load("embedded")

    @cached_property
    def untrained(self) -> LocalMllm:
        """The same parts, only put together."""
        from mllm_srec.mllm.embedded import embedded_folder
        from mllm_srec.mllm.visual_table import register

        register()
        return _load(str(embedded_folder(trained=False)))

    @cached_property
    def models(self) -> dict[str, LocalMllm]:
        """Both, by name."""
        return {"untrained": self.untrained, "trained": self.trained}

    def kept(self, name: str, module: str, made_of: Sequence[object], compute: Callable[[], Any]) -> Any:
        """The result `name` from the work folder, or computed and kept there.

        It is computed again when the code of `module` (its file), the prompts, the rules of looking or `made_of` (the
        model's identity, the size of the data) have changed.
        """
        code = Path(module).read_text(encoding="utf-8")
        mark = fingerprint(code, prompts.VERSION, items.RULES, str(self.limit), *map(str, made_of))
        file = self.work / f"{name}-{mark[:16]}.json"
        if not file.exists():
            result = compute()
            self.work.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps(result))
        # Read back also when just made, so that both ways give the same.
        return json.loads(file.read_text(encoding="utf-8"))

    def first(self, rows: Sequence[T]) -> list[T]:
        """`rows`, or a seeded sample of `limit` of them in their order."""
        if not self.limit or len(rows) <= self.limit:
            return list(rows)
        chosen = np.random.default_rng(SEED).permutation(len(rows))[: self.limit]
        return [rows[at] for at in sorted(chosen)]

    def hm_sample(self) -> Dataset:
        """H&M, repeats dropped; with a limit its first users and what they chose."""
        dataset = read(self.data / "hm_sample").with_repeats("first")
        if not self.limit:
            return dataset
        users = dataset.interactions["user_id"].unique(maintain_order=True).head(self.limit)
        log = dataset.interactions.filter(pl.col("user_id").is_in(users.implode()))
        chosen = dataset.items.filter(pl.col("item_id").is_in(log["item_id"].unique().implode()))
        return Dataset.build(
            f"{dataset.name}, {self.limit} users",
            chosen,
            log.select("user_id", "item_id", "timestamp", "rating"),
            has_time=dataset.has_time,
            root=dataset.root,
        ).with_repeats("first")

    def described(self) -> Workspace:
        """H&M, ingested and described by the trained model; a killed run goes on where it was."""
        place = self.work / f"hm_sample-{self.limit or 'all'}"
        config = load_config()
        workspace = Workspace.open(place) if place.exists() else Workspace.create(place, config, self.hm_sample())
        if workspace.config != config:
            workspace.save_config(config)
        items.describe(workspace, self.trained)
        return workspace


def _load(name: str) -> LocalMllm:
    mllm = load_mllm(ModelConfig(name=name))
    assert isinstance(mllm, LocalMllm)
    return mllm


def defaults() -> Config:
    """The configuration that is measured."""
    return load_config()


# Pictures


def picture_of(data: bytes) -> Picture:
    """A picture file's bytes under their hash."""
    return Picture(hashlib.sha256(data).hexdigest(), data)


def read_pictures(root: Path, images: Sequence[str]) -> list[Picture]:
    """Checked picture files below `root`."""
    return [picture_of(read_picture(image, root)) for image in images]


def png(image: Image.Image) -> Picture:
    """A drawn picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return picture_of(buffer.getvalue())


def machine() -> dict[str, Any]:
    """What timings depend on, and bfloat16 results a little."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def peak(device: str, work: Callable[[], object]) -> float:
    """MB that `work` takes at its peak, above what stood before: of the GPU or the process (Linux, /proc)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # What was freed and not given back would hide what is taken again.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start_mb = status("VmRSS")
    work()
    return status("VmHWM") - start_mb


def batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# Content


LAST_FIVE = np.array([0.2, 0.4, 0.6, 0.8, 1.0], dtype=np.float32)
"""Weights of the last five items, oldest first."""


def cubes_of_last_five(vectors: np.ndarray, histories: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (B, I): sum over each history's last five items of weight * cosine cubed, newer items weighing more.

    vectors: float32 (I, D), L2-normalised. The reference for content, the same since the first figures.
    """
    scores = np.zeros((len(histories), len(vectors)), dtype=np.float32)
    for row, history in zip(scores, histories, strict=True):
        last = history[-len(LAST_FIVE) :]
        if len(last):
            row += LAST_FIVE[-len(last) :] @ (vectors[last] @ vectors.T) ** 3
    return scores


# Figures


def figure(values: Sequence[float] | np.ndarray, units: Sequence[object] = (), mark: float | None = None) -> Figure:
    """The mean of `values` with its 95 % interval.

    Args:
        values: (N,), a share's 0 and 1 or a metric's values.
        units: N labels; values of the same unit (pictures of one product) are resampled together. Empty: each alone.
        mark: the least that the mean should be.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        return {"value": None, "low": None, "high": None, "n": 0, **_marked(None, mark)}
    groups = np.unique([str(unit) for unit in units], return_inverse=True)[1] if units else np.arange(len(array))
    interval = metrics.bootstrap(array, groups, SAMPLES, SEED)
    return {
        "value": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": len(array),
        **_marked(interval.mean, mark),
    }


def difference(a: np.ndarray, b: np.ndarray, users: np.ndarray) -> Figure:
    """The mean of a - b on the same targets, with its interval and two-sided p-value."""
    paired = metrics.paired_bootstrap(a, b, users, SAMPLES, SEED)
    return {"value": paired.mean, "low": paired.low, "high": paired.high, "n": len(a), "p": paired.p_value}


def _marked(value: float | None, mark: float | None) -> Figure:
    return {} if mark is None else {"mark": mark, "met": value is not None and value >= mark}


def at_least(of: Figure, least: float) -> Figure:
    """The figure with the least that it should be as its mark."""
    return of | _marked(of["value"], least)


def at_most(of: Figure, most: float) -> Figure:
    """The figure with the most that it should be as its mark; no cases meet none."""
    return of | {"mark": f"at most {most:g}", "met": of["value"] is not None and of["value"] <= most}


def above_zero(of: Figure) -> Figure:
    """The figure of a difference with the mark that its whole interval lies above 0."""
    return of | {"mark": "above 0", "met": of["low"] > 0}


def not_below_zero(of: Figure) -> Figure:
    """The figure of a difference with the mark that its interval does not lie below 0 as a whole."""
    return of | {"mark": "not below 0", "met": of["high"] >= 0}


def derangement(count: int, seed: int) -> np.ndarray:
    """int (count,): a seeded permutation that leaves nothing in its place (one cycle through all).

    Raises:
        ValueError: fewer than two things cannot change places.
    """
    if count < 2:
        raise ValueError(f"{count} things cannot all change places: give at least 2")
    order = np.random.default_rng(seed).permutation(count)
    moved = np.empty(count, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


# Showing


def report(
    head: dict[str, Any],
    models: Mapping[str, str],
    sections: Mapping[str, tuple[Callable[..., Any], Callable[[Any], None]]],
    names: Sequence[str],
    as_json: bool,
    *given: object,
) -> None:
    """Measure the named sections and print machine, models and their tables, or all as one JSON object with `head`.

    Args:
        head: what stands before the sections, "machine" among it.
        models: name -> identity.
        sections: name -> (measures `given`, shows what was measured).
        names: the sections that are wanted, in order.
        as_json: one object at the end instead of tables.
        given: what every section is called with.
    """
    measured: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    if not as_json:
        for name, value in {**head["machine"], **models}.items():
            print(f"{name:14s} {value}")
        print()
    for name in names:
        measure, tables = sections[name]
        section(name)
        started = time.perf_counter()
        measured[name] = measure(*given)
        seconds[name] = round(time.perf_counter() - started, 1)
        if not as_json:
            tables(measured[name])
            sys.stdout.flush()
    if as_json:
        print(json.dumps({**head, "sections": measured, "seconds": seconds}, indent=2))


def shown(of: Figure, digits: int = 3) -> str:
    """A figure in words: value (interval), with its mark: "misses 0.75", "meets at most 0.1"."""
    if of["value"] is None:
        return "no cases"
    text = f"{of['value']:.{digits}f}"
    if "low" in of:
        text += f" ({of['low']:.{digits}f} to {of['high']:.{digits}f})"
    if "p" in of:
        text += f" p={of['p']:.3f}"
    if "mark" in of:
        mark = of["mark"] if isinstance(of["mark"], str) else f"{of['mark']:g}"
        text += f"  {'meets' if of['met'] else 'misses'} {mark}"
    return text


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(value) for value in row))
    # A log has no width: wide enough there that no figure is cut.
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def section(name: str) -> None:
    """Say on stderr what is being measured."""
    say(f"-- {name}")

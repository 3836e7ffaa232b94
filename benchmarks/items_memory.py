"""Section `memory`: what describing a large catalogue takes beyond the model, and whether it grows. Linux only (/proc).

Started as a program it is the measured process: python benchmarks/items_memory.py WORKSPACE
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
ITEMS, PICTURES = 50_000, 200
MARK_GB = 2.0


def memory(bench: Any) -> dict[str, Any]:
    """Ingest the catalogue here, describe it in a process of its own."""
    count = min(bench.limit or ITEMS, ITEMS)
    return bench.kept("memory", __file__, [count], lambda: _measure(bench.work / "memory", count))


def _measure(folder: Path, count: int) -> dict[str, Any]:
    from mllm_srec.config import load_config
    from mllm_srec.data.dataset import Dataset
    from mllm_srec.workspace import Workspace

    shutil.rmtree(folder, ignore_errors=True)  # what a killed run described would not be described again
    images = [_picture(folder / "images", number) for number in range(min(PICTURES, count))]
    rows = {
        "item_id": [f"i{number:06}" for number in range(count)],
        "title": [f"Item number {number} of the large catalogue" for number in range(count)],
        "image": [images[number % len(images)] for number in range(count)],
    }
    log = pl.DataFrame({"user_id": ["u"], "item_id": ["i000000"], "timestamp": [0]})
    dataset = Dataset.build("memory", pl.DataFrame(rows), log, has_time=True, root=folder)
    Workspace.create(folder / "ws", load_config(), dataset)
    command = [sys.executable, __file__, str(folder / "ws")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(folder)
    return {"items": count, "pictures": len(images), **summary(**json.loads(done.stdout))}


def _picture(folder: Path, number: int) -> str:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 64)).save(folder / f"{number}.png")
    return f"images/{number}.png"


def summary(start: float, peak: float, done: Sequence[int], resident: Sequence[float]) -> dict[str, Any]:
    """What the measured process told, all in MB.

    Args:
        start: resident right after the model was loaded.
        peak: most that was ever resident behind that.
        done, resident: items described and memory resident, batch by batch.
    """
    half = len(done) // 2
    slope = 1e4 * float(np.polyfit(done[half:], resident[half:], 1)[0]) if len(done) - half > 1 else None
    above = (peak - start) / 1000
    places = np.linspace(0, len(done) - 1, min(len(done), 21)).round().astype(int).tolist()
    return {
        "start_mb": start,
        "above_start_gb": above,
        "mark": MARK_GB,
        "met": above <= MARK_GB,
        "slope_mb_per_10000_items": slope,
        "over_time": [{"items": done[at], "mb": resident[at]} for at in places],
    }


def describe_watched(workspace: Path) -> dict[str, Any]:
    """Describe with a tiny random model; what `summary` needs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from mllm_srec import items
    from mllm_srec.config import load_config
    from mllm_srec.mllm.base import Picture
    from mllm_srec.workspace import Workspace
    from tiny_models import tiny_mllm

    mllm = tiny_mllm()
    mllm.batch_size = load_config().model.batch_size
    start = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    done: list[int] = []
    resident: list[float] = []
    plain = mllm.ask

    def ask(prefixes: Any, questions: Any, max_new_tokens: int) -> Any:
        answers = plain(prefixes, questions, max_new_tokens)
        looked = sum(any(isinstance(part, Picture) for part in prefix.parts) for prefix in prefixes)
        done.append((done[-1] if done else 0) + looked)
        resident.append(status("VmRSS"))
        return answers

    mllm.ask = ask  # type: ignore[method-assign]
    items.describe(Workspace.open(workspace), mllm)
    return {"start": start, "peak": status("VmHWM"), "done": done, "resident": resident}


def status(name: str) -> float:
    """MB of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1000


def show_memory(result: dict[str, Any]) -> None:
    """One table."""
    from common import show

    above = f"{result['above_start_gb']:.2f} GB  {'meets' if result['met'] else 'misses'} {result['mark']:g}"
    slope = result["slope_mb_per_10000_items"]
    rows = [
        ("resident when the model is loaded", f"{result['start_mb']:.0f} MB"),
        ("most above that", above),
        ("growth in the second half", "too few items" if slope is None else f"{slope:+.1f} MB per 10,000 items"),
        *((f"at {point['items']:,} items", f"{point['mb']:.0f} MB") for point in result["over_time"][::4]),
    ]
    show(f"memory: describing {result['items']:,} items, {result['pictures']} pictures", ("memory", ""), rows)


if __name__ == "__main__":
    print(json.dumps(describe_watched(Path(sys.argv[1]))))

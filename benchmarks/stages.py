"""What every stage costs on the sample shop with the embedded model: seconds, share of the whole, peak memory.

    python benchmarks/stages.py [--users 60] [--rows 40] [--json]

Seconds depend on the machine; the shares and the memory are what to compare between two versions.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from mllm_srec.config import load_config
from mllm_srec.data.readers import read
from mllm_srec.data.sample import write_sample
from mllm_srec.pipeline import Pipeline
from mllm_srec.recommender import Recommender
from mllm_srec.workspace import Workspace


def measure(users: int, rows: int) -> dict[str, object]:
    """Run all stages once in a temporary folder."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        shop, place = Path(folder) / "shop", Path(folder) / "ws"
        config = load_config(overrides=(f"training.rows={rows}",))
        started = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal started
            seconds[stage] = round(time.perf_counter() - started, 2)
            started = time.perf_counter()

        write_sample(shop, users=users)
        lap("sample")
        workspace = Workspace.create(place, config, read(shop).with_repeats(config.data.repeats))
        lap("ingest")
        pipeline = Pipeline(workspace)
        assert pipeline.mllm.identity
        lap("load the model")
        for stage in ("describe", "retrieve", "comprehend", "train", "evaluate"):
            getattr(pipeline, stage)()
            lap(stage)
        recommender = Recommender(workspace, pipeline.mllm)
        for user in pipeline.histories.users[:3]:
            recommender.recommend(user=user, k=5, explain=True)
        lap("recommend three users, with reasons")
    total = sum(seconds.values())
    return {
        "users": users,
        "training_rows": rows,
        "seconds": seconds,
        "share": {stage: round(value / total, 3) for stage, value in seconds.items()},
        "total_seconds": round(total, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.users, options.rows)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for stage, value in result["seconds"].items():  # type: ignore[attr-defined]
        print(f"{stage:36s} {value:8.1f} s {result['share'][stage]:7.1%}")  # type: ignore[index]
    print(f"{'peak memory':36s} {result['peak_memory_gb']:8.2f} GB")


if __name__ == "__main__":
    main()

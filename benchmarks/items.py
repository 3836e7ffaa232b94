"""The measures of stage 1, item understanding, on real data with the embedded model before and after its training.

    python benchmarks/items.py --data ../shared/data [--sections eyes,speed] [--work build/bench_items] [--json]

What is finished is kept in the work folder under the hash of what it depends on, so a killed run goes on where it was.
`--limit N` looks at N pictures, users or items only: a quick look, no result.
"""

import argparse
from pathlib import Path

from common import Bench, machine, report
from items_eyes import embeddings, eyes, show_embeddings, show_eyes
from items_injection import injection, show_injection
from items_memory import memory, show_memory
from items_recommendation import recommendation, show_recommendation
from items_speed import show_speed, speed

SECTIONS = {
    "eyes": (eyes, show_eyes),
    "embeddings": (embeddings, show_embeddings),
    "recommendation": (recommendation, show_recommendation),
    "speed": (speed, show_speed),
    "memory": (memory, show_memory),
    "injection": (injection, show_injection),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with captioned/ and hm_sample/")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, default: all")
    parser.add_argument("--work", type=Path, default=Path("build/bench_items"))
    parser.add_argument("--limit", type=int, default=0, help="0: everything")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    bench = Bench(options.data, options.work, options.limit)
    models = {name: mllm.identity for name, mllm in bench.models.items()}
    result = {"machine": machine(), "limit": options.limit, "models": models}
    report(result, models, SECTIONS, names, options.json, bench)


if __name__ == "__main__":
    main()

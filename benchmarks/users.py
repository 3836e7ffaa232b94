"""The measures of stage 2, temporal user comprehension, with the embedded model: real logs and the sample shop.

    python benchmarks/users.py --data ../shared/data [--sections likelihood,change] [--sets hm_sample,sample]
                               [--work build/bench_users] [--json]

Protocol: leave_last_out, file_order, min_history of the configuration; whatever is chosen is chosen on validation.
WORK/SET is the set's workspace, made and described where it is missing; what is finished is kept beside it under the
hash of what it depends on, so a killed run goes on where it was. `--limit N` looks at N users or lists only: a quick
look, no result. Threads are those of the environment (OMP_NUM_THREADS).
"""

import argparse
from pathlib import Path

from common import Bench, machine, report
from users_change import change, show_change
from users_common import SETS
from users_events import events, show_events
from users_likelihood import likelihood, show_likelihood
from users_ranking import rank, show_rank
from users_speed import show_speed, speed
from users_worked import show_worked, worked

SECTIONS = {
    "likelihood": (likelihood, show_likelihood),
    "change": (change, show_change),
    "ranking": (rank, show_rank),
    "speed": (speed, show_speed),
    "events": (events, show_events),
    "worked": (worked, show_worked),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with ml100k_posters/ and hm_sample/")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, default: all")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated, default: all")
    parser.add_argument("--work", type=Path, default=Path("build/bench_users"))
    parser.add_argument("--limit", type=int, default=0, help="0: everything")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    names, sets = options.sections.split(","), tuple(options.sets.split(","))
    for what, given, known in (("section", names, SECTIONS), ("set", sets, SETS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {what} {unknown[0]!r}: choose from {', '.join(known)}")
    bench = Bench(options.data, options.work, options.limit)
    result = {"machine": machine(), "model": bench.trained.identity, "sets": sets, "limit": options.limit}
    report(result, {"model": bench.trained.identity}, SECTIONS, names, options.json, bench, sets)


if __name__ == "__main__":
    main()

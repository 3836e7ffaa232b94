"""Section `speed`: users per second of writing their windows, against one prompt at a time and the bare model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import SEED, Bench, batches, show
from items_speed import CLOCKS, ROUNDS, recorded, replay, spread, spread_in_words, timed
from users_common import SAMPLE, opened

from mllm_srec.config import UsersConfig
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.progress import say
from mllm_srec.user_states import Window, read_window
from mllm_srec.users import summarise
from mllm_srec.windows import window_bounds

USERS = 24
"""Of each of the two sets."""
MEASURED = (SAMPLE, "hm_sample")
MARKS = {"batched against one at a time": 4.0, "bare share": 0.8}


def speed(bench: Bench, sets: Sequence[str]) -> dict[str, Any]:
    """Three interleaved rounds of everything (one with a limit); medians. Nothing if neither set is wanted."""
    names = [name for name in MEASURED if name in sets]
    if not names:
        return {}
    mllm, read = bench.trained, []
    for name in names:
        log = opened(bench, name)
        count = min(USERS, max(1, bench.limit // len(names)) if bench.limit else USERS, len(log.histories.users))
        for user in np.sort(np.random.default_rng(SEED).permutation(len(log.histories.users))[:count]):
            history = log.history(int(user))
            bounds = window_bounds(len(history.items), history.time, log.config)
            of_user = [read_window(history, start, stop, log.catalogue) for start, stop in bounds]
            read += [(window, window is of_user[-1]) for window in of_user]
        config = log.config
    read.sort(key=lambda pair: len(pair[0].prompt))  # as `comprehend` does
    windows, newest = [window for window, _ in read], [at for at, (_, last) in enumerate(read) if last]
    made_of = [mllm.identity, mllm.batch_size, torch.get_num_threads(), config.model_dump_json()]
    made_of += [window.prompt for window in windows]
    rounds = [
        bench.kept(
            f"speed-{number}",
            __file__,
            made_of,
            lambda number=number: one_round(mllm, windows, newest, config, number),
        )
        for number in range(1 if bench.limit else ROUNDS)
    ]
    result = {"sets": names, "users": len(newest), "windows": len(windows), "batch": mllm.batch_size}
    return result | medians(rounds)


def one_round(
    mllm: LocalMllm, windows: Sequence[Window], newest: Sequence[int], config: UsersConfig, number: int
) -> dict[str, Any]:
    """Seconds of every way to write the windows, one after the other, by both clocks."""
    say(f"speed: round {number + 1} of {ROUNDS}")
    # The slow way writes another third each round, so that all windows are written once.
    third = list(range(number % ROUNDS, len(windows), ROUNDS)) or [0]

    def together(wanted: Sequence[Window]) -> list[str]:
        made = [summarise(mllm, batch, config) for batch in batches(wanted, mllm.batch_size)]
        return [summary.text for of_batch in made for summary in of_batch]

    def one_at_a_time() -> list[str]:
        return [summarise(mllm, [windows[at]], config)[0].text for at in third]

    summarise(mllm, windows[:2], config)  # warms up
    seconds: dict[str, dict[str, float]] = {}
    with recorded(mllm) as calls:
        seconds["batched"], texts = timed(lambda: together(windows))
    # All that a state needs: how taste moves is counted, and earlier windows' texts are for timelines.
    seconds["newest only"], _ = timed(lambda: together([windows[at] for at in newest]))
    seconds["bare"], _ = timed(lambda: replay(mllm, calls, ()))
    taken, alone = timed(one_at_a_time)
    seconds["one at a time"] = {clock: value * len(windows) / len(third) for clock, value in taken.items()}
    # Equal in float32; bfloat16 rounds a row by the batch it is in.
    same = np.mean([texts[at] == text for at, text in zip(third, alone, strict=True)])
    return {"seconds": seconds, "written_one_at_a_time": len(third), "same_texts": float(same)}


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the rounds: seconds, and the ratios by either clock, each the median of the rounds' own ratios.

    The marks are for the processor's time, which other programs on the machine do not change.
    """
    result: dict[str, Any] = {
        "same_texts": float(np.mean([of["same_texts"] for of in rounds])),
        "written_one_at_a_time": [of["written_one_at_a_time"] for of in rounds],
        "seconds": {},
        "ratios": {},
    }
    for clock in CLOCKS:
        seconds = {name: np.array([of["seconds"][name][clock] for of in rounds]) for name in rounds[0]["seconds"]}
        result["seconds"][clock] = {name: spread(values) for name, values in seconds.items()}
        result["ratios"][clock] = {
            "batched against one at a time": spread(seconds["one at a time"] / seconds["batched"]),
            "states against all windows one at a time": spread(seconds["one at a time"] / seconds["newest only"]),
            "bare share": spread(seconds["bare"] / seconds["batched"]),
        }
    for name, mark in MARKS.items():
        of = result["ratios"]["processor"][name]
        of |= {"mark": mark, "met": of["value"] >= mark}
    return result


def show_speed(result: dict[str, Any]) -> None:
    """Rates and ratios; in brackets the least and the most of the rounds."""
    if not result:
        print(f"speed: neither {' nor '.join(MEASURED)} among the sets\n")
        return
    users, wall = result["users"], result["seconds"]["wall"]
    title = f"speed: {result['windows']} windows of {users} users, batch {result['batch']}"
    rows = [(name, spread_in_words(of), f"{users / of['value']:.2f}") for name, of in wall.items()]
    show(title, ("way", "seconds on the wall", "users per second"), rows)
    by_clock = [result["ratios"][clock] for clock in CLOCKS]
    rows = [(name, *(spread_in_words(of[name]) for of in by_clock)) for name in by_clock[0]]
    rows.append(("share of texts that are the same both ways", f"{result['same_texts']:.3f}", ""))
    show("speed: ratios, medians of the rounds (least to most)", ("ratio", "processor time", "wall clock"), rows)

"""Teach the embedded model the general skill of stage 3 on simulated shops: the head start of every fine-tuning.

    python tools/train_recommender.py --work build/train_recommender

Users of invented catalogues (tools/training_users.py) whose tastes are known choose their next item; the model learns
to tell it from others, half of them close to what the user chose before, and to say why. Rows, prompts and losses are
those of `mllm-srec train`. Writes src/mllm_srec/mllm/trained/recommender/. An hour or two on two cores, five minutes on
a GPU; seeded, and it goes on where it was stopped.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from training_users import Simulated, simulate, summary

from mllm_srec import metrics, tuning
from mllm_srec.config import Config, ModelConfig, TrainingConfig, UsersConfig
from mllm_srec.mllm.embedded import HEAD_START
from mllm_srec.mllm.load import load_mllm, trainable
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.records import TrainingRecord, find_evidence, rationale, training_record
from mllm_srec.training_rows import REASONED
from mllm_srec.user_states import UserState, build_state, read_window
from mllm_srec.windows import window_bounds

SEED, HELD_SEED = 11, 12
NEGATIVES = 8
HELD = 200
"""Simulated users that no training sees, for the figure at the end."""
BLUR = 2.0
"""Deviation, in facts, of the noise in what retrieval would find close: were the closest items drawn, being close would
speak against an item."""


def lesson(generator: np.random.Generator) -> TrainingRecord:
    """A simulated user before one of their choices: that item first, then what they did not choose."""
    simulated = simulate(generator)
    history = simulated.history
    while True:
        end = int(generator.choice(np.flatnonzero(~history.disliked[1:]) + 1))
        negatives = _negatives(simulated, end, generator)
        if len(negatives) == NEGATIVES:
            break
        simulated = simulate(generator)
        history = simulated.history
    seen, low = history.items[:end], history.disliked[:end]
    state, catalogue = _state(simulated, end, generator), simulated.catalogue
    items = [int(history.items[end]), *negatives]
    told = [
        rationale(find_evidence(state, catalogue, item, seen[~low], seen[low]), catalogue, chosen=at == 0)
        for at, item in enumerate(items[:REASONED])
    ]
    return training_record(state, catalogue, end, items, told)


def _state(simulated: Simulated, end: int, generator: np.random.Generator) -> UserState:
    """The state as of `end`, with windows and a number of last choices as users may configure them."""
    history, size = simulated.history, int(generator.integers(3, 11))
    config = UsersConfig(window=size, step=int(generator.integers(1, size + 1)), recent=int(generator.integers(3, 11)))
    newest = read_window(history, *window_bounds(end, history.time, config)[-1], simulated.catalogue)
    state = build_state(history, end, summary(simulated, newest), simulated.catalogue, config)
    assert history.time is not None  # simulated logs have times
    return state.asked_at(int(history.time[end]))


def _negatives(simulated: Simulated, end: int, generator: np.random.Generator) -> list[int]:
    """Half of them such as retrieval would find, near to what the user chose before but for noise, half of all."""
    facts, history = simulated.catalogue.facts, simulated.history
    free = np.setdiff1d(np.arange(len(facts)), history.items[: end + 1])
    last = history.items[max(0, end - 5) : end]
    close = [np.mean([len(facts[item].keys() & facts[other].keys()) for other in last]) for item in free]
    order = free[np.argsort(-(np.array(close) + BLUR * generator.normal(size=len(free))), kind="stable")]
    hard = order[: NEGATIVES // 2]
    rest = generator.permutation(np.setdiff1d(free, hard))[: NEGATIVES - len(hard)]
    return [int(item) for item in (*hard, *rest)]


def first_place(mllm: LocalMllm, records: list[TrainingRecord]) -> tuple[float, float]:
    """(share of records whose positive has the largest odds, ties counted as chance; mean loss of the odds)."""
    odds = np.stack([scores[:, 0] for scores in mllm.score([record.request for record in records])])
    greater, ties = metrics.places(odds, np.zeros(len(odds), dtype=np.int64))
    exact = odds.astype(np.float64)
    loss = float((np.logaddexp.reduce(exact, axis=1) - exact[:, 0]).mean())
    return float(metrics.recall(greater, ties, 1).mean()), loss


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/train_recommender"))
    parser.add_argument("--rows", type=int, default=1800)
    parser.add_argument("--out", type=Path, default=HEAD_START)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    records = [lesson(np.random.default_rng([SEED, number])) for number in range(arguments.rows)]
    held = [lesson(np.random.default_rng([HELD_SEED, number])) for number in range(HELD)]
    config = Config(
        seed=SEED,
        training=TrainingConfig(rows=arguments.rows, negatives=NEGATIVES, head_start=False),
    )
    mllm = trainable(load_mllm(ModelConfig()))
    before = first_place(mllm, held)
    tuning.train(mllm, records, config, arguments.work / "adapter")
    after = first_place(mllm, held)
    figures = {
        "rows": arguments.rows,
        "held": HELD,
        "chance": [1 / (1 + NEGATIVES), float(np.log(1 + NEGATIVES))],
        "before": before,
        "after": after,
    }
    print(json.dumps(figures, indent=2))
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = load_file(arguments.work / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()},
        arguments.out / "adapter_model.safetensors",
    )
    (arguments.out / "adapter_config.json").write_bytes((arguments.work / "adapter/adapter_config.json").read_bytes())
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

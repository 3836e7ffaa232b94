import numpy as np
import pytest

from mllm_srec.config import RetrievalConfig
from mllm_srec.data.split import leave_last_out
from mllm_srec.retrieval import Likeness, Mix, choose, choosing
from small_logs import log


def test_validation_chooses_the_signal_that_finds_its_targets() -> None:
    # Every user's validation item is the content twin (a-b, c-d, e-f) of the one before; company says nothing.
    twins = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    histories = log("eabc", "acda", "cefa", "eabd")
    split = leave_last_out(histories, "file_order", 3)
    config = RetrievalConfig(weights=(0.0, 8.0), epochs=0)
    assert choose(histories, split.seen_validation, split.validation, Likeness(twins), config).mix == Mix(
        8.0, 0.0, 0.0, 0
    )
    # Identical vectors say nothing, so no weight is better than the smallest.
    same = Likeness(np.ones((6, 1), dtype=np.float32))
    chosen = choose(
        histories, split.seen_validation, split.validation, same, RetrievalConfig(weights=(4.0, 0.0, 2.0), epochs=0)
    )
    assert (chosen.mix.content, chosen.encoder, chosen.curve) == (0.0, None, ())


def test_the_encoder_is_the_one_of_its_best_look() -> None:
    # The order of the circle decides; nothing is alike.
    circle = "abcdef" * 4
    histories = log(*(circle[start : start + 9] for start in range(12)), times=True)
    split = leave_last_out(histories, "file_order", 3)
    likeness = Likeness(np.eye(6, dtype=np.float32))
    chosen = choose(
        histories,
        split.seen_validation,
        split.validation,
        likeness,
        RetrievalConfig(weights=(1.0, 4.0), epochs=60, repeats=True),
    )
    assert chosen.encoder is not None and chosen.mix.sequence > 0
    best = max(ndcg for _, ndcg in chosen.curve)
    assert best > 0.9
    assert (chosen.mix.epochs, best) == next((epoch, ndcg) for epoch, ndcg in chosen.curve if ndcg == best)
    looks = [epoch for epoch, _ in chosen.curve]
    assert looks == list(range(5, looks[-1] + 1, 5))
    stopped = looks[-1] < 60
    assert stopped == (len(looks) - 1 - looks.index(chosen.mix.epochs) >= choosing.PATIENCE)


def test_a_useless_encoder_is_left_out() -> None:
    histories = log("abcd", "bcda", "cdab", "dabc")
    split = leave_last_out(histories, "file_order", 3)
    chosen = choose(
        histories,
        split.seen_validation,
        split.validation,
        Likeness(np.eye(6, dtype=np.float32)),
        RetrievalConfig(weights=(0.0,), epochs=1),
    )
    assert (chosen.mix, chosen.encoder) == (Mix(0.0, 0.0, 0.0, 0), None)


def test_without_validation_the_weights_are_those_nearest_to_one() -> None:
    histories = log("ab")
    split = leave_last_out(histories, "file_order", 3)
    likeness = Likeness(np.eye(6, dtype=np.float32))
    config = RetrievalConfig(weights=(0.0, 0.5, 4.0), epochs=2)
    chosen = choose(histories, split.seen_validation, split.validation, likeness, config)
    assert chosen.mix == Mix(0.5, 0.5, 0.0, 2) and chosen.encoder is not None
    assert choose(
        histories, split.seen_validation, split.validation, likeness, config.model_copy(update={"epochs": 0})
    ).mix == Mix(0.5, 0.0, 0.0, 0)


def test_a_sample_of_the_targets_chooses_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "TARGETS", 3)
    histories = log("abcd", "bcda", "cdab", "dabc", "abdc")
    split = leave_last_out(histories, "file_order", 3)
    likeness = Likeness(np.eye(6, dtype=np.float32))
    one, other = (
        choose(histories, split.seen_validation, split.validation, likeness, RetrievalConfig(epochs=5), seed=3)
        for _ in range(2)
    )
    assert (one.mix, one.curve) == (other.mix, other.curve)

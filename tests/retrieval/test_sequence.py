from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_srec.data.dataset import Queries
from mllm_srec.retrieval import sequence
from mllm_srec.retrieval.sequence import GAPS, SequenceEncoder, sampled_loss
from small_logs import all_of, log, places

DAY = 86_400_000
VECTORS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def encoder(known: str = "abcdef", vectors: np.ndarray = VECTORS) -> SequenceEncoder:
    torch.manual_seed(0)
    made = SequenceEncoder(vectors, np.isin(np.arange(6), places(known)))
    torch.nn.init.normal_(made.bias)
    return made.eval()


def test_an_event_sees_itself_and_what_was_before() -> None:
    made = encoder()
    items, gaps = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[GAPS, 1, 2, 3]])
    whole = made(items, gaps, torch.tensor([4]))
    for changed_items, changed_gaps in (
        (items, gaps + torch.tensor([0, 0, 0, 1])),
        (torch.tensor([[0, 1, 2, 5]]), gaps),
    ):
        other = made(changed_items, changed_gaps, torch.tensor([4]))
        torch.testing.assert_close(whole[:, :3], other[:, :3])
        assert not torch.allclose(whole[:, 3], other[:, 3])


def test_a_query_is_the_same_whoever_else_asks_and_without_events_nothing() -> None:
    made = encoder()
    histories = [places("abc"), places(""), places("f"), places("fedcba")]
    times = [np.arange(len(history)) * DAY for history in histories]
    together = made.queries(Queries(histories, times))
    assert together.dtype == np.float32 and together.shape == (4, sequence.WIDTH + 1)
    np.testing.assert_array_equal(together[1], 0)
    for at, (history, time) in enumerate(zip(histories, times, strict=True)):
        np.testing.assert_allclose(made.queries(Queries([history], [time]))[0], together[at], atol=1e-5)
    assert not np.allclose(made.queries(histories)[0], together[0]), "times count"


def test_only_the_newest_events_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "LENGTH", 3)
    made = encoder()
    one, other, short = made.queries([places("fabc"), places("eabc"), places("abc")])
    np.testing.assert_allclose(one, other)
    np.testing.assert_allclose(one, short, atol=1e-6)


def test_an_item_is_its_name_and_its_content_and_a_new_one_its_content_alone() -> None:
    made = encoder(known="abcde")
    items = made.items()
    projected = made.content(torch.from_numpy(VECTORS)).detach().numpy()
    names, bias = made.name.weight.detach().numpy(), made.bias.detach().numpy()
    np.testing.assert_allclose(items[:5, :-1], (projected + names)[:5], rtol=1e-5)
    np.testing.assert_allclose(items[5, :-1], projected[5], rtol=1e-5)
    np.testing.assert_allclose(items[:, -1], [*bias[:5], bias[:5].mean()], rtol=1e-5)


def test_gaps_are_buckets_of_hours() -> None:
    hours = np.array([0, 0, 1, 4, 11, 11 + 3000, 11 + 3000 + 10**6]) * 3_600_000
    # since the event before: none, 0, 1, 3, 7, 3000, 10^6 hours: log2(1 + h)
    assert sequence._gaps(hours).tolist() == [GAPS, 0, 1, 2, 3, 11, GAPS - 1]
    assert sequence._gaps(hours[:0]).tolist() == []


def test_every_event_but_the_first_is_a_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "LENGTH", 3)
    histories = log("abcdefab", "a", "fe", times=True)
    item, gap, windows = sequence._windows(histories, all_of(histories))
    assert item.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 5, 4]
    assert gap.tolist() == [GAPS, 4, 4, 4, 4, 4, 4, 4, GAPS, GAPS, 4]  # 24 hours: log2(25)
    assert sorted(windows.tolist()) == [[0, 2], [1, 5], [4, 8], [9, 11]]
    targets = sorted(at for start, stop in windows for at in range(start + 1, stop))
    assert targets == [1, 2, 3, 4, 5, 6, 7, 10]
    seen = np.array([True] * 3 + [False] * 5 + [True] * 3)
    item, gap, windows = sequence._windows(histories, seen)
    assert (item.tolist(), gap.tolist()) == ([0, 1, 2, 0, 5, 4], [GAPS, 4, 4, GAPS, GAPS, 4])
    assert windows.tolist() == [[0, 3], [4, 6]]
    assert sequence._windows(log("ab"), all_of(log("ab")))[1].tolist() == [GAPS, GAPS]


def test_a_circle_is_learnt_and_one_seed_gives_one_encoder() -> None:
    circle = "abcdef" * 3
    histories = log(*(circle[start : start + 8] for start in range(6)))
    before = torch.random.get_rng_state()
    made = sequence.fit(histories, all_of(histories), VECTORS, 60, 0)
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's random numbers are used up"
    scores = made.queries([places("abc"), places("ef"), places("d")]) @ made.items().T
    assert scores.argmax(1).tolist() == [3, 0, 4]
    again, other = (sequence.fit(histories, all_of(histories), VECTORS, 3, seed) for seed in (0, 1))
    same = sequence.fit(histories, all_of(histories), VECTORS, 3, 0)
    np.testing.assert_array_equal(again.items(), same.items())
    assert not np.array_equal(again.items(), other.items())


def test_a_look_on_the_way_changes_nothing_and_may_end_the_training() -> None:
    histories = log("abcd", "bcde", "cdef", times=True)
    looks: list[int] = []

    def look(encoder: SequenceEncoder, epoch: int) -> bool:
        looks.append(epoch)
        encoder.queries([places("ab")])
        return epoch == 10

    watched = sequence.fit(histories, all_of(histories), VECTORS, 40, 0, check=look)
    assert looks == [5, 10]
    np.testing.assert_array_equal(watched.items(), sequence.fit(histories, all_of(histories), VECTORS, 10, 0).items())


def test_what_must_not_be_seen_leaves_no_trace() -> None:
    histories = log("abcd", "bcde", times=True)
    seen = np.array([True, True, True, False] * 2)
    later = replace(histories, item=np.where(seen, histories.item, 5).astype(np.int32))
    one, other = (sequence.fit(of, seen, VECTORS, 3, 0).items() for of in (histories, later))
    np.testing.assert_array_equal(one, other)


def test_a_sampled_loss_nears_the_full_one() -> None:
    torch.manual_seed(0)
    table, bias = torch.randn(6, 8), torch.randn(6)
    states, targets = torch.randn(5, 8), torch.tensor([0, 1, 2, 5, 5])
    full = torch.nn.functional.cross_entropy(states @ table.T + bias, targets)
    chance = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.1, 0.2])
    drawn = torch.multinomial(chance, 200_000, replacement=True)

    def loss(expected: torch.Tensor) -> torch.Tensor:
        return sampled_loss(states, targets, drawn, expected.log(), lambda of: (table[of], bias[of]))

    assert loss(len(drawn) * chance[drawn]).item() == pytest.approx(full.item(), rel=0.003)
    assert loss(torch.full((len(drawn),), len(drawn) / 6)).item() != pytest.approx(full.item(), rel=0.01)


def test_a_large_catalogue_is_learnt_from_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "FULL_SOFTMAX", 3)
    monkeypatch.setattr(sequence, "NEGATIVES", 4)
    circle = "abcdef" * 3
    histories = log(*(circle[start : start + 8] for start in range(6)))
    made = sequence.fit(histories, all_of(histories), VECTORS, 80, 0)
    scores = made.queries([places("abc"), places("ef"), places("d")]) @ made.items().T
    assert scores.argmax(1).tolist() == [3, 0, 4]


def test_a_log_without_a_pair_teaches_nothing_and_is_no_error() -> None:
    histories = log("a", "b")
    assert np.isfinite(sequence.fit(histories, all_of(histories), VECTORS, 2, 0).items()).all()


def test_a_stored_encoder_is_the_same_or_none(tmp_path: Path) -> None:
    histories = log("abcd", "bcde", times=True)
    made = sequence.fit(histories, all_of(histories), VECTORS, 2, 0)
    mark = sequence.made_of(histories, all_of(histories), VECTORS, 0)
    file = tmp_path / "encoders" / "test.safetensors"
    assert sequence.load(file, VECTORS) is None
    sequence.write(made, file, mark, 2)
    for again in (sequence.load(file, VECTORS), sequence.load(file, VECTORS, mark, 2)):
        assert again is not None
        np.testing.assert_array_equal(again.items(), made.items())
        np.testing.assert_array_equal(again.queries([places("ab")]), made.queries([places("ab")]))
    assert sequence.load(file, VECTORS, mark, 3) is None
    assert sequence.load(file, VECTORS, "other", 2) is None
    assert sequence.load(file, VECTORS[:, :3].copy()) is None
    assert sequence.load(file, VECTORS[:5]) is None
    file.write_bytes(file.read_bytes()[:-9])
    assert sequence.load(file, VECTORS) is None


def test_an_encoder_is_made_of_its_events_times_vectors_and_seed() -> None:
    histories = log("abcd", "bcde", times=True)
    seen = all_of(histories)
    assert histories.time is not None
    moved = replace(histories, time=histories.time + DAY * np.arange(8))
    swapped = replace(histories, item=histories.item[::-1].copy())
    fewer = seen.copy()
    fewer[3] = False
    marks = {
        sequence.made_of(*of)
        for of in (
            (histories, seen, VECTORS, 0),
            (histories, seen, VECTORS, 1),
            (histories, seen, VECTORS + 1, 0),
            (moved, seen, VECTORS, 0),
            (swapped, seen, VECTORS, 0),
            (histories, fewer, VECTORS, 0),
            (replace(histories, time=None), seen, VECTORS, 0),
        )
    }
    assert len(marks) == 7

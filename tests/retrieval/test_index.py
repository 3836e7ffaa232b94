from pathlib import Path

import numpy as np
import pytest

from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.errors import StoreError
from mllm_srec.retrieval import Likeness, Mix, Retriever, index, retriever, sequence
from mllm_srec.retrieval.index import ItemIndex
from small_logs import all_of

COUNT, WIDTH = 600, 9


def clustered(seed: int, count: int = COUNT) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(12, WIDTH))
    made = centres[generator.integers(0, 12, count)] + 0.3 * generator.normal(size=(count, WIDTH))
    vectors: np.ndarray = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return vectors


def shop(users: int = 40, events: int = 12) -> Histories:
    generator = np.random.default_rng(3)
    return Histories(
        users=[f"u{user}" for user in range(users)],
        items=[f"i{item}" for item in range(COUNT)],
        offsets=np.arange(users + 1, dtype=np.int64) * events,
        item=generator.zipf(1.3, users * events).clip(1, COUNT).astype(np.int32) - 1,
        time=np.tile(np.arange(events, dtype=np.int64) * 86_400_000, users),
        rating=np.full(users * events, np.nan, dtype=np.float32),
    )


def test_an_index_finds_what_is_best_and_is_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index, "PER_PARTITION", 100)
    vectors = clustered(0)
    built = ItemIndex(tmp_path / "index", vectors)
    assert "600 items are indexed" in capsys.readouterr().err
    again = ItemIndex(tmp_path / "index", vectors)
    assert capsys.readouterr().err == ""
    found = []
    for query in clustered(1, 20):
        exact = np.argsort(-(vectors @ query), kind="stable")[:10]
        (one,) = built.search(query[None], 10)
        assert one.dtype == np.int64 and len(one) == 10
        np.testing.assert_array_equal(one, again.search(query[None], 10)[0])
        assert one[0] == exact[0]
        found.append(np.isin(one, exact).mean())
    assert np.mean(found) > 0.95


def test_many_queries_are_answered_like_one_after_the_other(tmp_path: Path) -> None:
    built, queries = ItemIndex(tmp_path, clustered(0)), clustered(1, 7)
    together = built.search(queries, 5)
    assert len(together) == 7 and built.search(queries[:0], 5) == []
    for query, items in zip(queries, together, strict=True):
        np.testing.assert_array_equal(items, built.search(query[None], 5)[0])


def test_other_vectors_are_another_index(tmp_path: Path) -> None:
    one, other = (ItemIndex(tmp_path, clustered(seed)) for seed in (0, 1))
    query = clustered(2, 1)[0]
    assert one.search(query[None], 5)[0].tolist() != other.search(query[None], 5)[0].tolist()


def test_an_index_that_was_not_finished_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(**_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index, "IvfPq", killed)
        with pytest.raises(KeyboardInterrupt):
            ItemIndex(tmp_path, clustered(0))
    query = clustered(1, 1)[0]
    assert ItemIndex(tmp_path, clustered(0)).search(query[None], 1)[0].item() == np.argmax(clustered(0) @ query)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("a file")
    with pytest.raises(StoreError, match="index"):
        ItemIndex(tmp_path / "index", clustered(0))


@pytest.mark.parametrize("mix", [Mix(1.0, 2.0, 0.5, 1), Mix(1.0, 0.0, 0.5, 0)])
@pytest.mark.parametrize("repeats", [False, True])
def test_lists_from_the_index_are_those_of_the_whole_catalogue(
    mix: Mix, repeats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PER_PARTITION", 100)
    histories, vectors = shop(), clustered(0)
    encoder = sequence.fit(histories, all_of(histories), vectors, 1, 0) if mix.epochs else None
    exact = Retriever.fit(histories, all_of(histories), Likeness(vectors), mix, encoder, repeats)
    assert exact.indexed(tmp_path) is exact, "a small catalogue is scored whole"
    monkeypatch.setattr(retriever, "EXACT", COUNT - 1)
    monkeypatch.setattr(retriever, "STRONG", 50)
    indexed = exact.indexed(tmp_path)
    assert indexed.likeness.index is not None and (indexed.index is not None) == bool(mix.sequence)
    assert histories.time is not None
    asked = Queries(
        [histories.of(user) for user in range(20)] + [np.zeros(0, dtype=np.int32)],
        [histories.time[histories.span(user)] for user in range(20)] + [np.zeros(0, dtype=np.int64)],
    )
    items, scores = indexed.candidates(asked, 10)
    whole, expected = exact.candidates(asked, 10)
    same = np.mean([np.isin(one, other).mean() for one, other in zip(items, whole, strict=True)])
    assert same > 0.95
    np.testing.assert_allclose(scores[:, 0], expected[:, 0], atol=1e-3)
    assert (np.diff(scores, axis=1) <= 0).all()
    for history, row in zip(asked, items, strict=True):
        assert len(set(row.tolist())) == 10
        assert repeats or not set(row.tolist()) & set(history.tolist())
    np.testing.assert_allclose(indexed.scores(asked[:3]), exact.scores(asked[:3]), atol=0.2)


def test_a_list_longer_than_the_index_finds_is_that_of_the_whole_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PER_PARTITION", 100)
    monkeypatch.setattr(index, "PROBES", 1)
    monkeypatch.setattr(retriever, "EXACT", COUNT - 1)
    monkeypatch.setattr(retriever, "STRONG", 50)
    histories = shop()
    exact = Retriever.fit(histories, all_of(histories), Likeness(clustered(0)), Mix(0.0, 0.0, 1.0, 0))
    indexed = exact.indexed(tmp_path)
    asked = [histories.of(0), histories.of(1)]
    items, _ = indexed.candidates(asked, COUNT - 12)
    np.testing.assert_array_equal(items, exact.candidates(asked, COUNT - 12)[0])

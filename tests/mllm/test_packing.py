from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.mllm.packing import PackedSegments, chunks, pack, padded_mask, row_mask

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def segment_mask(packed: PackedSegments, prefix: int, dtype: torch.dtype) -> torch.Tensor:
    """Behind one whole prefix."""
    return padded_mask(packed, torch.ones(1, prefix), dtype)


def seen(mask: torch.Tensor) -> list[str]:
    """One string per row: 1 where a token is seen."""
    low = torch.finfo(mask.dtype).min
    assert set(mask.unique().tolist()) <= {0.0, low}
    assert mask.shape[1] == 1
    return ["".join("1" if value == 0 else "." for value in row) for rows in mask[:, 0] for row in rows]


def test_segments_are_laid_end_to_end() -> None:
    packed = pack([[7, 8], [9], [4, 5, 6]])
    assert packed.ids.tolist() == [7, 8, 9, 4, 5, 6]
    assert packed.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert packed.place.tolist() == [0, 1, 0, 0, 1, 2]
    assert packed.starts == (0, 2, 3)


@pytest.mark.parametrize("segments", [[], [[]], [[1], []]])
def test_an_empty_segment_is_refused(segments: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(segments)


def test_a_segment_sees_the_prefix_and_itself() -> None:
    packed = pack([[7, 8], [9], [4, 5]])
    assert seen(segment_mask(packed, 3, torch.float32)) == [
        "1111....",
        "11111...",
        "111..1..",
        "111...1.",
        "111...11",
    ]


def test_a_segment_with_a_parent_sees_it_and_counts_on_from_its_end() -> None:
    packed = pack([[7, 8], [4, 5], [6], [9], [3]], [-1, 0, 0, -1, 3])
    assert packed.ids.tolist() == [7, 8, 4, 5, 6, 9, 3]
    assert packed.owner.tolist() == [0, 0, 1, 1, 2, 3, 4]
    assert packed.parent.tolist() == [-1, -1, 0, 0, 0, -1, 3]
    assert packed.place.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert packed.starts == (0, 2, 4, 5, 6)
    expected = ["11......", "111.....", "1111....", "11111...", "111..1..", "1.....1.", "1.....11"]
    assert seen(segment_mask(packed, 1, torch.float32)) == expected
    whole = seen(row_mask(packed, 1, torch.float32))
    assert whole == ["1.......", *expected]


@given(LENGTHS, LENGTHS, st.integers(1, 6))
def test_a_child_is_seen_as_if_it_ended_its_parent(lengths: list[int], children: list[int], prefix: int) -> None:
    parents = [i % len(lengths) for i in range(len(children))]
    packed = pack([[1] * length for length in lengths + children], [-1] * len(lengths) + parents)
    mask = segment_mask(packed, prefix, torch.float32)[0, 0] == 0
    for child, parent in enumerate(parents):
        pair = (packed.owner == parent) | (packed.owner == len(lengths) + child)
        rows = mask[packed.owner == len(lengths) + child]
        assert not rows[:, prefix:][:, ~pair].any()
        alone = segment_mask(pack([[1] * (lengths[parent] + children[child])]), prefix, torch.float32)[0, 0] == 0
        own = torch.cat([rows[:, :prefix], rows[:, prefix:][:, pair]], 1)
        assert torch.equal(own, alone[lengths[parent] :])
        assert packed.place[pair].tolist() == list(range(lengths[parent] + children[child]))


@pytest.mark.parametrize("parents", [[-1], [-1, 0, 1], [-1, 1, -1]])
def test_a_parent_with_a_parent_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="a parent without a parent"):
        pack([[7], [8], [9]], parents)


def test_the_padding_of_a_shorter_prefix_is_not_seen() -> None:
    packed = pack([[7, 8], [9]])
    prefixes = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert seen(padded_mask(packed, prefixes, torch.float32)) == [
        *("1111..", "11111.", "111..1"),
        *("1..1..", "1..11.", "1....1"),
    ]


def test_a_row_holds_a_causal_prefix_too() -> None:
    packed = pack([[7, 8], [9]])
    assert seen(row_mask(packed, 2, torch.float32)) == [
        "1....",
        "11...",
        "111..",
        "1111.",
        "11..1",
    ]


@given(LENGTHS, st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_row_mask_ends_in_the_segment_mask(lengths: list[int], prefix: int, dtype: torch.dtype) -> None:
    packed = pack([[1] * length for length in lengths])
    row, below = row_mask(packed, prefix, dtype), segment_mask(packed, prefix, dtype)
    assert row.dtype == below.dtype == dtype
    assert row.shape == (1, 1, prefix + sum(lengths), prefix + sum(lengths))
    assert torch.equal(row[..., prefix:, :], below)
    # Place p of a segment sees the prefix and p + 1 tokens of its own.
    assert torch.equal((below[0, 0] == 0).sum(1), prefix + packed.place + 1)


def test_chunks_hold_at_most_the_limit() -> None:
    assert chunks([4, 4, 4], limit=8) == [range(0, 2), range(2, 3)]
    assert chunks([4, 20, 4], limit=8) == [range(0, 1), range(1, 2), range(2, 3)]
    assert chunks([8], limit=8) == [range(0, 1)]
    assert chunks([], limit=8) == []


@given(LENGTHS, st.integers(1, 20))
def test_chunks_keep_every_segment_in_order(lengths: list[int], limit: int) -> None:
    runs = chunks(lengths, limit)
    assert [i for run in runs for i in run] == list(range(len(lengths)))
    for run in runs:
        assert len(run) == 1 or sum(lengths[i] for i in run) <= limit
    for run, following in pairwise(runs):
        assert sum(lengths[i] for i in run) + lengths[following.start] > limit  # no chunk is cut short

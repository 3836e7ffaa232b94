from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.mllm.packing import chunks, pack, row_mask, segment_mask

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def seen(mask: torch.Tensor) -> list[str]:
    """One string per row: 1 where a token is seen."""
    low = torch.finfo(mask.dtype).min
    assert set(mask.unique().tolist()) <= {0.0, low}
    return ["".join("1" if value == 0 else "." for value in row) for row in mask[0, 0]]


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

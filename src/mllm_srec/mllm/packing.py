"""The packed layout: prefix | segment 1 | segment 2 | ...; a segment sees the prefix and itself, never its neighbours.

Positions of every segment restart behind the prefix, so a packed row says of each segment what a prompt of its own
would say. Scoring reads it in chunks over a cached prefix, training in one pass without a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CHUNK_TOKENS = 640
"""Segment tokens read at once: more saves nothing on the linear layers and pays quadratically in the mask."""


@dataclass(frozen=True)
class PackedSegments:
    """Segments laid end to end. ids, owner, place: int64 (S,); start of segment i is `starts[i]`."""

    ids: torch.Tensor
    owner: torch.Tensor
    """Number of the segment each token belongs to."""
    place: torch.Tensor
    """0, 1, ... within the segment."""
    starts: tuple[int, ...]


def pack(segments: Sequence[Sequence[int]]) -> PackedSegments:
    """Lay token lists end to end.

    Raises:
        ValueError: there is no segment, or one is empty.
    """
    if not segments or not all(segments):
        raise ValueError("every packed segment needs at least one token")
    lengths = [len(segment) for segment in segments]
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return PackedSegments(
        ids=torch.tensor([token for segment in segments for token in segment]),
        owner=torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(lengths)),
        place=torch.cat([torch.arange(length) for length in lengths]),
        starts=tuple(starts),
    )


def segment_mask(packed: PackedSegments, prefix_length: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (1, 1, S, P + S) of the segments' tokens over a cached prefix of P tokens and themselves."""
    own = (packed.owner[:, None] == packed.owner) & (packed.place[:, None] >= packed.place)
    visible = torch.cat([torch.ones(len(packed.ids), prefix_length, dtype=torch.bool), own], 1)
    return _additive(visible, dtype)


def row_mask(packed: PackedSegments, prefix_length: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (1, 1, P + S, P + S) of a whole row, prefix included, for one pass without a cache."""
    size = prefix_length + len(packed.ids)
    visible = torch.zeros(size, size, dtype=torch.bool)
    visible[:prefix_length, :prefix_length] = torch.ones(prefix_length, prefix_length, dtype=torch.bool).tril()
    visible[prefix_length:, :prefix_length] = True
    own = (packed.owner[:, None] == packed.owner) & (packed.place[:, None] >= packed.place)
    visible[prefix_length:, prefix_length:] = own
    return _additive(visible, dtype)


def chunks(lengths: Sequence[int], limit: int = CHUNK_TOKENS) -> list[range]:
    """Consecutive runs of segments with at most `limit` tokens together (a longer segment stands alone)."""
    runs, start, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > limit:
            runs.append(range(start, i))
            start, total = i, 0
        total += length
    return [*runs, range(start, len(lengths))] if lengths else []


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return mask[None, None]

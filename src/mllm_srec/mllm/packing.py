"""Trees of segments behind prefixes as one row under a dense mask: options behind their questions, for many prefixes.

prefix | segment 1 | segment 2 | ...; a segment sees the prefix and itself, never its neighbours, and its positions
restart behind the prefix. A segment may stand behind another one, its parent, and sees that too: many endings share one
beginning. Rows of candidates, which have no tree, are read without a mask (`attention`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CHUNK_TOKENS = 640
"""Segment tokens read at once under a dense mask, in which more pay quadratically."""


@dataclass(frozen=True)
class PackedSegments:
    """Segments laid end to end. ids, owner, parent, place: int64 (S,); start of segment i is `starts[i]`."""

    ids: torch.Tensor
    owner: torch.Tensor
    """Number of the segment each token belongs to."""
    parent: torch.Tensor
    """Number of the segment that each token's segment stands behind; -1 where that is the prefix alone."""
    place: torch.Tensor
    """0, 1, ... behind the prefix; a segment with a parent counts on from the parent's end."""
    starts: tuple[int, ...]


def pack(segments: Sequence[Sequence[int]], parents: Sequence[int] = ()) -> PackedSegments:
    """Lay token lists end to end; segment i stands behind segment `parents[i]`, or behind the prefix alone if it is -1.

    Raises:
        ValueError: there is no segment, one is empty, or a parent has a parent.
    """
    if not segments or not all(segments):
        raise ValueError("every packed segment needs at least one token")
    behind = list(parents) or [-1] * len(segments)
    if len(behind) != len(segments) or any(parent >= 0 and behind[parent] >= 0 for parent in behind):
        raise ValueError("every packed segment needs a parent without a parent, or -1")
    lengths = [len(segment) for segment in segments]
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    depths = [lengths[parent] if parent >= 0 else 0 for parent in behind]
    return PackedSegments(
        ids=torch.tensor([token for segment in segments for token in segment]),
        owner=torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(lengths)),
        parent=torch.repeat_interleave(torch.tensor(behind), torch.tensor(lengths)),
        place=torch.cat([depth + torch.arange(length) for depth, length in zip(depths, lengths, strict=True)]),
        starts=tuple(starts),
    )


def padded_mask(packed: PackedSegments, prefixes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (B, 1, S, P + S) behind B cached prefixes; `prefixes` (B, P) is their attention mask."""
    own = _seen(packed).to(prefixes.device)
    rows, size = len(prefixes), len(own)
    before = prefixes.bool()[:, None].expand(-1, size, -1)
    return _additive(torch.cat([before, own.expand(rows, -1, -1)], -1), dtype)


def row_mask(packed: PackedSegments, prefix_length: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (1, 1, P + S, P + S) of a whole row, prefix included, for one pass without a cache."""
    size = prefix_length + len(packed.ids)
    visible = torch.zeros(size, size, dtype=torch.bool)
    visible[:prefix_length, :prefix_length] = torch.ones(prefix_length, prefix_length, dtype=torch.bool).tril()
    visible[prefix_length:, :prefix_length] = True
    visible[prefix_length:, prefix_length:] = _seen(packed)
    return _additive(visible[None], dtype)


def chunks(lengths: Sequence[int], limit: int = CHUNK_TOKENS) -> list[range]:
    """Consecutive runs of segments with at most `limit` tokens together (a longer segment stands alone)."""
    runs, start, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > limit:
            runs.append(range(start, i))
            start, total = i, 0
        total += length
    return [*runs, range(start, len(lengths))] if lengths else []


def _seen(packed: PackedSegments) -> torch.Tensor:
    """bool (S, S): which tokens of the segments (columns) each of them (rows) sees."""
    line = (packed.owner[:, None] == packed.owner) | (packed.parent[:, None] == packed.owner)
    return line & (packed.place[:, None] >= packed.place)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, ...) from bool (B, ...)."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

"""Packed scoring and training rows: every prefix is read once, candidates stand behind it and do not see each other.

A user with few tokens is read in one go, and several such users share a row. Otherwise the prefix is read alone and its
keys and values are kept, for the rows of its candidates and for the next request with the same prefix: so a score does
not depend on whether the prefix was kept, nor on who else is asked for.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import torch

from mllm_srec.mllm.attention import Block, PackedRow, PrefixKeys
from mllm_srec.mllm.base import Picture, Prompt, Request, told
from mllm_srec.mllm.packing import chunks
from mllm_srec.mllm.pieces import Piece, look, read_row, text_piece
from mllm_srec.mllm.rendering import EncodedRequest
from mllm_srec.store_files import fingerprint

if TYPE_CHECKING:
    from mllm_srec.mllm.local import LocalMllm

SHORT_TOKENS = 512
"""A request of no more tokens is read in one go: two passes would cost more than keeping its prefix saves."""
ROW_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a row: more makes no layer faster and takes more memory (docs/performance.md)."""
KEPT_BYTES = {"prefixes": 512 * 2**20, "looks": 256 * 2**20}
"""What is kept for later requests: keys and values of prefixes; candidates with pictures as the decoder gets them."""


class Sized(Protocol):
    """Something that knows its size in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


T = TypeVar("T", bound=Sized)


class Recent(Generic[T]):
    """The latest values by key, as many as fit into `limit` bytes; the one used longest ago goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> T | None:
        """The value, now the latest one, or None."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, value: T) -> None:
        """Keep a value, unless it alone is larger than the limit."""
        if value.nbytes > self.limit:
            return
        if key in self._kept:
            self._bytes -= self._kept.pop(key).nbytes
        self._kept[key] = value
        self._bytes += value.nbytes
        while self._bytes > self.limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._bytes = 0


@dataclass(frozen=True)
class Prefix:
    """A prefix that was read: its keys and values, its last hidden state (1, D), and the position of what follows."""

    keys: PrefixKeys
    last: torch.Tensor
    tokens: int
    following: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.keys.nbytes + self.last.nbytes


@dataclass
class Asked:
    """A request on its way: its tokens, its segments' pieces, and the scores as far as they are known."""

    encoded: EncodedRequest
    segments: list[list[Piece]]
    """Per candidate its piece, and that of its note and the question."""
    key: str
    """Of the prefix, for keeping it."""
    likelihood: bool
    asks: bool = True
    """Whether there is a question."""
    order: list[int] = field(init=False)
    """Candidates from the shortest to the longest, as they stand in rows."""
    scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is scored yet."""
        self.order = sorted(range(len(self.segments)), key=lambda number: self.length(number))
        self.scores = np.full((len(self.segments), 2), np.nan, dtype=np.float32)

    def length(self, number: int) -> int:
        """Tokens of a candidate's segment."""
        return sum(map(len, self.segments[number]))

    @property
    def lengths(self) -> list[int]:
        """Tokens of the segments, in order."""
        return [self.length(number) for number in self.order]

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the prefix."""
        return int(self.encoded.prefix["input_ids"].shape[1])

    @property
    def tokens(self) -> int:
        """Tokens that are to be read if nothing is kept."""
        return self.prefix_tokens + sum(self.lengths)


def score(mllm: "LocalMllm", requests: Sequence[Request], short: int | None = None) -> list[np.ndarray]:
    """float32 (C_i, 2) per request; see `mllm.base.Mllm.score`. `short`: see `score_asked`.

    Raises:
        ModelError: the model has layers whose attention is not plain and full; a prompt is too long or its pictures are
            not shown as they should be.
    """
    asked = [_asked(mllm, request) for request in requests]
    score_asked(mllm, asked, short)
    return [of_request.scores for of_request in asked]


def score_asked(mllm: "LocalMllm", asked: Sequence[Asked], short: int | None = None) -> None:
    """Fill in the scores of encoded requests; those of at most `short` tokens (`SHORT_TOKENS`) are read in one go.

    Raises:
        ModelError: the model has layers whose attention is not plain and full.
    """
    limit, short = row_tokens(mllm), SHORT_TOKENS if short is None else short
    sharing: list[Asked] = []
    for of_request in asked:
        if not of_request.segments:
            continue
        if of_request.tokens > short:
            _score_long(mllm, of_request, limit)
            continue
        if sharing and sum(other.tokens for other in sharing) + of_request.tokens > limit:
            _score_short(mllm, sharing)
            sharing = []
        sharing.append(of_request)
    if sharing:
        _score_short(mllm, sharing)


def read_segments(
    mllm: "LocalMllm", encoded: EncodedRequest, segments: Sequence[Sequence[Piece]]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A training row, with gradients: the prefix's last hidden state (1, D), the hidden states (S, D) of all segments
    behind it, and where each segment ends.

    One pass without a cache. A segment is a run of pieces.

    Raises:
        ModelError: as `score`.
    """
    lengths = [sum(map(len, pieces)) for pieces in segments]
    prefix = look(mllm, encoded.prefix)
    mllm.renderer.check_length(len(prefix) + max(lengths))
    row = PackedRow((Block(len(prefix), True, tuple(lengths)),), (None,))
    hidden = read_row(mllm, row, [(0, [prefix]), *((prefix.following, pieces) for pieces in segments)])
    return hidden[len(prefix) - 1 : len(prefix)], hidden[len(prefix) :], np.cumsum(lengths).tolist()


def own_words(
    mllm: "LocalMllm", tokens: Sequence[int], last: torch.Tensor, segment: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    """The words of a candidate, and the hidden states that foretell them, one each.

    Its first token is foretold by the prefix's `last` hidden state (1, D), each further one by its predecessor in
    `segment` (S, D). What a picture stands for is not foretold.
    """
    own = [at for at, token in enumerate(tokens) if token not in mllm.renderer.special_ids]
    before = torch.cat([last, segment[: len(tokens) - 1]])
    states = before if len(own) == len(tokens) else before[torch.tensor(own, device=before.device)]
    return states, [tokens[at] for at in own]


def candidate_pieces(mllm: "LocalMllm", request: Request, encoded: EncodedRequest) -> list[Piece]:
    """Each candidate of a request as a piece, without the question; pictures seen lately are not looked at again."""
    pieces = []
    for number, (candidate, ids) in enumerate(zip(request.candidates, encoded.candidates, strict=True)):
        if number not in encoded.looks:
            pieces.append(text_piece(ids))
            continue
        hashes = [part.sha256 for part in candidate if isinstance(part, Picture)]
        key = fingerprint(str(mllm.model.dtype), *hashes, *map(str, ids))
        piece = mllm.looks.get(key)
        if piece is None:
            piece = look(mllm, encoded.looks[number])
            mllm.looks.put(key, piece)
        pieces.append(piece)
    return pieces


def asked_pieces(mllm: "LocalMllm", request: Request, encoded: EncodedRequest) -> list[list[Piece]]:
    """Each candidate of a request with what stands behind it."""
    pieces = candidate_pieces(mllm, request, encoded)
    return [
        [piece, text_piece(behind)] if behind else [piece] for piece, behind in zip(pieces, encoded.behind, strict=True)
    ]


def row_tokens(mllm: "LocalMllm") -> int:
    """The token budget of a row."""
    return ROW_TOKENS.get(mllm.device.type, ROW_TOKENS["cpu"])


def _asked(mllm: "LocalMllm", request: Request) -> Asked:
    encoded = mllm.renderer.encode_request(request)
    segments = asked_pieces(mllm, request, encoded)
    return Asked(encoded, segments, _prefix_key(mllm, request.prefix), request.likelihood, bool(request.question))


def _prefix_key(mllm: "LocalMllm", prefix: Prompt) -> str:
    return fingerprint(mllm.identity, prefix.system, told(prefix.parts))


def _score_long(mllm: "LocalMllm", asked: Asked, limit: int) -> None:
    """The prefix alone, or as it was kept, then rows of its candidates."""
    prefix = mllm.prefixes.get(asked.key)
    if prefix is None:
        prefix = _read_prefix(mllm, look(mllm, asked.encoded.prefix))
        if mllm.keeps_prefixes:
            mllm.prefixes.put(asked.key, prefix)
    lengths = asked.lengths
    for run in chunks(lengths, limit):
        row = PackedRow((Block(prefix.tokens, False, tuple(lengths[i] for i in run)),), (prefix.keys,))
        members = [asked.order[i] for i in run]
        hidden = read_row(mllm, row, [(prefix.following, asked.segments[i]) for i in members])
        _fill(mllm, asked, members, hidden, prefix.last)


def _read_prefix(mllm: "LocalMllm", piece: Piece) -> Prefix:
    keys = PrefixKeys()
    hidden = read_row(mllm, PackedRow((Block(len(piece), True, ()),), (keys,)), [(0, [piece])])
    return Prefix(keys, hidden[-1:].clone(), len(piece), piece.following)


def _score_short(mllm: "LocalMllm", sharing: Sequence[Asked]) -> None:
    """One row of several users, prefixes and all."""
    blocks = [Block(asked.prefix_tokens, True, tuple(asked.lengths)) for asked in sharing]
    spans: list[tuple[int, Sequence[Piece]]] = []
    for asked in sharing:
        prefix = look(mllm, asked.encoded.prefix)
        spans += [(0, [prefix]), *((prefix.following, asked.segments[i]) for i in asked.order)]
    hidden = read_row(mllm, PackedRow(tuple(blocks), (None,) * len(blocks)), spans)
    for asked, of_block in zip(sharing, torch.split(hidden, [block.tokens for block in blocks]), strict=True):
        length = asked.prefix_tokens
        _fill(mllm, asked, asked.order, of_block[length:], of_block[length - 1 : length])


def _fill(mllm: "LocalMllm", asked: Asked, members: Sequence[int], hidden: torch.Tensor, last: torch.Tensor) -> None:
    """Readings of the candidates `members` from their segments' hidden states (S, D); `last` is the prefix's."""
    lengths = [asked.length(i) for i in members]
    if asked.asks:
        ends = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        logits = mllm.label_logits(hidden[ends])
        asked.scores[members, 0] = (logits[:, 0] - logits[:, 1]).cpu().numpy()
    if not asked.likelihood:
        return
    states: list[torch.Tensor] = []
    wanted: list[int] = []
    counts: list[int] = []
    for segment, i in zip(torch.split(hidden, lengths), members, strict=True):
        foretelling, words = own_words(mllm, asked.encoded.candidates[i], last, segment)
        states.append(foretelling)
        wanted += words
        counts.append(len(words))
    likelihoods = mllm.token_logliks(torch.cat(states), torch.tensor(wanted, device=hidden.device))
    asked.scores[members, 1] = [float(part.mean()) for part in torch.split(likelihoods, counts)]

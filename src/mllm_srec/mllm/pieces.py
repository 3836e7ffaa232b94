"""Pieces of a prompt as the language model gets them: embeddings with picture features, positions, deepstack features.

A model's own code makes them: it is run on one piece alone, pictures and all, and stopped before its language model.
So a packed row may be put together of pieces with pictures anywhere, for every kind of model.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mllm_srec.errors import ModelError
from mllm_srec.mllm.attention import PackedRow

if TYPE_CHECKING:
    from mllm_srec.mllm.local import LocalMllm


@dataclass(frozen=True)
class Piece:
    """A run of L tokens that stands alone or behind another piece."""

    ids: torch.Tensor
    """int64 (L,)"""
    positions: torch.Tensor
    """int64 (A, L) from 0 on: one axis, or three under M-RoPE with pictures."""
    embeds: torch.Tensor | None = None
    """(L, D) with the pictures' features in place; None for text alone, which the row looks up in one go."""
    visual: torch.Tensor | None = None
    """bool (L,): where picture features stand; only of models with deepstack features."""
    deepstack: tuple[torch.Tensor, ...] = ()
    """Per deepstack layer (V, D): what is added at the visual places."""

    @property
    def following(self) -> int:
        """Position of what comes next, counted from this piece's first: less than L where a picture stands."""
        return int(self.positions.max()) + 1

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        parts = (self.ids, self.positions, self.embeds, self.visual, *self.deepstack)
        return sum(part.nbytes for part in parts if part is not None)

    def __len__(self) -> int:
        return len(self.ids)


def text_piece(ids: Sequence[int]) -> Piece:
    """A piece of text alone."""
    return Piece(torch.tensor(ids), torch.arange(len(ids))[None])


def look(mllm: "LocalMllm", inputs: dict[str, torch.Tensor]) -> Piece:
    """The piece of a processor's inputs (batch of 1, no padding).

    Raises:
        ModelError: its pictures' tokens and features are not as many.
    """
    inputs = mllm.on_device({name: value for name, value in inputs.items() if name != "attention_mask"})
    ids = inputs["input_ids"][0]
    if not inputs.keys() - {"input_ids", "mm_token_type_ids"}:
        return text_piece(ids.tolist())
    positions = mllm.positions(inputs)
    given = _decoder_inputs(mllm, inputs)
    visual, deepstack = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
    return Piece(
        ids.cpu(),
        positions.reshape(-1, len(ids)).cpu(),
        given["inputs_embeds"][0],
        None if visual is None else visual[0],
        tuple(deepstack or ()),
    )


class _BeforeDecoderError(Exception):
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given


def _decoder_inputs(mllm: "LocalMllm", inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the model hands to its language model."""
    here = threading.get_ident()

    def stop(_: Any, __: Any, given: dict[str, Any]) -> None:
        if threading.get_ident() == here:
            raise _BeforeDecoderError(given)

    handle = mllm.model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        # Kept for scoring and for training alike, which cannot save what was made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            mllm.read(**{name: value.clone() for name, value in inputs.items()}, use_cache=False)
    except _BeforeDecoderError as found:
        return found.given
    finally:
        handle.remove()
    raise ModelError("the model does not read through the language model that it names: choose another model")


def read_row(mllm: "LocalMllm", row: PackedRow, spans: Sequence[tuple[int, Sequence[Piece]]]) -> torch.Tensor:
    """Hidden states (T, D) of a packed row.

    Args:
        row: the layout.
        spans: prefixes and segments as they stand in the row: the position of the first token, and the pieces.

    Raises:
        ModelError: the model's layers do not take the layout, or have other than plain full attention.
    """
    mllm.check_plain()
    pieces = _placed(spans)
    axes = max(len(piece.positions) for _, piece in pieces)
    positions = torch.cat([(start + piece.positions).expand(axes, -1) for start, piece in pieces], 1)
    ids = torch.cat([piece.ids for _, piece in pieces]).to(mllm.device)
    embeds = mllm.model.get_input_embeddings()(ids)
    extra: dict[str, Any] = {}
    looking = [piece for _, piece in pieces if piece.embeds is not None]
    if looking:
        at = torch.cat([torch.full((len(piece),), piece.embeds is not None) for _, piece in pieces])
        features = torch.cat([piece.embeds for piece in looking if piece.embeds is not None])
        embeds = embeds.index_copy(0, at.nonzero()[:, 0].to(mllm.device), features.to(embeds.dtype))
        if any(piece.deepstack for piece in looking):
            extra["visual_pos_masks"] = torch.cat(
                [torch.zeros(len(p), dtype=torch.bool) if p.visual is None else p.visual.cpu() for _, p in pieces]
            )[None].to(mllm.device)
            extra["deepstack_visual_embeds"] = [
                torch.cat(layer) for layer in zip(*(piece.deepstack for piece in looking), strict=True)
            ]
    decoder = mllm.model.get_decoder()
    hidden = decoder(
        inputs_embeds=embeds[None],
        # Four dimensions: transformers makes no mask of its own; the packed attention does not look at it.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=embeds.dtype, device=mllm.device),
        position_ids=(positions[:, None] if axes > 1 else positions).to(mllm.device),
        use_cache=False,
        packed_row=row,
        **extra,
    ).last_hidden_state[0]
    if row.layers_read < len(decoder.layers):
        raise ModelError(
            "the model's layers do not take a packed row: install transformers 5.24, or choose another one"
        )
    return torch.as_tensor(hidden)


def _placed(spans: Sequence[tuple[int, Sequence[Piece]]]) -> list[tuple[int, Piece]]:
    placed = []
    for start, pieces in spans:
        for piece in pieces:
            placed.append((start, piece))
            start += piece.following
    return placed

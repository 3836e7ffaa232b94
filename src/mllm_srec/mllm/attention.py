"""Attention over packed rows: `prefix | segment 1 | segment 2 | ...`, one block per user, several blocks in a row.

A segment's token sees its block's prefix and its own segment up to itself. On a CPU no mask is built: attention to the
prefix (all segments at once) and within each segment (a causal batch) are two calls of the flash kernel, merged by
their log-sum-exps: softmax over A and B together is sigmoid(lse_B - lse_A) of B's output and the rest of A's. That is
exact, and nothing is multiplied that a mask would throw away. On a CUDA device the same rule is a dense mask, and for
long rows a block mask of FlexAttention; elsewhere a dense mask.

`NAME` is registered with transformers as a way of attending. Calls without a packed row are those of "sdpa".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mllm_srec.errors import ModelError

NAME = "mllm_srec_packed"
DENSE_TOKENS = 4096
"""Keys of a row up to which a dense mask is used on a CUDA device: FlexAttention took 1.5 to 1.8 times as long for
such rows, besides its compilation (docs/log.md)."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """One user's part of a row: a prefix of `prefix` tokens and segments of these lengths behind it.

    `in_row`: the prefix's tokens stand in the row before the segments; otherwise its keys and values were kept.
    """

    prefix: int
    in_row: bool
    segments: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row that belong to this block."""
        return self.prefix * self.in_row + sum(self.segments)


@dataclass
class PrefixKeys:
    """Keys and values of one prefix, rotated to their positions: by layer two tensors (1, H_kv, P, D_head)."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for pair in self.layers.values() for part in pair)


@dataclass
class PackedRow:
    """A row's layout, handed through the decoder to every layer's attention.

    keys: per block the kept keys of its prefix: read where the prefix is not in the row, filled where it is; None: a
    prefix in the row is not kept.
    """

    blocks: tuple[Block, ...]
    keys: tuple[PrefixKeys | None, ...]
    layers_read: int = 0
    """Counted by the attention: a model whose layers do not pass the row on would attend to everything."""
    _block_mask: Any = field(default=None, repr=False)
    _masks: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse a block whose prefix is nowhere.

        Raises:
            ValueError: the blocks have not one entry of `keys` each, or a block without its prefix has no keys.
        """
        if len(self.keys) != len(self.blocks):
            raise ValueError("a packed row needs one entry of keys per block")
        if any(not block.in_row and keys is None for block, keys in zip(self.blocks, self.keys, strict=True)):
            raise ValueError("a block whose prefix is not in the row needs the prefix's keys")

    @cached_property
    def order(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Block and segment of every key, int64 (K,), and how many of them are kept ones, which come first.

        Segment -1 is the prefix. The queries are the keys behind the kept ones.
        """
        blocks: list[torch.Tensor] = []
        segments: list[torch.Tensor] = []

        def add(block: int, segment: int, count: int) -> None:
            blocks.append(torch.full((count,), block))
            segments.append(torch.full((count,), segment))

        for number, block in enumerate(self.blocks):
            if not block.in_row:
                add(number, -1, block.prefix)
        kept = sum(map(len, blocks))
        for number, block in enumerate(self.blocks):
            if block.in_row:
                add(number, -1, block.prefix)
            for segment, length in enumerate(block.segments):
                add(number, segment, length)
        return torch.cat(blocks), torch.cat(segments), kept

    def visible(self, device: torch.device) -> torch.Tensor:
        """bool (T, K): which keys (the kept prefixes' and then the row's own) each of the row's tokens sees; made once
        per row."""
        if device not in self._masks:
            block, segment, kept = self.order
            block, segment = block.to(device), segment.to(device)
            at = torch.arange(len(block), device=device)
            own = (segment == -1) | (segment == segment[kept:, None])
            self._masks[device] = (block == block[kept:, None]) & own & (at <= at[kept:, None])
        return self._masks[device]

    def block_mask(self, device: torch.device) -> Any:
        """`visible` as FlexAttention's block mask; made once per row."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            block, segment, kept = self.order
            block, segment = block.to(device), segment.to(device)

            def sees(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                at = query + kept
                own = (segment[key] == -1) | (segment[key] == segment[at])
                seen: torch.Tensor = (block[key] == block[at]) & own & (key <= at)
                return seen

            size = len(block)
            self._block_mask = create_block_mask(sees, None, None, size - kept, size, device=str(device))
        return self._block_mask


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_row: PackedRow | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' layers call. query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D), no weights.

    Raises:
        ModelError: the layers ask for something that packed rows do not do.
    """
    if packed_row is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return out, None
    unknown = [name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if others.get(name) is not None]
    if unknown:
        raise ModelError(f"packed rows need plain full attention, not {' and '.join(unknown)}: choose another model")
    packed_row.layers_read += 1
    form = merged if query.device.type == "cpu" else masked
    if query.device.type == "cuda" and len(packed_row.order[0]) > DENSE_TOKENS:
        form = flexed
    return form(query, key, value, packed_row, module.layer_idx, scaling).transpose(1, 2), None


def merged(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow, layer: int, scaling: float | None
) -> torch.Tensor:
    """(1, H, T, D) block by block, prefix part and own part merged; for CPUs."""
    parts, at = [], 0
    for block, keys in zip(row.blocks, row.keys, strict=True):
        q, k, v = (part[:, :, at : at + block.tokens] for part in (query, key, value))
        at += block.tokens
        if not block.in_row:
            assert keys is not None
            before = keys.layers[layer]
        else:
            before = (k[:, :, : block.prefix], v[:, :, : block.prefix])
            if keys is not None:
                keys.layers[layer] = (_copy(before[0]), _copy(before[1]))
            if len(block.segments) <= 1:  # a prompt of its own
                parts.append(_causal(q, k, v, scaling))
                continue
            parts.append(_causal(q[:, :, : block.prefix], *before, scaling))
            q, k, v = (part[:, :, block.prefix :] for part in (q, k, v))
        parts.append(behind(q, k, v, *before, block.segments, scaling))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def flexed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow, layer: int, scaling: float | None
) -> torch.Tensor:
    """(1, H, T, D) by FlexAttention, which skips what the row's block mask leaves out; for long rows on CUDA."""
    key, value = _with_kept(key, value, row, layer)
    attend = _flex(query.device.type)
    gqa = query.shape[1] != key.shape[1]
    mask = row.block_mask(query.device)
    return torch.as_tensor(attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=gqa))


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow, layer: int, scaling: float | None
) -> torch.Tensor:
    """(1, H, T, D) under a dense mask; for all devices but CPUs."""
    key, value = _with_kept(key, value, row, layer)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=row.visible(query.device), scale=scaling
    )


def _with_kept(key: torch.Tensor, value: torch.Tensor, row: PackedRow, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row's keys and values behind the kept prefixes', after keeping what is to be kept."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    at = 0
    for block, keys in zip(row.blocks, row.keys, strict=True):
        if keys is not None and block.in_row:
            keys.layers[layer] = tuple(_copy(part[:, :, at : at + block.prefix]) for part in (key, value))  # type: ignore[assignment]
        elif keys is not None:
            before.append(keys.layers[layer])
        at += block.tokens
    return torch.cat([*(k for k, _ in before), key], 2), torch.cat([*(v for _, v in before), value], 2)


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _copy(part: torch.Tensor) -> torch.Tensor:
    """A copy that does not keep the rest of the row in memory."""
    return part.detach().clone(memory_format=torch.contiguous_format)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def behind(*inputs: Any) -> torch.Tensor:
    """`_PrefixAndOwn`'s forward pass, with gradients where they are wanted."""
    return torch.as_tensor(_PrefixAndOwn.apply(*inputs))  # type: ignore[no-untyped-call]


class _PrefixAndOwn(torch.autograd.Function):
    """Segments (1, H, T, D) behind a prefix (1, H_kv, P, D): two flash calls, merged.

    The backward pass of flash attention needs a query's output and log-sum-exp over all of its keys, whichever part of
    the keys it is called with: given the merged ones, the two calls give the two parts of the exact gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        before_key: torch.Tensor,
        before_value: torch.Tensor,
        lengths: Sequence[int],
        scaling: float | None,
    ) -> torch.Tensor:
        fold, own = _Fold(query, key), _Own(lengths)
        prefix, prefix_lse = _flash(fold.query(query), before_key, before_value, 0.0, False, scale=scaling)
        prefix, prefix_lse = fold.back(prefix), fold.back(prefix_lse)
        spread = [own.batch(part) for part in (query, fold.repeated(key), fold.repeated(value))]
        within, within_lse = _flash(*spread, 0.0, True, scale=scaling)
        within, within_lse = own.back(within), own.back(within_lse)
        share = torch.sigmoid(within_lse - prefix_lse)[..., None]
        # The log-sum-exps are float32 at least, and so is the sum of the two parts.
        out = torch.lerp(prefix.to(share.dtype), within.to(share.dtype), share).to(query.dtype)
        ctx.save_for_backward(query, key, value, before_key, before_value, out, torch.logaddexp(prefix_lse, within_lse))
        ctx.fold, ctx.own, ctx.scaling = fold, own, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, before_key, before_value, out, lse = ctx.saved_tensors
        fold, own = ctx.fold, ctx.own
        to_query, to_before_key, to_before_value = _flash_backward(
            *(fold.query(gradient), fold.query(query), before_key, before_value, fold.query(out), fold.query(lse)),
            *(0.0, False),
            scale=ctx.scaling,
        )
        repeated = [own.batch(part) for part in (query, fold.repeated(key), fold.repeated(value), out, lse)]
        of_own, to_key, to_value = _flash_backward(
            own.batch(gradient, padding=0.0), *repeated, 0.0, True, scale=ctx.scaling
        )
        to_query = fold.back(to_query) + own.back(of_own)
        to_key, to_value = fold.summed(own.back(to_key)), fold.summed(own.back(to_value))
        return to_query, to_key, to_value, to_before_key, to_before_value, None, None


class _Fold:
    """Grouped queries: without a mask, the heads that share keys are more queries of one head."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        self.heads, self.shared = query.shape[1], key.shape[1]
        self.groups = self.heads // self.shared

    def query(self, part: torch.Tensor) -> torch.Tensor:
        """(1, H, T, ...) -> (1, H_kv, G T, ...)."""
        return part.reshape(1, self.shared, self.groups * part.shape[2], *part.shape[3:])

    def back(self, part: torch.Tensor) -> torch.Tensor:
        """(1, H_kv, G T, ...) -> (1, H, T, ...)."""
        return part.reshape(1, self.heads, part.shape[2] // self.groups, *part.shape[3:])

    def repeated(self, part: torch.Tensor) -> torch.Tensor:
        """(1, H_kv, T, D) -> (1, H, T, D)."""
        return part.repeat_interleave(self.groups, 1)

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        """(1, H, T, D) gradients of `repeated` -> (1, H_kv, T, D)."""
        return part.reshape(1, self.shared, self.groups, *part.shape[2:]).sum(2)


class _Own:
    """Segments end to end as a batch of S segments of the longest one's length L, and back.

    A shorter segment is filled up with its last token: behind all its own ones, so no own token sees it.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.count, self.longest = len(lengths), max(lengths)
        self.even = min(lengths) == self.longest
        if not self.even:
            sizes = torch.tensor(lengths)
            place, starts = torch.arange(self.longest), sizes.cumsum(0) - sizes
            self.taken = (starts[:, None] + torch.minimum(place, sizes[:, None] - 1)).flatten()
            self.filled = (place >= sizes[:, None]).flatten()
            self.kept = (~self.filled).nonzero()[:, 0]

    def batch(self, part: torch.Tensor, padding: float | None = None) -> torch.Tensor:
        """(1, H, T, ...) -> (S, H, L, ...); what fills up is `padding`, or the last token's values."""
        if not self.even:
            part = part[:, :, self.taken]
            if padding is not None:
                part[:, :, self.filled] = padding
        return part.reshape(part.shape[1], self.count, self.longest, *part.shape[3:]).transpose(0, 1)

    def back(self, part: torch.Tensor) -> torch.Tensor:
        """(S, H, L, ...) -> (1, H, T, ...)."""
        part = part.transpose(0, 1).flatten(1, 2)[None]
        return part if self.even else part[:, :, self.kept]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Attention over packed rows: the layout by hand, and every form against plain softmax under the rule."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_srec.errors import ModelError
from mllm_srec.mllm.attention import Block, PackedRow, PrefixKeys, attention, flexed, masked, merged

HEADS, SHARED, WIDTH = 6, 2, 8
Form = Callable[..., torch.Tensor]
FORMS: dict[str, Form] = {"merged": merged, "masked": masked, "flexed": flexed}


def kept(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> PrefixKeys:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, SHARED, tokens, WIDTH)
    return PrefixKeys({0: tuple(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))})  # type: ignore[dict-item]


def in_float32(row: PackedRow) -> PackedRow:
    """FlexAttention knows no float64."""
    return row_of(*row.blocks, dtype=torch.float32)


def row_of(*blocks: Block, dtype: torch.dtype = torch.float64) -> PackedRow:
    keys = [None if block.in_row else kept(block.prefix, number, dtype) for number, block in enumerate(blocks)]
    return PackedRow(blocks, tuple(keys))


def tensors(row: PackedRow, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value of a row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(block.tokens for block in row.blocks)
    shapes = [(1, heads, tokens, WIDTH) for heads in (HEADS, SHARED, SHARED)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_the_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow) -> torch.Tensor:
    """(1, H, T, D): one softmax per token over the keys it should see, gathered from the blocks' lengths alone."""
    out = torch.zeros_like(query)
    at = 0
    for block, keys in zip(row.blocks, row.keys, strict=True):
        if block.in_row:
            before = key[0, :, at : at + block.prefix], value[0, :, at : at + block.prefix]
        else:
            assert keys is not None
            before = keys.layers[0][0][0], keys.layers[0][1][0]
        parts = [(0, block.prefix)] if block.in_row else []
        start = block.prefix * block.in_row
        for length in block.segments:
            parts.append((start, length))
            start += length
        for number, (first, length) in enumerate(parts):
            for place in range(length):
                own = slice(at + first, at + first + place + 1)
                k, v = key[0, :, own], value[0, :, own]
                if not (block.in_row and number == 0):
                    k, v = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
                for head in range(HEADS):
                    group = head // (HEADS // SHARED)
                    weights = (k[group] @ query[0, head, at + first + place] / WIDTH**0.5).softmax(0)
                    out[0, head, at + first + place] = weights @ v[group]
        at += block.tokens
    return out


ROWS = {
    "kept prefix, even": row_of(Block(5, False, (3, 3, 3))),
    "kept prefix, uneven": row_of(Block(5, False, (1, 4, 2))),
    "prefix in the row": row_of(Block(4, True, (2, 2))),
    "one prompt": row_of(Block(4, True, (3,))),
    "a prefix alone": row_of(Block(4, True, ())),
    "users": row_of(Block(3, True, (1, 4)), Block(2, False, (2, 3)), Block(1, True, ()), Block(1, False, (1,))),
}


# The layout


def test_a_segment_sees_its_prefix_and_itself() -> None:
    row = row_of(Block(2, False, (2, 1)), Block(2, True, (1, 2)))
    seen = ["".join("1" if value else "." for value in line) for line in row.visible(torch.device("cpu")).tolist()]
    assert seen == [
        #   kept | a a b | prefix | c d d
        "11" "1.." ".." "...",
        "11" "11." ".." "...",
        "11" "..1" ".." "...",
        ".." "..." "1." "...",
        ".." "..." "11" "...",
        ".." "..." "11" "1..",
        ".." "..." "11" ".1.",
        ".." "..." "11" ".11",
    ]  # fmt: skip


def test_what_is_kept_comes_first_whatever_the_blocks_order() -> None:
    block, segment, count = row_of(Block(1, True, (1,)), Block(2, False, (1,))).order
    assert (block.tolist(), segment.tolist(), count) == ([1, 1, 0, 0, 1], [-1, -1, -1, 0, 0], 2)


@pytest.mark.parametrize("keys", [(), (None, None)])
def test_a_row_has_keys_for_every_block(keys: tuple[None, ...]) -> None:
    with pytest.raises(ValueError, match="one entry of keys per block"):
        PackedRow((Block(1, True, (1,)),), keys)


def test_a_prefix_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the prefix's keys"):
        PackedRow((Block(1, True, (1,)), Block(1, False, (1,))), (None, None))


# Every form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ROWS)
def test_every_form_is_the_rule(layout: str, form: str) -> None:
    row = in_float32(ROWS[layout])
    with torch.no_grad():
        q, k, v = tensors(row, dtype=torch.float32)
        torch.testing.assert_close(FORMS[form](q, k, v, row, 0, None), by_the_rule(q, k, v, row))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_layout_is_the_rule(data: st.DataObject) -> None:
    size = st.integers(1, 6)
    block = st.builds(Block, size, st.booleans(), st.lists(size, min_size=1, max_size=5).map(tuple))
    row = row_of(*data.draw(st.lists(block, min_size=1, max_size=3)))
    with torch.no_grad():
        q, k, v = tensors(row)
        expected = by_the_rule(q, k, v, row)
        for form in (merged, masked):
            torch.testing.assert_close(form(q, k, v, row, 0, None), expected)


@pytest.mark.parametrize("layout", ROWS)
def test_gradients_are_those_of_the_rule(layout: str) -> None:
    row = ROWS[layout]
    inputs = [part.requires_grad_() for part in tensors(row)]
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.autograd.grad((by_the_rule(*inputs, row) * weights).sum(), inputs)
    found = torch.autograd.grad((merged(*inputs, row, 0, None) * weights).sum(), inputs)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_the_scale_is_the_models() -> None:
    row = in_float32(ROWS["users"])
    with torch.no_grad():
        q, k, v = tensors(row, dtype=torch.float32)
        for form in FORMS.values():
            torch.testing.assert_close(form(q, k, v, row, 0, 0.2), by_the_rule(q * 0.2 * WIDTH**0.5, k, v, row))


def test_merging_keeps_to_the_softmax_where_one_part_is_far_likelier() -> None:
    row = ROWS["kept prefix, uneven"]
    with torch.no_grad():
        for factor in (60.0, -60.0):
            q, k, v = tensors(row)
            found = merged(q * factor, k, v, row, 0, None)
            assert torch.isfinite(found).all()
            torch.testing.assert_close(found, by_the_rule(q * factor, k, v, row))


def test_bfloat16_is_near() -> None:
    row = row_of(Block(9, False, (4, 2, 7)), dtype=torch.bfloat16)
    with torch.no_grad():
        q, k, v = tensors(row, dtype=torch.bfloat16)
        found = merged(q, k, v, row, 0, None)
        assert found.dtype == torch.bfloat16
        exact = [{0: tuple(part.double() for part in row.keys[0].layers[0])}] if row.keys[0] else []
        wide = PackedRow(row.blocks, (PrefixKeys(*exact),))  # type: ignore[arg-type]
        expected = by_the_rule(q.double(), k.double(), v.double(), wide)
        assert (found.double() - expected).abs().max() < 0.02


# What is kept


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_is_kept_as_it_was_read(form: str) -> None:
    keys = PrefixKeys()
    row = PackedRow((Block(2, True, (1,)), Block(3, True, (2, 2))), (None, keys))
    with torch.no_grad():
        q, k, v = tensors(row, dtype=torch.float32)
        FORMS[form](q, k, v, row, 0, None)
    first, second = keys.layers[0]
    assert torch.equal(first, k[:, :, 3:6]) and torch.equal(second, v[:, :, 3:6])
    assert keys.nbytes == 2 * SHARED * 3 * WIDTH * 4
    assert first.untyped_storage().nbytes() == keys.nbytes // 2  # not the whole row's


def test_reading_behind_a_kept_prefix_is_reading_it_again() -> None:
    keys = PrefixKeys()
    whole = PackedRow((Block(4, True, (3, 2)),), (keys,))
    with torch.no_grad():
        q, k, v = tensors(whole)
        expected = merged(q, k, v, whole, 0, None)[:, :, 4:]
        behind = PackedRow((Block(4, False, (3, 2)),), (keys,))
        found = merged(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], behind, 0, None)
    torch.testing.assert_close(found, expected)


# As transformers call it


LAYER = SimpleNamespace(layer_idx=0, num_key_value_groups=HEADS // SHARED, is_causal=True)


def test_a_call_counts_its_layer_and_turns_heads_last() -> None:
    row = row_of(Block(5, False, (1, 4, 2)))
    with torch.no_grad():
        q, k, v = tensors(row)
        out, weights = attention(LAYER, q, k, v, None, packed_row=row)
    assert weights is None
    assert row.layers_read == 1
    torch.testing.assert_close(out, by_the_rule(q, k, v, row).transpose(1, 2))


def test_without_a_row_it_is_plain_causal_attention() -> None:
    row = row_of(Block(6, True, ()))
    with torch.no_grad():
        q, k, v = tensors(row)
        out, _ = attention(LAYER, q, k, v, None)
    torch.testing.assert_close(out, by_the_rule(q, k, v, row).transpose(1, 2))


@pytest.mark.parametrize("other", ["softcap", "s_aux", "sliding_window", "position_bias"])
def test_other_attention_is_refused(other: str) -> None:
    row = row_of(Block(5, False, (1, 4, 2)))
    more: dict[str, Any] = {other: 4}
    with torch.no_grad(), pytest.raises(ModelError, match=f"plain full attention, not {other}: choose another model"):
        attention(LAYER, *tensors(row), None, packed_row=row, **more)

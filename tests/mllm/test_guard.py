"""The check at a run's start: it passes for every kind of model, and each deliberate fault is caught."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separate_prompts import close, separate

from mllm_srec.errors import ModelError
from mllm_srec.mllm import attention, guard, pieces, scoring
from mllm_srec.mllm.attention import PrefixKeys
from mllm_srec.mllm.base import Candidate, Prompt, Request
from mllm_srec.mllm.guard import check_once, check_packing, separate_scores
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.pieces import Piece
from tiny_models import KINDS, drawing, tiny_mllm, tiny_model

RED, BLUE = drawing("red"), drawing("blue", (96, 40))
CANDIDATES: tuple[Candidate, ...] = ("hat", ("a red shoe ", RED), "a blue shirt with stripes", (BLUE, "wool"))


def request(liked: str = "warm colours", candidates: tuple[Candidate, ...] = CANDIDATES) -> Request:
    prefix = Prompt((RED, f"The user likes {liked}.\nItem: "), system="You predict which item a user chooses next.")
    return Request(prefix, candidates, "\nAnswer Yes or No.")


ASKED = [request(), request("blue"), request("wool")]
TEXT = [Request(Prompt((f"The user likes {liked}.\nItem: ",)), ("a hat", "wool", "a shoe"), "?") for liked in "ab"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes(kind: str) -> None:
    mllm = tiny_mllm(kind)
    assert 0 < check_packing(mllm, ASKED) < 1e-4
    assert 0 < check_packing(mllm, TEXT) < 1e-4
    assert len(mllm.prefixes) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_separate_prompts_are_those_of_the_tests(kind: str) -> None:
    mllm = tiny_mllm(kind)
    for asked in (*ASKED[:1], *TEXT[:1]):
        close(separate_scores(mllm, asked), separate(mllm, asked))


def test_two_users_and_three_candidates_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    read: list[Request] = []
    alone = guard.separate_scores
    monkeypatch.setattr(guard, "separate_scores", lambda m, asked: read.append(asked) or alone(m, asked))
    many = request(candidates=("hat", "hat", "a blue shirt", "wool", "a red shoe with stripes"))
    check_packing(mllm, [request(candidates=("hat",)), request(candidates=("hat", "hat")), many, *ASKED])
    assert [of.prefix for of in read] == [many.prefix, ASKED[0].prefix]
    # The shortest, a middle one, the longest; none twice.
    assert read[0].candidates == ("hat", "a blue shirt", "a red shoe with stripes")
    assert check_packing(mllm, [request(candidates=("hat",))]) == 0.0  # nothing to compare


def test_notes_are_compared_with_their_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    notes = ("", "\nnear 1 of the last 2.", "\nmeets red.", "\nagainst it wool.")
    noted = [replace(asked, notes=notes) for asked in ASKED]
    assert 0 < check_packing(mllm, noted) < 1e-4
    close(separate_scores(mllm, noted[0]), separate(mllm, noted[0]))
    few = guard._few(replace(request(candidates=("hat", "hat", "wool")), notes=("", "\nmeets red.", "\nnear.")))
    # The same item with another note is another candidate.
    pairs = {("hat", ""), ("hat", "\nmeets red."), ("wool", "\nnear.")}
    assert set(zip(few.candidates, few.notes, strict=True)) == pairs
    few = guard._few(replace(noted[0], candidates=CANDIDATES[::-1], notes=notes[::-1]))
    assert len(few.candidates) == 3
    assert set(zip(few.candidates, few.notes, strict=True)) < set(zip(CANDIDATES, notes, strict=True))

    pieces_of = scoring.asked_pieces

    def mixed_up(*given: Any) -> list[list[Piece]]:
        segments = pieces_of(*given)
        return [[own, behind] for (own, _), (_, behind) in zip(segments, segments[::-1], strict=True)]

    monkeypatch.setattr(scoring, "asked_pieces", mixed_up)
    with pytest.raises(ModelError, match="packed scores differ"):
        check_packing(mllm, noted)


def test_the_same_weights_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    compared: list[str] = []
    monkeypatch.setattr(guard, "check_packing", lambda m, asked: compared.append(m.identity))
    check_once(mllm, [request(candidates=("hat", "hat"))])  # nothing to compare: it does not count
    for _ in range(2):
        check_once(mllm, ASKED)
    mllm.attach_adapter(rank=2, top_layers=2, seed=1)
    check_once(mllm, ASKED)
    assert compared == [*["tiny-llava-0:float32"] * 2, "tiny-llava-0:float32:in training"]


def test_what_was_refused_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    with monkeypatch.context() as patch:
        lose_the_prefix(patch)
        with pytest.raises(ModelError, match="packed scores differ"):
            check_once(mllm, ASKED)
        with pytest.raises(ModelError, match="packed scores differ"):
            check_once(mllm, ASKED)
    check_once(mllm, ASKED)


@pytest.mark.parametrize("readings", [{"likelihood": False}, {"question": ""}])
def test_one_reading_is_enough(readings: dict[str, Any]) -> None:
    assert 0 < check_packing(tiny_mllm("llava"), [replace(asked, **readings) for asked in ASKED]) < 1e-4


# Deliberate faults


def see_the_neighbours(patch: pytest.MonkeyPatch) -> None:
    """A wrong mask: all of a block's segments count as one."""
    init = attention._Own.__init__
    patch.setattr(attention._Own, "__init__", lambda own, lengths: init(own, (sum(lengths),)))


def see_not_all_of_the_prefix(patch: pytest.MonkeyPatch) -> None:
    """A wrong mask: the prefix's last key is not seen."""
    merge = attention.behind
    patch.setattr(
        attention, "behind", lambda q, k, v, bk, bv, *more: merge(q, k, v, bk[:, :, :-1], bv[:, :, :-1], *more)
    )


def count_on(patch: pytest.MonkeyPatch) -> None:
    """Wrong positions: each segment goes on where its neighbour ended."""

    def placed(spans: Sequence[tuple[int, Sequence[Piece]]]) -> list[tuple[int, Piece]]:
        found, at = [], 0
        for start, of_span in spans:
            at = start if start == 0 else max(at, start)
            for piece in of_span:
                found.append((at, piece))
                at += piece.following
        return found

    patch.setattr(pieces, "_placed", placed)


def count_tokens(patch: pytest.MonkeyPatch) -> None:
    """Wrong positions: as many as tokens, not as M-RoPE has it."""
    patch.setattr(Piece, "following", property(len))


def lose_the_prefix(patch: pytest.MonkeyPatch) -> None:
    """What was kept of the prefix is empty."""
    read = scoring._read_prefix

    def lost(mllm: LocalMllm, piece: Piece) -> scoring.Prefix:
        found = read(mllm, piece)
        for layer, (key, value) in found.keys.layers.items():
            found.keys.layers[layer] = (torch.zeros_like(key), torch.zeros_like(value))
        return found

    patch.setattr(scoring, "_read_prefix", lost)


def take_another_users_prefix(patch: pytest.MonkeyPatch) -> None:
    """Every prefix is kept under the same key."""
    patch.setattr(scoring, "_prefix_key", lambda mllm, prefix: "one for all")


def drop_an_image_token(patch: pytest.MonkeyPatch) -> None:
    """The last token with a picture's features is left out of the row."""
    look = pieces.look

    def without(mllm: LocalMllm, inputs: dict[str, torch.Tensor]) -> Piece:
        piece = look(mllm, inputs)
        if piece.embeds is None:
            return piece
        image = mllm.renderer.tokenizer.convert_tokens_to_ids(mllm.renderer.processor.image_token)
        last = int((piece.ids == image).nonzero()[-1])
        kept = [at for at in range(len(piece)) if at != last]
        deepstack = tuple(layer[:-1] for layer in piece.deepstack)
        visual = None if piece.visual is None else piece.visual[kept]
        return Piece(piece.ids[kept], piece.positions[:, kept], piece.embeds[kept], visual, deepstack)

    patch.setattr(scoring, "look", without)
    # The layout is told the shorter length, so that nothing but the scores can tell.
    tokens = scoring.Asked.prefix_tokens.fget
    patch.setattr(scoring.Asked, "prefix_tokens", property(lambda asked: tokens(asked) - 1))


def drop_deepstack(patch: pytest.MonkeyPatch) -> None:
    """Qwen3-VL's features of deeper layers are left out."""
    look = pieces.look
    patch.setattr(scoring, "look", lambda *given: replace(look(*given), visual=None, deepstack=()))


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (see_the_neighbours, "llava"),
    (see_not_all_of_the_prefix, "smolvlm"),
    (count_on, "llava"),
    (count_tokens, "qwen2_5_vl"),
    (lose_the_prefix, "llava"),
    (take_another_users_prefix, "idefics3"),
    (drop_an_image_token, "llava"),
    (drop_an_image_token, "qwen3_vl"),
    (drop_deepstack, "qwen3_vl"),
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=[f"{fault.__name__}-{kind}" for fault, kind in FAULTS])
def test_a_fault_stops_the_run(
    fault: Callable[[pytest.MonkeyPatch], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm = tiny_mllm(kind)
    fault(monkeypatch)
    with pytest.raises(ModelError, match=r"packed scores differ from those of separate prompts by .* in float32"):
        check_packing(mllm, ASKED)


def test_a_fault_that_only_shows_with_a_kept_prefix_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llava")
    get = scoring.Recent.get

    def forget(recent: Any, key: str) -> Any:
        prefix = get(recent, key)
        if isinstance(prefix, scoring.Prefix):
            return replace(prefix, keys=PrefixKeys({n: (k.flip(2), v) for n, (k, v) in prefix.keys.layers.items()}))
        return prefix

    monkeypatch.setattr(scoring.Recent, "get", forget)
    with pytest.raises(ModelError, match="packed scores differ"):
        check_packing(mllm, ASKED)


def test_scores_that_are_all_equal_stop_the_run() -> None:
    mllm = tiny_mllm("llava")
    torch.nn.init.zeros_(mllm.model.lm_head.weight)
    with pytest.raises(ModelError, match="gives every candidate the same score: the prompt does not reach it"):
        check_packing(mllm, TEXT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_stop_the_run(value: float) -> None:
    mllm = tiny_mllm("llava")
    with torch.no_grad():
        mllm.model.get_decoder().norm.weight[0] = value
    with pytest.raises(ModelError, match="scores that are not finite"):
        check_packing(mllm, TEXT)


# Types


def test_bfloat16_weights_are_compared_in_float32_and_given_back_untouched(tmp_path: Path) -> None:
    model, processor = tiny_model("qwen2_5_vl")
    mllm = LocalMllm(model.to(torch.bfloat16), processor, "x")
    held = [*mllm.model.parameters(), *mllm.model.buffers()]
    before = [(id(tensor), tensor.data_ptr(), tensor.dtype, tensor.clone()) for tensor in held]
    scores = mllm.score([ASKED[0]])[0]
    assert check_packing(mllm, ASKED) < 1e-3  # in bfloat16 it would be a hundred times that
    after = [*mllm.model.parameters(), *mllm.model.buffers()]
    for (name, place, dtype, value), tensor in zip(before, after, strict=True):
        assert (name, place, dtype) == (id(tensor), tensor.data_ptr(), tensor.dtype)
        assert torch.equal(value, tensor)
    np.testing.assert_array_equal(mllm.score([ASKED[0]])[0], scores)


def test_weights_come_back_after_an_error() -> None:
    model, processor = tiny_model("llava")
    mllm = LocalMllm(model.to(torch.bfloat16), processor, "x")
    torch.nn.init.zeros_(mllm.model.lm_head.weight)
    with pytest.raises(ModelError):
        check_packing(mllm, TEXT)
    assert mllm.model.dtype == torch.bfloat16


def test_large_models_are_compared_in_their_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "FLOAT32_PARAMETERS", 0)
    model, processor = tiny_model("llava")
    mllm = LocalMllm(model.to(torch.bfloat16), processor, "x")
    assert check_packing(mllm, ASKED) > 1e-3
    take_another_users_prefix(monkeypatch)
    lose_the_prefix(monkeypatch)
    with pytest.raises(ModelError, match=r"on average, too much beside the scores' own deviation"):
        check_packing(mllm, ASKED)

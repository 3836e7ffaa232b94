"""Notes behind candidates: packed rows, training rows and ordinary prompts read them alike, and none is foretold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from separate_prompts import close, separate
from test_scoring import BLUE, CANDIDATES, RED, SHOWN, request, set_rows, tiny

from mllm_srec.mllm.scoring import asked_pieces, own_words, read_segments
from tiny_models import KINDS, SHAPE

NOTES = ("\nShares 1 of 2.", "", "\nnear 3 of the last 4; also meets red.", "\nagainst it wool.", "\nShares 1 of 2.")


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_notes_are_read_and_not_foretold(kind: str, candidates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm, plain = tiny(kind), request((RED,), words=CANDIDATES[candidates])
    noted = replace(plain, notes=NOTES)
    expected = separate(mllm, noted)
    for short, tokens in ((10_000, 2048), (0, 45)):
        set_rows(monkeypatch, short, tokens)
        mllm.prefixes.clear()
        scores = mllm.score([noted, plain])
        close(scores[0], expected)
        close(scores[0][:, 1], scores[1][:, 1])  # the likelihood is that of the candidate's own words
        moved = np.abs(scores[0] - scores[1])[:, 0] > 1e-3
        assert moved.tolist() == [bool(note) for note in NOTES]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_row_foretells_a_candidates_words_as_scoring_does(kind: str) -> None:
    mllm, asked = tiny(kind), replace(request((BLUE,), words=SHOWN), notes=NOTES)
    encoded = mllm.renderer.encode_request(asked)
    segments = asked_pieces(mllm, asked, encoded)
    assert [len(pieces) for pieces in segments] == [2] * 5
    told = [[piece.ids.tolist() for piece in pieces] for pieces in segments]
    assert told == [list(pair) for pair in zip(encoded.candidates, encoded.behind, strict=True)]
    likelihoods = []
    with torch.no_grad():
        last, hidden, ends = read_segments(mllm, encoded, segments)
        assert last.shape == (1, SHAPE["hidden_size"])
        for tokens, start, end in zip(encoded.candidates, [0, *ends], ends, strict=False):
            states, words = own_words(mllm, tokens, last, hidden[start:end])
            assert words == [token for token in tokens if token not in mllm.renderer.special_ids]
            told_by = mllm.logits(states).log_softmax(-1)
            likelihoods.append(float(told_by[torch.arange(len(words)), torch.tensor(words)].mean()))
    close(np.array(likelihoods, np.float32), mllm.score([asked])[0][:, 1])

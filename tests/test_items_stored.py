"""What stage 1 has stored is made again only where it failed or no longer holds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEncoder, shown, vectors
from mllm_srec import items
from mllm_srec.config import ItemsConfig
from mllm_srec.errors import StoreError
from mllm_srec.items import (
    EMBEDDINGS,
    ITEM_TEXTS,
    Catalogue,
    describe,
    embed,
    embed_fused,
    load_embeddings,
    load_items,
)
from mllm_srec.mllm.base import Answer, Prompt
from mllm_srec.prompts import items as prompts
from mllm_srec.workspace import Counts
from test_items import BLUE_HASH, RED_HASH, Eyes, asked_of, rows, shop

# Failures of single rows


def test_a_picture_that_failed_is_named_and_asked_again_alone(tmp_path: Path) -> None:
    workspace = shop(tmp_path, batch_size=32)
    assert describe(workspace, Eyes(fails=(BLUE_HASH,))) == Counts(reused=0, made=5, failed=1)
    made = rows(workspace)
    assert (made["picture"]["status"], made["picture"]["reason"]) == ("error", "HTTP 500")
    assert {row["status"] for key, row in made.items() if key != "picture"} == {"ok", "skipped"}
    assert made["both"]["visual"] == "red running shoe"
    again = Eyes()
    assert describe(workspace, again) == Counts(reused=5, made=1, failed=0)
    assert asked_of(again, f"Picture: <{RED_HASH}>") == []
    assert rows(workspace)["picture"]["visual"] == "blue bag"
    assert describe(workspace, again) == Counts(reused=6, made=0, failed=0)


def test_a_sentence_that_failed_is_named_and_written_again_alone(tmp_path: Path) -> None:
    workspace = shop(tmp_path, batch_size=32, fusion="generate")
    assert describe(workspace, Eyes(fails=("Title: Hat",))) == Counts(reused=0, made=5, failed=1)
    made = rows(workspace)
    assert (made["broken"]["status"], made["broken"]["reason"]) == ("error", "HTTP 500")
    assert (made["broken"]["description"], made["broken"]["fused_by"]) == ("", "rule")
    assert {row["reason"] for row in made.values() if row["status"] == "ok"} == {""}
    again = Eyes(say=lambda prompt: "A hat.")
    assert describe(workspace, again) == Counts(reused=5, made=1, failed=0)
    assert [shown(prompt).count("Title: Hat") for prompt in again.generated] == [1]
    assert (rows(workspace)["broken"]["description"], rows(workspace)["broken"]["fused_by"]) == ("A hat.", "model")


# Making again


@pytest.mark.parametrize(
    ("change", "made"),
    [("nothing", 0), ("model", 6), ("settings", 6), ("prompts", 6), ("rules", 6), ("other section", 0)],
)
def test_rows_are_made_again_only_when_what_made_them_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, made: int
) -> None:
    workspace = shop(tmp_path)
    describe(workspace, Eyes())
    before = workspace.rows(ITEM_TEXTS)
    again = Eyes("fake-2" if change == "model" else "fake-1")
    if change == "settings":
        workspace.save_config(workspace.config.model_copy(update={"items": ItemsConfig(text_words=9)}))
    if change == "other section":
        workspace.save_config(workspace.config.model_copy(update={"seed": 9}))
    if change == "prompts":
        monkeypatch.setattr(prompts, "VERSION", "items-next")
    if change == "rules":
        monkeypatch.setattr(items, "RULES", "next")
    assert describe(workspace, again) == Counts(reused=6 - made, made=made, failed=0)
    assert len(again.asked) == (3 * 3 if made else 0)  # three questions to two pictures and to none
    assert again.calls() == (3 * 3 + 2 if made else 0)
    assert workspace.rows(ITEM_TEXTS).drop("fingerprint").equals(before.drop("fingerprint"))


@pytest.mark.parametrize(
    ("changed", "looked_at"),
    [
        ({"title": "Bag"}, BLUE_HASH),
        ({"description": "Large."}, BLUE_HASH),
        ({"category": "Bags"}, BLUE_HASH),
        ({"cleaned": "html"}, BLUE_HASH),
        ({"picture_sha256": RED_HASH}, RED_HASH),
        ({"picture_sha256": None, "picture_state": "missing"}, None),
    ],
)
def test_only_the_item_that_changed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], looked_at: str | None
) -> None:
    workspace = shop(tmp_path)
    describe(workspace, Eyes())
    catalogue = [replace(item, **changed) if item.item_id == "picture" else item for item in load_items(workspace)]
    monkeypatch.setattr(items, "load_items", lambda _: catalogue)
    again = Eyes()
    assert describe(workspace, again) == Counts(reused=5, made=1, failed=0)
    prefixes = dict.fromkeys(shown(prefix) for prefix, _ in again.asked)
    assert list(prefixes) == ([f"Picture: <{looked_at}>", prompts.NO_PICTURE] if looked_at else [])
    assert len(again.asked) == 3 * len(prefixes)


def test_a_missing_description_is_named(tmp_path: Path) -> None:
    class Stumbling(Eyes):
        def ask(self, prefixes: Sequence[Prompt], *others: Any) -> list[list[Answer]]:
            if any(BLUE_HASH in shown(prefix) for prefix in prefixes):
                raise RuntimeError("out of memory")
            return super().ask(prefixes, *others)

    workspace = shop(tmp_path, batch_size=2)
    with pytest.raises(RuntimeError):
        describe(workspace, Stumbling())
    with pytest.raises(StoreError, match=r"4 of 6 items have no description \(first: 'picture'\): run `mllm-srec desc"):
        Catalogue.load(workspace)
    assert describe(workspace, Eyes()) == Counts(reused=2, made=4, failed=0)
    assert len(Catalogue.load(workspace).ids) == 6


def test_embeddings_are_stored_in_the_catalogues_order_and_reused(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    describe(workspace, Eyes())
    catalogue = Catalogue.load(workspace)
    with pytest.raises(StoreError, match=r"6 items have no embedding \(first: 'both'\): run `mllm-srec retrieve`"):
        load_embeddings(workspace, catalogue)
    encoder = FakeEncoder()
    made = embed(workspace, encoder, catalogue)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, vectors(catalogue.embedding_texts))
    np.testing.assert_array_equal(load_embeddings(workspace, catalogue), made)
    embed(workspace, encoder, catalogue)
    assert encoder.encoded == catalogue.embedding_texts
    changed = [*catalogue.embedding_texts[:-1], "Cap"]
    embed(workspace, encoder, replace(catalogue, embedding_texts=changed))
    assert encoder.encoded[6:] == ["Cap"]
    other = FakeEncoder("encoder-2")
    embed(workspace, other, catalogue)
    assert len(other.encoded) == 6


def test_the_models_own_vectors_read_picture_and_text_and_are_centred(tmp_path: Path) -> None:
    workspace = shop(tmp_path, embedding="model")
    describe(workspace, Eyes())
    catalogue = Catalogue.load(workspace)
    model = Eyes()
    made = embed_fused(workspace, model, catalogue)
    raw = vectors(
        [
            f"Picture: <{RED_HASH}>\nTrail shoe low. Shoes. Light sole.",
            "Wool scarf. Scarves. Warm for winter.",
            f"Picture: <{BLUE_HASH}>\nPicture: blue bag.",
            "",
            "",
            "Hat",
        ]
    )
    centred = raw - raw.mean(0)
    np.testing.assert_allclose(made, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(load_embeddings(workspace, catalogue), made)
    shop_with = replace(catalogue, pictures=[BLUE_HASH, *catalogue.pictures[1:]])
    before = workspace.rows(EMBEDDINGS).to_dicts()
    embed_fused(workspace, model, shop_with)  # another picture: that item's vector alone is made again
    changed = [old["key"] for old, new in zip(before, workspace.rows(EMBEDDINGS).to_dicts(), strict=True) if old != new]
    assert changed == ["both"]


def test_content_may_compare_what_was_seen_too(tmp_path: Path) -> None:
    workspace = shop(tmp_path, embedding="description")
    describe(workspace, Eyes())
    assert Catalogue.load(workspace).embedding_texts == [
        "Trail shoe low. Shoes. Light sole. Picture: red running shoe.",
        "Wool scarf. Scarves. Warm for winter.",
        "Picture: blue bag.",
        "",
        "",
        "Hat",
    ]

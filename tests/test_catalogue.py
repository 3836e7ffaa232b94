"""The catalogue: facts with their origins and rates, names, prices; embeddings are stored and reused."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEncoder, make_shop, shown, vectors
from mllm_srec.catalogue import (
    EMBEDDINGS,
    WORD,
    Catalogue,
    embed,
    embed_fused,
    fact_rates,
    load_embeddings,
    spellings,
)
from mllm_srec.errors import StoreError
from mllm_srec.items import describe
from mllm_srec.mllm.base import Answer, Prompt
from mllm_srec.workspace import Counts
from test_items import BLUE_HASH, COLOUR, FILES, KIND, RED_HASH, SEES, Eyes, one, shop

LOG = {"u": [("i0", 1, None)]}


# Items


def test_the_catalogue_keeps_the_datasets_order_and_tells_every_item_in_one_line(tmp_path: Path) -> None:
    workspace = shop(tmp_path)
    describe(workspace, Eyes())
    catalogue = Catalogue.load(workspace)
    assert catalogue.ids == ["both", "text", "picture", "empty", "lost", "broken"]
    nameless = ["item without text"] * 3
    assert catalogue.lines == ["Trail shoe low (Shoes)", "Wool scarf (Scarves)", *nameless, "Hat"]
    assert catalogue.looks == ["red running shoe", "", "blue bag", "", "", ""]
    assert catalogue.candidates == [
        "Trail shoe low. Shoes. Light sole. Picture: red running shoe.",
        "Wool scarf. Scarves. Warm for winter.",
        "Picture: blue bag.",
        "item without text.",
        "item without text.",
        "Hat.",
    ]
    assert catalogue.embedding_texts == [
        "Trail shoe low. Shoes. Light sole.",
        "Wool scarf. Scarves. Warm for winter.",
        "Picture: blue bag.",
        "",
        "",
        "Hat",
    ]


def test_facts_come_from_category_text_and_picture_with_their_share_of_the_catalogue(tmp_path: Path) -> None:
    shop_items = [
        {"item_id": f"i{n}", "title": "Wool hat" if n < 3 else "Thing", "category": "Hats, Warm" if n < 2 else ""}
        for n in range(16)
    ]
    shop_items[0]["image"] = "red"
    shop_items[3]["image"] = "blue"
    workspace = make_shop(tmp_path, shop_items, LOG, pictures=FILES)
    describe(
        workspace, Eyes(sees={(RED_HASH, KIND): "sun hat", (RED_HASH, COLOUR): "red", (BLUE_HASH, KIND): "T-shirt"})
    )
    catalogue = Catalogue.load(workspace)
    assert catalogue.facts[:5] == [
        {"hats": "text", "warm": "text", "hat": "both", "wool": "text", "red": "picture"},
        {"hats": "text", "warm": "text", "hat": "text", "wool": "text"},
        {"hat": "text", "wool": "text"},
        {"t-shirt": "picture"},  # facts are in lower case
        {},
    ]
    counts = {"hats": 2, "warm": 2, "hat": 3, "wool": 3, "red": 1, "t-shirt": 1}
    assert catalogue.rates.base == {fact: n / 16 for fact, n in counts.items()}
    # "wool" merely stands in titles; the others are a category, a kind or a look
    assert catalogue.rates.prior == {fact: n / 16 * (WORD if fact == "wool" else 1) for fact, n in counts.items()}
    assert catalogue.categories[:3] == [["hats", "warm"], ["hats", "warm"], []]
    assert (catalogue.name("wool"), catalogue.name("hat"), catalogue.name("hats")) == ("Wool", "hat", "Hats")
    assert [catalogue.place[item] for item in ("i0", "i15")] == [0, 15]


def test_what_the_picture_claims_against_the_text_is_no_fact(tmp_path: Path) -> None:
    items = [
        {"item_id": "i0", "title": "Wool hat", "image": "blue"},
        {"item_id": "i1", "title": "Green shoe", "image": "red"},
        {"item_id": "i2", "title": "Red shoe", "image": "red"},
    ]
    workspace = make_shop(tmp_path, items, LOG, pictures=FILES)
    describe(workspace, Eyes(sees=SEES | {(BLUE_HASH, COLOUR): "blue"}))
    catalogue = Catalogue.load(workspace)
    assert catalogue.facts == [
        {"hat": "text", "blue": "picture"},
        {"pair of shoes": "both", "green": "text"},
        {"pair of shoes": "both", "red": "both"},
    ]
    assert catalogue.looks == ["blue", "running shoe", "red running shoe"]


def test_what_a_category_says_and_the_picture_shows_is_known_from_both(tmp_path: Path) -> None:
    workspace = one(tmp_path, title="Thing", category="Gizmo", image="red")
    describe(workspace, Eyes(sees={(RED_HASH, KIND): "gizmo"}))
    assert Catalogue.load(workspace).facts == [{"gizmo": "both"}]


def test_rates_by_hand() -> None:
    rates = fact_rates([["red", "tale"], {"red": "text"}, ["tale"], []], {"red"})
    assert rates.base == {"red": 1 / 2, "tale": 1 / 2}
    assert rates.prior == {"red": 1 / 2, "tale": WORD / 2}


def test_a_fact_is_spelt_as_it_is_mostly_written() -> None:
    written = Counter({"Drama": 3, "drama": 1, "wool": 2, "WOOL": 1, "T-Shirt": 1, "Sci-Fi": 1, "hat": 2, "Hat": 2})
    facts = {"drama", "wool", "t-shirt", "hat"}
    assert spellings(written, facts) == {"drama": "Drama", "t-shirt": "T-Shirt", "hat": "Hat"}
    assert spellings(Counter(), facts) == {}


@pytest.mark.parametrize(
    ("extra", "price"),
    [
        ({"price": 12}, 12.0),
        ({"price": "12.5"}, 12.5),
        ({"price": "$1,234.50"}, 1234.5),
        ({"price": " £ 7 "}, 7.0),
        ({"price": "7 €"}, 7.0),
        ({"price": 0}, None),
        ({"price": -3}, None),
        ({"price": "free"}, None),
        ({"price": "nan"}, None),
        ({"price": "inf"}, None),
        ({"price": None}, None),
        ({"price": True}, None),
        ({"price": [5]}, None),
        ({"cost": 5}, None),
        ([5], None),
        ({}, None),
    ],
)
def test_a_price_is_a_positive_number_or_unknown(tmp_path: Path, extra: object, price: float | None) -> None:
    workspace = one(tmp_path, title="Hat", extra=json.dumps(extra))
    describe(workspace, Eyes())
    prices = Catalogue.load(workspace).prices
    assert prices.dtype == np.float32 and prices.shape == (1,)
    assert math.isnan(prices[0]) if price is None else prices[0] == price


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("lines", ["x"], False),
        ("looks", ["red"], False),
        ("facts", [{"hat": "both"}], False),
        ("rates", fact_rates([["hat"]], ()), False),
        ("categories", [["x"]], False),
        ("prices", np.array([3], np.float32), False),
        ("spelling", {"hat": "HAT"}, False),
        ("candidates", ["x"], True),
        ("embedding_texts", ["x"], True),
        ("pictures", ["x"], True),
    ],
)
def test_the_mark_changes_with_what_histories_are_read_by(tmp_path: Path, field: str, value: Any, same: bool) -> None:
    workspace = one(tmp_path, title="Hat", category="Hats")
    describe(workspace, Eyes())
    catalogue = Catalogue.load(workspace)
    assert catalogue.mark == Catalogue.load(workspace).mark
    assert (replace(catalogue, **{field: value}).mark == catalogue.mark) == same


# Descriptions and embeddings


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

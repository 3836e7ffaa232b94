import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mllm_srec.data.readers import read
from mllm_srec.errors import DataError, UsageError


def review(user: str = "U", asin: str = "A", time: Any = 1529193600, **more: Any) -> dict[str, Any]:
    return {"reviewerID": user, "asin": asin, "overall": 5.0, "unixReviewTime": time} | more


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_2018_with_the_meta_file_beside_it(tmp_path: Path) -> None:
    reviews = write(tmp_path / "Gift_Cards_5.json.gz", review("U", "B", 1529193601), review("U", "A"), review("U", "A"))
    write(
        tmp_path / "meta_Gift_Cards.json.gz",
        {
            "asin": "A",
            "title": "Tom &amp; Co",
            "description": ["One <b>bold</b>.", "Two &lt;i&gt; three."],
            "feature": ["No fees"],
            "category": ["Gift Cards", "Gift Cards", "Toys &amp; Games"],
            "image": ["https://x/1.jpg", "https://x/2.jpg"],
            "brand": "Tom",
            "price": "",
        },
        {"asin": "C", "title": "Unseen", "description": [], "image": []},
    )
    dataset = read(reviews)
    assert (dataset.name, dataset.root) == ("Gift_Cards_5", None)
    assert dataset.items.rows() == [
        (
            "A",
            "Tom & Co",
            "One bold . Two <i> three. No fees",
            "Gift Cards, Toys & Games",
            "https://x/1.jpg",
            '{"brand": "Tom"}',
        ),
        ("C", "Unseen", "", "", None, "{}"),
        # reviewed, but not in the meta file
        ("B", "", "", "", None, "{}"),
    ]
    # a review that stands twice is two events
    assert dataset.interactions.rows() == [
        ("U", "A", 1529193600000, 5.0, 0),
        ("U", "A", 1529193600000, 5.0, 1),
        ("U", "B", 1529193601000, 5.0, 2),
    ]


def test_2014_meta_in_python_literals(tmp_path: Path) -> None:
    reviews = write(tmp_path / "reviews_Musical_Instruments_5.json", review())
    meta = (
        "{'asin': 'A', 'title': \"Cat's bow\", 'categories': [['Music', 'Bows'], ['Music', 'Cats']], "
        "'imUrl': 'http://x/a.jpg', 'price': 3.5}"
    )
    write(tmp_path / "meta_Musical_Instruments.json", meta)
    assert read(reviews).items.rows() == [
        ("A", "Cat's bow", "", "Music, Bows, Cats", "http://x/a.jpg", '{"price": 3.5}')
    ]


def test_2023_in_a_folder(tmp_path: Path) -> None:
    row = {"user_id": "U", "parent_asin": "P", "asin": "A", "rating": 4.0, "timestamp": 1577880000125}
    write(tmp_path / "Toys.jsonl", row, row | {"parent_asin": None, "timestamp": 1577880000126})
    write(
        tmp_path / "meta_Toys.jsonl",
        {
            "parent_asin": "P",
            "title": "Ball",
            "description": ["Round."],
            "features": ["Red", "Light"],
            "categories": [],
            "main_category": "Toys",
            "images": [{"thumb": "https://x/t.jpg", "large": "https://x/l.jpg", "hi_res": None}],
            "store": "Shop",
        },
    )
    dataset = read(tmp_path)
    assert dataset.items.rows() == [
        ("P", "Ball", "Round. Red Light", "Toys", "https://x/l.jpg", '{"store": "Shop"}'),
        ("A", "", "", "", None, "{}"),
    ]
    assert dataset.interactions.rows() == [("U", "P", 1577880000125, 4.0, 0), ("U", "A", 1577880000126, 4.0, 1)]


def test_without_meta_the_items_of_the_reviews_are_the_catalogue(tmp_path: Path) -> None:
    dataset = read(write(tmp_path / "Toys_5.json", "\ufeff" + json.dumps(review("U", "B")), "", review("V", "A")))
    assert dataset.items.select("item_id", "title", "image").rows() == [("B", "", None), ("A", "", None)]


def test_several_categories_in_one_folder(tmp_path: Path) -> None:
    for name, asin in (("Toys", "A"), ("Cards", "B")):
        write(tmp_path / f"{name}_5.json", review("U", asin, 1529193600 if asin == "A" else 1529193599))
        write(tmp_path / f"meta_{name}.json", {"asin": asin, "title": name}, {"asin": "S", "title": "Shared"})
    dataset = read(tmp_path)
    assert dataset.items["title"].to_list() == ["Cards", "Shared", "Toys"]
    assert dataset.interactions["item_id"].to_list() == ["B", "A"]


def test_meta_repeats_count_once_only_with_the_same_content(tmp_path: Path) -> None:
    reviews = write(tmp_path / "Toys_5.json", review())
    row = {"asin": "A", "title": "Ball"}
    write(tmp_path / "meta_Toys.json", row, row)
    assert read(reviews).items["title"].to_list() == ["Ball"]
    write(tmp_path / "meta_Toys.json", row, row | {"title": "Bat"})
    with pytest.raises(DataError, match=r"meta_Toys\.json line 2, column asin: item A stands here twice"):
        read(reviews)
    dataset = read(reviews, on_bad_row="skip")
    assert (dataset.items["title"].to_list(), dataset.skipped.height) == (["Ball"], 1)


def test_a_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    reviews = write(tmp_path / "Toys_5.json", review())
    write(tmp_path / "meta_Toys.json", '{"asin": "A", "title": "x\\ud83dy", "brand": "\\ud83d"}')
    assert read(reviews).items["title"].to_list() == ["x?y"]


BAD = [
    ('{"reviewerID": "U", "asin"', "line 3, column the whole line: this is not JSON (Expecting ':' delimiter"),
    ('["U", "A"]', "line 3, column the whole line: one JSON object per line is expected, this is a list"),
    (review("", "A"), "line 3, column reviewerID: the user has no id"),
    ({"reviewerID": "U", "unixReviewTime": 1, "overall": 1}, "line 3, column asin: the item has no id"),
    (review(time=None), "line 3, column unixReviewTime: the time is missing"),
    (review(time=-5), "line 3, column unixReviewTime: '-5' as a unix time in seconds is not between"),
    (review(overall=float("nan")), "line 3, column overall: the rating 'nan' is not a finite number"),
    (review(overall="five"), "line 3, column overall: the rating 'five' is not a finite number"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_line_stops_or_is_listed(tmp_path: Path, row: dict[str, Any] | str, message: str) -> None:
    path = write(tmp_path / "Toys_5.json", review(), "", row, review(asin="B"))
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"Toys_5.json {message}" in str(caught.value)
    dataset = read(path, on_bad_row="skip")
    assert (dataset.interactions.height, dataset.skipped["line"].to_list()) == (2, [3])


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "Toys_5.json"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"Toys_5\.json is empty"):
        read(path)
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"Toys_5\.json holds no reviews"):
        read(path)
    path.write_bytes(json.dumps(review()).encode() + b'\n{"reviewerID": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2, column the whole line: this is not UTF-8 text"):
        read(path)
    with pytest.raises(
        DataError, match=r"no column reviewerID\. The columns found: asin, reviewer\. Is reviewer meant"
    ):
        read(write(path, {"asin": "A", "reviewer": "U"}))
    packed = tmp_path / "Toys_5.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(review()).encode() * 50)[:-9])
    with pytest.raises(DataError, match=r"Toys_5\.json\.gz is damaged"):
        read(packed)
    packed.write_bytes(json.dumps(review()).encode())
    with pytest.raises(DataError, match=r"Toys_5\.json\.gz is damaged after line 0"):
        read(packed)


def test_meta_alone(tmp_path: Path) -> None:
    meta = write(tmp_path / "meta_Toys.json.gz", {"asin": "A"})
    with pytest.raises(UsageError, match="is a meta file: name the reviews file"):
        read(meta)
    with pytest.raises(DataError, match="holds no reviews file"):
        read(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "interactions", "items"),
    [
        ("Gift_Cards_5.json.gz", 2_972, 1_547),
        ("All_Beauty_5.json.gz", 5_269, 85),
        ("AMAZON_FASHION_5.json.gz", 3_176, 31),
        ("reviews_Musical_Instruments_5.json.gz", 10_261, 900),
    ],
)
def test_real(real_data: Path, name: str, interactions: int, items: int) -> None:
    dataset = read(real_data / "raw" / name)
    assert (dataset.interactions.height, dataset.items.height, dataset.skipped.height) == (interactions, items, 0)
    assert (dataset.items["image"].count() > 0) == name.startswith("Gift")

import json
from pathlib import Path

import polars as pl
import pytest

from mllm_srec.data.readers import read
from mllm_srec.errors import DataError

LOG = "user_id,item_id,timestamp,rating\nv,01,1577880000,4.5\nu,02,1577880000,\nu,01,1577870000,3\n"
ITEMS = 'item_id,title,price,line\n01,"Cup, ""big""\nblue",3.50,Home\n02,,,\n'


def shop(folder: Path, log: str = LOG, items: str = ITEMS) -> Path:
    (folder / "interactions.csv").write_text(log, encoding="utf-8")
    (folder / "items.csv").write_text(items, encoding="utf-8")
    return folder


def test_csv(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    dataset = read(shop(folder))
    assert (dataset.name, dataset.has_time, dataset.root, dataset.skipped.height) == ("shop", True, folder, 0)
    assert dataset.items["item_id"].to_list() == ["01", "02"], "leading zeros are part of an id"
    assert dataset.items["title"].to_list() == ['Cup, "big"\nblue', ""]
    assert [json.loads(extra) for extra in dataset.items["extra"]] == [
        {"price": "3.50", "line_": "Home"},
        {"price": None, "line_": None},
    ]
    assert dataset.interactions.rows() == [
        ("u", "01", 1577870000000, 3.0, 0),
        ("u", "02", 1577880000000, None, 1),
        ("v", "01", 1577880000000, 4.5, 0),
    ]


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": [2, 1], "item_id": [7, 8], "timestamp": [1577880000000, 1577870000000]})
    log.with_columns(pl.col("timestamp").cast(pl.Datetime("ms"))).write_parquet(tmp_path / "interactions.parquet")
    items = pl.DataFrame(
        {"item_id": [7, 8], "category": [["Home", "Cups"], None], "image": ["a.jpg", "https://x/y.jpg"]}
    )
    items.write_parquet(tmp_path / "items.parquet")
    dataset = read(tmp_path)
    assert dataset.items.rows() == [
        ("7", "", "", "Home, Cups", "a.jpg", "{}"),
        ("8", "", "", "", "https://x/y.jpg", "{}"),
    ]
    assert dataset.interactions.rows() == [("1", "8", 1577870000000, None, 0), ("2", "7", 1577880000000, None, 0)]


def test_iso_times_and_no_times(tmp_path: Path) -> None:
    dataset = read(shop(tmp_path, "user_id,item_id,timestamp\nu,02,2020-01-02\nu,01,2020-01-01T12:00:00Z\n"))
    assert dataset.interactions["timestamp"].to_list() == [1577880000000, 1577923200000]
    dataset = read(shop(tmp_path, "user_id,item_id\nu,02\nu,01\n"))
    assert not dataset.has_time
    assert dataset.interactions.rows() == [("u", "02", None, None, 0), ("u", "01", None, None, 1)]


def test_pictures_by_id_only_without_an_image_column(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "01.webp").write_bytes(b"")
    assert read(shop(tmp_path)).items["image"].to_list() == ["images/01.webp", None]
    with_column = "item_id,image\n01,\n02,photos/2.jpg\n"
    assert read(shop(tmp_path, items=with_column)).items["image"].to_list() == [None, "photos/2.jpg"]


@pytest.mark.parametrize(
    ("log", "items", "message"),
    [
        (LOG.replace("user_id", "userid"), ITEMS, "interactions.csv: there is no column user_id. The columns found: "),
        (LOG, ITEMS.replace("item_id", "sku"), "items.csv: there is no column item_id. The columns found: sku, title"),
        (LOG + "u,03,1577880000,1\n", ITEMS, "interactions.csv line 5, column item_id: item 03 of the log is not in"),
        (LOG + ",01,1577880000,1\n", ITEMS, "interactions.csv line 5, column user_id: the user has no id"),
        (LOG + "u,01,1577880000,x\n", ITEMS, "interactions.csv line 5, column rating: the rating 'x' is not a finite"),
        (LOG + "u,01,1577880000,nan\n", ITEMS, "interactions.csv line 5, column rating: the rating 'nan' is not"),
        (LOG + "u,01,,1\n", ITEMS, "interactions.csv line 5, column timestamp: the time is missing"),
        (LOG + "u,01,-1,1\n", ITEMS, "interactions.csv line 5, column timestamp: '-1' as a unix time in seconds is"),
        # the title of the first item takes two lines
        (LOG, ITEMS + "01,again,,\n", "items.csv line 5, column item_id: item 01 stands here twice"),
        (LOG, ITEMS + " ,no id,,\n", "items.csv line 5, column item_id: the item has no id"),
    ],
)
def test_bad_input_stops_with_its_place(tmp_path: Path, log: str, items: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(shop(tmp_path, log, items))
    assert message in str(caught.value)


def test_skip_counts_and_lists_the_bad_rows(tmp_path: Path) -> None:
    log = LOG + "u,03,1577880000,1\nu,01,soon,1\nu,01,1577880000,5\n,01,1577880000,1\n"
    dataset = read(shop(tmp_path, log, ITEMS + "02,again,,\n"), on_bad_row="skip")
    assert dataset.interactions.height == 4
    assert dataset.items.height == 2
    assert dataset.skipped.sort("file", "line").select("file", "line", "column").rows() == [
        ("interactions.csv", 5, "item_id"),
        ("interactions.csv", 6, "timestamp"),
        ("interactions.csv", 8, "user_id"),
        ("items.csv", 5, "item_id"),
    ]


def test_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"interactions\.csv is empty"):
        read(shop(tmp_path, ""))
    with pytest.raises(DataError, match=r"items\.csv is empty"):
        read(shop(tmp_path, LOG, ""))
    with pytest.raises(DataError, match="no interactions left"):
        read(shop(tmp_path, "user_id,item_id\n"))
    (tmp_path / "items.csv").unlink()
    with pytest.raises(
        DataError, match=r"there is no items\.csv or items\.parquet. The files found: interactions\.csv"
    ):
        read(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "rated"),
    [("ml100k_posters", 943, 1424, 98907, 98907), ("hm_sample", 900, 5255, 15844, 0)],
)
def test_real(real_data: Path, name: str, users: int, items: int, interactions: int, rated: int) -> None:
    dataset = read(real_data / name)
    assert dataset.interactions["user_id"].n_unique() == users
    assert (dataset.items.height, dataset.interactions.height) == (items, interactions)
    assert dataset.interactions["rating"].count() == rated
    assert dataset.items["image"].null_count() == 0
    assert dataset.skipped.height == 0

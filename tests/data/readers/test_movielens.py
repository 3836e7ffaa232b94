from pathlib import Path

import pytest

from mllm_srec.data.readers import read
from mllm_srec.errors import DataError

DATA = "9\t2\t3\t874965479\n9\t1\t5\t874965478\n1\t1\t4\t874965478\n"
ITEM = (
    "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "2|Misérables, Les (1995)|01-Jan-1995||http://x|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
)
RATINGS = "userId,movieId,rating,timestamp\n1,10,4.5,1577880000\n1,20,3.0,1577870000\n"
MOVIES = 'movieId,title,genres\n10,"American President, The (1995)",Comedy|Drama|Romance\n20,Été,(no genres listed)\n'


def hundred_k(folder: Path, data: str = DATA, item: str = ITEM) -> Path:
    (folder / "u.data").write_text(data)
    (folder / "u.item").write_text(item, encoding="latin-1")
    return folder


def later(folder: Path, ratings: str = RATINGS, movies: str = MOVIES) -> Path:
    (folder / "ratings.csv").write_text(ratings)
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return folder


def test_100k(tmp_path: Path) -> None:
    dataset = read(hundred_k(tmp_path))
    assert dataset.items.select("item_id", "title", "category", "image").rows() == [
        ("1", "Toy Story (1995)", "Animation, Children's, Comedy", None),
        ("2", "Misérables, Les (1995)", "", None),
    ]
    assert dataset.interactions.rows() == [
        ("1", "1", 874965478000, 4.0, 0),
        ("9", "1", 874965478000, 5.0, 0),
        ("9", "2", 874965479000, 3.0, 1),
    ]


def test_csv_releases(tmp_path: Path) -> None:
    dataset = read(later(tmp_path))
    assert dataset.items.select("item_id", "title", "category").rows() == [
        ("10", "American President, The (1995)", "Comedy, Drama, Romance"),
        ("20", "Été", ""),
    ]
    assert dataset.interactions.rows() == [("1", "20", 1577870000000, 3.0, 0), ("1", "10", 1577880000000, 4.5, 1)]


@pytest.mark.parametrize(
    ("data", "item", "message"),
    [
        (
            DATA + "1\t3\t4\t874965478\n",
            ITEM,
            "u.data line 4, column item id: item 3 of the log is not in the catalogue",
        ),
        (DATA + "1\t1\t4\n", ITEM, "u.data line 4, column timestamp: the time is missing"),
        (DATA + "1\t1\tx\t874965478\n", ITEM, "u.data line 4, column rating: the rating 'x' is not a finite number"),
        (DATA + "1\t1\t4\t874965478\t0\n", ITEM, "u.data line 4, column timestamp: the row has 5 fields"),
        (DATA, ITEM + ITEM.splitlines()[0], "u.item line 3, column movie id: item 1 stands here twice"),
        (DATA, ITEM.replace("http://x|1|0", "http://x|1|yes"), "u.item line 2, column Action: the flag is yes"),
        ("", ITEM, "u.data is empty"),
    ],
)
def test_bad_100k(tmp_path: Path, data: str, item: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(hundred_k(tmp_path, data, item))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("ratings", "movies", "message"),
    [
        (
            RATINGS.replace("userId", "user_id"),
            MOVIES,
            "ratings.csv: there is no column userId. The columns found: user_id",
        ),
        (RATINGS, MOVIES.replace("genres\n", "genre\n"), "Is genre meant? Rename it to genres"),
        (RATINGS + "1,30,4,1577880000\n", MOVIES, "ratings.csv line 4, column movieId: item 30 of the log is not in"),
        (RATINGS + "1,10,4,1577880000000\n", MOVIES, "ratings.csv line 4, column timestamp: '1577880000000' as a unix"),
        (RATINGS, MOVIES + "10,Again,\n", "movies.csv line 4, column movieId: item 10 stands here twice"),
    ],
)
def test_bad_csv_release(tmp_path: Path, ratings: str, movies: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(later(tmp_path, ratings, movies))
    assert message in str(caught.value)


def test_skip(tmp_path: Path) -> None:
    dataset = read(hundred_k(tmp_path, DATA + "1\t3\t4\t874965478\n"), on_bad_row="skip")
    assert (dataset.interactions.height, dataset.skipped.height) == (3, 1)


@pytest.mark.data
def test_real(real_data: Path) -> None:
    dataset = read(real_data / "raw" / "movielens_100k")
    assert dataset.interactions["user_id"].n_unique() == 943
    assert (dataset.items.height, dataset.interactions.height, dataset.skipped.height) == (1682, 100_000, 0)
    assert dataset.items["category"].str.len_chars().min() == 0, "two films are of unknown genre"
    assert (dataset.items["category"] == "").sum() == 2

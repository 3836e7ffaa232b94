import json
from pathlib import Path

import pytest

from mllm_srec.data.readers import read
from mllm_srec.errors import DataError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\tb\t4\t1577880000\nu\ta\t\t1577870000.0\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    'a\tToy "Story\t1995\tAnimation Comedy\nb\t\t\t\n'
)


def atomic(folder: Path, inter: str = INTER, item: str | None = ITEM) -> Path:
    (folder / "ml.inter").write_text(inter)
    if item is not None:
        (folder / "ml.item").write_text(item)
    return folder


def test_folder_and_file_give_the_same(tmp_path: Path) -> None:
    for path in (atomic(tmp_path), tmp_path / "ml.inter"):
        dataset = read(path)
        assert dataset.name == "ml"
        assert dataset.interactions.rows() == [("u", "a", 1577870000000, None, 0), ("u", "b", 1577880000000, 4.0, 1)]
        assert dataset.items.select("item_id", "title", "category").rows() == [
            ("a", 'Toy "Story', "Animation, Comedy"),
            ("b", "", ""),
        ]
        assert json.loads(dataset.items["extra"][0]) == {"release_year": "1995"}


def test_categories_with_commas_of_their_own_are_kept(tmp_path: Path) -> None:
    item = "item_id:token\tcategories:token_seq\na\tVideo Games, Sports\nb\tRole Play\n"
    assert read(atomic(tmp_path, item=item)).items["category"].to_list() == ["Video Games, Sports", "Role, Play"]
    item = item.replace("token_seq", "token")
    assert read(atomic(tmp_path, item=item)).items["category"].to_list() == ["Video Games, Sports", "Role Play"]


def test_without_items_times_or_ratings(tmp_path: Path) -> None:
    dataset = read(atomic(tmp_path, "user_id:token\titem_id:token\nu\tb\nu\ta\nu\tb\n", None))
    assert not dataset.has_time
    assert dataset.items.select("item_id", "title").rows() == [("b", ""), ("a", "")]
    assert dataset.interactions["item_id"].to_list() == ["b", "a", "b"]


def test_milliseconds(tmp_path: Path) -> None:
    dataset = read(
        atomic(tmp_path, INTER.replace("1577880000", "1577880000000").replace("1577870000", "1577870000000"))
    )
    assert dataset.interactions["timestamp"].to_list() == [1577870000000, 1577880000000]


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        (
            INTER.replace("user_id:token", "uid:token"),
            ITEM,
            "ml.inter: there is no column user_id. The columns found: uid",
        ),
        (INTER + "u\tz\t1\t1577880000\n", ITEM, "ml.inter line 4, column item_id: item z of the log is not in"),
        (INTER + "u\ta\tx\t1577880000\n", ITEM, "ml.inter line 4, column rating: the rating 'x' is not"),
        (INTER + "u\ta\t1\tnan\n", ITEM, "ml.inter line 4, column timestamp: 'nan' is not a unix time in seconds"),
        (INTER, ITEM + "a\tx\t1\ty\n", "ml.item line 4, column item_id: item a stands here twice"),
        (INTER, ITEM.replace("item_id", "iid"), "ml.item: there is no column item_id"),
        (INTER, ITEM.replace("class:token_seq", "movie_title:token"), "ml.item: two columns are called movie_title"),
        ("", ITEM, "ml.inter is empty"),
    ],
)
def test_bad_input(tmp_path: Path, inter: str, item: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(atomic(tmp_path, inter, item))
    assert message in str(caught.value)


def test_several_inter_files(tmp_path: Path) -> None:
    atomic(tmp_path)
    (tmp_path / "ml.test.inter").write_text(INTER)
    with pytest.raises(DataError, match=r"it holds ml\.inter, ml\.test\.inter: name the file"):
        read(tmp_path)


def test_skip(tmp_path: Path) -> None:
    dataset = read(atomic(tmp_path, INTER + "u\tz\t1\t1577880000\n"), on_bad_row="skip")
    assert (dataset.interactions.height, dataset.skipped.height) == (2, 1)

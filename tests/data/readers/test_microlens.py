from pathlib import Path

import pytest

from mllm_srec.data.readers import read
from mllm_srec.errors import DataError

TITLES = 'item,title\n1,"One, first"\n2,Two\n3,\n'


def videos(folder: Path, pairs: str, suffix: str = "tsv", titles: str = TITLES) -> Path:
    (folder / f"X_pairs.{suffix}").write_text(pairs)
    (folder / "X_titles.csv").write_text(titles, encoding="utf-8")
    return folder


def test_sequences_keep_their_order_and_have_no_times(tmp_path: Path) -> None:
    dataset = read(videos(tmp_path, "10\t3 1 2\n9\t2\n"))
    assert not dataset.has_time
    assert dataset.items.select("item_id", "title", "image").rows() == [
        ("1", "One, first", None),
        ("2", "Two", None),
        ("3", "", None),
    ]
    assert dataset.interactions.select("user_id", "item_id", "timestamp", "position").rows() == [
        ("10", "3", None, 0),
        ("10", "1", None, 1),
        ("10", "2", None, 2),
        ("9", "2", None, 0),
    ]


def test_pairs_with_times(tmp_path: Path) -> None:
    dataset = read(videos(tmp_path, "user,item,timestamp\n1,2,1577880000000\n1,3,1577870000000\n", "csv"))
    assert dataset.has_time
    assert dataset.interactions["item_id"].to_list() == ["3", "2"]
    assert dataset.interactions["timestamp"].to_list() == [1577870000000, 1577880000000]


def test_pairs_without_times(tmp_path: Path) -> None:
    dataset = read(videos(tmp_path, "user,item\n1,2\n1,3\n", "csv"))
    assert not dataset.has_time
    assert dataset.interactions["item_id"].to_list() == ["2", "3"]


def test_covers(tmp_path: Path) -> None:
    (tmp_path / "X_covers").mkdir()
    (tmp_path / "X_covers" / "2.jpg").write_bytes(b"")
    assert read(videos(tmp_path, "1\t1\n")).items["image"].to_list() == [None, "X_covers/2.jpg", None]


@pytest.mark.parametrize(
    ("pairs", "suffix", "titles", "message"),
    [
        ("1\t1 2\n2\t1 9 2\n", "tsv", TITLES, "X_pairs.tsv line 2, column item: item 9 of the log is not in"),
        ("1\t1 2\n2\t\n", "tsv", TITLES, "X_pairs.tsv line 2, column item: user 2 has no items"),
        ("1\t1 2\n\t1\n", "tsv", TITLES, "X_pairs.tsv line 2, column user: the user has no id"),
        ("", "tsv", TITLES, "X_pairs.tsv is empty"),
        ("uid,item\n1,2\n", "csv", TITLES, "X_pairs.csv: there is no column user. The columns found: uid, item"),
        ("1\t1\n", "tsv", TITLES + "2,Again\n", "X_titles.csv line 5, column item: item 2 stands here twice"),
        ("1\t1\n", "tsv", "id,title\n1,x\n", "X_titles.csv: there is no column item"),
    ],
)
def test_bad_input(tmp_path: Path, pairs: str, suffix: str, titles: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(videos(tmp_path, pairs, suffix, titles))
    assert message in str(caught.value)


def test_skip_counts_each_bad_event(tmp_path: Path) -> None:
    dataset = read(videos(tmp_path, "1\t1 8 9 2\n2\t\n"), on_bad_row="skip")
    assert dataset.interactions["item_id"].to_list() == ["1", "2"]
    assert dataset.skipped["line"].to_list() == [2, 1, 1]


def test_files_missing_or_too_many(tmp_path: Path) -> None:
    videos(tmp_path, "1\t1\n")
    (tmp_path / "Y_titles.csv").write_text(TITLES)
    with pytest.raises(DataError, match=r"holds X_titles\.csv and Y_titles\.csv: keep one"):
        read(tmp_path)
    for name in ("X_titles.csv", "Y_titles.csv"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"there is no \*_titles\.csv\. The files found: X_pairs\.tsv"):
        read(tmp_path)


@pytest.mark.data
def test_real(real_data: Path) -> None:
    dataset = read(real_data / "raw" / "microlens50k_text")
    assert dataset.interactions["user_id"].n_unique() == 50_000
    assert (dataset.items.height, dataset.interactions.height, dataset.skipped.height) == (19_220, 359_708, 0)
    first = dataset.interactions.filter(user_id="1")["item_id"].to_list()
    assert first == ["1958", "6346", "15223", "17700", "1707"]

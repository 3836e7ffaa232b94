from pathlib import Path

import pytest

from mllm_srec.data.readers import FORMATS, read
from mllm_srec.errors import DataError, UsageError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["interactions.csv", "items.csv"], "table"),
        (["interactions.parquet"], "table"),
        (["u.data", "u.item"], "movielens"),
        (["ratings.csv", "movies.csv"], "movielens"),
        (["Gift_Cards.jsonl", "meta_Gift_Cards.jsonl"], "amazon"),
        (["Gift_Cards_5.json.gz"], "amazon"),
        (["Gift_Cards_5.json"], "amazon"),
        (["transactions_train.csv", "articles.csv"], "hm"),
        (["MicroLens-50k_pairs.tsv"], "microlens"),
        (["MicroLens-50k_pairs.csv"], "microlens"),
        (["ml-100k.inter"], "recbole"),
        # a stray plain .json does not make a folder Amazon's
        (["interactions.csv", "metadata.json"], "table"),
    ],
)
def test_each_layout_is_told_by_its_names_alone(tmp_path: Path, names: list[str], expected: str) -> None:
    folder = touch(tmp_path, *names)
    assert [name for name, layout in FORMATS.items() if layout.matches(folder)] == [expected]
    assert [name for name, layout in FORMATS.items() if layout.matches(tmp_path / names[0])] in ([], [expected])


def test_a_single_file_of_amazon_or_recbole(tmp_path: Path) -> None:
    touch(tmp_path, "reviews.json", "x.inter", "u.data")
    for name, expected in (("reviews.json", ["amazon"]), ("x.inter", ["recbole"]), ("u.data", [])):
        assert [fmt for fmt, layout in FORMATS.items() if layout.matches(tmp_path / name)] == expected


def test_unknown_and_ambiguous_folders_list_the_formats(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    for name, layout in FORMATS.items():
        assert f"{name}: {layout.files}" in str(caught.value)
    touch(tmp_path, "u.data", "interactions.csv")
    with pytest.raises(UsageError, match="could be table or movielens: name one with --format"):
        read(tmp_path)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'movie_lens' is unknown: is movielens meant"):
        read(tmp_path, "movie_lens")
    with pytest.raises(UsageError, match=r"format 'qqqq' is unknown\. Choose auto, table"):
        read(tmp_path, "qqqq")
    with pytest.raises(UsageError, match="there is no file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="on_bad_row is 'ignore'"):
        read(tmp_path, "table", "ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", ["table", "movielens", "hm", "microlens"])
def test_a_file_where_a_folder_is_wanted(tmp_path: Path, fmt: str) -> None:
    file = touch(tmp_path, "some.csv") / "some.csv"
    with pytest.raises(UsageError, match=f"is a file: the {fmt} format wants"):
        read(file, fmt)


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_a_named_format_says_which_file_is_missing(tmp_path: Path, fmt: str) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        read(tmp_path, fmt)


def test_an_unreadable_file_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "x.inter").mkdir()
    with pytest.raises(DataError, match=r"x\.inter cannot be read: Is a directory"):
        read(tmp_path, "recbole")

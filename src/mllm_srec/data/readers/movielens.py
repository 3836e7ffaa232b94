"""MovieLens as GroupLens publishes it: 100K (u.data, u.item) and the later CSV releases (ratings.csv, movies.csv)."""

from pathlib import Path

import polars as pl

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers.common import find_file, read_ids, read_log, read_text_table, require
from mllm_srec.data.schema import PLACE, RowCheck
from mllm_srec.errors import UsageError

FILES = "a folder with u.data and u.item, or with ratings.csv and movies.csv"
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
"""The 19 flags at the end of a line of u.item."""
NO_GENRE = "(no genres listed)"


def matches(path: Path) -> bool:
    """Whether `path` is a folder with ratings of one of the two releases."""
    return (path / "u.data").is_file() or (path / "ratings.csv").is_file()


def read(path: Path, check: RowCheck) -> Dataset:
    """Read titles, genres as the category, ratings and times (unix seconds)."""
    if not path.is_dir():
        raise UsageError(f"{path} is a file: the movielens format wants {FILES}")
    items, log = _read_100k(path, check) if (path / "u.data").is_file() else _read_csv(path, check)
    return Dataset.build(path.resolve().name, items, log, has_time=True, root=None, check=check)


def _read_100k(folder: Path, check: RowCheck) -> tuple[pl.DataFrame, pl.DataFrame]:
    names = ("movie id", "movie title", "release date", "video release date", "IMDb URL", *GENRES)
    items = read_text_table(
        find_file(folder, "u.item"), check, separator="|", quote=False, columns=names, encoding="latin-1"
    )
    items = read_ids(items, check, "movie id")
    for name in GENRES:
        items = check.keep(items, pl.col(name).is_in(["0", "1"]), name, f"the flag is {{{name}}}, not 0 or 1")
    set_genres = [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in GENRES if name != "unknown"]
    category = pl.concat_str(set_genres, separator=", ", ignore_nulls=True)
    items = items.select("item_id", pl.col("movie title").alias("title"), category.alias("category"), *PLACE)
    columns = ("user id", "item id", "rating", "timestamp")
    raw = read_text_table(find_file(folder, "u.data"), check, separator="\t", quote=False, columns=columns)
    return items, _read_ratings(raw, check, "user id", "item id", items)


def _read_csv(folder: Path, check: RowCheck) -> tuple[pl.DataFrame, pl.DataFrame]:
    movies = read_text_table(find_file(folder, "movies.csv"), check)
    require(movies.columns, "movies.csv", "movieId", "title", "genres")
    items = read_ids(movies, check, "movieId")
    category = pl.col("genres").replace(NO_GENRE, "").str.replace_all("|", ", ", literal=True)
    items = items.select("item_id", "title", category.alias("category"), *PLACE)
    raw = read_text_table(find_file(folder, "ratings.csv"), check)
    require(raw.columns, "ratings.csv", "userId", "movieId", "rating", "timestamp")
    return items, _read_ratings(raw, check, "userId", "movieId", items)


def _read_ratings(raw: pl.DataFrame, check: RowCheck, user: str, item: str, items: pl.DataFrame) -> pl.DataFrame:
    return read_log(
        raw, check, user=user, item=item, time="timestamp", rating="rating", unit="s", known=items["item_id"]
    )

"""H&M Personalized Fashion Recommendations, as published for the Kaggle competition of 2022."""

from pathlib import Path

import polars as pl

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers.common import find_file, joined, pictures_in, read_ids, read_log, read_text_table, require
from mllm_srec.data.schema import PLACE, RowCheck
from mllm_srec.errors import UsageError

FILES = "a folder with transactions_train.csv and articles.csv, pictures in images/<first 3 digits>/"
LOOKS = ("product_type_name", "colour_group_name", "graphical_appearance_name")
PLACE_IN_SHOP = ("department_name", "section_name")
KINDS = ("index_group_name", "product_group_name", "garment_group_name")


def matches(path: Path) -> bool:
    """Whether `path` is a folder with H&M's transactions."""
    return (path / "transactions_train.csv").is_file()


def read(path: Path, check: RowCheck) -> Dataset:
    """Read purchases (day precision, no ratings) and articles.

    title is the product's name; description "type, colour, pattern. department, section. detail"; category "index
    group, product group, garment group". Ids are text: their leading zeros count.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is a file: the hm format wants {FILES}")
    articles = read_text_table(find_file(path, "articles.csv"), check)
    require(articles.columns, "articles.csv", "article_id", "prod_name", *LOOKS, *PLACE_IN_SHOP, *KINDS, "detail_desc")
    articles = read_ids(articles, check, "article_id").with_columns(
        looks=joined(*LOOKS), shop=joined(*PLACE_IN_SHOP), category=joined(*KINDS)
    )
    # "a. b. detail", each sentence with its full stop; the detail keeps its own punctuation.
    sentences = [pl.when(pl.col(name) != "").then(pl.col(name) + ".") for name in ("looks", "shop")]
    description = pl.concat_str([*sentences, pl.col("detail_desc")], separator=" ", ignore_nulls=True)
    items = articles.select(
        "item_id",
        pl.col("prod_name").alias("title"),
        description.alias("description"),
        "category",
        _images(path, articles["item_id"]),
        *PLACE,
    )
    raw = read_text_table(find_file(path, "transactions_train.csv"), check)
    require(raw.columns, "transactions_train.csv", "t_dat", "customer_id", "article_id")
    log = read_log(raw, check, user="customer_id", item="article_id", time="t_dat", known=items["item_id"])
    return Dataset.build(path.resolve().name, items, log, has_time=True, root=path, check=check)


def _images(folder: Path, ids: pl.Series) -> pl.Series:
    below = {start: pictures_in(folder, f"images/{start}") for start in ids.str.head(3).unique()}
    return pl.Series("image", [below[item[:3]].get(item) for item in ids], dtype=pl.String)

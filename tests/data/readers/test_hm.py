from pathlib import Path

import polars as pl
import pytest

from mllm_srec.data.readers import read
from mllm_srec.errors import DataError

HEADER = (
    "article_id,prod_name,product_type_name,product_group_name,graphical_appearance_name,colour_group_name,"
    "department_name,index_group_name,section_name,garment_group_name,detail_desc\n"
)
ARTICLES = (
    HEADER + "0108775015,Strap top,Vest top,Garment Upper body,Solid,Black,Jersey Basic,Ladieswear,"
    'Womens Everyday Basics,Jersey Basic,"Jersey top."\n'
    + "0667507003,Flats,Ballerinas,Shoes,,Black,,Ladieswear,,Shoes,\n"
)
LOG = (
    "t_dat,customer_id,article_id,price,sales_channel_id\n"
    "2020-01-02,c1,0667507003,0.02,1\n2020-01-01,c1,0108775015,0.01,2\n"
)


def shop(folder: Path, log: str = LOG, articles: str = ARTICLES) -> Path:
    (folder / "transactions_train.csv").write_text(log)
    (folder / "articles.csv").write_text(articles)
    return folder


def test_reads_texts_dates_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "images" / "010").mkdir(parents=True)
    (tmp_path / "images" / "010" / "0108775015.jpg").write_bytes(b"")
    dataset = read(shop(tmp_path))
    assert dataset.items.drop("extra").rows() == [
        (
            "0108775015",
            "Strap top",
            "Vest top, Black, Solid. Jersey Basic, Womens Everyday Basics. Jersey top.",
            "Ladieswear, Garment Upper body, Jersey Basic",
            "images/010/0108775015.jpg",
        ),
        ("0667507003", "Flats", "Ballerinas, Black.", "Ladieswear, Shoes, Shoes", None),
    ]
    assert dataset.interactions.rows() == [
        ("c1", "0108775015", 1577836800000, None, 0),
        ("c1", "0667507003", 1577923200000, None, 1),
    ]


@pytest.mark.parametrize(
    ("log", "articles", "message"),
    [
        (LOG + "2020-01-01,c1,999,0.1,1\n", ARTICLES, "transactions_train.csv line 4, column article_id: item 999 of"),
        (LOG + "2020-02-30,c1,0108775015,0.1,1\n", ARTICLES, "line 4, column t_dat: '2020-02-30' is not an ISO 8601"),
        (LOG.replace("customer_id", "customer"), ARTICLES, "there is no column customer_id. The columns found: t_dat"),
        (LOG, ARTICLES.replace("detail_desc", "details"), "articles.csv: there is no column detail_desc"),
        (
            LOG,
            ARTICLES + "0108775015,Again,,,,,,,,,\n",
            "articles.csv line 4, column article_id: item 0108775015 stands",
        ),
        (LOG, "", "articles.csv is empty"),
    ],
)
def test_bad_input(tmp_path: Path, log: str, articles: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(shop(tmp_path, log, articles))
    assert message in str(caught.value)


@pytest.mark.data
def test_real(real_data: Path) -> None:
    # The sample's articles.csv holds only part of the articles that its transactions name.
    with pytest.raises(DataError, match="is not in the catalogue"):
        read(real_data / "raw" / "hm")
    dataset = read(real_data / "raw" / "hm", on_bad_row="skip")
    assert (dataset.items.height, dataset.interactions.height + dataset.skipped.height) == (11_800, 31_662)
    assert dataset.skipped["reason"].str.ends_with("of the log is not in the catalogue").all()


@pytest.mark.data
def test_real_texts_are_composed_as_in_the_sample(real_data: Path) -> None:
    sample = read(real_data / "hm_sample").items
    both = read(real_data / "raw" / "hm", on_bad_row="skip").items.join(sample, on="item_id")
    assert both.height == 1692
    for column in ("title", "description", "category"):
        assert both.filter(pl.col(column) != pl.col(f"{column}_right")).height == 0

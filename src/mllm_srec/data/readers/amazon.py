"""Amazon reviews (McAuley lab): JSON lines of 2014 and 2018 (reviewerID, asin) and of 2023 (user_id, parent_asin)."""

import ast
import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers.common import Unit, items_of, read_ids, read_log, require
from mllm_srec.data.schema import ITEM_TEXTS, PLACE, RowCheck
from mllm_srec.errors import DataError, UsageError

FILES = (
    "a reviews file (.json, .jsonl, also with .gz) with meta_<same name> beside it if there is one, or a folder of "
    "*.jsonl, *.json.gz, *_5.json or reviews_*.json with meta_* files"
)
SUFFIX = re.compile(r"\.jsonl?(\.gz)?$")
CORE = re.compile(r"_\d+(core)?$")
"""What the names of k-core subsets end in: Gift_Cards_5 goes with meta_Gift_Cards."""
TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", re.DOTALL)
EXTRA = ("brand", "store", "price")


def matches(path: Path) -> bool:
    """Whether `path` is a file of JSON lines, or a folder where a name says that it holds reviews."""
    if path.is_file():
        return SUFFIX.search(path.name) is not None
    # A plain .json may be anything (a README's card, a configuration), so its name has to say more.
    return any(
        not name.endswith(".json") or name.startswith(("meta_", "reviews_")) or CORE.search(_stem(name)) is not None
        for name in (p.name for p in path.iterdir() if p.is_file() and SUFFIX.search(p.name))
    )


def read(path: Path, check: RowCheck) -> Dataset:
    """Read reviews and, if there is a meta file, its titles, descriptions with features, categories and picture URLs.

    The catalogue is the items of the meta files, then the reviewed items that they lack, without text: Amazon's meta
    is known to be incomplete, and without it no item has a text. An item that a meta file repeats with the same content
    counts once. Repeated reviews are kept: Dataset.with_repeats decides on them.
    """
    reviews, metas = _files(path)
    log = pl.concat([_read_reviews(file, check) for file in reviews])
    reviewed = items_of(log)
    if metas:
        meta = _once(pl.concat([_read_meta(file, check) for file in metas]))
        lacking = reviewed.join(meta, on="item_id", how="anti", maintain_order="left")
        items = pl.concat([meta, lacking], how="diagonal")
    else:
        items = reviewed
    name = path.resolve().name if path.is_dir() else _stem(path.name)
    return Dataset.build(name, items, log, has_time=True, root=None, check=check)


def _stem(name: str) -> str:
    return SUFFIX.sub("", name)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The reviews files and the meta files."""
    if path.is_file():
        if path.name.startswith("meta_"):
            raise UsageError(f"{path} is a meta file: name the reviews file (its meta file is found beside it)")
        stem = _stem(path.name).removeprefix("reviews_")
        wanted = {f"meta_{stem}", f"meta_{CORE.sub('', stem)}"}
        metas = [p for p in sorted(path.parent.iterdir()) if SUFFIX.search(p.name) and _stem(p.name) in wanted]
        return [path], metas[:1]
    files = sorted(p for p in path.iterdir() if p.is_file() and SUFFIX.search(p.name))
    reviews = [p for p in files if not p.name.startswith("meta_")]
    if not reviews:
        raise DataError(f"{path} holds no reviews file; the files looked for: {FILES}")
    return reviews, [p for p in files if p.name.startswith("meta_")]


def _read_reviews(path: Path, check: RowCheck) -> pl.DataFrame:
    rows = _read_json_lines(path, check)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} holds no reviews")
    found = first[1]
    newer = "user_id" in found
    unit: Unit = "ms" if newer else "s"
    user, rating, time = ("user_id", "rating", "timestamp") if newer else ("reviewerID", "overall", "unixReviewTime")
    item, fallback = ("parent_asin" if newer and "parent_asin" in found else "asin"), "asin"
    require(found, path.name, user, item, rating, time)
    names = (user, item, rating, time)
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "line")}
    for line, row in _chain(first, rows):
        for name in names:
            columns[name].append(_plain(row.get(name)))
        columns[item][-1] = columns[item][-1] or _plain(row.get(fallback))
        columns["line"].append(line)
    frame = pl.DataFrame(columns, schema=dict.fromkeys(names, pl.String) | {"line": pl.Int64})
    frame = frame.with_columns(file=pl.lit(path.name))
    return read_log(frame, check, user=user, item=item, time=time, rating=rating, unit=unit)


def _read_meta(path: Path, check: RowCheck) -> pl.DataFrame:
    rows = _read_json_lines(path, check, literals=True)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} holds no items")
    item = "parent_asin" if "parent_asin" in first[1] else "asin"
    require(first[1], path.name, item)
    schema = dict.fromkeys((item, *ITEM_TEXTS, "image", "extra"), pl.String)
    columns: dict[str, list[Any]] = {name: [] for name in (*schema, "line")}
    for line, row in _chain(first, rows):
        features = row.get("features") or row.get("feature") or []
        categories = row.get("categories") or row.get("category") or row.get("main_category") or []
        values = (
            _plain(row.get(item)),
            _clean(row.get("title")),
            " ".join(part for part in map(_clean, _flat([row.get("description"), features])) if part),
            ", ".join(dict.fromkeys(part for part in map(_clean, _flat(categories)) if part)),
            _image(row),
            json.dumps({key: row[key] for key in EXTRA if row.get(key)}, ensure_ascii=True),
            line,
        )
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    frame = pl.DataFrame(columns, schema=schema | {"line": pl.Int64}).with_columns(file=pl.lit(path.name))
    return read_ids(_once(frame), check, item)


def _once(meta: pl.DataFrame) -> pl.DataFrame:
    """The rows whose content is not that of an earlier one."""
    return meta.unique([name for name in meta.columns if name not in PLACE], keep="first", maintain_order=True)


def _chain(
    first: tuple[int, dict[str, Any]], rest: Iterator[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    yield first
    yield from rest


def _read_json_lines(path: Path, check: RowCheck, literals: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every line that is not blank.

    Args:
        literals: whether lines may be Python literals instead, as in the meta files of 2014.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
                if not line:
                    continue
                row, problem = _parse(line, literals)
                if row is None:
                    where = pl.DataFrame({"file": [path.name], "line": [number], "problem": [problem]})
                    check.keep(where, pl.lit(False), "the whole line", "{problem}")
                else:
                    yield number, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged after line {number} ({error}): download it again") from error


def _parse(line: bytes, literals: bool) -> tuple[dict[str, Any] | None, str]:
    """The object, or None and what is wrong."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "this is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        problem = f"this is not JSON ({error})"
        if not literals:
            return None, problem
        try:
            row = ast.literal_eval(line.decode("utf-8"))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None, problem
    if not isinstance(row, dict):
        return None, f"one JSON object per line is expected, this is a {type(row).__name__}"
    return row, ""


def _plain(value: Any) -> str | None:
    """A scalar as text (a lone surrogate, which no UTF-8 can hold, becomes ?)."""
    return None if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def _clean(value: Any) -> str:
    """Text without tags, entities and runs of white space."""
    text = _plain(value) or ""
    return " ".join(html.unescape(TAG.sub(" ", text)).split())


def _flat(value: Any) -> Iterator[Any]:
    """The scalars of nested lists, in order."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def _image(row: dict[str, Any]) -> str | None:
    """The first URL: 2023 has dictionaries of sizes, 2018 lists of URLs, 2014 one URL."""
    for key in ("images", "imageURLHighRes", "image", "imageURL", "imUrl"):
        for value in _flat(row.get(key)):
            urls = [value.get(size) for size in ("large", "hi_res", "thumb")] if isinstance(value, dict) else [value]
            for url in urls:
                if isinstance(url, str) and url.strip():
                    return _plain(url.strip())
    return None

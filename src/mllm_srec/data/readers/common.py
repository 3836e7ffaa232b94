"""What every reader needs: raw files as text columns with their true line numbers, and the rules that cast them."""

import csv
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from mllm_srec.data.schema import PLACE, RowCheck
from mllm_srec.errors import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MS_FROM = 1e11
"""Unix times above this are milliseconds: as seconds they would lie after the year 5000, as ms it is March 1973."""
LATEST_MS = 4_102_444_800_000
"""2100-01-01; a later time is an error in the file."""

Unit = Literal["auto", "s", "ms"]


def find_file(folder: Path, *names: str) -> Path:
    """The one file of `folder` that bears one of `names`.

    Raises:
        DataError: none or several of them exist.
    """
    present = [folder / name for name in names if (folder / name).is_file()]
    if len(present) == 1:
        return present[0]
    if present:
        raise DataError(f"{folder} holds {' and '.join(p.name for p in present)}: keep one of them")
    found = sorted(p.name for p in folder.iterdir() if p.is_file())
    raise DataError(f"{folder}: there is no {' or '.join(names)}{_found(names[0], found, 'files')}")


def require(columns: Iterable[str], file: str, *needed: str) -> None:
    """Raises DataError unless all of `needed` are among `columns`."""
    found = [name for name in columns if name not in PLACE]
    for name in needed:
        if name not in found:
            raise DataError(f"{file}: there is no column {name}{_found(name, found, 'columns')}")


def nearest(name: str, found: Iterable[str]) -> str | None:
    """The name among `found` that looks most like `name`, case aside."""
    lower = {candidate.lower(): candidate for candidate in found}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return lower[close[0]] if close else None


def read_text_table(
    path: Path,
    check: RowCheck,
    *,
    separator: str = ",",
    quote: bool = True,
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
) -> pl.DataFrame:
    """A delimited file as String columns (null where empty), with `file` and `line` (the line where a row starts).

    Blank lines are left out. Names are stripped; a raw column called file or line becomes file_ or line_.

    Args:
        quote: whether double quotes enclose fields, which may then hold separators and newlines.
        columns: the names, for a file without a header.

    Raises:
        DataError: the file is empty, not text in `encoding`, or has a quote that is never closed.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    frame = _read_fast(path, separator, quote, columns, encoding)
    if frame is None:
        frame = _read_row_by_row(path, check, separator, quote, columns, encoding)
    values = [name for name in frame.columns if name not in PLACE]
    return frame.filter(pl.any_horizontal(pl.col(values).is_not_null())) if values else frame


def read_parquet(path: Path) -> pl.DataFrame:
    """A Parquet file as String columns, with `file` and `line` (the row's number, from 1).

    Lists of text are joined by ", "; times become ISO 8601 text in UTC; whole floats lose their ".0", for integer ids
    that passed through pandas. Other nested columns become JSON.

    Raises:
        DataError: the file is not Parquet, or a column has no textual form.
    """
    try:
        frame = pl.read_parquet(path, glob=False)
        frame = frame.select(_as_text(frame[name]) for name in frame.columns)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error
    return _place(frame, path, pl.int_range(1, pl.len() + 1, dtype=pl.Int64))


def read_log(
    frame: pl.DataFrame,
    check: RowCheck,
    *,
    user: str,
    item: str,
    time: str | None = None,
    rating: str | None = None,
    unit: Unit = "auto",
    known: pl.Series | None = None,
) -> pl.DataFrame:
    """Raw text columns as user_id, item_id, timestamp (Int64 ms UTC; if `time`), rating (Float32; if `rating`).

    Args:
        frame: String columns with the raw names, and `file` and `line`.
        unit: of numeric times; auto: milliseconds if the median says so. Text in ISO 8601 is read in any case;
            without an offset it is UTC.
        known: the catalogue's item ids; other items are bad rows.
    """
    names = {user: "user_id", item: "item_id"} | ({time: "timestamp"} if time else {})
    frame = frame.select(
        *(_stripped(raw).alias(name) for raw, name in names.items()),
        *([_stripped(rating).alias("rating")] if rating else []),
        *PLACE,
    )
    frame = check.keep(frame, pl.col("user_id") != "", user, "the user has no id")
    frame = check.keep(frame, pl.col("item_id") != "", item, "the item has no id")
    if known is not None:
        is_known = pl.col("item_id").is_in(known.implode())
        frame = check.keep(frame, is_known, item, "item {item_id} of the log is not in the catalogue")
    if time:
        frame = _cast_times(frame, check, time, unit)
    if rating:
        number = pl.col("rating").cast(pl.Float32, strict=False)
        absent = pl.col("rating") == ""
        frame = check.keep(frame, absent | number.is_finite(), rating, "the rating {rating!r} is not a finite number")
        frame = frame.with_columns(rating=number)
    return frame


def read_ids(frame: pl.DataFrame, check: RowCheck, item: str) -> pl.DataFrame:
    """`frame` with the raw column `item` as item_id: stripped; rows without one, or with one of before, reported."""
    frame = frame.rename({item: "item_id"}).with_columns(_stripped("item_id"))
    frame = check.keep(frame, pl.col("item_id") != "", item, "the item has no id")
    return check.keep(frame, pl.col("item_id").is_first_distinct(), item, "item {item_id} stands here twice")


def items_of(log: pl.DataFrame) -> pl.DataFrame:
    """item_id, file, line: the items of a log in the order of their first event, for data without a catalogue."""
    return log.select("item_id", *PLACE).unique("item_id", keep="first", maintain_order=True)


def pictures_in(folder: Path, below: str) -> dict[str, str]:
    """Name without suffix -> path relative to `folder`, for the pictures that lie directly in `folder`/`below`.

    Where a name has several suffixes, the first of `PICTURE_SUFFIXES` wins.
    """
    if not (folder / below).is_dir():
        return {}
    found: dict[str, tuple[int, str]] = {}
    for path in (folder / below).iterdir():
        if path.suffix.lower() in PICTURE_SUFFIXES:
            candidate = (PICTURE_SUFFIXES.index(path.suffix.lower()), f"{below}/{path.name}")
            found[path.stem] = min(found.get(path.stem, candidate), candidate)
    return {stem: picture for stem, (_, picture) in found.items()}


def look_up(column: str, values: Mapping[str, str]) -> pl.Expr:
    """String expression: `values[column]`, null where there is none."""
    return pl.col(column).replace_strict(list(values), list(values.values()), default=None, return_dtype=pl.String)


def joined(*columns: str, separator: str = ", ") -> pl.Expr:
    """String expression: the columns' texts with `separator` between those that are not empty."""
    texts = [pl.when(_stripped(name) != "").then(_stripped(name)) for name in columns]
    return pl.concat_str(texts, separator=separator, ignore_nulls=True)


def _cast_times(frame: pl.DataFrame, check: RowCheck, label: str, unit: Unit) -> pl.DataFrame:
    frame = check.keep(frame, pl.col("timestamp") != "", label, "the time is missing")
    number = frame["timestamp"].cast(pl.Float64, strict=False)
    if 2 * number.null_count() > frame.height:
        words, first, ms = "an ISO 8601 date or time", 0.0, _iso_ms()
    else:
        if unit == "auto":
            median = number.drop_nans().median()
            unit = "ms" if isinstance(median, float) and median > MS_FROM else "s"
        words = f"a unix time in {'seconds' if unit == 's' else 'milliseconds'}"
        # Seconds in a file of milliseconds would pass for January 1970.
        first = 0.0 if unit == "s" else MS_FROM
        ms = pl.col("timestamp").cast(pl.Float64, strict=False) * (1000 if unit == "s" else 1)
    frame = frame.with_columns(ms.alias("ms"))
    finite = pl.col("ms").is_finite() if frame["ms"].dtype == pl.Float64 else pl.col("ms").is_not_null()
    frame = check.keep(frame, finite, label, "{timestamp!r} is not " + words)
    span = f"{'1970' if first == 0 else '1973'} and 2100"
    inside = pl.col("ms").is_between(first, LATEST_MS)
    frame = check.keep(frame, inside, label, f"{{timestamp!r}} as {words} is not between {span}")
    return frame.with_columns(timestamp=pl.col("ms").round().cast(pl.Int64)).drop("ms")


def _iso_ms() -> pl.Expr:
    text = pl.col("timestamp").str.replace("T", " ", literal=True).str.replace(r"\s*[Zz]$", "+00:00")
    naive = [
        text.str.to_datetime(form, strict=False, time_unit="ms")
        for form in ("%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S%.f")
    ]
    offset = [
        text.str.to_datetime(form, strict=False, time_unit="ms").dt.replace_time_zone(None)
        for form in ("%Y-%m-%d %H:%M%z", "%Y-%m-%d %H:%M:%S%.f%z")
    ]
    return pl.coalesce(*naive, *offset).dt.epoch("ms")


def _stripped(column: str) -> pl.Expr:
    return pl.col(column).fill_null("").str.strip_chars()


def _found(name: str, found: list[str], what: str) -> str:
    if not found:
        return f"; there are no {what} at all"
    shown = ", ".join(found[:30]) + (", ..." if len(found) > 30 else "")
    close = nearest(name, found)
    return f". The {what} found: {shown}" + (f". Is {close} meant? Rename it to {name}" if close else "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _place(frame: pl.DataFrame, path: Path, line: pl.Expr | pl.Series) -> pl.DataFrame:
    names = [name.strip() for name in frame.columns]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: two columns are called {name}: rename one")
    frame = frame.rename(
        {raw: f"{name}_" if name in PLACE else name for raw, name in zip(frame.columns, names, strict=True)}
    )
    return frame.with_columns(pl.lit(path.name).alias("file"), line.cast(pl.Int64).alias("line"))


def _read_fast(
    path: Path, separator: str, quote: bool, columns: Sequence[str] | None, encoding: str
) -> pl.DataFrame | None:
    """By polars; None where it refuses the file or where rows and newlines disagree, so that lines stay true."""
    try:
        frame = pl.read_csv(
            path,
            glob=False,
            separator=separator,
            quote_char='"' if quote else None,
            has_header=columns is None,
            schema=dict.fromkeys(columns, pl.String) if columns else None,
            infer_schema=False,
            encoding="utf8" if encoding == "utf-8" else encoding,
        )
    except pl.exceptions.PolarsError:
        return None
    newlines, ends_in_newline = 0, True
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            newlines, ends_in_newline = newlines + chunk.count(b"\n"), chunk.endswith(b"\n")
    header = 0 if columns else 1
    if newlines + (not ends_in_newline) == frame.height + header:
        return _place(frame, path, pl.int_range(pl.len(), dtype=pl.Int64) + 1 + header)
    inside = frame.select(pl.sum_horizontal(pl.all().str.count_matches("\n", literal=True).fill_null(0)))
    if columns or newlines + (not ends_in_newline) != frame.height + header + int(inside.to_series().sum()):
        return None
    before = inside.to_series().cast(pl.Int64).cum_sum().shift(1, fill_value=0)
    return _place(frame, path, pl.Series(range(len(before)), dtype=pl.Int64) + 1 + header + before)


def _read_row_by_row(
    path: Path, check: RowCheck, separator: str, quote: bool, columns: Sequence[str] | None, encoding: str
) -> pl.DataFrame:
    """By the csv module: slower, but it takes stray quotes and names the row that is wrong."""
    names = list(columns) if columns else []
    rows: list[list[str | None]] = []
    lines, fields = [], []
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
    with path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as file:
        reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
        start = 1
        try:
            for row in reader:
                if any(row):
                    if not names:
                        names = row
                    else:
                        cells: list[str | None] = [value or None for value in row[: len(names)]]
                        rows.append(cells + [None] * (len(names) - len(cells)))
                        lines.append(start)
                        fields.append(len(row))
                start = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} line {_first_undecodable(path, encoding)} is not {encoding.upper()} text: save the file as "
                f"{encoding.upper()}"
            ) from error
        except csv.Error as error:
            raise DataError(f"{path}, the row that starts in line {start}: {error}; correct its quotes") from error
    if not names:
        raise DataError(f"{path} is empty")
    frame = pl.DataFrame(rows, schema=dict.fromkeys(_unique(names), pl.String), orient="row")
    frame = _place(frame, path, pl.Series(lines, dtype=pl.Int64)).with_columns(pl.Series("n fields", fields, pl.Int64))
    fits = pl.col("n fields") <= len(names)
    reason = "the row has {n fields} fields, more than the " + str(len(names)) + " columns"
    return check.keep(frame, fits, names[-1], reason).drop("n fields")


def _unique(names: list[str]) -> list[str]:
    """As polars does it: a second column of the same name gets another one."""
    return [f"{name}_duplicated_{i}" if name in names[:i] else name for i, name in enumerate(names)]


def _first_undecodable(path: Path, encoding: str) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 1


def _as_text(series: pl.Series) -> pl.Series:
    dtype = series.dtype
    if isinstance(dtype, pl.List) and dtype.inner == pl.String:
        return series.list.join(", ", ignore_nulls=True)
    if isinstance(dtype, pl.List | pl.Array | pl.Struct):
        packed = series.to_frame().select(pl.struct(value=series).struct.json_encode().alias(series.name)).to_series()
        return packed.str.strip_prefix('{"value":').str.strip_suffix("}")
    if isinstance(dtype, pl.Datetime) and dtype.time_zone:
        series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    if dtype.is_float() and series.drop_nulls().round().equals(series.drop_nulls()) and series.is_finite().all():
        series = series.cast(pl.Int64)
    return series.cast(pl.String)

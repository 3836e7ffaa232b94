"""Readers: raw files of the published layouts become a checked Dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.readers import amazon, hm, microlens, movielens, recbole, table
from mllm_srec.data.readers.common import nearest
from mllm_srec.data.schema import OnBadRow, RowCheck
from mllm_srec.errors import DataError, UsageError


class Format(NamedTuple):
    """A layout of raw files."""

    read: Callable[[Path, RowCheck], Dataset]
    matches: Callable[[Path], bool]
    """Whether the names of the files say that a path holds this layout."""
    files: str
    """What `matches` looks for, in words."""


FORMATS = {
    "table": Format(table.read, table.matches, table.FILES),
    "movielens": Format(movielens.read, movielens.matches, movielens.FILES),
    "amazon": Format(amazon.read, amazon.matches, amazon.FILES),
    "hm": Format(hm.read, hm.matches, hm.FILES),
    "microlens": Format(microlens.read, microlens.matches, microlens.FILES),
    "recbole": Format(recbole.read, recbole.matches, recbole.FILES),
}


def read(path: str | Path, fmt: str = "auto", on_bad_row: OnBadRow = "stop") -> Dataset:
    """Raw files as a Dataset, named after the folder or file.

    Args:
        path: a folder, or for amazon and recbole also a file.
        fmt: a name of `FORMATS`; auto tells it by the names of the files.
        on_bad_row: stop at the first bad row, or skip and list such rows in `Dataset.skipped`.

    Raises:
        UsageError: `path` does not exist, `fmt` is unknown, or auto finds no layout or several.
        DataError: a file or column is missing, a file is damaged, or a row is bad.
    """
    path = Path(path)
    if fmt not in ("auto", *FORMATS):
        close = nearest(fmt, FORMATS)
        raise UsageError(
            f"format {fmt!r} is unknown{f': is {close} meant?' if close else ''}. Choose auto, {', '.join(FORMATS)}"
        )
    if on_bad_row not in ("stop", "skip"):
        raise UsageError(f"on_bad_row is {on_bad_row!r}: choose stop or skip")
    if not path.exists():
        raise UsageError(f"there is no file or folder {path}")
    try:
        return FORMATS[_detect(path) if fmt == "auto" else fmt].read(path, RowCheck(on_bad_row))
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _detect(path: Path) -> str:
    found = [name for name, layout in FORMATS.items() if layout.matches(path)]
    if len(found) == 1:
        return found[0]
    known = "\n".join(f"  {name}: {layout.files}" for name, layout in FORMATS.items())
    if found:
        raise UsageError(f"{path} could be {' or '.join(found)}: name one with --format. The formats are\n{known}")
    raise UsageError(
        f"{path} looks like none of the known formats:\n{known}\nName one with --format to see what is missing"
    )

"""Files that are whole or absent: atomic writes, manifests with checksums, fingerprints, errors that name a place."""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_srec.errors import StoreError

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
"""Folders of this name hold what a training run may still change; manifests leave them out."""
_TEMPORARY = ".tmp"


@contextmanager
def storing(place: str) -> Iterator[None]:
    """Turn what the file system, or LanceDB below it, raises while `place` is written into a `StoreError`.

    Only calls that write belong inside: LanceDB reports a full disk as a plain RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _is_disk_full(error):
            raise StoreError(
                f"disk full while writing {place}: free space, then run the same command again; finished rows are kept"
            ) from error
        raise StoreError(f"cannot write {place}: {error}") from error


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    codes = (f"os error {errno.ENOSPC})", f"os error {errno.EDQUOT})", f"[Errno {errno.ENOSPC}]")
    return "No space left" in str(error) or any(code in str(error) for code in codes)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) so that, whatever happens, `path` holds the old content or the new, never a part.

    Raises:
        StoreError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    with storing(str(path)):
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(*parts: str | bytes | int | float | bool | None) -> str:
    """SHA-256 (hex) of `parts`, each with its type and length, so that ("ab", "c") and ("a", "bc"), 1 and "1" differ.

    Raises:
        TypeError: a part is of another type.
    """
    digest = hashlib.sha256()
    for part in parts:
        tag, data = _encoded(part)
        digest.update(tag + len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _encoded(part: str | bytes | int | float | bool | None) -> tuple[bytes, bytes]:
    if part is None:
        return b"n", b""
    if isinstance(part, bool):  # before int: True is an int
        return b"b", bytes([part])
    if isinstance(part, str):
        return b"s", part.encode()
    if isinstance(part, bytes):
        return b"y", part
    if isinstance(part, int):
        return b"i", str(part).encode()
    if isinstance(part, float):
        return b"f", struct.pack(">d", part)
    raise TypeError(f"a fingerprint's part is a {type(part).__name__}: use str, bytes, int, float, bool or None")


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write `manifest.json`: `facts`, and under "files" SHA-256 and bytes of every file below `folder`.

    Call it last: a folder with a manifest is finished. Left out are the manifest itself, leftovers of interrupted
    writes, and everything in folders named `checkpoints`.

    Raises:
        StoreError: a file cannot be read or the manifest cannot be written.
        ValueError: `facts` has a key "files".
    """
    if "files" in facts:
        raise ValueError('"files" is the manifest\'s own key')
    with storing(str(folder / MANIFEST)):
        files = {
            name: {"sha256": _sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in _names(folder)
        }
    atomic_write(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=2, ensure_ascii=False))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote ("files" included), after every file it lists has been read and compared.

    Raises:
        StoreError: the manifest or a file it lists is missing, damaged or changed.
    """
    path = folder / MANIFEST
    remedy = "run `mllm-srec run WS` again (WS: the workspace's folder)"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise StoreError(f"{path} is missing, {folder} is not finished: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from None
    for name, (sha256, size) in expected.items():
        file = folder / name
        try:
            good = file.stat().st_size == size and _sha256(file) == sha256
        except FileNotFoundError:
            raise StoreError(f"{file} is missing: {remedy}") from None
        except OSError as error:
            raise StoreError(f"{file} cannot be read ({error}): {remedy}") from None
        if not good:
            raise StoreError(f"{file} is damaged or was changed after {path} was written: {remedy}")
    return manifest


def _names(folder: Path) -> list[str]:
    below = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [
        name.as_posix()
        for name in below
        if name != Path(MANIFEST) and name.suffix != _TEMPORARY and CHECKPOINTS not in name.parts[:-1]
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

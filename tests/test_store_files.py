"""Files are whole or absent, damage is found, fingerprints differ exactly where their parts do."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.errors import StoreError
from mllm_srec.store_files import atomic_write, fingerprint, read_manifest, write_manifest


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    atomic_write(path, "né")
    assert path.read_bytes() == "né".encode()
    atomic_write(path, b"\xff")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"disk full while writing .*file.txt"):
        atomic_write(path, "new")
    assert path.read_bytes() == b"\xff"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def make_run(folder: Path) -> None:
    for name in ("metrics.json", "adapter/weights", "adapter/manifest.json", "checkpoints/step-1/weights", ".x.1.tmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_manifest(folder, {"version": "1", "model": "m"})


def test_a_manifest_lists_what_counts(tmp_path: Path) -> None:
    make_run(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest["version"], manifest["model"]) == ("1", "m")
    assert sorted(manifest["files"]) == ["adapter/manifest.json", "adapter/weights", "metrics.json"]
    assert manifest["files"]["metrics.json"]["bytes"] == 12
    (tmp_path / "checkpoints/step-1/weights").write_text("later")
    assert read_manifest(tmp_path) == manifest
    with pytest.raises(ValueError, match="own key"):
        write_manifest(tmp_path, {"files": []})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter/weights", "adapter/weightz", "adapter/weights is damaged or was changed"),
        ("adapter/weights", "adapter", "adapter/weights is damaged or was changed"),
        ("metrics.json", None, "metrics.json is missing"),
        ("manifest.json", None, "manifest.json is missing, .* is not finished"),
        ("manifest.json", '{"version": "1"', "manifest.json is damaged"),
        ("manifest.json", "[]", "manifest.json is damaged"),
        ("manifest.json", '{"files": {"metrics.json": 3}}', "manifest.json is damaged"),
    ],
)
def test_damage_to_a_run_is_found(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    make_run(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(StoreError, match=rf"{message}.*: run `mllm-srec run WS` again"):
        read_manifest(tmp_path)


part = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()


def typed(parts: list[object]) -> list[tuple[str, str]]:
    return [(type(value).__name__, repr(value)) for value in parts]


@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
def test_fingerprints_differ_exactly_where_the_parts_do(left: list, right: list) -> None:
    assert (fingerprint(*left) == fingerprint(*right)) == (typed(left) == typed(right))


@given(st.text(), st.text(min_size=1), st.text())
def test_moving_a_boundary_changes_the_fingerprint(a: str, b: str, c: str) -> None:
    assert fingerprint(a + b, c) != fingerprint(a, b + c)


def test_types_count_in_fingerprints() -> None:
    values = [None, "", b"", 0, "0", 0.0, False, b"0", "None", 1, True, 1.0, "1"]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert len({fingerprint(), fingerprint(None), fingerprint(None, None)}) == 3
    # The layout is fixed: stored rows must outlive a change of this code.
    layout = b"s" + (1).to_bytes(8, "big") + b"a" + b"i" + (2).to_bytes(8, "big") + b"12"
    assert fingerprint("a", 12) == hashlib.sha256(layout).hexdigest()
    with pytest.raises(TypeError, match="float32"):
        fingerprint(np.float32(1))  # type: ignore[arg-type]

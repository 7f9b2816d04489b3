"""Files that survive: whole or absent, sealed shards, one owner, the ledger."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import files
from runtime.errors import StateError

ROOT = Path(__file__).parent.parent.parent
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- single files -----------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file.bin"
    files.write_bytes(target, b"old")
    files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new" and names(target.parent) == ["file.bin"]
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    files.write_bytes(target, b"old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_bytes(target, b"new")
    assert target.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL between the write and the rename: the old file stays; the leftover is known by its name."""
    target = tmp_path / "file"
    files.write_text(target, "old")
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom runtime import files\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"files.write_text(Path({str(target)!r}), 'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old" and len(names(tmp_path)) == 2
    files.remove_stale(tmp_path)
    assert names(tmp_path) == ["file"]


@settings(max_examples=30, deadline=None)
@given(JSON)
def test_json_round_trip(value: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "value.json"
        files.write_json(path, value)
        assert files.read_json(path) == value


def test_json_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for content in (None, b"{", b"\xff\xfe"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StateError, match=r"state\.json: cannot be read as JSON .*; delete it and run"):
            files.read_json(path)


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"a" * ((1 << 20) + 1))
    assert files.sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert files.sha256_json({"b": 1, "a": [2]}) == files.sha256_json({"a": [2], "b": 1})
    assert files.sha256_json({"a": [2, 3]}) != files.sha256_json({"a": [3, 2]})


# --- directories ------------------------------------------------------


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    with files.new_directory(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists() and temporary.parent == tmp_path
    with files.new_directory(target) as temporary:
        (temporary / "b").write_text("2")
        assert names(target) == ["a"]
    assert names(target) == ["b"] and names(tmp_path) == ["stage"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    with files.new_directory(target) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), files.new_directory(target) as temporary:
        (temporary / "b").write_text("2")
        raise KeyboardInterrupt
    assert names(target) == ["a"] and names(tmp_path) == ["stage"]


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(StateError, match="file: is a file, wanted a directory"):
        files.make_directory(taken)
    with pytest.raises(StateError, match="cannot be made"), files.new_directory(taken / "a" / "b"):
        pytest.fail("a directory below a file")
    with pytest.raises(StateError, match="is a file"), files.lock(taken):
        pytest.fail("a lock in a file")


def test_stale_files_and_directories_go(tmp_path: Path) -> None:
    (tmp_path / f"{files.TEMP_PREFIX}dir").mkdir()
    (tmp_path / f"{files.TEMP_PREFIX}dir" / "x").write_text("x")
    (tmp_path / f"{files.TEMP_PREFIX}file").write_text("x")
    (tmp_path / "kept").write_text("x")
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    (deep / f"{files.TEMP_PREFIX}shard").write_text("half")
    files.remove_stale(tmp_path)
    assert names(deep) == []
    assert names(tmp_path) == ["deep", "kept"]


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\nfrom runtime import files\n"
        f"with files.lock(Path({str(tmp_path)!r})):\n    print('held', flush=True); input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdin is not None
    with other.stdout, other.stdin:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StateError, match="another run is using it; wait for it or choose another --out"):
            files.lock(tmp_path).__enter__()
        other.kill()
        other.wait()
    with files.lock(tmp_path):  # a killed owner owns nothing
        pass
    with files.lock(tmp_path):
        pass


# --- ledger -----------------------------------------------------------


def test_ledger(tmp_path: Path) -> None:
    ledger = files.Ledger(tmp_path / "ledger.jsonl")
    assert ledger.entries() == []
    ledger.add({"stage": "teacher", "seconds": 1.5})
    ledger.add({"stage": "pool", "seconds": 2.0})
    assert [entry["stage"] for entry in files.Ledger(ledger.path).entries()] == ["teacher", "pool"]


def test_a_cut_ledger_line_is_dropped(tmp_path: Path) -> None:
    ledger = files.Ledger(tmp_path / "ledger.jsonl")
    ledger.add({"stage": "teacher"})
    with ledger.path.open("a") as stream:
        stream.write('{"stage": "po')
    assert ledger.entries() == [{"stage": "teacher"}]
    ledger.add({"stage": "pool"})
    assert ledger.path.read_text() == '{"stage": "teacher"}\n{"stage": "pool"}\n'


# --- sealed shards ----------------------------------------------------

ROWS = [[1, [5, 6, 2], 3, [-0.25, -1.5, -0.125]], [2, [7], 1, [-2.0]], [9, "naïve\u2028\x0b\x85 text", {}]]


@settings(max_examples=50, deadline=None)
@given(st.lists(JSON, max_size=4))
def test_shard_round_trip(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "00000.jsonl"
        files.write_shard(path, rows)
        assert files.read_shard(path) == rows
        assert json.loads(path.read_text().splitlines()[-1])["rows"] == len(rows)


def readable_or_refused(path: Path) -> None:
    """The rows as they were written, or one clear line: never other rows, never another error."""
    try:
        assert files.read_shard(path) == ROWS
    except StateError as error:
        assert str(path) in str(error) and "delete this file and run again" in str(error)


def test_a_shard_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    files.write_shard(path, ROWS)
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # without its last newline it is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match="seal does not match"):
            files.read_shard(path)


@pytest.mark.parametrize("change", [1, 7, 128], ids=["low bit", "three bits", "high bit"])
def test_a_shard_with_one_changed_byte(tmp_path: Path, change: int) -> None:
    path = tmp_path / "00000.jsonl"
    files.write_shard(path, ROWS)
    whole = path.read_bytes()
    body = whole.rstrip().rfind(b"\n") + 1
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        readable_or_refused(path)
        if place < body:
            with pytest.raises(StateError):
                files.read_shard(path)


def test_a_shard_with_rows_added_or_dropped(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    files.write_shard(path, ROWS)
    lines = path.read_text().splitlines(keepends=True)
    for changed in (lines[1:], [lines[1], lines[0], *lines[2:]], ["[0]\n", *lines], [*lines, "[0]\n"]):
        path.write_text("".join(changed))
        with pytest.raises(StateError):
            files.read_shard(path)

"""Files that survive a kill -9: atomic writes, hashes, one owner per directory, the ledger of stages.

In: paths and bytes. Out: files that are either absent or whole. Not here: what the files mean.
Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import StateError

try:
    import fcntl
except ImportError:  # Windows: the runtime works there; stages that write do not
    fcntl = None  # type: ignore[assignment]

TEMP_PREFIX = ".tmp-"


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMP_PREFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """Make a directory and those above it. Raises StateError where a file has the name, or nobody may."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        why = "is a file" if path.is_file() else f"cannot be made ({error.strerror})"
        raise StateError(f"{path}: {why}, wanted a directory; choose another place") from error


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises StateError naming the file when it is absent or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StateError(f"{path}: cannot be read as JSON ({error}); delete it and run again") from error


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends without an error.

    A directory already at `path` is replaced in two renames, the old one deleted last.
    """
    make_directory(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{path.name}-", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}old-", dir=path.parent))
            path.replace(old / path.name)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_stale(directory: Path) -> None:
    """Delete what an interrupted writer left, at any depth. Only call while holding the directory's lock."""
    for stale in sorted(directory.rglob(f"{TEMP_PREFIX}*")):
        shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process. Raises StateError when another process holds it.

    The kernel releases the lock when the process ends, however it ends.
    """
    if fcntl is None:
        raise StateError(f"{directory}: this platform has no file locks; run this command on Linux or macOS")
    make_directory(directory)
    with (directory / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(
                f"{directory}: another run is using it; wait for it or choose another --out"
            ) from error
        yield


class Ledger:
    """Seconds, peak memory and facts of each finished stage: one JSON object a line, append-only.

    A last line cut by a kill is ignored, and overwritten by the next entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def add(self, entry: dict[str, Any]) -> None:
        lines = [*map(json.dumps, self.entries()), json.dumps(entry)]
        write_text(self.path, "\n".join(lines) + "\n")


def write_shard(path: Path, rows: list[Any]) -> None:
    """Write rows as JSON lines, sealed by a last line with their count and hash: never half a shard."""
    body = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    seal = {"rows": len(rows), "sha256": hashlib.sha256(body.encode()).hexdigest()}
    write_text(path, body + json.dumps(seal) + "\n")


def read_shard(path: Path) -> list[Any]:
    """Rows of a sealed shard. Raises StateError when the seal is missing or does not match."""
    *lines, last = path.read_bytes().splitlines(keepends=True) or [b""]
    try:
        seal = json.loads(last)["sha256"]
    except (ValueError, KeyError, TypeError):
        seal = "none"
    if seal != hashlib.sha256(b"".join(lines)).hexdigest():
        raise StateError(f"{path}: the shard's seal does not match its rows; delete this file and run again")
    return [json.loads(line) for line in lines]

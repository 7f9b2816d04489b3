"""Responses of shards that are not sealed yet: each is on disk as soon as a server has given it.

In: responses as they arrive. Out: the same after a kill -9, so that none is paid for twice.
Not here: sealed shards (responses.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.answers.engines import Drawn
from runtime.errors import StateError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota, or file-size limit) into a StateError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB"
        raise StateError(
            f"{path}: cannot be written ({error.strerror}; free there: {free}). Sealed shards and kept "
            "responses are whole; free some space, then run the same command again: it goes on from here"
        ) from error


class Partial:
    """What has arrived for one shard: a line a request, append-only. A last line cut by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.drawn: dict[int, dict[int, Drawn]] = {}
        """Place in the shard -> number of the draw -> response."""
        self._end = 0
        if path.exists():
            body = path.read_bytes()
            self._end = body.rfind(b"\n") + 1
            for line in body[: self._end].splitlines():
                with contextlib.suppress(ValueError):
                    self._take(json.loads(line))

    def add(self, slot: int, first: int, drawn: Sequence[Drawn]) -> None:
        """Append draws `first`, `first + 1`, ... of the sample in place `slot`. Raises StateError on a full
        disk; the file then holds what it held."""
        row = [slot, first, [[d.ids, d.log_probs, d.finished, d.retokenised] for d in drawn]]
        line = (json.dumps(row, separators=(",", ":")) + "\n").encode()
        with room_for(self.path):
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.ftruncate(handle, self._end)
                os.lseek(handle, self._end, os.SEEK_SET)
                written = 0
                while written < len(line):
                    written += os.write(handle, line[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, self._end)
                raise
            finally:
                os.close(handle)
        self._end += len(line)
        self._take(row)

    def _take(self, row: list[Any]) -> None:
        slot, first, some = row
        for number, (ids, log_probs, finished, retokenised) in enumerate(some, first):
            kept = None if log_probs is None else tuple(log_probs)
            self.drawn.setdefault(slot, {})[number] = Drawn(tuple(ids), kept, finished, retokenised)


class Reserve:
    """Room on the disk for what is still under way when it fills up. Raises StateError without that room."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        with room_for(path):
            try:
                with path.open("wb") as stream:
                    for start in range(0, size, 1 << 20):
                        stream.write(bytes(min(1 << 20, size - start)))
            except OSError:
                path.unlink(missing_ok=True)
                raise

    def release(self) -> None:
        self.path.unlink(missing_ok=True)

"""What a run has cost, stage by stage: seconds, tokens, bytes, memory (METHOD 9).

In: stages as they run, what they have made. Out: a ledger line a stage, sums for `metrics.json`.
Not here: bars, what a stage does.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runtime import files

Made = Callable[[], dict[str, float]]
"""What a stage has made when it ends: `tokens`, `bytes`; totals, so that a repeated stage counts once."""


def nothing() -> dict[str, float]:
    return {}


class Account:
    """Times stages; the main process keeps them. A stage inside another is not part of the outer one's
    seconds. What a kill cuts off is not counted: its work is done and timed again, but for what was kept."""

    def __init__(self, path: Path, *, main: bool, say: Callable[[str, float], None]) -> None:
        self.ledger, self.main, self.say = files.Ledger(path), main, say
        self._inside = [0.0]

    @contextlib.contextmanager
    def stage(self, name: str, made: Made = nothing) -> Iterator[None]:
        started = time.monotonic()
        self._inside.append(0.0)
        try:
            yield
        finally:
            whole = time.monotonic() - started
            seconds = whole - self._inside.pop()
            self._inside[-1] += whole
        if self.main:
            entry = {"stage": name, "seconds": round(seconds, 2), "peak_rss_mib": round(peak_mib(), 1)}
            self.ledger.add({**entry, **made()})
            self.say(name, seconds)

    def sums(self) -> list[dict[str, Any]]:
        """A line a stage in the order of their first end: seconds of all its runs, the last totals, the
        highest peak."""
        found: dict[str, dict[str, Any]] = {}
        for entry in self.ledger.entries():
            line = found.setdefault(entry["stage"], {"stage": entry["stage"], "seconds": 0.0})
            seconds = line["seconds"] + entry["seconds"]
            peak = max(line.get("peak_rss_mib", 0.0), entry["peak_rss_mib"])
            line |= {**entry, "seconds": round(seconds, 2), "peak_rss_mib": peak}
        return list(found.values())


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**10 if sys.platform != "darwin" else 2**20)


def size(*directories: Path) -> int:
    """Bytes of the files below some directories."""
    return sum(p.stat().st_size for directory in directories for p in directory.rglob("*") if p.is_file())

"""How fast this machine's processor reads memory, by plain loops over a buffer that no cache holds.

In: threads, seconds. Out: a `Bandwidth`. Not here: GPUs; what a model reads
(`evals/bench/bench_facts.py`).

After McCalpin's STREAM (1995): several loops, the best of many repeats. The loops are numpy's and its BLAS's,
one slice per thread; what they reach is a lower bound of what the hardware can do.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from evals.bench import system
from evals.bench.bench_conditions import Bandwidth
from runtime.errors import InputError

BUFFER_BYTES = 256 << 20
MEMORY_SHARE = 8
"""The buffer is at most this part of the memory."""
LEAST_REPEATS = 5

Floats = NDArray[np.float32]
Loop = Callable[[Floats, Floats], object]

LOOPS: dict[str, tuple[Loop, int]] = {
    "sum of products": (lambda a, b: np.dot(a, b), 2),
    "largest value": (lambda a, b: a.max(), 1),
    "copy": (lambda a, b: np.copyto(b, a), 2),
}
"""Name -> (loop over a slice of two buffers, how many of the two it reads or writes)."""


def measure(
    threads: int, *, seconds: float = 2.0, buffer_bytes: int = BUFFER_BYTES, memory_mib: float | None = None
) -> Bandwidth:
    """The best loop's best repeat, in GB (10^9 bytes) a second.

    `buffer_bytes`: of one of two buffers, less where memory is small. Takes about `seconds`, and at least
    LEAST_REPEATS passes of each loop. Raises InputError when threads or buffer cannot be used.
    """
    memory = memory_mib or system.kib(system.HERE.proc / "meminfo", "MemTotal") or 4096.0
    size = min(buffer_bytes, int(memory * (1 << 20)) // MEMORY_SHARE) // 4
    if threads < 1 or size < threads:
        raise InputError(f"bandwidth: got {threads} threads and a buffer of {buffer_bytes} bytes")
    first, second = np.ones(size, np.float32), np.zeros(size, np.float32)
    cuts = np.linspace(0, size, threads + 1).astype(int)
    slices = [(first[a:b], second[a:b]) for a, b in itertools.pairwise(cuts)]
    found: dict[str, list[float]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, (loop, passes) in LOOPS.items():
            found[name] = _rates(pool, loop, slices, passes * size * 4, seconds / len(LOOPS))
    best = max(found, key=lambda name: max(found[name]))
    return Bandwidth(
        read_gb_s=max(found[best]),
        loop=best,
        threads=threads,
        buffer_bytes=size * 4,
        samples_gb_s=tuple(found[best]),
        loops_gb_s={name: max(rates) for name, rates in found.items()},
    )


def _rates(
    pool: ThreadPoolExecutor, loop: Loop, slices: list[tuple[Floats, Floats]], moved: int, seconds: float
) -> list[float]:
    """GB a second of one pass after the other; the first pass, which touches the pages, does not count."""

    def once() -> None:
        for done in [pool.submit(loop, a, b) for a, b in slices]:
            done.result()

    once()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < LEAST_REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        once()
        found.append(moved / (time.perf_counter() - start) / 1e9)
    return found

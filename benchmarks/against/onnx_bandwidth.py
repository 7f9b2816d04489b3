"""How fast this machine reads memory, beside `benchmarks/onnx.py`'s arms.

    python onnx_bandwidth.py WORK [--threads N] [--mib 512]

The largest value of a float32 array that no cache holds, one slice a thread; numpy's loops let go of the
interpreter. The best of several passes of two reductions is told in GB/s, 1e9 bytes: a token's weights cannot
be read faster than that.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_common as common

PASSES = 7


def gb_s(mib: int, threads: int) -> float:
    data = np.ones(mib * 2**18, np.float32)
    slices = np.array_split(data, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for reduce in (np.maximum.reduce, np.add.reduce):
            for _ in range(PASSES):
                start = time.perf_counter()
                list(pool.map(reduce, slices))
                best = min(best, time.perf_counter() - start)
    return data.nbytes / best / 1e9


def main(options: Any) -> None:
    common.finish(ms=[], gb_s=gb_s(options.mib, options.threads))


if __name__ == "__main__":
    main(common.options(("--mib", {"type": int, "default": 512})))

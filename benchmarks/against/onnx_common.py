"""What the arms of `benchmarks/onnx.py` share: their options, their one line of measurements.

Standard library alone: the arms run in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_STEPS = 4


def import_from_root() -> None:
    """Let an arm import the project, and never `benchmarks/onnx.py` in the place of the library `onnx`."""
    here = Path(__file__).resolve().parent
    rest = [x for x in sys.path if Path(x or ".").resolve() not in (here.parent, here)]
    sys.path[:] = [str(here.parents[1]), *rest]


def options(*more: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """`WORK --threads N` and what the arm itself takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    for name, settings in more:
        parser.add_argument(name, **settings)
    return parser.parse_args()


DECODE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--model", {"default": ""}),
    ("--past", {"type": int, "default": 128}),
    ("--steps", {"type": int, "default": 32}),
)
"""Options of an arm that decodes."""


def prompt_ids(count: int, vocab: int) -> list[int]:
    """`count` ordinary token ids, the same in every arm."""
    draw = random.Random(count)
    return [draw.randrange(300, vocab) for _ in range(count)]


def decode_ms(step: Callable[[], Any], steps: int) -> list[float]:
    """Milliseconds of each of `steps` calls, after a few that warm up."""
    for _ in range(WARM_STEPS):
        step()
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def resident_mib(field: str = "VmHWM") -> float:
    """Most memory that this process ever held (VmHWM) or holds now (VmRSS), as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


def finish(**found: Any) -> None:
    """Print the one line that the driver reads."""
    print("RESULT " + json.dumps({**found, "peak_mib": resident_mib()}), flush=True)

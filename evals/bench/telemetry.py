"""What a device does while something runs on it: heat, clock and power, every few seconds.

In: the running system. Out: a file of JSON lines, one a sample; a sentence about them. Not here: what is
timed; the energy of an answer (`evals/bench/energy.py`), which samples faster.

`python -m evals.bench.telemetry FILE` samples until it is ended. On NVIDIA's boards a sample keeps the line
of tegrastats as it is: memory, loads, clocks, temperatures and rails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from evals import power
from evals.bench import system
from evals.bench.system import HERE, Roots
from evals.records import Amount, Record

INTERVAL_S = 2.0


class Sample(Record):
    """at_s: since the sampler began. watt: of the rails in `scope`; a mean where energy is counted."""

    at_s: Amount
    mhz: Amount | None = None
    celsius: dict[str, float] = Field(default_factory=dict)
    watt: Amount | None = None
    scope: str | None = None
    tegrastats: str | None = None

    @property
    def empty(self) -> bool:
        return self.mhz is None and not self.celsius and self.watt is None and self.tegrastats is None


def samples(interval_s: float = INTERVAL_S, roots: Roots = HERE) -> Iterator[Sample]:
    """Endless; ends at once where the system shows none of it."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        draw = _power(interval_s, roots, stack)
        while True:
            time.sleep(interval_s)
            celsius = {zone.zone: zone.celsius for zone in system.temperatures(roots)}
            sample = Sample(
                at_s=time.monotonic() - began,
                mhz=system.mhz(roots),
                celsius=celsius,
                **(draw() if draw else {}),
            )
            if sample.empty:
                return
            yield sample


def _power(
    interval_s: float, roots: Roots, stack: contextlib.ExitStack
) -> Callable[[], dict[str, Any]] | None:
    """A function that tells the present power; None where there is no meter."""
    command = shutil.which("tegrastats") if roots == HERE else None
    if command:
        return _tegrastats(command, interval_s, stack)
    meter = power.find(roots)
    if isinstance(meter, str):
        return None
    stack.callback(meter.close)
    meter.start()
    mark = time.monotonic()

    def draw() -> dict[str, Any]:
        nonlocal mark
        joule, now = meter.joule(), time.monotonic()
        seconds, mark = now - mark, now
        meter.start()
        return {"watt": joule / seconds, "scope": meter.scope}

    return draw


def _tegrastats(command: str, interval_s: float, stack: contextlib.ExitStack) -> Callable[[], dict[str, Any]]:
    child = subprocess.Popen(
        [command, "--interval", str(int(interval_s * 1000))], stdout=subprocess.PIPE, text=True
    )
    latest: list[str] = []

    def follow() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            latest[:] = [line.strip()]

    threading.Thread(target=follow, daemon=True, name="tegrastats").start()
    stack.callback(child.wait)
    stack.callback(child.terminate)

    def draw() -> dict[str, Any]:
        if not latest:
            return {}
        found = power.tegrastats_watt(latest[0])
        rails = {"watt": found[1], "scope": " + ".join(found[0])} if found else {}
        return {"tegrastats": latest[0], **rails}

    return draw


def sentence(lines: Sequence[str]) -> str | None:
    """What samples come to: the hottest zone first and last, mean and most power, clock; None without any."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed sampler
            found.append(Sample.model_validate_json(line))
    if not found:
        return None
    words = []
    zones = [max(one.celsius, key=lambda name: one.celsius[name]) for one in found if one.celsius]
    if zones:
        zone = max(zones, key=lambda name: max(one.celsius.get(name, -300.0) for one in found))
        values = [one.celsius[zone] for one in found if zone in one.celsius]
        words.append(f"{zone} {values[0]:.1f} to {values[-1]:.1f} °C, most {max(values):.1f}")
    watts = [one.watt for one in found if one.watt is not None]
    if watts:
        scope = next(one.scope for one in found if one.scope)
        words.append(f"{scope} {sum(watts) / len(watts):.2f} W mean, most {max(watts):.2f}")
    clocks = [one.mhz for one in found if one.mhz is not None]
    if clocks:
        words.append(f"clock {min(clocks):.0f} to {max(clocks):.0f} MHz")
    return f"telemetry, {len(found)} samples in {found[-1].at_s:.0f} s: {'; '.join(words)}" if words else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.bench.telemetry", description="Sample until ended."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help="seconds")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with given.out.open("a") as out:
        for sample in samples(given.interval):
            out.write(json.dumps(sample.model_dump(exclude_defaults=True)) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

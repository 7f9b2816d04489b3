"""Meters that a Linux machine may have: processor counters, power rails, tegrastats, a battery.

In: /sys. Out: a `Meter`, or the reason why there is none. Not here: what runs meanwhile (`bench/energy.py`).

A counter is read twice and costs nothing between. A power gauge is read ten times a second by a thread, and
its watts are integrated by trapezoids. What sees the whole board is taken first, the processor's own last.
"""

from __future__ import annotations

import itertools
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from evals.bench.bench_conditions import EnergySource
from evals.bench.system import HERE, Roots, number, text

GAUGE_S = 0.1
WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN", "VDD_TOTAL")
"""Rails that already are the sum; where one exists, it alone is taken."""
TEGRASTATS_RAIL = re.compile(r"(\w+) (\d+)mW/\d+mW")


class Meter(Protocol):
    """Energy since `start`. `scope`: what it sees."""

    @property
    def source(self) -> EnergySource: ...

    @property
    def scope(self) -> str: ...

    def start(self) -> None: ...

    def joule(self) -> float:
        """Since the last `start`; ends the measurement."""

    def close(self) -> None: ...


class Counter:
    """Files that count microjoules and begin again after their range."""

    source: EnergySource

    def __init__(self, source: EnergySource, scope: str, files: Sequence[tuple[Path, float | None]]) -> None:
        """files: (counter, largest value in microjoules or None)."""
        self.source, self.scope, self._files = source, scope, list(files)
        self._before: list[float] = []

    def start(self) -> None:
        self._before = self._read()

    def joule(self) -> float:
        total = 0.0
        for early, late, (_, largest) in zip(self._before, self._read(), self._files, strict=True):
            if late < early:  # at most one overflow: ranges last for many minutes
                late += largest or 0.0
            total += max(0.0, late - early)
        return total / 1e6

    def close(self) -> None:
        pass

    def _read(self) -> list[float]:
        return [number(path) or 0.0 for path, _ in self._files]


class Gauge:
    """A function that tells watts, read by a thread."""

    source: EnergySource

    def __init__(
        self,
        source: EnergySource,
        scope: str,
        watt: Callable[[], float | None],
        close: Callable[[], None] | None = None,
        interval_s: float = GAUGE_S,
    ) -> None:
        self.source, self.scope = source, scope
        self._watt, self._close, self._interval_s = watt, close, interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._samples: list[tuple[float, float]] = []

    def start(self) -> None:
        self._end()
        self._stop.clear()
        self._samples = []
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="power gauge", daemon=True)
        self._thread.start()

    def joule(self) -> float:
        self._end()
        self._sample()
        return integrate(self._samples)

    def close(self) -> None:
        self._end()
        if self._close:
            self._close()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        if (watt := self._watt()) is not None:
            self._samples.append((time.perf_counter(), watt))

    def _end(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._thread = None


def integrate(samples: Sequence[tuple[float, float]]) -> float:
    """Joule of (seconds, watt) samples by trapezoids; 0 for fewer than two."""
    pairs = itertools.pairwise(samples)
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairs)


def find(roots: Roots = HERE) -> Meter | str:
    """The best meter of this machine, or why there is none."""
    if platform.system() != "Linux":
        return f"{platform.system()}: the system's own power tools need root; not read here"
    for maker in (_rails, _tegrastats, _battery, _rapl):
        if (found := maker(roots)) is not None:
            return found
    if hidden := _rapl_zones(roots):
        return (
            f"the processor counts energy, but only root may read it: sudo chmod a+r {hidden[0]}/energy_uj "
            "(and its siblings), or measure as root"
        )
    return "no power rail, tegrastats, discharging battery or processor counter (RAPL) is readable here"


# --- boards -----------------------------------------------------------------


def _rails(roots: Roots) -> Meter | None:
    """INA sensors: millivolt x milliampere, by the name of the rail."""
    rails: dict[str, tuple[Path, Path]] = {}
    for label in sorted(roots.sys.glob("class/hwmon/hwmon*/in*_label")):
        name, channel = text(label) or "", label.name[2:-6]
        volt, ampere = label.parent / f"in{channel}_input", label.parent / f"curr{channel}_input"
        chip = text(label.parent / "name") or ""
        if not chip.startswith("ina") or "sum" in name.lower() or name in ("", "NC"):
            continue
        if number(volt) is not None and number(ampere) is not None:
            rails[name] = (volt, ampere)
    if not rails:
        return None
    chosen = choose_rails(list(rails))

    def watt() -> float:
        pairs = [rails[name] for name in chosen]
        return sum((number(volt) or 0.0) * (number(ampere) or 0.0) for volt, ampere in pairs) / 1e6

    return Gauge("power_rails", " + ".join(chosen), watt)


def choose_rails(names: Sequence[str]) -> list[str]:
    """The one that is the sum already, else all of them."""
    return next(([name] for name in WHOLE_BOARD if name in names), sorted(names))


def tegrastats_watt(line: str) -> tuple[list[str], float] | None:
    """(rails, watt) of a line of tegrastats; None when it shows no rail."""
    rails = {name: int(milliwatt) / 1e3 for name, milliwatt in TEGRASTATS_RAIL.findall(line)}
    if not rails:
        return None
    chosen = choose_rails(list(rails))
    return chosen, sum(rails[name] for name in chosen)


def _tegrastats(roots: Roots) -> Meter | None:
    command = shutil.which("tegrastats") if roots == HERE else None
    return tegrastats(command) if command else None


def tegrastats(command: str) -> Meter | None:
    """A gauge on the lines that the tool prints; None when it cannot be run or shows no rail."""
    try:
        child = subprocess.Popen(
            [command, "--interval", str(int(GAUGE_S * 1000))], stdout=subprocess.PIPE, text=True
        )
    except OSError:
        return None
    assert child.stdout is not None
    stream = child.stdout
    first = tegrastats_watt(stream.readline())
    latest = [first[1] if first else 0.0]

    def follow() -> None:
        for line in stream:
            if found := tegrastats_watt(line):
                latest[0] = found[1]

    def stop() -> None:
        child.terminate()
        child.wait()

    if first is None:
        stop()
        return None
    threading.Thread(target=follow, name="tegrastats", daemon=True).start()
    return Gauge("tegrastats", " + ".join(first[0]), lambda: latest[0], stop)


def _battery(roots: Roots) -> Meter | None:
    """A battery that is being emptied: what leaves it is what the whole device takes."""
    for supply in sorted(roots.sys.glob("class/power_supply/*")):
        if text(supply / "type") == "Battery" and text(supply / "status") == "Discharging":

            def watt(supply: Path = supply) -> float | None:
                if (power := number(supply / "power_now")) is not None:
                    return abs(power) / 1e6
                ampere, volt = number(supply / "current_now"), number(supply / "voltage_now")
                return None if ampere is None or volt is None else abs(ampere) * volt / 1e12

            if watt() is not None:
                return Gauge("battery", "whole device", watt)
    return None


# --- processors ---------------------------------------------------------------


def _rapl_zones(roots: Roots) -> list[Path]:
    """Packages, and memory where it is counted apart; cores are inside their package."""
    zones = sorted(roots.sys.glob("class/powercap/*rapl*:*"))
    return [zone for zone in zones if (text(zone / "name") or "").startswith(("package", "dram"))]


def _rapl(roots: Roots) -> Meter | None:
    zones = [zone for zone in _rapl_zones(roots) if number(zone / "energy_uj") is not None]
    if not zones:
        return None
    names = [text(zone / "name") or zone.name for zone in zones]
    files = [(zone / "energy_uj", number(zone / "max_energy_range_uj")) for zone in zones]
    return Counter("rapl", " + ".join(names), files)

"""Readings of a Linux system while something is timed: times, clocks, heat, throttling.

In: /proc and /sys (or copies of them, for tests). Out: plain numbers; None where a file is not there.
Not here: what kind of machine it is (`evals/bench/device.py`), energy (`evals/bench/energy.py`).
"""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass
from pathlib import Path

from evals.bench.bench_conditions import Disturbance, Temperature


@dataclass(frozen=True)
class Roots:
    """Where the kernel shows itself."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


HERE = Roots()


def text(path: Path) -> str | None:
    """The stripped content of a small file; None when it cannot be read or is no text."""
    try:
        return path.read_text().strip("\0 \t\r\n")
    except (OSError, UnicodeDecodeError):
        return None


def number(path: Path) -> float | None:
    """The number that a file holds; None when there is none."""
    try:
        return float(text(path) or "")
    except ValueError:
        return None


def kib(path: Path, key: str) -> float | None:
    """The value of a `Key:  123 kB` line, in MiB."""
    for line in (text(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    return None


def usable_cpus() -> list[int]:
    """Hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def temperatures(roots: Roots = HERE) -> list[Temperature]:
    """Thermal zones with a plausible value, in degrees Celsius, by name."""
    found = []
    for zone in sorted(roots.sys.glob("class/thermal/thermal_zone*")):
        millicelsius = number(zone / "temp")
        if millicelsius is not None and -40_000 < millicelsius < 150_000 and millicelsius != 0:
            found.append(Temperature(zone=text(zone / "type") or zone.name, celsius=millicelsius / 1000))
    return found


def hottest(roots: Roots = HERE) -> float | None:
    return max((zone.celsius for zone in temperatures(roots)), default=None)


def mhz(roots: Roots = HERE) -> float | None:
    """Mean present frequency of the usable hardware threads."""
    found = []
    for cpu in usable_cpus():
        khz = number(roots.sys / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq")
        if khz is not None:
            found.append(khz / 1000)
    if not found:
        lines = (text(roots.proc / "cpuinfo") or "").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(found) / len(found) if found else None


def throttle_events(roots: Roots = HERE) -> int | None:
    """How often the processor throttled since it started, cores and packages; None when it does not count."""
    counts = roots.sys.glob("devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")
    found = [value for path in counts if (value := number(path)) is not None]
    return int(sum(found)) if found else None


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Moment:
    """The machine at one time. ticks: (all, idle, stolen) of all hardware threads; own_s: of this process."""

    seconds: float
    ticks: tuple[int, int, int] | None
    own_s: float
    throttled: int | None
    mhz: float | None
    celsius: float | None


def moment(roots: Roots = HERE) -> Moment:
    own = os.times()
    return Moment(
        seconds=time.monotonic(),
        ticks=_ticks(roots),
        own_s=own.user + own.system + own.children_user + own.children_system,
        throttled=throttle_events(roots),
        mhz=mhz(roots),
        celsius=hottest(roots),
    )


def between(before: Moment, after: Moment, hertz: int | None = None) -> Disturbance:
    """What happened between two moments. `hertz`: ticks a second, the system's own by default.

    The shares are null when less than ten ticks passed: too coarse to tell.
    """
    shares = _shares(before, after, hertz or os.sysconf("SC_CLK_TCK"))
    counted = before.throttled is not None and after.throttled is not None
    return Disturbance(
        own_share=shares[0] if shares else None,
        other_share=shares[1] if shares else None,
        steal_share=shares[2] if shares else None,
        throttle_events=max(0, (after.throttled or 0) - (before.throttled or 0)) if counted else None,
        mhz_before=before.mhz,
        mhz_after=after.mhz,
        celsius_before=before.celsius,
        celsius_after=after.celsius,
    )


def _ticks(roots: Roots) -> tuple[int, int, int] | None:
    """user nice system idle iowait irq softirq steal (guest is in user already), proc(5)."""
    first = (text(roots.proc / "stat") or "").partition("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None
    values = [int(value) for value in first[1:9]]
    return sum(values), values[3] + values[4], values[7]


def _shares(before: Moment, after: Moment, hertz: int) -> tuple[float, float, float] | None:
    """(own, other, stolen) of all hardware threads' time."""
    if before.ticks is None or after.ticks is None:
        return None
    total, idle, stolen = (late - early for early, late in zip(before.ticks, after.ticks, strict=True))
    if total < 10:
        return None
    own = min(1.0, max(0.0, (after.own_s - before.own_s) * hertz / total))
    steal = min(1.0, max(0.0, stolen / total))
    other = min(1.0, max(0.0, (total - idle - stolen) / total - own))
    return own, other, steal

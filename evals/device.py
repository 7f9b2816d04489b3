"""What machine this is: the facts without which a timing means nothing.

In: the running system. Out: a `Device`. Not here: timing, power, phones (they come as their own records).
Linux is read from /proc and /sys; elsewhere what `platform` knows.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from evals.records import Device

PACKAGES = ("onnxruntime", "numpy", "pillow", "tokenizers")


def describe(
    packages: Sequence[str] = PACKAGES, proc: Path = Path("/proc"), sys: Path = Path("/sys")
) -> Device:
    """The device sheet of this machine; a package that is not installed is left out."""
    return Device(
        cpu=_cpu(proc),
        cores=_cores(),
        memory_mib=_kib(proc / "meminfo", "MemTotal"),
        os=_os(),
        python=platform.python_version(),
        governor=_text(sys / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        packages={name: found for name in packages if (found := _version(name))},
    )


def peak_rss_mib(proc: Path = Path("/proc")) -> float:
    """Largest resident memory of this process so far, in MiB: VmHWM on Linux, ru_maxrss elsewhere.

    On Linux ru_maxrss survives exec, so a child would report its parent's memory; VmHWM does not.
    """
    peak = _kib(proc / "self/status", "VmHWM")
    if peak is not None:
        return peak
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (1 << 20) if platform.system() == "Darwin" else largest / 1024


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu(proc: Path) -> str:
    for line in (_text(proc / "cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "hardware", "model") and not value.strip().isdigit():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _os() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, kernel {platform.release()}, {platform.machine()}"


def _kib(path: Path, key: str) -> float | None:
    """The value of a `Key:  123 kB` line, in MiB."""
    for line in (_text(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

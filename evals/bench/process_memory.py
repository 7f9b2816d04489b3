"""Memory of this process, as the kernel counts it.

In: /proc/self (elsewhere `getrusage`). Out: MiB. Not here: what is reported about a bundle.
"""

from __future__ import annotations

import platform
from pathlib import Path

from evals.bench.system import kib, text

PROC = Path("/proc")


def peak_rss_mib(proc: Path = PROC) -> float:
    """Largest resident memory so far: VmHWM on Linux, ru_maxrss elsewhere.

    On Linux ru_maxrss survives exec, so a child would report its parent's memory; VmHWM does not.
    """
    peak = kib(proc / "self/status", "VmHWM")
    if peak is not None:
        return peak
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (1 << 20) if platform.system() == "Darwin" else largest / 1024


def meter(proc: Path = PROC) -> str:
    """The system's name of what `peak_rss_mib` reads."""
    return "VmHWM" if kib(proc / "self/status", "VmHWM") is not None else "ru_maxrss"


def forget_peak(proc: Path = PROC) -> bool:
    """Start the peak anew from what is resident now; False where the system has no such switch (proc(5))."""
    try:
        (proc / "self/clear_refs").write_text("5\n")
    except OSError:
        return False
    return True


def rss_mib(proc: Path = PROC) -> float | None:
    """Resident now."""
    return kib(proc / "self/status", "VmRSS")


def anonymous_mib(proc: Path = PROC) -> float | None:
    """Resident now and backed by no file."""
    return kib(proc / "self/status", "RssAnon")


def mapped_mib(directory: Path, proc: Path = PROC) -> float | None:
    """Address space that maps files under `directory`; None where the system does not list mappings."""
    listed = text(proc / "self/maps")
    if listed is None:
        return None
    prefix, total = f"{directory.resolve()}/", 0
    for line in listed.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(prefix):
            first, _, last = fields[0].partition("-")
            total += int(last, 16) - int(first, 16)
    return total / (1 << 20)

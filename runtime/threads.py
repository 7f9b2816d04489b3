"""How many threads a session should use by default. Standard library only."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_DIRECTORY = Path("/sys/devices/system/cpu")
QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """Physical cores this process may use: its CPU set without hyper-thread twins, within its CPU quota."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in usable}
    return max(1, min(len(cores), _quota()))


def _core_of(cpu: int) -> str:
    """A name shared by the hardware threads of one core; each its own where the system does not say."""
    try:
        return (CPU_DIRECTORY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """CPUs a control group grants, rounded up; very many without a group."""
    try:
        quota, period = QUOTA_FILE.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 16

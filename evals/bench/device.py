"""What machine this is: the facts without which a timing means nothing.

In: the running system. Out: a `DeviceSheet` for bench.json, or the shorter `Device` of the demo's report.
Not here: readings that change while something runs (`bench/system.py`); phones and browsers write their own
sheet. Linux is read from /proc and /sys; elsewhere what `platform` knows. The only command that is run is
`nvpmodel -q`, where NVIDIA's boards have it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from evals.bench import system
from evals.bench.bench_conditions import CoreCluster, DeviceSheet, Kind
from evals.bench.process_memory import peak_rss_mib
from evals.bench.system import HERE, Roots, kib, number, text
from evals.records import Device
from runtime.installation import ONNXRUNTIMES
from runtime.threads import default_threads

__all__ = ["describe", "peak_rss_mib", "sheet"]

PACKAGES = ("onnxruntime", "numpy", "pillow", "tokenizers")
RUNTIMES = (
    *(*ONNXRUNTIMES, "llama-cpp-python", "coremltools"),
    *("numpy", "pillow", "tokenizers", "pydantic", "pocketvlm"),
)
"""Whose version is on the sheet, where installed."""

FEATURES = {
    *("avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "f16c", "fma"),
    *("neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
}
"""Instruction sets that decide how fast a kernel is; `asimddp` is Arm's dotprod."""

CHASSIS: dict[str, Kind] = {
    **dict.fromkeys(("3", "4", "6", "7", "13"), "desktop"),
    **dict.fromkeys(("8", "9", "10", "14", "31"), "laptop"),
    **dict.fromkeys(("17", "23", "28"), "server"),
    "30": "tablet",
}
"""SMBIOS chassis types."""

SWITCHES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LD_PRELOAD", "MALLOC_ARENA_MAX")
"""Environment variables that change speed or memory; those that are set are on the sheet."""


def sheet(name: str | None = None, roots: Roots = HERE, packages: Sequence[str] = RUNTIMES) -> DeviceSheet:
    """The device sheet of this machine. `name`: default: its product name, else the processor and cores."""
    cpu, model, cores = _cpu(roots), _model(roots), default_threads()
    return DeviceSheet(
        name=name or model or f"{cpu}, {cores} cores",
        kind=_kind(roots),
        model=model,
        cpu=cpu,
        architecture=platform.machine() or "unknown",
        cores=cores,
        cpus=len(system.usable_cpus()),
        quota_cpus=_quota(roots),
        clusters=tuple(_clusters(roots)),
        features=tuple(sorted(_features(roots))),
        last_cache_bytes=_last_cache(roots),
        memory_mib=kib(roots.proc / "meminfo", "MemTotal"),
        swap_mib=kib(roots.proc / "meminfo", "SwapTotal"),
        accelerators=tuple(_accelerators(roots)),
        os=_os_name(),
        kernel=platform.release() or None,
        virtual_machine=_hypervisor(roots),
        container=_container(roots),
        governor=_governor(roots),
        boost=_boost(roots),
        power_mode=_power_mode(roots),
        power_source=_power_source(roots),
        battery_share=_battery(roots),
        temperatures=tuple(system.temperatures(roots)),
        language=f"{platform.python_implementation()} {platform.python_version()}",
        packages=versions(packages),
        providers=_providers(),
        extra={key: value for key in SWITCHES if (value := os.environ.get(key))},
    )


def describe(packages: Sequence[str] = PACKAGES, proc: Path = HERE.proc, sys: Path = HERE.sys) -> Device:
    """What the demo's report says of this machine; a package that is not installed is left out."""
    roots = Roots(proc, sys)
    return Device(
        cpu=_cpu(roots),
        cores=len(system.usable_cpus()),
        memory_mib=kib(proc / "meminfo", "MemTotal"),
        os=f"{_os_name()}, kernel {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        governor=_governor(roots),
        packages=versions(packages),
    )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- what it is -----------------------------------------------------------


def _cpu(roots: Roots) -> str:
    for line in (text(roots.proc / "cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "hardware", "model") and not value.strip().isdigit():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _model(roots: Roots) -> str | None:
    """A board names itself in its device tree, a computer in its DMI table."""
    tree = text(roots.proc / "device-tree/model") or text(roots.sys / "firmware/devicetree/base/model")
    if tree:
        return tree
    dmi = roots.sys / "class/dmi/id"
    words = [text(dmi / name) or "" for name in ("sys_vendor", "product_name")]
    named = " ".join(word for word in words if word and "to be filled" not in word.lower())
    return named or None


def _kind(roots: Roots) -> Kind:
    if (roots.proc / "device-tree/model").exists() or (roots.sys / "firmware/devicetree/base/model").exists():
        return "board"
    return CHASSIS.get(text(roots.sys / "class/dmi/id/chassis_type") or "", "unknown")


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.mac_ver()[0]}".strip()


def _features(roots: Roots) -> set[str]:
    for line in (text(roots.proc / "cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return FEATURES & set(value.split())
    return set()


def _last_cache(roots: Roots) -> int | None:
    """All last-level caches together: those of the highest level, each counted once."""
    found: dict[tuple[int, str], int] = {}
    for index in roots.sys.glob("devices/system/cpu/cpu*/cache/index*"):
        level, size = number(index / "level"), text(index / "size") or ""
        if level is None or text(index / "type") == "Instruction" or size[-1:] not in ("K", "M"):
            continue
        shared = text(index / "shared_cpu_list") or index.parent.parent.name
        found[(int(level), shared)] = int(size[:-1]) * (1024 if size[-1] == "K" else 1 << 20)
    highest = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == highest) or None


def _clusters(roots: Roots) -> list[CoreCluster]:
    found = []
    for policy in sorted(roots.sys.glob("devices/system/cpu/cpufreq/policy*")):
        cpus = [int(cpu) for cpu in (text(policy / "related_cpus") or "").split() if cpu.isdigit()]
        if cpus:
            low, high = number(policy / "cpuinfo_min_freq"), number(policy / "cpuinfo_max_freq")
            found.append(
                CoreCluster(
                    cpus=tuple(cpus),
                    min_mhz=None if low is None else low / 1000,
                    max_mhz=None if high is None else high / 1000,
                    governor=text(policy / "scaling_governor"),
                )
            )
    return found


def _accelerators(roots: Roots) -> list[str]:
    """Drivers of GPUs (DRM) and NPUs (accel), and NVIDIA's own list."""
    found = {text(path) or "" for path in roots.proc.glob("driver/nvidia/gpus/*/information")}
    names = {
        line.partition(":")[2].strip() for info in found for line in info.splitlines() if "Model:" in line
    }
    for device in (
        *roots.sys.glob("class/drm/renderD*/device"),
        *roots.sys.glob("class/accel/accel*/device"),
    ):
        driver = device / "driver"
        if driver.exists():
            names.add(driver.resolve().name)
    if (roots.sys / "class/kgsl/kgsl-3d0").exists():
        names.add(text(roots.sys / "class/kgsl/kgsl-3d0/gpu_model") or "kgsl")
    return sorted(name for name in names if name)


# --- under what it runs -----------------------------------------------------


def _governor(roots: Roots) -> str | None:
    return text(roots.sys / "devices/system/cpu/cpu0/cpufreq/scaling_governor")


def _boost(roots: Roots) -> bool | None:
    """Intel says when it is off, the others when it is on."""
    if (off := number(roots.sys / "devices/system/cpu/intel_pstate/no_turbo")) is not None:
        return off == 0
    on = number(roots.sys / "devices/system/cpu/cpufreq/boost")
    return None if on is None else on == 1


def _quota(roots: Roots) -> float | None:
    """CPUs that a control group grants (version 2, then version 1)."""
    granted, period = None, None
    fields = (text(roots.sys / "fs/cgroup/cpu.max") or "").split()
    if len(fields) == 2 and fields[0].isdigit():
        granted, period = float(fields[0]), float(fields[1])
    else:
        granted = number(roots.sys / "fs/cgroup/cpu/cpu.cfs_quota_us")
        period = number(roots.sys / "fs/cgroup/cpu/cpu.cfs_period_us")
    return granted / period if granted and period and granted > 0 else None


def _hypervisor(roots: Roots) -> str | None:
    if named := text(roots.sys / "hypervisor/type"):
        return named
    vendor = (text(roots.sys / "class/dmi/id/sys_vendor") or "").lower()
    for word in ("qemu", "vmware", "xen", "innotek", "amazon ec2", "google", "microsoft", "firecracker"):
        if word in vendor and " hypervisor" in (text(roots.proc / "cpuinfo") or ""):
            return word
    return "unnamed" if " hypervisor" in (text(roots.proc / "cpuinfo") or "") else None


def _container(roots: Roots) -> str | None:
    if roots == HERE and Path("/.dockerenv").exists():
        return "docker"
    if roots == HERE and Path("/run/.containerenv").exists():
        return "podman"
    groups = text(roots.proc / "1/cgroup") or ""
    return next((name for name in ("docker", "kubepods", "lxc") if name in groups), None)


def _power_mode(roots: Roots) -> str | None:
    if profile := text(roots.sys / "firmware/acpi/platform_profile"):
        return profile
    command = shutil.which("nvpmodel") if roots == HERE else None
    if not command:
        return None
    try:
        done = subprocess.run([command, "-q"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    modes = [line.partition(":")[2].strip() for line in done.stdout.splitlines() if "Power Mode" in line]
    return modes[0] if modes else None


def _supplies(roots: Roots, kind: str) -> list[Path]:
    return [path for path in roots.sys.glob("class/power_supply/*") if text(path / "type") == kind]


def _power_source(roots: Roots) -> Literal["mains", "battery"] | None:
    mains = [number(path / "online") for path in (*_supplies(roots, "Mains"), *_supplies(roots, "USB"))]
    if any(mains):
        return "mains"
    states = [text(path / "status") for path in _supplies(roots, "Battery")]
    if "Discharging" in states:
        return "battery"
    return "mains" if states else None


def _battery(roots: Roots) -> float | None:
    charges = [number(path / "capacity") for path in _supplies(roots, "Battery")]
    known = [charge for charge in charges if charge is not None]
    return min(known) / 100 if known else None


def _providers() -> tuple[str, ...]:
    """onnxruntime's, where it is installed."""
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())

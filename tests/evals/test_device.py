from __future__ import annotations

from pathlib import Path

import pytest

from evals.bench import device, process_memory, system
from evals.bench.system import Roots


def tree(root: Path, contents: dict[str, str]) -> Roots:
    """Files under copies of /proc and /sys."""
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return Roots(root / "proc", root / "sys")


CPU = "sys/devices/system/cpu"


def test_a_board_s_sheet(tmp_path: Path) -> None:
    roots = tree(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp crc32\nHardware\t: Chip 5",
            "proc/meminfo": "MemTotal:  2048 kB\nSwapTotal:  1024 kB",
            "proc/device-tree/model": "Some Board 5\0",
            f"{CPU}/cpufreq/policy0/related_cpus": "0 1",
            f"{CPU}/cpufreq/policy0/cpuinfo_max_freq": "1500000",
            f"{CPU}/cpufreq/policy0/scaling_governor": "schedutil",
            f"{CPU}/cpufreq/policy2/related_cpus": "2",
            f"{CPU}/cpu0/cpufreq/scaling_governor": "schedutil",
            f"{CPU}/cpu0/cache/index3/level": "3",
            f"{CPU}/cpu0/cache/index3/size": "2048K",
            f"{CPU}/cpu0/cache/index3/type": "Unified",
            f"{CPU}/cpu0/cache/index3/shared_cpu_list": "0-1",
            f"{CPU}/cpu1/cache/index3/level": "3",
            f"{CPU}/cpu1/cache/index3/size": "2048K",
            f"{CPU}/cpu1/cache/index3/type": "Unified",
            f"{CPU}/cpu1/cache/index3/shared_cpu_list": "0-1",
            f"{CPU}/cpu0/cache/index0/level": "1",
            f"{CPU}/cpu0/cache/index0/size": "32K",
            "sys/class/thermal/thermal_zone0/temp": "45500",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone1/temp": "-256000",
            "sys/fs/cgroup/cpu.max": "150000 100000",
        },
    )
    found = device.sheet(roots=roots, packages=["numpy", "no-such-package"])
    assert (found.name, found.model, found.cpu, found.kind) == (
        "Some Board 5",
        "Some Board 5",
        "Chip 5",
        "board",
    )
    assert (found.memory_mib, found.swap_mib, found.quota_cpus) == (2.0, 1.0, 1.5)
    assert found.features == ("asimd", "asimddp") and found.governor == "schedutil"
    assert [(cluster.cpus, cluster.max_mhz) for cluster in found.clusters] == [((0, 1), 1500.0), ((2,), None)]
    assert found.last_cache_bytes == 2 << 20  # shared, so counted once
    assert [(zone.zone, zone.celsius) for zone in found.temperatures] == [("cpu-thermal", 45.5)]
    assert list(found.packages) == ["numpy"] and found.virtual_machine is None


def test_a_laptop_on_battery_in_a_virtual_machine(tmp_path: Path) -> None:
    roots = tree(
        tmp_path,
        {
            "proc/cpuinfo": "model name\t: Core 9\nmodel\t\t: 33\nflags\t\t: fpu hypervisor avx2",
            "sys/class/dmi/id/sys_vendor": "QEMU",
            "sys/class/dmi/id/product_name": "Notebook 1",
            "sys/class/dmi/id/chassis_type": "10",
            f"{CPU}/intel_pstate/no_turbo": "1",
            "sys/firmware/acpi/platform_profile": "low-power",
            "sys/class/power_supply/AC/type": "Mains",
            "sys/class/power_supply/AC/online": "0",
            "sys/class/power_supply/BAT0/type": "Battery",
            "sys/class/power_supply/BAT0/status": "Discharging",
            "sys/class/power_supply/BAT0/capacity": "61",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    found = device.sheet(roots=roots)
    assert (found.name, found.kind, found.virtual_machine) == ("QEMU Notebook 1", "laptop", "qemu")
    assert (found.boost, found.power_mode, found.power_source) == (False, "low-power", "battery")
    assert found.battery_share == 0.61 and found.quota_cpus is None


def test_a_machine_that_shows_nothing_still_has_a_sheet(tmp_path: Path) -> None:
    found = device.sheet(name="shed", roots=Roots(tmp_path, tmp_path))
    assert found.name == "shed" and found.cpu and found.cores >= 1
    assert found.memory_mib is found.governor is found.boost is found.last_cache_bytes is None
    assert found.temperatures == found.clusters == found.features == ()
    short = device.describe([], tmp_path, tmp_path)
    assert short.memory_mib is None and short.governor is None and short.cpu


def test_this_machine_s_sheet_is_the_demo_s_too() -> None:
    assert device.describe().cpu == device.sheet().cpu
    assert device.sheet().packages["numpy"] == device.describe().packages["numpy"]


def test_memory_of_a_process_is_read(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "proc/self/status": "VmPeak:\t 9 kB\nVmHWM:\t  51200 kB\nVmRSS:\t 1024 kB\nRssAnon:\t 512 kB",
            "proc/self/maps": (
                f"1000-3000 r--p 0 08:01 7 {tmp_path.resolve()}/a b/weights.gguf\n"
                f"9000-a000 r--p 0 08:01 7 {tmp_path.resolve()}/a b.gguf\n"
                "b000-c000 rw-p 0 00:00 0"
            ),
        },
    )
    proc = tmp_path / "proc"
    assert process_memory.peak_rss_mib(proc) == 50.0 and process_memory.meter(proc) == "VmHWM"
    assert process_memory.rss_mib(proc) == 1.0 and process_memory.anonymous_mib(proc) == 0.5
    assert process_memory.mapped_mib(tmp_path / "a b", proc) == 0x2000 / (1 << 20)
    assert process_memory.mapped_mib(tmp_path, tmp_path) is None
    assert 1 < process_memory.peak_rss_mib(tmp_path) < 100_000
    assert not process_memory.forget_peak(tmp_path / "none")


def test_the_peak_starts_anew() -> None:
    if not process_memory.forget_peak():
        pytest.skip("this system cannot reset the peak")
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    high = process_memory.peak_rss_mib()
    del block
    assert process_memory.forget_peak()
    assert process_memory.peak_rss_mib() < high - 32


def stat(user: int, idle: int, steal: int) -> str:
    return f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1"


def moment(ticks: tuple[int, int, int] | None, own_s: float, throttled: int | None = None) -> system.Moment:
    return system.Moment(0.0, ticks, own_s, throttled, None, None)


def test_what_happened_between_two_moments() -> None:
    found = system.between(moment((100, 50, 0), 1.0, 2), moment((300, 90, 20), 1.5, 5), hertz=100)
    # of 200 ticks: 40 idle, 20 stolen, 50 own, so 90 of others
    assert (found.own_share, found.other_share, found.steal_share) == pytest.approx((0.25, 0.45, 0.1))
    assert found.throttle_events == 3
    short = system.between(moment((100, 50, 0), 1.0), moment((105, 50, 0), 1.1), hertz=100)
    assert short.own_share is None and short.throttle_events is None
    assert system.between(moment(None, 0.0), moment((9, 9, 9), 0.0), hertz=100).other_share is None


def test_a_moment_reads_ticks_clock_heat_and_throttling(tmp_path: Path) -> None:
    roots = tree(
        tmp_path,
        {
            "proc/stat": stat(100, 40, 7),
            "proc/cpuinfo": "cpu MHz\t\t: 1000.5\ncpu MHz\t\t: 2000.5",
            f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "3",
            f"{CPU}/cpu1/thermal_throttle/core_throttle_count": "4",
            "sys/class/thermal/thermal_zone0/temp": "40000",
            "sys/class/thermal/thermal_zone1/temp": "60000",
        },
    )
    found = system.moment(roots)
    assert found.ticks == (147, 40, 7) and found.throttled == 7
    assert found.mhz == 1500.5 and found.celsius == 60.0
    cpu = system.usable_cpus()[0]
    tree(tmp_path, {f"{CPU}/cpu{cpu}/cpufreq/scaling_cur_freq": "800000"})
    assert system.mhz(roots) == 800.0

"""An Android phone behind adb: a shell there, files that get there, and what the phone is.

In: `adb://SERIAL`. Out: an `Adb`; a `DeviceSheet`; heat. Not here: what is measured (`remote/remote_adb.py`).
It is the system's `adb`. Properties, policies and dumpsys are read as Android 8 to 15 print them.
"""

from __future__ import annotations

import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from evals.bench import device
from evals.bench.bench_conditions import CoreCluster, DeviceSheet, Temperature
from evals.remote.remote_ssh import DeviceError
from runtime.errors import InputError
from runtime.files import sha256_file

MACHINES = {183: "arm64-v8a", 62: "x86_64", 40: "armeabi-v7a", 3: "x86"}
"""ELF machines by Android's names."""

ADDRESS = re.compile(r"adb://(?P<serial>[\w.:][\w.:\-]*)?/?", re.ASCII)
ThermalState = Literal["nominal", "fair", "serious", "critical"]
STATES: tuple[ThermalState, ...] = (
    *("nominal", "nominal", "fair", "serious", "critical", "critical", "critical"),
)
"""Android's thermal status 0 to 6 (none, light, moderate, severe, critical, emergency, shutdown)."""


class Adb:
    """One phone behind the system's adb."""

    def __init__(self, serial: str) -> None:
        if not shutil.which("adb"):
            raise DeviceError(
                "adb: not found here; install Android's platform tools (Debian: apt install adb)"
            )
        self._start = ["adb", *(["-s", serial] if serial else [])]
        self.name = f"adb://{serial}"

    def connect(self) -> None:
        """Raises DeviceError that tells an absent phone from one that does not trust this computer."""
        done = subprocess.run([*self._start, "get-state"], capture_output=True, text=True)
        said = f"{done.stdout} {done.stderr}"
        for sign, meaning in (
            ("unauthorized", "does not trust this computer; accept its question on the screen"),
            ("more than one", "several phones are there; give --on adb://SERIAL (adb devices lists them)"),
            ("offline", "is offline; plug it in again"),
            ("not found", "is not there; adb devices lists those that are"),
            ("no devices", "no phone is there; switch USB debugging on and plug it in"),
        ):
            if sign in said:
                raise DeviceError(f"{self.name}: {meaning}")
        if done.returncode or done.stdout.strip() != "device":
            raise DeviceError(f"{self.name}: adb says: {said.strip() or done.returncode}")

    def shell(self, script: str, *, check: bool = True) -> str:
        """stdout and stderr of a script there. Its exit code is printed, as old versions of adb lose it."""
        done = subprocess.run([*self._start, "shell", f"{script}\necho @@rc $?"], capture_output=True)
        out = (done.stdout + done.stderr).decode(errors="replace").replace("\r\n", "\n")
        said, mark, code = out.rpartition("@@rc ")
        if not mark:
            raise DeviceError(f"{self.name}: the connection broke; plug it in and run again")
        if check and int(code.split()[0]):
            raise DeviceError(f"{self.name}: {last_line(said)}")
        return said

    def push(self, source: Path, place: str) -> bool:
        """Copy a file whose bytes are not there already; whether it was copied. Raises DeviceError."""
        wanted = sha256_file(source)
        quoted, part = shlex.quote(place), shlex.quote(f"{place}.part")
        if self.shell(f"sha256sum {quoted} 2>/dev/null; true").startswith(wanted):
            return False
        done = subprocess.run(
            [*self._start, "push", str(source), f"{place}.part"], capture_output=True, text=True
        )
        said = f"{done.stdout}{done.stderr}"
        if "No space left" in said:
            raise DeviceError(f"{self.name}: its storage is full; free some and run again")
        if done.returncode:
            raise DeviceError(f"{self.name}: {last_line(said)}")
        if not self.shell(f"sha256sum {part}").startswith(wanted):
            raise DeviceError(f"{self.name}: {source.name} arrived damaged; run again")
        self.shell(f"mv -f {part} {quoted}")
        return True


def parse(url: str) -> str:
    """The serial of `adb://SERIAL`; empty for `adb://`, the only phone there is. Raises InputError."""
    found = ADDRESS.fullmatch(url)
    if not found:
        raise InputError(f"--on {url}: is no adb address; wanted adb://SERIAL or adb://")
    return found["serial"] or ""


def program_machine(path: Path) -> str:
    """Android's name of the processor that an ELF program is for. Raises InputError when it is none."""
    try:
        head = path.read_bytes()[:20]
    except OSError as error:
        raise InputError(f"--on-runner {path}: cannot be read ({error.strerror})") from error
    if len(head) < 20 or head[:4] != b"\x7fELF":
        raise InputError(f"--on-runner {path}: is no Linux program; docs/devices.md says how to build one")
    (machine,) = struct.unpack_from("<H", head, 18)
    return MACHINES.get(machine, f"ELF machine {machine}")


def big_cores(clusters: Sequence[CoreCluster]) -> list[int]:
    """All cores but those of the slowest cluster; all where there is one kind."""
    speeds = [cluster.max_mhz or 0.0 for cluster in clusters]
    chosen = [one for one in clusters if (one.max_mhz or 0.0) > min(speeds)] or list(clusters)
    return sorted(cpu for cluster in chosen for cpu in cluster.cpus)


def heat(adb: Adb) -> tuple[float | None, ThermalState | None]:
    """(the battery's degrees Celsius, thermal state) by dumpsys; None where it does not say."""
    said = adb.shell("dumpsys battery; dumpsys thermalservice", check=False)
    celsius = re.search(r"^\s*temperature:\s*(\d+)", said, re.MULTILINE)
    status = re.search(r"Thermal Status:\s*(\d)", said)
    return (
        int(celsius[1]) / 10 if celsius else None,
        STATES[min(int(status[1]), 6)] if status else None,
    )


def properties_of(adb: Adb) -> dict[str, str]:
    return dict(re.findall(r"^\[(.+?)\]: \[(.*)\]$", adb.shell("getprop"), re.MULTILINE))


def clusters_of(adb: Adb) -> list[CoreCluster]:
    """Frequency policies, each with its cores."""
    said = adb.shell(
        "for p in /sys/devices/system/cpu/cpufreq/policy*; do echo $(cat $p/cpuinfo_max_freq) "
        "$(cat $p/scaling_governor 2>/dev/null || echo -) $(cat $p/related_cpus); done 2>/dev/null",
        check=False,
    )
    found = []
    for line in said.splitlines():
        words = line.split()
        if len(words) >= 3 and words[0].isdigit():
            cpus = tuple(int(word) for word in words[2:] if word.isdigit())
            governor = None if words[1] == "-" else words[1]
            found.append(CoreCluster(cpus=cpus, max_mhz=int(words[0]) / 1000, governor=governor))
    return found


def emulator(properties: Mapping[str, str]) -> str | None:
    """Why it is no phone, where it is Android's emulator on a computer."""
    if "1" in (properties.get("ro.kernel.qemu"), properties.get("ro.boot.qemu")):
        return "Android's emulator: this shows that it works and what it computes, not how fast a phone is"
    return None


def sheet(adb: Adb, properties: Mapping[str, str], clusters: Sequence[CoreCluster]) -> DeviceSheet:
    model = " ".join(
        filter(None, (properties.get("ro.product.manufacturer"), properties.get("ro.product.model")))
    )
    chip = properties.get("ro.soc.model") or properties.get("ro.board.platform") or "unknown"
    memory = re.search(r"MemTotal:\s*(\d+) kB", adb.shell("cat /proc/meminfo", check=False))
    battery = adb.shell("dumpsys battery", check=False)
    level = re.search(r"^\s*level:\s*(\d+)", battery, re.MULTILINE)
    celsius, state = heat(adb)
    cores = sum(len(cluster.cpus) for cluster in clusters)
    return DeviceSheet(
        name=model or adb.name,
        kind="phone",
        model=model or None,
        cpu=chip,
        architecture=properties.get("ro.product.cpu.abi", "unknown"),
        cores=cores or int(adb.shell("nproc").split()[0]),
        clusters=tuple(clusters),
        memory_mib=int(memory[1]) / 1024 if memory else None,
        os=f"Android {properties.get('ro.build.version.release', '')}".strip(),
        kernel=adb.shell("uname -r").strip() or None,
        power_source=_power_source(battery),
        battery_share=int(level[1]) / 100 if level else None,
        temperatures=() if celsius is None else (Temperature(zone="battery", celsius=celsius),),
        thermal_state=state,
        packages=device.versions(["pocketvlm"]),
        providers=(),
    )


def _power_source(battery: str) -> Literal["mains", "battery"] | None:
    """By `dumpsys battery`; None where it does not say."""
    found = re.findall(r"powered: (true|false)", battery)
    return ("mains" if "true" in found else "battery") if found else None


def last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "said nothing"

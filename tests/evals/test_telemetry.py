"""Samples of a device while something runs: read from a made-up /sys, told in a sentence."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.bench import emulation, telemetry
from evals.bench.system import Roots
from evals.bench.telemetry import Sample


@pytest.fixture
def board(tmp_path: Path) -> Roots:
    """A board with two thermal zones, one clock and an INA sensor on its input rail."""
    roots = Roots(tmp_path / "proc", tmp_path / "sys")
    files = {
        "class/thermal/thermal_zone0/type": "cpu-thermal",
        "class/thermal/thermal_zone0/temp": "48500",
        "class/thermal/thermal_zone1/type": "gpu-thermal",
        "class/thermal/thermal_zone1/temp": "46000",
        "class/hwmon/hwmon3/name": "ina3221",
        "class/hwmon/hwmon3/in1_label": "VDD_IN",
        "class/hwmon/hwmon3/in1_input": "5000",
        "class/hwmon/hwmon3/curr1_input": "1600",
    }
    for cpu in range(os.cpu_count() or 1):
        files[f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq"] = "1510400"
    for name, content in files.items():
        path = roots.sys / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return roots


def test_samples_of_a_board(board: Roots) -> None:
    first, second = itertools.islice(telemetry.samples(0.3, board), 2)
    assert first.celsius == {"cpu-thermal": 48.5, "gpu-thermal": 46.0}
    assert first.mhz == pytest.approx(1510.4)
    assert first.scope == "VDD_IN" and first.watt == pytest.approx(8.0, rel=0.2)
    assert second.at_s > first.at_s > 0


def test_nothing_to_sample_ends_at_once(tmp_path: Path) -> None:
    assert list(telemetry.samples(0.01, Roots(tmp_path, tmp_path))) == []


def test_the_sentence() -> None:
    zones = ({"cpu": 45.0, "gpu": 44.0}, {"cpu": 71.0, "gpu": 60.0}, {"cpu": 69.0})
    rows = [
        Sample(at_s=2.0 * n, celsius=celsius, watt=watt, scope="VDD_IN", mhz=1500.0 - n)
        for n, (celsius, watt) in enumerate(zip(zones, (6.0, 12.0, 9.0), strict=True), 1)
    ]
    lines = [*(row.model_dump_json() for row in rows), '{"at_s": 8.0, "mh']
    assert telemetry.sentence(lines) == (
        "telemetry, 3 samples in 6 s: cpu 45.0 to 69.0 °C, most 71.0; VDD_IN 9.00 W mean, most 12.00; "
        "clock 1497 to 1499 MHz"
    )
    assert telemetry.sentence([]) is None


def test_tegrastats_lines_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that prints lines as JetPack's does; the sampler ends it when it ends itself."""
    line = "RAM 3000/7620MB CPU [12%@1510] GR3D_FREQ 0% cpu@48.5C VDD_IN 5120mW/5080mW VDD_SOC 900mW/900mW"
    program = tmp_path / "bin" / "tegrastats"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nwhile :; do echo '{line}'; sleep 0.1; done\n")
    program.chmod(0o755)
    out = tmp_path / "telemetry.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-m", "evals.bench.telemetry", out, "--interval", "0.2"],
        env={**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    for _ in range(300):
        if out.exists() and out.read_text().count("\n") >= 2:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 0
    found = Sample.model_validate_json(out.read_text().splitlines()[-1])
    assert (found.tegrastats, found.watt, found.scope) == (line, 5.12, "VDD_IN")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# --- emulation --------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_this_process_is_what_it_seems() -> None:
    assert emulation._program_of(os.getpid()).startswith("python")


@pytest.mark.parametrize("program", ["qemu-aarch64-static", "qemu-aarch64", "rosetta"])
def test_an_emulator_is_named(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_program_of", lambda pid: program)
    assert f"code runs in {program}" in (emulation.emulated_why() or "")
    monkeypatch.setattr(emulation, "_program_of", lambda pid: "python3.11")
    assert emulation.emulated_why() is None

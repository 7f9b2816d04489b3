"""Phones behind adb: what is read from them, and the plumbing against a made-up `adb`.

The made-up phone is a shell on this machine. It shows that files, commands and figures go where they should;
that a phone does all this is not shown here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from evals.bench.bench_conditions import CoreCluster
from evals.bench.bench_results import BenchResults
from evals.remote import remote_adb, remote_phone, remote_runner
from evals.remote.remote_adb import Asked
from evals.remote.remote_ssh import DeviceError
from evals.remote.runner_output import Said
from runtime.errors import InputError
from tests.evals.made_up_phone import SAID


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """As long as an Arm program's header: the made-up phone runs a script in its place."""
    path = tmp_path / "build" / "onnx-runner"
    path.parent.mkdir()
    path.write_bytes(
        b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + (183).to_bytes(2, "little") + bytes(100)
    )
    return path


# --- what is read -----------------------------------------------------


@pytest.mark.parametrize(
    ("clusters", "expected"),
    [
        ([((0, 1, 2, 3), 1800.0), ((4, 5, 6), 2400.0), ((7,), 3000.0)], [4, 5, 6, 7]),
        ([((0, 1, 2, 3), 1800.0)], [0, 1, 2, 3]),
        ([((0, 1), None)], [0, 1]),
        ([], []),
    ],
)
def test_big_cores(clusters: list[tuple[tuple[int, ...], float | None]], expected: list[int]) -> None:
    found = [CoreCluster(cpus=cpus, max_mhz=mhz) for cpus, mhz in clusters]
    assert remote_phone.big_cores(found) == expected


@pytest.mark.parametrize("url", ["adb:/x", "adb://-s", "adb://a b", "ssh://x", "adb://x;reboot"])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(InputError, match="wanted adb://SERIAL"):
        remote_phone.parse(url)


def test_addresses() -> None:
    assert [remote_phone.parse(url) for url in ("adb://", "adb://R5CT1", "adb://10.0.0.2:5555")] == [
        "", "R5CT1", "10.0.0.2:5555",
    ]  # fmt: skip


def test_programs_for_other_processors(tmp_path: Path, runner: Path) -> None:
    assert remote_phone.program_machine(runner) == "arm64-v8a"
    (tmp_path / "script").write_text("#!/bin/sh\n")
    for path in (tmp_path / "script", tmp_path / "nothing"):
        with pytest.raises(InputError, match="--on-runner"):
            remote_phone.program_machine(path)


@pytest.mark.parametrize(
    ("said", "source"),
    [
        ("  AC powered: false\n  USB powered: true\n", "mains"),
        ("  Wireless powered: true\n", "mains"),
        ("  AC powered: false\n  USB powered: false\n", "battery"),
        ("", None),
    ],
)
def test_power_sources(phone: Path, said: str, source: str | None) -> None:
    Path(os.environ["TOOLS"], "dumpsys").write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
    adb = remote_phone.Adb("phone")
    assert remote_phone.sheet(adb, remote_phone.properties_of(adb), []).power_source == source


# --- plumbing ---------------------------------------------------------


def bench(bundle: Path, runner: Path, **asked: int) -> BenchResults:
    return remote_adb.bench("adb://phone", Asked(bundle, runner, **{"rounds": 2, "tokens": 2, **asked}), tell)


def tell(line: str) -> None:
    """Nobody listens."""


def test_a_bench_through_adb(phone: Path, runner: Path, tiny_bundle: Path) -> None:
    (runner.parent / "libonnxruntime.so.1").write_bytes(b"library")
    found = bench(tiny_bundle, runner)
    assert (found.source, found.device.name, found.device.cpu) == ("adb", "Maker Phone 9", "SM8650")
    assert (found.device.os, found.device.battery_share) == ("Android 15", 0.87)
    assert (found.device.power_source, found.device.packages["onnxruntime"]) == ("mains", "1.31.1")
    (bundle,) = found.bundles
    (point,) = bundle.points
    assert len(point.runs) == 2 and point.summary is not None and point.decode_tokens == 2
    assert point.summary.encode_ms is not None and point.summary.encode_ms.n == 4
    assert point.summary.prefill_ms is not None and point.summary.prefill_ms.p50 == pytest.approx(6.125)
    assert point.summary.ttft_ms is not None and point.summary.ttft_ms.most == 11
    assert point.summary.decode_ms is not None and point.summary.decode_ms.n == 8
    assert (point.summary.load_peak_rss_mib, point.summary.peak_rss_mib) == (20, 30)
    assert point.summary.preprocess_ms is None and any("preprocessing" in one.what for one in found.missing)
    assert any("0 of 4 have the 3 tokens of the Python session" in note for note in found.notes)
    assert not found.emulated
    assert point.runs[0].disturbance is not None
    assert point.runs[0].disturbance.celsius_after == 31.2
    assert point.runs[0].disturbance.thermal_state_after == "fair"


def test_what_gets_to_the_phone(phone: Path, runner: Path, tiny_bundle: Path) -> None:
    (runner.parent / "libonnxruntime.so.1").write_bytes(b"library")
    bench(tiny_bundle, runner, rounds=1)
    calls = phone.with_name("phone.calls").read_text().splitlines()
    assert calls == ["30 env LD_LIBRARY_PATH=runner program case/plan.txt"]
    assert (phone / "runner" / "onnx-runner").read_bytes() == runner.read_bytes()
    assert (phone / "runner" / "libonnxruntime.so.1").read_bytes() == b"library"
    plan = (phone / "case" / "plan.txt").read_text().splitlines()
    assert plan[0] == "pocketvlm-plan 1" and "threads 2" in plan
    for line in plan:
        if line.startswith("part "):
            path = line.split(" ", 2)[2]
            assert (phone / path).read_bytes() == (tiny_bundle / path.partition("/")[2]).read_bytes()
    pushes = phone.with_name("phone.pushes").read_text()
    (phone / "runner" / "onnx-runner").write_bytes(b"old")
    bench(tiny_bundle, runner, rounds=1)
    assert phone.with_name("phone.pushes").read_text() == pushes + "pushed\n"


def test_a_loader_beside_the_program_starts_it(runner: Path) -> None:
    assert remote_runner.find(runner).command == "./runner/onnx-runner"
    for name in ("ld-linux-aarch64.so.1", "libc.so.6", "notes.txt"):
        (runner.parent / name).write_text("")
    program = remote_runner.find(runner)
    assert [one.name for one in program.beside] == ["ld-linux-aarch64.so.1", "libc.so.6"]
    assert program.command == "./runner/ld-linux-aarch64.so.1 --library-path runner ./runner/onnx-runner"


@pytest.mark.parametrize("why", ["program", "property"])
def test_an_emulator_is_no_phone(phone: Path, runner: Path, tiny_bundle: Path, why: str) -> None:
    if why == "program":
        act = phone.with_name("phone.act")
        act.write_text(act.read_text().replace("program runner", "program qemu-aarch64-static"))
    else:
        tool = Path(os.environ["TOOLS"], "getprop")
        tool.write_text(tool.read_text().replace("[ro.soc", "[ro.kernel.qemu]: [1]\n[ro.soc"))
    found = bench(tiny_bundle, runner, rounds=1)
    assert found.emulated and "not how fast" in (found.emulated_why or "")


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (
            "pocketvlm-runner 1 llama.cpp b1\n",
            "onnx-runner: runs llama.cpp, .* wants the runner for onnxruntime",
        ),
        ("pocketvlm-runner 2 onnxruntime 1.31.1\n", "reads plans of version 2, .* build it again"),
        ("llama.cpp version: 1\n", r"is no runner that answers on adb://phone \(llama.cpp version: 1\)"),
        ("", r"is no runner .* \(said nothing\)"),
    ],
)
def test_a_runner_for_something_else(
    phone: Path, runner: Path, tiny_bundle: Path, hello: str, words: str
) -> None:
    phone.with_name("phone.hello").write_text(hello)
    with pytest.raises(DeviceError, match=words):
        bench(tiny_bundle, runner)
    assert not (phone / "bundle").exists()


@pytest.mark.parametrize(
    "act", ["echo 'error: decoder: cannot be opened'; exit 1", "head -c 90 $PHONE.full; echo; exit 137"]
)
def test_a_runner_that_fails(phone: Path, runner: Path, tiny_bundle: Path, act: str) -> None:
    phone.with_name("phone.full").write_text(SAID)
    phone.with_name("phone.act").write_text(act + "\n")
    with pytest.raises(DeviceError, match=r"adb://phone: onnx-runner: (error: decoder|answer encode_ms)"):
        bench(tiny_bundle, runner)


def test_rounds_before_the_one_that_fails_are_kept(
    phone: Path, runner: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, left = remote_runner.measure, [True, True, False]

    def unplugged(*args: Any) -> Said:
        if not left.pop(0):
            raise DeviceError("adb://phone: is gone; plug it in")
        return measure(*args)

    monkeypatch.setattr(remote_runner, "measure", unplugged)
    found = bench(tiny_bundle, runner, rounds=5)
    assert len(found.bundles[0].points[0].runs) == found.policy.rounds == 2
    assert [(one.what, one.why) for one in found.missing][-1] == (
        "round 3 of 5", "adb://phone: is gone; plug it in",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("error: device unauthorized.", "accept its question"),
        ("error: device offline", "is offline"),
        ("error: no devices/emulators found", "no phone is there"),
        ("error: more than one device/emulator", "several phones"),
    ],
)
def test_phones_that_cannot(phone: Path, state: str, words: str) -> None:
    Path(os.environ["STATE"]).write_text(state)
    with pytest.raises(DeviceError, match=words):
        remote_phone.Adb("phone").connect()


def test_a_phone_that_is_not_there(phone: Path) -> None:
    with pytest.raises(DeviceError, match="is not there; adb devices"):
        remote_phone.Adb("other").connect()


def test_a_runner_that_still_runs(phone: Path, runner: Path, tiny_bundle: Path) -> None:
    phone.mkdir()
    (phone / "running").write_text("999999999\n")
    bench(tiny_bundle, runner, rounds=1)  # that process is gone
    with subprocess.Popen(["sh", "-c", "read line # ./runner/onnx-runner"], stdin=subprocess.PIPE) as other:
        (phone / "running").write_text(f"{other.pid}\n")
        with pytest.raises(DeviceError, match=f"still runs there; wait, or: adb shell kill {other.pid}"):
            bench(tiny_bundle, runner, rounds=1)
        assert other.stdin is not None
        other.stdin.close()


def test_full_storage(phone: Path, runner: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULL", "yes")
    with pytest.raises(DeviceError, match="storage is full"):
        bench(tiny_bundle, runner)


def test_a_program_for_another_phone(phone: Path, runner: Path, tiny_bundle: Path) -> None:
    data = bytearray(runner.read_bytes())
    data[18] = 3
    runner.write_bytes(data)
    with pytest.raises(DeviceError, match="is for x86; adb://phone runs arm64-v8a"):
        bench(tiny_bundle, runner)


def test_no_program(phone: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"nothing: is no file; docs/devices\.md"):
        bench(tiny_bundle, tmp_path / "nothing")


def test_no_adb_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match="apt install adb"):
        remote_phone.Adb("phone")

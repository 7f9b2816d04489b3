"""Phones behind adb: what is read from them, and the plumbing against a made-up `adb`.

The made-up phone is a shell on this machine. It shows that files, commands and figures go where they should;
that a phone does all this is not shown here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from evals.bench.bench_conditions import CoreCluster
from evals.remote import remote_adb, remote_phone
from evals.remote.remote_adb import Asked, read_counters
from evals.remote.remote_ssh import DeviceError
from runtime.errors import InputError

LOG = """\
0.00.220.402 I encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)
0.00.489.749 I mtmd batch encoding done in 269 ms
0.00.516.368 I image decoded (batch 1/1) in 26 ms
gray rectangle
0.00.560.836 I llama_perf_context_print:        load time =      26.75 ms
0.00.560.887 I llama_perf_context_print: prompt eval time =     333.67 ms /   110 tokens (    3.03 ms/token)
0.00.560.917 I llama_perf_context_print:        eval time =       6.29 ms /     5 runs   (    1.26 ms/token)
0.00.560.945 I llama_perf_context_print:       total time =     432.56 ms /   115 tokens
"""
"""As benchmarks/android_llama.sh's program printed it under qemu, but for the answer and shorter units."""

PROPERTIES = """\
[ro.product.manufacturer]: [Maker]
[ro.product.model]: [Phone 9]
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.cpu.abilist]: [arm64-v8a,armeabi-v7a]
[ro.soc.model]: [SM8650]
[ro.build.version.release]: [15]
"""
BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: true
  level: 87
  temperature: 312
Thermal Status: 2
"""
ADB = """\
#!/bin/sh
# adb [-s SERIAL] get-state | shell SCRIPT | push FROM TO, with the phone's folder at $PHONE
[ "$1" = -s ] && { [ "$2" = phone ] || { echo "error: device '$2' not found" >&2; exit 1; }; shift 2; }
place() { printf '%s' "$1" | sed "s#/data/local/tmp/pocketvlm#$PHONE#g"; }
case $1 in
  get-state) cat "$STATE" >&2; [ -s "$STATE" ] || echo device;;
  push) [ -z "$FULL" ] || { echo "adb: error: write: No space left on device"; exit 1; }
        cp "$2" "$(place "$3")"; echo pushed >> "$PHONE.pushes";;
  shell) PATH="$TOOLS:$PATH" sh -c "$(place "$2")";;
esac
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the phone's; `adb`, `getprop`, `dumpsys` and `taskset` are made up."""
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {
        "adb": ADB,
        "getprop": f"#!/bin/sh\ncat <<'END'\n{PROPERTIES}END\n",
        "dumpsys": f"#!/bin/sh\n[ $1 = thermalservice ] || cat <<'END'\n{BATTERY}END\n",
        "taskset": f"#!/bin/sh\necho \"$@\" >> $PHONE.calls\nsleep 0.3\ncat <<'END'\n{LOG}END\n",
    }
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    state = tmp_path / "state"
    state.write_text("")
    for name, value in {"PHONE": tmp_path / "phone", "TOOLS": tools, "STATE": state, "FULL": ""}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    clusters = [CoreCluster(cpus=(0, 1, 2, 3), max_mhz=2000.0), CoreCluster(cpus=(4, 5), max_mhz=3200.0)]
    monkeypatch.setattr(remote_phone, "clusters_of", lambda adb: clusters)
    return tmp_path / "phone"


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """As long as an Arm program's header: the made-up taskset runs no program."""
    path = tmp_path / "llama-mtmd-cli"
    path.write_bytes(
        b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + (183).to_bytes(2, "little") + bytes(100)
    )
    return path


@pytest.fixture(scope="module")
def gguf_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from export import export_checkpoint
    from tests import gguf_checkpoints

    folder = tmp_path_factory.mktemp("gguf")
    return export_checkpoint(
        gguf_checkpoints.write("smolvlm", folder / "checkpoint"), folder / "b", to="gguf", precision="q8_0"
    )


# --- what is read -----------------------------------------------------


def test_counters_of_llama_cpp() -> None:
    found = read_counters(LOG)
    assert found == remote_adb.Counters(26.75, 269.0, 333.67, 110, 6.29 / 5, 5)
    assert read_counters(LOG.partition("        eval")[0]) is None
    assert read_counters("") is None


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


# --- plumbing ---------------------------------------------------------


def test_a_bench_through_adb(phone: Path, runner: Path, gguf_bundle: Path) -> None:
    found = remote_adb.bench("adb://phone", Asked(gguf_bundle, runner, rounds=2), lambda line: None)
    assert (found.source, found.device.name, found.device.cpu) == ("adb", "Maker Phone 9", "SM8650")
    assert (found.device.os, found.device.battery_share, found.device.power_source) == (
        "Android 15",
        0.87,
        "mains",
    )
    (bundle,) = found.bundles
    (point,) = bundle.points
    assert len(point.runs) == 2 and point.prompt_tokens == 110
    assert point.summary is not None and point.summary.decode_tok_s == pytest.approx(5000 / 6.29)
    assert (
        point.summary.ttft_ms is None
        and point.summary.prefill_ms is None
        and any("TTFT" in one.what for one in found.missing)
    )
    assert point.runs[0].disturbance is not None
    assert point.runs[0].disturbance.celsius_after == 31.2
    assert point.runs[0].disturbance.thermal_state_after == "fair"
    calls = phone.with_name("phone.calls").read_text().splitlines()
    assert len(calls) == 2 and calls[0].startswith("30 ") and "-t 2 " in calls[0]
    assert (phone / "runner").read_bytes() == runner.read_bytes()
    pushes = phone.with_name("phone.pushes").read_text()
    (phone / "runner").write_bytes(b"old")
    remote_adb.bench("adb://phone", Asked(gguf_bundle, runner, rounds=1), lambda line: None)
    assert phone.with_name("phone.pushes").read_text() == pushes + "pushed\n"


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


def test_full_storage_and_a_program_that_fails(
    phone: Path, runner: Path, gguf_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULL", "yes")
    with pytest.raises(DeviceError, match="storage is full"):
        remote_adb.bench("adb://phone", Asked(gguf_bundle, runner), lambda line: None)
    monkeypatch.setenv("FULL", "")
    Path(os.environ["TOOLS"], "taskset").write_text(
        "#!/bin/sh\necho 'error: unknown model architecture'\nexit 1\n"
    )
    with pytest.raises(DeviceError, match="llama-mtmd-cli: error: unknown model architecture"):
        remote_adb.bench("adb://phone", Asked(gguf_bundle, runner), lambda line: None)


def test_a_program_for_another_phone(phone: Path, runner: Path, gguf_bundle: Path) -> None:
    data = bytearray(runner.read_bytes())
    data[18] = 62
    runner.write_bytes(data)
    with pytest.raises(DeviceError, match="is for x86_64; adb://phone runs arm64-v8a"):
        remote_adb.bench("adb://phone", Asked(gguf_bundle, runner), lambda line: None)


def test_only_gguf(phone: Path, runner: Path, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="is onnx; a phone behind adb runs gguf"):
        remote_adb.bench("adb://phone", Asked(tiny_bundle, runner), lambda line: None)


def test_no_adb_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match="apt install adb"):
        remote_phone.Adb("phone")

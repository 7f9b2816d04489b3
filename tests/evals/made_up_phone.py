"""A made-up phone: a folder on this machine, and an `adb` that runs its shell here.

A program called onnx-runner is a script there, which prints what the test wrote into `phone.hello` and
`phone.act`; a program of another name runs as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evals.bench.bench_conditions import CoreCluster
from evals.remote import remote_phone

SAID = """\
program runner
load_ms 26.75
load_peak_kib 20480
logits 7 3.5 9 3.25
answer encode_ms 4.5 prefill_ms 6.25 first_ms 11 total_ms 13.5
decode_ms 1.25 1.5
tokens 7 9 7
answer encode_ms 4 prefill_ms 6 first_ms 10.5 total_ms 12.5
decode_ms 1 1
tokens 7 9 7
peak_kib 30720
done
"""
HELLO = "pocketvlm-runner 1 onnxruntime 1.31.1\n"

PROPERTIES = """\
[ro.product.manufacturer]: [Maker]
[ro.product.model]: [Phone 9]
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.cpu.abilist]: [arm64-v8a,armeabi-v7a,x86_64]
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
place() {
  printf '%s' "$1" | sed -e "s#/data/local/tmp/pocketvlm#$PHONE#g" -e 's# \\./runner/onnx-runner# program#'
}
case $1 in
  get-state) cat "$STATE" >&2; [ -s "$STATE" ] || echo device;;
  push) [ -z "$FULL" ] || { echo "adb: error: write: No space left on device"; exit 1; }
        cp "$2" "$(place "$3")"; echo pushed >> "$PHONE.pushes";;
  shell) PATH="$TOOLS:$PATH" sh -c "$(place "$2")";;
esac
"""


def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the phone's; `adb`, `getprop`, `dumpsys` and `taskset` are made up."""
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {
        "adb": ADB,
        "getprop": f"#!/bin/sh\ncat <<'END'\n{PROPERTIES}END\n",
        "dumpsys": f"#!/bin/sh\n[ $1 = thermalservice ] || cat <<'END'\n{BATTERY}END\n",
        "taskset": '#!/bin/sh\necho "$@" >> $PHONE.calls\nshift\n"$@"\n',
        "program": "#!/bin/sh\n[ $1 = --version ] && exec cat $PHONE.hello\n. $PHONE.act\n",
    }
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "phone.hello").write_text(HELLO)
    (tmp_path / "phone.act").write_text(f"cat <<'END'\n{SAID}END\n")
    state = tmp_path / "state"
    state.write_text("")
    for name, value in {"PHONE": tmp_path / "phone", "TOOLS": tools, "STATE": state, "FULL": ""}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    clusters = [CoreCluster(cpus=(0, 1, 2, 3), max_mhz=2000.0), CoreCluster(cpus=(4, 5), max_mhz=3200.0)]
    monkeypatch.setattr(remote_phone, "clusters_of", lambda adb: clusters)
    return tmp_path / "phone"

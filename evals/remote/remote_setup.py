"""What a device is, and a Python there that can bench.

In: an open `Ssh`, a folder there. Out: `Facts`; the command line of an interpreter that has everything.
Not here: copying (`evals/remote/remote_sync.py`), what runs (`evals/remote/remote_job.py`).

Own venv: `<folder>/venv`, made with the newest usable Python there, the wheel installed with its backend's
extra by pip. Given interpreter: nothing is installed; the wheel is unpacked beside and found by PYTHONPATH.
"""

from __future__ import annotations

import json
import posixpath
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from evals import formatting as fmt
from evals.remote.remote_ssh import LOST, DeviceError, Done, Ssh, explain

MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10", "python3")
OLDEST, NEWEST = (3, 10), (3, 13)
INSTALL_BYTES = 330_000_000
"""Room for venv, its packages and pip's work, where the venv is still to be made."""

RUN_BYTES = 20_000_000
"""Room for the unpacked code, logs, samples and results of a bench."""

NEEDS = ("numpy", "PIL", "pydantic", "rich", "tokenizers", "typer")
BACKENDS = {"onnx": "onnxruntime", "gguf": "llama_cpp"}
MARKER = ".pocketvlm-device"

PROBE = """
import ctypes, json, platform, struct, sys
try:
    import ensurepip, venv
    makes_venv = True
except ImportError:
    makes_venv = False
print(json.dumps({"version": sys.version_info[:3], "bits": struct.calcsize("P") * 8, "venv": makes_venv,
                  "libc": platform.libc_ver()[0], "path": sys.executable}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python there. `libc` is empty where it is not glibc."""

    path: str
    version: tuple[int, int, int]
    bits: int
    makes_venv: bool
    libc: str

    def __str__(self) -> str:
        return f"{self.path} {'.'.join(map(str, self.version))} ({self.bits} bit)"


@dataclass(frozen=True)
class Facts:
    """A device as a shell sees it. boot_id is new with every start; extra goes onto the device sheet."""

    system: str
    machine: str
    home: str
    boot_id: str
    extra: dict[str, str]


def probe(ssh: Ssh) -> Facts:
    """Look at the device. Raises DeviceError when a bundle cannot run there, naming what is wrong."""
    script = """
echo system=$(uname -s); echo machine=$(uname -m); echo home=$HOME
echo boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
for tool in sha256sum find nohup tail; do command -v $tool >/dev/null || echo lacks=$tool; done
echo nvpmodel=$(nvpmodel -q 2>/dev/null | tr '\\n' ' ')
echo l4t=$(head -n 1 /etc/nv_tegra_release 2>/dev/null)
echo clocks=$(cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq 2>/dev/null | tr '\\n' ' ')
for gpu in /sys/class/devfreq/*gpu* /sys/class/devfreq/*ga10b* /sys/class/devfreq/*gv11b*; do
  [ ! -f $gpu/cur_freq ] || echo gpu_clock=$(cat $gpu/cur_freq)
done
"""
    found: dict[str, str] = {}
    lacks = []
    for line in ssh.run(script).out.splitlines():
        key, _, value = line.partition("=")
        if key == "lacks":
            lacks.append(value)
        else:
            found[key] = value.strip()
    if found.get("system") != "Linux":
        raise DeviceError(f"{ssh.target}: runs {found.get('system') or 'an unknown system'}; wanted Linux")
    machine = found.get("machine", "")
    if machine not in MACHINES:
        raise DeviceError(
            f"{ssh.target}: its processor is {machine or 'unknown'}; wanted x86_64 or aarch64, for which the "
            "backends have wheels (a 64-bit system, if its processor can)"
        )
    if lacks:
        raise DeviceError(f"{ssh.target}: has no {', '.join(lacks)}; install coreutils and findutils there")
    extra = {key: found[key] for key in ("nvpmodel", "l4t") if found.get(key)}
    if found.get("clocks"):
        extra["cpu_khz_before"] = found["clocks"]
    if found.get("gpu_clock"):
        extra["gpu_hz_before"] = found["gpu_clock"]
    return Facts(
        system=found["system"],
        machine=machine,
        home=found["home"],
        boot_id=found.get("boot", ""),
        extra=extra,
    )


def claim(ssh: Ssh, folder: str) -> None:
    """Make the folder ours. Raises DeviceError when it is there, not empty, and not made by this command."""
    place, marker = shlex.quote(folder), shlex.quote(f"{folder}/{MARKER}")
    script = (
        f'if [ -e {place} ] && [ ! -f {marker} ] && [ -n "$(ls -A {place} 2>/dev/null)" ]; then echo taken; '
        f"else mkdir -p {place} && : > {marker} && echo ours; fi"
    )
    done = ssh.run(script)
    if done.out.strip() != "ours":
        raise DeviceError(f"{ssh.target}: {folder} holds other things; give --on-dir a new or empty folder")


def remove(ssh: Ssh, folder: str) -> None:
    """Delete the folder, if this command made it."""
    marker = shlex.quote(f"{folder}/{MARKER}")
    ssh.run(f"if [ -f {marker} ]; then rm -rf -- {shlex.quote(folder)}; fi")


def free_bytes(ssh: Ssh, folder: str) -> int:
    """What its disk has left for us."""
    return int(ssh.run(f"df -Pk {shlex.quote(folder)} | tail -n 1").out.split()[-3]) * 1024


def require_space(ssh: Ssh, folder: str, wanted: dict[str, int]) -> None:
    """Raises DeviceError when less than the sum of `wanted` bytes (by what they are for) is free there."""
    free, total = free_bytes(ssh, folder), sum(wanted.values())
    if free < total:
        parts = ", ".join(f"{fmt.size(size)} {what}" for what, size in wanted.items() if size)
        raise DeviceError(
            f"{ssh.target}: {fmt.size(free)} free in {folder}, {fmt.size(total)} wanted ({parts}); "
            "free some, or give --on-dir a folder on another disk"
        )


# --- Python -----------------------------------------------------------


def interpreter(ssh: Ssh, names: Sequence[str] = PYTHONS) -> Interpreter:
    """The first of `names` there that can run the device runtime. Raises DeviceError saying why none can."""
    loop = "; ".join(f"{shlex.quote(name)} -c {shlex.quote(PROBE)} 2>/dev/null" for name in names)
    seen = []
    for line in ssh.run(f"{loop}; true").out.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        seen.append(
            Interpreter(
                path=found["path"],
                version=tuple(found["version"]),
                bits=found["bits"],
                makes_venv=found["venv"],
                libc=found["libc"],
            )
        )
    if not seen:
        raise DeviceError(
            f"{ssh.target}: no Python there (looked for {', '.join(names)}); install Python 3.10 to 3.13, "
            "or give --on-python its path"
        )
    for one in seen:
        if OLDEST <= one.version[:2] <= NEWEST and one.bits == 64:
            return one
    raise DeviceError(
        f"{ssh.target}: found {'; '.join(dict.fromkeys(map(str, seen)))}; wanted 64-bit Python 3.10 to 3.13"
    )


def venv_maker(ssh: Ssh, formats: Iterable[str]) -> Interpreter:
    """The Python there that makes a venv for these formats. Raises DeviceError saying what it lacks."""
    found = interpreter(ssh)
    if not found.makes_venv:
        short = f"python{found.version[0]}.{found.version[1]}-venv"
        raise DeviceError(
            f"{ssh.target}: {found} cannot make a venv; install {short} there (Debian, Ubuntu), or give "
            "--on-python an interpreter that has the packages"
        )
    if "onnx" in formats and not found.libc:
        raise DeviceError(
            f"{ssh.target}: {found} is not built on glibc, for which onnxruntime has wheels; use another "
            "system, or give --on-python an interpreter that has onnxruntime"
        )
    return found


def check_given(ssh: Ssh, path: str, formats: Iterable[str]) -> Interpreter:
    """A Python that the user named: it must run, and have what the runtime imports. Raises DeviceError."""
    found = interpreter(ssh, (path,))
    modules = [*NEEDS, *(BACKENDS[name] for name in sorted(set(formats)) if name in BACKENDS)]
    test = "import importlib.util as u,sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    lacks = ssh.run(f"{shlex.quote(path)} -c {shlex.quote(test)} {' '.join(modules)}").out.split()
    if lacks:
        raise DeviceError(
            f"{ssh.target}: {path} has no {', '.join(lacks)}; install them there, or leave --on-python out: "
            "then a venv is made"
        )
    return found


def unpack(ssh: Ssh, folder: str, wheel: str, code: str, python: str) -> None:
    """Unpack the wheel as `<folder>/<code>` for a given interpreter; code of other versions goes."""
    test = "import sys,zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])"
    place, parent = shlex.quote(code), shlex.quote(posixpath.dirname(code))
    ssh.run(
        f"cd {shlex.quote(folder)} && {{ [ -d {place} ] || {{ rm -rf {parent} && mkdir -p {parent} && "
        f"{shlex.quote(python)} -c {shlex.quote(test)} {shlex.quote(wheel)} {place}.new && "
        f"mv {place}.new {place}; }}; }}"
    )


def has_venv(ssh: Ssh, folder: str, key: str) -> bool:
    """Whether the venv there was finished for this wheel, extras and system."""
    stamp = shlex.quote(f"{folder}/venv/.pocketvlm")
    return ssh.run(f"cat {stamp} 2>/dev/null; true").out.strip() == key


def make_venv(
    ssh: Ssh, folder: str, wheel: str, formats: Iterable[str], wheels: str | None, tell: Callable[[str], None]
) -> None:
    """Make or bring up to date `<folder>/venv`; `wheels`: a folder there to install from, without a network.

    Its stamp is written last. To keep it small, pip leaves when it is done (`ensurepip` brings it back), and
    only what is imported gets compiled. Raises DeviceError with pip's last error.
    """
    extras = sorted(set(formats) & set(BACKENDS))
    key = venv_key(wheel, extras)
    if has_venv(ssh, folder, key):
        return
    found = venv_maker(ssh, extras)
    tell(f"making a venv with {found}")
    source = f"--no-index --find-links {shlex.quote(wheels)}" if wheels else ""
    script = f"""
cd {shlex.quote(folder)} && mkdir -p tmp && TMPDIR=$PWD/tmp && export TMPDIR || exit 1
if [ ! -f venv/.made ]; then
  rm -rf venv && {shlex.quote(found.path)} -m venv venv && : > venv/.made || exit 1
fi
rm -f venv/.pocketvlm
venv/bin/python -m pip --version >/dev/null 2>&1 || venv/bin/python -m ensurepip >/dev/null || exit 1
venv/bin/python -m pip install --no-input --no-compile --disable-pip-version-check --progress-bar off \
  {source} {shlex.quote(f"{wheel}[{','.join(extras)}]")} || exit 1
venv/bin/python -m pip uninstall -q -y setuptools pip
rm -rf tmp
printf '%s\\n' {shlex.quote(key)} > venv/.pocketvlm
"""
    _install(ssh, script, tell, offline=wheels is not None)


def venv_key(wheel: str, extras: Iterable[str]) -> str:
    return f"{posixpath.basename(wheel)} [{','.join(sorted(extras))}]"


def _install(ssh: Ssh, script: str, tell: Callable[[str], None], offline: bool) -> None:
    """Run pip, a line of progress for each package; its own complaint becomes the error."""
    with ssh.process(f"exec 2>&1; {script}") as child:
        assert child.stdout is not None
        lines: list[str] = []
        for raw in child.stdout:
            line = raw.decode(errors="replace").strip()
            lines.append(line)
            if line.startswith(("Collecting ", "Installing ", "Building ")):
                tell(f"pip: {line[:90]}")
        code = child.wait()
    if code == LOST:
        raise explain(ssh.target, "\n".join(lines[-1:]))
    if code:
        text = "\n".join(lines)
        if "No space left" in text:
            raise ssh.failed(Done(code, "", text))
        raise DeviceError(f"{ssh.target}: pip: {_pip_fault(lines, offline)}")


UNREACHED = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its package index's certificate is refused there; is the clock there right?",
    ),
    ("name resolution", "it finds no address for its package index"),
    ("Name or service not known", "it finds no address for its package index"),
    ("Network is unreachable", "its package index is not reachable"),
    ("No route to host", "its package index is not reachable"),
    ("Connection refused", "its package index is not reachable"),
    ("timed out", "its package index does not answer"),
)
"""What pip says on the way to "no matching distribution", which is all that its last line tells."""


def _pip_fault(lines: Sequence[str], offline: bool) -> str:
    """Why pip failed, and what helps."""
    if offline:
        help_ = "put the missing wheel into --on-wheels"
    else:
        help_ = "without a network there, give --on-wheels a folder of wheels"
    broken = "\n".join(line for line in lines if "connection broken" in line or "Could not fetch" in line)
    for sign, meaning in UNREACHED:
        if sign in broken:
            return f"{meaning}; {help_}"
    wrong = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "")
    return f"{wrong.removeprefix('ERROR: ')}; {help_}"

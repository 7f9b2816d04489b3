"""A native runner on a phone: its files there, who it says that it is, one process of it.

In: the program here, whatever libraries lie beside it, a case. Out: what it printed. Not here: the case
(`remote/runner_plan.py`), what its figures become (`remote/remote_adb.py`), building it (`native/*.sh`).
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.remote import runner_output, runner_plan
from evals.remote.remote_phone import Adb, last_line
from evals.remote.remote_ssh import DeviceError
from evals.remote.runner_output import Runner, Said
from evals.remote.runner_plan import Case
from runtime.errors import InputError

FOLDER = "/data/local/tmp/pocketvlm"
"""Where adb's shell may write and run programs."""

PROGRAM = "runner"
"""The program's folder below."""

PLAN = f"{runner_plan.CASE}/plan.txt"
RUNNING = "running"
"""A file there with the process of the last runner: it goes on when adb's connection breaks."""

LIBRARY = re.compile(r".+\.so(\.\d+)*")
LOADER = re.compile(r"ld-(linux|musl)-[\w-]+\.so\.\d+")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """A runner here. `beside`: the libraries in its folder, which go with it."""

    path: Path
    beside: tuple[Path, ...]

    @property
    def command(self) -> str:
        """How it is started there. A C library of its own comes with its loader, which then starts it."""
        program = shlex.quote(f"./{PROGRAM}/{self.path.name}")
        loader = next((one.name for one in self.beside if LOADER.fullmatch(one.name)), None)
        if loader:
            return f"./{PROGRAM}/{loader} --library-path {PROGRAM} {program}"
        return f"env LD_LIBRARY_PATH={PROGRAM} {program}" if self.beside else program


def find(path: Path) -> Program:
    """The runner at `path` with its libraries. Raises InputError when there is none."""
    if not path.is_file():
        raise InputError(f"--on-runner {path}: is no file; docs/devices.md says how to build one")
    beside = (one for one in path.parent.iterdir() if LIBRARY.fullmatch(one.name) and one.is_file())
    return Program(path, tuple(sorted(beside)))


def copy_program(adb: Adb, program: Program, tell: Tell) -> None:
    """Push what is not there. Raises DeviceError."""
    adb.shell(f"mkdir -p {FOLDER}/{PROGRAM} {FOLDER}/{runner_plan.CASE}")
    for source in (program.path, *program.beside):
        _push(adb, source, f"{PROGRAM}/{source.name}", tell)
        adb.shell(f"chmod 755 {shlex.quote(f'{FOLDER}/{PROGRAM}/{source.name}')}")


def hello(adb: Adb, program: Program, bundle: Path, backend: str) -> Runner:
    """What the runner there says of itself. Raises DeviceError when it does not run or is for others."""
    said = adb.shell(f"cd {FOLDER} && {program.command} --version </dev/null", check=False)
    found = runner_output.hello(said)
    if found is None:
        raise DeviceError(
            f"{program.path.name}: is no runner that answers on {adb.name} ({last_line(said)}); "
            "docs/devices.md says how to build one"
        )
    if found.backend != backend:
        raise DeviceError(
            f"{program.path.name}: runs {found.backend}, {bundle} wants the runner for {backend}"
        )
    if found.plan_version != runner_plan.VERSION:
        raise DeviceError(
            f"{program.path.name}: reads plans of version {found.plan_version}, this pocketvlm writes "
            f"{runner_plan.VERSION}; build it again"
        )
    return found


def copy_case(adb: Adb, case: Case, tell: Tell) -> None:
    """Push the bundle's parts and the case's files, what is not there byte for byte. Raises DeviceError."""
    folders = {f"{FOLDER}/{path}".rpartition("/")[0] for path in (*case.parts, *case.files)}
    adb.shell(f"mkdir -p {shlex.join(sorted(folders))}")
    for path, source in case.parts.items():
        _push(adb, source, path, tell)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (path, data) in enumerate({**case.files, PLAN: case.plan.encode()}.items()):
            source = Path(scratch) / str(number)
            source.write_bytes(data)
            adb.push(source, f"{FOLDER}/{path}")


def check_idle(adb: Adb) -> None:
    """Raise DeviceError where the runner of a bench that was broken off still runs: two would spoil both."""
    process = f"$(cat {FOLDER}/{RUNNING} 2>/dev/null)"
    is_one = f'[ -n "$p" ] && grep -q {PROGRAM} /proc/$p/cmdline 2>/dev/null'
    said = adb.shell(f"p={process}; {is_one} && echo busy $p; true")
    if found := re.search(r"busy (\d+)", said):
        raise DeviceError(
            f"{adb.name}: an earlier bench's runner still runs there; wait, or: adb shell kill {found[1]}"
        )


def measure(adb: Adb, program: Program, cores: Sequence[int]) -> Said:
    """One fresh process, pinned to `cores` if there are any. Raises DeviceError with its last words."""
    mask = sum(1 << core for core in cores)
    pinned = f"taskset {mask:x} {program.command}" if mask else program.command
    script = f"echo $$ >{RUNNING}; exec {pinned} {PLAN} </dev/null"
    said = adb.shell(f"cd {FOLDER} && sh -c {shlex.quote(script)}", check=False)
    found = runner_output.read(said)
    if found is None:
        raise DeviceError(f"{adb.name}: {program.path.name}: {last_line(said)}")
    return found


def _push(adb: Adb, source: Path, path: str, tell: Tell) -> None:
    copied = adb.push(source, f"{FOLDER}/{path}")
    tell(f"{source.name}: {'copied' if copied else 'is there already'}")

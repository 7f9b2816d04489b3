"""`pocketvlm bench ... --on ssh://user@host`: the same bench, run on a device, with the same results.

In: a target, bundle directories here, the bench's own options. Out: `BenchResults` with `source` ssh.
Not here: connections (`evals/remote/remote_ssh.py`), copying (`evals/remote/remote_sync.py`), Python there
(`remote/remote_setup.py`), the job (`remote/remote_job.py`), measuring (the bench that runs there).

Nothing of a run that fails is written here, and everything that reached the device stays there: the same
command goes on. `docs/devices.md` is the user's page.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.bench import bench_results, telemetry
from evals.bench.bench_results import BenchResults
from evals.remote import (
    remote_adb,
    remote_browser,
    remote_job,
    remote_setup,
    remote_ssh,
    remote_sync,
    remote_wheel,
)
from evals.remote.remote_job import State
from evals.remote.remote_setup import BACKENDS, Facts
from evals.remote.remote_ssh import DeviceError, Ssh
from evals.remote.remote_sync import Local
from runtime import bundle as bundle_files
from runtime import files
from runtime.errors import InputError

FOLDER = ".cache/pocketvlm/device"
"""Where things go on a device, below its user's home; beside it this program keeps data sets of its own."""

TELEMETRY = "telemetry.jsonl"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a device is used. folder: absolute or below home. python: an interpreter there that has the
    packages; None: a venv is made. wheels: a folder here to install from, for a device without a network.
    clean: delete everything there at the end."""

    folder: str = FOLDER
    python: str | None = None
    wheels: Path | None = None
    clean: bool = False


@dataclass(frozen=True)
class Request:
    """What to bench there. A `Path` among the arguments is a file here, which is copied."""

    bundles: tuple[Path, ...]
    arguments: tuple[str | Path, ...] = ()
    formats: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Raises InputError, BundleError before anything is sent."""
        names = [path.resolve().name for path in self.bundles]
        if not names:
            raise InputError("bench --on: got no bundle; give one or more bundle directories")
        if len(set(names)) < len(names):
            raise InputError(f"bench --on: two bundles have one directory name: {', '.join(names)}")
        found = tuple(bundle_files.read(path).format for path in self.bundles)
        for path, name in zip(self.bundles, found, strict=True):
            if name not in BACKENDS:
                raise InputError(
                    f"{path}: is {name}; a device behind ssh runs {' and '.join(BACKENDS)} bundles"
                )
        for argument in self.arguments:
            if isinstance(argument, Path) and not argument.is_file():
                raise InputError(f"{argument}: is no file here")
        object.__setattr__(self, "formats", found)


def measure(
    url: str,
    bundles: Sequence[Path],
    context: Any,
    settings: Settings,
    *,
    runner: Path | None = None,
    tell: Tell = print,
    out: Path | None = None,
) -> BenchResults:
    """What `--on` does: a Linux machine (ssh://), a phone (adb://) or a browser (browser://).

    `context`: typer's, of the verb. `out`: where the results are written. Raises PocketError; InputError on
    an address of no such kind, or an option that a phone or a browser does not know.
    """
    if unfit := _unfit(url, settings, runner):
        raise InputError(f"{', '.join(unfit)}: not for {url}; leave it out")
    if out is not None:
        bench_results.check_place(out)
    if url.startswith("ssh:"):
        return bench(url, Request(tuple(bundles), passed_on(context)), settings, tell, out)
    found = _without_ssh(url, bundles, context, runner, tell)
    if out is not None:
        bench_results.write(found, out)
    return found


def _unfit(url: str, settings: Settings, runner: Path | None) -> list[str]:
    """Options of another kind of device, which would have no effect."""
    found = [] if runner is None or url.startswith("adb:") else ["--on-runner"]
    if url.startswith("ssh:"):
        return found
    given = {"dir": settings.folder != FOLDER, "python": settings.python, "wheels": settings.wheels}
    return found + [f"--on-{name}" for name, value in (given | {"clean": settings.clean}).items() if value]


def _without_ssh(
    url: str, bundles: Sequence[Path], context: Any, runner: Path | None, tell: Tell
) -> BenchResults:
    """A browser's results, or a phone's."""
    if url.startswith(f"{remote_browser.SCHEME}:"):
        return remote_browser.measure(url, bundles, context.params, _given(context), tell)
    if not url.startswith("adb:"):
        raise InputError(f"--on {url}: wanted ssh://user@host[:port], adb://SERIAL or browser://")
    if unknown := [flag for flag in _given(context) if flag not in PHONE_KNOWS]:
        raise InputError(f"{', '.join(unknown)}: not for adb://; a phone knows {', '.join(PHONE_KNOWS)}")
    if len(bundles) != 1 or runner is None:
        raise InputError("--on adb://: wanted one bundle and --on-runner PROGRAM (docs/devices.md builds it)")
    names = ("image", "question", "rounds", "repeats", "warmup", "tokens", "threads")
    values = {name: context.params[name] for name in names}
    image = None if values["image"] is None else Path(values["image"])
    return remote_adb.bench(url, remote_adb.Asked(bundles[0], runner, **{**values, "image": image}), tell)


def bench(
    url: str,
    request: Request,
    settings: Settings = Settings(),
    tell: Tell = print,
    out: Path | None = None,
) -> BenchResults:
    """Run the bench on the device; its results, marked with where they come from.

    out: where they are written, and beside it the samples of heat, clock and power if there are any
    (`evals/bench/telemetry.py`), before they are deleted there.
    Raises DeviceError, InputError, PocketError; after any of them the same call goes on where it was.
    """
    target = remote_ssh.parse(url)
    if settings.wheels is not None and not settings.wheels.is_dir():
        raise InputError(f"--on-wheels {settings.wheels}: is no directory here")
    tell(f"connecting to {target}")
    with tempfile.TemporaryDirectory() as scratch, Ssh(target) as ssh:
        wheel = remote_wheel.write(Path(scratch))
        facts = remote_setup.probe(ssh)
        folder = posixpath.normpath(posixpath.join(facts.home, settings.folder))
        remote_setup.claim(ssh, folder)
        place = _Place(ssh, folder, facts, request, settings, wheel, tell)
        results, samples = place.results()
        if out is not None:
            bench_results.write(results, out)
            if samples:
                files.write_bytes(out.with_suffix(".telemetry.jsonl"), samples)
        remote_job.stop(ssh, folder)
        if settings.clean:
            tell(f"deleting {folder} there")
            remote_setup.remove(ssh, folder)
    return results


@dataclass(frozen=True)
class _Place:
    """One bench at one device."""

    ssh: Ssh
    folder: str
    facts: Facts
    request: Request
    settings: Settings
    wheel: Path
    tell: Tell

    def results(self) -> tuple[BenchResults, bytes]:
        """The results, and the samples taken meanwhile. They stay there, too."""
        job_id, job = self.job_id(), remote_job.look(self.ssh, self.folder)
        if job.state is State.RUNNING and job.id != job_id:
            raise DeviceError(
                f"{self.ssh.target}: another bench runs there in {self.folder}; wait for it, or end it: "
                f"kill -- -$(cat {self.folder}/run/pid)"
            )
        if job.id != job_id and job.id:
            remote_job.stop(self.ssh, self.folder)
        if job.id == job_id and job.state is State.RUNNING:
            self.tell("this bench runs there already; following it")
        elif job.id == job_id and job.state is State.ENDED and self.ended_well():
            self.tell("this bench has ended there; fetching its results")
        else:
            python = self.prepare()
            remote_job.start(self.ssh, self.folder, job_id, *self.commands(python), self.facts)
        code = remote_job.follow(self.ssh, self.folder, self.facts.boot_id, self.passed_line)
        if code:
            words = remote_job.failure(self.ssh, self.folder, code)
            raise DeviceError(f"{self.ssh.target}: the bench there: {words}")
        samples = self.samples()
        return marked(self.fetch(), self.facts, samples), samples

    def passed_line(self, line: str) -> None:
        """A line of the bench there; an error's line comes with the error."""
        if not line.startswith("pocketvlm: "):
            self.tell(line.removeprefix("bench: "))

    def job_id(self) -> str:
        """What was asked: bundles, arguments, code. Results of anything else are never taken for it."""
        asked = {
            "bundles": {path.resolve().name: bundle_files.digest(path) for path in self.request.bundles},
            "arguments": [
                str(one) if isinstance(one, str) else hashlib.sha256(one.read_bytes()).hexdigest()
                for one in self.request.arguments
            ],
            "wheel": self.wheel.name,
            "python": self.settings.python,
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]

    def ended_well(self) -> bool:
        path = posixpath.join(self.folder, "run", "rc")
        return self.ssh.read(path).strip() == b"0"

    # --- before it runs -------------------------------------------------

    def prepare(self) -> str:
        """Bring bundles, files and code there, and a Python that has what they need; that Python."""
        wheel_name = f"wheel/{self.wheel.name}"
        formats = self.request.formats
        given = self.settings.python
        if given is not None:
            remote_setup.check_given(self.ssh, given, formats)
            ready = True
        else:
            key = remote_setup.venv_key(wheel_name, set(formats))
            ready = remote_setup.has_venv(self.ssh, self.folder, key)
            if not ready:
                remote_setup.venv_maker(self.ssh, formats)  # before anything is sent: there may be none
        self.copy(wheel_name, 0 if ready else remote_setup.INSTALL_BYTES)
        if given is not None:
            remote_setup.unpack(self.ssh, self.folder, wheel_name, self.code, given)
            return given
        wheels = None if self.settings.wheels is None else "wheels"
        remote_setup.make_venv(self.ssh, self.folder, wheel_name, formats, wheels, self.tell)
        return f"{self.folder}/venv/bin/python"

    def copy(self, wheel_name: str, install_bytes: int) -> None:
        self.tell("comparing files")
        groups: dict[str, Mapping[str, Local]] = {
            name: remote_sync.local_files(path, name) for path, name in self.remote_bundles()
        }
        groups["wheel"] = {wheel_name: remote_sync.local_file(self.wheel)}
        groups["files"] = {self.remote_file(path): remote_sync.local_file(path) for path in self.files()}
        if self.settings.wheels is not None:
            groups["wheels"] = remote_sync.local_files(self.settings.wheels, "wheels")
        missing: dict[str, Local] = {}
        for owned, wanted in groups.items():
            missing |= remote_sync.differing(self.ssh, self.folder, wanted, owned)
        total = sum(file.bytes for file in missing.values())
        needs = {"to copy": total, "to install": install_bytes, "to run": remote_setup.RUN_BYTES}
        remote_setup.require_space(self.ssh, self.folder, needs)
        sent = remote_sync.send(self.ssh, self.folder, missing, self.tell)
        self.tell(f"copied {len(missing)} files, {sent} bytes" if missing else "every file is there already")

    def remote_bundles(self) -> Iterable[tuple[Path, str]]:
        return ((path, f"bundles/{path.resolve().name}") for path in self.request.bundles)

    def files(self) -> list[Path]:
        return [one for one in self.request.arguments if isinstance(one, Path)]

    @staticmethod
    def remote_file(path: Path) -> str:
        """Two pictures of one name stay two."""
        return f"files/{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}/{path.name}"

    @property
    def code(self) -> str:
        """The unpacked wheel, for a given interpreter."""
        return f"code/{self.wheel.name.removesuffix('.whl')}"

    def commands(self, python: str) -> tuple[list[str], list[str]]:
        """The bench, and the sampler beside it; both run in `<folder>/run`."""
        start = ["env", f"PYTHONPATH={self.folder}/{self.code}"] if self.settings.python is not None else []
        arguments = [
            one if isinstance(one, str) else f"{self.folder}/{self.remote_file(one)}"
            for one in self.request.arguments
        ]
        bundles = [f"{self.folder}/{name}" for _, name in self.remote_bundles()]
        here = [*start, python, "-m"]
        verb = [*here, "pocketvlm", "bench", *bundles, "--out=bench.json", "--json", *arguments]
        return verb, [*here, "evals.bench.telemetry", TELEMETRY]

    # --- after it -------------------------------------------------------

    def samples(self) -> bytes:
        path = shlex.quote(f"{self.folder}/run/{TELEMETRY}")
        there = self.ssh.run(f"[ ! -s {path} ] || echo yes").out.strip() == "yes"
        return self.ssh.read(f"{self.folder}/run/{TELEMETRY}") if there else b""

    def fetch(self) -> BenchResults:
        """Raises DeviceError when the bench ended well and left no readable results."""
        data = self.ssh.read(f"{self.folder}/run/bench.json")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "bench.json"
            path.write_bytes(data)
            try:
                return bench_results.read(path)
            except InputError as error:
                raise DeviceError(f"{self.ssh.target}: {error}") from error


def marked(results: BenchResults, facts: Facts, samples: bytes) -> BenchResults:
    """The results with where they came from and what the device did meanwhile."""
    sheet = results.device.model_copy(update={"extra": {**results.device.extra, **facts.extra}})
    said = telemetry.sentence(samples.decode(errors="replace").splitlines())
    notes = (*results.notes, *([said] if said else []))
    return results.model_copy(update={"source": "ssh", "device": sheet, "notes": notes})


def _given(context: Any) -> list[str]:
    """The verb's options that differ from their default."""
    return [one for one in passed_on(context) if isinstance(one, str) and one.startswith("--")]


HERE_ONLY = (
    *("bundles", "out", "as_json", "results"),
    *("on", "on_dir", "on_python", "on_wheels", "on_clean", "on_runner"),
)
"""What of the verb's parameters concerns this side; every other one is the device's."""

PHONE_KNOWS = ("--image", "--question", "--rounds", "--repeats", "--warmup", "--tokens", "--threads")
"""Options of the verb that mean something to a phone behind adb."""

FILES = ("image",)
"""Parameters of the verb that name a file here."""


def passed_on(context: Any) -> tuple[str | Path, ...]:
    """The verb's options as the arguments of the same verb there: those that differ from their default.

    `context`: typer's.
    """
    found: list[str | Path] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.name in HERE_ONLY or value is None or value == parameter.default:
            continue
        flag = parameter.opts[0]
        if isinstance(value, bool):
            found.append(flag if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            found += [flag, Path(one) if parameter.name in FILES else str(one)]
    return tuple(found)

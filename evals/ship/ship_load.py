"""bench.json, eval.json and parity.json of any number of devices and tasks, read and joined.

In: files, or directories that hold them. Out: `Evidence`. Not here: what the figures mean.

A bundle has one name in all files; files that tell the hash of its manifest must agree on it, because a
verdict over two builds of one name would be about neither. The same is held for a device and for a task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.asking import eval_results
from evals.asking.eval_results import EvalResults
from evals.bench import bench_import, bench_results
from evals.bench.bench_conditions import Reason
from evals.bench.bench_results import BenchResults, BundleResult, PointResult
from evals.parity import parity_results
from evals.parity.parity_results import ParityResults
from evals.ship import ship_evidence as seen
from evals.ship.ship_evidence import BundleFacts, DeviceSeen, Evidence, ParitySeen, Source, Task
from evals.ship.ship_flips import flips_of
from evals.ship.ship_timing import timing_of
from runtime import files
from runtime.errors import InputError

READERS: dict[str, Callable[[Path], Any]] = {
    bench_results.SCHEMA: bench_import.read,
    eval_results.SCHEMA: eval_results.read,
    parity_results.SCHEMA: parity_results.read,
}
SAME_DEVICE = ("cpu", "architecture", "cores", "governor", "power_mode")
DEPTH = 3
"""How far below a directory files are looked for."""


def load(paths: Sequence[Path]) -> Evidence:
    """Everything in these files and directories.

    Raises InputError for a path that is not there, a file of another kind, a directory without any, and for
    files that contradict each other; StateError or InputError for a file that does not fit its schema.
    """
    join = _Join()
    for path in dict.fromkeys(found for given in paths for found in _files(given)):
        schema = schema_of(path)
        if schema not in READERS:
            raise InputError(
                f"{path}: schema is {schema!r}; wanted one of {', '.join(READERS)}, or a directory of them"
            )
        join.add(path, READERS[schema](path))
    return join.evidence()


def schema_of(path: Path) -> str | None:
    """What a JSON file calls its schema; None when it has no such key. Raises InputError when unreadable."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error})") from error
    name = found.get("schema") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _files(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise InputError(f"{given}: cannot be read (no such file or directory)")
    found = [path for path in _json_below(given, DEPTH) if schema_of(path) in READERS]
    if not found:
        raise InputError(
            f"{given}: holds no bench.json, eval.json or parity.json; write them with "
            "`pocketvlm bench --out` and `pocketvlm eval --out`"
        )
    return found


def _json_below(directory: Path, depth: int) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir() and depth > 1 and not path.name.startswith("."):
            yield from _json_below(path, depth - 1)
        elif path.suffix == ".json" and path.is_file() and b'"pocketvlm.' in path.read_bytes():
            yield path


# --- joining ----------------------------------------------------------


@dataclass
class _Join:
    """Collects files; `origin` remembers which file said something first, for errors."""

    sources: list[Source] = field(default_factory=list)
    bundles: dict[str, BundleFacts] = field(default_factory=dict)
    devices: dict[str, DeviceSeen] = field(default_factory=dict)
    timings: dict[tuple[str, str, str], seen.Timing] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    parity: list[ParitySeen] = field(default_factory=list)
    flips: list[seen.FlipSeen] = field(default_factory=list)
    flips_left_out: int = 0
    missing: list[Reason] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    origin: dict[tuple[str, ...], str] = field(default_factory=dict)

    def add(self, path: Path, found: Any) -> None:
        schema = found.schema_id if isinstance(found, BenchResults) else found.schema_name
        self.sources.append(
            Source(file=path.name, schema_name=schema, created=found.created, sha256=files.sha256_file(path))
        )
        if isinstance(found, BenchResults):
            self._bench(path, found)
        elif isinstance(found, EvalResults):
            self._eval(path, found)
        else:
            self._parity(path, found)

    def evidence(self) -> Evidence:
        missing = {(reason.what, reason.why): reason for reason in self.missing}
        return Evidence(
            sources=tuple(self.sources),
            bundles=tuple(self.bundles.values()),
            devices=tuple(self.devices.values()),
            timings=tuple(self.timings.values()),
            tasks=tuple(self.tasks.values()),
            parity=tuple(self.parity),
            flips=tuple(self.flips),
            flips_left_out=self.flips_left_out,
            missing=tuple(missing.values()),
        )

    def _bench(self, path: Path, found: BenchResults) -> None:
        device = DeviceSeen(
            sheet=found.device, origin=found.source, emulated=found.emulated, bandwidth=found.bandwidth,
            emulated_why=found.emulated_why, created=found.created,
            tool=f"{found.tool.name} {found.tool.version}", notes=found.notes,
        )  # fmt: skip
        self._device(path, device)
        self.missing += found.missing
        for result in found.bundles:
            facts = {name: getattr(result, name) for name in BundleFacts.model_fields}
            name = self._bundle(path, BundleFacts.model_validate(facts))
            self.missing += [Reason(what=f"{name}: {one.what}", why=one.why) for one in result.missing]
            for point in result.points:
                self._timing(path, found, result, point, name)

    def _device(self, path: Path, device: DeviceSeen) -> None:
        known = self.devices.get(device.name)
        if known is None:
            self.devices[device.name] = device
            self.origin["device", device.name] = path.name
        elif why := seen.unlike(known.sheet, device.sheet, SAME_DEVICE):
            raise InputError(
                f"{path}: device {device.name!r} is also in {self.origin['device', device.name]}, but {why}; "
                "two devices, or two modes of one, need two names (bench --device-name)"
            )
        elif known.emulated != device.emulated:
            raise InputError(f"{path}: device {device.name!r} is emulated in one file and real in another")

    def _timing(
        self, path: Path, found: BenchResults, result: BundleResult, point: PointResult, name: str
    ) -> None:
        timing = timing_of(found, result, point, name)
        key = (timing.device, timing.bundle, timing.point)
        if key in self.timings:
            raise InputError(
                f"{path}: {name} on {timing.device} at {timing.point} is also in "
                f"{self.origin[('at', *key)]}; give one of both, or their devices two names (--device-name)"
            )
        self.timings[key] = timing
        self.origin[("at", *key)] = path.name

    def _bundle(self, path: Path, facts: BundleFacts) -> str:
        """The bundle's one name; a hash that is known under another name decides."""
        name = self.names.get(facts.sha256 or "", facts.name)
        known = self.bundles.get(name)
        if known is None:
            self.bundles[name] = facts
            self.origin["bundle", name] = path.name
        else:
            if known.sha256 and facts.sha256 and known.sha256 != facts.sha256:
                raise InputError(
                    f"{path}: bundle {name!r} has manifest {facts.sha256[:8]}.., in "
                    f"{self.origin['bundle', name]} {known.sha256[:8]}..; two builds of one name: "
                    "measure the older one again"
                )
            self.bundles[name] = _merged(known, facts)
        if facts.sha256:
            self.names.setdefault(facts.sha256, name)
        return name

    def _eval(self, path: Path, found: EvalResults) -> None:
        names = {}
        for subject in found.subjects:
            names[subject.name] = subject.name
            if subject.kind == "bundle":
                names[subject.name] = self._bundle(
                    path,
                    BundleFacts(
                        name=subject.name, sha256=subject.sha256, format=subject.format,
                        precision=subject.precision, disk_bytes=subject.bytes,
                    ),
                )  # fmt: skip
        task = _task(found, names)
        known = self.tasks.get(task.name)
        if known is not None:
            task = self._more_subjects(path, known, task)
        self.tasks[task.name] = task
        self.origin.setdefault(("task", task.name), path.name)
        for flip_list, left_out in [flips_of(found, names, self.bundles)]:
            self.flips += flip_list
            self.flips_left_out += left_out
        self.missing += [Reason(what=f"{task.name}: {one.what}", why=one.why) for one in found.missing]

    def _more_subjects(self, path: Path, known: Task, task: Task) -> Task:
        """The same questions answered by others."""
        first = self.origin["task", task.name]
        if known.info != task.info or known.units != task.units:
            raise InputError(
                f"{path}: task {task.name!r} has other questions or rules than in {first}; give one of both"
            )
        twice = {(one.subject, one.variant) for one in known.answered} & {
            (one.subject, one.variant) for one in task.answered
        }
        if twice:
            subject, variant = min(twice)
            raise InputError(f"{path}: {subject} ({variant}) of {task.name} is also in {first}; give one")
        subjects = {one.name: one for one in (*task.subjects, *known.subjects)}
        variants = {one.name: one for one in (*known.variants, *task.variants)}
        return known.model_copy(
            update={
                "subjects": tuple(subjects.values()),
                "variants": tuple(variants.values()),
                "answered": known.answered + task.answered,
                "summaries": known.summaries + task.summaries,
            }
        )

    def _parity(self, path: Path, found: ParityResults) -> None:
        for candidate in found.candidates:
            if candidate.kind != "bundle":
                continue
            name = self._bundle(
                path,
                BundleFacts(
                    name=candidate.name, sha256=candidate.sha256, format=candidate.format,
                    precision=candidate.precision,
                ),
            )  # fmt: skip
            self.parity.append(ParitySeen.of(candidate, found.reference, found.asked, name))
        self.missing += [Reason(what=f"parity: {one.what}", why=one.why) for one in found.missing]


def _merged(known: BundleFacts, facts: BundleFacts) -> BundleFacts:
    """What is known, completed by what is new; the first word counts."""
    empty = {
        name: getattr(facts, name)
        for name in BundleFacts.model_fields
        if getattr(known, name) in (None, ()) and getattr(facts, name) not in (None, ())
    }
    return known.model_copy(update=empty)


def _task(found: EvalResults, names: dict[str, str]) -> Task:
    groups = found.groups()
    units = tuple(groups)
    numbers: dict[str, int] = {}
    answered = []
    for subject in found.subjects:
        for variant in found.variants:
            scores = found.unit_scores(subject.name, variant.name)
            if scores:
                answered.append(
                    seen.Answered(
                        subject=names[subject.name], variant=variant.name,
                        scores=tuple(scores.get(unit) for unit in units),
                    )
                )  # fmt: skip
    return Task(
        info=found.task,
        variants=tuple(found.variants),
        units=units,
        groups=tuple(numbers.setdefault(groups[unit], len(numbers)) for unit in units),
        subjects=tuple(
            seen.SubjectSeen(
                name=names[one.name], kind=one.kind, format=one.format, precision=one.precision,
                sha256=one.sha256, bytes=one.bytes,
            )
            for one in found.subjects
        ),
        answered=tuple(answered),
        summaries=tuple(one.model_copy(update={"subject": names[one.subject]}) for one in found.summaries),
    )  # fmt: skip

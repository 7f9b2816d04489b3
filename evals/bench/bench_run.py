"""A whole bench: every bundle at every grid point, in turns, each time in a fresh process.

In: a `Request`. Out: `BenchResults`. Not here: one process (`evals/bench/bench_child.py`), the grid
(`evals/bench/bench_grid.py`), statistics (`evals/bench/bench_summary.py`), tables (`evals/bench/bench.py`).

Order: round by round, point by point, bundle by bundle; each round begins with another bundle, so that no
bundle always comes first and a drift of the machine falls on all of them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.bench import bench_facts, bench_process, bench_summary, device, emulation, system
from evals.bench.bench_conditions import Bandwidth, DeviceSheet, Energy, Reason
from evals.bench.bench_facts import BundleFacts
from evals.bench.bench_grid import Asked
from evals.bench.bench_results import SCHEMA, BenchResults, BundleResult, PointResult, Policy, Run, Tool
from evals.bench.bench_task import Outcome, Task
from runtime.errors import InputError, PocketError
from runtime.providers import EVALUATOR

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to measure. sustained_s, energy_s, bandwidth_s: seconds of each, 0 leaves it out.

    Sustained runs and energy are measured at the first grid point. Without a meter `meter_reason` says why;
    no process is started for it then.
    """

    bundles: tuple[Path, ...]
    grid: tuple[Asked, ...]
    policy: Policy
    drop_cache: bool = False
    sustained_s: float = 0.0
    energy_s: float = 0.0
    bandwidth_s: float = 2.0
    device_name: str | None = None
    meter_reason: str | None = None


@dataclass
class _Measured:
    """What is known of one bundle so far: runs by point, the last outcome by point, what failed."""

    facts: BundleFacts
    runs: dict[str, list[Run]] = field(default_factory=dict)
    last: dict[str, Outcome] = field(default_factory=dict)
    extra: dict[str, Outcome] = field(default_factory=dict)
    missing: list[Reason] = field(default_factory=list)


def run(request: Request, kept: Path | None = None, progress: Progress | None = None) -> BenchResults:
    """Measure. `kept`: a directory for what single processes found; the same request then goes on from it.
    It is the caller's to delete, once the results are written.

    A bundle that fails at some grid points has them in `missing`; one that fails at all of them in the first
    round raises the first of these errors. Raises PocketError, InputError.
    """
    if not request.grid:
        raise InputError("bench: the grid is empty")
    found = [_Measured(facts) for facts in bench_facts.read(request.bundles)]
    runner = _Runner(request, bench_process.Kept(kept), progress or (lambda step: None))
    before = runner.bandwidth()
    for each in () if request.drop_cache else found:
        fill_page_cache(each.facts.path)
    order = 0
    for number in range(request.policy.rounds):
        for asked in request.grid:
            for each in _turn(found, number):
                runner.latency(each, asked, number, order)
                order += 1
        for each in found:
            if not each.runs:
                raise PocketError(each.missing[0].why)
    emulated = emulation.emulated_why()
    evaluated = _evaluated(found)
    for each in found if not (emulated or evaluated) else ():
        runner.extras(each, request.grid[0])
    return _results(request, found, [*before, *runner.bandwidth()], emulated, evaluated)


class _Runner:
    """Carries out the tasks of one request, or takes their outcomes from an interrupted run of it."""

    def __init__(self, request: Request, kept: bench_process.Kept, progress: Progress) -> None:
        self.request, self.kept, self.progress = request, kept, progress
        self._versions = device.versions(device.RUNTIMES)

    def latency(self, each: _Measured, asked: Asked, number: int, order: int) -> None:
        name, point = each.facts.name, asked.point.id
        if any(reason.what == point for reason in each.missing):
            return
        several = f", {point}" if len(self.request.grid) > 1 else ""
        self.progress(f"{name}{several}, round {number + 1} of {self.request.policy.rounds}")
        try:
            outcome = self._outcome(self._task("latency", each, asked), each.facts.sha256, number)
        except PocketError as error:
            each.missing.append(Reason(what=point, why=str(error)))
            return
        each.last[point] = outcome
        each.runs.setdefault(point, []).append(
            Run(
                round=number,
                order=order,
                started=outcome.started,
                load=outcome.load,
                times=outcome.times,
                memory=outcome.memory,
                disturbance=outcome.disturbance,
                harness_share=outcome.harness_share,
            )
        )

    def extras(self, each: _Measured, asked: Asked) -> None:
        """The sustained run and the energy of a bundle."""
        energy_s = 0.0 if self.request.meter_reason else self.request.energy_s
        for kind, seconds in (("sustained", self.request.sustained_s), ("energy", energy_s)):
            if not seconds or asked.point.id not in each.runs:
                continue
            self.progress(f"{each.facts.name}, {kind}, {seconds:.0f} s")
            task = self._task(kind, each, asked, seconds)
            try:
                each.extra[kind] = self._outcome(task, each.facts.sha256, 0)
            except PocketError as error:
                each.missing.append(Reason(what=kind, why=str(error)))

    def bandwidth(self) -> list[Bandwidth]:
        if not self.request.bandwidth_s:
            return []
        self.progress("memory bandwidth")
        threads = self.request.policy.threads or 1
        outcome = bench_process.run(Task(kind="bandwidth", threads=threads, seconds=self.request.bandwidth_s))
        return [outcome.bandwidth] if outcome.bandwidth else []

    def _task(self, kind: str, each: _Measured, asked: Asked, seconds: float = 0.0) -> Task:
        policy = self.request.policy
        return Task.model_validate(
            {
                "kind": kind,
                "bundle": str(each.facts.path),
                "image": None if asked.image is None else str(asked.image),
                "question": asked.point.question,
                "threads": policy.threads or 1,
                "providers": policy.providers,
                "max_context": policy.max_context,
                "warmup": policy.warmup,
                "repeats": policy.repeats,
                "decode_tokens": policy.decode_tokens,
                "page_cache": "dropped" if self.request.drop_cache else "warm",
                "seconds": seconds,
            }
        )

    def _outcome(self, task: Task, sha256: str, number: int) -> Outcome:
        """`sha256`: the bundle's, so that a changed bundle (or another runtime) is measured anew."""
        image = None if task.image is None else hashlib.sha256(Path(task.image).read_bytes()).hexdigest()
        stable = task.model_copy(update={"bundle": sha256, "image": image}).model_dump_json()
        name = task.bundle or ""
        facts = f"{stable} {number} {Path(name).resolve()} {self._versions}"
        key = hashlib.sha256(facts.encode()).hexdigest()
        if (known := self.kept.get(key)) is not None:
            return known
        time.sleep(self.request.policy.rest_s)
        if self.request.drop_cache and task.kind == "latency":
            drop_page_cache(Path(name))
        outcome = bench_process.run(task)
        self.kept.put(key, outcome)
        return outcome


def fill_page_cache(bundle: Path) -> None:
    """Read every file once, so that the first load does as little reading as the later ones."""
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass


def drop_page_cache(bundle: Path) -> None:
    """Ask the kernel to forget the bundle's pages (needs no rights; advice, not a guarantee)."""
    if not hasattr(os, "posix_fadvise"):
        raise PocketError("drop_cache needs posix_fadvise (Linux); measure with a warm page cache instead")
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _turn(found: Sequence[_Measured], number: int) -> list[_Measured]:
    first = number % len(found)
    return [*found[first:], *found[:first]]


# --- what comes of it -------------------------------------------------


def _results(
    request: Request,
    found: Sequence[_Measured],
    bandwidths: Sequence[Bandwidth],
    emulated: str | None,
    evaluated: str | None,
) -> BenchResults:
    sheet, why = device.sheet(request.device_name), emulated or evaluated
    best = max(bandwidths, key=lambda each: each.read_gb_s, default=None)
    return bench_summary.complete(
        BenchResults(
            schema=SCHEMA,
            created=system.now(),
            tool=Tool(
                name="pocketvlm bench", version=device.versions(["pocketvlm"]).get("pocketvlm", "source")
            ),
            source="evaluator" if evaluated else "local",
            emulated=why is not None,
            emulated_why=why,
            device=sheet,
            policy=request.policy,
            grid=tuple(asked.point for asked in request.grid),
            bandwidth=best,
            bundles=tuple(_bundle(each, sheet, request) for each in found),
            missing=tuple(_missing(request, sheet, why)),
        )
    )


def _evaluated(found: Sequence[_Measured]) -> str | None:
    """Why the times are no device's where an evaluator ran a bundle."""
    units = {
        each.facts.name: unit
        for each in found
        for outcome in each.last.values()
        for unit, _ in outcome.units.values()
    }
    names = [name for name, unit in units.items() if unit == EVALUATOR]
    return f"numpy evaluates the ML programs of {', '.join(names)}" if names else None


def _bundle(each: _Measured, sheet: DeviceSheet, request: Request) -> BundleResult:
    facts, some = each.facts.result(), next(iter(each.last.values()))
    points = []
    for asked in request.grid:
        point = asked.point.id
        if point not in each.runs:
            continue
        last = each.last[point]
        first = asked is request.grid[0]
        points.append(
            PointResult(
                point=point,
                prompt_tokens=last.prompt_tokens,
                image_tokens=last.image_tokens,
                decode_tokens=request.policy.decode_tokens,
                runs=tuple(each.runs[point]),
                energy=_energy(each, request) if first else None,
                sustained=each.extra["sustained"].sustained if first and "sustained" in each.extra else None,
                roofline=each.facts.roofline(
                    last.prompt_tokens + (request.policy.decode_tokens + 1) // 2,
                    last.state_bytes,
                    last.max_context,
                    sheet.last_cache_bytes,
                ),
            )
        )
    parts = [
        part.model_copy(update=dict(zip(("unit", "unit_note"), some.units[part.role], strict=True)))
        if part.role in some.units
        else part
        for part in facts.parts
    ]
    return facts.model_copy(
        update={
            "parts": tuple(parts),
            "state_bytes": some.state_bytes,
            "max_context": some.max_context,
            "points": tuple(points),
            "missing": tuple(each.missing),
        }
    )


def _energy(each: _Measured, request: Request) -> Energy | None:
    if request.meter_reason:
        return Energy(why_not=request.meter_reason)
    return each.extra["energy"].energy if "energy" in each.extra else None


def _missing(request: Request, sheet: DeviceSheet, emulated: str | None) -> list[Reason]:
    """What this bench does not say, and why."""
    found = []

    def lacks(what: str, why: str) -> None:
        found.append(Reason(what=what, why=why))

    if emulated:
        lacks("speed of the device", f"the run was emulated ({emulated})")
    if emulated or not request.sustained_s:
        lacks("sustained run", "the run was emulated" if emulated else "not asked for; give --sustained 10m")
    if emulated or request.meter_reason or not request.energy_s:
        why = "the run was emulated" if emulated else request.meter_reason or "not asked for"
        lacks("energy", why)
    if not request.bandwidth_s:
        lacks("memory bandwidth", "not asked for")
    if not sheet.temperatures:
        lacks("temperature", "the system shows no thermal zone")
    if sheet.governor is None:
        lacks("frequency governor", "the system does not show it")
    if sheet.last_cache_bytes is None:
        lacks("cache size", "the system does not show it")
    if request.policy.rounds < 2:
        lacks("intervals", "one process per bundle cannot tell how much processes differ; give --rounds 5")
    if not request.drop_cache:
        lacks("load from cold storage", "files were in the page cache; give --drop-cache")
    return found

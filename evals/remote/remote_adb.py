"""`bench --on adb://SERIAL --on-runner PROGRAM`: a bundle on an Android phone, without Python there.

In: an ONNX or GGUF bundle, a native runner for the phone's processor, adb. Out: `BenchResults`, source adb.
Not here: the phone (`remote/remote_phone.py`), the runner there (`remote/remote_runner.py`), what it is to do
(`remote/runner_plan.py`).

Each round is a fresh process of the runner, pinned to the big cores, that answers one question about one
picture several times. The picture and the prompt are prepared here by the session's own code, so the phone
runs the bundle's parts and nothing else, and its tokens are compared with the session's. Heat and battery
come from dumpsys. Nothing of this has been seen on a phone: docs/devices.md says what has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.bench import bench_facts, bench_grid, bench_results, bench_summary, emulation, system
from evals.bench.bench_conditions import DeviceSheet, Disturbance, Energy, Reason
from evals.bench.bench_facts import BundleFacts
from evals.bench.bench_results import (
    SCHEMA,
    BenchResults,
    GridPoint,
    Load,
    Memory,
    PointResult,
    Run,
    Times,
    Tool,
)
from evals.remote import remote_phone, remote_rounds, remote_runner, runner_output, runner_plan
from evals.remote.remote_phone import Adb, heat
from evals.remote.remote_runner import Program
from evals.remote.remote_ssh import DeviceError
from evals.remote.runner_output import Runner, Said
from evals.remote.runner_plan import Case, Policy
from runtime.errors import InputError
from runtime.files import sha256_file

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to measure. threads None: as many as there are big cores."""

    bundle: Path
    runner: Path
    image: Path | None = None
    question: str | None = None
    rounds: int = 5
    repeats: int = 10
    warmup: int = 3
    tokens: int = 16
    threads: int | None = None


@dataclass(frozen=True)
class Phone:
    """Where it is measured, and with what. `emulated`: why it is no phone."""

    sheet: DeviceSheet
    program: Program
    runner: Runner
    cores: tuple[int, ...]
    emulated: str | None


def bench(url: str, asked: Asked, tell: Tell = print) -> BenchResults:
    """Measure on the phone. Raises DeviceError, InputError, BundleError, MissingExtra."""
    (facts,) = bench_facts.read([asked.bundle])
    if why := runner_plan.refusal(facts.manifest):
        raise InputError(f"{asked.bundle}: {why}")
    program = remote_runner.find(asked.runner)
    machine = remote_phone.program_machine(asked.runner)
    image, question = bench_grid.subject(asked.bundle, asked.image, asked.question)
    adb = Adb(remote_phone.parse(url))
    adb.connect()
    phone = _phone(adb, program, machine, facts, tell)
    threads = asked.threads or len(phone.cores) or phone.sheet.cores
    policy = Policy(asked.warmup, asked.repeats, asked.tokens, threads)
    tell(f"{facts.name}: answering here, to compare")
    case = runner_plan.make(asked.bundle, image, question, policy)
    remote_runner.copy_case(adb, case, tell)

    def measure(number: int) -> tuple[Run, Said]:
        tell(f"{facts.name}, round {number + 1} of {asked.rounds}")
        return _run(adb, phone, number)

    runs, stopped = remote_rounds.taken(asked.rounds, measure, tell)
    grid = GridPoint(id="default", image=image.name, image_sha256=sha256_file(image), question=question)
    found = _results(phone, facts, case, policy, grid, runs)
    return found.model_copy(update={"missing": (*found.missing, *stopped)})


def _phone(adb: Adb, program: Program, machine: str, facts: BundleFacts, tell: Tell) -> Phone:
    """Look at the phone and let the runner there say who it is, before anything large is copied."""
    properties = remote_phone.properties_of(adb)
    abis = properties.get("ro.product.cpu.abilist", properties.get("ro.product.cpu.abi", "")).split(",")
    if machine not in abis:
        raise DeviceError(f"{program.path}: is for {machine}; {adb.name} runs {' '.join(abis)}")
    clusters = remote_phone.clusters_of(adb)
    sheet = remote_phone.sheet(adb, properties, clusters)
    remote_runner.check_idle(adb)
    remote_runner.copy_program(adb, program, tell)
    runner = remote_runner.hello(adb, program, facts.path, runner_plan.BACKENDS[facts.manifest.format])
    packages = {**sheet.packages, runner.backend: runner.version}
    return Phone(
        sheet=sheet.model_copy(update={"packages": packages}),
        program=program,
        runner=runner,
        cores=tuple(remote_phone.big_cores(clusters)),
        emulated=remote_phone.emulator(properties),
    )


def _run(adb: Adb, phone: Phone, number: int) -> tuple[Run, Said]:
    """One process."""
    before, started = heat(adb), system.now()
    said = remote_runner.measure(adb, phone.program, phone.cores)
    after = heat(adb)
    memory = Memory(
        meter="VmHWM",
        load_peak_rss_mib=said.load_peak_kib / 1024,
        peak_rss_mib=said.peak_kib / 1024,
    )
    run = Run(
        round=number,
        order=number,
        started=started,
        load=Load(cold_ms=said.load_ms),
        times=Times(
            encode_ms=tuple(answer.encode_ms for answer in said.answers),
            prefill_ms=tuple(answer.prefill_ms for answer in said.answers),
            ttft_ms=tuple(answer.first_ms for answer in said.answers),
            decode_ms=tuple(answer.decode_ms for answer in said.answers),
            end_to_end_ms=tuple(answer.total_ms for answer in said.answers),
        ),
        memory=memory if said.peak_kib else None,
        disturbance=Disturbance(
            celsius_before=before[0],
            celsius_after=after[0],
            thermal_state_after=after[1],
        ),
    )
    return run, said


def _results(
    phone: Phone,
    facts: BundleFacts,
    case: Case,
    policy: Policy,
    grid: GridPoint,
    runs: Sequence[tuple[Run, Said]],
) -> BenchResults:
    processes = [said for _, said in runs]
    emulated = phone.emulated or emulation.reason(processes[0].program, phone.sheet.architecture)
    point = PointResult(
        point=grid.id,
        prompt_tokens=case.prompt_tokens,
        image_tokens=case.image_tokens,
        decode_tokens=policy.decode_tokens,
        runs=tuple(run for run, _ in runs),
        energy=Energy(why_not="not measured over adb: the phone charges from the cable"),
    )
    measured = {"points": (point,), "state_bytes": case.state_bytes, "max_context": case.max_context}
    return bench_summary.complete(
        BenchResults(
            schema=SCHEMA,
            created=system.now(),
            tool=Tool(
                name=f"pocketvlm's runner for {phone.runner.backend}", version=str(runner_plan.VERSION)
            ),
            source="adb",
            emulated=emulated is not None,
            emulated_why=emulated,
            device=phone.sheet,
            policy=bench_results.Policy(
                rounds=len(runs),
                warmup=policy.warmup,
                repeats=policy.repeats,
                decode_tokens=policy.decode_tokens,
                threads=policy.threads,
            ),
            grid=(grid,),
            bundles=(facts.result().model_copy(update=measured),),
            missing=(
                Reason(what="image preprocessing", why="the picture was prepared here, not on the phone"),
                Reason(what="load, warm", why="each process of the runner opens the bundle once"),
            ),
            notes=(
                "first text and whole answers begin with prepared pixels and end with a token, not with text",
                runner_output.agreement(case, processes),
            ),
        )
    )

"""`bench --on adb://SERIAL --on-runner PROGRAM`: a GGUF bundle on an Android phone, without Python there.

In: a GGUF bundle, llama.cpp's `llama-mtmd-cli` for the phone's processor, adb. Out: `BenchResults`, source
adb. Not here: the phone (`remote/remote_phone.py`), building the program (`benchmarks/android_llama.sh`).

Each round is a fresh process of the program, pinned to the big cores, that answers one question about one
picture; its own counters are the times. It prepares the picture and the prompt by itself, so it measures
llama.cpp on this bundle, and its answers need not be the runtime's. Heat and battery come from dumpsys,
memory from the process's VmHWM. Nothing of this has been seen on a phone: docs/devices.md says what has.
"""

from __future__ import annotations

import datetime
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.bench import bench_facts, bench_grid, bench_summary
from evals.bench.bench_conditions import DeviceSheet, Disturbance, Energy, Reason
from evals.bench.bench_facts import BundleFacts
from evals.bench.bench_results import (
    SCHEMA,
    BenchResults,
    GridPoint,
    Load,
    Memory,
    PointResult,
    Policy,
    Run,
    Times,
    Tool,
)
from evals.remote import remote_phone
from evals.remote.remote_phone import Adb, heat, last_line
from evals.remote.remote_ssh import DeviceError
from runtime.errors import InputError
from runtime.files import sha256_file

FOLDER = "/data/local/tmp/pocketvlm"
"""Where adb's shell may write and run programs."""

NUMBER = r"=\s*([\d.]+) ms"
LOAD = re.compile(rf"load time {NUMBER}")
PREFILL = re.compile(rf"prompt eval time {NUMBER} /\s*(\d+) tokens")
DECODE = re.compile(rf"(?<!prompt )eval time {NUMBER} /\s*(\d+) runs")
ENCODE = re.compile(r"(?:slice encoded in|batch encoding done in) (\d+) ms")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to measure. threads None: as many as there are big cores."""

    bundle: Path
    runner: Path
    image: Path | None = None
    question: str | None = None
    rounds: int = 5
    tokens: int = 16
    threads: int | None = None


@dataclass(frozen=True)
class Counters:
    """What one process of llama.cpp says of itself. decode_ms: mean of a token; prefill holds encode."""

    load_ms: float
    encode_ms: float | None
    prefill_ms: float
    prompt_tokens: int
    decode_ms: float
    decoded: int


def bench(url: str, asked: Asked, tell: Tell = print) -> BenchResults:
    """Measure on the phone. Raises DeviceError, InputError, BundleError."""
    (facts,) = bench_facts.read([asked.bundle])
    if facts.manifest.format != "gguf":
        raise InputError(f"{asked.bundle}: is {facts.manifest.format}; a phone behind adb runs gguf bundles")
    machine = remote_phone.program_machine(asked.runner)
    image, question = bench_grid.subject(asked.bundle, asked.image, asked.question)
    adb = Adb(remote_phone.parse(url))
    adb.connect()
    properties = remote_phone.properties_of(adb)
    abis = properties.get("ro.product.cpu.abilist", properties.get("ro.product.cpu.abi", "")).split(",")
    if machine not in abis:
        raise DeviceError(f"{asked.runner}: is for {machine}; {adb.name} runs {' '.join(abis)}")
    clusters = remote_phone.clusters_of(adb)
    cores = remote_phone.big_cores(clusters)
    sheet = remote_phone.sheet(adb, properties, clusters)
    places = _copy(adb, asked, image, {part.role: part.path for part in facts.manifest.parts}, tell)
    threads = asked.threads or max(1, len(cores))
    command = _command(places, question, asked.tokens, threads, cores)
    runs = []
    for number in range(asked.rounds):
        tell(f"{facts.name}, round {number + 1} of {asked.rounds}")
        runs.append(_run(adb, command, number))
    grid = GridPoint(id="default", image=image.name, image_sha256=sha256_file(image), question=question)
    return _results(asked, facts, sheet, threads, grid, runs)


def _results(
    asked: Asked,
    facts: BundleFacts,
    sheet: DeviceSheet,
    threads: int,
    grid: GridPoint,
    runs: Sequence[tuple[Run, Counters]],
) -> BenchResults:
    last = runs[-1][1]
    point = PointResult(
        point=grid.id,
        prompt_tokens=last.prompt_tokens,
        image_tokens=0,
        decode_tokens=last.decoded,
        runs=tuple(run for run, _ in runs),
        energy=Energy(why_not="not measured over adb: the phone charges from the cable"),
    )
    return bench_summary.complete(
        BenchResults(
            schema=SCHEMA,
            created=_now(),
            tool=Tool(name="llama-mtmd-cli", version=sha256_file(asked.runner)[:12]),
            source="adb",
            device=sheet,
            policy=Policy(
                rounds=asked.rounds, warmup=0, repeats=1, decode_tokens=last.decoded, threads=threads
            ),
            grid=(grid,),
            bundles=(facts.result().model_copy(update={"points": (point,)}),),
            missing=(
                Reason(what="first text (TTFT)", why="llama-mtmd-cli does not time it whole"),
                Reason(what="prefill", why="llama.cpp's counter holds the encoding of the image too"),
                Reason(what="image preprocessing", why="llama-mtmd-cli does not time it"),
                Reason(what="image tokens", why="llama-mtmd-cli counts them with the prompt's"),
            ),
            notes=(
                "decode: one value per process, the mean of its tokens, as llama.cpp counts it",
                "picture and prompt are prepared by llama.cpp, not as the bundle says",
            ),
        )
    )


def read_counters(said: str) -> Counters | None:
    """llama.cpp's counters from what it printed; None when it did not get to its end."""
    load, prefill, decode = LOAD.search(said), PREFILL.search(said), DECODE.search(said)
    if not load or not prefill or not decode or not int(decode[2]):
        return None
    encodes = [float(one) for one in ENCODE.findall(said)]
    return Counters(
        load_ms=float(load[1]),
        encode_ms=sum(encodes) if encodes else None,
        prefill_ms=float(prefill[1]),
        prompt_tokens=int(prefill[2]),
        decode_ms=float(decode[1]) / int(decode[2]),
        decoded=int(decode[2]),
    )


# --- there --------------------------------------------------------------


def _copy(adb: Adb, asked: Asked, image: Path, parts: Mapping[str, str], tell: Tell) -> dict[str, str]:
    """Push program, picture and the two models; where each is there."""
    adb.shell(f"mkdir -p {FOLDER}")
    sources = {
        "runner": asked.runner,
        "image": image,
        "text_model": asked.bundle / parts["text_model"],
        "mmproj": asked.bundle / parts["mmproj"],
    }
    places = {role: f"{FOLDER}/{role}{path.suffix}" for role, path in sources.items()}
    for role, path in sources.items():
        copied = adb.push(path, places[role])
        tell(f"{path.name}: {'copied' if copied else 'is there already'}")
    adb.shell(f"chmod 755 {places['runner']}")
    return places


def _command(names: Mapping[str, str], question: str, tokens: int, threads: int, cores: Sequence[int]) -> str:
    arguments = [
        *(names["runner"], "-m", names["text_model"], "--mmproj", names["mmproj"], "--image", names["image"]),
        *("-p", question, "-n", str(tokens), "-t", str(threads), "--temp", "0", "--ignore-eos", "--jinja"),
        *("-lv", "4"),  # the counters, and what they count
    ]
    mask = sum(1 << core for core in cores)
    return f"taskset {mask:x} {shlex.join(arguments)}" if mask else shlex.join(arguments)


def _run(adb: Adb, command: str, number: int) -> tuple[Run, Counters]:
    """One process; its memory is read every fifth of a second, and never shrinks."""
    before = heat(adb)
    said = adb.shell(
        f"cd {FOLDER}; {command} </dev/null >log 2>&1 & p=$!; peak=0\n"
        "while kill -0 $p 2>/dev/null; do\n"
        '  found=$(grep VmHWM /proc/$p/status 2>/dev/null); [ -z "$found" ] || peak=$found; sleep 0.2\n'
        'done\nwait $p; code=$?; cat log; echo; echo "@@peak $peak"; (exit $code)',
        check=False,
    )
    found = read_counters(said)
    if found is None:
        lines = said.partition("@@peak")[0]
        raise DeviceError(f"{adb.name}: llama-mtmd-cli: {last_line(lines)}")
    after, peak = heat(adb), re.search(r"@@peak VmHWM:\s*(\d+) kB", said)
    run = Run(
        round=number,
        order=number,
        started=_now(),
        load=Load(cold_ms=found.load_ms),
        times=Times(
            encode_ms=() if found.encode_ms is None else (found.encode_ms,),
            decode_ms=((found.decode_ms,),),
        ),
        memory=Memory(meter="VmHWM", peak_rss_mib=int(peak[1]) / 1024) if peak else None,
        disturbance=Disturbance(
            celsius_before=before[0],
            celsius_after=after[0],
            thermal_state_after=after[1],
        ),
    )
    return run, found


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

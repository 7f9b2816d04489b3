"""Measures one bundle in this process, which has to be a fresh one: memory and first load mean nothing else.

In: a `Task`. Out: an `Outcome`. Not here: who starts the processes and in which order (`bench/bench_run.py`),
statistics (`evals/bench/bench_summary.py`). No torch.

`python -m evals.bench.bench_child TASK.json OUTCOME.json` is that process. Every repeat is one answer through
`Session.stream`, the loop that every user runs, with stop tokens ignored, so that bundles do equal work and
short answers still give decode figures. Stages come from the session's own clock; they, the first text and
the end are of one pass, and nothing is summed from parts.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from evals.bench import process_memory, system
from evals.bench.bench_results import Load, Memory, Times
from evals.bench.bench_task import WARM_LOADS, Outcome, Task
from runtime import files
from runtime.errors import InputError, PocketError

if TYPE_CHECKING:
    from runtime.answer import GenerationStats
    from runtime.session import Session

PR_SET_PDEATHSIG = 1
CLOCK_READINGS = 12
"""Readings of the clock per answer, beside two for each decoded token."""


@dataclass(frozen=True)
class One:
    """One answer. end_to_end_ms: image bytes in memory to the last token's text."""

    stats: GenerationStats
    end_to_end_ms: float

    @property
    def decode_ms(self) -> list[float]:
        return self.stats.decode_ms


def run(task: Task) -> Outcome:
    """Carry out a task. Raises PocketError when the bundle, the picture or the question cannot be used."""
    if task.kind == "bandwidth":
        from evals.bench.bandwidth import measure

        return Outcome(bandwidth=measure(task.threads, seconds=task.seconds))
    if task.kind == "latency":
        return _latency(task)
    with _open(task) as session:
        answer = answers(session, task, task.decode_tokens)
        for _ in range(task.warmup):
            answer()
        if task.kind == "sustained":
            from evals.bench.sustained import run_for

            return Outcome(sustained=run_for(task.seconds, answer, task.decode_tokens))
        from evals.bench.energy import measure_answers

        short = answers(session, task, 0)
        return Outcome(energy=measure_answers(task.seconds, answer, short, task.decode_tokens))


def answers(session: Session, task: Task, tokens: int) -> Callable[[], One]:
    """A function that answers the task's question once, from the image's bytes, and says what it took.

    The first token comes from the prompt; `tokens` more are decoded, stop tokens or not.
    Raises InputError when the answer does not fit into the context.
    """
    from runtime.generation import GenerationOptions

    data = None if task.image is None else Path(task.image).read_bytes()
    options = GenerationOptions(max_new_tokens=tokens + 1, ignore_stop=True)
    images = [] if data is None else [session.prepare(data)]
    session.check_length(session.prompt_ids(task.question, images), tokens)

    def once() -> One:
        start = time.perf_counter()
        for _ in session.stream(data, task.question, options):
            pass
        return One(session.last_stats, _since(start))

    return once


def _latency(task: Task) -> Outcome:
    started = system.now()
    base, before = process_memory.peak_rss_mib(), system.moment()
    start = time.perf_counter()
    session = _open(task)
    cold_ms = _since(start)
    load_peak, loaded = process_memory.peak_rss_mib(), process_memory.rss_mib()
    anonymous = process_memory.anonymous_mib()
    mapped = process_memory.mapped_mib(Path(str(task.bundle)))
    apart = process_memory.forget_peak()
    with session:
        answer = answers(session, task, task.decode_tokens)
        for _ in range(task.warmup):
            answer()
        found = [answer() for _ in range(task.repeats)]
        run_peak = process_memory.peak_rss_mib()
        state_bytes, max_context, units = session.kv_bytes, session.max_context, _units(session)
    disturbance = system.between(before, system.moment())
    del session, answer
    gc.collect()
    warm = [_timed_open(task) for _ in range(WARM_LOADS)]  # last: a second bundle would raise the peak
    return Outcome(
        started=started,
        prompt_tokens=found[0].stats.prompt_tokens,
        image_tokens=found[0].stats.image_tokens,
        state_bytes=state_bytes,
        max_context=max_context,
        units=units,
        load=Load(cold_ms=round(cold_ms, 6), warm_ms=_ns(warm), page_cache=task.page_cache),
        times=_times(found, has_image=task.image is not None),
        memory=Memory(
            meter=process_memory.meter(),
            base_rss_mib=base,
            load_peak_rss_mib=load_peak,
            loaded_rss_mib=loaded,
            run_peak_rss_mib=run_peak if apart else None,
            peak_rss_mib=max(load_peak, run_peak),
            anonymous_mib=anonymous,
            mapped_mib=mapped,
        ),
        disturbance=disturbance,
        harness_share=_harness_share(found, task.decode_tokens),
    )


def _times(found: list[One], has_image: bool) -> Times:
    return Times(
        preprocess_ms=_ns([one.stats.prepare_ms for one in found if has_image]),
        encode_ms=_ns([one.stats.encode_ms for one in found if has_image]),
        prefill_ms=_ns([one.stats.prefill_ms for one in found]),
        ttft_ms=_ns([one.stats.ttft_ms for one in found]),
        decode_ms=tuple(_ns(one.stats.decode_ms) for one in found),
        end_to_end_ms=_ns([one.end_to_end_ms for one in found]),
    )


def _ns(values_ms: Sequence[float]) -> tuple[float, ...]:
    """To the nanosecond, which is finer than the clock."""
    return tuple(round(value, 6) for value in values_ms)


def _harness_share(found: list[One], decode_tokens: int, readings: int = 1000, batches: int = 21) -> float:
    """Time that reading the clock took, over the time of the answers. Nothing else is done while timing."""
    batch_ms = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(readings):
            time.perf_counter()
        batch_ms.append(_since(start))
    per_answer = (CLOCK_READINGS + 2 * decode_tokens) * statistics.median(batch_ms) / readings
    return per_answer * len(found) / sum(one.end_to_end_ms for one in found)


def _units(session: Session) -> dict[str, tuple[str, str]]:
    """Which provider runs each part, and why not the one that was preferred."""
    skipped = "; ".join(f"{report.name}: {report.reason}" for report in session.providers if report.reason)
    return {role: (report.name, skipped) for report in session.providers for role in report.roles}


def _open(task: Task) -> Session:
    """`reuse` off: every answer is a first one."""
    import runtime

    return runtime.open_bundle(
        str(task.bundle),
        threads=task.threads,
        providers=task.providers or None,
        max_context=task.max_context,
        reuse=False,
    )


def _timed_open(task: Task) -> float:
    start = time.perf_counter()
    session = _open(task)
    elapsed = _since(start)
    session.close()
    return elapsed


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m evals.bench.bench_child TASK.json OUTCOME.json", file=sys.stderr)
        return 2
    given, wanted = map(Path, arguments)
    _end_with_parent()
    try:
        outcome = run(_read(given))
    except (PocketError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    files.write_text(wanted, outcome.model_dump_json() + "\n")
    return 0


def _end_with_parent() -> None:
    """On Linux: be killed with the bench, so that nothing runs beside the next one (prctl(2))."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes
    import signal

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _read(path: Path) -> Task:
    try:
        return Task.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: is no task ({error.errors()[0]['msg']})") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

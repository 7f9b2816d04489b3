r"""What `pocketvlm bench` adds to what it times.

    python benchmarks/overhead.py bundles/student-onnx-int8 [--rounds 30] [--answers 40] [--tokens 16]

Markdown and JSON on stdout, progress on stderr. One process, one session, arms in turn, another one first in
every round:

    clock off   `Session.stream`, every reading of the clock replaced by a constant
    bench       the same as the bench's measuring process does it, clock on
    bare steps  prepare, encode, prefill and decode called by hand, the largest logit taken, no text made

The figure is *bench over clock off*: the same work with and without its timing. *Bare steps* shows what the
answering loop itself (sampling, text, stop rules) costs a user; it is no part of the harness. Ratios are of a
round's medians, with Student's t interval over rounds. Two more readings are told apart, because they are
taken between answers or beside them: a window of a sustained run, and a power gauge (ten a second).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evals import paired
from evals.bench import bench_child, bench_grid, device, system
from evals.bench.bench_task import Task
from runtime import answering
from runtime.session import Session

LIMIT = 0.02
STOPPED = types.SimpleNamespace(perf_counter=lambda: 0.0)
"""A clock that costs as little as a call can."""


def arms_of(session: Session, task: Task) -> dict[str, Callable[[], Any]]:
    """Name -> one answer."""
    timed = bench_child.answers(session, task, task.decode_tokens)
    data = Path(str(task.image)).read_bytes()

    def clock_off() -> None:
        modules: tuple[Any, ...] = (answering, bench_child)
        for module in modules:
            module.time = STOPPED
        try:
            timed()
        finally:
            for module in modules:
                module.time = time

    def bare() -> None:
        prepared = session.prepare(data)
        ids = session.prompt_ids(task.question, [prepared])
        logits = session.prefill(ids, [session.encode_image(prepared)])
        for _ in range(task.decode_tokens):
            logits = session.decode(int(logits.argmax()))

    return {"clock off": clock_off, "bench": timed, "bare steps": bare}


def rounds_of(arms: dict[str, Callable[[], Any]], rounds: int, answers: int) -> dict[str, list[float]]:
    """Median ms of each round's answers; a first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(-1, rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            taken = []
            for _ in range(answers):
                start = time.perf_counter()
                arms[name]()
                taken.append((time.perf_counter() - start) * 1e3)
            if number >= 0:
                found[name].append(statistics.median(taken))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return found


def ratio(base: Sequence[float], other: Sequence[float]) -> dict[str, float | None]:
    """Geometric mean of the rounds' ratios, and its interval."""
    found = paired.compare([math.log(x) for x in base], [math.log(x) for x in other])
    ends = {"low": found.low, "high": found.high}
    return {
        "ratio": math.exp(found.mean),
        **{name: None if end is None else math.exp(end) for name, end in ends.items()},
    }


def milliseconds(call: Callable[[], Any], times: int = 200) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) * 1e3 / times


def measure(bundle: Path, rounds: int, answers: int, tokens: int, threads: int) -> dict[str, Any]:
    import runtime

    image, question = bench_grid.subject(bundle, None, None)
    task = Task(
        kind="latency", bundle=str(bundle), image=str(image), question=question, threads=threads,
        decode_tokens=tokens,
    )  # fmt: skip
    with runtime.open_bundle(bundle, threads=threads, reuse=False) as session:
        taken = rounds_of(arms_of(session, task), rounds, answers)
    return {
        "bundle": bundle.name,
        "median_ms": {name: statistics.median(values) for name, values in taken.items()},
        "bench_over_clock_off": ratio(taken["clock off"], taken["bench"]),
        "bench_over_bare_steps": ratio(taken["bare steps"], taken["bench"]),
        "rounds_ms": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--answers", type=int, default=40, help="of each arm in a round")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    found = [measure(b, given.rounds, given.answers, given.tokens, given.threads) for b in given.bundles]
    between = {
        "window_ms": milliseconds(lambda: (system.mhz(), system.hottest(), system.throttle_events())),
        "gauge_reading_ms": milliseconds(lambda: [system.number(Path("/proc/loadavg")) for _ in range(2)]),
    }
    print(
        "| bundle | clock off, ms | bench, ms | bench over clock off (95 %) | bench over bare steps (95 %) |"
    )
    print("|---|---|---|---|---|")
    for one in found:
        cells = [
            "{ratio:.4f} ({low:.4f} to {high:.4f})".format(**one[name])
            for name in ("bench_over_clock_off", "bench_over_bare_steps")
        ]
        times = one["median_ms"]
        print(f"| {one['bundle']} | {times['clock off']:.3f} | {times['bench']:.3f} | {' | '.join(cells)} |")
    print(
        f"\nA window of a sustained run: {between['window_ms']:.3f} ms, at most once a second and between "
        f"answers. A reading of a power gauge: about {between['gauge_reading_ms']:.3f} ms, ten a second, "
        f"{between['gauge_reading_ms']:.2f} % of one core.\n"
    )
    worst = max(one["bench_over_clock_off"]["high"] or one["bench_over_clock_off"]["ratio"] for one in found)
    print(f"Limit {LIMIT:.0%}: upper end of the worst interval is {worst - 1:+.2%}.\n")
    sheet = device.sheet().model_dump(mode="json", exclude_defaults=True)
    print(json.dumps({"device": sheet, "between": between, "bundles": found}))


if __name__ == "__main__":
    main()

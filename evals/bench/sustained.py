"""The same answer again and again: does the device keep its speed?

In: a function that answers once, seconds. Out: a `Sustained`. Not here: opening the bundle
(`evals/bench/bench_child.py`), energy (`evals/bench/energy.py`).

Clock, temperature and throttle counters are read between answers, at the end of each window, never while an
answer is timed. Drift is the last quarter of the answers against the first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evals import paired, stats
from evals.bench import system
from evals.bench.bench_results import Sustained, Window

WINDOWS = 60
LEAST_WINDOW_S = 1.0
MOST_ANSWERS = 5_000
"""More are thinned out in the file; windows and drift are of all of them."""
BLOCKS = 5
"""Stretches of a quarter, whose medians are what is independent: neighbouring answers are alike."""
LEAST_ANSWERS = 8 * BLOCKS
SLOWER = 1.05
"""From this ratio on, surely, the device throttled."""


class Took(Protocol):
    """One answer's time."""

    @property
    def end_to_end_ms(self) -> float: ...

    @property
    def decode_ms(self) -> Sequence[float]: ...


@dataclass(frozen=True)
class _Reading:
    """At the end of a window: seconds since the start, answers so far, what the system showed."""

    at_s: float
    answers: int
    mhz: float | None
    celsius: float | None


def run_for(
    seconds: float,
    answer: Callable[[], Took],
    tokens: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    roots: system.Roots = system.HERE,
) -> Sustained:
    """Answer until `seconds` are over; the last answer is finished."""
    throttled_before = system.throttle_events(roots)
    length = max(LEAST_WINDOW_S, seconds / WINDOWS)
    start = clock()
    ends: list[float] = []
    took: list[float] = []
    rates: list[float] = []
    readings: list[_Reading] = []
    while not ends or ends[-1] < seconds:
        one = answer()
        ends.append(clock() - start)
        took.append(one.end_to_end_ms)
        rates.append(1e3 * len(one.decode_ms) / total if (total := sum(one.decode_ms)) else 0.0)
        if ends[-1] >= (len(readings) + 1) * length or ends[-1] >= seconds:
            readings.append(_Reading(ends[-1], len(ends), system.mhz(roots), system.hottest(roots)))
    events = None
    if throttled_before is not None:
        events = max(0, (system.throttle_events(roots) or 0) - throttled_before)
    step = math.ceil(len(took) / MOST_ANSWERS)
    found = Sustained(
        asked_s=seconds,
        measured_s=ends[-1],
        tokens_per_answer=tokens,
        answer_at_s=tuple(round(value, 6) for value in ends[::step]),
        answer_ms=tuple(round(value, 6) for value in took[::step]),
        kept_every=step,
        answers=len(took),
        windows=tuple(_windows(readings, took, rates)),
    )
    return judged(found, took, events)


def completed(found: Sustained) -> Sustained:
    """What another writer left out, from the answers that its lists hold."""
    if found.throttle_evidence is not None:
        return found
    answers = found.answers or len(found.answer_ms) * found.kept_every
    return judged(found.model_copy(update={"answers": answers}), found.answer_ms, None)


def judged(found: Sustained, took: Sequence[float], events: int | None) -> Sustained:
    """With drift and verdict. took: ms of the answers in turn; events: throttling counted meanwhile."""
    drift = ratio_of_ends(took)
    throttled, evidence = _verdict(drift, events)
    ratio, low, high = drift or (None, None, None)
    return found.model_copy(
        update={
            "ratio": ratio,
            "low": low,
            "high": high,
            "throttled": found.throttled if found.throttled is not None else throttled,
            "throttle_evidence": evidence,
        }
    )


def ratio_of_ends(took: Sequence[float]) -> tuple[float, float, float] | None:
    """(ratio, low, high): medians of the last quarter over those of the first, each of BLOCKS stretches.

    95 % interval by Welch's t on their logarithms. None for fewer than LEAST_ANSWERS answers.
    """
    if len(took) < LEAST_ANSWERS or min(took) <= 0:
        return None
    quarter = len(took) // 4
    logs = [
        np.log([stats.percentile(list(block), 50) for block in np.array_split(np.asarray(part), BLOCKS)])
        for part in (took[:quarter], took[-quarter:])
    ]
    early, late = logs
    variances = [float(one.var(ddof=1)) / BLOCKS for one in logs]
    error, centre = math.sqrt(sum(variances)), float(late.mean() - early.mean())
    if error == 0:
        return (math.exp(centre),) * 3
    freedom = sum(variances) ** 2 / sum(v**2 / (BLOCKS - 1) for v in variances)
    half = paired.t_quantile(0.975, max(1, math.floor(freedom))) * error
    return math.exp(centre), math.exp(centre - half), math.exp(centre + half)


def _verdict(drift: tuple[float, float, float] | None, events: int | None) -> tuple[bool | None, str]:
    """Whether it throttled, and by what one knows."""
    if events:
        return True, f"the processor counted {events} throttle events"
    if drift is None:
        return None, f"fewer than {LEAST_ANSWERS} answers: too few to tell"
    _, low, high = drift
    counted = "" if events is None else ", no throttle event was counted"
    if low > SLOWER:
        return True, f"answers became slower by at least {100 * (low - 1):.0f} %{counted}"
    if high < SLOWER:
        return False, f"answers became slower by at most {100 * max(0.0, high - 1):.1f} %{counted}"
    return None, f"the interval {low:.2f} to {high:.2f} holds {SLOWER}: run longer{counted}"


def _windows(readings: Sequence[_Reading], took: Sequence[float], rates: Sequence[float]) -> list[Window]:
    found, first, since = [], 0, 0.0
    for reading in readings:
        inside = slice(first, reading.answers)
        found.append(
            Window(
                start_s=since,
                end_s=reading.at_s,
                answers=reading.answers - first,
                end_to_end_ms=stats.percentile(took[inside], 50),
                decode_tok_s=stats.percentile(rates[inside], 50),
                mhz=reading.mhz,
                celsius=reading.celsius,
            )
        )
        first, since = reading.answers, reading.at_s
    return found

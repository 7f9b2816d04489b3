"""Energy of an answer: idle power first, then whole answers, then answers of one token.

In: functions that answer once, seconds, a meter. Out: an `Energy`, with the reason where there is no meter.
Not here: reading meters (`evals/power.py`).

The difference between long and short answers, over the tokens between them, is the energy of a token: it
holds no picture and no prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from evals import power
from evals.bench.bench_conditions import Energy
from evals.power import Meter

IDLE_SHARE = 0.25
"""Part of the time that goes to looking at the idle machine."""
COARSE_S = 60.0
"""A battery's gauge is renewed every few seconds or slower; below this its figures are rough."""


def measure_answers(
    seconds: float,
    answer: Callable[[], object],
    short_answer: Callable[[], object],
    tokens: int,
    *,
    meter: Meter | str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    rest: Callable[[float], None] = time.sleep,
) -> Energy:
    """Energy of `answer` (`tokens` decoded) and `short_answer` (none), back to back for about `seconds`.

    `meter`: the machine's own by default; a text is the reason why there is none.
    """
    found = power.find() if meter is None else meter
    if isinstance(found, str):
        return Energy(why_not=found)
    try:
        found.start()
        began = clock()
        rest(seconds * IDLE_SHARE)
        idle_s = clock() - began
        idle_watt = found.joule() / idle_s
        share = (1 - IDLE_SHARE) / 2
        joule, took_s, count = _consumed(found, answer, seconds * share, clock)
        short_joule, _, short_count = _consumed(found, short_answer, seconds * share, clock)
    finally:
        found.close()
    if joule <= 0:
        return Energy(why_not=f"the meter ({found.source}, {found.scope}) did not move")
    per_answer, per_short = joule / count, short_joule / short_count
    net = per_answer - idle_watt * took_s / count
    return Energy(
        source=found.source,
        scope=found.scope,
        seconds=took_s,
        joule=joule,
        idle_watt=idle_watt,
        watt=joule / took_s,
        answers=count,
        tokens_per_answer=tokens,
        joule_per_answer=per_answer,
        net_joule_per_answer=net if net > 0 else None,
        millijoule_per_token=1e3 * (per_answer - per_short) / tokens if per_answer > per_short else None,
        note=_note(found, seconds),
    )


def _consumed(
    meter: Meter, answer: Callable[[], object], seconds: float, clock: Callable[[], float]
) -> tuple[float, float, int]:
    """(joule, seconds, answers), at least one answer."""
    count, took_s = 0, 0.0
    meter.start()
    began = clock()
    while not count or took_s < seconds:
        answer()
        count += 1
        took_s = clock() - began
    return meter.joule(), took_s, count


def _note(meter: Meter, seconds: float) -> str | None:
    if meter.source == "rapl":
        return "the processor's own estimate; board, storage and screen are not in it"
    if meter.source == "battery" and seconds < COARSE_S:
        return f"a battery's gauge is slow: measure for {COARSE_S:.0f} s or longer"
    return None

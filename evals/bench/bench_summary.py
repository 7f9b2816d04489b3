"""What raw times come to: spreads, rates, positions, ratios between bundles.

In: the runs of a `BenchResults` of any origin. Out: the same with its summaries and ratios. numpy only.
Not here: measuring, drawing; tests of one file against another (`evals/ship/ship_change.py`).

What is independent is the process, not the repeat: intervals come from how the processes' medians differ,
by Student's t on their logarithms. One process gives no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from evals import paired, stats
from evals.bench import sustained
from evals.bench.bench_conditions import Bandwidth
from evals.bench.bench_notes import notes
from evals.bench.bench_results import (
    BenchRatio,
    BenchResults,
    BundleResult,
    PointResult,
    Position,
    Roofline,
    Run,
    Spread,
    Summary,
)

STAGES = ("preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms", "end_to_end_ms")
METRICS = ("load_cold_ms", "load_warm_ms", *STAGES)
RATIOS = ("load_warm_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms", "end_to_end_ms")
"""Metrics that are compared with the first bundle's; memory and bytes speak for themselves."""

LEAST_P90, LEAST_P99 = 10, 100
POSITIONS = 64
"""Most positions a summary lists; more are joined into as many stretches."""


def rounds_of(runs: Sequence[Run], metric: str) -> list[list[float]]:
    """Values of a metric by run, runs without any left out."""
    return [values for run in sorted(runs, key=lambda run: run.order) if (values := _values(run, metric))]


def spread(rounds: Sequence[Sequence[float]]) -> Spread | None:
    """Of all values of all rounds together; None when there are none."""
    pooled = [value for values in rounds for value in values]
    if not pooled:
        return None
    n, p50 = len(pooled), stats.percentile(pooled, 50)
    low, high = _interval([stats.percentile(values, 50) for values in rounds])
    return Spread(
        n=n,
        p50=p50,
        p90=stats.percentile(pooled, 90) if n >= LEAST_P90 else None,
        p99=stats.percentile(pooled, 99) if n >= LEAST_P99 else None,
        mean=float(np.mean(pooled)),
        least=min(pooled),
        most=max(pooled),
        low=None if low is None else min(low, p50),
        high=None if high is None else max(high, p50),
    )


def summary(result: PointResult) -> Summary:
    """Of one bundle at one grid point."""
    runs = result.runs
    found = {metric: spread(rounds_of(runs, metric)) for metric in METRICS}
    prefill, decode = found["prefill_ms"], found["decode_ms"]
    return Summary(
        **found,
        prefill_tok_s=1000 * result.prompt_tokens / prefill.p50 if prefill and prefill.p50 else None,
        decode_tok_s=1000 / decode.p50 if decode and decode.p50 else None,
        decode_by_position=tuple(_positions(runs, result.prompt_tokens)),
        load_peak_rss_mib=_largest(run.memory.load_peak_rss_mib for run in runs if run.memory),
        peak_rss_mib=_largest(run.memory.peak_rss_mib for run in runs if run.memory),
    )


def ratio(reference: Sequence[Run], candidate: Sequence[Run], metric: str) -> tuple[float, ...] | None:
    """(ratio, low, high) of medians, candidate over reference, by pairs of the same round.

    (ratio,) from a single pair; None where a side has no values, or a median of 0.
    """
    before, after = _medians(reference, metric), _medians(candidate, metric)
    pairs = [(before[number], after[number]) for number in sorted(before.keys() & after.keys())]
    if not pairs or min(min(pair) for pair in pairs) <= 0:
        return None
    logs = np.log([new / old for old, new in pairs])
    centre = float(logs.mean())
    if len(logs) < 2:
        return (math.exp(centre),)
    half = paired.t_quantile(0.975, len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return tuple(_exp(value) for value in (centre, centre - half, centre + half))


def ratios(bundles: Sequence[BundleResult]) -> list[BenchRatio]:
    """Every bundle against the first, at each grid point that both have."""
    found = []
    reference, *others = bundles
    for candidate in others:
        for point in candidate.points:
            same = next((each for each in reference.points if each.point == point.point), None)
            for metric in RATIOS if same else ():
                assert same is not None
                values = ratio(same.runs, point.runs, metric)
                if values is not None:
                    found.append(
                        BenchRatio(
                            point=point.point,
                            metric=metric,
                            reference=reference.name,
                            candidate=candidate.name,
                            ratio=values[0],
                            low=values[1] if len(values) > 1 else None,
                            high=values[2] if len(values) > 1 else None,
                        )
                    )
    return found


def complete(results: BenchResults) -> BenchResults:
    """With summaries, ratios, shares of bandwidth and notes computed anew from the raw times."""
    bundles = [
        bundle.model_copy(update={"points": tuple(_completed(point, results) for point in bundle.points)})
        for bundle in results.bundles
    ]
    compared = () if results.emulated else tuple(ratios(bundles))
    found = results.model_copy(update={"bundles": tuple(bundles), "ratios": compared})
    return found.model_copy(update={"notes": tuple(dict.fromkeys([*results.notes, *notes(found)]))})


def share_of_bandwidth(
    roofline: Roofline, decode_tok_s: float | None, bandwidth: Bandwidth | None
) -> float | None:
    """None when what a token reads fits into the last cache: then memory is not what bounds it."""
    if roofline.fits_cache or decode_tok_s is None or bandwidth is None:
        return None
    return roofline.bytes_per_token * decode_tok_s / (bandwidth.read_gb_s * 1e9)


def _completed(point: PointResult, results: BenchResults) -> PointResult:
    found = summary(point)
    update: dict[str, object] = {"summary": found}
    if point.sustained:
        update["sustained"] = sustained.completed(point.sustained)
    if point.roofline:
        bandwidth = None if results.emulated else results.bandwidth
        update["roofline"] = point.roofline.model_copy(
            update={"share": share_of_bandwidth(point.roofline, found.decode_tok_s, bandwidth)}
        )
    return point.model_copy(update=update)


def _values(run: Run, metric: str) -> list[float]:
    if metric == "load_cold_ms":
        return [] if run.load.cold_ms is None else [run.load.cold_ms]
    if metric == "load_warm_ms":
        return list(run.load.warm_ms)
    if metric == "decode_ms":
        return [value for values in run.times.decode_ms for value in values]
    return list(getattr(run.times, metric))


def _medians(runs: Sequence[Run], metric: str) -> dict[int, float]:
    """By round."""
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run.round, []).extend(_values(run, metric))
    return {number: stats.percentile(values, 50) for number, values in found.items() if values}


def _interval(medians: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the processes' typical median; nothing from one process."""
    if len(medians) < 2 or min(medians) <= 0:
        return None, None
    logs = np.log(medians)
    half = paired.t_quantile(0.975, len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return _exp(float(logs.mean()) - half), _exp(float(logs.mean()) + half)


def _exp(value: float) -> float:
    """Finite: two processes that have nothing in common give an interval from nothing to everything."""
    return math.exp(max(-700.0, min(700.0, value)))


def _positions(runs: Sequence[Run], prompt_tokens: int) -> list[Position]:
    longest = max((len(values) for run in runs for values in run.times.decode_ms), default=0)
    stretch = max(1, math.ceil(longest / POSITIONS))
    found = []
    for first in range(0, longest, stretch):
        values = [
            value
            for run in runs
            for repeat in run.times.decode_ms
            for value in repeat[first : first + stretch]
        ]
        middle = first + (min(stretch, longest - first) - 1) // 2
        found.append(
            Position(
                context_tokens=prompt_tokens + middle + 1, n=len(values), p50_ms=stats.percentile(values, 50)
            )
        )
    return found


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)

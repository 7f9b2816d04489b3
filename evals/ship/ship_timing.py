"""One bundle at one grid point of a bench.json, as the verdict and the page take it.

In: `BenchResults` and one of its points. Out: `Timing`: percentiles of all repeats and of every process,
always from the raw times, whatever the file's writer summed up. Not here: joining (`ship/ship_load.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from evals.bench import bench_summary
from evals.bench.bench_results import BenchResults, BundleResult, PointResult, Run, Summary
from evals.ship.ship_evidence import Measure, Metric, Timing

MEMORY = ("peak_rss_mib", "load_peak_rss_mib")


def timing_of(found: BenchResults, result: BundleResult, point: PointResult, bundle: str) -> Timing:
    """`bundle`: the name that joins it with other files."""
    grid = next(one for one in found.grid if one.id == point.point)
    size = f", {grid.width} x {grid.height}" if grid.width and grid.height else ""
    summary = bench_summary.summary(point)
    measures = [_measure(name, point, summary) for name in get_args(Metric)]
    caches = {run.load.page_cache for run in point.runs}
    return Timing(
        device=found.device.name,
        bundle=bundle,
        point=point.point,
        picture=f"{grid.image}{size}" if grid.image else "no picture",
        picture_sha256=grid.image_sha256,
        question=grid.question,
        conditions=_conditions(found, point),
        threads=found.policy.threads,
        page_cache=caches.pop() if len(caches) == 1 else "unknown",
        prompt_tokens=point.prompt_tokens,
        image_tokens=point.image_tokens,
        decode_tokens=point.decode_tokens,
        measures=tuple(one for one in measures if one is not None),
        prefill_tok_s=summary.prefill_tok_s,
        decode_tok_s=summary.decode_tok_s,
        decode_by_position=summary.decode_by_position,
        units={part.role: part.unit for part in result.parts if part.unit},
        base_rss_mib=_largest([run.memory.base_rss_mib for run in point.runs if run.memory]),
        mapped_mib=_largest([run.memory.mapped_mib for run in point.runs if run.memory]),
        other_share=_largest([_others(run) for run in point.runs]),
        harness_share=_largest([run.harness_share for run in point.runs]),
        energy=point.energy,
        roofline=point.roofline,
        sustained=point.sustained,
    )


def _measure(name: Metric, point: PointResult, summary: Summary) -> Measure | None:
    """None where no process has a value."""
    if name in MEMORY:
        processes = _memory(name, point.runs)
        spread = bench_summary.spread(processes)
    else:
        processes = bench_summary.rounds_of(point.runs, name)
        spread = getattr(summary, name)
    if spread is None:
        return None
    p50, p90 = zip(*(np.percentile(one, (50, 90)).tolist() for one in processes), strict=True)
    return Measure(metric=name, spread=spread, process_p50=p50, process_p90=p90)


def _memory(name: Metric, runs: Sequence[Run]) -> list[list[float]]:
    found = [getattr(run.memory, name) for run in runs if run.memory]
    return [[value] for value in found if value is not None]


def _others(run: Run) -> float | None:
    if run.disturbance is None:
        return None
    shares = [s for s in (run.disturbance.other_share, run.disturbance.steal_share) if s is not None]
    return min(1.0, sum(shares)) if shares else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _conditions(found: BenchResults, point: PointResult) -> str:
    policy = found.policy
    fresh = all(run.fresh_process for run in point.runs)
    parts = [
        f"{_count(len(point.runs), 'fresh process' if fresh else 'run of one process')} of "
        f"{_count(policy.warmup, 'warm-up')} and {_count(policy.repeats, 'repeat')}"
    ]
    parts += [_count(policy.threads, "thread")] if policy.threads else []
    parts += ["bundles in turn"] if policy.interleaved and len(found.bundles) > 1 else []
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    """`1 repeat`, `3 repeats`, `2 fresh processes`, `2 runs of one process`."""
    if number == 1:
        return f"1 {what}"
    head, space, tail = what.partition(" of ")
    return f"{number} {head}{'es' if head.endswith('s') else 's'}{space}{tail}"

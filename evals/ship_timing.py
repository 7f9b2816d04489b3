"""One bundle at one grid point of a bench.json, as the verdict and the page take it.

In: `BenchResults` and one of its points. Out: `Timing`: percentiles of all repeats and of every process.
Not here: joining files (`evals/ship_load.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from evals import stats
from evals.bench_results import BenchResults, BundleResult, PointResult, Run, Spread
from evals.ship_evidence import Measure, Metric, Timing

STAGES: tuple[Metric, ...] = (
    "preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms", "end_to_end_ms",
)  # fmt: skip
LOADS: tuple[Metric, ...] = ("load_cold_ms", "load_warm_ms")
MEMORY: tuple[Metric, ...] = ("peak_rss_mib", "load_peak_rss_mib")
ENOUGH = {"p90": 10, "p99": 100}
"""Values below which bench.json tells no such percentile."""


def timing_of(found: BenchResults, result: BundleResult, point: PointResult, bundle: str) -> Timing:
    """`bundle`: the name that joins it with other files."""
    grid = next(one for one in found.grid if one.id == point.point)
    size = f", {grid.width} x {grid.height}" if grid.width and grid.height else ""
    measures = [_measure(name, point) for name in (*LOADS, *STAGES, *MEMORY)]
    summary = point.summary
    decode = next((one for one in measures if one and one.metric == "decode_ms"), None)
    prefill = next((one for one in measures if one and one.metric == "prefill_ms"), None)
    caches = {run.load.page_cache for run in point.runs}
    return Timing(
        device=found.device.name,
        bundle=bundle,
        point=point.point,
        picture=f"{grid.image}{size}" if grid.image else "no picture",
        question=grid.question,
        conditions=_conditions(found, point),
        threads=found.policy.threads,
        page_cache=caches.pop() if len(caches) == 1 else "unknown",
        prompt_tokens=point.prompt_tokens,
        image_tokens=point.image_tokens,
        decode_tokens=point.decode_tokens,
        measures=tuple(one for one in measures if one is not None),
        prefill_tok_s=_rate(point.prompt_tokens, prefill),
        decode_tok_s=_rate(1, decode),
        decode_by_position=summary.decode_by_position if summary else (),
        units={part.role: part.unit for part in result.parts if part.unit},
        base_rss_mib=_largest([run.memory.base_rss_mib for run in point.runs if run.memory]),
        mapped_mib=_largest([run.memory.mapped_mib for run in point.runs if run.memory]),
        other_share=_largest([_others(run) for run in point.runs]),
        harness_share=_largest([run.harness_share for run in point.runs]),
        energy=point.energy,
        roofline=point.roofline,
        sustained=point.sustained,
    )


def _measure(name: Metric, point: PointResult) -> Measure | None:
    """None where no process has a value."""
    processes = [values for run in point.runs if (values := _values(name, run))]
    if not processes:
        return None
    told = getattr(point.summary, name, None) if point.summary else None
    return Measure(
        metric=name,
        spread=told if isinstance(told, Spread) else _spread([v for one in processes for v in one]),
        process_p50=tuple(stats.percentile(one, 50) for one in processes),
        process_p90=tuple(stats.percentile(one, 90) for one in processes),
    )


def _values(name: Metric, run: Run) -> list[float]:
    """What one process says about a metric; a decoded token is a value of its own."""
    if name == "load_cold_ms":
        return [] if run.load.cold_ms is None else [run.load.cold_ms]
    if name == "load_warm_ms":
        return list(run.load.warm_ms)
    if name in MEMORY:
        value = getattr(run.memory, name) if run.memory else None
        return [] if value is None else [value]
    if name == "decode_ms":
        return [value for repeat in run.times.decode_ms for value in repeat]
    return list(getattr(run.times, name))


def _spread(values: Sequence[float]) -> Spread:
    tails = {f"p{q}": stats.percentile(values, q) for q in (90, 99) if len(values) >= ENOUGH[f"p{q}"]}
    return Spread(
        n=len(values),
        p50=stats.percentile(values, 50),
        mean=sum(values) / len(values),
        least=min(values),
        most=max(values),
        **tails,
    )


def _rate(tokens: int, measure: Measure | None) -> float | None:
    """Tokens a second at the median time."""
    return 1000 * tokens / measure.spread.p50 if measure and measure.spread.p50 > 0 else None


def _others(run: Run) -> float | None:
    if run.disturbance is None:
        return None
    shares = [s for s in (run.disturbance.other_share, run.disturbance.steal_share) if s is not None]
    return min(1.0, sum(shares)) if shares else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _conditions(found: BenchResults, point: PointResult) -> str:
    policy = found.policy
    threads = f", {policy.threads} threads" if policy.threads else ""
    turns = ", bundles in turn" if policy.interleaved and len(found.bundles) > 1 else ""
    fresh = "fresh processes" if all(run.fresh_process for run in point.runs) else "runs of one process"
    return (
        f"{len(point.runs)} {fresh} of {policy.warmup} warm-ups and {policy.repeats} repeats{threads}{turns}"
    )

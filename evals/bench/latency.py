"""What bundles cost, as the demo's report shows it: one picture, one question, a few figures.

In: bundle directories, one image, one question. Out: `Latency` per bundle, ratios to the first bundle.
Not here: measuring (`bench/bench_run.py`), bench.json with every raw time (`bench/bench_results.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from evals.bench import bench_run, bench_summary, device
from evals.bench.bench_grid import Asked
from evals.bench.bench_results import BenchResults, BundleResult, GridPoint, Policy, Run
from evals.bench.bench_summary import METRICS, RATIOS
from evals.records import Latency, LatencyRatio, Percentiles, Record

__all__ = ["RATIOS", "Measured", "measure_all"]


class Measured(Record):
    """One bundle's figures, and how they compare to the first bundle of the same call (empty for itself)."""

    bundle: str
    latency: Latency
    ratios: list[LatencyRatio]


def measure_all(
    bundles: Sequence[Path],
    image: Path,
    question: str,
    *,
    rounds: int = 3,
    warmup: int = 3,
    repeats: int = 20,
    threads: int = 2,
    decode_tokens: int = 16,
    drop_cache: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Measure several bundles in turns, each time in a fresh process.

    With one round there are no ratios: one pair of processes cannot tell how much processes differ.
    Raises ValueError on no bundles or a count below 1; PocketError when a measuring process fails.
    """
    if not bundles or rounds < 1:
        raise ValueError(f"measure_all: {len(bundles)} bundles, {rounds} rounds; wanted at least one of each")
    policy = Policy(
        rounds=rounds, warmup=warmup, repeats=repeats, decode_tokens=decode_tokens, threads=threads
    )
    asked = Asked(GridPoint(id="question", image=image.name, question=question), image)
    found = bench_run.run(
        bench_run.Request(tuple(bundles), (asked,), policy, drop_cache=drop_cache, bandwidth_s=0.0),
        progress=progress,
    )
    return [
        Measured(bundle=bundle.name, latency=_latency(bundle, found), ratios=_ratios(bundle.name, found))
        for bundle in found.bundles
    ]


def _latency(bundle: BundleResult, found: BenchResults) -> Latency:
    (point,) = bundle.points
    spreads = {metric: _percentiles(point.runs, metric) for metric in METRICS}
    memory = [run.memory for run in point.runs if run.memory]
    policy = found.policy
    return Latency(
        threads=policy.threads or 1,
        rounds=policy.rounds,
        warmup=policy.warmup,
        repeats=policy.repeats,
        prompt_tokens=point.prompt_tokens,
        image_tokens=point.image_tokens,
        decode_tokens=point.decode_tokens,
        page_cache="dropped" if point.runs[0].load.page_cache == "dropped" else "warm",
        **spreads,
        prefill_tok_s=1000 * point.prompt_tokens / spreads["prefill_ms"].p50,
        decode_tok_s=1000 / spreads["decode_ms"].p50,
        base_rss_mib=max(each.base_rss_mib or 0.0 for each in memory),
        peak_rss_mib=max(each.peak_rss_mib or 0.0 for each in memory),
        disk_bytes=bundle.disk_bytes or 0,
        device=device.describe(),
    )


def _percentiles(runs: Sequence[Run], metric: str) -> Percentiles:
    return Percentiles.of([value for values in bench_summary.rounds_of(runs, metric) for value in values])


def _ratios(name: str, found: BenchResults) -> list[LatencyRatio]:
    return [
        LatencyRatio(
            metric=each.metric, reference=each.reference, ratio=each.ratio, low=each.low, high=each.high
        )
        for each in found.ratios
        if each.candidate == name and each.low is not None and each.high is not None
    ]

"""What a reader of a bench must know beside its figures, told by the file itself.

In: a `BenchResults` of any origin. Out: sentences. Not here: what was not measured (`missing` of the file).
"""

from __future__ import annotations

from collections.abc import Iterator

from evals.bench.bench_results import BenchResults, Run

BUSY = 0.05
"""Share of the machine that others may use before a run counts as disturbed."""
OVERHEAD = 0.02
"""Share of a time that timing it may take."""


def notes(results: BenchResults) -> list[str]:
    """In the order in which they matter; none for a quiet machine."""
    runs = [run for bundle in results.bundles for point in bundle.points for run in point.runs]
    return [
        *_emulated(results),
        *_disturbed(runs),
        *_throttled(results, runs),
        *_overhead(runs),
        *_device(results),
        *_ceilings(results),
    ]


def _emulated(results: BenchResults) -> Iterator[str]:
    if results.emulated:
        yield f"emulated ({results.emulated_why}): numerics only, the times are not the device's speed"


def _disturbed(runs: list[Run]) -> Iterator[str]:
    found = [run.disturbance for run in runs if run.disturbance]
    for what, shares in (
        ("other processes", [each.other_share for each in found]),
        ("other virtual machines", [each.steal_share for each in found]),
    ):
        busy = [share for share in shares if share is not None and share > BUSY]
        if busy:
            yield (
                f"{what} took up to {100 * max(busy):.0f} % of the processor during {len(busy)} of "
                f"{len(runs)} runs: times are too long, measure on a quiet machine"
            )


def _throttled(results: BenchResults, runs: list[Run]) -> Iterator[str]:
    events = sum(run.disturbance.throttle_events or 0 for run in runs if run.disturbance)
    if events:
        yield f"the processor counted {events} thermal throttle events during the runs"
    for bundle in results.bundles:
        for point in bundle.points:
            if point.sustained and point.sustained.throttled:
                yield f"{bundle.name}: throttled in the sustained run: {point.sustained.throttle_evidence}"


def _overhead(runs: list[Run]) -> Iterator[str]:
    worst = max((run.harness_share or 0.0 for run in runs), default=0.0)
    if worst > OVERHEAD:
        yield f"timing took {100 * worst:.1f} % of what it timed: decode more tokens, or a larger model"


def _device(results: BenchResults) -> Iterator[str]:
    device = results.device
    governors = {cluster.governor for cluster in device.clusters} | {device.governor}
    slow = sorted(name for name in governors if name not in (None, "performance"))
    if slow:
        yield f"frequency governor {', '.join(map(str, slow))}: clocks follow the load"
    if device.power_source == "battery":
        yield "on battery: the system may hold clocks down"
    if device.virtual_machine:
        yield "a virtual machine: its neighbours and its clock are not visible from inside"


def _ceilings(results: BenchResults) -> Iterator[str]:
    for bundle in results.bundles:
        over = [ceiling.name for ceiling in bundle.ceilings if not ceiling.fits]
        if over:
            yield f"{bundle.name}: its download is too large for: {', '.join(over)}"

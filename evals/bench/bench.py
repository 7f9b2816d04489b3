"""What `pocketvlm bench` does with its options, and the tables it shows.

In: options as a user gives them, or a `BenchResults`. Out: a `BenchResults`; rich tables and lines.
Not here: measuring (`evals/bench/bench_run.py`), the report's page.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evals import formatting as fmt
from evals import power
from evals.bench import bench_grid, bench_results, bench_run
from evals.bench.bench_results import BenchResults, BundleResult, PointResult, Policy, Spread
from runtime import files
from runtime.errors import InputError
from runtime.threads import default_threads

if TYPE_CHECKING:
    from rich.table import Table

UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}

STAGES = (
    ("load, first", "load_cold_ms"),
    ("load, again", "load_warm_ms"),
    ("prepare image", "preprocess_ms"),
    ("encode image", "encode_ms"),
    ("prefill", "prefill_ms"),
    ("first text (TTFT)", "ttft_ms"),
    ("one token", "decode_ms"),
    ("image to last token", "end_to_end_ms"),
)
"""Rows of the table with their field in `Summary`."""


@dataclass(frozen=True)
class Options:
    """As the command line has them. images: sizes; prompts: lengths in tokens; None: as they are."""

    bundles: tuple[Path, ...]
    image: Path | None = None
    question: str | None = None
    images: str | None = None
    prompts: str | None = None
    rounds: int = 5
    repeats: int = 10
    warmup: int = 3
    tokens: int = 16
    threads: int | None = None
    providers: tuple[str, ...] = ()
    max_context: int | None = None
    drop_cache: bool = False
    rest_s: float = 0.0
    sustained: str | None = None
    energy_s: float = 20.0
    bandwidth_s: float = 2.0
    device_name: str | None = None


def measure(options: Options, out: Path | None, progress: Callable[[str], None]) -> BenchResults:
    """Measure here. With `out`, an interrupted bench of the same options goes on where it was.

    The results are in `out` before what they were made of is deleted. Raises PocketError.
    """
    if not options.bundles:
        raise InputError("bench: got no bundle; give bundle directories, or --import with a result file")
    sizes, lengths = bench_grid.sizes_of(options.images), bench_grid.lengths_of(options.prompts)
    sustained_s = seconds_of(options.sustained)
    meter = power.find() if options.energy_s else None
    if meter is not None and not isinstance(meter, str):
        meter.close()  # the measuring process opens its own
    policy = Policy(
        rounds=options.rounds,
        warmup=options.warmup,
        repeats=options.repeats,
        decode_tokens=options.tokens,
        threads=options.threads or default_threads(),
        providers=options.providers,
        max_context=options.max_context,
        rest_s=options.rest_s,
    )
    with _work(out) as work:
        image, question = bench_grid.subject(options.bundles[0], options.image, options.question)
        grid = bench_grid.grid(options.bundles[0], image, question, sizes, lengths, work / "pictures")
        request = bench_run.Request(
            bundles=options.bundles,
            grid=tuple(grid),
            policy=policy,
            drop_cache=options.drop_cache,
            sustained_s=sustained_s,
            energy_s=options.energy_s,
            bandwidth_s=options.bandwidth_s,
            device_name=options.device_name,
            meter_reason=meter if isinstance(meter, str) else None,
        )
        found = bench_run.run(request, work / "runs" if out else None, progress)
        if out is not None:
            bench_results.write(found, out)
        return found


@contextlib.contextmanager
def _work(out: Path | None) -> Iterator[Path]:
    """Where scaled pictures and finished runs lie; beside `out` it stays until the bench is finished."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="pocketvlm-bench-") as directory:
            yield Path(directory)
        return
    bench_results.check_place(out)
    work = out.with_name(f"{out.name}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written there ({error.strerror})") from error
    with files.lock(work) if files.fcntl else contextlib.nullcontext():
        try:
            yield work
        except BaseException:
            if any((work / "runs").glob("*.jsonl")):
                raise
            shutil.rmtree(work)  # nothing to go on from
            raise
    shutil.rmtree(work)


def seconds_of(given: str | None) -> float:
    """Seconds of `90`, `90s`, `10m`, `1h`; 0 for None. Raises InputError."""
    if given is None:
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", given.strip())
    if not match or not float(match[1]):
        raise InputError(f"--sustained {given}: expected a time such as 90s, 10m or 1h")
    return float(match[1]) * UNITS_S[match[2]]


# --- what is shown ------------------------------------------------------------


def tables(results: BenchResults) -> list[Table]:
    """Stages and figures at the first grid point; the other points; ratios."""
    found = [times(results)]
    if len(results.grid) > 1:
        found.append(points(results))
    if (compared := ratios(results)) is not None:
        found.append(compared)
    return found


def times(results: BenchResults) -> Table:
    """One column per bundle; stages as `p50 / p90` in ms."""
    from rich.table import Table

    point = results.grid[0].id
    title = "p50 / p90 in ms" + (f", {point}" if len(results.grid) > 1 else "")
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    found = [(bundle, _at(bundle, point)) for bundle in results.bundles]
    for bundle, _ in found:
        table.add_column(bundle.name, justify="right", overflow="fold")
    for label, field in STAGES:
        table.add_row(label, *(_spread(at, field) for _, at in found))
    table.add_section()
    for label, show in FIGURES:
        table.add_row(label, *(show(bundle, at) for bundle, at in found))
    return table


def points(results: BenchResults) -> Table:
    """Every grid point: time to first text and tokens a second."""
    from rich.table import Table

    title = "first text, p50 in ms; decode tok/s"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    for bundle in results.bundles:
        table.add_column(bundle.name, justify="right", overflow="fold")
    for point in results.grid:
        cells = []
        for bundle in results.bundles:
            at = _at(bundle, point.id)
            summary = at.summary if at else None
            first = fmt.significant(summary.ttft_ms.p50) if summary and summary.ttft_ms else fmt.DASH
            cells.append(f"{first}; {fmt.count(summary.decode_tok_s if summary else None)}")
        table.add_row(point.id, *cells)
    return table


def ratios(results: BenchResults) -> Table | None:
    """Medians over the first bundle's, with their interval; None for a bundle on its own."""
    from rich.table import Table

    if len(results.bundles) < 2:
        return None
    point, others = results.grid[0].id, results.bundles[1:]
    title = f"time over {results.bundles[0].name}'s, 95 % interval"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    for bundle in others:
        table.add_column(bundle.name, justify="right", overflow="fold")
    known = {(each.candidate, each.metric): each for each in results.ratios if each.point == point}
    for label, field in STAGES:
        row = [known.get((bundle.name, field)) for bundle in others]
        if any(row):
            table.add_row(label, *(_ratio(each.ratio, each.low, each.high) if each else "" for each in row))
    return table


def lines(results: BenchResults) -> list[str]:
    """Conditions, notes, sustained runs, what was not measured: one sentence each."""
    device, policy = results.device, results.policy
    where = f"{device.name}: {device.cpu}, {device.cores} cores, {policy.threads or '?'} threads, {device.os}"
    processes = "1 process" if policy.rounds == 1 else f"{policy.rounds} processes"
    found = [
        f"{where}; {processes} of {policy.warmup} + {policy.repeats} answers of "
        f"{policy.decode_tokens} tokens; {results.source}",
        f"{results.grid[0].image or 'no picture'}: {results.grid[0].question.strip()!r}",
    ]
    for bundle in results.bundles:
        for point in bundle.points:
            if (run := point.sustained) is not None:
                drift = f"{run.ratio:.3f} ({run.low:.3f}-{run.high:.3f})" if run.low and run.high else "?"
                found.append(
                    f"{bundle.name}, {fmt.seconds(run.measured_s)} on end: {run.answers} answers, "
                    f"last quarter over first {drift}; {run.throttle_evidence}"
                )
        found += [f"{bundle.name}: not measured: {each.what}: {each.why}" for each in bundle.missing]
    found += [f"note: {note}" for note in results.notes]
    return found + [f"not measured: {each.what}: {each.why}" for each in results.missing]


def _prefill(_: BundleResult, at: PointResult | None) -> str:
    return fmt.count(at.summary.prefill_tok_s if at and at.summary else None)


def _decode(_: BundleResult, at: PointResult | None) -> str:
    return fmt.count(at.summary.decode_tok_s if at and at.summary else None)


def _peak(_: BundleResult, at: PointResult | None) -> str:
    return fmt.mib(at.summary.peak_rss_mib if at and at.summary else None)


def _load_peak(_: BundleResult, at: PointResult | None) -> str:
    return fmt.mib(at.summary.load_peak_rss_mib if at and at.summary else None)


def _base(_: BundleResult, at: PointResult | None) -> str:
    return fmt.mib(_of_memory(at, "base_rss_mib"))


def _mapped(_: BundleResult, at: PointResult | None) -> str:
    return fmt.mib(_of_memory(at, "mapped_mib"))


def _share(_: BundleResult, at: PointResult | None) -> str:
    if at is None or at.roofline is None:
        return fmt.DASH
    return "in cache" if at.roofline.fits_cache else fmt.percent(at.roofline.share, 0)


def _energy(_: BundleResult, at: PointResult | None) -> str:
    joule = at.energy.joule_per_answer if at and at.energy else None
    return fmt.DASH if joule is None else f"{fmt.significant(joule)}{fmt.THIN}J"


FIGURES: tuple[tuple[str, Callable[[BundleResult, PointResult | None], str]], ...] = (
    ("prefill tok/s", _prefill),
    ("decode tok/s", _decode),
    ("  of memory bandwidth", _share),
    ("energy per answer", _energy),
    ("peak memory", _peak),
    ("  while loading", _load_peak),
    ("  before opening", _base),
    ("mapped files", _mapped),
    ("download", lambda bundle, _: fmt.size(bundle.download_bytes)),
    ("on disk", lambda bundle, _: fmt.size(bundle.disk_bytes)),
)
"""Rows below the stages."""


def _of_memory(at: PointResult | None, field: str) -> float | None:
    found: Sequence[float | None] = (
        [getattr(run.memory, field) for run in at.runs if run.memory] if at else []
    )
    return max((value for value in found if value is not None), default=None)


def _at(bundle: BundleResult, point: str) -> PointResult | None:
    return next((each for each in bundle.points if each.point == point), None)


def _spread(at: PointResult | None, field: str) -> str:
    found: Spread | None = getattr(at.summary, field) if at and at.summary else None
    return f"{fmt.significant(found.p50)} / {fmt.significant(found.p90)}" if found else fmt.DASH


def _ratio(ratio: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{ratio:.2f}"
    if high > 100 * low:  # two rounds that have nothing in common
        return f"{ratio:.2f} (unknown: more --rounds)"
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"

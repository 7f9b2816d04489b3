"""What `pocketvlm bench` asks and shows: the picture and question to measure with, and the tables.

In: bundle directories, or `Measured` records. Out: a picture file with a question; rich tables.
Not here: measuring (`evals/latency.py`), the report's page (`evals/report.py`). No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals import formatting as fmt
from evals.latency import Measured
from evals.records import Latency, Percentiles
from runtime import bundle as bundles
from runtime import conformance
from runtime.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

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
"""Rows of the table with their field in `Latency`, p50 and p99 in ms."""

FIGURES: tuple[tuple[str, Callable[[Latency], str]], ...] = (
    ("prefill tok/s", lambda found: fmt.count(found.prefill_tok_s)),
    ("decode tok/s", lambda found: fmt.count(found.decode_tok_s)),
    ("peak memory", lambda found: fmt.mib(found.peak_rss_mib)),
    ("  before opening", lambda found: fmt.mib(found.base_rss_mib)),
    ("on disk", lambda found: fmt.size(found.disk_bytes)),
)


def subject(bundle: Path, image: Path | None, question: str | None) -> tuple[Path, str]:
    """The picture and question to measure with; what is None comes from the bundle's first conformance case.

    Raises InputError when the picture is no file, BundleError when the bundle cannot be read.
    """
    if image is not None and not image.is_file():
        raise InputError(f"{image}: is no file; give --image a PNG, JPEG or WebP, or leave it out")
    if image is not None and question is not None:
        return image, question
    case = conformance.read(bundle)[0]
    return image or bundles.locate(bundle, case.image.path), question or case.question


def times(measured: Sequence[Measured]) -> Table:
    """One column per bundle; stages as `p50 / p99` in ms."""
    from rich.table import Table

    table = Table(title="p50 / p99 in ms", title_justify="left")
    table.add_column("")
    for one in measured:
        table.add_column(one.bundle, justify="right", overflow="fold")
    for label, field in STAGES:
        table.add_row(label, *(_spread(getattr(one.latency, field)) for one in measured))
    table.add_section()
    for label, show in FIGURES:
        table.add_row(label, *(show(one.latency) for one in measured))
    return table


def ratios(measured: Sequence[Measured]) -> Table | None:
    """Medians over the first bundle's, with their interval; None for a bundle on its own."""
    from rich.table import Table

    if len(measured) < 2:
        return None
    title = f"time over {measured[0].bundle}'s, 95 % interval"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    for one in measured[1:]:
        table.add_column(one.bundle, justify="right", overflow="fold")
    for label, field in STAGES:
        found = [next((r for r in one.ratios if r.metric == field), None) for one in measured[1:]]
        if any(found):
            table.add_row(label, *(f"{r.ratio:.2f} ({r.low:.2f}-{r.high:.2f})" if r else "" for r in found))
    return table


def conditions(latency: Latency) -> str:
    """One line that says under what the figures hold."""
    return (
        f"{latency.device.cpu}, {latency.device.cores} cores, {latency.threads} threads; "
        f"{latency.rounds} processes of {latency.warmup} + {latency.repeats} repeats; "
        f"{latency.prompt_tokens} prompt tokens of which {latency.image_tokens} image, "
        f"{latency.decode_tokens} decoded; page cache {latency.page_cache}"
    )


def _spread(found: Percentiles) -> str:
    return f"{fmt.significant(found.p50)} / {fmt.significant(found.p99)}"

"""The report: one self-contained HTML file and the same figures as JSON.

In: a `Results`. Out: `index.html` and `results.json` in one directory. No network, no script, no other file.
Not here: the drawings (`evals/charts.py`), the sentences (`evals/verdict.py`), measuring.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals import charts, verdict
from evals import formatting as fmt
from evals import results as contract
from evals.results import Results, TrainingCurve
from runtime import files
from runtime.errors import MissingExtra

PAGE, DATA = "index.html", "results.json"
FLIPS_SHOWN = 24
SECTIONS = (
    ("accuracy", "Accuracy"),
    ("mask", "Masking"),
    ("pool", "Pool"),
    ("training", "Training"),
    ("bundles", "Bundles"),
    ("stages", "Speed"),
    ("answers", "Answers"),
    ("ledger", "Cost"),
    ("data", "Data and device"),
    ("method", "Method"),
    ("missing", "Not measured"),
)


def write_report(results: Results, out_dir: Path) -> Path:
    """Write results.json, then index.html, each whole or not at all; returns the page's path.

    Fills `verdict`. Raises MissingExtra when matplotlib or jinja2 is absent (before anything is written).
    """
    results = results.model_copy(update={"verdict": verdict.sentences(results)})
    page = render(results)
    files.make_directory(out_dir)
    contract.write(results, out_dir / DATA)
    files.write_text(out_dir / PAGE, page)
    return out_dir / PAGE


def render(results: Results) -> str:
    """The page as text."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("jinja2", "report") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html").render(**_context(results))


def _context(results: Results) -> dict[str, Any]:
    drawn = _charts(results)
    flips = [(b.name, flip) for b in results.bundles if b.agreement for flip in b.agreement.differing]
    margins = [b.agreement.tie_margin for b in results.bundles if b.agreement]
    present = {
        "accuracy": bool(results.methods),
        "mask": results.mask_curve is not None,
        "pool": results.pool is not None,
        "training": bool(drawn["training"]),
        "bundles": bool(results.bundles),
        "stages": drawn["stages"] is not None,
        "answers": bool(results.examples or flips),
        "ledger": bool(results.ledger),
        "missing": bool(results.missing),
    }
    return {
        "r": results,
        "v": {"headline": verdict.headline(results), "featured": verdict.featured_bundle(results)},
        "fmt": fmt,
        "charts": drawn,
        "tiles": _tiles(results),
        "sections": [(id, title) for id, title in SECTIONS if present.get(id, True)],
        "labels": _labels(results),
        "gradient_rows": [row for curve in results.training if (row := _gradient_row(results, curve))],
        "flips": flips[:FLIPS_SHOWN],
        "flips_left_out": max(0, len(flips) - FLIPS_SHOWN),
        "tie_margin": f"{margins[0]:g}" if margins else "",
        "longest_stage": max((row.seconds for row in results.ledger), default=0.0) or 1.0,
        "stage_note": _stage_note(results),
    }


def _charts(results: Results) -> dict[str, Any]:
    labels = _labels(results)
    by_student = [(s.name, [c for c in results.training if c.student == s.name]) for s in results.students]
    training = [(name, charts.training(curves, labels)) for name, curves in by_student if curves]
    return {
        "accuracy": charts.accuracy(results),
        "mask": charts.mask_curve(results.mask_curve) if results.mask_curve else None,
        "training": [(name, chart) for name, chart in training if chart is not None],
        "bundles": charts.bundles(results.bundles),
        "stages": charts.stages(results.bundles),
    }


def _labels(results: Results) -> dict[str, str]:
    return {row.method: row.label for row in results.methods}


def _tiles(results: Results) -> list[dict[str, str]]:
    """The four figures at the top; one that was not measured is left out."""
    found = []
    student = results.students[0] if results.students else None
    row = results.method(student.name, verdict.HEADLINE) if student else None
    if student and row:
        teacher = f", teacher {fmt.percent(results.teacher.test.accuracy)}" if results.teacher.test else ""
        found.append(("Accuracy", fmt.percent(row.test.accuracy), f"student {student.name}{teacher}"))
        sizes = f"{fmt.parameters(student.parameters)} of {fmt.parameters(results.teacher.parameters)}"
        found.append(("Smaller by", fmt.times(student.ratio), f"{sizes} parameters"))
    bundle = verdict.featured_bundle(results)
    if bundle is not None:
        right = f", {fmt.percent(bundle.test.accuracy)} right" if bundle.test else ""
        found.append(("Smallest faithful bundle", fmt.size(bundle.bytes), f"{bundle.precision}{right}"))
    if bundle is not None and bundle.latency is not None:
        timing = bundle.latency
        note = f"{timing.threads} threads, p50; {fmt.count(timing.decode_tok_s)} tok/s after"
        found.append(("Time to first text", fmt.milliseconds(timing.ttft_ms.p50), note))
    return [{"name": name, "value": value, "note": note} for name, value, note in found]


def _gradient_row(results: Results, curve: TrainingCurve) -> dict[str, Any] | None:
    if curve.grad_share_rl is None:
        return None
    label = _labels(results).get(curve.method, curve.method)
    return {
        "name": f"{curve.student} · {label}",
        "rl": _mean(curve.grad_share_rl),
        "divergence": _mean(curve.grad_share_divergence),
        "reference_kl": _mean(curve.grad_share_reference_kl),
        "zero_variance": _mean(curve.zero_variance_share),
    }


def _mean(values: list[float | None] | None) -> float | None:
    known = [value for value in values or [] if value is not None]
    return sum(known) / len(known) if known else None


def _stage_note(results: Results) -> str:
    timing = next((bundle.latency for bundle in results.bundles if bundle.latency), None)
    if timing is None:
        return ""
    cache = "in the page cache" if timing.page_cache == "warm" else "dropped from the page cache before"
    return (
        f"{timing.rounds} rounds in fresh processes, bundles taken in turn; {timing.warmup} warm-ups and "
        f"{timing.repeats} repeats each, {timing.threads} threads, a prompt of {timing.prompt_tokens} tokens "
        f"({timing.image_tokens} of the image). Every repeat decodes {timing.decode_tokens} tokens and "
        f"ignores stop tokens. The first load in a process is the cold one; its files were {cache}."
    )

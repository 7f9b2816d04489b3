"""What `pocketvlm eval --parity` prints: preprocessing first, then the distributions.

In: `ParityResults`. Out: a rich table and lines. Not here: the report page.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from evals import formatting as fmt
from evals.parity_results import Candidate, Estimate, ParityResults

FEW_GROUPS = 20
"""Below so many images a bootstrap interval is too narrow to rely on."""
COLUMNS = (
    "model",
    "pixels",
    "ids",
    "KL mean",
    "median",
    "p99",
    "top-1",
    "perplexity",
    "same prefix",
    "same answer",
)


def table(results: ParityResults) -> Table:
    """A row for each candidate, on the reference's own answers; KL in nats."""
    asked = results.asked
    title = f"against {results.reference.name} ({results.reference.precision}): {asked.cases} questions"
    found = Table(title=title)
    for name in COLUMNS:
        found.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for one in results.candidates:
        found.add_row(one.name, *(_row(one) if one.error is None else ["not measured"]))
    return found


def _row(one: Candidate) -> list[str]:
    seen, figures, greedy = one.preprocessing, one.on("reference-greedy"), one.greedy
    assert seen is not None and figures is not None and greedy is not None  # there without an error
    pixels = "equal" if seen.images_equal == seen.images else f"{seen.images_equal}/{seen.images}"
    if seen.images_compared == 0:
        pixels = "none" if seen.images == 0 else "not compared"
    return [
        pixels,
        "equal" if seen.prompts_equal == seen.prompts else f"{seen.prompts_equal}/{seen.prompts}",
        fmt.significant(figures.kl_mean.value),
        fmt.significant(figures.kl_median),
        fmt.significant(figures.kl_p99),
        fmt.percent(figures.top1_agreement.value),
        f"{fmt.MINUS if figures.perplexity_ratio.value < 1 else '+'}"
        f"{fmt.percent(abs(figures.perplexity_ratio.value - 1), 2)}",
        fmt.percent(greedy.prefix_share.value),
        fmt.percent(greedy.whole_equal.value),
    ]


def lines(results: ParityResults) -> Iterator[str]:
    """What differs before any arithmetic, the interval of each mean KL, and what to know."""
    for one in results.candidates:
        if one.error is not None:
            yield f"{one.name}: not measured: {one.error}"
            continue
        yield from _preprocessing(one)
        if (figures := one.on("reference-greedy")) is not None:
            yield f"{one.name}: KL {_told(figures.kl_mean)} nats over {figures.positions} tokens"
            if figures.not_finite:
                yield f"{one.name}: {figures.not_finite} positions have a logit that is no number"
        if not one.same_source:
            yield f"{one.name}: was not made from this {results.reference.name}; figures hold two differences"
        if one.emulated:
            yield f"{one.name}: {one.emulated_reason}"
    if results.asked.groups < FEW_GROUPS:
        yield f"only {results.asked.groups} images: the intervals are narrower than what is known"
    for gap in results.missing:
        if gap.what not in {one.name for one in results.candidates}:
            yield f"{gap.what}: {gap.why}"


def _preprocessing(one: Candidate) -> Iterator[str]:
    seen = one.preprocessing
    if seen is None:
        return
    if seen.first_pixels:
        yield f"{one.name}: pixels differ ({seen.first_pixels}); look there before blaming the weights"
        if one.same_inputs is not None:
            yield f"{one.name}: on the reference's pixels KL is {_told(one.same_inputs.kl_mean)} nats"
    if seen.first_ids:
        yield f"{one.name}: prompt ids differ ({seen.first_ids})"


def _told(one: Estimate) -> str:
    return f"{fmt.significant(one.value)} ({fmt.significant(one.low)} to {fmt.significant(one.high)})"

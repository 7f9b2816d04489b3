"""What `pocketvlm eval --parity` prints: preprocessing first, then the distributions.

In: `ParityResults`. Out: a rich table and lines. Not here: the report page.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from evals import formatting as fmt
from evals.parity.parity_results import Candidate, Estimate, ParityResults

FEW_GROUPS = 20
"""Below so many images a bootstrap interval is too narrow to rely on."""


def table(results: ParityResults) -> Table:
    """A column for each candidate, on the reference's own answers; KL in nats."""
    asked = results.asked
    title = f"against {results.reference.name} ({results.reference.precision}): {asked.cases} questions"
    found = Table(title=title)
    found.add_column("")
    shown = [one for one in results.candidates if one.error is None]
    for one in shown:
        found.add_column(one.name, justify="right", overflow="fold")
    columns = [_figures(one) for one in shown]
    for name in columns[0] if columns else ():
        found.add_row(name, *(column[name] for column in columns))
    return found


def _figures(one: Candidate) -> dict[str, str]:
    seen, found, greedy = one.preprocessing, one.on("reference-greedy"), one.greedy
    assert seen is not None and found is not None and greedy is not None  # there without an error
    ratio = found.perplexity_ratio.value - 1
    return {
        "same pixels": _share(seen.images_equal, seen.images_compared, seen.images),
        "same prompt ids": _share(seen.prompts_equal, seen.prompts, seen.prompts),
        "KL mean": fmt.significant(found.kl_mean.value),
        "KL median": fmt.significant(found.kl_median),
        "KL p99": fmt.significant(found.kl_p99),
        "top-1 agreement": fmt.percent(found.top1_agreement.value),
        "perplexity": f"{fmt.MINUS if ratio < 0 else '+'}{fmt.percent(abs(ratio), 2)}",
        "equal prefix": fmt.percent(greedy.prefix_share.value),
        "equal answers": fmt.percent(greedy.whole_equal.value),
    }


def _share(equal: int, compared: int, every: int) -> str:
    if every == 0:
        return "no picture"
    if compared == 0:
        return "not compared"
    if compared < every:
        return f"{equal} of {compared}, {every - compared} not compared"
    return "all" if equal == every else f"{equal} of {every}"


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

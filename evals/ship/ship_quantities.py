"""A gate's quantities, read from the evidence.

In: `Evidence`, a rule, a bundle. Out: `Found` values with their intervals, `Absent` ones with the reason.
Not here: whether a value keeps its limit (`evals/ship/ship_checks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from evals import paired
from evals.ship import ship_change
from evals.ship.ship_change import Change
from evals.ship.ship_evidence import BundleFacts, Evidence, Measure, ParitySeen, Task, Timing
from evals.ship.ship_flips import reference_of
from evals.ship.ship_gate import Rule


@dataclass(frozen=True)
class Place:
    """Where a value holds; empty: everywhere."""

    task: str = ""
    variant: str = ""
    device: str = ""
    point: str = ""


@dataclass(frozen=True)
class Found:
    """A value in the quantity's unit. low, high: 95 % interval; None: it has none, and `basis` says why.

    exact: counted, not sampled. too_few: more processes would give an interval. n: questions or processes.
    """

    place: Place
    value: float
    low: float | None
    high: float | None
    basis: str
    exact: bool = False
    too_few: bool = False
    n: int = 0


@dataclass(frozen=True)
class Absent:
    place: Place
    why: str
    emulated: bool = False


Value = Found | Absent


def values(evidence: Evidence, rule: Rule, bundle: BundleFacts, devices: Sequence[str]) -> list[Value]:
    """One value for each place that the rule selects; at least one, if only an absent one."""
    readers: dict[str, Callable[..., Iterator[Value]]] = {
        "task": _of_tasks, "parity": _of_parity, "bundle": _of_bundle, "device": _of_devices,
    }  # fmt: skip
    found = list(readers[rule.kind.scope](evidence, rule, bundle, devices))
    return found or [Absent(Place(), f"no {rule.kind.scope} that the rule selects was measured")]


# --- tasks ------------------------------------------------------------


def difference(task: Task, reference: str, candidate: str, variant: str) -> Change | None:
    """Candidate against reference on the units that both answered; None without one."""
    before, after = task.scores(reference, variant), task.scores(candidate, variant)
    if before is None or after is None:
        return None
    both = [
        (old, new, group)
        for old, new, group in zip(before, after, task.groups, strict=True)
        if old is not None and new is not None
    ]
    if not both:
        return None
    old_n, new_n, groups = zip(*both, strict=True)
    return ship_change.scores(old_n, new_n, groups)


def _of_tasks(evidence: Evidence, rule: Rule, bundle: BundleFacts, _: Sequence[str]) -> Iterator[Value]:
    for task in evidence.tasks:
        for variant in task.variants:
            if rule.fits(task=task.name, variant=variant.name):
                yield _of_task(task, rule, bundle, Place(task=task.name, variant=variant.name))


def _of_task(task: Task, rule: Rule, bundle: BundleFacts, place: Place) -> Value:
    summary = task.summary(bundle.name, place.variant)
    if summary is None:
        return Absent(place, f"{bundle.name} did not answer it")
    questions = f"{summary.units:,} questions"
    if rule.quantity == "failed_questions":
        return _exact(place, summary.failed, questions)
    if rule.quantity == "accuracy_percent":
        value, low, high = (100 * share for share in (summary.value, summary.low, summary.high))
        return Found(place, value, low, high, questions, n=summary.units)
    reference = _reference(task, rule, bundle)
    if reference is None:
        return Absent(place, f"no {rule.reference} answered it")
    change = difference(task, reference, bundle.name, place.variant)
    if change is None:
        return Absent(place, f"{reference} did not answer it")
    basis = f"against {reference}, {questions}"
    return Found(place, -100 * change.estimate, -100 * change.high, -100 * change.low, basis, n=summary.units)


def _reference(task: Task, rule: Rule, bundle: BundleFacts) -> str | None:
    if rule.reference == "checkpoint":
        return reference_of(task.subjects, bundle)
    return next((one.name for one in task.subjects if one.kind == "teacher"), None)


# --- parity -----------------------------------------------------------


def _of_parity(evidence: Evidence, rule: Rule, bundle: BundleFacts, _: Sequence[str]) -> Iterator[Value]:
    for one in evidence.parity:
        if one.bundle == bundle.name:
            yield _parity(one, rule)


def _parity(one: ParitySeen, rule: Rule) -> Value:
    place, before = Place(task=one.asked.source), one.preprocessing
    if one.error:
        return Absent(place, one.error)
    if rule.quantity in ("prompts_equal_percent", "images_equal_percent", "pixel_max_diff"):
        if before is None:
            return Absent(place, "preprocessing was not compared")
        if rule.quantity == "pixel_max_diff":
            why = before.why_not_compared or "no pixels were compared"
            found = before.pixel_max_diff
            return Absent(place, why) if found is None else _exact(place, found, f"{before.images} pictures")
        prompts = rule.quantity == "prompts_equal_percent"
        equal, of = (
            (before.prompts_equal, before.prompts)
            if prompts
            else (before.images_equal, before.images_compared)
        )
        if not of:
            return Absent(place, before.why_not_compared or "nothing was compared")
        return _exact(place, 100 * equal / of, f"{equal:,} of {of:,}")
    if rule.quantity == "greedy_prefix_percent":
        if one.greedy is None:
            return Absent(place, "greedy answers were not compared")
        share = one.greedy.prefix_share
        return Found(
            place, 100 * share.value, 100 * share.low, 100 * share.high, f"{one.greedy.answers:,} answers",
            n=one.greedy.answers,
        )  # fmt: skip
    return _numerics(one, rule, place)


def _numerics(one: ParitySeen, rule: Rule, place: Place) -> Value:
    main = one.main
    if main is None:
        return Absent(place, "logits were not compared")
    basis = f"{main.positions:,} positions"
    if rule.quantity == "kl_p99_nats":
        return Found(place, main.kl_p99, None, None, f"{basis}; a percentile without interval")
    estimate, scale = {
        "kl_mean_nats": (main.kl_mean, 1),
        "top1_percent": (main.top1_agreement, 100),
        "perplexity_ratio": (main.perplexity_ratio, 1),
    }[rule.quantity]
    return Found(
        place, scale * estimate.value, scale * estimate.low, scale * estimate.high, basis, n=main.cases
    )


# --- bytes ------------------------------------------------------------


def _of_bundle(_e: Evidence, rule: Rule, bundle: BundleFacts, _d: Sequence[str]) -> Iterator[Value]:
    download = rule.quantity == "download_mb"
    found = bundle.download_bytes if download else bundle.disk_bytes
    if found is None:
        yield Absent(Place(), "its bytes are in no file that was given")
    else:
        yield _exact(Place(), found / 1e6, "counted")


# --- devices ----------------------------------------------------------


def _of_devices(
    evidence: Evidence, rule: Rule, bundle: BundleFacts, devices: Sequence[str]
) -> Iterator[Value]:
    emulated = {one.name: one.emulated_why for one in evidence.devices if one.emulated}
    for device in devices:
        if not rule.fits(device=device):
            continue
        timings = evidence.timings_of(device, bundle.name)
        chosen = [one for one in timings if rule.fits(point=one.point)]
        if rule.kind.timed and device in emulated:
            yield Absent(Place(device=device), f"emulated: {emulated[device]}", emulated=True)
        elif not chosen:
            why = "the rule's grid point was not measured there" if timings else "it was not measured there"
            yield Absent(Place(device=device), why)
        else:
            yield from (_of_timing(one, rule) for one in chosen)


def _of_timing(timing: Timing, rule: Rule) -> Value:
    place = Place(device=timing.device, point=timing.point)
    quantity = rule.quantity
    if quantity in ("prefill_tok_s", "decode_tok_s"):
        return _rate(timing, quantity, place)
    if quantity in ("joule_per_answer", "millijoule_per_token"):
        energy = timing.energy
        value = getattr(energy, quantity) if energy else None
        if value is None:
            return Absent(place, (energy.why_not if energy else None) or "energy was not measured")
        return Found(place, value, None, None, "one measurement, without interval")
    if quantity == "sustained_slowdown_percent":
        long = timing.sustained
        if long is None or long.ratio is None or long.low is None or long.high is None:
            return Absent(place, "no sustained run that was long enough")
        value, low, high = (100 * (ratio - 1) for ratio in (long.ratio, long.low, long.high))
        return Found(place, value, low, high, f"{long.measured_s / 60:.0f} min", n=len(long.answer_ms))
    measure = timing.measure(quantity)
    if measure is None:
        return Absent(place, "it was not measured there")
    if quantity in ("peak_rss_mib", "load_peak_rss_mib"):
        return _exact(place, measure.spread.most, f"largest of {_processes(measure)}")
    return _percentile(measure, rule.percentile, place)


def _percentile(measure: Measure, percentile: int, place: Place) -> Value:
    value = getattr(measure.spread, f"p{percentile}")
    if value is None:
        return Absent(place, f"{measure.spread.n} repeats say nothing about p{percentile}")
    basis = f"p{percentile} of {measure.spread.n:,} in {_processes(measure)}"
    if percentile == 99:
        return Found(place, value, None, None, f"{basis}, without interval")
    return _timed(place, value, measure.process_p50 if percentile == 50 else measure.process_p90, basis)


def _rate(timing: Timing, quantity: str, place: Place) -> Value:
    """Tokens a second: the inverse of the stage's median time, its interval turned round."""
    value = getattr(timing, quantity)
    measure = timing.measure(quantity.replace("tok_s", "ms"))
    if value is None or measure is None:
        return Absent(place, "it was not measured there")
    tokens = 1000 * (timing.prompt_tokens if quantity == "prefill_tok_s" else 1)
    rates = tuple(tokens / one for one in measure.process_p50 if one > 0)
    return _timed(place, value, rates, f"at the median time, {_processes(measure)}")


def _timed(place: Place, value: float, processes: Sequence[float], basis: str) -> Value:
    """With the t interval over the logarithms of the processes' values, widened to hold the pooled value."""
    if len(processes) < ship_change.LEAST_ROUNDS or min(processes) <= 0:
        few = f"{basis}; an interval needs {ship_change.LEAST_ROUNDS} processes"
        return Found(place, value, None, None, few, too_few=True)
    mean = ship_change.of_rounds([[one] for one in processes])
    half = paired.t_quantile(0.975, len(processes) - 1) * math.sqrt(mean.variance)
    low, high = math.exp(mean.mean - half), math.exp(mean.mean + half)
    return Found(place, value, min(low, value), max(high, value), basis, n=len(processes))


def _exact(place: Place, value: float, basis: str) -> Found:
    return Found(place, value, value, value, basis, exact=True)


def _processes(measure: Measure) -> str:
    count = len(measure.process_p50)
    return f"{count} process" + ("es" if count > 1 else "")

"""What an ablation found: results from disk, compared over seeds, in words and as tables.

In: an ablation's directory. Out: `report/results.json`, `report/ablation.md`, `report/index.html`.
Not here: running arms (`ablation/ablate.py`), statistics (`evals/paired.py`), the page (`ablate_page.py`).

A difference counts only where its paired 95 % interval over seeds leaves out 0; else it is called noise, with
the difference that as many seeds could have shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distill.ablation import ablate_arms
from distill.ablation.ablate_arms import EXPERIMENTS, LABELS, MASTERS, Arm, Comparison, Needed
from distill.ablation.ablate_jobs import RESULT, Place
from evals import formatting as fmt
from evals import paired
from evals.paired import Paired
from runtime import files
from runtime.installation import program_version

REPORT, PAGE, DATA, MARKDOWN = "report", "index.html", "results.json", "ablation.md"
LABELS_ARM = "labels alone (SFT)"


@dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds; accuracies are shares of the test questions, in the order of `seeds`."""

    name: str
    label: str
    family: str
    changes: tuple[str, ...]
    rate: float
    seeds: tuple[int, ...]
    accuracy: tuple[float, ...]
    validation: float
    tokens: float
    cpu_seconds: float
    means: dict[str, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracy)

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else None


@dataclass(frozen=True)
class Compared:
    """Candidate minus reference over the seeds that both have, in shares."""

    comparison: Comparison
    found: Paired
    differences: tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """All that the report tells."""

    name: str
    created: str
    version: str
    questions: int
    baselines: dict[str, list[float]]
    arms: dict[str, ArmResult]
    compared: list[Compared]
    rates: dict[str, list[tuple[float, float]]]
    left_out: dict[str, str]
    gates: list[dict[str, Any]]
    pool: list[dict[str, Any]]
    parameters: int | None
    verdict: list[str]

    def label(self, arm: str) -> str:
        return self.arms[arm].label


def write(place: Place, wanted: Needed, rates: dict[str, float]) -> Path:
    """Write JSON, Markdown and the page, the page last; its path."""
    from distill.ablation import ablate_page

    found = collect(place, wanted)
    out = place.out / REPORT
    page = ablate_page.render(found)
    files.write_json(out / DATA, as_json(found))
    files.write_text(out / MARKDOWN, markdown(found))
    files.write_text(out / PAGE, page)
    return out / PAGE


def collect(place: Place, wanted: Needed) -> Results:
    """Read every result of the wanted arms and compare."""
    known = ablate_arms.arms(place.plan, place.settings)
    arms: dict[str, ArmResult] = {}
    first: dict[str, Any] = {}
    for name, count in wanted.seeds.items():
        paths = [place.out / f"seed-{seed}" / name / RESULT for seed in place.settings.numbers(count)]
        results = [files.read_json(path) for path in paths]
        arm = known.get(name)
        arms[name] = _arm(name, arm.label if arm else LABELS_ARM, arm, results)
        if name == MASTERS:
            first = results[0]
    compared = [_compare(arms, one) for one in wanted.comparisons]
    return Results(
        name=place.plan.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=program_version(),
        questions=int(first["count"]),
        baselines=_baselines(place, max(wanted.seeds.values())),
        arms=arms,
        compared=compared,
        rates=_rates(place),
        left_out=wanted.left_out,
        gates=first.get("gates", []),
        pool=first.get("pool", []),
        parameters=first.get("parameters"),
        verdict=[sentence(one, arms) for one in compared if one.comparison.main],
    )


def _arm(name: str, label: str, arm: Arm | None, results: Sequence[dict[str, Any]]) -> ArmResult:
    keys = sorted({key for result in results for key in result.get("means", {})})
    return ArmResult(
        name=name,
        label=label,
        family=arm.family if arm else LABELS,
        changes=arm.changes if arm else (),
        rate=results[0]["rate"],
        seeds=tuple(result["seed"] for result in results),
        accuracy=tuple(result["right"] / result["count"] for result in results),
        validation=statistics.fmean(result["validation"] for result in results),
        tokens=statistics.fmean(result["tokens"] for result in results),
        cpu_seconds=statistics.fmean(result["cpu_seconds"] for result in results),
        means={key: statistics.fmean(result["means"][key] for result in results) for key in keys},
    )


def _compare(arms: dict[str, ArmResult], one: Comparison) -> Compared:
    reference, candidate = arms[one.reference], arms[one.candidate]
    both = [seed for seed in reference.seeds if seed in candidate.seeds]
    before = [reference.accuracy[reference.seeds.index(seed)] for seed in both]
    after = [candidate.accuracy[candidate.seeds.index(seed)] for seed in both]
    differences = tuple(b - a for a, b in zip(before, after, strict=True))
    return Compared(one, paired.compare(before, after), differences)


def _baselines(place: Place, seeds: int) -> dict[str, list[float]]:
    """Test accuracy of teachers and of the student before distillation."""
    if place.settings.made is None:
        where = {path.stem: [path] for path in sorted((place.out / "baselines").glob("*.json"))}
    else:
        where = {
            name: [
                path.parent / f"{path.name}.json"
                for path in dict.fromkeys(place.models(seed)[name] for seed in place.settings.numbers(seeds))
            ]
            for name in place.settings.made.models
        }
    read = {name: [files.read_json(path) for path in paths] for name, paths in where.items()}
    return {name: [one["right"] / one["count"] for one in found] for name, found in read.items()}


def _rates(place: Place) -> dict[str, list[tuple[float, float]]]:
    """(learning rate, validation accuracy) of what was tried, by family."""
    found: dict[str, list[tuple[float, float]]] = {}
    for path in sorted((place.out / "rates").glob(f"*/{RESULT}")):
        result = files.read_json(path)
        found.setdefault(result["arm"], []).append((result["rate"], result["validation"]))
    return {name: sorted(tried) for name, tried in found.items()}


# --- words ------------------------------------------------------------


def reading(one: Compared) -> str:
    """`better`, `worse` or `noise`."""
    if one.found.is_noise:
        return "noise"
    return "better" if one.found.mean > 0 else "worse"


def sentence(one: Compared, arms: dict[str, ArmResult]) -> str:
    """What a comparison says, noise called noise."""
    found = one.found
    who, than = arms[one.comparison.candidate].label, arms[one.comparison.reference].label
    who = who[0].upper() + who[1:]
    size = f"{fmt.points(found.mean)} points"
    if found.low is None or found.high is None or found.detectable is None:
        return f"{who} against {than}: {size} on one seed, which says nothing."
    spread = f"{fmt.points(found.low)} to {fmt.points(found.high)} over {found.seeds} seeds"
    if found.is_noise:
        return (
            f"{who} cannot be told from {than}: {size} ({spread}) are noise. A difference of "
            f"{100 * found.detectable:.1f} points would have shown in four of five such experiments."
        )
    better = found.better if found.mean > 0 else found.worse
    test = "" if found.p is None else f", sign-flip {fmt.p_value(found.p)}"
    word = "beats" if found.mean > 0 else "is worse than"
    return f"{who} {word} {than}: {size} ({spread}, so in {better} of them{test})."


def headline(results: Results) -> str:
    """Whether the rewards earn their place, in a few words."""
    for one in results.compared:
        if one.comparison == Comparison("rewards", "control", "masters", main=True):
            if one.found.is_noise:
                return "Masters and the same pool without RL: no difference beyond noise"
            way = "beats" if one.found.mean > 0 else "is below"
            return f"Masters {way} the same pool without RL by {abs(100 * one.found.mean):.1f} points"
    return f"{len(results.compared)} comparisons over seeds"


def markdown(results: Results) -> str:
    """The report as Markdown, for a repository's docs."""
    lines = [f"# Ablation of `{results.name}`", "", f"**{headline(results)}.**", ""]
    lines += [f"- {text}" for text in results.verdict]
    lines += ["", *_baseline_table(results), "", "## Arms", "", *_arm_table(results), ""]
    for name, question in EXPERIMENTS.items():
        own = [one for one in results.compared if one.comparison.experiment == name]
        if own:
            lines += [f"## {question}", "", *_comparison_table(results, own), ""]
    if results.left_out:
        lines += ["## Left out", "", *(f"- {what}: {why}" for what, why in results.left_out.items()), ""]
    lines += ["## How it was measured", "", *(f"- {text}" for text in notes(results)), ""]
    return "\n".join(lines)


def _baseline_table(results: Results) -> list[str]:
    rows = [
        f"| {name} | {fmt.percent(statistics.fmean(found))} | {_range(found)} |"
        for name, found in results.baselines.items()
    ]
    return ["| before distillation | test accuracy | range over seeds |", "|---|---|---|", *rows]


def _arm_table(results: Results) -> list[str]:
    head = ["arm", "seeds", "test accuracy", "sd", "range", "learning rate", "response tokens", "changes"]
    rows = [
        [
            arm.label,
            str(len(arm.seeds)),
            fmt.percent(arm.mean),
            "" if arm.sd is None else f"{100 * arm.sd:.1f}",
            _range(arm.accuracy),
            f"{arm.rate:g}",
            fmt.count(arm.tokens),
            " ".join(f"`{change}`" for change in arm.changes),
        ]
        for arm in results.arms.values()
    ]
    return _table(head, rows)


def _comparison_table(results: Results, own: Sequence[Compared]) -> list[str]:
    head = ["compared", "points", "95 %", "seeds", "better / worse", "p", "detectable", "reading"]
    rows = []
    for one in own:
        found = one.found
        has = found.low is not None and found.high is not None
        who, than = results.label(one.comparison.candidate), results.label(one.comparison.reference)
        rows.append(
            [
                f"{who} against {than}",
                fmt.points(found.mean),
                f"{fmt.points(found.low)} to {fmt.points(found.high)}" if has else fmt.DASH,
                str(found.seeds),
                f"{found.better} / {found.worse}",
                fmt.DASH if found.p is None else f"{found.p:.3f}",
                f"{100 * found.detectable:.1f}" if found.detectable is not None else fmt.DASH,
                reading(one) + ("" if one.comparison.main else ", exploratory"),
            ]
        )
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _range(values: Sequence[float]) -> str:
    return fmt.interval(min(values), max(values)) if len(values) > 1 else ""


def notes(results: Results) -> list[str]:
    """What a reader must know to trust the figures, or not to."""
    tried = "; ".join(
        f"{family}: " + ", ".join(f"{rate:g} {fmt.percent(value)}" for rate, value in found)
        for family, found in results.rates.items()
    )
    return [
        f"{fmt.count(results.questions)} test questions, the same for every run, answered greedily once, at "
        "the end.",
        "A seed decides the student's start where it is made here, the order of questions, and every draw. "
        "Arms of one seed share all of it, so differences are paired by seed. Teachers are the same for all "
        "seeds: what is said holds for these teachers.",
        "Interval: Student's t over the paired differences. p: exact test over all sign flips, which cannot "
        "go below 0.25 with three seeds. Detectable: the true difference that this spread and as many seeds "
        "show in 80 % of experiments at the 5 % level.",
        "Comparisons marked exploratory have few seeds and are not corrected for their number.",
        "Learning rates: chosen for each family of arms on validation questions, on a seed that no "
        f"comparison uses. Validation accuracy of what was tried: {tried or 'one rate only'}. Arms of a "
        "family share its rate.",
    ]


def as_json(results: Results) -> dict[str, Any]:
    """JSON-ready, with derived figures."""
    return {
        **asdict(results),
        "headline": headline(results),
        "compared": [
            {**asdict(one), "reading": reading(one), "sentence": sentence(one, results.arms)}
            for one in results.compared
        ],
        "arms": {name: {**asdict(arm), "mean": arm.mean, "sd": arm.sd} for name, arm in results.arms.items()},
        "notes": notes(results),
    }

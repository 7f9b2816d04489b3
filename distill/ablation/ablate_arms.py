"""Arms of an ablation as ordered data: what each changes in the recipe, and what is compared with what.

In: a recipe and the ablation's settings. Out: arms, comparisons, the recipe of a run. Not here: running them
(`distill/ablation/ablate.py`, `distill/ablation/ablate_jobs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill import strict
from distill.ablation.made import LabelTraining, Made
from distill.recipe import Recipe, Source
from distill.strict import Count, Positive, Rate, Share, Strict
from runtime.errors import InputError

SETTINGS = Path(__file__).parents[1] / "recipes" / "ablations"
Family = Literal["masters", "control", "labels"]
MASTERS: Family = "masters"
CONTROL: Family = "control"
LABELS: Family = "labels"


class Settings(Strict):
    """What `ablate` varies beside the recipe.

    `test`: questions that are asked once, at the end (empty: the recipe's validation). `seeds` is for the
    main comparisons, `exploratory_seeds` for the others, from `first_seed` on: seeds that settings were tried
    on are no evidence. `rates`: the learning rates tried for a family of
    arms on `rate_seed`, chosen on validation; a family without an entry takes the recipe's.
    `labels_only`: the control on labels alone; null leaves it out. `made`: models trained here first.
    """

    test: tuple[Source, ...] = ()
    seeds: Positive = 8
    exploratory_seeds: Positive = 3
    first_seed: Count = 0
    rate_seed: Count = 1000
    rates: dict[Family, Annotated[tuple[Rate, ...], Field(min_length=1)]] = Field(default_factory=dict)
    r_max: tuple[Share, ...] = (0.1, 0.2, 0.3, 0.4)
    labels_only: LabelTraining | None = None
    made: Made | None = None

    def numbers(self, count: int) -> range:
        """The first `count` seeds."""
        return range(self.first_seed, self.first_seed + count)


def settings_for(plan: Recipe) -> Settings:
    """The settings that ship for a recipe of this name, else the defaults."""
    path = SETTINGS / f"{plan.name}.yaml"
    return strict.validate(Settings, strict.load_yaml(path), path) if path.exists() else Settings()


# --- arms and comparisons ---------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A run that differs from the recipe by `changes`, settings as `distill --set` takes them.

    Every arm but growth has the recipe's last teacher alone. `family` decides the learning rate.
    """

    name: str
    label: str
    family: Family
    changes: tuple[str, ...] = ()
    all_teachers: bool = False


@dataclass(frozen=True)
class Comparison:
    """Candidate against reference. `main` ones have all seeds, the others are exploratory."""

    experiment: str
    reference: str
    candidate: str
    main: bool = False


EXPERIMENTS = {
    "masking": "Does a masked teacher that is restored teach more than the full one?",
    "rewards": "Do the rewards add anything to the same pool and the same divergence?",
    "r_max": "How much should be masked at the start?",
    "growth": "Do teachers that grow teach more than the large one alone?",
    "mix": "Whose responses should the pool hold?",
}
NO_RL = ("objective.change.rl=0", "objective.change.kl_beta=0")
UNMASKED = ("teachers.0.mask.gate=null", "teachers.0.mask.step=null", "teachers.0.mask.r_max=1.0e-6")
"""Not one weight of a tensor below a million is masked, and the stages, at which the student answers anew,
are the same as with masks."""
DISTILL_ONLY = ("objective.change.gate=false", "objective.change.distill_weight=1000.0")
"""R_acc then counts a thousandth of R_distill; the floor of the standard deviation is scaled with it."""


def arms(plan: Recipe, settings: Settings) -> dict[str, Arm]:
    """Every arm that this recipe allows, by name."""
    pool = plan.pool
    total = pool.teacher_responses + pool.student_responses
    floor = plan.objective.switches.std_floor
    stages = _stages(plan)
    found = [
        Arm("masters", "Masters", MASTERS),
        Arm("control", "the same pool without RL", CONTROL, NO_RL),
        Arm("naive", "the full teacher without RL", CONTROL, (*NO_RL, *UNMASKED, stages)),
        Arm("unmasked", "Masters without masks", MASTERS, (*UNMASKED, stages)),
        Arm("r-acc", "R_acc alone", MASTERS, ("objective.change.distill_weight=0.0",)),
        Arm(
            "r-distill",
            "R_distill alone",
            MASTERS,
            (*DISTILL_ONLY, f"objective.change.std_floor={1000 * floor}"),
        ),
    ]
    for ratio in settings.r_max:
        changes = ("teachers.0.mask.gate=null", "teachers.0.mask.step=null", stages)
        found.append(
            Arm(
                f"r-max-{ratio:g}",
                f"r_max {ratio:g}",
                MASTERS,
                (*changes, f"teachers.0.mask.r_max={ratio}"),
            )
        )
    found += [
        Arm("growth", "teachers that grow", MASTERS, all_teachers=True),
        Arm("all-teacher", f"{total} of the teacher", MASTERS, _mix(total, 0)),
        Arm("all-student", f"{total} of the student", MASTERS, _mix(0, total)),
    ]
    return {arm.name: arm for arm in found}


def _stages(plan: Recipe) -> str:
    mask = plan.teachers[-1].mask
    count = 1 if mask is None else mask.stages or (mask.stages_at(mask.largest) if mask.step else 5)
    return f"teachers.0.mask.stages={count}"


def _mix(teacher: int, student: int) -> tuple[str, ...]:
    return (f"pool.teacher_responses={teacher}", f"pool.student_responses={student}")


def comparisons(settings: Settings) -> list[Comparison]:
    """In the order of the report. The first two of masking and the first of the rewards decide."""
    return [
        Comparison("masking", "naive", "control", main=True),
        Comparison("masking", "unmasked", "masters", main=True),
        Comparison("rewards", "control", "masters", main=True),
        Comparison("rewards", "control", "r-acc"),
        Comparison("rewards", "control", "r-distill"),
        *(Comparison("r_max", "unmasked", f"r-max-{ratio:g}") for ratio in settings.r_max),
        Comparison("growth", "masters", "growth"),
        Comparison("mix", "masters", "all-teacher"),
        Comparison("mix", "masters", "all-student"),
    ]


def left_out(plan: Recipe, comparison: Comparison) -> str:
    """Why this recipe has nothing to compare there; "" where it has."""
    if comparison.experiment in ("masking", "r_max") and plan.teachers[-1].mask is None:
        return "the recipe's last teacher is never masked (mask: null)"
    if comparison.experiment == "growth" and len(plan.teachers) < 2:
        return "the recipe has one teacher; list a smaller one before it"
    if comparison.candidate == "all-student" and any(s.labels != "all" for s in plan.data.train):
        return "without teacher responses nobody gives the reference of a question without a label"
    return ""


def recipe_of(plan: Recipe, arm: Arm, seed: int, *, rate: float | None = None) -> Recipe:
    """The recipe of one run: `plan` with the arm's changes, a seed and perhaps a learning rate."""
    raw = plan.model_dump(mode="json")
    if not arm.all_teachers:
        raw["teachers"] = raw["teachers"][-1:]
    changes = [*arm.changes, f"seed={seed}", f"name={plan.name}-{arm.name}"]
    changes += [] if rate is None else [f"train.lr={rate}"]
    return strict.validate(Recipe, strict.override(raw, changes), f"arm {arm.name}")


@dataclass(frozen=True)
class Needed:
    """Which arms run over how many seeds for the chosen experiments."""

    comparisons: tuple[Comparison, ...]
    seeds: dict[str, int]
    left_out: dict[str, str]


def needed(plan: Recipe, settings: Settings, experiments: Sequence[str], seeds: int) -> Needed:
    """An arm has the seeds of its most demanding comparison. Raises InputError for an unknown experiment."""
    for name in experiments:
        try:
            strict.known(name, EXPERIMENTS, "experiment")
        except ValueError as error:
            raise InputError(f"--experiments: {error}") from error
    chosen: list[Comparison] = []
    counts: dict[str, int] = {MASTERS: 1}
    without: dict[str, str] = {}
    for one in comparisons(settings):
        if one.experiment not in experiments:
            continue
        if why := left_out(plan, one):
            without[f"{one.experiment}: {one.candidate}"] = why
            continue
        chosen.append(one)
        count = seeds if one.main else min(seeds, settings.exploratory_seeds)
        for arm in (one.reference, one.candidate):
            counts[arm] = max(counts.get(arm, 0), count)
    if settings.labels_only is not None:
        counts[LABELS] = min(seeds, settings.exploratory_seeds)
    return Needed(tuple(chosen), counts, without)

"""Out-of-distribution variants of a task: the same questions, changed in one way, so that brittleness shows.

In: a task and names (`all`, `quick`, `blur`, `blur-3`, `wording=FILE`). Out: `Variant` records, and the task
as a variant has it: same ids, units, groups and references. Not here: asking (`asking/eval_run.py`), what
became worse and for whom (`evals/variants/brittleness.py`).

Every change is a function of the question and the variant's name: all models see the same, every time.
Pictures are changed when they are read, and are then PNG files in memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evals.asking.eval_results import Variant
from evals.results import Missing
from evals.tasks.question import Question, Task
from evals.variants import variants_images, variants_size, variants_wording
from runtime.errors import InputError

Changed = Callable[[Task, Question, int], Question | None]
"""A question at a severity; None when the variant has none for it."""


@dataclass(frozen=True)
class Family:
    """One kind of change. `told` describes each severity; `refuses` says why a task cannot have it, or ""."""

    name: str
    told: tuple[str, ...]
    change: Changed
    refuses: Callable[[Task], str]

    def variants(self) -> list[Variant]:
        """One for each severity, the mildest first."""
        rows = enumerate(self.told, 1)
        return [
            Variant(name=f"{self.name}-{n}", family=self.name, severity=n, description=t) for n, t in rows
        ]


def _has_pictures(task: Task) -> str:
    return "" if any(one.images for one in task.questions) else "its questions have no pictures"


def _corrupted(name: str) -> Changed:
    def change(_: Task, question: Question, severity: int) -> Question:
        pictures = (variants_images.Corrupted(one, name, severity) for one in question.images)
        return replace(question, images=tuple(pictures))

    return change


def _resized(name: str) -> Changed:
    def change(task: Task, question: Question, severity: int) -> Question:
        pictures = (variants_size.Resized(one, task.format, name, severity) for one in question.images)
        return replace(question, images=tuple(pictures))

    return change


def _reworded(task: Task, question: Question, severity: int) -> Question:
    return variants_wording.reworded(task.format, question, severity)


FAMILIES = (
    Family("wording", variants_wording.TOLD, _reworded, lambda task: ""),
    *(
        Family(kind.name, kind.told, _corrupted(kind.name), _has_pictures)
        for kind in variants_images.CORRUPTIONS
    ),
    *(
        Family(name, told, _resized(name), lambda task: variants_size.refuses(task.format))
        for name, told in variants_size.TOLD.items()
    ),
)
"""In this order they are asked and shown."""


def parse(names: str | Sequence[str], task: Task) -> list[Variant]:
    """The variants that comma-separated names ask for, each once, in the order of FAMILIES.

    `all`: every severity of every family that the task can have; `quick`: the middle severity of each;
    `blur`: all severities of one; `blur-3`: one; `wording=FILE`: the user's own wordings. Raises InputError
    for an unknown name, or one that this task cannot have.
    """
    wanted = (
        names.split(",") if isinstance(names, str) else [part for one in names for part in one.split(",")]
    )
    possible = [family for family in FAMILIES if not family.refuses(task)]
    found: dict[str, Variant] = {}
    for name in (one.strip() for one in wanted if one.strip()):
        if name == "all":
            chosen = [variant for family in possible for variant in family.variants()]
        elif name == "quick":
            chosen = [family.variants()[(len(family.told) - 1) // 2] for family in possible]
        else:
            chosen = _named(name, task)
        found |= {variant.name: variant for variant in chosen}
    if not found:
        raise InputError(f"--variants: names none; {_choices()}")
    order = [family.name for family in FAMILIES]
    return sorted(
        found.values(), key=lambda one: (order.index(one.family), one.severity or 0, one.name)
    )  # the user's own wordings have no severity


def _named(name: str, task: Task) -> list[Variant]:
    if name.startswith("wording="):
        path = Path(name.partition("=")[2])
        variants_wording.read(path)
        return [Variant(name=name, family="wording", description=f"wordings of {path.name}")]
    for family in FAMILIES:
        chosen = [one for one in family.variants() if name in (family.name, one.name)]
        if chosen and (reason := family.refuses(task)):
            raise InputError(f"--variants {name}: task {task.name} cannot have it: {reason}")
        if chosen:
            return chosen
    near = difflib.get_close_matches(name, [family.name for family in FAMILIES], 1)
    raise InputError(
        f"--variants {name}: unknown; " + (f"did you mean {near[0]}? " if near else "") + _choices()
    )


def _choices() -> str:
    names = ", ".join(f"{family.name} (1-{len(family.told)})" for family in FAMILIES)
    return f"wanted all, quick, wording=FILE, or of: {names}"


def apply(task: Task, variant: Variant) -> Task:
    """The task as the variant has it. Questions for which the variant has no wording are left out.

    Raises InputError when the variant is unknown, or leaves no question.
    """
    if variant.severity is None:
        texts = variants_wording.read(Path(variant.name.partition("=")[2]))
        questions = [variants_wording.given(one, texts) for one in task.questions]
    else:
        family = next((one for one in FAMILIES if one.name == variant.family), None)
        if family is None or not 1 <= variant.severity <= len(family.told):
            raise InputError(f"variant {variant.name}: unknown; {_choices()}")
        questions = [family.change(task, one, variant.severity) for one in task.questions]
    kept = tuple(one for one in questions if one is not None)
    if not kept:
        raise InputError(f"variant {variant.name}: has no wording for any question of {task.name}")
    return replace(task, questions=kept)


def missing(task: Task) -> list[Missing]:
    """The families that this task cannot have, with the reason."""
    return [
        Missing(what=f"variant {family.name}", why=reason)
        for family in FAMILIES
        if (reason := family.refuses(task))
    ]

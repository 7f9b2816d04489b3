"""Teachers: how far each may be masked, which questions each answers at which ratio (METHOD 2).

In: scores of a masked teacher on held-out questions (a function), the recipe's masks. Out: the curve
of accuracy against the ratio with the r_max it allows, kept in a record; the phases of the run.
Not here: masking itself (`masks/masking.py`), generating and scoring answers, checkpoints for a server
(`distill/masks/materialised.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import distributed

from distill.masks import masking
from distill.settings import Gate, Mask, Teacher
from runtime import files
from runtime.errors import StateError, TrainingError

ALL_TEACHERS = -1
INERT_LOST, INERT_RATIO = 0.01, 0.5

Answer = Callable[[float], tuple[Sequence[float], float]]
"""Lets the teacher, masked at a ratio, answer the held-out questions: one score in [0, 1] each, always in the
same order, and the share of zeros that was measured."""


# --- the gate ----------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The teacher at one ratio: the score of every held-out question, and the zeros that were measured."""

    ratio: float
    scores: tuple[float, ...]
    sparsity: float
    seconds: float

    @property
    def accuracy(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Gated:
    """What the gate found: the curve (empty without a gate), the r_max to use, remarks for the user."""

    teacher: str
    r_max: float
    most_lost: float = 0.0
    curve: tuple[Point, ...] = ()
    inert: bool = False
    notes: tuple[str, ...] = ()

    def lost(self, point: Point) -> tuple[float, float]:
        """Accuracy lost against the full teacher on the same questions, and half its 95 % interval."""
        return _lost(self.curve[0], point)

    def table(self) -> Table:
        """The curve for a terminal."""
        table = Table(title=f"{self.teacher}: accuracy of the masked teacher, r_max = {self.r_max:g}")
        for column in ("ratio", "zeros measured", "accuracy", "lost", "questions", "seconds", ""):
            table.add_column(column, justify="right")
        for point in self.curve:
            lost, half = self.lost(point)
            table.add_row(
                f"{point.ratio:g}", f"{point.sparsity:.1%}", f"{point.accuracy:.1%}",
                f"{100 * lost:.1f} +- {100 * half:.1f}" if point.ratio else "",
                str(len(point.scores)), f"{point.seconds:.0f}",
                "r_max" if point.ratio == self.r_max else "",
            )  # fmt: skip
        table.caption = "\n".join(self.notes) or None
        return table


def _lost(full: Point, point: Point) -> tuple[float, float]:
    """Mean of the paired differences full - masked, and 1.96 standard errors of it."""
    differences = [a - b for a, b in zip(full.scores, point.scores, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / max(1, count - 1)
    return mean, 1.96 * math.sqrt(variance / count)


def gate(
    teacher: str,
    answer: Answer,
    mask: Mask,
    record: Path,
    identity: Mapping[str, Any],
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> Gated:
    """Measure the masked teacher at every ratio of the gate, and choose or check r_max.

    `auto` is the largest ratio that loses at most `most_lost`; a number must itself lose no more. A ratio
    that `record` (JSON) holds is not measured again; `identity` says what makes it valid (checkpoint,
    questions). Under several processes all of them call this and the first one's scores count. Without a
    gate the mask's own r_max is taken unseen.

    Raises TrainingError, with the curve, for a teacher that collapses or answers nothing right unmasked;
    StateError for a record of something else.
    """
    if mask.gate is None:
        return Gated(teacher, mask.largest, notes=("no gate: r_max was not checked on this teacher",))
    ratios = sorted({*mask.gate.ratios, *(() if mask.r_max == "auto" else (mask.r_max,))})
    identity = {**identity, "tensors": mask.touches}
    known = _known(record, identity)
    for ratio in ratios:
        if ratio not in known:
            point = known[ratio] = _measure(ratio, answer)
            progress(f"{teacher} at r = {ratio:g}: {point.accuracy:.1%} of {len(point.scores)} questions")
            _write(record, identity, known)
    return decide(teacher, [known[ratio] for ratio in ratios], mask.r_max, mask.gate)


def decide(teacher: str, curve: Sequence[Point], wanted: float | str, settings: Gate) -> Gated:
    """r_max by the curve (ratios rising from 0), and what to say about it; see `gate`."""
    full, masked = curve[0], curve[1:]
    if len({len(point.scores) for point in curve}) > 1:
        raise StateError(f"{teacher}: gate points of different question sets; delete the gate's record")
    shown = ", ".join(f"r {p.ratio:g}: {p.accuracy:.1%}" for p in curve)
    if full.accuracy == 0:
        raise TrainingError(
            f"{teacher}: the full teacher answers none of {len(full.scores)} held-out questions correctly "
            f"({shown}); check the scorer, the prompts and the labels"
        )
    limit = f"at most {100 * settings.most_lost:g} points may be lost (gate.most_lost)"
    pairs = [(point.ratio, point.accuracy) for point in curve]
    r_max = masking.choose_r_max(pairs, most_lost=settings.most_lost)
    if wanted != "auto" and r_max < float(wanted):
        at = next(point for point in curve if point.ratio == wanted)
        lost = _lost(full, at)[0]
        if lost > settings.most_lost + 1e-9:
            raise TrainingError(
                f"{teacher}: at its r_max {at.ratio:g} the teacher loses {100 * lost:.1f} points and "
                f"{limit}; {shown}; take r_max {r_max:g} or auto, or allow more"
            )
    if wanted == "auto" and masked and r_max == 0:
        raise TrainingError(
            f"{teacher}: collapses at every ratio that was asked, and {limit}; {shown}; ask smaller ones "
            "(mask.gate.ratios), allow more, or set mask: null"
        )
    chosen = r_max if wanted == "auto" else float(wanted)
    inert = bool(masked) and masking.is_inert(pairs, least_lost=INERT_LOST)
    return Gated(teacher, chosen, settings.most_lost, tuple(curve), inert, _notes(curve, settings, inert))


def _notes(curve: Sequence[Point], settings: Gate, inert: bool) -> tuple[str, ...]:
    full, notes = curve[0], []
    if inert:
        reach = max(point.ratio for point in curve if point.ratio <= INERT_RATIO)
        notes.append(
            f"masking is inert for this teacher: every r up to {reach:g} loses less than "
            f"{100 * INERT_LOST:g} point"
        )
    widest = max((_lost(full, point)[1] for point in curve[1:]), default=0.0)
    if widest > settings.most_lost:
        notes.append(
            f"{len(full.scores)} questions tell losses to +-{100 * widest:.1f} points only, and r_max "
            f"hangs on {100 * settings.most_lost:g}: raise gate.samples"
        )
    return tuple(notes)


def _measure(ratio: float, answer: Answer) -> Point:
    started = time.monotonic()
    answered, sparsity = answer(ratio)
    scores = tuple(map(float, _first(list(answered))))
    if not scores or not all(0 <= score <= 1 for score in scores):
        raise TrainingError(
            f"gate at r = {ratio:g}: {len(scores)} scores; at least one, all in [0, 1], wanted"
        )
    return Point(ratio, scores, sparsity, _first(time.monotonic() - started))


def _first(value: Any) -> Any:
    """The first process's value, on all of them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def _is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _known(record: Path, identity: Mapping[str, Any]) -> dict[float, Point]:
    found = _first(files.read_json(record) if record.exists() and _is_first() else None)
    if found is None:
        return {}
    if found["identity"] != identity:
        other = sorted(
            k for k in {*found["identity"], *identity} if found["identity"].get(k) != identity.get(k)
        )
        raise StateError(f"{record}: measured with other {', '.join(other)}; delete it to measure again")
    points = [Point(p["ratio"], tuple(p["scores"]), p["sparsity"], p["seconds"]) for p in found["points"]]
    return {point.ratio: point for point in points}


def _write(record: Path, identity: Mapping[str, Any], points: Mapping[float, Point]) -> None:
    if _is_first():
        ordered = [asdict(points[ratio]) for ratio in sorted(points)]
        files.write_json(record, {"identity": dict(identity), "points": ordered})


# --- the phases --------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A teacher at a mask ratio, and how many questions it has. `ALL_TEACHERS`: all of them at once."""

    name: str
    teacher: int
    ratio: float
    questions: int


def ratios(mask: Mask | None, r_max: float) -> tuple[float, ...]:
    """The ratios of one teacher's stages: Eq. 3 down to 0, or r_max alone where it is never restored."""
    if mask is None or r_max == 0:
        return (0.0,)
    if not mask.restore:
        return (r_max,)
    step = mask.step or r_max / (mask.stages_at(r_max) - 1)
    return masking.schedule(r_max, step)


def phases(
    teachers: Sequence[Teacher], r_max: Sequence[float], questions: int, *, together: bool = False
) -> list[Phase]:
    """Teachers in growth order, each with its share of the questions, split equally over its stages (Eq. 3).

    `r_max` is the gate's for each teacher. Every question is in one phase. `together`: all teachers act on
    all questions, each fixed at its own r_max, in one phase. Raises TrainingError where a stage would have
    no question.
    """
    if together:
        return [Phase("all teachers", ALL_TEACHERS, 0.0, questions)]
    whole = sum(teacher.share for teacher in teachers)
    found, start, shares = [], 0, 0.0
    for number, (teacher, largest) in enumerate(zip(teachers, r_max, strict=True)):
        shares += teacher.share
        end = math.floor(questions * shares / whole + 0.5)
        stages = ratios(teacher.mask, largest)
        if end - start < len(stages):
            raise TrainingError(
                f"{teacher.checkpoint}: {end - start} of {questions} questions for {len(stages)} stages; "
                "give more questions, a larger share or fewer stages"
            )
        for stage, ratio in enumerate(stages):
            first, last = ((end - start) * s // len(stages) for s in (stage, stage + 1))
            short = Path(teacher.checkpoint).name
            found.append(Phase(f"{number + 1} {short} r {ratio:g}", number, ratio, last - first))
        start = end
    return found

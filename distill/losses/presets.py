"""The objective's presets by name: Masters, and the neighbours that it is compared with.

In: a name. Out: an `Objective`, and what the recipe must say beside it. Not here: formulas.
Each neighbour is the same loop with other switches; what it cannot express is said in `wants`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from distill.losses.objective import Objective
from runtime.errors import InputError


@dataclass(frozen=True)
class Preset:
    """Switches with a name. `restore`: the teacher's mask goes back to 0 in stages (Masters), or stays
    (PrUE), or there is none. `teachers`: how many act at once, and how their losses are weighed:
    `fixed` by the recipe, by `accuracy`, or `drop`ped at random. `wants`: what else the recipe sets."""

    objective: Objective
    source: str
    restore: Literal["stages", "never", "unmasked"] = "unmasked"
    teachers: Literal["one", "fixed", "accuracy", "drop"] = "one"
    wants: str = ""


KD = Objective(rl=0.0, kl_beta=0.0, distill_weight=0.0, gate=False, negatives="full")
"""Plain distillation: the divergence alone."""

PRESETS: dict[str, Preset] = {
    "robust": Preset(Objective.robust(), "METHOD 5; arXiv 2512.22238", restore="stages"),
    "paper": Preset(Objective.paper(), "arXiv 2512.22238, Eq. 1-11", restore="stages"),
    "kd_forward": Preset(
        replace(KD, divergence_kind="forward_kl"), "Hinton et al. 2015, arXiv 1503.02531",
        wants="pool.student_responses: 0 for the classic form",
    ),
    "kd_reverse": Preset(
        replace(KD, divergence_kind="reverse_kl"), "MiniLLM, arXiv 2306.08543",
        wants="pool.teacher_responses: 0: the expectation is over the student's own responses",
    ),
    "distillm": Preset(
        replace(KD, divergence_kind="skew_kl", alpha=0.1), "DistiLLM, arXiv 2402.03898",
        wants="both halves of the pool; its adaptive share of student responses is a fixed one here",
    ),
    "distillm_reverse": Preset(
        replace(KD, divergence_kind="skew_rkl", alpha=0.1), "DistiLLM, arXiv 2402.03898",
        wants="as distillm",
    ),
    "gkd": Preset(
        replace(KD, divergence_kind="gjsd", alpha=0.5), "GKD, arXiv 2306.13649",
        wants="student responses' share is GKD's lambda; student_refresh: stage; alpha is its beta",
    ),
    "advdistill": Preset(
        replace(KD, divergence=0.0, likelihood=1.0, std_floor=1e-4), "AdvDistill, arXiv 2507.00054",
        wants="pool.teacher_responses: 8, student_responses: 0",
    ),
    "prue": Preset(
        replace(KD, divergence_kind="forward_kl"), "PrUE, arXiv 2207.00586", restore="never",
        wants="mask: {r_max: R, stages: 1, restore: false}",
    ),
    "mt_kd": Preset(
        replace(KD, divergence_kind="forward_kl"), "MT-BERT, arXiv 2106.01023; MTKD-RL, arXiv 2502.18510",
        teachers="accuracy",
        wants="several teachers at once; `weight` for fixed weights",
    ),
    "dgkd": Preset(
        replace(KD, divergence_kind="forward_kl"), "DGKD, arXiv 2009.08825", teachers="drop",
        wants="several teachers at once and drop, the probability that a teacher is left out of a step",
    ),
}  # fmt: skip


def objective(name: str, change: dict[str, Any] | None = None) -> Objective:
    """A preset's switches with some changed. Raises InputError with the nearest known name or switch."""
    if name not in PRESETS:
        raise InputError(f"objective.preset: {name!r} is unknown; {_near(name, list(PRESETS))}")
    known = [field.name for field in fields(Objective)]
    for key in change or {}:
        if key not in known:
            raise InputError(f"objective.change: {key!r} is unknown; {_near(key, known)}")
    try:
        return replace(PRESETS[name].objective, **(change or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"objective.change: {error}") from error


def _near(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"

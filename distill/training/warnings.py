"""Signs of failure that the method's authors and ours have met, read from a training log (METHOD 8).

In: the log of `loop.fit`. Out: signs with advice. Not here: what to do about them.

Every sign is a pure function of the log. A log entry is one step: `loss`, `grad_norm`, and for the pool
`divergence`, `r_acc`, `r_distill` (means over the step's responses, weighted by count), `zero_variance`
(share of questions without reward variance), `grad_share_*`, `rl_weight` (the switch).
"""

from __future__ import annotations

import itertools
import warnings as python_warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

Log = Sequence[dict[str, float]]
WINDOW = 40
"""Steps over which a sign is looked for."""


@dataclass(frozen=True)
class Sign:
    """One sign: which, at which step, what was seen, what to try."""

    name: str
    step: int
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.seen}; {self.advice}"


class TrainingWarning(UserWarning):
    """A sign of failure during training."""


def emit(sign: Sign) -> None:
    """As a Python warning."""
    python_warnings.warn(str(sign), TrainingWarning, stacklevel=2)


def column(log: Log, name: str) -> list[float]:
    return [entry[name] for entry in log if name in entry]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def oscillation(log: Log) -> Sign | None:
    """The loss swings: most steps turn back on the one before by more than a third of the window's own
    level, and the second half is no lower than the first (R_distill's scale, the learning rate)."""
    values = column(log, "divergence")[-WINDOW:] or column(log, "loss")[-WINDOW:]
    if len(values) < WINDOW:
        return None
    level = mean([abs(value) for value in values])
    steps = [after - before for before, after in itertools.pairwise(values)]
    turns = [a * b < 0 and min(abs(a), abs(b)) > level / 3 for a, b in itertools.pairwise(steps)]
    falling = mean(values[WINDOW // 2 :]) < 0.9 * mean(values[: WINDOW // 2])
    if falling or mean([float(turn) for turn in turns]) < 0.5:
        return None
    return Sign(
        "oscillation",
        int(log[-1]["step"]),
        f"the divergence swings by more than a third of its mean ({level:.3g} nats) and does not fall",
        "lower `train.lr`, or `objective.change.distill_weight`",
    )


def collapse(log: Log) -> Sign | None:
    """The student leaves where it began or the teacher: the divergence rises by half while its answers, as
    the judge sees them, do not change as much: better answers then are the judge's taste."""
    if len(log) < 2 * WINDOW:
        return None
    now, before = log[-WINDOW:], log[-2 * WINDOW : -WINDOW]
    divergence = [mean(column(part, "divergence") or [0.0]) for part in (before, now)]
    right = [mean(column(part, "r_acc") or [0.0]) for part in (before, now)]
    reached = _same_phase(log[-2 * WINDOW :])
    if reached and divergence[1] > 1.5 * divergence[0] > 0:
        gaming = right[1] > right[0] + 0.02
        seen = f"the divergence rose from {divergence[0]:.3g} to {divergence[1]:.3g} nats"
        if gaming:
            return Sign(
                "reward gaming",
                int(log[-1]["step"]),
                f"{seen} while R_acc rose from {right[0]:.2f} to {right[1]:.2f}",
                "audit the judge (`pocketvlm judge-audit`), and raise `objective.change.kl_beta`",
            )
        return Sign(
            "collapse",
            int(log[-1]["step"]),
            seen,
            "lower `train.lr`, raise `objective.change.divergence` or `kl_beta`",
        )
    return None


def _same_phase(log: Log) -> bool:
    """Whether teacher and mask stayed the same: where they change, the divergence may jump."""
    return len({(entry.get("mask_ratio"), entry.get("phase")) for entry in log}) == 1


def _has_rl(log: Log) -> bool:
    """Whether the objective has an RL term at all."""
    return log[-1].get("rl_weight", 1.0) != 0


def no_gain(log: Log) -> Sign | None:
    """RL has nothing to learn from: hardly a question has responses of different reward, or none is right."""
    window = log[-WINDOW:]
    flat, right = column(window, "zero_variance"), column(window, "r_acc")
    if not _has_rl(log) or len(flat) < WINDOW:
        return None
    if mean(right) < 0.02:
        return Sign(
            "sparse reward",
            int(log[-1]["step"]),
            f"R_acc is {mean(right):.3f}: hardly a response is right",
            "check the scorer and the labels (`pocketvlm judge-audit`), warm the student up on labels, or "
            "take more responses from the teacher",
        )
    if mean(flat) > 0.9:
        return Sign(
            "no variance",
            int(log[-1]["step"]),
            f"{mean(flat):.0%} of the questions have responses of one reward only: no signal for RL",
            "take more student responses (`pool.student_responses`), harder questions, or set "
            "`objective.change.rl: 0` and save the judge",
        )
    return None


def plain_distillation(log: Log) -> Sign | None:
    """RL is switched on, but its gradient is hardly there: the preset has become plain distillation."""
    shares = column(log, "grad_share_rl")[-5:]
    if not _has_rl(log) or len(shares) < 3 or mean(shares) >= 0.05:
        return None
    return Sign(
        "plain distillation",
        int(log[-1]["step"]),
        f"the RL term has {mean(shares):.1%} of the gradient: this run is plain distillation",
        "raise `objective.change.rl`, lower `divergence`, or compare with `rl: 0` and drop RL",
    )


SIGNS = (oscillation, collapse, no_gain, plain_distillation)


def signs(log: Log) -> list[Sign]:
    """Every sign that the end of a log shows."""
    return [sign for look in SIGNS if (sign := look(log)) is not None]


@dataclass
class Watch:
    """Gives every kind of sign again only after `quiet` steps."""

    quiet: int = 10 * WINDOW
    _last: dict[str, int] = field(default_factory=dict)

    def new(self, log: Log) -> list[Sign]:
        found = []
        for sign in signs(log):
            if sign.step - self._last.get(sign.name, -self.quiet) >= self.quiet:
                self._last[sign.name] = sign.step
                found.append(sign)
        return found

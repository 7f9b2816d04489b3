"""Has something become worse? Tests of one quantity measured before and after.

In: scores of the same questions, or timings of two sets of fresh processes. Out: `Change`.
Not here: which quantities are compared and how many tests that is (`evals/ship/ship_compare.py`). numpy only.

A question's score is paired with itself, and questions about one image count as one unit. A timing's unit is
the process, not the repeat: repeats inside a process share its memory layout, clock and neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from evals import paired, stats
from evals.agreement import numbered
from evals.stats import FloatArray, Interval

POWER = 0.90
LEVEL = 0.025
"""One-sided level at which `detectable` is told; a comparison's own level is at most this."""
LEAST_ROUNDS = 3
"""Processes a side from which their spread can be told; with fewer a timing is not tested."""
FLOOR = 0.001
"""Relative standard error below which no timing is believed: clock, page size, an unlucky address."""
DRAWS, MOST_KINDS = 20_000, 200
NORMAL = NormalDist()


@dataclass(frozen=True)
class Change:
    """New minus old, in shares of right answers or as a logarithm of the ratio.

    `low`, `high`: 95 % interval of this change alone. `p_up`, `p_down`: one-sided, of no rise and of no fall.
    `detectable`: the true change that data with this spread show in 90 % of cases, tested alone.
    `units`: what is independent, images or processes.
    """

    estimate: float
    low: float
    high: float
    p_up: float
    p_down: float
    detectable: float
    units: int


# --- scores -----------------------------------------------------------


def scores(
    old: Sequence[float], new: Sequence[float], groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Change:
    """Scores (0..1) of the same questions; `groups` names each question's image.

    The test flips the signs of whole images' differences, which without a change are symmetric about 0. When
    all differences are of one size this is McNemar's exact test; otherwise it counts 20,000 random flips.
    Raises ValueError on unequal lengths or no question.
    """
    interval = stats.paired_interval(old, new, groups=groups, seed=seed)
    difference = np.asarray(new, np.float64) - np.asarray(old, np.float64)
    keys = numbered(groups) if groups is not None else np.arange(len(difference))
    sums = np.bincount(keys, weights=difference).astype(np.float64)
    sums = sums[np.abs(sums) > 1e-12]
    spread = math.sqrt(float((sums**2).sum())) / len(difference)
    # fewer flips than this, all in one direction, are no evidence
    fewest = math.ceil(-math.log2(LEVEL)) / len(difference)
    return Change(
        estimate=float(difference.mean()),
        low=interval.low,
        high=interval.high,
        p_up=_flip_tail(sums, seed),
        p_down=_flip_tail(-sums, seed),
        detectable=max(fewest, (NORMAL.inv_cdf(1 - LEVEL) + NORMAL.inv_cdf(POWER)) * spread),
        units=int(keys.max()) + 1,
    )


def _flip_tail(differences: FloatArray, seed: int) -> float:
    """P(sum of randomly signed differences >= the observed sum)."""
    if len(differences) == 0:
        return 1.0
    sizes, counts = np.unique(np.round(np.abs(differences), 9), return_counts=True)
    if len(sizes) == 1:
        return stats.binomial_tail(int((differences > 0).sum()), len(differences))
    observed = float(differences.sum())
    if len(sizes) > MOST_KINDS:  # then they are many, and their sum is normal
        return 0.5 * math.erfc(observed / math.sqrt(2 * float((differences**2).sum())))
    draws = np.random.default_rng(seed).binomial(counts, 0.5, (DRAWS, len(counts)))
    sums = (2 * draws - counts) @ sizes
    return float(1 + (sums >= observed - 1e-9).sum()) / (DRAWS + 1)


# --- timings ----------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its variance, the degrees of freedom behind that variance, and how many values it is of."""

    mean: float
    variance: float
    freedom: float
    units: int

    def __sub__(self, other: Estimate) -> Estimate:
        """Difference of independent estimates; degrees of freedom by Welch and Satterthwaite."""
        variance = self.variance + other.variance
        parts = sum(x.variance**2 / x.freedom for x in (self, other) if x.variance > 0)
        freedom = variance**2 / parts if parts else self.freedom + other.freedom
        return Estimate(self.mean - other.mean, variance, freedom, min(self.units, other.units))


def of_rounds(rounds: Sequence[Sequence[float]], q: float = 50) -> Estimate:
    """The logarithm of each process's percentile `q`, averaged. Raises ValueError on fewer than LEAST_ROUNDS
    processes, an empty one, or a value that is not above 0."""
    if len(rounds) < LEAST_ROUNDS:
        raise ValueError(f"of_rounds: {len(rounds)} processes; wanted at least {LEAST_ROUNDS}")
    values = np.asarray([stats.percentile(one, q) for one in rounds])
    if not (values > 0).all():
        raise ValueError(f"of_rounds: a process's percentile is {values.min()}; wanted > 0")
    logs = np.log(values)
    return Estimate(float(logs.mean()), float(logs.var(ddof=1)) / len(logs), float(len(logs) - 1), len(logs))


def ratio(old: Estimate, new: Estimate, control: Estimate | None = None) -> Change:
    """log(new / old) by Welch's t test over processes.

    `control` is the same difference (new minus old) of something that did not change: what the machine did
    in between is then subtracted, and its uncertainty added.
    """
    found = new - old
    if control is not None:
        found = found - control
    freedom = max(1, math.floor(found.freedom))
    error = math.sqrt(found.variance + FLOOR**2)
    half = paired.t_quantile(0.975, freedom) * error
    up = _t_tail(found.mean / error, freedom)
    needed = paired.t_quantile(1 - LEVEL, freedom) + paired.t_quantile(POWER, freedom)
    return Change(
        estimate=found.mean,
        low=found.mean - half,
        high=found.mean + half,
        p_up=up,
        p_down=1 - up,
        detectable=needed * error,
        units=found.units,
    )


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The average of independent estimates, for several controls. Raises ValueError on none."""
    if not estimates:
        raise ValueError("mean_of: no estimates")
    count = len(estimates)
    variance = sum(each.variance for each in estimates) / count**2
    parts = sum((e.variance / count**2) ** 2 / e.freedom for e in estimates if e.variance > 0)
    freedom = variance**2 / parts if parts else sum(e.freedom for e in estimates)
    mean = sum(e.mean for e in estimates) / count
    return Estimate(mean, variance, freedom, min(e.units for e in estimates))


def _t_tail(value: float, freedom: int) -> float:
    """P(T >= value)."""
    below = paired.t_cdf(abs(value), freedom)
    return 1 - below if value > 0 else below


# --- several at once --------------------------------------------------


def interval_percent(change: Change) -> Interval:
    """The interval of a log ratio as a relative change: 0.05 is 5 % more."""
    return Interval(math.expm1(change.low), math.expm1(change.high))

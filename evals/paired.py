"""Comparisons of two methods over seeds: one difference a seed, few seeds.

In: a value of both methods for every seed. Out: the mean difference with Student's t interval, an exact
permutation test, what difference the seeds could have shown. Not here: questions within one run
(`evals/stats.py`), drawing (`evals/charts.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, POWER = 0.95, 0.80
MOST_EXACT = 16
"""Seeds up to which all 2^n sign flips are counted; above, the t test alone speaks."""


@dataclass(frozen=True)
class Paired:
    """Candidate minus reference, in the values' own unit.

    `p` is the exact sign-flip test's, None above MOST_EXACT seeds; `detectable` the smallest true difference
    that these seeds would show in 80 % of such experiments. One seed has neither interval nor test.
    """

    seeds: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    detectable: float | None
    better: int
    worse: int

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0, or there is none: the difference may be luck of the seeds."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def compare(reference: Sequence[float], candidate: Sequence[float]) -> Paired:
    """Pairs in the order of seeds. Raises ValueError on unequal lengths or no pair."""
    if len(reference) != len(candidate) or not reference:
        raise ValueError(
            f"paired: {len(reference)} reference and {len(candidate)} candidate values; wanted as many, "
            "at least one"
        )
    differences = np.asarray(candidate, np.float64) - np.asarray(reference, np.float64)
    count, mean = len(differences), float(differences.mean())
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if count == 1:
        return Paired(1, mean, None, None, None, None, None, better, worse)
    sd = float(differences.std(ddof=1))
    half = t_quantile((1 + LEVEL) / 2, count - 1) * sd / math.sqrt(count)
    return Paired(
        seeds=count,
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        p=sign_flip(differences.tolist()) if count <= MOST_EXACT else None,
        detectable=detectable(sd, count),
        better=better,
        worse=worse,
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided exact p-value: the share of all 2^n choices of signs whose mean is at least as far from 0.

    With n pairs it is never below 2 / 2^n: three seeds cannot go below 0.25.
    """
    values = np.asarray(differences, np.float64)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    sums = np.abs(signs @ values)
    observed = abs(float(values.sum()))
    return float((sums >= observed - 1e-12 * max(1.0, observed)).mean())


def detectable(sd: float, count: int) -> float:
    """The difference that `count` pairs with this spread show with 80 % power at the 5 % level:
    (t_0.975 + t_0.8) * sd / sqrt(n), the usual approximation of the noncentral t."""
    freedom = count - 1
    return (t_quantile((1 + LEVEL) / 2, freedom) + t_quantile(POWER, freedom)) * sd / math.sqrt(count)


@functools.cache
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with `freedom` degrees, for 0.5 <= probability < 1, by bisection."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"t_quantile: probability {probability}, freedom {freedom}")
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(value: float, freedom: int) -> float:
    """P(T <= value), value >= 0, by the finite series for whole degrees of freedom (Abramowitz and Stegun
    26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(freedom))
    cos2 = math.cos(angle) ** 2
    odd = freedom % 2 == 1
    term = total = (math.cos(angle) if freedom > 1 else 0.0) if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    return 0.5 + ((angle + inside) / math.pi if odd else inside / 2)

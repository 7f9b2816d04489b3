"""Small statistics for measurements, in numpy and the standard library.

In: counts, 0/1 outcomes, timings. Out: intervals, p-values, percentiles, flips, ratios.
Not here: scoring an answer (`evals/scorers.py`), running a model (`evals/accuracy.py`, `bench/latency.py`).
Every interval is two-sided at 95 % unless `z` or `level` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A closed range; the unit is the estimate's own."""

    low: float
    high: float


@dataclass(frozen=True)
class Flips:
    """What changed between two runs over the same `n` questions, by direction."""

    n: int
    right_to_wrong: int
    wrong_to_right: int
    both_right: int

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus accuracy of the reference, as a share."""
        return (self.wrong_to_right - self.right_to_wrong) / self.n if self.n else 0.0


def wilson(right: int, n: int, z: float = Z_95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927). n = 0 gives the whole range [0, 1].

    Raises ValueError when right is not in 0..n.
    """
    if not 0 <= right <= n:
        raise ValueError(f"wilson: right={right}, n={n}; wanted 0 <= right <= n")
    if n == 0:
        return Interval(0.0, 1.0)
    share = right / n
    denominator = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly the share; rounding must not push it past.
    low = 0.0 if right == 0 else max(0.0, min(centre - half, share))
    high = 1.0 if right == n else min(1.0, max(centre + half, share))
    return Interval(low, high)


def mcnemar_exact(right_to_wrong: int, wrong_to_right: int) -> float:
    """Two-sided exact McNemar p-value: the discordant pairs against a fair coin. No pairs gives 1.

    Computed in integers, so it is exact for any count.
    """
    if right_to_wrong < 0 or wrong_to_right < 0:
        raise ValueError(f"mcnemar_exact: negative count in ({right_to_wrong}, {wrong_to_right})")
    pairs, smaller = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    term, tail = 1, 1
    for i in range(smaller):
        term = term * (pairs - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**pairs)


def binomial_tail(least: int, n: int) -> float:
    """P(X >= least) for n throws of a fair coin: McNemar's exact test in one direction."""
    if least <= 0:
        return 1.0
    if least > n:
        return 0.0
    whole = math.lgamma(n + 1) - n * math.log(2)
    terms = (math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(least, n + 1))
    return min(1.0, math.fsum(terms))


def flips(reference_right: Sequence[bool], candidate_right: Sequence[bool]) -> Flips:
    """Count flips between two aligned sequences of outcomes. Raises ValueError on unequal lengths."""
    if len(reference_right) != len(candidate_right):
        raise ValueError(
            f"flips: {len(reference_right)} reference and {len(candidate_right)} candidate items"
        )
    reference, candidate = np.asarray(reference_right, bool), np.asarray(candidate_right, bool)
    return Flips(
        n=len(reference),
        right_to_wrong=int((reference & ~candidate).sum()),
        wrong_to_right=int((~reference & candidate).sum()),
        both_right=int((reference & candidate).sum()),
    )


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between order statistics. Raises ValueError when empty."""
    if len(values) == 0:
        raise ValueError("percentile: no values")
    return float(np.percentile(np.asarray(values, np.float64), q))


def bootstrap_difference(
    reference: Sequence[float],
    candidate: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 4000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of mean(candidate - reference) over pairs.

    `groups` names the cluster of each pair (questions about one image are not independent): whole
    clusters are then resampled. Raises ValueError on unequal lengths or no pairs.
    """
    difference = _paired_difference(reference, candidate)
    if groups is None:
        keys = np.arange(len(difference))
    elif len(groups) != len(difference):
        raise ValueError(f"bootstrap_difference: {len(groups)} groups for {len(difference)} pairs")
    else:
        index: dict[Hashable, int] = {}
        keys = np.asarray([index.setdefault(group, len(index)) for group in groups])
    sums = np.bincount(keys, weights=difference)
    sizes = np.bincount(keys).astype(np.float64)
    # Clusters with the same (sum, size) are interchangeable: draw how often each kind occurs. This has
    # exactly the bootstrap's distribution and costs resamples x kinds instead of resamples x pairs.
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(int(counts.sum()), counts / counts.sum(), size=resamples)
    means = (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    return _central(means, level)


def paired_interval(
    reference: Sequence[float],
    candidate: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Interval:
    """`bootstrap_difference`, except where no pair differs: a bootstrap of nothing has no width, so the bound
    is what n groups without a flip exclude (Wilson, 0 of n), in both directions."""
    if len(reference) and list(reference) == list(candidate):
        bound = wilson(0, len(set(groups)) if groups is not None else len(reference)).high
        return Interval(-bound, bound)
    return bootstrap_difference(reference, candidate, groups=groups, seed=seed)


def bootstrap_ratio(
    reference_rounds: Sequence[Sequence[float]],
    candidate_rounds: Sequence[Sequence[float]],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, Interval]:
    """Ratio of pooled medians candidate / reference, with an interval, from interleaved rounds.

    Round i of both was measured side by side, so rounds are resampled in pairs first (what drifts
    between rounds), then the repeats inside each round (what jitters within one).
    Raises ValueError when the round counts differ, a round is empty or the reference's median is 0.
    """
    if len(reference_rounds) != len(candidate_rounds) or not reference_rounds:
        raise ValueError(f"bootstrap_ratio: {len(reference_rounds)} and {len(candidate_rounds)} rounds")
    if any(len(one) == 0 for one in (*reference_rounds, *candidate_rounds)):
        raise ValueError("bootstrap_ratio: a round without values")
    references = [np.asarray(one, np.float64) for one in reference_rounds]
    candidates = [np.asarray(one, np.float64) for one in candidate_rounds]
    base = float(np.median(np.concatenate(references)))
    if base <= 0:
        raise ValueError(f"bootstrap_ratio: the reference's median is {base}; wanted > 0")
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(0, len(references), len(references))
        top = np.concatenate([rng.choice(candidates[k], len(candidates[k])) for k in chosen])
        bottom = np.concatenate([rng.choice(references[k], len(references[k])) for k in chosen])
        ratios[i] = np.median(top) / np.median(bottom)
    return float(np.median(np.concatenate(candidates))) / base, _central(ratios, level)


def _paired_difference(reference: Sequence[float], candidate: Sequence[float]) -> FloatArray:
    if len(reference) != len(candidate) or len(reference) == 0:
        raise ValueError(
            f"bootstrap_difference: {len(reference)} reference and {len(candidate)} candidate values; "
            "wanted the same number, at least one"
        )
    return np.asarray(candidate, np.float64) - np.asarray(reference, np.float64)


def _central(values: FloatArray, level: float) -> Interval:
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(low), float(high))

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import stats


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_values(right: int, n: int, low: float, high: float) -> None:
    found = stats.wilson(right, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 20_000), st.floats(0, 1))
def test_wilson_bounds_solve_its_equation(n: int, share: float) -> None:
    right = round(share * n)
    found = stats.wilson(right, n)
    assert 0 <= found.low <= right / n <= found.high <= 1
    for bound in (found.low, found.high):
        if 0 < bound < 1:
            distance = abs(right / n - bound)
            assert distance == pytest.approx(stats.Z_95 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_wilson_refuses_impossible_counts_and_knows_nothing_about_nothing() -> None:
    with pytest.raises(ValueError, match="right=3, n=2"):
        stats.wilson(3, 2)
    assert stats.wilson(0, 0) == stats.Interval(0.0, 1.0)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (1, 9, 2 * 11 / 1024), (2, 8, 2 * 56 / 1024), (0, 1, 1.0)],
)
def test_mcnemar_by_hand(lost: int, gained: int, p: float) -> None:
    assert stats.mcnemar_exact(lost, gained) == pytest.approx(p, rel=1e-12)
    assert stats.mcnemar_exact(gained, lost) == stats.mcnemar_exact(lost, gained)


def test_mcnemar_of_many_pairs_is_the_normal_limit_and_does_not_overflow() -> None:
    z = (abs(5200 - 5000) - 1) / math.sqrt(10_200)
    assert stats.mcnemar_exact(5000, 5200) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=50))
def test_flips_count_every_pair_once(pairs: list[tuple[bool, bool]]) -> None:
    found = stats.flips([a for a, _ in pairs], [b for _, b in pairs])
    both_wrong = sum(not a and not b for a, b in pairs)
    assert (
        found.both_right + found.right_to_wrong + found.wrong_to_right + both_wrong == found.n == len(pairs)
    )
    accuracy = [sum(one) / len(pairs) if pairs else 0.0 for one in zip(*pairs, strict=True)] or [0.0, 0.0]
    assert found.difference == pytest.approx(accuracy[1] - accuracy[0])


def test_flips_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="1 reference and 2 candidate"):
        stats.flips([True], [True, False])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_interpolates_between_order_statistics(values: list[float], q: float) -> None:
    ordered = sorted(values)
    place = q / 100 * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    assert stats.percentile(values, q) == pytest.approx(below + (above - below) * (place % 1), abs=1e-6)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        stats.percentile([], 50)


def test_bootstrap_difference_is_the_normal_interval_for_many_pairs() -> None:
    rng = np.random.default_rng(3)
    reference, candidate = rng.random(4000) < 0.9, rng.random(4000) < 0.93
    difference = candidate.astype(float) - reference.astype(float)
    found = stats.bootstrap_difference(reference.tolist(), candidate.tolist())
    half = stats.Z_95 * difference.std() / math.sqrt(4000)
    wanted = (difference.mean() - half, difference.mean() + half)
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.06 * half)


def test_bootstrap_of_whole_clusters_is_wider_when_members_agree() -> None:
    rng = np.random.default_rng(4)
    candidate = np.repeat(rng.random(500) < 0.8, 5).astype(float).tolist()
    reference = [0.5] * 2500
    alone = stats.bootstrap_difference(reference, candidate)
    together = stats.bootstrap_difference(reference, candidate, groups=[i // 5 for i in range(2500)])
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(5), rel=0.08)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_bootstrap_of_a_constant_difference_has_no_width(values: list[float]) -> None:
    found = stats.bootstrap_difference(values, values, resamples=50)
    assert (found.low, found.high) == (0.0, 0.0)


def test_bootstrap_is_the_same_for_the_same_seed_and_refuses_bad_input() -> None:
    reference, candidate = [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]
    first = stats.bootstrap_difference(reference, candidate, seed=5)
    assert first == stats.bootstrap_difference(reference, candidate, seed=5)
    with pytest.raises(ValueError, match="at least one"):
        stats.bootstrap_difference([], [])
    with pytest.raises(ValueError, match="1 groups for 4 pairs"):
        stats.bootstrap_difference(reference, candidate, groups=["a"])


def test_ratio_of_interleaved_rounds_cancels_a_drift_that_both_share() -> None:
    rng = np.random.default_rng(6)
    drift = (1.0, 1.6, 1.2, 1.4)
    reference = [(scale * rng.normal(10, 0.1, 30)).tolist() for scale in drift]
    candidate = [(scale * rng.normal(5, 0.05, 30)).tolist() for scale in drift]
    ratio, interval = stats.bootstrap_ratio(reference, candidate)
    assert ratio == pytest.approx(0.5, abs=0.02)
    assert interval.low <= 0.5 <= interval.high
    assert interval.high - interval.low < 0.1  # the drift alone would give about +-30 %


def test_ratio_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="1 and 2 rounds"):
        stats.bootstrap_ratio([[1.0]], [[1.0], [1.0]])
    with pytest.raises(ValueError, match="without values"):
        stats.bootstrap_ratio([[1.0]], [[]])
    with pytest.raises(ValueError, match="median is 0"):
        stats.bootstrap_ratio([[0.0]], [[1.0]])

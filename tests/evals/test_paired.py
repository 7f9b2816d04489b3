"""Statistics over seeds against tables, against each other, and where there is little to go on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evals import paired


@pytest.mark.parametrize(
    ("freedom", "upper", "eighty"),
    [(1, 12.706205, 1.376382), (2, 4.302653, 1.060660), (3, 3.182446, 0.978472), (7, 2.364624, 0.896030),
     (8, 2.306004, 0.888890), (30, 2.042272, 0.853767)],
)  # fmt: skip
def test_quantiles_are_the_tables(freedom: int, upper: float, eighty: float) -> None:
    assert paired.t_quantile(0.975, freedom) == pytest.approx(upper, abs=1e-5)
    assert paired.t_quantile(0.8, freedom) == pytest.approx(eighty, abs=1e-5)


def test_an_interval_by_hand() -> None:
    found = paired.compare([0.70, 0.72, 0.74, 0.70], [0.72, 0.73, 0.77, 0.72])
    assert found.mean == pytest.approx(0.02)
    assert found.sd == pytest.approx(math.sqrt(2e-4 / 3))
    half = 3.182446 * math.sqrt(2e-4 / 3) / 2
    assert (found.low, found.high) == (pytest.approx(0.02 - half), pytest.approx(0.02 + half))
    assert found.detectable == pytest.approx((3.182446 + 0.978472) * math.sqrt(2e-4 / 3) / 2, rel=1e-5)
    assert (found.better, found.worse, found.p) == (4, 0, 2 / 16)
    assert not found.is_noise


def test_sign_flips_are_counted_exactly() -> None:
    assert paired.sign_flip([1.0] * 8) == 2 / 256
    assert paired.sign_flip([1.0, 1.0, 1.0]) == 0.25
    assert paired.sign_flip([1.0, -1.0]) == 1.0
    assert paired.sign_flip([3.0, 1.0, -1.0]) == 6 / 8  # |5|, |3|, |3| of 5, 3, 3, 1 and their mirrors
    assert paired.sign_flip([0.1, 0.2, 0.3]) == 0.25  # rounding must not lose the observed one


def test_little_data_is_noise() -> None:
    one = paired.compare([0.5], [0.9])
    assert one.is_noise and one.low is None and one.p is None
    same = paired.compare([0.5, 0.6], [0.5, 0.6])
    assert same.is_noise and same.p == 1.0 and same.detectable == 0.0
    with pytest.raises(ValueError, match="at least one"):
        paired.compare([], [])
    with pytest.raises(ValueError, match="2 reference and 1"):
        paired.compare([1.0, 2.0], [1.0])


def test_intervals_cover_and_the_detectable_difference_is_detected() -> None:
    draw = np.random.default_rng(0)
    effect, covered, shown, many = paired.detectable(1.0, 8), 0, 0, 1500
    for _ in range(many):
        found = paired.compare([0.0] * 8, (effect + draw.normal(0, 1, 8)).tolist())
        assert found.low is not None and found.high is not None
        covered += found.low <= effect <= found.high
        shown += not found.is_noise
    assert 0.935 <= covered / many <= 0.965
    assert 0.76 <= shown / many <= 0.86

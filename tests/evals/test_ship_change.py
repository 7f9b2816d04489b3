"""The tests behind `report --compare`: by hand, by brute force, and how often they are right and wrong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evals import stats
from evals.ship import ship_change
from evals.ship.ship_change import Change, Estimate

Rounds = list[list[float]]


def _pairs(draw: np.random.Generator, loss: float, discordant: float = 0.05) -> tuple[list[float], ...]:
    """Scores of 10,000 questions before and after: `discordant` of them flip, `loss` more down than up."""
    n = 10_000
    kinds = draw.choice(4, n, p=[(discordant + loss) / 2, (discordant - loss) / 2, 0.9 - discordant, 0.1])
    old = np.isin(kinds, (0, 2)).astype(float)
    new = np.isin(kinds, (1, 2)).astype(float)
    return old.tolist(), new.tolist()


def _processes(draw: np.random.Generator, ms: float, count: int = 10, scatter: float = 0.02) -> Rounds:
    """20 repeats in each process: processes scatter, repeats jitter, every twentieth is disturbed."""
    level = ms * np.exp(draw.normal(0, scatter, (count, 1)))
    jitter = np.exp(draw.normal(0, 0.05, (count, 20)))
    disturbed = 1 + (draw.random((count, 20)) < 0.05) * draw.exponential(0.5, (count, 20))
    found: Rounds = (level * jitter * disturbed).tolist()
    return found


def _timing(old: Rounds, new: Rounds) -> Change:
    return ship_change.ratio(ship_change.of_rounds(old), ship_change.of_rounds(new))


# --- scores -----------------------------------------------------------


def test_scores_of_single_images_are_mcnemars() -> None:
    old, new = [1.0] * 9 + [0.0] * 11, [0.0] * 8 + [1.0] * 3 + [0.0] * 9
    found = ship_change.scores(old, new)
    assert found.estimate == pytest.approx((2 - 8) / 20)
    assert 2 * found.p_down == pytest.approx(stats.mcnemar_exact(8, 2), rel=1e-9)
    assert found.p_up == pytest.approx(sum(math.comb(10, k) for k in range(2, 11)) / 1024)
    assert found.units == 20 and found.low < found.estimate < found.high


def test_images_flip_as_a_whole() -> None:
    """Brute force over all signs of the images' sums against what 20,000 draws count."""
    draw = np.random.default_rng(3)
    groups = [i // 3 for i in range(30)]
    old, new = draw.integers(0, 2, 30).astype(float), draw.integers(0, 2, 30).astype(float)
    sums = np.bincount(groups, weights=new - old)
    signs = np.array(list(itertools.product((1, -1), repeat=len(sums))))
    found = ship_change.scores(old.tolist(), new.tolist(), groups)
    assert found.p_up == pytest.approx(float((signs @ sums >= sums.sum() - 1e-9).mean()), abs=0.012)
    assert found.p_down == pytest.approx(float((signs @ sums <= sums.sum() + 1e-9).mean()), abs=0.012)
    assert found.units == 10


def test_many_fractional_scores_are_tested_too() -> None:
    draw = np.random.default_rng(4)
    old = draw.random(600)
    worse = ship_change.scores(old.tolist(), np.clip(old - draw.normal(0.02, 0.1, 600), 0, 1).tolist())
    same = ship_change.scores(old.tolist(), np.clip(old - draw.normal(0.0, 0.1, 600), 0, 1).tolist())
    assert worse.p_down < 0.001 < 0.01 < same.p_down


def test_no_flip_is_no_evidence_and_says_what_could_hide() -> None:
    found = ship_change.scores([1.0, 0.0] * 500, [1.0, 0.0] * 500)
    assert (found.estimate, found.p_up, found.p_down) == (0.0, 1.0, 1.0)
    assert found.high == pytest.approx(stats.wilson(0, 1000).high) and found.low == -found.high
    assert found.detectable == pytest.approx(6 / 1000)  # 6 flips of one direction: 1 in 64
    with pytest.raises(ValueError, match="at least one"):
        ship_change.scores([], [])


def test_a_planted_point_is_found_and_nothing_is_not() -> None:
    """1 point lost among 10,000 questions of which 5 % change sides; tested as one of twelve bundles."""
    draw = np.random.default_rng(5)
    lost = [ship_change.scores(*_pairs(draw, 0.01)) for _ in range(100)]
    assert sum(each.p_down < ship_change.LEVEL / 12 for each in lost) >= 90
    assert float(np.mean([each.detectable for each in lost])) < 0.01
    null = [ship_change.scores(*_pairs(draw, 0.0)) for _ in range(100)]
    assert sum(min(each.p_down, each.p_up) < ship_change.LEVEL for each in null) <= 5


# --- timings ----------------------------------------------------------


def test_a_ratio_by_hand() -> None:
    """Welch: logs 0, 0.1, 0.2 and 0.3, 0.4, 0.5; each variance 0.01 / 3, four degrees of freedom."""
    old, new = [[math.exp(x)] for x in (0.0, 0.1, 0.2)], [[math.exp(x)] for x in (0.3, 0.4, 0.5)]
    found = _timing(old, new)
    error = math.sqrt(0.02 / 3 + ship_change.FLOOR**2)
    assert found.estimate == pytest.approx(0.3)
    assert found.high - found.estimate == pytest.approx(2.776445 * error, rel=1e-5)
    assert found.p_up == pytest.approx(0.0106, abs=1e-4)  # t = 3.67
    assert found.p_down == pytest.approx(1 - found.p_up)
    assert found.units == 3


def test_a_control_takes_the_machine_away() -> None:
    draw = np.random.default_rng(6)
    old, slower = _processes(draw, 10, scatter=0.005), _processes(draw, 11, scatter=0.005)
    control = ship_change.of_rounds(_processes(draw, 55, scatter=0.005)) - ship_change.of_rounds(
        _processes(draw, 50, scatter=0.005)
    )
    assert _timing(old, slower).p_up < 1e-6
    found = ship_change.ratio(ship_change.of_rounds(old), ship_change.of_rounds(slower), control)
    assert found.low < 0 < found.high and found.high - found.low < 0.05


def test_the_mean_of_controls_is_surer_than_one() -> None:
    one = Estimate(0.1, 0.04, 5, 6)
    both = ship_change.mean_of([one, Estimate(0.3, 0.04, 5, 6)])
    assert both == Estimate(0.2, 0.02, 10, 6)
    with pytest.raises(ValueError, match="no estimates"):
        ship_change.mean_of([])


def test_equal_timings_are_not_infinitely_sure() -> None:
    found = _timing([[5.0]] * 3, [[5.01]] * 3)  # 0.2 %, no scatter at all
    assert found.p_up > 0.02
    assert _timing([[5.0]] * 3, [[5.5]] * 3).p_up < 1e-6


@pytest.mark.parametrize("rounds", [[[1.0], [1.0]], [[1.0], [1.0], [0.0]], [[1.0], [1.0], []]])
def test_too_few_or_impossible_processes_are_refused(rounds: Rounds) -> None:
    with pytest.raises(ValueError, match=r"processes; wanted|wanted > 0|no values"):
        ship_change.of_rounds(rounds)


def test_a_planted_slowdown_is_found_and_nothing_is_not() -> None:
    """5 % slower; ten processes a side that scatter by 2 %; tested as one of four metrics."""
    draw = np.random.default_rng(7)
    slow = [_timing(_processes(draw, 10), _processes(draw, 10.5)) for _ in range(200)]
    assert sum(each.p_up < ship_change.LEVEL / 4 for each in slow) >= 180
    null = [_timing(_processes(draw, 10), _processes(draw, 10)) for _ in range(100)]
    assert sum(min(each.p_down, each.p_up) < ship_change.LEVEL for each in null) <= 5


def test_what_is_called_detectable_is_detected() -> None:
    draw = np.random.default_rng(8)
    typical = float(np.median([_timing(_processes(draw, 10, 6), _processes(draw, 10, 6)).detectable
                               for _ in range(60)]))  # fmt: skip
    ms = 10 * math.exp(typical)
    found = [_timing(_processes(draw, 10, 6), _processes(draw, ms, 6)) for _ in range(200)]
    assert 0.8 <= np.mean([each.p_up < ship_change.LEVEL for each in found]) <= 0.97

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from evals.bench import bandwidth, sustained
from evals.bench.bench_results import Sustained
from evals.bench.system import Roots
from runtime.errors import InputError
from tests.evals.test_device import CPU, tree


@dataclass
class Took:
    end_to_end_ms: float
    decode_ms: list[float] = field(default_factory=lambda: [2.0, 2.0])


class Device:
    """Its clock goes on by what an answer takes."""

    def __init__(self, ms: Callable[[float], float], seed: int = 0) -> None:
        self.now, self._ms = 0.0, ms
        self._draw = np.random.default_rng(seed)

    def answer(self) -> Took:
        took = self._ms(self.now) * float(self._draw.lognormal(0, 0.02))
        self.now += took / 1e3
        return Took(took)

    def clock(self) -> float:
        return self.now


def run(
    ms: Callable[[float], float], seconds: float = 60.0, roots: Roots | None = None, seed: int = 0
) -> Sustained:
    device = Device(ms, seed)
    nothing = Roots(Path("/nowhere"), Path("/nowhere"))
    return sustained.run_for(seconds, device.answer, 2, clock=device.clock, roots=roots or nothing)


def test_a_device_that_keeps_its_speed_is_steady() -> None:
    found = run(lambda now: 50.0)
    assert found.throttled is False and found.ratio == pytest.approx(1, abs=0.01)
    assert found.measured_s >= 60 and found.answers == len(found.answer_ms) == len(found.answer_at_s)
    assert sum(window.answers for window in found.windows) == found.answers
    assert [window.start_s for window in found.windows[1:]] == [w.end_s for w in found.windows[:-1]]
    assert found.windows[0].decode_tok_s == 500


def test_a_device_that_slows_down_is_found() -> None:
    found = run(lambda now: 50.0 if now < 20 else 60.0)
    assert found.throttled is True and found.ratio == pytest.approx(1.2, abs=0.02)
    assert found.low is not None and found.low > 1.05 and "slower" in str(found.throttle_evidence)


def test_drift_is_not_seen_where_there_is_none() -> None:
    flagged = sum(bool(run(lambda now: 50.0, seconds=20, seed=seed).throttled) for seed in range(40))
    assert flagged == 0  # the verdict asks for 5 %, noise of 2 % an answer cannot reach it


def test_an_interval_that_holds_the_truth() -> None:
    inside = 0
    for seed in range(100):
        found = run(lambda now: 50.0, seconds=10, seed=seed)
        assert found.low is not None and found.high is not None
        inside += found.low <= 1 <= found.high
    assert inside >= 88  # 95 % nominal; 5 blocks a side, binomial(100, 0.95) is below 88 once in 700


def test_a_short_run_tells_nothing() -> None:
    found = run(lambda now: 500.0, seconds=5)
    assert found.throttled is None and found.ratio is None and "too few" in str(found.throttle_evidence)


def test_counted_throttling_needs_no_statistics(tmp_path: Path) -> None:
    counter = f"{CPU}/cpu0/thermal_throttle/core_throttle_count"
    roots = tree(tmp_path, {counter: "1", "sys/class/thermal/thermal_zone0/temp": "90000"})
    counts = itertools.count(2)

    def slower(now: float) -> float:
        tree(tmp_path, {counter: str(next(counts))})
        return 500.0

    found = run(slower, seconds=5, roots=roots)
    assert found.throttled is True and "throttle events" in str(found.throttle_evidence)
    assert found.windows[0].celsius == 90.0


def test_many_answers_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sustained, "MOST_ANSWERS", 100)
    found = run(lambda now: 50.0)
    assert found.kept_every > 1 and len(found.answer_ms) <= 100
    assert found.answers is not None and abs(len(found.answer_ms) * found.kept_every - found.answers) < 13
    assert found.ratio is not None and sum(window.answers for window in found.windows) == found.answers


def test_what_another_harness_left_out_is_computed() -> None:
    full = run(lambda now: 50.0 if now < 20 else 60.0)
    bare = Sustained(
        asked_s=60, measured_s=full.measured_s, tokens_per_answer=2, answer_at_s=full.answer_at_s,
        answer_ms=full.answer_ms,
    )  # fmt: skip
    found = sustained.completed(bare)
    assert (found.answers, found.throttled) == (full.answers, True)
    assert found.ratio == pytest.approx(full.ratio)
    assert sustained.completed(found) == found


def test_bandwidth_counts_what_every_loop_moves() -> None:
    found = bandwidth.measure(2, seconds=0.0, buffer_bytes=1 << 16, memory_mib=1024)
    assert set(found.loops_gb_s) == set(bandwidth.LOOPS)
    assert found.read_gb_s == max(found.loops_gb_s.values()) == found.loops_gb_s[found.loop]
    assert max(found.samples_gb_s) == found.read_gb_s
    assert len(found.samples_gb_s) == bandwidth.LEAST_REPEATS and found.buffer_bytes == 1 << 16


def test_a_small_machine_gets_a_small_buffer() -> None:
    found = bandwidth.measure(1, seconds=0.0, buffer_bytes=1 << 30, memory_mib=1)
    assert found.buffer_bytes == (1 << 20) // bandwidth.MEMORY_SHARE


@pytest.mark.parametrize(("threads", "size"), [(0, 1 << 16), (3, 8)])
def test_impossible_bandwidth_is_refused(threads: int, size: int) -> None:
    with pytest.raises(InputError, match="bandwidth: got"):
        bandwidth.measure(threads, seconds=0.0, buffer_bytes=size, memory_mib=64)

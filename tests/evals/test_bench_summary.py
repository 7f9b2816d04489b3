from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.bench import bench_notes, bench_summary, ceilings
from evals.bench.bench_conditions import Bandwidth, Disturbance
from evals.bench.bench_results import BenchResults, Roofline, Run, Times
from tests.evals import bench_data

POSITIVE = st.floats(0.001, 1e6)


def runs(*rounds: list[float]) -> list[Run]:
    """One process a round, its times to first text as given."""
    return [Run(round=i, order=i, times=Times(ttft_ms=tuple(values))) for i, values in enumerate(rounds)]


def test_a_spread_by_hand() -> None:
    found = bench_summary.spread([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    assert found is not None
    assert (found.n, found.p50, found.mean, found.least, found.most) == (6, 4.0, 4.0, 1.0, 7.0)
    assert found.p90 is None and found.p99 is None
    # logarithms of the medians 2 and 6: standard error (log 6 - log 2) / 2, t(0.975, 1) = 12.706
    half = 12.7062 * math.log(3) / 2
    assert found.low == pytest.approx(math.sqrt(12) * math.exp(-half), rel=1e-4)
    assert found.high == pytest.approx(math.sqrt(12) * math.exp(half), rel=1e-4)


def test_percentiles_need_enough_values_and_intervals_need_two_processes() -> None:
    found = bench_summary.spread([list(map(float, range(1, 11)))])
    assert found is not None and found.p90 is not None and found.p99 is None
    assert found.low is None and found.high is None
    many = bench_summary.spread([[1.0] * 50, [1.0] * 50])
    assert many is not None and (many.p99, many.low, many.high) == (1.0, 1.0, 1.0)
    assert bench_summary.spread([]) is None


@given(st.lists(st.lists(POSITIVE, min_size=1, max_size=5), min_size=2, max_size=5), st.floats(0.01, 100))
def test_a_spread_scales_with_its_values_and_holds_its_median(rounds: list[list[float]], by: float) -> None:
    one = bench_summary.spread(rounds)
    other = bench_summary.spread([[value * by for value in values] for values in rounds])
    assert one is not None and other is not None
    for field in ("p50", "mean", "least", "most"):
        assert getattr(other, field) == pytest.approx(getattr(one, field) * by)
    assert one.low is not None and one.high is not None
    assert one.low <= one.p50 <= one.high and one.least <= one.p50 <= one.most


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=6))
def test_a_ratio_turned_around_is_its_inverse(pairs: list[tuple[float, float]]) -> None:
    old, new = runs(*[[a] for a, _ in pairs]), runs(*[[b] for _, b in pairs])
    there, back = bench_summary.ratio(old, new, "ttft_ms"), bench_summary.ratio(new, old, "ttft_ms")
    assert there is not None and back is not None
    assert there[0] == pytest.approx(1 / back[0])
    assert there[1:] == pytest.approx((1 / back[2], 1 / back[1]), rel=1e-6)


def test_what_the_machine_did_in_a_round_falls_out_of_a_ratio() -> None:
    drift = [1.0, 1.7, 3.0]
    old, new = runs(*[[10 * d] for d in drift]), runs(*[[11 * d] for d in drift])
    assert bench_summary.ratio(old, new, "ttft_ms") == pytest.approx((1.1, 1.1, 1.1))


def test_an_interval_that_says_nothing_is_finite() -> None:
    found = bench_summary.ratio(runs([1e-9], [1.0]), runs([1e9], [1e-9]), "ttft_ms")
    assert found is not None and all(math.isfinite(value) for value in found)
    spread = bench_summary.spread([[1e-12], [1e12]])
    assert spread is not None and spread.high is not None and math.isfinite(spread.high)


def test_ratios_without_two_sides_are_left_out() -> None:
    assert bench_summary.ratio(runs([1.0]), runs([2.0]), "ttft_ms") == (2.0,)
    assert bench_summary.ratio(runs([1.0]), runs([]), "ttft_ms") is None
    assert bench_summary.ratio(runs([0.0]), runs([1.0]), "ttft_ms") is None
    assert bench_summary.ratio(runs([1.0]), runs([1.0]), "encode_ms") is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Five processes a side that differ by 1 %, ten repeats that scatter by 3 %, a drifting machine."""
    draw, inside = np.random.default_rng(1), 0
    for _ in range(300):
        drift = draw.normal(0, 0.05, 5)
        sides = [
            runs(*[list(np.exp(d + draw.normal(0, 0.01) + draw.exponential(0.03, 10))) for d in drift])
            for _ in range(2)
        ]
        found = bench_summary.ratio(sides[0], sides[1], "ttft_ms")
        assert found is not None
        inside += found[1] <= 1 <= found[2]
    assert inside >= 270  # of 285 expected; fewer happens once in 10,000


def test_a_summary_of_all_of_a_point() -> None:
    (bundle,) = bench_data.results((12.5,)).bundles
    found = bundle.points[0].summary
    assert found is not None and found.ttft_ms is not None
    assert (found.ttft_ms.p50, found.ttft_ms.n) == (12.5, 30)
    assert (found.prefill_tok_s, found.decode_tok_s) == (20 / 0.005, 500)
    assert [(each.context_tokens, each.n) for each in found.decode_by_position] == [
        (21, 30),
        (22, 30),
        (23, 30),
    ]
    assert found.load_warm_ms is not None and found.load_warm_ms.n == 6
    assert found.encode_ms is None and found.peak_rss_mib is None


def test_long_answers_are_listed_in_stretches() -> None:
    results = bench_data.results((1.0,), rounds=1, repeats=1)
    point = results.bundles[0].points[0]
    times = point.runs[0].times.model_copy(update={"decode_ms": (tuple(float(i) for i in range(200)),)})
    point = point.model_copy(update={"runs": (point.runs[0].model_copy(update={"times": times}),)})
    found = bench_summary.summary(point).decode_by_position
    assert len(found) == 50 and sum(each.n for each in found) == 200
    assert (found[0].context_tokens, found[0].p50_ms) == (22, 1.5)


def test_completing_twice_changes_nothing() -> None:
    found = bench_data.results((12.5, 25))
    assert bench_summary.complete(found) == found
    assert [(each.metric, each.ratio) for each in found.ratios if each.metric == "ttft_ms"] == [
        ("ttft_ms", pytest.approx(2.0))
    ]


def bandwidth(gb_s: float) -> Bandwidth:
    return Bandwidth(read_gb_s=gb_s, loop="copy", threads=1, buffer_bytes=1, samples_gb_s=(gb_s,))


def test_the_share_of_bandwidth() -> None:
    line = Roofline(bytes_per_token=10**9, counted="", context_tokens=1, fits_cache=False)
    assert bench_summary.share_of_bandwidth(line, 5.0, bandwidth(10.0)) == 0.5
    inside = line.model_copy(update={"fits_cache": True})
    assert bench_summary.share_of_bandwidth(inside, 5.0, bandwidth(10.0)) is None
    assert bench_summary.share_of_bandwidth(line, 5.0, None) is None


def emulated(results: BenchResults) -> BenchResults:
    bundle = results.bundles[0]
    line = Roofline(bytes_per_token=10**9, counted="", context_tokens=1, fits_cache=False)
    point = bundle.points[0].model_copy(update={"roofline": line})
    update = {"bundles": (bundle.model_copy(update={"points": (point,)}),), "bandwidth": bandwidth(900.0)}
    return results.model_copy(update=update)


def test_emulated_times_are_no_share_of_bandwidth_and_are_told() -> None:
    real = bench_summary.complete(emulated(bench_data.results((1.0,))))
    assert real.bundles[0].points[0].roofline is not None
    assert real.bundles[0].points[0].roofline.share == pytest.approx(500 / 900)
    found = bench_summary.complete(
        emulated(bench_data.results((1.0,), emulated=True, emulated_why="qemu-user, aarch64 on x86_64"))
    )
    assert found.bundles[0].points[0].roofline is not None
    assert found.bundles[0].points[0].roofline.share is None
    assert "qemu-user" in found.notes[0] and "not the device's speed" in found.notes[0]


def disturbed(**facts: float) -> list[str]:
    results = bench_data.results((1.0,), rounds=1)
    bundle, point = results.bundles[0], results.bundles[0].points[0]
    run = point.runs[0].model_copy(
        update={
            "disturbance": Disturbance.model_validate(
                {key: value for key, value in facts.items() if key != "harness_share"}
            ),
            "harness_share": facts.get("harness_share"),
        }
    )
    point = point.model_copy(update={"runs": (run,)})
    bundle = bundle.model_copy(update={"points": (point,)})
    return bench_notes.notes(results.model_copy(update={"bundles": (bundle,)}))


def test_notes_name_what_spoils_a_figure() -> None:
    assert disturbed(other_share=0.02, steal_share=0.0, harness_share=0.001) == []
    assert "other processes took up to 40 %" in disturbed(other_share=0.4)[0]
    assert "other virtual machines took up to 10 %" in disturbed(steal_share=0.1)[0]
    assert "counted 3 thermal throttle events" in disturbed(throttle_events=3)[0]
    assert "timing took 5.0 %" in disturbed(harness_share=0.05)[0]


def test_notes_on_the_device() -> None:
    device = {
        **bench_data.DEVICE, "governor": "powersave", "power_source": "battery", "virtual_machine": "kvm",
        "clusters": [{"cpus": [0], "governor": "performance"}],
    }  # fmt: skip
    text = " ".join(bench_data.results((1.0,), device=device).notes)
    assert "powersave" in text and "performance" not in text and "battery" in text and "virtual" in text


def test_ceilings_are_of_the_download_or_of_its_largest_file() -> None:
    fits = {each.name: each.fits for each in ceilings.check(3 * 10**9, 10**9)}
    assert not fits["Google Play, base module"] and fits["Google Play, all asset packs"]
    assert fits["browser, one file"]
    fits = {each.name: each.fits for each in ceilings.check(3 * 10**9, 3 * 10**9)}
    assert not fits["browser, one file"] and fits["App Store, whole app"]
    assert all(each.fits for each in ceilings.check(0, 0))

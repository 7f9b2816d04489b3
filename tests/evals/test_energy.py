"""Meters on copies of /sys, and the arithmetic of energy on a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import power
from evals.bench import energy
from evals.bench.bench_conditions import EnergySource
from evals.power import Counter, Gauge
from tests.evals.test_device import tree

RAPL = "sys/class/powercap/intel-rapl:0"


def rapl(package: str = "1000000") -> dict[str, str]:
    return {
        f"{RAPL}/name": "package-0",
        f"{RAPL}/energy_uj": package,
        f"{RAPL}/max_energy_range_uj": "5000000",
        "sys/class/powercap/intel-rapl:0:0/name": "core",
        "sys/class/powercap/intel-rapl:0:0/energy_uj": "9",
        "sys/class/powercap/intel-rapl:0:1/name": "dram",
        "sys/class/powercap/intel-rapl:0:1/energy_uj": "2000000",
    }


def test_processor_counters_are_added_and_may_overflow(tmp_path: Path) -> None:
    meter = power.find(tree(tmp_path, rapl("4000000")))
    assert isinstance(meter, Counter)
    assert (meter.source, meter.scope) == ("rapl", "package-0 + dram")  # cores are inside their package
    meter.start()
    tree(tmp_path, {**rapl("500000"), "sys/class/powercap/intel-rapl:0:1/energy_uj": "2250000"})
    assert meter.joule() == pytest.approx(1.5 + 0.25)


def test_a_counter_that_only_root_may_read_is_told_with_the_remedy(tmp_path: Path) -> None:
    roots = tree(tmp_path, {f"{RAPL}/name": "package-0"})
    (tmp_path / RAPL / "energy_uj").mkdir()  # unreadable, also for root
    found = power.find(roots)
    assert isinstance(found, str) and "chmod a+r" in found


def test_without_any_meter_the_reason_says_what_was_looked_for(tmp_path: Path) -> None:
    found = power.find(tree(tmp_path, {"sys/class/power_supply/BAT0/type": "Battery"}))
    assert isinstance(found, str) and "RAPL" in found and "battery" in found


HWMON = "sys/class/hwmon/hwmon1"


def test_rails_of_a_board(tmp_path: Path) -> None:
    roots = tree(
        tmp_path,
        {
            f"{HWMON}/name": "ina3221",
            f"{HWMON}/in1_label": "VDD_IN",
            f"{HWMON}/in1_input": "5000",
            f"{HWMON}/curr1_input": "1200",
            f"{HWMON}/in2_label": "VDD_SOC",
            f"{HWMON}/in2_input": "5000",
            f"{HWMON}/curr2_input": "400",
            f"{HWMON}/in7_label": "sum of shunt voltages",
            f"{HWMON}/in7_input": "9",
            "sys/class/hwmon/hwmon2/name": "nvme",
            "sys/class/hwmon/hwmon2/in1_label": "VDD_DISK",
            "sys/class/hwmon/hwmon2/in1_input": "1",
            "sys/class/hwmon/hwmon2/curr1_input": "1",
        },
    )
    meter = power.find(roots)
    assert isinstance(meter, Gauge)
    assert (meter.source, meter.scope) == ("power_rails", "VDD_IN") and meter._watt() == 6.0
    (tmp_path / HWMON / "in1_label").unlink()
    other = power.find(roots)
    assert isinstance(other, Gauge) and other.scope == "VDD_SOC" and other._watt() == 2.0


def test_a_battery_counts_only_when_it_is_emptied(tmp_path: Path) -> None:
    supply = "sys/class/power_supply/BAT0"
    facts = {
        f"{supply}/type": "Battery",
        f"{supply}/current_now": "-500000",
        f"{supply}/voltage_now": "12000000",
    }
    assert isinstance(power.find(tree(tmp_path, {**facts, f"{supply}/status": "Charging"})), str)
    meter = power.find(tree(tmp_path, {f"{supply}/status": "Discharging"}))
    assert isinstance(meter, Gauge) and meter.scope == "whole device" and meter._watt() == pytest.approx(6.0)


LINE = "RAM 2448/7620MB CPU [1%@729] cpu@48C VDD_IN 4987mW/4987mW VDD_SOC 1504mW/1504mW"


def test_lines_of_tegrastats() -> None:
    assert power.tegrastats_watt(LINE) == (["VDD_IN"], 4.987)
    assert power.tegrastats_watt(LINE.replace("VDD_IN", "VDD_GPU")) == (["VDD_GPU", "VDD_SOC"], 6.491)
    assert power.tegrastats_watt("RAM 2448/7620MB") is None


def test_tegrastats_is_followed_and_ended(tmp_path: Path) -> None:
    tool = tmp_path / "tegrastats"
    tool.write_text(f"#!/bin/sh\nwhile true; do echo '{LINE}'; sleep 0.02; done\n")
    tool.chmod(0o755)
    meter = power.tegrastats(str(tool))
    assert isinstance(meter, Gauge) and meter.scope == "VDD_IN"
    meter.start()
    while len(meter._samples) < 2:
        pass
    assert meter.joule() > 0
    meter.close()
    assert power.tegrastats(str(tmp_path / "absent")) is None
    tool.write_text("#!/bin/sh\necho RAM only\n")
    assert power.tegrastats(str(tool)) is None


@given(st.lists(st.floats(0.01, 5), min_size=2, max_size=30), st.floats(0, 50))
def test_constant_power_integrates_to_power_times_time(steps: list[float], watt: float) -> None:
    at, samples = 0.0, []
    for step in steps:
        at += step
        samples.append((at, watt))
    assert power.integrate(samples) == pytest.approx(watt * (at - samples[0][0]))
    assert power.integrate(samples[:1]) == 0


class Physics:
    """A device with a clock: 2 W idle, and answers that take time and energy of their own."""

    source: EnergySource = "power_rails"
    scope = "VDD_IN"

    def __init__(self, idle_watt: float = 2.0) -> None:
        self.now, self.used, self.idle_watt, self.closed = 0.0, 0.0, idle_watt, False
        self._from = 0.0

    def spend(self, seconds: float, joule: float) -> None:
        self.now += seconds
        self.used += joule + self.idle_watt * seconds

    def start(self) -> None:
        self._from = self.used

    def joule(self) -> float:
        return self.used - self._from

    def close(self) -> None:
        self.closed = True


def measured(device: Physics, token_joule: float = 0.1) -> energy.Energy:
    return energy.measure_answers(
        40.0,
        lambda: device.spend(1.0, 3.0 + 10 * token_joule),
        lambda: device.spend(0.5, 3.0),
        10,
        meter=device,
        clock=lambda: device.now,
        rest=lambda seconds: device.spend(seconds, 0.0),
    )


def test_energy_of_an_answer_and_of_a_token() -> None:
    device = Physics()
    found = measured(device)
    assert device.closed
    assert (found.answers, found.seconds, found.idle_watt) == (15, 15.0, 2.0)
    assert found.joule_per_answer == pytest.approx(4 + 2)  # idle power included
    assert found.net_joule_per_answer == pytest.approx(4)
    assert found.watt == pytest.approx(6)
    assert found.millijoule_per_token == pytest.approx(1e3 * (6 - 4) / 10)


def test_a_bundle_s_energy_through_the_measuring_process(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real answers; the meter takes each decoded token, which the session tells, for a joule."""
    from evals.bench import bench_child, bench_grid
    from evals.bench.bench_task import Task
    from runtime.session import Session

    device, decode = Physics(idle_watt=0.0), Session.decode

    def counted(self: Session, token_id: int) -> object:
        device.used += 1.0
        return decode(self, token_id)

    monkeypatch.setattr(Session, "decode", counted)
    monkeypatch.setattr(power, "find", lambda: device)
    image, question = bench_grid.subject(tiny_bundle, None, None)
    found = bench_child.run(
        Task(
            kind="energy",
            bundle=str(tiny_bundle),
            image=str(image),
            question=question,
            threads=1,
            decode_tokens=5,
            seconds=0.2,
        )
    ).energy
    assert found is not None and found.answers and device.closed
    assert found.joule_per_answer == pytest.approx(5) and found.millijoule_per_token == pytest.approx(1000)


def test_a_token_that_costs_nothing_has_no_figure() -> None:
    free = energy.measure_answers(
        4.0, lambda: device.spend(1.0, 1.0), lambda: device.spend(1.0, 1.0), 10, meter=(device := Physics()),
        clock=lambda: device.now, rest=lambda seconds: device.spend(seconds, 0.0),
    )  # fmt: skip
    assert free.millijoule_per_token is None and free.joule_per_answer == pytest.approx(3.0)


def test_a_meter_that_stands_still_is_no_measurement() -> None:
    class Still(Physics):
        def joule(self) -> float:
            return 0.0

    found = measured(Still())
    assert found.source is None and "did not move" in str(found.why_not)


def test_no_meter_is_a_reason() -> None:
    found = energy.measure_answers(1.0, lambda: None, lambda: None, 4, meter="no meter here")
    assert found.why_not == "no meter here" and found.joule is None


def test_the_meter_is_closed_when_an_answer_fails() -> None:
    device = Physics()

    def fail() -> None:
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        energy.measure_answers(
            1.0, fail, fail, 4, meter=device, clock=lambda: device.now, rest=lambda s: device.spend(s, 0.0)
        )
    assert device.closed

"""The default number of threads: physical cores, within the process's CPU set and its group's quota."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime import threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four hardware threads on two cores, no quota."""
    for cpu in range(4):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(threads, "CPU_DIRECTORY", tmp_path)
    monkeypatch.setattr(threads, "QUOTA_FILE", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    return tmp_path


def test_twins_count_once(machine: Path) -> None:
    assert threads.default_threads() == 2


def test_the_cpu_set_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 3})
    assert threads.default_threads() == 1


@pytest.mark.parametrize(("quota", "expected"), [("50000", 1), ("100000", 1), ("150000", 2), ("900000", 2)])
def test_a_quota_counts(machine: Path, quota: str, expected: int) -> None:
    (machine / "cpu.max").write_text(f"{quota} 100000\n")
    assert threads.default_threads() == expected


def test_a_system_that_tells_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CPU_DIRECTORY", machine / "absent")
    monkeypatch.setattr(threads, "QUOTA_FILE", machine / "absent")
    assert threads.default_threads() == 4

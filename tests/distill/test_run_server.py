"""Runs whose teacher and student answer behind a real server, `transformers serve`, which the stages start
and stop: masked teachers and the student of every phase are written for it, proved and deleted.

It gives text only, so responses are tokenised again and mu is computed here.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill import run
from distill.answers.partial import Partial
from distill.recipe import Recipe
from tests.distill import runs
from tests.distill.runs import Result, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
COMMAND = f"{Path(sys.executable).parent}/transformers serve {{checkpoint}} --port {{port}} --device cpu"
SERVED = {"kind": "openai", "command": COMMAND, "concurrency": 2, "timeout_seconds": 60}


@pytest.fixture(scope="module", autouse=True)
def judges() -> Iterator[None]:
    with runs.quick_judges():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return runs.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _small_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def plan(world: World, *changes: str, **sections: Any) -> Recipe:
    """Six questions, so that the servers have little to do."""
    source = {**world.source("data"), "limit": 6}
    data = {"train": [source], "validation": [world.held_out], "together": 2}
    teacher = {"checkpoint": world.teacher(), "mask": runs.mask(gate=None, r_max=0.05)}
    sections = {"data": data, "teachers": [teacher], **sections}
    return runs.plan(world, f"pool.engine={json.dumps(SERVED)}", "pool.shard=8", *changes, **sections)


def servers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if any(a == "serve" for a in _line(p))]


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_everything_is_served(world: World, tmp_path: Path) -> None:
    """Gate, masked and full teacher, and the student of both phases: six servers, one after the other."""
    out = tmp_path / "out"
    settings = plan(world, teachers=[{"checkpoint": world.teacher(), "mask": runs.mask()}])
    result = runs.go(settings, out)
    assert not servers()
    told = result.metrics["pool"]
    assert [(line["source"], line["responses"], line["retokenised_share"]) for line in told] == [
        ("teacher", 6, 1.0), ("student", 6, 1.0), ("teacher", 6, 1.0), ("student", 6, 1.0),
    ]  # fmt: skip
    assert all(line["mu_share"] == 0 for line in told)
    curve = result.metrics["gates"][0]["curve"]
    assert curve[0][1] == 1.0, "the served teacher's greedy answers are its own"
    assert curve[1][2] == pytest.approx(0.05, abs=0.01), "zeros that were measured before it was served"
    work = out / "work"
    logs = sorted(path.name for path in work.glob("server-*.log"))
    assert logs == [
        "server-student-1.log", "server-student-2.log", "server-teacher-0-0.05.log", "server-teacher-0-0.log",
    ]  # fmt: skip
    assert not list(work.glob("served-*")), "weights that were written for a server are deleted"
    assert {entry["teacher"] for entry in result.log} == {0.0} and len(result.log) == 2


def test_student_with_adapters_is_served_merged(world: World, tmp_path: Path) -> None:
    """Its proof compares greedy answers with the model in training, adapters included."""
    settings = plan(
        world,
        "pool.engine={kind: hf}",
        f"pool.student_engine={json.dumps(SERVED)}",
        "train.lora={rank: 4, alpha: 32}",
        "train.lr=0.02",
    )
    result = runs.go(settings, tmp_path / "out")
    told = {(line["source"], line["retokenised_share"]) for line in result.metrics["pool"]}
    assert told == {("teacher", 0.0), ("student", 1.0)}


def kept(pool: Path) -> Counter[tuple[str, int]]:
    """Responses on disk, sealed or not, by pool and slot."""
    found: Counter[tuple[str, int]] = Counter()
    for path in pool.rglob("*.partial"):
        for slot, some in Partial(path).drawn.items():
            found[str(path.parent), slot] += len(some)
    return found


def test_kill_9_in_mid_pool(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies with the run. What it had answered is asked for only once, over both lives."""
    out = tmp_path / "out"
    settings = plan(world, "pool.teacher_responses=4", "pool.engine.concurrency=1")
    codes = runs.launch(settings, out, kill_in=("distill.answers.partial:Partial", "add", 5), seconds=600)
    assert codes == [-signal.SIGKILL]
    before = kept(out / "work" / "pool")
    assert before.total() == 5, "five answers had arrived"
    asked: list[tuple[int, int]] = []
    from distill.answers import shards

    original = shards._Arrivals.keep

    def keep(self: Any, place: int, first: int, drawn: Any) -> None:
        asked.extend((place, first + n) for n in range(len(drawn)))
        original(self, place, first, drawn)

    monkeypatch.setattr(shards._Arrivals, "keep", keep)
    result = runs.go(settings, out)
    teacher = sum(line["responses"] for line in result.metrics["pool"] if line["source"] == "teacher")
    student = sum(line["responses"] for line in result.metrics["pool"] if line["source"] == "student")
    assert (teacher, student) == (24, 12)
    assert len(asked) == 24 + 12 - before.total(), "no response is sampled twice"
    lines = [_line(process) for process in psutil.process_iter()]
    assert not [line for line in lines if "serve" in line and str(tmp_path) in " ".join(line)]


def test_a_server_judges(world: World, tmp_path: Path) -> None:
    """It is asked once: a run that goes on after the verdicts starts no server."""
    out = tmp_path / "out"
    judge = {"kind": "model", "by": "server", "command": COMMAND, "model": world.teacher(), "concurrency": 2}
    settings = plan(world, "pool.engine={kind: hf}", judge=judge)
    codes = runs.launch(settings, out, kill_in=("distill.training.loop:_Run", "_clip", 0), seconds=900)
    assert codes == [-signal.SIGKILL]
    log = out / "work" / "server-judge.log"
    starts = log.read_text().count("$ ")
    verdicts = (out / "work" / "verdicts" / "0.jsonl").read_bytes()
    log.rename(log.with_suffix(".first"))
    result: Result = runs.go(settings, out)
    assert starts == 1 and log.read_text().count("$ ") == 1, "for the second phase alone"
    assert (out / "work" / "verdicts" / "0.jsonl").read_bytes().startswith(verdicts)
    assert (out / "judge-audit.jsonl").exists() and len(result.log) == 2
    assert (out / run.STUDENT).is_dir()

"""Whole runs that are cut: by SIGKILL in every stage, before and after every file, in several processes.

Run again, each ends with the weights and the log that it would have had, bit for bit.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import run
from distill.recipe import Recipe
from tests.distill import runs
from tests.distill.runs import Cut, Result, World
from tests.distill.worker import DDP, FSDP2

slow = pytest.mark.slow
WAYS = {"ddp": DDP, "fsdp2": FSDP2}
ADAM = 5e-2
"""Adam divides by the gradient's size: where that is rounding, so is the update."""


@pytest.fixture(scope="module", autouse=True)
def judges() -> Iterator[None]:
    with runs.quick_judges():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return runs.make(tmp_path_factory.mktemp("world"), teachers=2)


def everything(world: World) -> Recipe:
    """Every stage there is: two teachers, masks with a gate, votes for labels, a model that judges, LoRA,
    frozen vision with kept features, signal on disk, two passes, validation."""
    listed = [
        {"checkpoint": world.teacher(1), "mask": None, "share": 1},
        {"checkpoint": world.teacher(0), "mask": runs.mask(), "share": 2},
    ]
    source = {**world.source("data"), "labels": 8, "limit": 12}
    return runs.plan(
        world,
        "train.passes=2",
        "train.lora={rank: 2, alpha: 8}",
        "train.freeze=[vision]",
        "train.lr=0.01",
        "train.save_every=3",
        "train.validate_every=4",
        "pool.sampling.max_new_tokens=3",
        teachers=listed,
        data={"train": [source], "validation": [world.held_out], "together": 2},
        judge={"kind": "model", "by": "generator"},
        signal={"kind": "topk", "k": 16},
    )


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Result:
    torch.set_num_threads(1)
    return runs.go(runs.plan(world), tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def whole_of_everything(world: World, tmp_path_factory: pytest.TempPathFactory) -> Result:
    torch.set_num_threads(1)
    return runs.go(everything(world), tmp_path_factory.mktemp("everything") / "out")


# --- every file ---------------------------------------------------------


def cut(settings: Recipe, out: Path, number: int, *, after: bool) -> str:
    """Cut a run at a file; the file's name, "" where the run has not so many."""
    with runs.cut_at_file(number, after=after, act=runs.pull) as names:
        try:
            run.run(settings, out)
        except Cut:
            return names[-1]
    return ""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_cut_at_some_files(world: World, whole: Result, tmp_path: Path, after: bool) -> None:
    """Another directory each time, a file further along by a fifth of them."""
    with runs.cut_at_file(-1, after=False, act=runs.pull) as names:
        run.run(runs.plan(world), tmp_path / "count")
    total = len(names)
    assert total > 25
    for number in range(2 + 3 * after, total, total // 5):
        out = tmp_path / str(number)
        assert cut(runs.plan(world), out, number, after=after) == names[number]
        before = runs.files_below(out)
        assert runs.go(runs.plan(world), out).equals(whole), names[number]
        assert {name: runs.files_below(out)[name] for name in before} == before, "sealed shards stay"


def test_cut_again_and_again(world: World, whole: Result, tmp_path: Path) -> None:
    """One directory, cut a little later every time: as often as there are files left."""
    seen = []
    for number in range(6, 100, 3):
        name = cut(runs.plan(world), tmp_path / "out", number, after=bool(number % 2))
        if not name:
            break
        seen.append(name)
    assert len(seen) > 2
    assert Result.of(tmp_path / "out").equals(whole), seen


@slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_cut_at_every_file_of_everything(
    world: World, whole_of_everything: Result, tmp_path: Path, after: bool
) -> None:
    settings, number = everything(world), 0
    while True:
        out = tmp_path / str(number)
        name = cut(settings, out, number, after=after)
        found = runs.go(settings, out)
        assert found.equals(whole_of_everything), (number, name)
        if not name:
            break
        number += 1
    assert number > 60


# --- SIGKILL --------------------------------------------------------------

MOMENTS = {
    "gate": ("distill.answers.engines:HfEngine", "_draw_batch", 1),
    "pool": ("distill.answers.engines:HfEngine", "_draw_batch", 4),
    "student drawing": ("distill.answers.pooling:Pooling", "_student_made", 1),
    "judging": ("evals.judge:Cache", "add", 2),
    "second call of the judge": ("evals.judge:Judge", "_generate", 3),
    "signal": ("distill.losses.signal_store:SignalStore", "seal", 1),
    "inside the signal": ("distill.losses.kept_signal", "_block", 2),
    "step": ("distill.training.loop:_Run", "_clip", 5),
    "validation": ("distill.gating:Gating", "validate", 1),
    "saving a state": ("distill.training.checkpoints", "publish", 3),
    "the end": ("distill.metrics", "collect", 0),
}


@slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_in_every_stage(
    world: World, whole_of_everything: Result, tmp_path: Path, moment: str
) -> None:
    settings, out = everything(world), tmp_path / "out"
    assert runs.launch(settings, out, kill_in=MOMENTS[moment]) == [-signal.SIGKILL]
    assert not (out / run.STUDENT).exists()
    assert runs.done(settings, out).equals(whole_of_everything)


@slow
def test_kill_9_at_random_files(world: World, whole_of_everything: Result, tmp_path: Path) -> None:
    """The same directory, killed at random files until the run is through."""
    settings, out, draw = everything(world), tmp_path / "out", np.random.default_rng(5)
    kills = 0
    for attempt in range(12):
        number = int(draw.integers(3, 12 + 3 * attempt))
        codes = runs.launch(settings, out, kill_file=(number, bool(draw.integers(2))))
        if codes == [0]:
            break
        assert codes == [-signal.SIGKILL]
        kills += 1
    assert kills > 2
    assert runs.done(settings, out).equals(whole_of_everything)


def test_kill_9(world: World, whole: Result, tmp_path: Path) -> None:
    """A real process, killed while it trains."""
    settings, out = runs.plan(world), tmp_path / "out"
    assert runs.launch(settings, out, kill_in=(*MOMENTS["step"][:2], 2)) == [-signal.SIGKILL]
    assert list((out / "work" / "train").glob("state-*"))
    assert runs.done(settings, out).equals(whole)


# --- several processes ------------------------------------------------------


def near(mine: Result, other: Result, start: str) -> None:
    """The same pools and steps; losses and weights equal to rounding."""
    tokens = [[line["tokens"] for line in each.metrics["pool"]] for each in (mine, other)]
    assert tokens[0] == tokens[1]
    assert len(mine.log) == len(other.log)
    for one, two in zip(mine.log, other.log, strict=True):
        for name in ("loss", "divergence", "r_acc", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name
    assert mine.apart(other, start) < ADAM


@slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("signal_kind", ["live", "topk", "hidden"])
def test_two_processes(world: World, tmp_path: Path, way: str, signal_kind: str) -> None:
    """The student that draws in the second phase has learned in the first, in either number of processes."""
    settings = runs.plan(world, f"signal.kind={signal_kind}", "signal.k=32", "train.tokens_per_device=100")
    one = runs.done(settings, tmp_path / "one")
    two = runs.done(settings, tmp_path / "two", world=2, way=WAYS[way])
    assert two.metrics["processes"] == 2
    near(two, one, world.student)


@slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)])
def test_going_on_in_another_number_of_processes(
    world: World, whole: Result, tmp_path: Path, way: str, worlds: tuple[int, int]
) -> None:
    for place in (("distill.answers.engines:HfEngine", "_draw_batch", 2), (*MOMENTS["step"][:2], 3)):
        out = tmp_path / place[1]
        codes = runs.launch(runs.plan(world), out, world=worlds[0], way=WAYS[way], kill_in=place)
        assert -signal.SIGKILL in codes
        near(runs.done(runs.plan(world), out, world=worlds[1], way=WAYS[way]), whole, world.student)


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(world: World, tmp_path: Path, rank: int) -> None:
    """On the same topology the weights are the same bit for bit."""
    settings = runs.plan(world, judge={"kind": "model", "by": "teacher"}, signal={"kind": "topk", "k": 16})
    wanted = runs.done(settings, tmp_path / "wanted", world=2)
    for moment in ("pool", "judging", "signal", "step"):
        owner, name, call = MOMENTS[moment]
        out = tmp_path / moment
        codes = runs.launch(settings, out, world=2, kill_in=(owner, name, call // 2), rank=rank)
        assert -signal.SIGKILL in codes
        assert runs.done(settings, out, world=2).equals(wanted), moment


@slow
def test_judge_in_the_process_and_shards(world: World, tmp_path: Path) -> None:
    settings = runs.plan(world, judge={"kind": "model", "by": "teacher"})
    codes = runs.launch(settings, tmp_path / "out", world=2, way=FSDP2)
    assert 0 not in codes
    said = "".join(path.read_text() for path in tmp_path.glob("out.*.log"))
    assert "judge.command" in said and "InputError" in said

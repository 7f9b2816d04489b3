"""Cut anywhere and continued, a run ends with the weights it would have had: bit for bit."""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.demo.vqa import VqaData
from distill.training import checkpoints, loop, optim
from runtime import files
from runtime.errors import TrainingError
from tests.distill import training

ROOT = Path(__file__).parent.parent.parent
Result = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


class Cut(Exception):
    """The plug is pulled."""


@pytest.fixture(scope="module")
def data(tiny_checkpoint: Path) -> VqaData:
    return training.load_data(tiny_checkpoint)


def same(first: Result, second: Result) -> bool:
    weights = all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    return weights and first[1] == second[1]


def fit(checkpoint: Path, plan: Any, directory: Path, **options: Any) -> Result:
    model = training.load(checkpoint)
    log = loop.fit(model, plan, training.SETTINGS, directory, **options)
    return model.state_dict(), log


def cut_at(plan: Any, step: int) -> Any:
    """The plan, but its loss of one step never comes."""
    loss = plan.loss

    def cut(model: Any, number: int) -> Any:
        if number == step:
            raise Cut
        return loss(model, number)

    plan.loss = cut
    return plan


# --- labels -----------------------------------------------------------


@pytest.fixture(scope="module")
def whole_labels(tiny_checkpoint: Path, data: VqaData, tmp_path_factory: pytest.TempPathFactory) -> Result:
    torch.set_num_threads(1)
    return fit(tiny_checkpoint, training.label_plan(data), tmp_path_factory.mktemp("labels"), save_every=3)


def test_the_same_run_twice(
    tiny_checkpoint: Path, data: VqaData, whole_labels: Result, tmp_path: Path
) -> None:
    """Whatever the global generator holds and however often the state is saved."""
    torch.manual_seed(99)
    assert same(fit(tiny_checkpoint, training.label_plan(data), tmp_path), whole_labels)
    assert [path.name for path in checkpoints.states(tmp_path)] == ["state-00000007"]


@pytest.mark.parametrize("step", range(7))
def test_labels_cut_at_any_step(
    tiny_checkpoint: Path, data: VqaData, whole_labels: Result, tmp_path: Path, step: int
) -> None:
    with pytest.raises(Cut):
        fit(tiny_checkpoint, cut_at(training.label_plan(data), step), tmp_path, save_every=3)
    steps: list[int] = []
    continued = fit(
        tiny_checkpoint, training.label_plan(data), tmp_path, save_every=3,
        progress=lambda done, *_: steps.append(done),
    )  # fmt: skip
    assert same(continued, whole_labels)
    assert steps[0] == step // 3 * 3 + 1, "nothing before the last state is repeated"


def test_cut_twice(tiny_checkpoint: Path, data: VqaData, whole_labels: Result, tmp_path: Path) -> None:
    for step in (4, 4, 6):
        with pytest.raises(Cut):
            fit(tiny_checkpoint, cut_at(training.label_plan(data), step), tmp_path, save_every=1)
    assert same(fit(tiny_checkpoint, training.label_plan(data), tmp_path, save_every=1), whole_labels)


@pytest.mark.parametrize("forget", ["optimizer", "model"])
def test_these_comparisons_can_fail(
    tiny_checkpoint: Path,
    data: VqaData,
    whole_labels: Result,
    tmp_path: Path,
    forget: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that forgets its optimizer or its weights ends elsewhere."""
    with pytest.raises(Cut):
        fit(tiny_checkpoint, cut_at(training.label_plan(data), 5), tmp_path, save_every=3)
    restore = checkpoints.restore

    def forgetful(directory: Path, accelerator: Any, learner: Any, optimizer: Any) -> tuple[int, Any]:
        before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
        found = restore(directory, accelerator, learner, optimizer)
        if forget == "model":
            learner.load_state_dict(before)
        for part in optim.parts(optimizer) if forget == "optimizer" else ():
            part.state.clear()
        return found

    monkeypatch.setattr(checkpoints, "restore", forgetful)
    assert not same(fit(tiny_checkpoint, training.label_plan(data), tmp_path, save_every=3), whole_labels)


# --- the pool ---------------------------------------------------------


@pytest.fixture(scope="module")
def whole_pool(
    tiny_checkpoint: Path, teacher: Path, pools: Path, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    return training.fit_pool(teacher, tiny_checkpoint, pools, tmp_path_factory.mktemp("pool"))


@pytest.mark.parametrize("step", range(9))
def test_the_pool_cut_at_any_step(
    tiny_checkpoint: Path,
    teacher: Path,
    pools: Path,
    data: VqaData,
    whole_pool: Result,
    tmp_path: Path,
    step: int,
) -> None:
    """Steps 0, 3 and 6 begin a stage (the student has just answered), the others lie inside one. The
    states are far apart, so most runs go back over a stage's start: it must be saved by itself."""
    plan = cut_at(training.pool_plan(teacher, tiny_checkpoint, data, pools, tmp_path), step)
    with pytest.raises(Cut):
        fit(tiny_checkpoint, plan, tmp_path, save_every=2 if step % 2 else 100)
    drawn = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert len(drawn) == step // 3 + 1
    assert same(training.fit_pool(teacher, tiny_checkpoint, pools, tmp_path), whole_pool)
    assert all(path.read_bytes() == body for path, body in drawn.items())


def test_the_pool_cut_at_any_write(
    tiny_checkpoint: Path,
    teacher: Path,
    pools: Path,
    whole_pool: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Just before and just after each file of the run appears: shards, logs, states."""
    budget = 0

    def counted(write: Callable[[Path, Any], None]) -> Callable[[Path, Any], None]:
        def cut(path: Path, content: Any) -> None:
            nonlocal budget
            budget -= 1
            if budget == 0:
                raise Cut
            write(path, content)
            budget -= 1
            if budget == 0:
                raise Cut

        return cut

    monkeypatch.setattr(files, "write_bytes", counted(files.write_bytes))
    monkeypatch.setattr(checkpoints, "publish", counted(checkpoints.publish))
    for start in range(1, 40):  # each time the run is cut, it goes on in the same directory
        budget = start
        try:
            result = training.fit_pool(teacher, tiny_checkpoint, pools, tmp_path)
            break
        except Cut:
            continue
    assert start > 5 and same(result, whole_pool)


def test_the_pool_killed(
    tiny_checkpoint: Path, teacher: Path, pools: Path, whole_pool: Result, tmp_path: Path
) -> None:
    """kill -9 of a real process in the middle of the second stage."""
    script = (
        "from pathlib import Path\nfrom tests.distill import training\n"
        f"training.fit_pool(Path({str(teacher)!r}), Path({str(tiny_checkpoint)!r}), Path({str(pools)!r}), "
        f"Path({str(tmp_path)!r}), die_after=5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoints.states(tmp_path)[-1].name == "state-00000004"
    assert same(training.fit_pool(teacher, tiny_checkpoint, pools, tmp_path), whole_pool)


# --- rates, groups, refusals ------------------------------------------


def test_rates() -> None:
    found = [optim.rate(step, 100, loop.Optimizing.muon(warmup_steps=10)) for step in range(100)]
    assert found[0] == pytest.approx(0.1, abs=1e-3)
    assert found.index(max(found)) == 9 and max(found) < 1
    assert found[50] == pytest.approx(0.03 + 0.97 / 2)
    assert found[99] == pytest.approx(0.03, abs=1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[9:]))


def test_every_parameter_has_one_optimizer(tiny_model: Any) -> None:
    optimizer = optim.HiddenMuon(tiny_model, training.SETTINGS)
    names = {id(p): name for name, p in tiny_model.named_parameters()}
    adam, muon = (
        {names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimizer.parts
    )
    assert adam | muon == set(names.values()) and not adam & muon
    hidden = ("_proj.weight", "fc1.weight", "fc2.weight", "modality_projection.proj.weight")
    assert all(name.endswith(hidden) for name in muon)
    assert {"model.text_model.embed_tokens.weight", "model.text_model.norm.weight"} <= adam
    assert any("patch_embedding" in name for name in adam)
    assert not any(name.endswith("_proj.weight") for name in adam)


def test_frozen_parameters_stay(tiny_checkpoint: Path, data: VqaData, tmp_path: Path) -> None:
    model = training.load(tiny_checkpoint)
    model.model.vision_model.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loop.fit(model, training.label_plan(data, steps=2), training.SETTINGS, tmp_path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "vision_model" not in name}


def test_a_loss_that_is_no_number(tiny_checkpoint: Path, data: VqaData, tmp_path: Path) -> None:
    plan = training.label_plan(data)
    loss = plan.loss
    plan.loss = lambda model, step: (loss(model, step)[0] * (math.inf if step == 2 else 1), {})  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="loss is inf at step 2; lower the learning rate"):
        fit(tiny_checkpoint, plan, tmp_path)


def test_the_log(tiny_checkpoint: Path, whole_labels: Result, whole_pool: Result) -> None:
    labels, masters = whole_labels[1], whole_pool[1]
    assert [entry["step"] for entry in labels] == list(range(7))
    assert all(entry["tokens"] >= 12 and entry["grad_norm"] > 0 for entry in labels)
    assert [entry["mask_ratio"] for entry in masters] == [r for r in training.RATIOS for _ in range(3)]
    assert labels[-1]["loss"] < labels[0]["loss"]

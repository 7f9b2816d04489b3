"""How a step is divided changes neither its loss nor its gradient."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.forward import tree
from distill.inputs.encoding import Encoder
from distill.losses import presets
from distill.losses.objective import Objective
from distill.training import batches
from distill.training.parts import PoolPart
from tests.checkpoints import FAMILIES
from tests.distill import learning

KINDS = ("smolvlm", "qwen3_vl")
TOLERANCE = 2e-5
"""fp32 sums in another order; gradients are compared relative to their largest value."""


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name in KINDS])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher of a family."""
    write, root = FAMILIES[request.param], tmp_path_factory.mktemp("pair")
    return write(root / "student", seed=0), write(root / "teacher", seed=1)


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    write, root = FAMILIES["smolvlm"], tmp_path_factory.mktemp("smol")
    return write(root / "student", seed=0), write(root / "teacher", seed=1)


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest gradient."""
    assert first.keys() == second.keys()
    scale = max(g.abs().max().item() for g in first.values())
    return max((first[name] - second[name]).abs().max().item() for name in first) / scale


def at(pool: learning.Pool, step: int) -> Any:
    pool.steps.prepare(pool.model, step)
    return learning.gradients(pool.model, pool.steps, step)


def test_one_micro_batch_or_many(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = learning.Pool(*pair, tmp_path)
    gradient, figures = at(whole, 0)
    assert len(whole.steps.parts(0)) == 1 and figures["loss"] != 0
    for tokens in (1, 120):
        parts = learning.Pool(*pair, tmp_path, tokens=tokens)
        found, split = at(parts, 0)
        assert len(parts.steps.parts(0)) > 1
        assert close(gradient, found) < TOLERANCE
        for name in figures.keys() - {"flops", "input_tokens"}:  # a row that is cut shares less
            assert split[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("normaliser", ["sequence", "token", "constant"])
def test_every_normaliser(smol: tuple[Path, Path], tmp_path: Path, normaliser: Any) -> None:
    switches = Objective(normaliser=normaliser)
    gradient, figures = at(learning.Pool(*smol, tmp_path, switches=switches), 1)
    found, split = at(learning.Pool(*smol, tmp_path, switches=switches, tokens=1), 1)
    assert close(gradient, found) < TOLERANCE
    assert split["loss"] == pytest.approx(figures["loss"], rel=1e-4)


def test_a_mean_of_means_would_differ(smol: tuple[Path, Path], tmp_path: Path) -> None:
    """The comparison can fail: parts that are each divided by their own weight give another gradient."""
    gradient, _ = at(learning.Pool(*smol, tmp_path), 0)
    pool = learning.Pool(*smol, tmp_path, tokens=1)
    pool.steps.prepare(pool.model, 0)
    parts = pool.steps.parts(0)
    for part in parts:
        own = sum(r.count for item in part.items for r in item.question.responses)
        part.totals = dataclasses.replace(part.totals, weight=own * len(parts))
    pool.steps.parts = lambda step: parts  # type: ignore[method-assign]
    found, _ = learning.gradients(pool.model, pool.steps, 0)
    assert close(gradient, found) > 1e-2


@pytest.mark.parametrize("sharing", ["prefix", "naive"])
def test_every_way_of_sharing(smol: tuple[Path, Path], tmp_path: Path, sharing: str) -> None:
    gradient, _ = at(learning.Pool(*smol, tmp_path), 0)
    found, _ = at(learning.Pool(*smol, tmp_path, sharing=sharing, tokens=200), 0)
    assert close(gradient, found) < 1e-4  # masks and positions reach the kernels in another way


def test_each_question_once_a_pass(smol: tuple[Path, Path], tmp_path: Path) -> None:
    pool = learning.Pool(*smol, tmp_path, per_step=5)
    steps = pool.steps
    assert steps.steps == 2 * 3 and [steps.is_boundary(i) for i in range(6)] == [True, False, False] * 2
    for phase in range(2):
        steps.prepare(pool.model, 3 * phase)
        found = [steps.indices(3 * phase + i) for i in range(3)]
        assert [len(indices) for indices in found] == [5, 5, 2]
        assert sorted(i for indices in found for i in indices) == list(range(12))
        together = [i // 3 for indices in found for i in indices]
        assert len([1 for a, b in itertools.pairwise(together) if a != b]) == 3  # by image


def test_orders_differ_between_passes_and_seeds() -> None:
    keys = [number // 2 for number in range(40)]
    orders = [
        batches.order(keys, seed) for seed in ([0, 11, 0, 0], [0, 11, 0, 1], [0, 11, 1, 0], [1, 11, 0, 0])
    ]
    assert len({tuple(found) for found in orders}) == 4
    assert orders[0] == batches.order(keys, [0, 11, 0, 0])


def test_dealing_is_fair_and_whole(smol: tuple[Path, Path]) -> None:
    encoder = Encoder.load(str(smol[0]))
    rows = batches.runs(learning.questions(encoder, 30), lambda q: batches.image_key(q.sample), 8)
    assert [len(row) for row in rows] == [3] * 10
    dealt = batches.deal(rows, 3)
    assert sorted(i for mine in dealt for i in mine) == list(range(10))
    loads = [sum(batches.cost(rows[i]) for i in mine) for mine in dealt]
    assert max(loads) - min(loads) <= max(map(batches.cost, rows))


def test_micro_batches_keep_the_budget(smol: tuple[Path, Path], tmp_path: Path) -> None:
    pool = learning.Pool(*smol, tmp_path, per_step=12)
    pool.steps.prepare(pool.model, 0)
    rows = pool.steps._encoded(0)
    for budget in (100, 160, 400):
        for micro in batches.micro_batches(rows, budget, "tree"):
            packed = tree.pack(pool.model, _groups(micro), 0)
            size = packed.ids_bl.numel()
            assert size <= budget or (len(micro) == 1 and len(micro[0]) == 1)
            assert packed.ids_bl.shape[1] == max(batches.width(row, "tree") for row in micro)


def _groups(micro: Any) -> list[list[tree.Group]]:
    return [
        [tree.Group(i.prompts[0], tuple(r.ids for r in i.question.responses)) for i in row] for row in micro
    ]


def test_a_question_of_weight_zero_counts_nowhere(smol: tuple[Path, Path], tmp_path: Path) -> None:
    pool = learning.Pool(*smol, tmp_path)
    gradient, figures = at(pool, 0)
    steps = pool.steps
    parts = list(steps.parts(0))
    idle = [[steps._idle(11)]]
    parts.append(PoolPart(pool.context, idle, steps.teachers, [1.0], steps.totals(0)))
    parts[0].rows = [*parts[0].rows, *idle]
    parts[0].items = [item for row in parts[0].rows for item in row]
    steps.parts = lambda step: parts  # type: ignore[method-assign]
    found, more = learning.gradients(pool.model, steps, 0)
    assert close(gradient, found) < TOLERANCE
    for name in ("loss", "divergence", "r_acc", "r_distill", "zero_variance"):
        assert more[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-6), name


def test_frozen_vision_is_computed_once(smol: tuple[Path, Path], tmp_path: Path) -> None:
    plain = learning.Pool(*smol, tmp_path, frozen=["vision"])
    plain.context.cache = None
    gradient, _ = at(plain, 0)
    pool = learning.Pool(*smol, tmp_path, frozen=["vision"], tokens=1)
    found, _ = at(pool, 0)
    assert close(gradient, found) < TOLERANCE
    assert not any("vision" in name for name in found)
    assert pool.context.cache is not None and pool.context.cache.computed == 2
    at(pool, 0)
    assert pool.context.cache.computed == 2


def test_missing_mu_is_the_stage_starts(smol: tuple[Path, Path], tmp_path: Path) -> None:
    """Computed once, kept: a student that has moved on does not change it. The teacher's are left to it."""
    pool = learning.Pool(*smol, tmp_path, unknown_mu=True)
    at(pool, 0)
    question = pool.steps.questions[3]
    mu = pool.steps.mu(3)
    prompt = pool.encoder.encode(question.sample)
    for n, response in enumerate(question.responses):
        if response.teacher:
            assert mu[n] is None
            continue
        packed = tree.pack(pool.model, [[tree.Group(prompt, (response.ids,))]], pool.encoder.pad_id)
        wanted = tree.log_probs(pool.model, packed).gather(-1, packed.target_t[:, None])[:, 0]
        assert mu[n] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert any(value is not None for value in mu)
    later = learning.Pool(*smol, tmp_path, unknown_mu=True)
    with torch.no_grad():
        for parameter in later.model.parameters():
            parameter.mul_(0.5)
    later.steps.prepare(later.model, 1)
    assert later.steps.mu(3) == mu


def test_several_teachers_are_mixed(smol: tuple[Path, Path], tmp_path: Path) -> None:
    """Two equal teachers teach as one does, whatever their weights; weights 1 and 0 leave the first."""
    switches = presets.PRESETS["kd_forward"].objective
    one = learning.Pool(*smol, tmp_path, switches=switches)
    gradient, _ = at(one, 0)
    two = learning.Pool(*smol, tmp_path, switches=switches)
    two.steps.enter_teacher = lambda phase: [two.teacher, two.teacher]  # type: ignore[method-assign]
    two.steps.teacher_weights = lambda step: [0.25, 0.75]
    found, _ = at(two, 0)
    assert close(gradient, found) < TOLERANCE


def test_labels(smol: tuple[Path, Path], tmp_path: Path) -> None:
    model, encoder = learning.load(smol[0]), Encoder.load(str(smol[0]))
    found = []
    for tokens in (4096, 1):
        steps = learning.label_steps(encoder, tokens=tokens)
        steps.prepare(model, 0)
        found.append(learning.gradients(model, steps, 1))
    assert close(found[0][0], found[1][0]) < TOLERANCE
    loss, count = 0.0, 0
    for index in steps.indices(1):
        sample = steps.dataset[index]
        ids = encoder.response_ids(sample.answer)
        packed = tree.pack(model, [[tree.Group(encoder.encode(sample), (ids,))]], encoder.pad_id)
        loss -= tree.log_probs(model, packed).gather(-1, packed.target_t[:, None]).sum().item()
        count += len(ids)
    assert found[0][1]["loss"] == pytest.approx(loss / count, rel=1e-5)

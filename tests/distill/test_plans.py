"""What a step learns: the assembled loss equals one computed response by response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.demo import plans, pool
from distill.demo.vqa import VqaData, shifted
from distill.forward import tree
from distill.losses import objective
from distill.losses.objective import Objective
from distill.masks.masking import LANGUAGE, VISION, Masker
from evals import scorers
from tests.distill import training


@pytest.fixture(scope="module")
def data(tiny_checkpoint: Path) -> VqaData:
    return training.load_data(tiny_checkpoint)


def plan_for(
    teacher: Path, student: Path, data: VqaData, pools: Path, out: Path, *switches: Objective, **options: int
) -> plans.PoolPlan:
    return training.pool_plan(teacher, student, data, pools, out, *switches, **options)


def naive(model: Any, data: VqaData, image: int, prompt: Any, response: Any) -> torch.Tensor:
    """(R, V) log-probs of one response in a sequence of its own."""
    logits = model(
        input_ids=torch.tensor([[*prompt, *response]]), pixel_values=data.pixels([image])[:, None]
    ).logits[0]
    return logits[len(prompt) - 1 :][: len(response)].log_softmax(-1)


# --- labels -----------------------------------------------------------


def test_a_label_step_is_cross_entropy(tiny_model: Any, data: VqaData) -> None:
    plan = training.label_plan(data)
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "shifted", lambda *a: seen.append(shifted(*a)) or seen[-1])
        packed: list[Any] = []
        patch.setattr(
            tree, "pack", lambda m, rows, pad, pack=tree.pack: packed.append(rows) or pack(m, rows, pad)
        )
        loss, figures = plan.loss(tiny_model, 3)
    losses = []
    for pixels, row in zip(seen[0], packed[0], strict=True):
        for group in row:
            (response,) = group.responses
            logits = tiny_model(
                input_ids=torch.tensor([[*group.prompt.ids, *response]]), pixel_values=pixels[None, None]
            ).logits[0]
            places = logits[len(group.prompt.ids) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(places, torch.tensor(response), reduction="none"))
    expected = torch.cat(losses)
    assert len(losses) == 6 and figures["tokens"] == len(expected)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_a_step_depends_on_its_number_alone(tiny_model: Any, data: VqaData) -> None:
    plan, other = training.label_plan(data), training.label_plan(data)
    plan.loss(tiny_model, 0)
    assert plan.loss(tiny_model, 5)[0].item() == other.loss(tiny_model, 5)[0].item()
    assert plan.loss(tiny_model, 4)[0].item() != plan.loss(tiny_model, 5)[0].item()


def test_fewer_images_than_a_step_wants(tiny_model: Any, data: VqaData) -> None:
    plan = plans.LabelPlan(
        data, [2], lambda _: "yes", steps=1, images_per_step=8, questions_per_image=99, seed=0
    )
    assert plan.loss(tiny_model, 0)[1]["tokens"] == len(data.response("yes")) * len(data.by_image[2])


# --- the pool ---------------------------------------------------------


def test_a_pool_step_is_the_objective_response_by_response(
    tiny_model: Any, tiny_checkpoint: Path, teacher: Path, data: VqaData, pools: Path, tmp_path: Path
) -> None:
    """Step 4: the middle of the stage at mask ratio 0.2, with responses of teacher and student."""
    plan = plan_for(teacher, tiny_checkpoint, data, pools, tmp_path)
    plan.prepare(tiny_model, 3)
    plan.prepare(tiny_model, 4)
    assert plan.masker.ratio == 0.2
    with torch.no_grad():  # the student has moved away from where it started
        for parameter in tiny_model.parameters():
            parameter.mul_(1.01)
    terms, figures = plan.loss(tiny_model, 4)

    rows = training.rows(data)[5 + 2 : 5 + 4]
    drawn = pool.load(pools / "1", "teacher")
    students = pool.load(tmp_path / "responses-1", "student")
    sources = {"student": tiny_model, "teacher": plan.teacher, "reference": training.load(tiny_checkpoint)}
    log_probs: dict[str, list[torch.Tensor]] = {name: [] for name in sources}
    flat, group_r, correct = [], [], []
    for group, (image, question) in enumerate((row.image, q) for row in rows for q in row.questions):
        prompt = data.prompt(data.question[question].question)
        merged = pool.merge(drawn[question], students[question])
        assert sum(r.count for r in merged) == 5
        for response in merged:
            for name, model in sources.items():
                log_probs[name].append(naive(model, data, image, prompt, response.ids))
            flat.append(response)
            group_r.append(group)
            correct.append(float(scorers.exact(data.text(response.ids), plan.reference[question])))
    assert 0 < sum(correct) < len(correct), "the case needs right and wrong responses"
    lengths = torch.tensor([len(r.ids) for r in flat])
    batch = objective.Batch(
        target_t=torch.tensor([token for r in flat for token in r.ids]),
        response_t=torch.arange(len(flat)).repeat_interleave(lengths),
        length_r=lengths,
        group_r=torch.tensor(group_r),
        groups=4,
        count_r=torch.tensor([float(r.count) for r in flat]),
        correct_r=torch.tensor(correct),
        mu_t=torch.tensor([value for r in flat for value in r.mu]),
    )
    dense = objective.dense_terms(
        torch.cat(log_probs["student"]),
        batch.target_t,
        torch.cat(log_probs["teacher"]).detach(),
        torch.cat(log_probs["reference"]).detach(),
    )
    expected = objective.masters(dense, batch, Objective())
    assert terms.item() == pytest.approx(expected.total.item(), abs=2e-5)
    for name, value in expected.figures.items():
        assert figures[name] == pytest.approx(value, abs=2e-5), name
    assert figures["mask_ratio"] == 0.2

    parameters = list(tiny_model.parameters())
    found, wanted = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
        )
        for loss in (terms, expected.total)
    )
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_stages(
    tiny_model: Any, tiny_checkpoint: Path, teacher: Path, data: VqaData, pools: Path, tmp_path: Path
) -> None:
    """Five rows in steps of two: three steps a stage; the mask is the stage's; the student answers anew."""
    plan = plan_for(teacher, tiny_checkpoint, data, pools, tmp_path)
    assert plan.steps == 9 and [step for step in range(9) if plan.is_boundary(step)] == [0, 3, 6]
    sparsity, drawn = [], []
    for step in range(9):
        plan.prepare(tiny_model, step)
        sparsity.append(plan.masker.sparsity)
        drawn.append(len(list(tmp_path.glob("responses-*/*.jsonl"))))
    assert sparsity == pytest.approx([0.4] * 3 + [0.2] * 3 + [0.0] * 3, abs=1e-3)
    assert drawn == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert tiny_model.training, "drawing must not leave the student in evaluation mode"


def test_a_mask_on_vision_changes_the_features(
    tiny_model: Any, tiny_checkpoint: Path, teacher: Path, data: VqaData, pools: Path, tmp_path: Path
) -> None:
    """What the teacher sees at a stage comes from the masked vision encoder, not from the full one."""
    plan = plan_for(teacher, tiny_checkpoint, data, pools, tmp_path, student_responses=0)
    plan.masker = Masker(plan.teacher, 0.4, (LANGUAGE, VISION))
    before = plan._teacher_features
    plan.prepare(tiny_model, 0)
    assert not any(map(torch.equal, plan._teacher_features.tokens, before.tokens))
    images = [row.image for row in training.rows(data)[:2]]
    place = [plan._place[image] for image in images]
    masked = data.encode(plan.teacher, images)
    torch.testing.assert_close(plan._teacher_features.select(place).tokens, masked.tokens)


def test_shares_of_the_gradient(
    tiny_model: Any, tiny_checkpoint: Path, teacher: Path, data: VqaData, pools: Path, tmp_path: Path
) -> None:
    shares = {}
    for name, switches in (("masters", Objective()), ("kd", Objective(rl=0.0, kl_beta=0.0))):
        plan = plan_for(teacher, tiny_checkpoint, data, pools, tmp_path / name, switches)
        plan.prepare(tiny_model, 0)
        figures = plan.loss(tiny_model, 0)[1]
        shares[name] = {key: value for key, value in figures.items() if key.startswith("grad_share_")}
        plan.prepare(tiny_model, 1)
        assert "grad_share_rl" not in plan.loss(tiny_model, 1)[1], "measured every few steps only"
    assert sum(shares["masters"].values()) == pytest.approx(1.0)
    assert shares["masters"]["grad_share_rl"] > 0
    names = ("divergence", "likelihood", "reference", "rl")
    assert shares["kd"] == {f"grad_share_{name}": float(name == "divergence") for name in names}


def test_without_the_students_half(
    tiny_model: Any, tiny_checkpoint: Path, teacher: Path, data: VqaData, pools: Path, tmp_path: Path
) -> None:
    plan = plan_for(teacher, tiny_checkpoint, data, pools, tmp_path, student_responses=0)
    plan.prepare(tiny_model, 0)
    assert plan.loss(tiny_model, 0)[0].isfinite() and not list(tmp_path.iterdir())


def test_a_question_whose_teacher_said_nothing(
    tiny_model: Any, tiny_checkpoint: Path, teacher: Path, data: VqaData, pools: Path, tmp_path: Path
) -> None:
    """Without any reference answer no response is right; the step goes on."""
    plan = plan_for(teacher, tiny_checkpoint, data, pools, tmp_path)
    plan.reference = dict.fromkeys(plan.reference, "")
    plan.prepare(tiny_model, 0)
    assert plan.loss(tiny_model, 0)[1]["r_acc"] == 0.0

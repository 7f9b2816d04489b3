"""The benchmark against TRL: every arm works on the same loss, and the bounds are those by hand."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.against import arm_generate, arm_loss, arm_ours, common, setup
from benchmarks.against.common import Shape
from distill.forward import tree
from distill.masks.teachers import Phase
from distill.training.learner import Context, FrozenModel
from distill.training.processes import Held
from distill.training.steps import PoolSteps

driver = importlib.import_module("benchmarks.distill")
SHAPE = Shape(40, 6, 9, 2, distinct=5)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    setup.make_models(directory, setup.TINY)
    setup.make_batch(directory, SHAPE)
    return directory


def models(work: Path) -> list[Any]:
    return [AutoModelForImageTextToText.from_pretrained(work / x) for x in (common.STUDENT, common.TEACHER)]


def our_gradient(work: Path, out: Path, sharing: str, merge: bool, tokens: int) -> torch.Tensor:
    student, teacher = models(work)
    batch = common.read(work)
    frozen = FrozenModel(Held(teacher.requires_grad_(False)), sharing=sharing)
    encoder: Any = arm_ours.Encoded(batch)
    phase: Any = Phase("bench", 0, 0.0, len(batch))
    steps = PoolSteps(
        [phase],
        lambda phase, model: arm_ours.questions(batch, merge),
        lambda phase: frozen,
        Context(encoder, arm_ours.SWITCHES, sharing=sharing),
        out,
        questions_per_step=len(batch),
        tokens_per_device=tokens,
    )
    arm_ours.gradient(student, steps, out / "gradient.pt")
    return flat(out / "gradient.pt")


def flat(path: Path) -> torch.Tensor:
    found = torch.load(path)
    return torch.cat([found[name].flatten() for name in sorted(found)]).double()


def plain_gradient(work: Path, out: Path) -> torch.Tensor:
    """The mean JSD of whole sequences one by one: the model's own forward, whole tensors."""
    student, teacher = models(work)
    batch = common.read(work)
    total = len(batch) * SHAPE.responses * SHAPE.response
    for asked in batch:
        for response in asked.responses:
            ids = torch.tensor([[*asked.ids, *response]])
            inputs = {
                "input_ids": ids,
                "pixel_values": asked.pixel_values,
                "image_grid_thw": asked.image_grid_thw,
                "mm_token_type_ids": (ids == student.config.image_token_id).long(),
            }
            places = slice(len(asked.ids) - 1, -1)
            log_q = student(**inputs).logits[0, places].log_softmax(-1)
            log_p = teacher(**inputs).logits[0, places].log_softmax(-1).detach()
            log_m = ((log_p.exp() + log_q.exp()) / 2).log()
            jsd_t = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
            (jsd_t.sum() / total).backward()
    common.save_gradient(out / "plain.pt", student.named_parameters())
    return flat(out / "plain.pt")


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def test_our_arm_trains_on_the_loss_it_says(work: Path, tmp_path: Path) -> None:
    """Tree, prefix and naive, duplicates merged and not, in one and in several micro-batches."""
    expected = plain_gradient(work, tmp_path)
    for sharing in tree.MODES:
        for merge in (True, False):
            for tokens in (60, 8192):
                assert apart(our_gradient(work, tmp_path, sharing, merge, tokens), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not driver.PEER.exists(), reason="benchmarks/.venv-trl is not made")
def test_trl_computes_the_same_gradient(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "trl.pt"
    script = Path(driver.__file__).parent / "against" / "arm_trl.py"
    command = [driver.PEER, script, work, "--gradient", out, "--batch", "4", "--threads", "1"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert apart(flat(out), our_gradient(work, tmp_path, "tree", True, 8192)) < 1e-4


def test_generation_arms_draw_the_same_greedy_tokens(work: Path) -> None:
    arms = arm_generate.Work(work)
    with torch.no_grad():
        assert arm_generate.agreement(arms) == 1.0
        greedy = arms.ours(greedy=True)
        assert len({tuple(ids) for ids in greedy}) > 1, "the questions have different answers"
        for drawn in (arms.ours(), arms.a_question(), arms.batched()):
            assert len(drawn) == 2 * 8 and {len(ids) for ids in drawn} == {SHAPE.response}


def test_loss_arms_compute_the_same() -> None:
    draw = torch.Generator().manual_seed(0)

    def run(case: str) -> tuple[float, torch.Tensor]:
        draw.manual_seed(0)
        some = [torch.nn.Parameter(torch.randn(n, 16, generator=draw)) for n in (20, 50, 20, 50)]
        value = arm_loss.CASES[case](8)(*some)
        value.backward()
        return value.item(), torch.cat([x.grad.flatten() for x in some[:2] if x.grad is not None])

    (plain, plain_gradient), (ours, our_gradient) = run("plain"), run("ours")
    assert ours == pytest.approx(plain, abs=1e-5)
    assert apart(our_gradient, plain_gradient) < 1e-4


def test_bounds_by_hand(work: Path) -> None:
    """P 40, R 6, G 8, 5 distinct: 8 sequences of 45 fed tokens; a tree of 40 + 5 x 5."""
    found = setup.bounds(work, SHAPE)
    assert found["tokens"] == 8 * 45 / 65
    student = models(work)[0]
    text = sum(p.numel() for p in student.model.language_model.layers.parameters())
    vision = sum(p.numel() for p in student.model.visual.parameters())
    assert found["weights"] == (360 * text + 8 * 36 * vision) / (65 * text + 36 * vision)


def test_the_table_compares_within_a_round() -> None:
    def run(arm: str, seconds: float) -> dict[str, Any]:
        own = {"batch": 8} if arm == "trl" else {"tokens": 2048, "sharing": "tree"}
        return {"arm": arm, "seconds": [seconds], "loaded_mib": 100.0, "peak_mib": 200.0, **own}

    rounds = [
        {"trl": run("trl", t), "ours": run("ours", o)} for t, o in ((8.0, 2.0), (30.0, 5.0), (10.0, 2.0))
    ]
    bounds = {8: {"tokens": 10.0, "weights": 12.0}}
    agreement = [{"cosine": 0.9999, "length": 1.0, "distinct": 8}]
    shape = {"prompt": 40, "response": 7, "image": 9, "questions": 4, "responses": 8, "distinct": 8}
    lines = driver.training_table(
        [{"shape": shape, "rounds": rounds, "bounds": bounds, "agreement": agreement}]
    )
    assert lines[2] == "| (40, 7) | trl | 0.40 | 1.00 / **1.00** / 1.00 | | | 200 (100) | batch 8 |"
    assert lines[3] == (
        "| (40, 7) | ours | 2.00 | 4.00 / **5.00** / 6.00 | 10.00 (12.00) | 50% | 200 (100) "
        "| sharing tree tokens 2048 |"
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_an_arm_reports_steps_after_the_warm_up_only(capsys: pytest.CaptureFixture[str]) -> None:
    record = common.Record(2)
    record.start()
    for loss in (1.0, 2.0, 3.0, 4.0):
        record.step(loss)
    record.finish(arm="x")
    found = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert found["losses"] == [3.0, 4.0] and len(found["seconds"]) == 2
    assert found["peak_mib"] >= found["loaded_mib"] > 50 and found["arm"] == "x"

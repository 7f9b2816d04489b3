"""Ablations: what arms change, a tiny one from nothing to its report, resumed; differences told honestly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill import recipe, strict
from distill.ablation import ablate, ablate_arms, ablate_page, ablate_report
from distill.ablation.ablate_arms import Comparison, Settings
from distill.ablation.ablate_jobs import RESULT, Place
from distill.ablation.ablate_report import ArmResult, Compared, Results
from distill.recipe import Recipe
from evals import paired
from runtime.errors import InputError, StateError

DIGITS = recipe.read(Path("digits"))
SHIPPED = ablate_arms.settings_for(DIGITS)


# --- arms -------------------------------------------------------------


def made_of(plan: Recipe, name: str, **more: Any) -> Recipe:
    return ablate_arms.recipe_of(plan, ablate_arms.arms(plan, SHIPPED)[name], 3, **more)


def test_the_shipped_recipe_allows_every_comparison() -> None:
    assert SHIPPED.made is not None
    known = ablate_arms.arms(DIGITS, SHIPPED)
    for one in ablate_arms.comparisons(SHIPPED):
        assert ablate_arms.left_out(DIGITS, one) == ""
        assert {one.reference, one.candidate} <= set(known)
    for name in known:
        made_of(DIGITS, name)  # every arm is a valid recipe


def test_an_arm_differs_in_what_it_says() -> None:
    base = made_of(DIGITS, "masters")
    assert (base.seed, len(base.teachers), base.teachers[0]) == (3, 1, DIGITS.teachers[-1])
    assert len(made_of(DIGITS, "growth").teachers) == 2
    control = made_of(DIGITS, "control").objective.switches
    assert (control.rl, control.kl_beta) == (0, 0)
    assert control.divergence == base.objective.switches.divergence
    assert made_of(DIGITS, "r-acc").objective.switches.distill_weight == 0
    mix = made_of(DIGITS, "all-student").pool
    assert (mix.teacher_responses, mix.student_responses) == (0, 8)
    assert made_of(DIGITS, "masters", rate=0.5).train.lr == 0.5


def test_without_masks_the_stages_are_the_same_and_no_weight_is_masked(tiny_checkpoint: Path) -> None:
    from distill import models
    from distill.masks import masking, teachers

    masked, plain = made_of(DIGITS, "control").teachers, made_of(DIGITS, "naive").teachers
    assert masked[0].mask is not None and plain[0].mask is not None
    phases = [teachers.phases(each, [each[0].mask.largest], 900) for each in (masked, plain)]  # type: ignore[union-attr]
    assert [p.questions for p in phases[0]] == [p.questions for p in phases[1]]
    teacher = models.load(recipe.Model(checkpoint=str(tiny_checkpoint)))
    masker = masking.Masker(teacher, plain[0].mask.largest)
    masker.set(max(phase.ratio for phase in phases[1]))
    assert masker.ratio > 0 and masker.sparsity == 0


def test_r_distill_alone_is_r_distill_alone() -> None:
    import torch

    from distill.losses import rewards

    switches, base = made_of(DIGITS, "r-distill").objective.switches, DIGITS.objective.switches
    correct, close = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.2, 1.0, 0.0, 0.7])
    group, count = torch.zeros(4, dtype=torch.long), torch.ones(4)
    assert not switches.gate
    found, _ = rewards.advantages(
        correct + switches.distill_weight * close, count, group, 1, switches.std_floor
    )
    wanted, _ = rewards.advantages(close, count, group, 1, base.std_floor)
    assert torch.allclose(found, wanted, atol=5e-3)


def test_what_a_recipe_cannot_compare_is_left_out_with_a_reason() -> None:
    raw = DIGITS.model_dump(mode="json")
    raw["teachers"] = raw["teachers"][-1:]
    raw["teachers"][0]["mask"] = None
    raw["data"]["train"][0]["labels"] = 100
    plan = Recipe.model_validate(raw)
    found = ablate_arms.needed(plan, Settings(), list(ablate_arms.EXPERIMENTS), 4)
    assert {one.experiment for one in found.comparisons} == {"rewards", "mix"}
    assert "one teacher" in found.left_out["growth: growth"]
    assert "never masked" in found.left_out["masking: masters"]
    assert "reference" in found.left_out["mix: all-student"]


def test_seeds_go_where_they_decide() -> None:
    found = ablate_arms.needed(DIGITS, SHIPPED, list(ablate_arms.EXPERIMENTS), 8).seeds
    assert {found[name] for name in ("masters", "control", "naive", "unmasked")} == {8}
    assert {found[name] for name in ("r-acc", "growth", "all-student", "labels")} == {3}
    with pytest.raises(InputError, match="unknown experiment maskin; did you mean masking"):
        ablate_arms.needed(DIGITS, SHIPPED, ["maskin"], 8)


# --- a whole one ------------------------------------------------------

SMALL = (
    "data.train.0.limit=30", "data.validation.0.limit=10", "pool.shard=10", "pool.engine.rows=8",
    "teachers.0.mask.stages=2", "teachers.1.mask.stages=2", "teachers.1.mask.gate=null",
    "pool.sampling.max_new_tokens=5", "train.questions_per_step=10", "train.warmup_steps=1",
)  # fmt: skip


def small() -> tuple[Recipe, Settings]:
    raw = SHIPPED.model_dump(mode="json")
    raw |= {"seeds": 2, "exploratory_seeds": 1, "r_max": [0.4], "rates": {"masters": [1e-3, 2e-3]}}
    raw["test"][0]["limit"] = 20
    raw["labels_only"] = {"steps": 2, "questions": 10, "lr": 1e-3}
    for model in raw["made"]["models"].values():
        model["sizes"] = raw["made"]["models"]["student"]["sizes"]
        model["train"] = {"steps": 2, "questions": 10, "lr": 1e-3}
        model["labels"]["limit"] = 40
    plan = strict.override(DIGITS.model_dump(mode="json"), SMALL)
    return strict.validate(Recipe, plan, "small"), strict.validate(Settings, raw, "small")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("ablation")
    patch = pytest.MonkeyPatch()
    patch.setenv("POCKETVLM_CACHE", str(root / "cache"))
    run(root / "out", ("rewards", "growth"))
    yield root / "out"
    patch.undo()


def run(out: Path, experiments: tuple[str, ...], **more: Any) -> tuple[Path, str]:
    console = Console(record=True, width=200, file=(out.parent / "console.txt").open("a"))
    plan, settings = small()
    found = ablate.run(
        more.pop("plan", plan), out, console=console, settings=settings, experiments=experiments, workers=1,
        **more,
    )  # fmt: skip
    return found, console.export_text()


def results(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): path.read_text() for path in sorted(out.glob(f"**/{RESULT}"))}


def test_an_ablation_from_nothing_to_its_report(whole: Path) -> None:
    found = json.loads((whole / "report" / "results.json").read_text())
    arms = found["arms"]
    assert {name: len(arm["seeds"]) for name, arm in arms.items()} == {
        "masters": 2, "control": 2, "r-acc": 1, "r-distill": 1, "growth": 1, "labels": 1
    }  # fmt: skip
    assert [rate for rate, _ in found["rates"]["masters"]] == [1e-3, 2e-3]
    chosen = max(found["rates"]["masters"], key=lambda tried: (tried[1], -tried[0]))[0]
    assert arms["masters"]["rate"] == arms["growth"]["rate"] == chosen
    assert arms["control"]["rate"] == DIGITS.train.lr and arms["labels"]["rate"] == 1e-3
    assert len(found["baselines"]["student"]) == 2 and len(found["baselines"]["teacher"]) == 1
    assert arms["control"]["means"]["grad_share_rl"] == 0 == arms["control"]["means"]["grad_share_reference"]
    [main] = [one for one in found["compared"] if one["comparison"]["main"]]
    pairs = zip(arms["control"]["accuracy"], arms["masters"]["accuracy"], strict=True)
    assert main["differences"] == pytest.approx([after - before for before, after in pairs])
    growth = json.loads((whole / "seed-10" / "growth" / "metrics.json").read_text())
    assert {phase["teacher"] for phase in growth["phases"]} == {0, 1}


def test_the_page_is_one_file_and_the_markdown_has_the_same_figures(whole: Path) -> None:
    page = (whole / "report" / "index.html").read_text()
    text = (whole / "report" / "ablation.md").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    found = json.loads((whole / "report" / "results.json").read_text())
    for sentence in found["verdict"]:
        assert sentence in text
    for question in (ablate_arms.EXPERIMENTS["rewards"], ablate_arms.EXPERIMENTS["growth"]):
        assert question in page and question in text
    assert ablate_arms.EXPERIMENTS["masking"] not in text


def test_arms_of_a_seed_share_pools_and_students(whole: Path) -> None:
    pools = sorted(path.name for path in (whole / "seed-11" / "shared" / "pool").iterdir())
    assert len(pools) == 2  # the large teacher at two ratios, drawn once for Masters and its control
    first = [
        json.loads((whole / "seed-11" / arm / "metrics.json").read_text()) for arm in ("masters", "control")
    ]
    teacher = [[line for line in one["pool"] if line["source"] == "teacher"] for one in first]
    assert teacher[0] == teacher[1]


def test_a_lost_result_is_made_again_and_nothing_else(whole: Path) -> None:
    before = results(whole)
    lost = whole / "seed-11" / "control" / RESULT
    lost.unlink()
    _, said = run(whole, ("rewards", "growth"))
    assert said.count("%") == 1 and "control, seed 1" in said
    after = results(whole)
    assert before.keys() == after.keys()
    for name in before:
        old, new = json.loads(before[name]), json.loads(after[name])
        old.pop("cpu_seconds"), new.pop("cpu_seconds")
        assert old == new, name


def test_another_recipe_is_refused(whole: Path) -> None:
    plan, _ = small()
    other = plan.model_copy(update={"train": plan.train.model_copy(update={"lr": 1e-4})})
    with pytest.raises(StateError, match=r"train\.lr"):
        run(whole, ("rewards",), plan=other)


# --- telling ----------------------------------------------------------


def told(reference: list[float], candidate: list[float], *, main: bool = True) -> Results:
    def arm(name: str, values: list[float]) -> ArmResult:
        seeds = tuple(range(len(values)))
        return ArmResult(name, name.title(), "masters", (), 1e-3, seeds, tuple(values), 0.5, 10.0, 1.0, {})

    compared = Compared(
        Comparison("rewards", "control", "masters", main),
        paired.compare(reference, candidate),
        tuple(b - a for a, b in zip(reference, candidate, strict=True)),
    )
    arms = {"control": arm("control", reference), "masters": arm("masters", candidate)}
    return Results(
        "told", "2026-01-01T00:00:00", "0", 100, {"teacher": [0.9], "student": reference}, arms, [compared],
        {}, {"growth: growth": "the recipe has one teacher"}, [], [], None,
        [ablate_report.sentence(compared, arms)],
    )  # fmt: skip


LOW = [0.70, 0.71, 0.69, 0.72, 0.70, 0.71, 0.69, 0.70]


def test_noise_is_called_noise_with_what_could_have_been_seen() -> None:
    found = told(LOW, [0.71, 0.70, 0.70, 0.71, 0.71, 0.70, 0.70, 0.69])
    [sentence] = found.verdict
    assert "cannot be told from Control" in sentence and "are noise" in sentence
    assert f"{100 * found.compared[0].found.detectable:.1f} points would have shown" in sentence  # type: ignore[operator]
    assert "no difference beyond noise" in ablate_report.headline(found)
    page = ablate_page.render(found)
    assert ">noise" in page and 'class="good"' not in page
    assert "the recipe has one teacher" in page and "| noise |" in ablate_report.markdown(found)


def test_a_difference_says_its_direction() -> None:
    higher = [value + 0.03 + 0.001 * (i % 3) for i, value in enumerate(LOW)]
    better, worse = told(LOW, higher), told(higher, LOW)
    assert "Masters beats Control: +3.1 points" in better.verdict[0]
    assert "so in 8 of them, sign-flip p = 0.008" in better.verdict[0]
    assert "Masters is worse than Control" in worse.verdict[0] and "in 8 of them" in worse.verdict[0]
    assert "beats the same pool" in ablate_report.headline(better)
    assert "is below the same pool" in ablate_report.headline(worse)
    assert 'class="good">better' in ablate_page.render(better)


def test_one_seed_says_nothing() -> None:
    found = told([0.5], [0.9], main=False)
    assert "which says nothing" in found.verdict[0]
    assert "noise, exploratory" in ablate_report.markdown(found)


def test_a_user_s_recipe_has_the_defaults() -> None:
    plan = DIGITS.model_copy(update={"name": "mine"})
    assert ablate_arms.settings_for(plan) == Settings()
    place = Place(Path("out"), plan, Settings())
    assert place.with_models(0) == plan and place.test == plan.data.validation

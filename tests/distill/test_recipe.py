"""Recipes: what is refused, what is said then, and which changes a directory survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import recipe
from distill.demo import demo_recipe
from distill.masks import masking
from distill.settings import Gate, Mask
from runtime.errors import InputError, StateError

SHIPPED = sorted(path for path in recipe.RECIPES.glob("*.yaml") if path.stem != "demo")


@pytest.fixture
def raw() -> dict[str, Any]:
    return {
        "name": "small",
        "student": {"checkpoint": "student"},
        "teachers": [
            {"checkpoint": "middle", "mask": {"r_max": 0.2, "step": 0.05, "gate": None}},
            {"checkpoint": "large", "mask": None},
        ],
        "data": {"train": [{"format": "easy-vqa", "split": "train"}]},
    }


@pytest.fixture
def path(tmp_path: Path, raw: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def refused(path: Path, *settings: str) -> str:
    with pytest.raises(InputError) as caught:
        recipe.read(path, settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_one(shipped: Path) -> None:
    assert recipe.read(Path(shipped.stem)) == recipe.read(shipped)


def test_the_four_families_of_the_paper_ship() -> None:
    found = {path.stem for path in SHIPPED}
    assert {"qwen2.5-vl", "qwen3-vl", "internvl3", "internvl3.5", "easy-vqa"} <= found
    grown = recipe.read(Path("internvl3.5"))
    assert [teacher.mask and teacher.mask.r_max for teacher in grown.teachers] == [0.4, 0.2]
    native = {"internvl3": "-hf", "internvl3.5": "-HF"}
    for name, end in native.items():
        models = recipe.read(Path(name))
        assert all(each.checkpoint.endswith(end) for each in (models.student, *models.teachers))


def test_an_absent_recipe_is_told_with_those_that_ship() -> None:
    assert "easy-vqa" in refused(Path("easy-vqaa"))


def test_the_defaults_are_the_papers(path: Path) -> None:
    found = recipe.read(path)
    assert (found.pool.teacher_responses, found.pool.student_responses) == (4, 4)
    drawn = found.pool.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.repetition_penalty) == (1.0, 0.9, 50, 1.05)
    assert (found.train.lr, found.train.optimizer, found.train.schedule) == (1e-6, "adamw", "constant")
    assert found.objective.switches.kl_beta == 0.1
    assert found.judge.kind == "rule" and found.pool.engine_of_student.kind == "hf"


# --- unknown keys and wrong values ------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lrr=1e-6", "train.lrr: unknown key; did you mean lr?"),
        ("teachers.0.mask.rmax=0.4", "teachers.0.mask.rmax: unknown key; did you mean r_max?"),
        ("train.max_new_tokens=9", "did you mean pool.sampling.max_new_tokens?"),
        ("pool.engine={kind: openai, comand: x}", "pool.engine.comand: unknown key; did you mean command?"),
        ("zzz=1", "zzz: unknown key; known here: name, seed"),
        ("seed=true", "seed: wanted a valid integer, got True"),
        ("teachers.0.mask.r_max=lots", "teachers.0.mask.r_max: wanted 'auto' or a valid number"),
        ("train.lr=fast", "train.lr: wanted a valid number"),
        ("data.train.0.format=csv", "data.train.0.format: wanted 'conversations', 'llava'"),
        ("data.train.0.labels=-1", "data.train.0.labels:"),
        ("objective.preset=robost", "objective.preset: 'robost' is unknown; did you mean 'robust'?"),
        ("objective.change.kl_bta=0", "objective.change: 'kl_bta' is unknown; did you mean 'kl_beta'?"),
        ("objective.change.kl_beta=high", "objective.change.kl_beta: got 'high', the preset has 0.1"),
        ("objective.change.gate=1", "objective.change.gate: got 1, the preset has True"),
        ("name=null", "name: wanted a valid string"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_its_place(path: Path, setting: str, said: str) -> None:
    text = refused(path, setting)
    assert text.startswith(f"{path}: ") and said in text


def test_a_missing_key_is_named(path: Path, raw: dict[str, Any]) -> None:
    del raw["student"]
    path.write_text(yaml.safe_dump(raw))
    assert "student: this key is missing" in refused(path)


def test_a_key_that_stands_twice_is_refused(path: Path) -> None:
    path.write_text(path.read_text() + "\nseed: 1\nseed: 2\n")
    assert "the key seed stands twice" in refused(path)


def test_no_yaml_and_no_mapping_are_refused(path: Path) -> None:
    path.write_text("a: [")
    assert "cannot be read as YAML" in refused(path)
    path.write_text("- a")
    assert "wanted a mapping" in refused(path)


# --- overrides --------------------------------------------------------


def test_overrides_reach_lists_and_make_sections(path: Path) -> None:
    found = recipe.read(
        path,
        ["train.lr=2e-6", "teachers.0.mask.r_max=0.4", "train.lora.rank=8", "teachers.1.mask=null", "seed=3"],
    )
    assert found.train.lr == 2e-6 and found.seed == 3
    assert found.teachers[0].mask is not None and found.teachers[0].mask.r_max == 0.4
    assert found.train.lora is not None and found.train.lora.rank == 8
    assert found.sha256 != recipe.read(path).sha256


def test_a_later_override_wins(path: Path) -> None:
    assert recipe.read(path, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lr", "wanted key.path=value"),
        ("=1", "wanted key.path=value"),
        ("teachers.2.weight=1", "2 is no index of a list of 2"),
        ("teachers.first.weight=1", "first is no index"),
        ("name.x=1", "there is no x in 'small'"),
        ("train.lr=[", "the value is no YAML"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(path: Path, setting: str, said: str) -> None:
    assert said in refused(path, setting)


def test_exponents_are_numbers(path: Path) -> None:
    """YAML 1.1 reads 1e-6 as text; a switch of the objective has no other type to say so."""
    assert recipe.read(path, ["objective.change.kl_beta=1e-2"]).objective.switches.kl_beta == 0.01


# --- between sections -------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["pool.teacher_responses=1", "pool.student_responses=0"],
            "one response a question has no advantage",
        ),
        (["pool.teacher_responses=0", "pool.student_responses=0"], "are both 0"),
        (
            ["data.train.0.labels=10", "pool.teacher_responses=0"],
            "the pseudo label is the teacher's majority",
        ),
        (["pool.engine={kind: openai}"], "needs command or url"),
        (["pool.engine={kind: openai, command: serve}"], "must contain {checkpoint} and {port}"),
        (["pool.engine={kind: openai, url: x, command: 'a {checkpoint} {port}'}"], "not both"),
        (["pool.engine={kind: openai, url: x}"], "one fixed set of weights"),
        (["pool.engine={kind: openai, url: x}", "teachers.0.mask=null"], "cannot serve several teachers"),
        (["pool.student_engine={kind: openai, url: x}"], "the student's change with every stage"),
        (["teachers.0.mask.r_max=auto"], "r_max auto is chosen by the gate"),
        (["teachers.0.mask={r_max: 0.2}"], "data.validation is empty"),
        (["teachers.0.mask.gate={ratios: [0.1, 0.2]}"], "begin with 0"),
        (["teachers.0.mask.step=0.15"], "is no multiple of step"),
        (["teachers.0.mask={r_max: 0.2, step: 0.1, stages: 3, gate: null}"], "step or stages"),
        (["teachers.0.mask={r_max: 0.2, stages: 1, gate: null}"], "restore: false"),
        (["train.patience=2"], "an early stop needs data.validation"),
        (["data.train=[]"], "data.train"),
        (["data.train.0={format: tsv}"], "format tsv needs a path"),
        (["data.train.0.path=x"], "ships with a package"),
        (["data.train.0={format: digits}"], "needs a split"),
        (["objective.preset=prue"], "never restored"),
        (["objective.preset=mt_kd"], "no growth order"),
        (["objective.preset=mt_kd", "teachers=[{checkpoint: a, mask: null}]"], "the recipe has one"),
        (["judge={kind: model, by: server}"], "needs command"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(path: Path, settings: list[str], said: str) -> None:
    assert said in refused(path, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["pool.teacher_responses=1", "pool.student_responses=0", "objective.preset=kd_forward"],
        ["objective.preset=prue", "teachers.0.mask={r_max: 0.3, restore: false, gate: null}"],
        ["objective.preset=mt_kd", "teachers.0.mask=null", "teachers.0.weight=2"],
        ["pool.student_engine={kind: openai, url: x}", "pool.student_refresh=never"],
        ["judge={kind: model, by: server, url: http://x}"],
    ],
)
def test_neighbours_of_the_method_are_recipes_too(path: Path, settings: list[str]) -> None:
    recipe.read(path, settings)


def test_stages_follow_the_schedule(path: Path) -> None:
    mask = recipe.read(path).teachers[0].mask
    assert mask is not None
    assert (mask.largest, mask.stages_at(0.2), mask.stages_at(0.0)) == (0.2, 5, 1)
    stepped = Mask(step=0.1, gate=Gate(ratios=(0.0, 0.25, 0.5)))
    assert stepped.stages_at(0.25) == len(masking.schedule(0.25, 0.1)) == 4


def test_memory_for_a_mask_is_that_of_its_gate() -> None:
    assert Mask(r_max=0.2, gate=Gate(ratios=(0.0, 0.5))).asked == 0.5
    assert Mask(r_max=0.2, gate=None).asked == 0.2


def test_rules_say_which_tensors_a_mask_touches() -> None:
    settings = {
        "rules": [{"tensors": "*.down_proj.weight", "scale": 0.5}, {"tensors": "*.0.*", "scale": None}]
    }
    assert [rule.scale for rule in Mask.model_validate(settings).rules] == [0.5, None]
    assert Mask.model_validate(settings).touches != Mask().touches, "another pool, another gate"


# --- claiming ---------------------------------------------------------


def test_a_changed_recipe_is_refused_with_the_difference(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe.claim(out, recipe.read(path))
    (out / "pool").mkdir()
    changed = recipe.read(path, ["teachers.0.mask.r_max=0.4", "train.lr=2e-6"])
    with pytest.raises(StateError) as caught:
        recipe.claim(out, changed)
    text = str(caught.value)
    assert "teachers.0.mask.r_max: there 0.2, now 0.4" in text and "train.lr: there 1e-06, now 2e-06" in text
    recipe.claim(out, recipe.read(path))


def test_what_a_resumed_run_may_change(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = recipe.read(path)
    recipe.claim(out, before)
    (out / "pool").mkdir()
    again = ["train.trackers=[tensorboard]", "train.save_every=5", "train.tokens_per_device=512"]
    after = recipe.read(path, again)
    assert after.sha256 == before.sha256
    recipe.claim(out, after)
    assert '"save_every": 5' in (out / "recipe.json").read_text()
    with pytest.raises(StateError, match=r"limit: there None, now 8"):
        recipe.claim(out, after, limit=8)


def test_a_directory_in_which_nothing_was_made_is_taken_over(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe.claim(out, recipe.read(path))
    recipe.claim(out, recipe.read(path, ["seed=1"]))


def test_every_key_that_may_change_exists(path: Path) -> None:
    known = set(recipe.Recipe.model_fields)
    assert {key.split(".")[0] for key in recipe.MAY_CHANGE} <= known
    train = {key.split(".")[1] for key in recipe.MAY_CHANGE if key.startswith("train.")}
    assert train <= set(recipe.Train.model_fields)


# --- the demo's recipe reads as strictly ------------------------------


def test_the_demos_recipe_shares_the_reader(tmp_path: Path) -> None:
    demo = demo_recipe.RECIPES / "demo.yaml"
    path = tmp_path / "demo.yaml"
    path.write_text(demo.read_text().replace("validation_images", "validation_image", 1))
    with pytest.raises(InputError, match=r"data\.validation_image: unknown key; did you mean validation_im"):
        demo_recipe.read(path)

"""Checkpoints that cannot be distilled are refused from their files alone; padded vocabularies are fine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill import checks
from distill.recipe import Recipe
from runtime.errors import CheckpointError
from tests.checkpoints import FAMILIES


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = FAMILIES["qwen3_vl"](tmp_path_factory.mktemp("checks") / "student")
    for weights in directory.glob("*.safetensors"):
        weights.unlink()  # nothing here may need them
    return directory


@pytest.fixture
def teacher(student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student, tmp_path / "teacher"))


def recipe(student: Path | str, teacher: Path | str, *, mask: dict[str, Any] | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "checked",
            "student": {"checkpoint": str(student)},
            "teachers": [{"checkpoint": str(teacher), "mask": mask}],
            "data": {"train": [{"format": "easy-vqa", "split": "train"}]},
        }
    )


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def refused(found: Recipe) -> str:
    with pytest.raises(CheckpointError) as caught:
        checks.check(found)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_family_passes_without_weights(student: Path, teacher: Path) -> None:
    found = checks.check(recipe(student, teacher, mask={"r_max": 0.4, "gate": None}))
    assert found.student.name == str(student) and found.tokens <= found.student.vocabulary


def test_a_vocabulary_padded_differently_works(student: Path, teacher: Path) -> None:
    def pad(config: dict[str, Any]) -> None:
        config["text_config"]["vocab_size"] += 128

    edit(teacher / "config.json", pad)
    found = checks.check(recipe(student, teacher))
    assert found.teachers[0].vocabulary == found.student.vocabulary + 128
    assert found.tokens <= found.student.vocabulary


def test_different_tokenizers_are_told_by_their_first_difference(student: Path, teacher: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        by_id = sorted(vocabulary, key=vocabulary.__getitem__)
        a, b = by_id[100], by_id[101]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    edit(teacher / "tokenizer.json", swap)
    text = refused(recipe(student, teacher))
    assert "different tokenizers: id 10" in text and str(student) in text and str(teacher) in text


def test_equal_vocabularies_with_other_rules_are_different(student: Path, teacher: Path) -> None:
    edit(teacher / "tokenizer.json", lambda tokenizer: tokenizer["model"].update(merges=[]))
    assert "The answer is 3.14" in refused(recipe(student, teacher))


def test_a_head_smaller_than_its_tokenizer_is_refused(student: Path, teacher: Path) -> None:
    edit(teacher / "config.json", lambda config: config["text_config"].update(vocab_size=100))
    assert "its head has 100 rows" in refused(recipe(student, teacher))


def test_a_quantised_teacher_is_refused_a_mask_and_only_that(student: Path, teacher: Path) -> None:
    edit(teacher / "config.json", lambda config: config.update(quantization_config={"quant_method": "awq"}))
    text = refused(recipe(student, teacher, mask={"r_max": 0.2, "gate": None}))
    assert "quantised teacher (awq) cannot be masked" in text and "teachers.0.mask: null" in text
    assert checks.check(recipe(student, teacher)).teachers[0].quantised == "awq"
    assert "the student is quantised (awq)" in refused(recipe(teacher, student))


def test_a_repository_that_needs_its_authors_code_names_the_twin(student: Path, teacher: Path) -> None:
    def original(config: dict[str, Any]) -> None:
        config.update(model_type="other_chat", auto_map={"AutoModel": "modeling_other_chat.OtherChat"})
        config["_name_or_path"] = "Maker/Model-8B"

    edit(teacher / "config.json", original)
    (teacher / "modeling_other_chat.py").write_text("raise SystemExit('this must never run')")
    text = refused(recipe(student, teacher))
    assert "'other_chat' needs its authors' code" in text and "Maker/Model-8B-HF (or -hf)" in text


def test_an_unknown_model_type_is_told(student: Path, teacher: Path) -> None:
    edit(teacher / "config.json", lambda config: config.update(model_type="future_vl"))
    assert "does not know model_type 'future_vl'" in refused(recipe(student, teacher))


def test_a_language_model_is_no_teacher(student: Path, teacher: Path) -> None:
    (teacher / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert "takes no images and text together" in refused(recipe(student, teacher))


def test_no_checkpoint_at_all(student: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(recipe(student, tmp_path / "empty"))
    assert "no config.json); there is no such directory here" in refused(recipe(student, tmp_path / "absent"))
    assert "`pocketvlm demo` makes it" in refused(recipe(student, "demo-out/work/none"))
    assert "neither a local directory nor a repository" in refused(recipe(student, "nobody/nothing"))

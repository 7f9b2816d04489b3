"""Variants: which a task can have, that they are held out, and that the answer stays the same."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.asking.eval_results import Variant
from evals.tasks import builtin
from evals.tasks.question import Question, Task, given, opened, picture_sha256
from evals.variants import variants
from runtime.errors import InputError


def task(format_name: str = "vlmevalkit-tsv", **changes: object) -> Task:
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    pictures = (file.getvalue(),)
    question = Question(
        "1", "g", "what is it?", "what is it?\nA. this\nB. that", pictures, ("A",), ("this", "that")
    )
    plain = Task("small", format_name, "test", "made here", (question, replace(question, id="2")), "choice")
    return replace(plain, **changes)  # type: ignore[arg-type]


def names(asked: str | list[str], of: Task) -> list[str]:
    return [one.name for one in variants.parse(asked, of)]


def test_names_choose_families_and_severities() -> None:
    assert names("blur-3", task()) == ["blur-3"]
    assert names(" rotation-5 , blur,blur-2", task()) == [*(f"blur-{n}" for n in range(1, 6)), "rotation-5"]
    assert names("quick", task()) == ["wording-1", "blur-3", "noise-3", "jpeg-3", "contrast-3", "rotation-3"]
    every = names("all", task())
    assert len(every) == 2 + 5 * 5 and len(names("all", task("digits"))) == len(every) + 5 + 4
    assert names(["noise-1", "wording"], task()) == ["wording-1", "wording-2", "noise-1"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("blurr", "did you mean blur"),
        ("blur-6", "unknown"),
        ("blur-0", "unknown"),
        (" , ", "names none"),
        ("smaller", "only easy-vqa and digits know where their objects are"),
        ("wording=nowhere.jsonl", "cannot be read"),
    ],
)
def test_a_variant_that_cannot_be_is_refused_with_the_reason(asked: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        variants.parse(asked, task())


def test_a_task_without_pictures_has_only_wordings() -> None:
    bare = task(questions=tuple(replace(one, images=()) for one in task().questions))
    assert names("all", bare) == ["wording-1", "wording-2"]
    with pytest.raises(InputError, match="no pictures"):
        variants.parse("noise", bare)
    assert {one.what for one in variants.missing(bare)} == {
        f"variant {name}" for name in ("blur", "noise", "jpeg", "contrast", "rotation", "smaller", "larger")
    }


def test_a_variant_changes_one_thing() -> None:
    plain = task()
    for variant in variants.parse("all", plain):
        changed = variants.apply(plain, variant)
        assert [one.id for one in changed.questions] == ["1", "2"]
        for before, after in zip(plain.questions, changed.questions, strict=True):
            kept = replace(after, prompt=before.prompt, images=before.images)
            assert kept == before
            assert (after.prompt != before.prompt) == (variant.family == "wording")
            if variant.family == "wording":
                assert before.prompt in after.prompt
            else:
                assert picture_sha256(after.images[0]) != picture_sha256(before.images[0])
                assert opened(after.images[0]).size == (64, 48)
        assert changed.sha256 != plain.sha256


def test_every_time_the_same_and_for_every_picture_another() -> None:
    plain = task()
    (variant,) = variants.parse("noise-2", plain)
    first, again = (variants.apply(plain, variant).questions[0].images[0] for _ in "ab")
    assert given(first) == given(again)
    in_memory = opened(plain.questions[0].images[0])
    moved = replace(plain.questions[0], images=(in_memory, in_memory.rotate(180)))
    two = variants.apply(replace(plain, questions=(moved,)), variant).questions[0].images
    noises = [np.asarray(opened(two[i])).astype(int) - np.asarray(moved.images[i]) for i in (0, 1)]  # type: ignore[arg-type]
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.9


def test_unknown_variants_of_a_file_are_refused() -> None:
    with pytest.raises(InputError, match="fog-1: unknown"):
        variants.apply(task(), Variant(name="fog-1", family="fog", severity=1))
    with pytest.raises(InputError, match="larger-5: unknown"):
        variants.apply(task("digits"), Variant(name="larger-5", family="larger", severity=5))


# --- own wordings -----------------------------------------------------


def test_own_wordings_come_by_id_or_by_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"id": "2", "wording": "which one?"}) + "\n\n")
    (variant,) = variants.parse(f"wording={path}", task())
    changed = variants.apply(task(), variant)
    assert [(one.id, one.prompt) for one in changed.questions] == [("2", "which one?\nA. this\nB. that")]
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"question": "what is it?", "wording": "say it"}))
    (variant,) = variants.parse(f"wording={path}", task())
    assert [one.question for one in variants.apply(task(), variant).questions] == ["say it"] * 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{}", "1: no wording"),
        ("[1]", "1: no wording"),
        ("nonsense", "1: no wording"),
        ('{"id": "1", "wording": ""}', "expected a text"),
        ('{"id": "1", "wording": 5}', "expected a text"),
        ("", "has no wording"),
    ],
)
def test_a_bad_wording_names_its_line(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=says):
        variants.parse(f"wording={path}", task())


def test_wordings_for_other_questions_leave_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "77", "wording": "what?"}')
    with pytest.raises(InputError, match="no wording for any question"):
        variants.apply(task(), variants.parse(f"wording={path}", task())[0])


def test_a_prompt_without_its_question_cannot_be_reworded(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "1", "wording": "what?"}')
    strange = task(questions=(replace(task().questions[0], prompt="choose!"),))
    with pytest.raises(InputError, match="question 1: its prompt does not hold"):
        variants.apply(strange, variants.parse(f"wording={path}", strange)[0])


# --- the built-in tasks -----------------------------------------------


def words(texts: set[str]) -> set[str]:
    return {word for text in texts for word in re.findall("[a-z]+", text)}


@pytest.fixture(scope="module")
def easy() -> Task:
    pytest.importorskip("easy_vqa")
    return builtin.load("easy-vqa", "test")


def test_easy_vqa_wordings_are_held_out_and_mean_the_same(easy: Task) -> None:
    from evals import easy_vqa

    known = {one.question for split in ("train", "test") for one in easy_vqa.load(split)}
    terms = {*easy_vqa.COLOURS, *easy_vqa.SHAPES}
    for severity in (1, 2):
        (variant,) = variants.parse(f"wording-{severity}", easy)
        changed = variants.apply(easy, variant).questions
        texts = {one.question for one in changed}
        assert not texts & known
        assert (words(texts) <= words(known)) == (severity == 1)
        for before, after in zip(easy.questions, changed, strict=True):
            assert terms & words({before.question}) == terms & words({after.question})
            no = {"no", "not", "absent", "without", "lack"}
            assert bool(no & words({before.question})) == bool(no & words({after.question})), after.question
            assert after.prompt == after.question
            asks = {"color", "painted"} & words({after.question}) - terms
            if before.question.startswith("what color") or "the color of" in before.question:
                assert asks, after.question


def test_digit_wordings_are_held_out_and_name_the_same_places() -> None:
    pytest.importorskip("sklearn")
    from evals import digits

    known = {question for split in ("train", "test") for question, _, _ in digits._asked(split)}
    asked = tuple(
        Question(str(i), "0", text, text, (), (answer,))
        for i, (text, answer, _) in enumerate(digits._asked("test"))
    )
    plain = Task("digits", "digits", "test", "made here", asked, "exact")
    places = re.compile(
        "top left|top right|bottom left|bottom right|top row|bottom row|left column|right column|[0-9]"
    )
    for severity in (1, 2):
        (variant,) = variants.parse(f"wording-{severity}", plain)
        changed = variants.apply(plain, variant).questions
        texts = {one.question for one in changed}
        assert not texts & known
        assert (words(texts) <= words(known)) == (severity == 1), words(texts) - words(known)
        for before, after in zip(asked, changed, strict=True):
            swapped = "larger than the " in after.question and after.question.startswith("larger")
            order = reversed if swapped or after.question.startswith("compared") else iter
            found = list(order(places.findall(after.question)))
            assert found == places.findall(before.question), after.question


def test_a_question_that_is_not_the_task_s_is_refused(easy: Task) -> None:
    strange = replace(easy, questions=(replace(easy.questions[0], question="why?", prompt="why?"),))
    with pytest.raises(InputError, match="no question of this task"):
        variants.apply(strange, variants.parse("wording-1", strange)[0])


def _side(picture: Image.Image, plain: Image.Image) -> int:
    """Longer side of the one object, antialiased edges included; the plain picture's background is even."""
    colours, counts = np.unique(np.asarray(plain).reshape(-1, 3), axis=0, return_counts=True)
    far = np.abs(np.asarray(picture).astype(int) - colours[counts.argmax()]).max(axis=2)
    return max(int(np.ptp(places)) + 1 for places in np.nonzero(far > 8))


def test_easy_vqa_shapes_have_sizes_that_the_task_never_has(easy: Task) -> None:
    sample = replace(easy, questions=easy.questions[::600])
    plain = [opened(one.images[0]) for one in sample.questions]
    assert all(9 <= _side(one, one) <= 34 for one in plain)
    for variant, side in (("smaller-1", 8), ("smaller-5", 4), ("larger-1", 42), ("larger-4", 60)):
        changed = variants.apply(sample, variants.parse(variant, sample)[0]).questions
        for before, after in zip(plain, changed, strict=True):
            assert 0.9 * side - 1 <= _side(opened(after.images[0]), before) <= side, (variant, after.id)


def test_digits_are_drawn_again_in_other_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from evals import digits

    monkeypatch.setattr(digits, "SPLITS", {**digits.SPLITS, "test": (357, 3)})
    digits.scenes.cache_clear()
    try:
        folder = tmp_path / "test"
        folder.mkdir()
        plain = digits.picture("test", 1)
        Image.fromarray(plain).save(folder / "1.png")
        question = Question(
            "5", "1", "where is the 3?", "where is the 3?", (folder / "1.png",), ("top left",)
        )
        of = Task("digits", "digits", "test", "made here", (question,), "exact")
        ink = []
        for name in ("smaller-5", "smaller-3", "smaller-1", "larger-1", "larger-4"):
            found = opened(variants.apply(of, variants.parse(name, of)[0]).questions[0].images[0])
            pixels = np.asarray(found)[..., 0].astype(int)
            ink.append(int((pixels < np.median(pixels) - 60).sum()))
        own = plain.astype(int)
        assert ink == sorted(ink) and ink[2] < int((own < np.median(own) - 60).sum()) < ink[4]
    finally:
        digits.scenes.cache_clear()

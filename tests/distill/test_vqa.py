"""Data: what is split by image, what a model is given, what an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ProcessorMixin

from distill.demo import vqa
from distill.demo.vqa import VqaData
from distill.forward.features import Features
from evals import easy_vqa
from evals.easy_vqa import Question


@pytest.fixture(scope="module")
def train() -> list[Question]:
    return easy_vqa.load("train")


# --- the data set -----------------------------------------------------


def test_the_embedded_data_set(train: list[Question]) -> None:
    test = easy_vqa.load("test")
    assert (len(train), len({q.image_id for q in train})) == (38_575, 4_000)
    assert (len(test), len({q.image_id for q in test})) == (9_673, 1_000)
    assert [q.id for q in test] == list(range(9_673))
    assert not {q.image_path for q in train} & {q.image_path for q in test}
    assert all(q.image_path.exists() for q in (train[0], train[-1], test[0], test[-1]))
    assert {q.answer for q in train} == {*easy_vqa.COLOURS, *easy_vqa.SHAPES, "yes", "no"}


def split(questions: Sequence[Question], seed: int = 0, labelled: int = 2000, images: int = 250) -> vqa.Split:
    return vqa.split_by_image(questions, validation_images=images, labelled_questions=labelled, seed=seed)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(0, 40_000), st.integers(0, 1000))
def test_no_image_is_in_two_parts(train: list[Question], seed: int, labelled: int, images: int) -> None:
    parts = split(train, seed, labelled, images)
    joined = [*parts.labelled, *parts.unlabelled, *parts.validation]
    assert sorted(joined) == list(range(4_000))
    assert len(parts.validation) == images


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(0, 30_000))
def test_the_label_budget(train: list[Question], seed: int, labelled: int) -> None:
    """Never above the budget, and one more image would be."""
    parts = split(train, seed, labelled)
    per_image = np.bincount([q.image_id for q in train])
    used = per_image[list(parts.labelled)].sum()
    assert used <= labelled < used + per_image[parts.unlabelled[0]]


def test_the_seed_decides_and_more_labels_keep_the_first(train: list[Question]) -> None:
    assert split(train) == split(train) != split(train, seed=1)
    few, many = split(train, labelled=500), split(train, labelled=2000)
    assert many.labelled[: len(few.labelled)] == few.labelled and many.validation == few.validation


# --- facts and explained answers --------------------------------------


def question(text: str, answer: str, image: int = 0) -> Question:
    return Question(0, image, easy_vqa.Path("none.png"), text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("what color is the triangle?", "blue"),
        ("what shape is present?", "triangle"),
        ("is there a blue shape?", "yes"),
        ("is there not a blue shape?", "no"),
        ("does the image not contain a triangle?", "no"),
        ("is no triangle present?", "no"),
    ],
)
def test_what_an_answer_tells(text: str, answer: str) -> None:
    asked = [question(text, answer), question("what shape is it?", "triangle")]
    asked.append(question("what color is it?", "blue"))
    assert easy_vqa.facts(asked) == {0: ("blue", "triangle")}
    alone = easy_vqa.facts([question(text, answer)])
    assert alone in ({}, {0: ("blue", "triangle")}), "one answer gives both facts or none"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("is there a red shape?", "no"), ("is there not a red shape?", "yes"), ("is no circle present?", "yes")],
)
def test_what_an_answer_does_not_tell(text: str, answer: str) -> None:
    known = [question("what shape is it?", "triangle"), question("what color is it?", "blue")]
    assert easy_vqa.facts([*known, question(text, answer)]) == {0: ("blue", "triangle")}


def test_facts_agree_over_the_whole_data_set(train: list[Question]) -> None:
    """Read from any half of an image's questions, what is known never contradicts the rest."""
    known = easy_vqa.facts(train)
    assert len(known) > 3_500
    for part in (train[::2], train[1::2]):
        assert all(known[image] == found for image, found in easy_vqa.facts(part).items())


def test_facts_of_unlabelled_images_stay_unknown(train: list[Question]) -> None:
    parts = split(train)
    labelled = set(parts.labelled)
    known = easy_vqa.facts([q for q in train if q.image_id in labelled])
    assert known and set(known) <= labelled


def test_explained_answers(train: list[Question]) -> None:
    known = {0: ("red", "circle")}
    assert easy_vqa.explained(question("is there a blue shape?", "no"), known) == "red circle, blue: no"
    assert easy_vqa.explained(question("what color is the circle?", "red"), known) == "red circle, color: red"
    assert (
        easy_vqa.explained(question("what shape is there?", "circle"), known) == "red circle, shape: circle"
    )
    assert easy_vqa.explained(question("what shape is there?", "circle", 1), known) == "circle"
    everything = easy_vqa.facts(train)
    for item in train:
        response = easy_vqa.explained(item, everything)
        assert response.split()[-1] == item.answer
        if item.image_id in everything:
            assert response.startswith(" ".join(everything[item.image_id]) + ", ")


# --- what a model is given --------------------------------------------


def test_pixels_are_the_processors(data: VqaData, processor: ProcessorMixin) -> None:
    """In the order asked for, whatever was asked for before."""
    data.pixels([4])
    found = data.pixels([3, 4, 1])
    for image, pixels in zip((3, 4, 1), found, strict=True):
        picture = Image.open(data.by_image[image][0].image_path)
        expected = processor(text="<image>", images=[picture], return_tensors="pt")["pixel_values"][0, 0]
        assert torch.equal(pixels, expected)


def test_prompts_are_the_chat_templates(data: VqaData, processor: Any) -> None:
    found = data.prompt("what color is the circle?")
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}],
            }
        ],
        add_generation_prompt=True,
    )
    picture = Image.open(data.by_image[0][0].image_path)
    assert list(found) == processor(text=text, images=[picture])["input_ids"][0]
    assert processor.tokenizer.decode(found).endswith(
        "what color is the circle?<end_of_utterance>\nAssistant:"
    )


def test_responses(data: VqaData) -> None:
    ids = data.response("red circle, blue: no")
    assert ids[-1] == data.tokenizer.eos_token_id and data.text(ids) == "red circle, blue: no"
    whole = data.tokenizer("Assistant: red circle, blue: no", add_special_tokens=False)["input_ids"]
    assert tuple(whole[-len(ids) + 1 :]) == ids[:-1], "the same ids as in running text"


def test_moved_pictures() -> None:
    """Mirrored or not, moved by at most `most` pixels with edges repeated; nothing invented."""
    picture = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).view(2, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(60):
        moved = vqa.shifted(picture, generator, most=2)
        assert moved.shape == picture.shape
        for one, original in zip(moved, picture, strict=True):
            matches = [
                (mirrored, dy, dx)
                for mirrored in (False, True)
                for dy in range(-2, 3)
                for dx in range(-2, 3)
                if torch.equal(one[:, 2:-2, 2:-2], _moved(original, mirrored, dy, dx)[:, 2:-2, 2:-2])
            ]
            assert len(matches) == 1
            found.add(matches[0])
    assert len(found) > 35, "all 50 positions are reached"


def _moved(picture: torch.Tensor, mirrored: bool, dy: int, dx: int) -> torch.Tensor:
    source = picture.flip(-1) if mirrored else picture
    return source.roll((dy, dx), dims=(-2, -1))


def test_answers_are_greedy_and_free(tiny_model: Any, data: VqaData) -> None:
    images = [2, 9]
    found = vqa.answers(tiny_model, data, images)
    assert list(found) == [q.id for image in images for q in data.by_image[image]]
    item = data.by_image[9][1]
    ids = data.prompt(item.question)
    whole = tiny_model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=data.pixels([9])[:, None],
        max_new_tokens=10,
        do_sample=False,
    )
    assert found[item.id] == data.text(whole[0, len(ids) :].tolist())
    features = Features.join([data.encode(tiny_model, [image]) for image in images])
    assert vqa.answers(tiny_model, data, images, features=features) == found

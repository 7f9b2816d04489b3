"""easy-VQA, the embedded task: 5,000 pictures of one coloured shape each, with 48,248 questions.

In: the PyPI package `easy-vqa` (its data files only; the package itself is never imported).
Out: questions with their image's path. Not here: who may see a label, tokens, scoring.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import MissingExtra

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Question:
    """One question about one image. `id` is unique within its split."""

    id: int
    image_id: int
    image_path: Path
    question: str
    answer: str


def load(split: str) -> list[Question]:
    """All questions of the split `train` (38,575 on 4,000 images) or `test` (9,673 on 1,000 images)."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise MissingExtra("easy-vqa", "distill")
    root = Path(spec.origin).parent / "data" / split
    rows = json.loads((root / "questions.json").read_text())
    return [
        Question(number, image, root / "images" / f"{image}.png", text, answer)
        for number, (text, answer, image) in enumerate(rows)
    ]


def facts(questions: Sequence[Question]) -> dict[int, tuple[str, str]]:
    """(colour, shape) of each image whose own questions and answers give both.

    Only the annotations passed in are read, so unlabelled images stay unknown.
    """
    colour: dict[int, str] = {}
    shape: dict[int, str] = {}
    for item in questions:
        words = item.question.rstrip("?").split()
        stated = [item.answer]
        if words[0] == "what" or (item.answer == "yes") != ("not" in words or "no" in words):
            stated += words
        for word in stated:
            if word in COLOURS:
                colour[item.image_id] = word
            elif word in SHAPES:
                shape[item.image_id] = word
    return {image: (colour[image], shape[image]) for image in colour.keys() & shape.keys()}


def explained(item: Question, known: dict[int, tuple[str, str]]) -> str:
    """The target response: what is in the picture, what is asked, the answer (`red circle, blue: no`)."""
    if item.image_id not in known:
        return item.answer
    words = item.question.rstrip("?").split()
    if words[0] == "what":
        asked = "color" if "color" in words else "shape"
    else:
        asked = next(word for word in words if word in COLOURS + SHAPES)
    return f"{' '.join(known[item.image_id])}, {asked}: {item.answer}"

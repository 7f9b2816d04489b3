"""Questions that choose a precision, and others that confirm it.

In: easy-VQA, or a JSON-lines file of one's own. Out: `Split`, whose halves share no picture. Not here:
asking them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals import easy_vqa
from evals.easy_vqa import Question
from runtime import files
from runtime.errors import InputError

_KEYS = {"image", "question", "answer"}


@dataclass(frozen=True)
class Split:
    """`validation` chooses; `held_out` is asked once, after the choice."""

    validation: tuple[Question, ...]
    held_out: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        """Hash of all questions and answers, in order."""
        rows = [
            [str(q.image_path), q.question, q.answer]
            for part in (self.validation, self.held_out)
            for q in part
        ]
        return files.sha256_json(rows)


def load(data: Path | None, limit: int | None = None) -> Split:
    """easy-VQA's test questions, or those of `data`; `limit`: at most so many in each half.

    A checkpoint of the demo never saw easy-VQA's test split. Raises InputError.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: got {limit}, expected at least 1 question")
    questions = easy_vqa.load("test") if data is None else read(data)
    images = sorted({q.image_id for q in questions}, key=_shuffled)
    if len(images) < 2:
        raise InputError(
            f"{data}: questions about {len(images)} picture, wanted at least 2: one half must confirm"
        )
    chosen = set(images[: len(images) // 2])
    validation = [q for q in questions if q.image_id in chosen]
    held_out = [q for q in questions if q.image_id not in chosen]
    return Split(spread(validation, limit), spread(held_out, limit))


def spread(questions: Sequence[Question], count: int | None) -> tuple[Question, ...]:
    """At most `count` of them, evenly over all pictures: questions about one picture say less than others."""
    if count is None or count >= len(questions):
        return tuple(questions)
    return tuple(questions[i * len(questions) // count] for i in range(count))


def _shuffled(image_id: int) -> bytes:
    return hashlib.sha256(str(image_id).encode()).digest()


def read(path: Path) -> list[Question]:
    """Rows `{"image": path, "question": text, "answer": text}`, paths relative to the file; in picture order.

    Raises InputError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a JSON-lines file") from error
    ids: dict[Path, int] = {}
    found = [_row(path, number, line, ids) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path}: has no questions")
    return sorted(found, key=lambda q: q.image_id)


def _row(path: Path, number: int, line: str, ids: dict[Path, int]) -> Question:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: no JSON ({error})") from error
    if not isinstance(row, dict) or set(row) != _KEYS or not all(isinstance(x, str) for x in row.values()):
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: got {got}, wanted image, question and answer, each a text")
    image = (path.parent / row["image"]).resolve()
    if not image.is_file():
        raise InputError(f"{where}: image {row['image']} is not there")
    return Question(number, ids.setdefault(image, len(ids)), image, row["question"], row["answer"])


def examples(questions: Sequence[Question], count: int) -> list[tuple[Path, str]]:
    """`count` pictures with questions, evenly from all, for calibration."""
    return [(q.image_path, q.question) for q in spread(questions, count)]

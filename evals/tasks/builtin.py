"""The tasks that ship with a package: easy-VQA and the digit task.

In: a name and a split. Out: a `Task`. Not here: their pictures and labels (`evals/easy_vqa.py`,
`evals/digits.py`).
"""

from __future__ import annotations

import importlib

from evals.tasks.question import Question, Task
from runtime.errors import InputError

TASKS = {"easy-vqa": "evals.easy_vqa", "digits": "evals.digits"}
"""Name to module with `load(split)`."""


def load(name: str, split: str) -> Task:
    """All questions of a split, asked as they are. Raises InputError for an unknown split, MissingExtra."""
    try:
        found = importlib.import_module(TASKS[name]).load(split)
    except OSError as error:
        raise InputError(f"--split {split}: {name} has no such split; wanted train or test") from error
    questions = tuple(
        Question(
            id=str(one.id),
            group=str(one.image_id),
            question=one.question,
            prompt=one.question,
            images=(one.image_path,),
            references=(one.answer,),
        )
        for one in found
    )
    return Task(
        name=name,
        format=name,
        split=split,
        source=f"package {'easy-vqa' if name == 'easy-vqa' else 'scikit-learn'}",
        questions=questions,
        scorer="exact",
    )

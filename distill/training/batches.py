"""From the questions of a step to the micro-batches of a process: pure functions of their sizes.

In: questions with responses, prompts. Out: who computes what, in which micro-batches. The result is the
same in every process, and no gradient depends on it: a part's loss is divided by the whole step's
normaliser (`objective.weight_part`). Not here: models, losses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from distill.forward.tree import NAIVE, PREFIX, shared_prefix
from distill.inputs.encoding import Prompt

if TYPE_CHECKING:
    from distill.inputs.data import Sample

T = TypeVar("T")
PROMPT_COST, IMAGE_COST = 64, 512
"""Tokens that a prompt and an image count as when rows are dealt out before any image is opened."""


@dataclass(frozen=True)
class Scored:
    """A distinct response to a question: how often it was drawn, R_acc in [0, 1], the raw T = 1 log-probs
    under the model that drew it (None: nobody recorded them), how many of `count` the teacher drew."""

    ids: tuple[int, ...]
    count: float
    correct: float
    mu: tuple[float, ...] | None
    teacher: float = 0


@dataclass(frozen=True)
class Question:
    """A sample with its scored responses."""

    sample: Sample
    responses: tuple[Scored, ...]


@dataclass(frozen=True)
class Item:
    """A question as the models see it: `prompts` holds the student's, then each teacher's. `weight` 0: it
    takes part in every computation and in no sum."""

    question: Question
    prompts: tuple[Prompt, ...]
    mu: tuple[tuple[float, ...] | None, ...]
    weight: float = 1.0


def image_key(sample: Sample) -> Hashable:
    """Equal where samples show the same pictures, from paths or bytes alone; a text has a key of its own."""
    if not sample.images:
        return sample.id
    return tuple(str(image.path) if image.path is not None else image.sha256 for image in sample.images)


def order(keys: Sequence[Hashable], seed: Sequence[int]) -> list[int]:
    """Question indices in the order of training: images shuffled, the questions of one image together."""
    units: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        units.setdefault(key, []).append(index)
    found = list(units.values())
    draw = np.random.default_rng(list(seed))
    return [index for unit in draw.permutation(len(found)) for index in found[unit]]


def runs(items: Sequence[T], key: Callable[[T], Hashable], most: int) -> list[list[T]]:
    """Neighbours of equal key together, at most `most` in one list."""
    found: list[list[T]] = []
    last: Hashable = None
    for item in items:
        here = key(item)
        if found and here == last and len(found[-1]) < most:
            found[-1].append(item)
        else:
            found.append([item])
        last = here
    return found


def cost(row: Sequence[Question]) -> int:
    """Tokens of a row, roughly, from what is known before its images are opened."""
    answers = sum(len(response.ids) for question in row for response in question.responses)
    return answers + PROMPT_COST * len(row) + IMAGE_COST * len(row[0].sample.images)


def deal(rows: Sequence[Sequence[Question]], world: int) -> list[list[int]]:
    """Row indices of each of `world` processes: the costliest row first, to whom has least so far."""
    dealt: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    costs = [cost(row) for row in rows]
    for index in sorted(range(len(rows)), key=lambda i: (-costs[i], i)):
        rank = min(range(world), key=lambda r: (load[r], r))
        dealt[rank].append(index)
        load[rank] += costs[index]
    return [sorted(rows) for rows in dealt]


def width(row: Sequence[Item], sharing: str) -> int:
    """Tokens that a row takes in a model's batch (`distill/forward/tree.py`), padding not counted."""
    prompts = [item.prompts[0].ids for item in row]
    answers = [len(response.ids) for item in row for response in item.question.responses]
    if sharing == NAIVE:
        return sum(
            len(item.prompts[0].ids) + len(response.ids)
            for item in row
            for response in item.question.responses
        )
    if sharing == PREFIX:
        return sum(map(len, prompts)) + sum(answers)
    shared = shared_prefix(prompts)
    return shared + sum(len(ids) - shared for ids in prompts) + sum(answers) - len(answers)


def split(row: Sequence[Item], budget: int, sharing: str) -> list[list[Item]]:
    """A row cut between questions so that each piece fits the budget. One question is never cut."""
    found: list[list[Item]] = [[]]
    for item in row:
        if found[-1] and width([*found[-1], item], sharing) > budget:
            found.append([])
        found[-1].append(item)
    return found


def micro_batches(rows: Sequence[Sequence[Item]], budget: int, sharing: str) -> list[list[list[Item]]]:
    """Rows of one process in micro-batches of at most `budget` tokens, padding counted; a row that is longer
    by itself is alone. Rows of like length come together."""
    pieces = [piece for row in rows for piece in split(row, budget, sharing)]
    widths = [width(piece, sharing) for piece in pieces]
    found: list[list[list[Item]]] = []
    longest = 0
    for index in sorted(range(len(pieces)), key=lambda i: (-widths[i], i)):
        if found and (len(found[-1]) + 1) * longest <= budget:
            found[-1].append(pieces[index])
        else:
            found.append([pieces[index]])
            longest = widths[index]
    return found

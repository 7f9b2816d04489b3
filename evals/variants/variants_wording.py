"""Questions in other words, with the same answer.

In: a question. Out: the question with another prompt. Not here: pictures.

The built-in tasks have held-out wordings: none occurs in their data, in any split. Severity 1 arranges words
that the task's own questions have; severity 2 brings words that it never used. Other tasks get a sentence
before their question, and with severity 2 one behind it; their own wordings can come from a file, JSON lines
with `id` or `question`, and `wording`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from evals.tasks.question import Question
from runtime.errors import InputError

TOLD = ("held-out wording of known words", "held-out wording with new words")

Wordings = tuple[str, ...]
Rule = tuple[str, tuple[Wordings, Wordings]]
"""A question as a regular expression, and for each severity what may stand for it."""

EASY_VQA: tuple[Rule, ...] = (
    (
        r"is there not an? (?P<x>.+?)(?: in the image)?\?|is no (?P<y>.+) present\?"
        r"|does the image not contain an? (?P<z>.+)\?",
        (
            ("is there no {x}?", "is a {x} not present?", "is there no {x} in the image?"),
            ("is a {x} absent here?", "is this picture without a {x}?", "does this drawing lack a {x}?"),
        ),
    ),
    (
        r"is there an? (?P<x>.+?)(?: in the image)?\?|is an? (?P<y>.+) present\?"
        r"|does the image contain an? (?P<z>.+)\?",
        (
            ("is a {x} in the image?", "is a {x} present in the image?", "is there a {x} present?"),
            ("can you see a {x}?", "does this picture show a {x}?", "would you find any {x} here?"),
        ),
    ),
    (
        r"what color is the (?P<x>.+)\?|what is the color of the (?P<y>.+)\?",
        (
            ("the {x} is what color?", "what color is the {x} in the image?", "of what color is the {x}?"),
            ("which color does this {x} have?", "name the color of this {x}.", "how is the {x} painted?"),
        ),
    ),
    (
        r"what is the (?P<x>.+) shape\?",
        (
            ("what shape is {x}?", "the {x} shape is what?", "what is the {x} shape in the image?"),
            ("which shape has been painted {x}?", "name this {x} figure.", "what do you call this {x} form?"),
        ),
    ),
    (
        r"what shape is (?:in the image|present)\?|what shape does the image contain\?",
        (
            ("what is the shape?", "what shape is there?", "what is the shape in the image?"),
            ("which figure can you see?", "name the figure drawn here.", "what kind of form is this?"),
        ),
    ),
)

DIGITS: tuple[Rule, ...] = (
    (
        r"what is the sum of the (?P<x>.+)\?",
        (
            ("what sum is the {x}?", "the sum of the {x} is what?", "the {x}: what is the sum?"),
            ("add up the {x}.", "how much do the digits of the {x} make together?", "total of the {x}?"),
        ),
    ),
    (
        r"is the (?P<x>.+) larger than the (?P<w>.+)\?",
        (
            ("the {x} is larger than the {w}?", "larger than the {w} is the {x}?"),
            ("does the {x} exceed the {w}?", "compared with the {w}, has the {x} a bigger value?"),
        ),
    ),
    (
        r"is the (?P<x>.+) odd or even\?",
        (
            ("is the {x} even or odd?", "the {x} is odd or even?", "odd or even is the {x}?"),
            ("tell me the parity of the {x}: odd or even?", "would you call the {x} even or odd?"),
        ),
    ),
    (
        r"how many digits (?P<x>are .+)\?",
        (
            ("how many of the digits {x}?", "what digits {x}: how many?"),
            ("count those digits which {x}.", "give the number of digits that {x}."),
        ),
    ),
    (
        r"where is the (?P<x>.+)\?",
        (
            ("the {x} is where?", "of the places, where is the {x}?"),
            ("in which place do you find the {x}?", "locate the {x}.", "what position holds the {x}?"),
        ),
    ),
    (
        r"how many places are empty\?",
        (
            ("how many of the places are empty?", "how many are the empty places?"),
            ("count the places that hold nothing.", "give the number of blank places."),
        ),
    ),
)

RULES: dict[str, tuple[Rule, ...]] = {"easy-vqa": EASY_VQA, "digits": DIGITS}
"""By a task's format."""

BEFORE = ("Look at the image and answer. ", "Please have a look at this picture. ", "About this image: ")
BEHIND = (" Take your time.", " I would like to know.", " Thank you!")


def reworded(format_name: str, question: Question, severity: int) -> Question:
    """The question in other words; which of them is decided by its id. Raises InputError when a built-in
    task has a question that no rule knows."""
    pick = int.from_bytes(hashlib.sha256(f"{question.id}-{severity}".encode()).digest()[:4], "big")
    if format_name not in RULES:
        behind = BEHIND[pick % len(BEHIND)] if severity > 1 else ""
        return replace(question, prompt=f"{BEFORE[pick % len(BEFORE)]}{question.prompt}{behind}")
    wording = held_out(format_name, question.question, severity, pick)
    return _said(question, wording)


def _said(question: Question, wording: str) -> Question:
    """The wording in the place of the question's own, inside its prompt."""
    if question.question not in question.prompt:
        raise InputError(f"question {question.id}: its prompt does not hold its text; it cannot be reworded")
    prompt = question.prompt.replace(question.question, wording, 1)
    return replace(question, question=wording, prompt=prompt)


def held_out(format_name: str, text: str, severity: int, pick: int) -> str:
    """Another wording of a built-in task's question."""
    for pattern, wordings in RULES[format_name]:
        if found := re.fullmatch(pattern, text):
            named = found.groupdict()
            first = next((value for key, value in named.items() if key != "w" and value), "")
            chosen = wordings[severity - 1]
            return chosen[pick % len(chosen)].format(x=first, w=named.get("w"))
    raise InputError(f"{format_name}: no other wording is known for {text!r}; it is no question of this task")


def given(question: Question, texts: Mapping[str, str]) -> Question | None:
    """The question in the words that a file has for its id or its text; None when it has none."""
    wording = texts.get(f"id:{question.id}") or texts.get(f"question:{question.question}")
    if wording is None:
        return None
    return _said(question, wording)


@functools.lru_cache(maxsize=4)
def read(path: Path) -> dict[str, str]:
    """Wordings of a JSON lines file by `id:...` and `question:...`. Raises InputError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); expected JSON lines") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key = f"id:{row['id']}" if "id" in row else f"question:{row['question']}"
            wording = row["wording"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}:{number}: no wording ({error!r}); wanted an object with id or question, and wording"
            ) from error
        if not isinstance(wording, str) or not wording.strip():
            raise InputError(f"{path}:{number}: wording is {wording!r}; expected a text")
        found[key] = wording
    if not found:
        raise InputError(f"{path}: has no wording; expected JSON lines with id or question, and wording")
    return found

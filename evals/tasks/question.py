"""A task's questions: the contract between what reads them, what changes them and what asks them.

In: plain values. Out: `Question` and `Task`, frozen. Not here: files (`tsv.py`, `jsonl.py`, `builtin.py`),
scores (`evals/tasks/scoring.py`), asking (`evals/eval_run.py`).

A question has all it needs to be asked and scored, so that a variant is a function from questions to
questions: `dataclasses.replace(question, prompt=...)` or `images=...`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

Picture = Path | bytes | Image.Image
"""A file, a file's bytes (as a TSV's base64 has them), or pixels made in memory."""


@dataclass(frozen=True)
class Question:
    """One question as a model gets it.

    `prompt` is the text that is asked, with options and instructions; `question` the bare one. Questions
    with the same `unit` count together (circular evaluation), those of a `group` share their image.
    `reference` is the data's own answer text; `references` the accepted ones. `row` keeps the data's other
    fields for the scorer and for files in a harness's layout.
    """

    id: str
    group: str
    question: str
    prompt: str
    images: tuple[Picture, ...]
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    unit: str = ""
    category: str = ""
    row: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.unit:
            object.__setattr__(self, "unit", self.id)


@dataclass(frozen=True)
class Task:
    """Questions of one split, and how they are scored.

    `scorer` is a name of `evals/tasks/scoring.py`; `rules` says whose; `prompt` whose wording.
    `available` counts the split's questions before a limit.
    """

    name: str
    format: str
    split: str
    source: str
    questions: tuple[Question, ...]
    scorer: str
    rules: str = "pocketvlm"
    prompt: str = "raw"
    max_new_tokens: int = 32
    circular: bool = False
    available: int = 0
    system: str = ""

    def __post_init__(self) -> None:
        if not self.available:
            object.__setattr__(self, "available", len(self.questions))

    def limited(self, limit: int | None) -> Task:
        """The first `limit` units, whole ones: a circular question without its other orders has no score."""
        if limit is None:
            return self
        kept = set(list(dict.fromkeys(one.unit for one in self.questions))[:limit])
        return replace(self, questions=tuple(one for one in self.questions if one.unit in kept))

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of what is asked and accepted, images included, in order."""
        digest = hashlib.sha256()
        for one in self.questions:
            told = [one.id, one.unit, one.question, one.prompt, one.options, one.references]
            digest.update(json.dumps(told, ensure_ascii=False).encode())
            for picture in one.images:
                digest.update(picture_sha256(picture).encode())
        return digest.hexdigest()


def picture_bytes(picture: Picture) -> bytes:
    """A file's bytes; of pixels made in memory, those of a PNG without compression choices that vary."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Path):
        return picture.read_bytes()
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def picture_sha256(picture: Picture) -> str:
    """SHA-256 of a picture's bytes; of pixels in memory, over mode, size and pixels."""
    if isinstance(picture, Image.Image):
        return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()
    return _file_sha256(picture) if isinstance(picture, Path) else hashlib.sha256(picture).hexdigest()


@functools.lru_cache(maxsize=65536)
def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(questions: Sequence[Question]) -> None:
    """Raises ValueError when an id is there twice."""
    seen: set[str] = set()
    for one in questions:
        if one.id in seen:
            raise ValueError(f"question {one.id!r} is there twice")
        seen.add(one.id)

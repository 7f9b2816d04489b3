"""A task's questions: the contract between what reads them, what changes them and what asks them.

In: plain values. Out: `Question` and `Task`, frozen. Not here: files (`formats.py`, `catalogue.py`), scores
(`scoring.py`), variants (`evals/variants/variants.py`), asking (`evals/asking/eval_run.py`).

A question has all it needs to be asked and scored, so that a variant is a function from questions to
questions: `dataclasses.replace(question, prompt=...)` or `images=...`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from evals.tasks.images import ImageSource

Picture = Path | bytes | Image.Image | ImageSource | Callable[[], bytes]
"""A file, a file's bytes, pixels made in memory, a source, or what reads a file's bytes when they are needed
(a data set's pictures are never all in memory)."""


@dataclass(frozen=True)
class Question:
    """One question as a model gets it.

    `prompt` is the text that is asked, with options and instructions; `question` the bare one. Questions
    with the same `unit` count together (circular evaluation), those of a `group` share their image.
    `references` are the accepted answers; `letters` name the options (a TSV may leave one out). `row` keeps
    the data's other fields for the scorer and for files in a harness's layout.
    """

    id: str
    group: str
    question: str
    prompt: str
    images: tuple[Picture, ...]
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    letters: str = string.ascii_uppercase
    unit: str = ""
    category: str = ""
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.unit:
            object.__setattr__(self, "unit", self.id)


@dataclass(frozen=True)
class Task:
    """Questions of one split, and how they are scored.

    `scorer` is a name of `evals/tasks/scoring.py`; `prompt` says whose wording. `available` counts the
    questions of the split before a limit.
    """

    name: str
    format: str
    split: str
    source: str
    questions: tuple[Question, ...]
    scorer: str
    prompt: str = "raw"
    max_new_tokens: int = 32
    circular: bool = False
    available: int = 0

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
            digest.update(json.dumps([*told, *image_hashes(one)], ensure_ascii=False).encode())
        return digest.hexdigest()


def given(picture: Picture) -> Path | bytes | Image.Image:
    """The picture as a session takes it. Raises InputError when it cannot be read."""
    if isinstance(picture, ImageSource):
        return picture.bytes()
    return picture() if callable(picture) else picture


def opened(picture: Picture) -> Image.Image:
    """Decoded, upright, RGB. Raises InputError."""
    found = given(picture)
    if isinstance(found, Image.Image):
        return found.convert("RGB")
    return (ImageSource(path=found) if isinstance(found, Path) else ImageSource(data=found)).open()


def picture_sha256(picture: Picture) -> str:
    """SHA-256 of a picture's file; of pixels in memory, over mode, size and pixels. Raises InputError."""
    if isinstance(picture, Path):
        return _file_sha256(picture)
    found = given(picture)
    if isinstance(found, Image.Image):
        return hashlib.sha256(f"{found.mode}{found.size}".encode() + found.tobytes()).hexdigest()
    return _file_sha256(found) if isinstance(found, Path) else hashlib.sha256(found).hexdigest()


def image_hashes(question: Question) -> list[str]:
    """Of all its pictures, in order."""
    return [picture_sha256(picture) for picture in question.images]


@functools.lru_cache(maxsize=65536)
def _file_sha256(path: Path) -> str:
    return ImageSource(path=path).sha256

"""Questions about images from any number of sources: random access, labels that a run may not see hidden.

In: the sources of a recipe. Out: a `Dataset` of `Sample`s in the Hugging Face message format, pictures still
unopened. Not here: file formats (`inputs/formats.py`), tokens and pixels (`inputs/encoding.py`), scoring.
A source is read by byte offsets or through Arrow's memory map; no file is held in memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from evals.tasks.images import ImageSource
from runtime.errors import InputError, TrainingError

if TYPE_CHECKING:
    from distill.recipe import Source

SHOWN = 3
"""Errors that a message tells in full."""


class SampleError(InputError):
    """One sample cannot be used. `source` and `index` say which; the message says why."""

    def __init__(self, source: str, index: int, reason: object) -> None:
        super().__init__(f"{source}[{index}]: {reason}")
        self.source, self.index, self.reason = source, index, str(reason)

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, int, str]]:
        return type(self), (self.source, self.index, self.reason)


@dataclass(frozen=True)
class Sample:
    """One question. `messages` end with a user turn; content is a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`, and images come in the order of `images`. `answer` is None where the
    run has no label. `choices` are the option texts A, B, ... of a multiple-choice question."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[ImageSource, ...] = ()
    answer: str | None = None
    scorer: str = "exact"
    choices: tuple[str, ...] = ()
    source: str = ""
    index: int = -1

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        parts = self.messages[-1]["content"]
        return "\n".join(part["text"] for part in parts if part["type"] == "text")

    def open_images(self) -> list[Image.Image]:
        """RGB pictures in order. Raises SampleError."""
        try:
            return [image.open() for image in self.images]
        except InputError as error:
            raise SampleError(self.source or self.id, self.index, error) from error


class Records(Protocol):
    """A file format: samples by position, built from the record alone."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Raises InputError (or KeyError, TypeError, ValueError on a malformed record)."""
        ...


class Dataset:
    """Sources one after the other. Nothing is read before it is asked for."""

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.name = name
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`. Raises SampleError that names source and index; IndexError outside the data."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: {index} is outside 0..{len(self) - 1}")
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class Part:
    """One source of a data set: its records `start..start + limit`, labels hidden as the recipe says.

    With `labels: N` the questions that keep theirs are the first N of an order drawn from `seed`, so a
    larger N keeps a superset.
    """

    def __init__(self, name: str, records: Records, source: Source, seed: int) -> None:
        self.name, self._records, self._scorer = name, records, source.scorer
        self.start = min(source.start, len(records))
        self._count = len(records) - self.start
        if source.limit is not None:
            self._count = min(self._count, source.limit)
        self._labelled = _labelled(source.labels, self._count, seed)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        place = self.start + index
        try:
            found = self._records.sample(place)
        except SampleError:
            raise
        except InputError as error:
            raise SampleError(self.name, place, error) from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SampleError(
                self.name, place, f"malformed record ({type(error).__name__}: {error})"
            ) from error
        hidden = self._labelled is not None and not self._labelled[index]
        return replace(
            found,
            id=f"{self.name}:{place}",
            source=self.name,
            index=place,
            answer=None if hidden else found.answer,
            scorer=self._scorer or found.scorer,
        )


def _labelled(labels: str | int, count: int, seed: int) -> np.ndarray | None:
    """(count,) bool: which questions keep their label; None for all of them."""
    if labels == "all":
        return None
    keep = np.zeros(count, dtype=bool)
    order = np.random.default_rng([seed, 7]).permutation(count)
    keep[order[: 0 if labels == "none" else int(labels)]] = True
    return keep


def open_data(sources: Sequence[Source], *, name: str = "train", seed: int = 0) -> Dataset:
    """The sources of a recipe as one data set. Raises InputError for a file that is absent, empty or of
    another format; faults of single records wait until they are read."""
    from distill.inputs import formats

    parts: list[Part] = []
    for number, source in enumerate(sources):
        known = {part.name for part in parts}
        part = source.name if source.name not in known else f"{source.name}#{number}"
        found = Part(part, formats.open_records(source), source, seed)
        if not len(found):
            raise InputError(
                f"{source.path or source.format}: no questions from record {source.start} on; "
                "check data.start and data.limit"
            )
        parts.append(found)
    return Dataset(name, parts)


class Skips:
    """Samples that could not be used: reported, counted once each, too many of them are an error."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.errors: dict[tuple[str, int], SampleError] = {}

    def add(self, error: SampleError) -> None:
        """Take note of a failed sample. Raises TrainingError past the limit, naming the first few."""
        self.errors.setdefault((error.source, error.index), error)
        if len(self.errors) > self.limit:
            raise TrainingError(
                f"{len(self.errors)} samples cannot be used, data.skip_limit is {self.limit}: "
                f"{self._first()}; mend the data or raise the limit"
            ) from error

    def get(self, dataset: Dataset, index: int) -> Sample | None:
        """Sample `index`, or None (and a note) where it fails."""
        try:
            return dataset[index]
        except SampleError as error:
            self.add(error)
            return None

    def _first(self) -> str:
        shown = [str(error) for error in list(self.errors.values())[:SHOWN]]
        rest = len(self.errors) - len(shown)
        return "; ".join(shown) + (f"; and {rest} more" if rest else "")

"""The questions of a run: in which order phases take them, and which of them can be asked at all.

In: a data set, the encoders of student and teachers. Out: indices in order; those that no one can ask, with
the reason. Not here: reading data (`distill/inputs/data.py`), drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.answers import judging
from distill.inputs.data import Dataset, Sample, SampleError
from distill.inputs.encoding import Encoder
from distill.training import batches
from runtime import files
from runtime.errors import InputError

SHARD = 256
"""Questions in a shard of those that were looked at."""
LOOKED_AT = 64
"""How many questions are tried for one with a picture."""


def order(dataset: Dataset, seed: int, together: int = 1, limit: int | None = None) -> list[int]:
    """Question indices in the order in which phases take them: shuffled, `together` questions about one
    image side by side (they then share its forward). Above 1 every record is read once, for its image."""
    count = len(dataset)
    draw = np.random.default_rng([seed, 4])
    if together == 1:
        return draw.permutation(count).tolist()[:limit]
    units: dict[Any, list[int]] = {}
    for index in range(count):
        try:
            key = batches.image_key(dataset[index])
        except Exception:  # reported where the sample is asked
            key = index
        units.setdefault(key, []).append(index)
    visits = []
    for unit in units.values():
        asked = draw.permutation(unit).tolist()
        visits += [asked[i : i + together] for i in range(0, len(asked), together)]
    return [index for visit in draw.permutation(len(visits)) for index in visits[visit]][:limit]


def example(dataset: Dataset, indices: Sequence[int]) -> Sample | None:
    """A sample to try models with: one of the first with a picture, else the first that can be read."""
    first: Sample | None = None
    for index in indices[:LOOKED_AT]:
        try:
            sample = dataset[index]
            pictures = sample.open_images()
        except InputError:  # reported where the sample is asked
            continue
        if pictures:
            return sample
        first = first or sample
    return first


class Checked:
    """A data set whose samples are known to be usable before anything is drawn for them: the prompt of every
    model can be prepared within the limits, and where a rule judges the label suits it."""

    def __init__(self, dataset: Dataset, encoders: Sequence[Encoder], *, by_rule: bool) -> None:
        self.dataset, self.name = dataset, dataset.name
        self.encoders, self.by_rule = encoders, by_rule

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        if self.by_rule:
            judging.check(sample)
        try:
            for encoder in self.encoders:
                encoder.encode(sample)
        except SampleError:
            raise
        except InputError as error:
            raise SampleError(sample.source or sample.id, sample.index, error) from error
        return sample


def look_through(
    dataset: Checked,
    indices: Sequence[int],
    directory: Path,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Look at questions that no teacher is asked. What is found is kept in sealed shards, and not done again;
    `unusable` reads it."""
    shards = [indices[start : start + SHARD] for start in range(0, len(indices), SHARD)]
    for number, part in list(enumerate(shards))[rank::world]:
        path = directory / f"{number:05d}.jsonl"
        if path.exists():
            continue
        rows = []
        for index in part:
            try:
                dataset[index]
            except SampleError as error:
                rows.append({"skipped": index, "why": str(error)})
        files.write_shard(path, rows)
        progress(min(len(indices), (number + 1) * SHARD), len(indices))

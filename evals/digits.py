"""Digits, the second built-in task: pictures of one to four handwritten digits, with questions about them.

In: the 1,797 handwritten digits (8 x 8) that ship in the PyPI package `scikit-learn`; its data file only, the
package itself is never imported. Out: questions with their picture's path, and what a response reads before
it answers. Not here: who may see a label, tokens, scoring.

A picture has four places, some of them empty. Every split has handwritten digits of its own, so a model meets
on `test` no digit image that it saw before, and the teacher, which stands for a model from elsewhere, learns
on `pretrain`, which no student sees. Everything follows from VERSION and SEED.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from evals.easy_vqa import Question
from runtime import files
from runtime.errors import InputError, MissingExtra, StateError

VERSION = 1
"""Raise it with any change of pictures or questions: they are kept under this number."""
SEED = 8
PLACES = ("top left", "top right", "bottom left", "bottom right")
LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
COUNTED: dict[str, Callable[[int], bool]] = {
    "are even": lambda digit: digit % 2 == 0,
    "are odd": lambda digit: digit % 2 == 1,
    "are above 3": lambda digit: digit > 3,
    "are above 6": lambda digit: digit > 6,
    "are below 3": lambda digit: digit < 3,
    "are below 6": lambda digit: digit < 6,
}
SPLITS = {"pretrain": (620, 6000), "train": (620, 3000), "validation": (200, 300), "test": (357, 1000)}
"""Handwritten digits, and pictures composed of them, of each split."""
PICTURE, CELL, EMPTY = 64, 32, "x"
EMPTY_SHARE = 0.2
GLYPH_SIZES = (20, 28)  # pixels, both included
WAIT_SECONDS = 0.2

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Asked = tuple[str, str, str]
"""A question, its answer, and the response that names what it read before the answer."""


def load(split: str, *, cache: Path | None = None) -> list[Question]:
    """All questions of a split, five on every picture. The first call draws the pictures.

    `cache` is where pictures are kept (default: `cache_directory()`). Processes that call it at the same time
    wait for the one that draws; one that is killed leaves nothing half made. Raises InputError for an unknown
    split, MissingExtra without scikit-learn.
    """
    root = _drawn(split, cache or cache_directory())
    return [
        Question(number, number // len(KINDS), root / f"{number // len(KINDS)}.png", text, answer)
        for number, (text, answer, _) in enumerate(_asked(split))
    ]


def explained(split: str) -> dict[int, str]:
    """The target response of every question of a split, by question id: what is read, then the answer.

    The places that the question is about are named in reading order, an empty one as `x`: `3+7=10` (sum of a
    line), `37: no` (comparison), `3: yes` (parity), `3x71: 2` (count), `3x71: bottom left` (position).
    """
    return {number: response for number, (_, _, response) in enumerate(_asked(split))}


def cache_directory() -> Path:
    """`$POCKETVLM_CACHE`, else `$XDG_CACHE_HOME/pocketvlm`, else `~/.cache/pocketvlm`."""
    if own := os.environ.get("POCKETVLM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketvlm"


@functools.cache
def glyphs() -> tuple[Floats, Ints]:
    """The handwritten digits: (1797, 8, 8) ink in [0, 1] and (1797,) classes, in the package's order."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise MissingExtra("scikit-learn", "distill")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as stream:
        table = np.loadtxt(stream, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8) / 16.0, table[:, -1].astype(np.int64)


def members(split: str) -> Ints:
    """Which handwritten digits a split is composed of; no digit is in two splits."""
    if split not in SPLITS:
        raise InputError(f"digits: unknown split {split!r}; wanted one of {', '.join(SPLITS)}")
    order = np.random.default_rng([SEED, 0]).permutation(len(glyphs()[1]))
    start = 0
    for name, (count, _) in SPLITS.items():
        if name == split:
            return order[start : start + count]
        start += count
    raise AssertionError(split)


@functools.cache
def scenes(split: str) -> tuple[tuple[int, ...], ...]:
    """Of each picture the handwritten digit at each place, -1 where it is empty; at least two are filled."""
    own, classes = members(split), glyphs()[1]
    by_class = [own[classes[own] == digit] for digit in range(10)]
    draw = _generator(split, 1)
    found: list[tuple[int, ...]] = []
    while len(found) < SPLITS[split][1]:
        filled = draw.random(len(PLACES)) >= EMPTY_SHARE
        digits = draw.integers(0, 10, len(PLACES))
        if filled.sum() >= 2:
            chosen = [int(draw.choice(by_class[d])) if f else -1 for d, f in zip(digits, filled, strict=True)]
            found.append(tuple(chosen))
    return tuple(found)


def _generator(split: str, *purpose: int) -> np.random.Generator:
    return np.random.default_rng([SEED, list(SPLITS).index(split), *purpose])


# Questions


@functools.cache
def _asked(split: str) -> tuple[Asked, ...]:
    """The questions of a split, picture by picture, one of each kind."""
    classes, draw = glyphs()[1], _generator(split, 2)
    read = [[int(classes[g]) if g >= 0 else None for g in scene] for scene in scenes(split)]
    return tuple(ask(digits, draw) for digits in read for ask in KINDS.values())


Digits = Sequence[int | None]


def _text(digits: Digits) -> str:
    return "".join(EMPTY if digit is None else str(digit) for digit in digits)


def _filled(digits: Digits) -> list[int]:
    return [place for place, digit in enumerate(digits) if digit is not None]


def _sum(digits: Digits, draw: np.random.Generator) -> Asked:
    """A line with two digits where there is one; an empty place counts as nothing."""
    full = [name for name, line in LINES.items() if all(digits[place] is not None for place in line)]
    name = str(
        draw.choice(full or [n for n, line in LINES.items() if any(digits[p] is not None for p in line)])
    )
    parts = [digits[place] for place in LINES[name]]
    total = str(sum(part or 0 for part in parts))
    return f"what is the sum of the {name}?", total, f"{'+'.join(_text([part]) for part in parts)}={total}"


def _compare(digits: Digits, draw: np.random.Generator) -> Asked:
    """Two filled places, unequal where possible; as many answers are yes as no."""
    filled = _filled(digits)
    pairs = [(a, b) for a in filled for b in filled if a < b]
    unequal = [(a, b) for a, b in pairs if digits[a] != digits[b]] or pairs
    a, b = unequal[int(draw.integers(len(unequal)))]
    if draw.random() < 0.5:
        a, b = b, a
    answer = "yes" if (digits[a] or 0) > (digits[b] or 0) else "no"
    return (
        f"is the {PLACES[a]} larger than the {PLACES[b]}?",
        answer,
        f"{_text([digits[a], digits[b]])}: {answer}",
    )


def _parity(digits: Digits, draw: np.random.Generator) -> Asked:
    place = int(draw.choice(_filled(digits)))
    answer = "odd" if (digits[place] or 0) % 2 else "even"
    return f"is the {PLACES[place]} odd or even?", answer, f"{digits[place]}: {answer}"


def _count(digits: Digits, draw: np.random.Generator) -> Asked:
    """The predicate is drawn so that rare counts are as likely as frequent ones, where they can be."""
    counts = {name: sum(d is not None and holds(d) for d in digits) for name, holds in COUNTED.items()}
    wanted = int(draw.choice(sorted(set(counts.values()))))
    name = str(draw.choice([name for name, count in counts.items() if count == wanted]))
    held = _text([d for d in digits if d is not None and COUNTED[name](d)]) or EMPTY
    return f"how many digits {name}?", str(wanted), f"{_text(digits)},{held}: {wanted}"


def _where(digits: Digits, draw: np.random.Generator) -> Asked:
    """A digit that occurs once; where none does, how many places are empty is asked."""
    once = [place for place in _filled(digits) if list(digits).count(digits[place]) == 1]
    if not once:
        answer = str(list(digits).count(None))
        return "how many places are empty?", answer, f"{_text(digits)}: {answer}"
    place = int(draw.choice(once))
    read = _text(digits[: place + 1])
    return f"where is the {digits[place]}?", PLACES[place], f"{read}: {PLACES[place]}"


KINDS: dict[str, Callable[[Digits, np.random.Generator], Asked]] = {
    "sum": _sum, "compare": _compare, "parity": _parity, "count": _count, "where": _where,
}  # fmt: skip
"""What is asked of every picture, in this order."""


# Pictures


def picture(split: str, index: int, sizes: tuple[int, int] = GLYPH_SIZES) -> npt.NDArray[np.uint8]:
    """(64, 64) grey values: dark digits of their own size, place and ink on light, slightly grainy paper.

    `sizes`: the smallest and the largest digit, in pixels; others than the task's own make a variant.
    """
    draw = _generator(split, 3, index)
    paper = float(draw.uniform(205, 250))
    canvas = np.full((PICTURE, PICTURE), paper)
    for place, glyph in enumerate(scenes(split)[index]):
        size = int(draw.integers(sizes[0], sizes[1] + 1))
        down, right = draw.integers(0, CELL - size + 1, 2).tolist()
        ink = float(draw.uniform(0, 90))
        if glyph >= 0:
            top, left = (place // 2) * CELL + down, (place % 2) * CELL + right
            drawn = _enlarged(glyphs()[0][glyph], size)
            canvas[top : top + size, left : left + size] = paper + (ink - paper) * drawn
    grain = draw.normal(0, 6, canvas.shape)
    return np.clip(np.rint(canvas + grain), 0, 255).astype(np.uint8)


def _enlarged(image: Floats, size: int) -> Floats:
    """(8, 8) to (size, size), linear between pixel centres, edges repeated; in numpy, so that no library's
    resize filter changes the pictures."""
    place = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
    low = np.minimum(place.astype(int), 6)
    weight = place - low
    rows = image[low] * (1 - weight)[:, None] + image[low + 1] * weight[:, None]
    return rows[:, low] * (1 - weight) + rows[:, low + 1] * weight


def _drawn(split: str, cache: Path) -> Path:
    """Directory with the split's pictures; drawn once, by one process at a time."""
    count = len(scenes(split))
    target = cache / f"digits-{VERSION}" / split
    while not target.exists():
        try:
            with files.lock(target.parent):
                files.remove_stale(target.parent)
                if not target.exists():
                    with files.new_directory(target) as directory:
                        for index in range(count):
                            Image.fromarray(picture(split, index)).save(directory / f"{index}.png")
                        files.write_text(directory / "pictures.json", json.dumps({"count": count}) + "\n")
        except StateError:
            time.sleep(WAIT_SECONDS)
    return target

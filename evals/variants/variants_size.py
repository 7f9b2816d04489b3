"""Objects of sizes that a built-in task's pictures never have.

In: a picture of easy-VQA or of the digit task. Out: the same picture with its object, or its digits, smaller
or larger. Not here: other tasks, whose objects nobody marked.

easy-VQA: one shape on an even background; it is cut out, resized about its centre and put back, whole.
Digits: the picture is drawn again, the same handwritten digits in the same places in other sizes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from evals import digits
from evals.tasks.question import Picture, opened
from evals.variants.variants_images import png
from runtime.errors import InputError

SIDES: dict[str, tuple[int, ...]] = {"smaller": (8, 7, 6, 5, 4), "larger": (42, 48, 54, 60)}
"""Pixels of the longer side of an easy-VQA shape; the task's own have 9 to 34 (of a picture of 64)."""
GLYPHS: dict[str, tuple[tuple[int, int], ...]] = {
    "smaller": ((18, 19), (15, 17), (13, 14), (10, 12), (8, 9)),
    "larger": ((29, 29), (30, 30), (31, 31), (32, 32)),
}
"""Smallest and largest side of a digit in pixels; the task's own have 20 to 28, and a place has 32."""
TOLD: dict[str, tuple[str, ...]] = {
    name: tuple(
        f"easy-VQA: shapes of {side} px (its own: 9 to 34); digits of {low} to {high} px (20 to 28)"
        for side, (low, high) in zip(SIDES[name], GLYPHS[name], strict=True)
    )
    for name in SIDES
}
FORMATS = ("easy-vqa", "digits")


def refuses(format_name: str) -> str:
    """Why a task has no such variant; empty when it has."""
    return "" if format_name in FORMATS else f"only {' and '.join(FORMATS)} know where their objects are"


@dataclass(frozen=True)
class Resized:
    """A picture that is changed when it is read."""

    picture: Picture
    format_name: str
    name: str
    severity: int

    def __call__(self) -> bytes:
        return _changed(self)


@functools.lru_cache(maxsize=8)
def _changed(source: Resized) -> bytes:
    if source.format_name == "easy-vqa":
        return png(resized(opened(source.picture), SIDES[source.name][source.severity - 1]))
    if not isinstance(source.picture, Path):
        raise InputError("digits: a picture of this task is a file of its cache")
    split, index = source.picture.parent.name, int(source.picture.stem)
    sizes = GLYPHS[source.name][source.severity - 1]
    return png(Image.fromarray(digits.picture(split, index, sizes)).convert("RGB"))


def resized(picture: Image.Image, side: int) -> Image.Image:
    """The one object of a picture, its longer side made `side` pixels, about its centre but all inside.

    The background is the most frequent colour; a picture of nothing else comes back as it is.
    """
    pixels = np.asarray(picture.convert("RGB"))
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    background = colours[counts.argmax()]
    rows, columns = np.nonzero((pixels != background).any(axis=2))
    if len(rows) == 0:
        return picture.convert("RGB")
    start = np.array([columns.min(), rows.min()])
    stop = np.array([columns.max(), rows.max()]) + 1
    whole = np.array([pixels.shape[1], pixels.shape[0]])
    size = np.maximum(1, np.rint((stop - start) * min(side, whole.min()) / (stop - start).max())).astype(int)
    place = np.clip(np.rint((start + stop - size) / 2).astype(int), 0, whole - size)
    found = Image.fromarray(pixels[start[1] : stop[1], start[0] : stop[0]])
    canvas = Image.new("RGB", (int(whole[0]), int(whole[1])), tuple(int(value) for value in background))
    resample = Image.Resampling.BICUBIC
    canvas.paste(found.resize((int(size[0]), int(size[1])), resample), (int(place[0]), int(place[1])))
    return canvas

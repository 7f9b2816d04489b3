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
from evals.variants_images import png
from runtime.errors import InputError

TOLD: dict[str, tuple[str, ...]] = {
    "smaller": tuple(f"objects about {share:.0%} of their size" for share in (0.85, 0.7, 0.55, 0.4, 0.3)),
    "larger": tuple(f"objects up to {share:.0%} of their size" for share in (1.15, 1.3, 1.6, 2.0)),
}
SCALES = {"smaller": (0.85, 0.7, 0.55, 0.4, 0.3), "larger": (1.15, 1.3, 1.6, 2.0)}
"""Of easy-VQA's shapes; a larger one ends at the picture's edge."""
GLYPHS: dict[str, tuple[tuple[int, int], ...]] = {
    "smaller": ((18, 19), (15, 17), (13, 14), (10, 12), (8, 9)),
    "larger": ((29, 29), (30, 30), (31, 31), (32, 32)),
}
"""Pixels of a digit, both included; the task's own have 20 to 28, and a place has 32."""
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
        return png(resized(opened(source.picture), SCALES[source.name][source.severity - 1]))
    if not isinstance(source.picture, Path):
        raise InputError("digits: a picture of this task is a file of its cache")
    split, index = source.picture.parent.name, int(source.picture.stem)
    sizes = GLYPHS[source.name][source.severity - 1]
    return png(Image.fromarray(digits.picture(split, index, sizes)).convert("RGB"))


def resized(picture: Image.Image, scale: float) -> Image.Image:
    """The one object of a picture, scaled about its centre and moved inside where it would stick out.

    The background is the colour of the first pixel; a picture of nothing else comes back as it is.
    """
    pixels = np.asarray(picture.convert("RGB"))
    background = pixels[0, 0]
    rows, columns = np.nonzero((pixels != background).any(axis=2))
    if len(rows) == 0:
        return picture.convert("RGB")
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    height, width = bottom - top, right - left
    fits = min(scale, pixels.shape[0] / height, pixels.shape[1] / width)
    size = (max(1, round(width * fits)), max(1, round(height * fits)))  # columns, rows
    found = Image.fromarray(pixels[top:bottom, left:right]).resize(size, Image.Resampling.BICUBIC)
    place = [
        int(np.clip(round((start + end) / 2 - length / 2), 0, whole - length))
        for start, end, length, whole in zip(
            (left, top), (right, bottom), size, (pixels.shape[1], pixels.shape[0]), strict=True
        )
    ]
    canvas = Image.new("RGB", (pixels.shape[1], pixels.shape[0]), tuple(int(c) for c in background))
    canvas.paste(found, (place[0], place[1]))
    return canvas

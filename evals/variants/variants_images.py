"""Pictures made worse: blur, noise, JPEG, contrast, rotation, by severity 1 to 5.

In: a picture. Out: the changed picture, as pixels or as a PNG file. Not here: which of them a task gets.

Noise, blur, JPEG and contrast follow ImageNet-C (Hendrycks and Dietterich 2019, gaussian_noise,
gaussian_blur, jpeg_compression, contrast), whose pictures have 224 pixels on their shorter side; blur and the
grain of noise grow with the picture, so that a severity means the same in a small and in a large one. JPEG's
blocks have 8 pixels always, and noise is at least a pixel fine, so both are harder on small pictures.
Rotation is not in ImageNet-C.
Arithmetic is numpy's, but for JPEG, which is Pillow's libjpeg: its bytes may differ between versions.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.tasks.question import Picture, opened, picture_sha256

Floats = NDArray[np.float64]
SHORTER_SIDE = 224
"""Pixels of ImageNet-C's pictures, to which its parameters belong."""
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of a range of 1
BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)  # standard deviation, pixels at SHORTER_SIDE
QUALITY = (25, 18, 15, 10, 7)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # of the distance from the picture's mean
DEGREES = (5.0, 10.0, 15.0, 20.0, 30.0)


@dataclass(frozen=True)
class Corruption:
    """`change` takes pixels (rows, columns, 3) in 0..1, a severity and a generator."""

    name: str
    told: tuple[str, ...]
    change: Callable[[Floats, int, np.random.Generator], Floats]


def blur(pixels: Floats, severity: int, _: np.random.Generator) -> Floats:
    """Gaussian, integrated over each pixel and cut at 4 standard deviations; edges are repeated."""
    sigma = BLUR[severity - 1] * min(pixels.shape[:2]) / SHORTER_SIDE
    radius = int(np.ceil(4 * sigma))
    borders = np.arange(-radius, radius + 2) - 0.5
    kernel = np.diff([math.erf(border / (sigma * math.sqrt(2))) for border in borders])
    kernel /= kernel.sum()
    for axis in (0, 1):
        padding = [(radius, radius) if axis == each else (0, 0) for each in range(3)]
        wide = np.pad(pixels, padding, mode="edge")
        size = pixels.shape[axis]
        pixels = sum(
            (weight * wide.take(range(start, start + size), axis) for start, weight in enumerate(kernel)),
            np.zeros_like(pixels),
        )
    return pixels


def noise(pixels: Floats, severity: int, draw: np.random.Generator) -> Floats:
    """Gaussian, independent in each channel, of a grain of one pixel at SHORTER_SIDE."""
    rows, columns, channels = pixels.shape
    grain = max(1, round(min(rows, columns) / SHORTER_SIDE))
    shape = (-(-rows // grain), -(-columns // grain), channels)
    drawn = draw.normal(0.0, NOISE[severity - 1], shape)
    return pixels + drawn.repeat(grain, 0).repeat(grain, 1)[:rows, :columns]


def jpeg(pixels: Floats, severity: int, _: np.random.Generator) -> Floats:
    """Compressed and read again."""
    file = io.BytesIO()
    _image(pixels).save(file, "JPEG", quality=QUALITY[severity - 1])
    with Image.open(file) as read:
        return np.asarray(read.convert("RGB"), np.float64) / 255


def contrast(pixels: Floats, severity: int, _: np.random.Generator) -> Floats:
    """Every channel drawn towards its mean over the picture."""
    mean = pixels.mean(axis=(0, 1))
    return mean + (pixels - mean) * CONTRAST[severity - 1]


def rotation(pixels: Floats, severity: int, draw: np.random.Generator) -> Floats:
    """About the centre, to either side, and made as much smaller as keeps its corners inside.

    Linear between pixels; what was not there takes the median colour of the edge.
    """
    angle = np.deg2rad(DEGREES[severity - 1] * draw.choice((-1.0, 1.0)))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    filled = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=0.0)
    filled[[0, -1]], filled[:, [0, -1]] = np.median(edge, axis=0), np.median(edge, axis=0)
    rows, columns = pixels.shape[:2]
    across, along = abs(np.sin(angle)), abs(np.cos(angle))
    fit = max(along + across * rows / columns, along + across * columns / rows)
    down, right = np.mgrid[0:rows, 0:columns] - np.array([(rows - 1) / 2, (columns - 1) / 2])[:, None, None]
    y = fit * (np.cos(angle) * down - np.sin(angle) * right) + (rows - 1) / 2 + 1
    x = fit * (np.sin(angle) * down + np.cos(angle) * right) + (columns - 1) / 2 + 1
    y, x = np.clip(y, 0, rows + 1), np.clip(x, 0, columns + 1)
    top, left = np.minimum(y.astype(int), rows), np.minimum(x.astype(int), columns)
    v, h = (y - top)[..., None], (x - left)[..., None]
    upper = filled[top, left] * (1 - h) + filled[top, left + 1] * h
    lower = filled[top + 1, left] * (1 - h) + filled[top + 1, left + 1] * h
    return upper * (1 - v) + lower * v


CORRUPTIONS = (
    Corruption("blur", tuple(f"Gaussian, sigma {s:g} px at 224 px" for s in BLUR), blur),
    Corruption("noise", tuple(f"Gaussian, sigma {s:g} of the range" for s in NOISE), noise),
    Corruption("jpeg", tuple(f"JPEG, quality {q}" for q in QUALITY), jpeg),
    Corruption("contrast", tuple(f"contrast times {c:g}" for c in CONTRAST), contrast),
    Corruption(
        "rotation", tuple(f"turned by {d:g} degrees, made smaller to stay whole" for d in DEGREES), rotation
    ),
)


def corrupted(picture: Image.Image, name: str, severity: int, seed: str) -> Image.Image:
    """An RGB picture changed; `seed` decides noise and direction. Raises ValueError for an unknown name."""
    found = next((one for one in CORRUPTIONS if one.name == name), None)
    if found is None or not 1 <= severity <= len(found.told):
        raise ValueError(f"corrupted: no {name!r} of severity {severity}")
    digest = hashlib.sha256(f"{name}-{severity}-{seed}".encode()).digest()
    draw = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return _image(found.change(np.asarray(picture.convert("RGB"), np.float64) / 255, severity, draw))


def png(picture: Image.Image) -> bytes:
    """A PNG file's bytes."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


@dataclass(frozen=True)
class Corrupted:
    """A picture that is changed when it is read; what was read last is remembered, for its next questions."""

    picture: Picture
    name: str
    severity: int

    def __call__(self) -> bytes:
        in_memory = isinstance(self.picture, Image.Image)  # has no hash to be remembered by
        return _changed(self) if in_memory else _remembered(self)


def _changed(source: Corrupted) -> bytes:
    seed = picture_sha256(source.picture)
    return png(corrupted(opened(source.picture), source.name, source.severity, seed))


_remembered = functools.lru_cache(maxsize=8)(_changed)


def _image(pixels: Floats) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8), "RGB")

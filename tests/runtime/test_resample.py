"""Resizing equals torchvision's byte for byte; the reference is the real thing, not a stored answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tvF

from runtime import resample

FILTERS = ("bilinear", "bicubic", "lanczos")


def reference(pixels: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    mode = tvF.InterpolationMode[name.upper()]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return tvF.resize(tensor, [height, width], interpolation=mode, antialias=True).permute(1, 2, 0).numpy()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    ("height", "width", "to_height", "to_width"),
    [
        (96, 128, 64, 64),
        (777, 333, 64, 28),
        (40, 5000, 2, 64),
        (1, 1, 64, 64),
        (3, 2, 64, 44),
        (1000, 700, 512, 512),
    ],
)
def test_equals_torchvision(height: int, width: int, to_height: int, to_width: int, name: str) -> None:
    pixels = noise(height, width)
    got = resample.resize(pixels, to_height, to_width, name)
    assert np.array_equal(got, reference(pixels, to_height, to_width, name))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(2, 90)] * 4),  # at width 1 torch itself fails an assertion
    name=st.sampled_from(FILTERS),
    contrast=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_torchvision_for_any_size(
    sizes: tuple[int, int, int, int], name: str, contrast: bool, seed: int
) -> None:
    pixels = noise(sizes[0], sizes[1], seed)
    if contrast:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)  # overshoot saturates
    assert np.array_equal(
        resample.resize(pixels, sizes[2], sizes[3], name), reference(pixels, sizes[2], sizes[3], name)
    )


def test_same_size_is_untouched() -> None:
    pixels = noise(9, 7)
    assert resample.resize(pixels, 9, 7, "lanczos") is pixels


@pytest.mark.parametrize("name", FILTERS)
def test_a_flat_picture_stays_flat(name: str) -> None:
    flat = np.full((50, 70, 3), 200, dtype=np.uint8)
    assert (resample.resize(flat, 13, 91, name) == 200).all()

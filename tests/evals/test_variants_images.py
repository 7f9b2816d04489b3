"""Corruptions by their definitions: strength, what stays, and the formulas that they follow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evals.variants.variants_images import CONTRAST, CORRUPTIONS, DEGREES, NOISE, corrupted

NAMES = [one.name for one in CORRUPTIONS]


def photo(rows: int = 60, columns: int = 80, seed: int = 0) -> Image.Image:
    """Smooth shapes with edges, as pictures have."""
    y, x = np.mgrid[0:rows, 0:columns]
    draw = np.random.default_rng(seed)
    channels = []
    for _ in range(3):
        channel = 110 + 70 * np.sin(x / draw.uniform(4, 12)) + 40 * (y > draw.uniform(0.2, 0.8) * rows)
        channels.append(np.clip(channel, 0, 255))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def distance(before: Image.Image, after: Image.Image) -> float:
    return float(np.sqrt(np.mean((np.asarray(before, np.float64) - np.asarray(after, np.float64)) ** 2)))


@pytest.mark.parametrize("name", NAMES)
def test_every_severity_is_farther_from_the_picture(name: str) -> None:
    # a turned texture is as far away at any angle: rotation is tested on one edge
    picture = photo()
    if name == "rotation":
        picture = Image.fromarray(
            np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
        )
    found = [distance(picture, corrupted(picture, name, severity, "a")) for severity in range(1, 6)]
    assert found == sorted(found) and found[0] > 0, found


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 70), st.integers(1, 70), st.text(max_size=4))
def test_size_and_repetition(name: str, severity: int, rows: int, columns: int, seed: str) -> None:
    picture = photo(rows, columns)
    found = corrupted(picture, name, severity, seed)
    assert found.size == picture.size and found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(corrupted(picture, name, severity, seed)))


@pytest.mark.parametrize("name", NAMES)
def test_an_even_picture_stays_even_but_for_noise(name: str) -> None:
    picture = Image.new("RGB", (40, 30), (120, 60, 200))
    found = np.asarray(corrupted(picture, name, 3, "a")).astype(int)
    spread = np.abs(found - np.array([120, 60, 200])).max()
    assert spread > 20 if name == "noise" else spread <= 6, spread  # JPEG rounds colours


def test_blur_is_pillow_s_gaussian_nearly() -> None:
    """Pillow approximates a Gaussian by boxes; the standard deviation at 224 px is 3 px."""
    from PIL import ImageFilter

    point = Image.new("RGB", (224, 224))
    point.paste((255, 255, 255), (104, 104, 120, 120))
    ours, theirs = corrupted(point, "blur", 3, "a"), point.filter(ImageFilter.GaussianBlur(3.0))
    assert distance(ours, theirs) < 1.0 < distance(ours, point)


def test_blur_grows_with_the_picture() -> None:
    """A picture twice as large is blurred twice as wide: made small again, it looks the same."""
    small = photo(112, 112)
    large = small.resize((224, 224), Image.Resampling.BICUBIC)
    halved = corrupted(large, "blur", 3, "a").resize((112, 112), Image.Resampling.BOX)
    assert distance(halved, corrupted(small, "blur", 3, "a")) < 0.5 * distance(halved, small)


def test_noise_has_its_standard_deviation_and_grain() -> None:
    grey = Image.new("RGB", (224, 224), (128, 128, 128))
    found = np.asarray(corrupted(grey, "noise", 1, "a"), np.float64) / 255
    assert found.std() == pytest.approx(NOISE[0], rel=0.02)
    large = np.asarray(corrupted(Image.new("RGB", (450, 448), (128, 128, 128)), "noise", 1, "a"))
    blocks = large[:448, :448].reshape(224, 2, 224, 2, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert not np.array_equal(found, np.asarray(corrupted(grey, "noise", 1, "b")))


def test_contrast_keeps_the_mean_and_shrinks_the_rest() -> None:
    before, after = (np.asarray(x, np.float64) for x in (photo(), corrupted(photo(), "contrast", 3, "a")))
    assert np.allclose(before.mean((0, 1)), after.mean((0, 1)), atol=0.5)
    assert after.std((0, 1)) / before.std((0, 1)) == pytest.approx(np.full(3, CONTRAST[2]), abs=0.01)


def test_jpeg_is_pillow_s() -> None:
    file = io.BytesIO()
    photo().save(file, "JPEG", quality=15)
    assert np.array_equal(np.asarray(corrupted(photo(), "jpeg", 3, "a")), np.asarray(Image.open(file)))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("size", [(64, 64), (90, 40)])
def test_a_turned_picture_stays_whole(severity: int, size: tuple[int, int]) -> None:
    """A mark in each corner is still there, turned by the angle; to which side, the seed decides."""
    width, height = size
    centres = {(3, 3), (width - 4, 3), (3, height - 4), (width - 4, height - 4)}
    angles = set()
    for seed in "abcdefgh":
        picture = Image.new("RGB", size, (250, 250, 250))
        for x, y in centres:
            picture.paste((200, 0, 0), (x - 3, y - 3, x + 4, y + 4))
        picture.paste((0, 0, 200), (0, 0, 7, 7))  # one corner can be told from the others
        found = np.asarray(corrupted(picture, "rotation", severity, seed)).astype(int)
        red = (found[..., 0] - found[..., 2]) > 60
        blue = (found[..., 2] - found[..., 0]) > 60
        assert red.any() and blue.any()
        assert not (red[0].all() or red[-1].all())
        y, x = (axis.mean() for axis in np.nonzero(blue))
        before = np.arctan2(3 - (height - 1) / 2, 3 - (width - 1) / 2)
        after = np.arctan2(y - (height - 1) / 2, x - (width - 1) / 2)
        turned = np.rad2deg((after - before + np.pi) % (2 * np.pi) - np.pi)
        assert abs(turned) == pytest.approx(DEGREES[severity - 1], abs=2.5)
        angles.add(bool(turned > 0))
    assert angles == {True, False}


@pytest.mark.parametrize(("name", "severity"), [("fog", 1), ("blur", 0), ("blur", 6)])
def test_unknown_ones_are_refused(name: str, severity: int) -> None:
    with pytest.raises(ValueError, match="severity"):
        corrupted(photo(), name, severity, "a")

"""Views are those of transformers' image processors with the settings of real models, bit for bit.

No tolerance: both sides do the same integer resampling, then the same two float32 operations.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime import image, resample
from runtime.errors import InputError
from runtime.image import PreparedImage
from tests.runtime.processors import processors, small_processors, spec_of

PROCESSORS = {**processors(), **small_processors()}
SPECS = {name: spec_of(*found) for name, found in PROCESSORS.items()}
SHAPES = [
    (1000, 1), (1, 1000), (333, 777), (1024, 768), (5, 3), (1, 1), (2000, 300), (513, 512), (640, 512)
]  # fmt: skip
"""(width, height): needles, a portrait, a photo, a few pixels, a banner, one over a tile, a tie of grids."""


def picture(width: int, height: int, channels: int = 3) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 120 * np.sin(x / (7 + 3 * k) + y / (11 + k) + k) for k in range(channels)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8).squeeze(-1 if channels == 1 else ()))


def expected(name: str, source: Any) -> dict[str, np.ndarray]:
    """The processor's tensors of one picture, the views on the first axis."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PROCESSORS[name][0](source, return_tensors="np")
    values = found["pixel_values"]
    inputs = {"pixel_values": values[0] if values.ndim == 5 else values}
    for key in ("image_grid_thw", "spatial_shapes"):
        if key in found:
            inputs[key] = found[key]
    if "spatial_shapes" in found:
        inputs["pixel_attention_mask"] = found["pixel_attention_mask"]
    return inputs


def joined(prepared: PreparedImage) -> dict[str, np.ndarray]:
    """Our tensors, the views on the first axis."""
    names = prepared.views[0].inputs
    return {name: np.concatenate([view.inputs[name] for view in prepared.views]) for name in names}


def assert_same(name: str, source: Any, ours: Any = None) -> PreparedImage:
    wanted = expected(name, source)
    prepared = image.prepare(source if ours is None else ours, SPECS[name])
    got = joined(prepared)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].shape == value.shape, key
        assert np.array_equal(got[key], value), f"{key} differs by {np.abs(got[key] - value).max()}"
    return prepared


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("name", processors())
def test_views(name: str, width: int, height: int) -> None:
    source = picture(width, height)
    if name.startswith("qwen") and max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="aspect ratio"):
            expected(name, source)
        with pytest.raises(InputError, match=f"{width} x {height}: one side is more than 200 times"):
            image.prepare(source, SPECS[name])
        return
    prepared = assert_same(name, source)
    assert len(prepared.views) <= SPECS[name].max_views
    assert prepared.tokens <= SPECS[name].max_tokens
    rows, columns = prepared.tiles
    assert len(prepared.views) - rows * columns in (0, 1)


@settings(max_examples=250, deadline=None)
@given(name=st.sampled_from(list(small_processors())), width=st.integers(1, 200), height=st.integers(1, 200))
def test_views_of_any_size(name: str, width: int, height: int) -> None:
    try:
        assert_same(name, picture(width, height))
    except InputError as error:  # what a model could not take either
        assert name == "adaptive"
        assert "too long and thin" in str(error)
        assert max(width, height) > 4 * min(width, height)


def saved(directory: Path, name: str, source: Image.Image, **options: Any) -> Path:
    path = directory / name
    source.save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x112] = orientation
    return found


FILES: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
    "turned": ("a.jpg", picture(900, 700), {"exif": exif(6), "quality": 85}),
    "mirrored": ("a.png", picture(700, 900), {"exif": exif(7)}),
    "alpha": ("a.png", picture(700, 450, 4), {}),
    "gray": ("a.png", picture(450, 700, 1), {}),
    "gray-alpha": ("a.png", picture(450, 70, 2), {}),
    "palette": ("a.png", picture(333, 222).quantize(64), {"transparency": 3}),
    "black-white": ("a.png", picture(90, 270, 1).convert("1"), {}),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["smolvlm-256m-whole", "qwen2.5-vl", "internvl", "lfm2-vl", "gemma3"])
def test_kinds_of_files_and_pixels(name: str, kind: str, tmp_path: Path) -> None:
    """As a file, as its bytes, and as a PIL image, which is not turned and whose alpha is laid over white."""
    path = saved(tmp_path, FILES[kind][0], FILES[kind][1], **FILES[kind][2])
    assert_same(name, str(path), path.read_bytes())
    opened = Image.open(path)
    if opened.mode == "RGB" or PROCESSORS[name][0].do_convert_rgb:
        assert_same(name, opened)
    else:  # the processor has no conversion and refuses; here it is as with the others
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            expected(name, opened)
        assert image.prepare(opened, SPECS[name]).views


@pytest.mark.parametrize(("width", "height"), [(1, 1200), (1200, 1), (3, 30_000)])
def test_more_patches_than_padded_are_refused(width: int, height: int) -> None:
    """The processor lets them through with a mask that is too short, and the model fails on them."""
    found = expected("lfm2-vl", picture(width, height))
    assert found["pixel_values"].shape[1] > found["pixel_attention_mask"].shape[1]
    with pytest.raises(InputError, match=r"too long and thin: .* patches, the most is 1024; crop it"):
        image.prepare(picture(width, height), SPECS["lfm2-vl"])


def test_a_needle_is_refused_before_its_views_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a million pixels would become a whole view of 16 million."""

    def fail(*_: Any) -> None:
        raise AssertionError("was resized")

    monkeypatch.setattr(resample, "resize", fail)
    for name in ("lfm2-vl", "lfm2-vl-whole"):
        with pytest.raises(InputError, match="too long and thin"):
            image.prepare(Image.new("RGB", (1_000_000, 1)), SPECS[name])
    monkeypatch.undo()
    tiled = image.prepare(picture(40_000, 40), SPECS["lfm2-vl-no-thumbnail"])
    assert (tiled.tiles, len(tiled.views)) == ((1, 10), 10)  # no whole view, so none is too long

"""Views are those of transformers' image processors with the settings of real models, bit for bit.

No tolerance: both sides do the same integer resampling, then the same two float32 operations.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import image
from runtime.errors import InputError
from runtime.image import PreparedImage
from tests.runtime.processors import processors, spec_of

PROCESSORS = processors()
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
@pytest.mark.parametrize("name", PROCESSORS)
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

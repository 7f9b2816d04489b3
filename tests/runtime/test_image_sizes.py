"""Sizes and grids are those of transformers' own functions, for any picture's size; no pixel is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Lfm2VlImageProcessor, SmolVLMImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import (
    get_all_supported_aspect_ratios,
    get_optimal_tiled_canvas,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.smolvlm.image_processing_smolvlm import get_resize_output_image_size

from runtime import geometry
from runtime.errors import InputError
from runtime.image_spec import (
    GridTiles,
    LargePicture,
    ResizeExact,
    SmartResize,
)
from tests.runtime.processors import processors

PROCESSORS = processors()
WHOLE = ResizeExact(height=8, width=8, filter="bilinear")


def edges(most: int = 20_000) -> st.SearchStrategy[int]:
    """Edges of all magnitudes, and multiples of usual steps, where roundings and ties lie."""
    small, large = st.integers(1, 99), st.integers(1, most)
    steps = st.sampled_from([14, 16, 28, 32, 448])
    multiples = st.builds(lambda count, step: count * step, st.integers(1, 40), steps)
    return st.one_of(small, large, multiples)


@st.composite
def smart_resizes(draw: Any) -> SmartResize:
    """As large as any model's, with an aspect limit."""
    factor = draw(st.sampled_from([1, 4, 14, 28, 32]))
    most = draw(st.integers(factor**2, 3000 * factor**2))
    return SmartResize(
        factor=factor,
        min_pixels=draw(st.integers(1, most)),
        max_pixels=most,
        aspect_limit=200,
        filter="bicubic",
    )


def at_most(tokens: int) -> SmartResize:
    most = tokens * 28 * 28
    return SmartResize(factor=28, min_pixels=3136, max_pixels=most, aspect_limit=200, filter="bicubic")


# --- against transformers ------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(height=edges(), width=edges(), resize=smart_resizes())
@example(height=5129, width=5129, resize=at_most(64))  # the order of the divisions decides
@example(height=5760, width=4608, resize=at_most(1280))
def test_smart_size_with_an_aspect_limit(height: int, width: int, resize: SmartResize) -> None:
    try:
        wanted = smart_resize(height, width, resize.factor, resize.min_pixels, resize.max_pixels)
    except ValueError:
        with pytest.raises(InputError, match="more than 200 times the other; crop it"):
            geometry.smart_size(height, width, resize)
    else:
        assert geometry.smart_size(height, width, resize) == wanted


@settings(max_examples=400, deadline=None)
@given(
    height=edges(),
    width=edges(),
    patch=st.sampled_from([4, 14, 16]),
    factor=st.integers(1, 4),
    tokens=st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted),
    tolerance=st.sampled_from([1.0, 1.7, 2.0]),
)
def test_smart_size_of_one_factor_at_least_and_what_is_large(
    height: int, width: int, patch: int, factor: int, tokens: list[int], tolerance: float
) -> None:
    given_tokens = {"min_image_tokens": tokens[0], "max_image_tokens": tokens[1], "encoder_patch_size": patch}
    processor = Lfm2VlImageProcessor(downsample_factor=factor, max_pixels_tolerance=tolerance, **given_tokens)
    step = patch * factor
    resize = SmartResize(
        factor=step,
        min_pixels=tokens[0] * step**2,
        max_pixels=tokens[1] * step**2,
        at_least_factor=True,
        filter="bilinear",
    )
    wanted = processor.smart_resize(height, width, factor, *tokens, patch)
    assert geometry.smart_size(height, width, resize) == wanted[::-1]
    large = LargePicture(factor=step, least=patch, pixels=resize.max_pixels * tolerance)
    assert geometry.is_large(height, width, large) == processor._is_image_too_large(
        height, width, tokens[1], patch, factor, tolerance
    )


def grid_tiles(columns_rows: list[tuple[int, int]], height: int, width: int) -> GridTiles:
    grids = tuple((rows, columns) for columns, rows in columns_rows)
    return GridTiles(height=height, width=width, grids=grids, whole=WHOLE, filter="bilinear")


@settings(max_examples=400, deadline=None)
@given(
    height=edges(3000),
    width=edges(3000),
    counts=st.tuples(st.integers(1, 12), st.integers(1, 12)).map(sorted),
    tile=st.tuples(st.sampled_from([32, 384, 448]), st.sampled_from([32, 448])),
)
@example(height=64, width=64, counts=[1, 4], tile=(32, 64))  # exactly half of the larger grid's pixels
def test_grid_is_the_optimal_canvas(
    height: int, width: int, counts: list[int], tile: tuple[int, int]
) -> None:
    candidates = get_all_supported_aspect_ratios(*counts)
    wanted = get_optimal_tiled_canvas((height, width), tile, *counts)
    assert geometry.nearest_grid(height, width, grid_tiles(candidates, *tile)) == wanted[::-1]


@settings(max_examples=300, deadline=None)
@given(height=edges(3000), width=edges(3000), most=st.integers(2, 12))
def test_grid_is_the_layout_of_the_processor(height: int, width: int, most: int) -> None:
    """Also with fewer tiles in the order of more, which is another one than a processor of fewer has."""
    processor = PROCESSORS["lfm2-vl"][0]
    wanted = processor._get_grid_layout(height, width, 2, most, 512)[:2]
    fewer = [grid for grid in processor._target_ratios(2, 12) if grid[0] * grid[1] <= most]
    for candidates in (processor._target_ratios(2, most), fewer):
        found = grid_tiles(candidates, 512, 512)
        assert geometry.nearest_grid(height, width, found) == wanted[::-1]


@settings(max_examples=300, deadline=None)
@given(height=edges(), width=edges(), longest=st.integers(1, 5000), side=st.sampled_from([14, 64, 364, 512]))
def test_longest_edge_then_multiples(height: int, width: int, longest: int, side: int) -> None:
    """The processor runs on tensors without memory, which have a size only."""
    got = geometry.longest_edge_size(height, width, longest, 4096)
    assert got == get_resize_output_image_size(torch.empty(3, height, width, device="meta"), longest)
    multiples = geometry.split_size(*got, side)
    picture = torch.empty(1, 3, *got, device="meta")
    resized = SmolVLMImageProcessor().resize_for_vision_encoder(picture, side)
    assert multiples == tuple(resized.shape[-2:])

"""Image processors of transformers with the settings of real models, and their image sections by hand.

They test the runtime, not the exporter.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3ImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Lfm2VlImageProcessor,
    Qwen2VLImageProcessor,
    SmolVLMImageProcessor,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_all_supported_aspect_ratios

from runtime.image_limits import bounded
from runtime.image_spec import (
    ExifRotate,
    GridTiles,
    ImageOperation,
    ImageSpec,
    LargePicture,
    Normalise,
    PatchifyBlocks,
    PatchifyPadded,
    ResizeExact,
    ResizeLongestEdge,
    SmartResize,
    SplitTiles,
    TokenGrid,
    ToNchw,
    ToRgb,
)

FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


def processors() -> dict[str, tuple[Any, TokenGrid]]:
    """Name -> image processor as the model's repository has it (fewer pixels where noted), its tokens."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    split = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, **half}
    whole = {**split, "size": {"longest_edge": 512}, "do_image_splitting": False}
    clip = {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 90}}  # fewer
    sixteen = {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 65536 * 2}, **half}  # fewer
    tiles = {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12}
    square = {"size": {"height": 896, "width": 896}, **half}
    by_2, by_4, large = (TokenGrid(patch=p, merge=m) for p, m in ((14, 2), (14, 4), (16, 2)))
    return {
        "smolvlm-256m": (SmolVLMImageProcessor(**split), TokenGrid(patch=16, merge=4)),
        "smolvlm-256m-whole": (SmolVLMImageProcessor(**whole), TokenGrid(patch=16, merge=4)),
        "idefics3": (Idefics3ImageProcessor(), by_2),
        "qwen2.5-vl": (Qwen2VLImageProcessor(**clip), by_2),
        "qwen3-vl": (Qwen2VLImageProcessor(**sixteen), large),
        "internvl": (GotOcr2ImageProcessor(**tiles), by_2),
        "internvl-whole": (GotOcr2ImageProcessor(**{**tiles, "crop_to_patches": False}), by_2),
        "lfm2-vl": (Lfm2VlImageProcessor(**half), large),
        "lfm2-vl-no-thumbnail": (Lfm2VlImageProcessor(use_thumbnail=False), large),
        "lfm2-vl-whole": (Lfm2VlImageProcessor(do_image_splitting=False), large),
        "gemma3": (Gemma3ImageProcessor(**square), by_4),
    }


def small_processors() -> dict[str, tuple[Any, TokenGrid]]:
    """The same kinds with a few pixels, so that many sizes can be tried."""
    tokens = TokenGrid(patch=4, merge=2)
    split = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    patches = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 64 * 40}}
    tiles = {"size": {"height": 16, "width": 24}, "crop_to_patches": True, "max_patches": 6}
    adaptive = {"encoder_patch_size": 4, "tile_size": 32, "min_image_tokens": 4, "max_image_tokens": 16}
    return {
        "split": (SmolVLMImageProcessor(**split), tokens),
        "smart": (Qwen2VLImageProcessor(**patches), tokens),
        "grid": (GotOcr2ImageProcessor(**tiles), tokens),
        "adaptive": (Lfm2VlImageProcessor(**adaptive), tokens),
        "square": (Gemma3ImageProcessor(size={"height": 40, "width": 24}), tokens),
    }


def spec_of(processor: Any, tokens: TokenGrid) -> ImageSpec:
    """The image section that reproduces a processor of one of the kinds above."""
    kind = type(processor).__name__
    if kind in ("SmolVLMImageProcessor", "Idefics3ImageProcessor"):
        middle, layout = _split(processor), ToNchw()
    elif kind == "Qwen2VLImageProcessor":
        middle, layout = _smart(processor)
    elif kind == "Lfm2VlImageProcessor":
        middle, layout = _adaptive(processor)
    else:
        middle, layout = _square(processor), ToNchw()
    scale = 1.0 / processor.rescale_factor
    mean, std = (
        (torch.tensor(list(v)) * scale).tolist() for v in (processor.image_mean, processor.image_std)
    )
    return bounded(
        (
            ExifRotate(),
            ToRgb(file_alpha="drop", pixels_alpha="white"),
            *middle,
            Normalise(subtract=tuple(mean), divide=tuple(std)),
            layout,
        ),
        tokens,
    )


def _split(processor: Any) -> tuple[ImageOperation, ...]:
    name, side = FILTERS[int(processor.resample)], processor.max_image_size["longest_edge"]
    first = ResizeLongestEdge(longest_edge=processor.size["longest_edge"], cap=4096, filter=name)
    if processor.do_image_splitting:
        return first, SplitTiles(side=side, filter=name)
    return first, ResizeExact(height=side, width=side, filter=name)


def _square(processor: Any) -> tuple[ImageOperation, ...]:
    name, size = FILTERS[int(processor.resample)], processor.size
    whole = ResizeExact(height=size["height"], width=size["width"], filter=name)
    if not getattr(processor, "crop_to_patches", False):
        return (whole,)
    candidates = get_all_supported_aspect_ratios(processor.min_patches, processor.max_patches)
    grids = tuple((rows, columns) for columns, rows in candidates)
    return (GridTiles(height=whole.height, width=whole.width, grids=grids, whole=whole, filter=name),)


def _smart(processor: Any) -> tuple[tuple[ImageOperation, ...], PatchifyBlocks]:
    patch, merge = processor.patch_size, processor.merge_size
    resize = SmartResize(
        factor=patch * merge,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
        aspect_limit=200,
        filter=FILTERS[int(processor.resample)],
    )
    return (resize,), PatchifyBlocks(patch=patch, merge=merge, frames=processor.temporal_patch_size)


def _adaptive(processor: Any) -> tuple[tuple[ImageOperation, ...], PatchifyPadded]:
    patch, name = processor.encoder_patch_size, FILTERS[int(processor.resample)]
    token = patch * processor.downsample_factor
    resize = SmartResize(
        factor=token,
        min_pixels=processor.min_image_tokens * token**2,
        max_pixels=processor.max_image_tokens * token**2,
        at_least_factor=True,
        filter=name,
    )
    layout = PatchifyPadded(patch=patch, length=processor.max_num_patches)
    if not processor.do_image_splitting:
        return (resize,), layout
    candidates = processor._target_ratios(processor.min_tiles, processor.max_tiles)
    tiles = GridTiles(
        height=processor.tile_size,
        width=processor.tile_size,
        grids=tuple((rows, columns) for columns, rows in candidates),
        only=LargePicture(
            factor=token, least=patch, pixels=resize.max_pixels * processor.max_pixels_tolerance
        ),
        whole=resize,
        whole_after_tiles=processor.use_thumbnail,
        filter=name,
    )
    return (tiles,), layout

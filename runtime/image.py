"""From a picture to the vision part's input, by the operations that a manifest names.

In: a path, the bytes of a file, or a PIL image, and a manifest's image section. Out: `PreparedImage`,
whose views hold what the vision part takes.
Not here: the vision part itself, sizes (`runtime/geometry.py`), cutting into views (`runtime/tiles.py`),
patches (`runtime/patches.py`), resampling arithmetic (`runtime/resample.py`).

Where a picture comes from matters, because it does so in transformers: a *file* (path or bytes) is turned
upright by its EXIF tag, a PIL image is taken as it is; `to_rgb@1` says what each does with transparency.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from runtime import geometry, patches, resample, tiles
from runtime.errors import InputError
from runtime.image_spec import (
    VIEWS,
    ExifRotate,
    GridTiles,
    ImageSpec,
    Normalise,
    PatchifyBlocks,
    PatchifyPadded,
    ResizeExact,
    ResizeLongestEdge,
    SmartResize,
    SplitTiles,
    ToBytes,
    ToNchw,
    ToRgb,
)

MAX_SOURCE_PIXELS = 100_000_000
ImageInput = Image.Image | Path | str | bytes
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class View:
    """One run of the vision part: `inputs` by tensor name, and the (rows, columns) of tokens it becomes."""

    inputs: dict[str, NDArray[Any]]
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class PreparedImage:
    """The views of one picture; `tiles`: (rows, columns) of those that are tiles, (0, 0) without any."""

    views: tuple[View, ...]
    tiles: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Image tokens of all views."""
        return sum(view.tokens for view in self.views)

    @property
    def pixels(self) -> tuple[NDArray[Any], ...]:
        """What each view's pixels became, to be compared."""
        return tuple(next(v for k, v in view.inputs.items() if k.startswith("pixel_")) for view in self.views)


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision part made of one picture, its views joined.

    `tokens` (image tokens, hidden), `grids` the (rows, columns) of each view's tokens, `deepstack`
    (layers, image tokens, hidden) where the family has it; float32.
    """

    tokens: NDArray[np.float32]
    grids: tuple[tuple[int, int], ...]
    deepstack: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def features_of(view: View, found: Sequence[NDArray[Any]]) -> ImageFeatures:
    """Features of one view from the vision part's outputs: its features, and deepstack's if there are any."""
    features, *stack = (each.astype(np.float32, copy=False) for each in found)
    features = features.reshape(-1, features.shape[-1])
    return ImageFeatures(features, (view.grid,), stack[0].reshape(-1, *features.shape) if stack else None)


def join_features(views: Sequence[ImageFeatures]) -> ImageFeatures:
    """The features of several views (or pictures) as one, in their order."""
    if len(views) == 1:
        return views[0]
    stacks = [view.deepstack for view in views if view.deepstack is not None]
    return ImageFeatures(
        np.concatenate([view.tokens for view in views]),
        tuple(grid for view in views for grid in view.grids),
        np.concatenate(stacks, axis=1) if stacks else None,
    )


def prepare(source: ImageInput, spec: ImageSpec, max_source_pixels: int = MAX_SOURCE_PIXELS) -> PreparedImage:
    """Load and transform one picture. Raises InputError in one line when it is no picture or too large."""
    from_file = not isinstance(source, Image.Image)
    value: Any = load(source, max_source_pixels)
    *picture_operations, layout = spec.operations
    normalise = None if isinstance(layout, ToBytes) else picture_operations.pop()
    views: list[Bytes] = []
    cut = (0, 0)
    for operation in picture_operations:
        if isinstance(layout, PatchifyPadded):
            _refuse_needle(value, operation, layout)
        if operation.op.split("@")[0] in VIEWS:
            views, cut = CUTS[type(operation)](value, operation)
        else:
            value = OPERATIONS[type(operation)](value, operation, from_file)
    return PreparedImage(
        tuple(
            View(
                LAYOUTS[type(layout)](pixels if normalise is None else _normalise(pixels, normalise), layout),
                spec.tokens.grid(*pixels.shape[:2]),
            )
            for pixels in views or [value]
        ),
        cut,
    )


# --- loading ----------------------------------------------------------


def load_decoders() -> None:
    """Import Pillow's usual decoders now, so that the first picture need not wait for them."""
    Image.preinit()


def load(source: ImageInput, max_source_pixels: int) -> Image.Image:
    """A decoded picture, the first frame of several. Its size is checked before any pixel is decoded."""
    if isinstance(source, Image.Image):
        _check_size(source, "image", max_source_pixels)
        return source
    name, opener = _open_file(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # our own limit is checked instead
            picture = Image.open(opener)
    except Image.DecompressionBombError:
        raise InputError(
            f"{name}: has more than {max_source_pixels} pixels, the limit; make it smaller"
        ) from None
    except Exception as error:  # decoders raise almost anything on hostile bytes
        raise InputError(
            f"{name}: is not an image that can be read; give a PNG, JPEG or WebP file"
        ) from error
    _check_size(picture, name, max_source_pixels)
    try:
        picture.load()
    except Exception as error:
        raise InputError(
            f"{name}: the image is truncated or damaged ({_short(error)}); save it again"
        ) from error
    return picture


def _open_file(source: Path | str | bytes) -> tuple[str, io.BytesIO]:
    if isinstance(source, bytes):
        return "image bytes", io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"image: got {type(source).__name__}, expected a path, bytes or a PIL image")
    if str(source).startswith(("http:", "https:")):
        raise InputError(f"{source}: addresses are not fetched; download the image and give its path")
    try:
        return str(source), io.BytesIO(Path(source).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{source}: cannot be read ({reason}); give the path of an image file") from error


def _check_size(picture: Image.Image, name: str, max_source_pixels: int) -> None:
    width, height = picture.size
    if not width * height:
        raise InputError(f"{name}: is empty ({width} x {height}); give an image with pixels")
    if width * height > max_source_pixels:
        raise InputError(
            f"{name}: {width} x {height} is {width * height} pixels, the limit is {max_source_pixels}; "
            "make it smaller"
        )


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


# --- operations -------------------------------------------------------


def _exif_rotate(picture: Image.Image, _: ExifRotate, from_file: bool) -> Image.Image:
    if not from_file:
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # an unreadable EXIF block says nothing about the pixels
        return picture


def _to_rgb(picture: Image.Image, operation: ToRgb, from_file: bool) -> Bytes:
    if from_file and picture.mode.startswith("I"):
        picture = _high_byte(picture)
    alpha = operation.file_alpha if from_file else operation.pixels_alpha
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on palettes with transparency
        if alpha == "white" and ("A" in picture.getbands() or picture.info.get("transparency") is not None):
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
        return np.asarray(picture.convert("RGB"))


def _high_byte(picture: Image.Image) -> Image.Image:
    """16-bit gray to 8-bit by its high byte. Pillow would clip to white, transformers would not rescale."""
    return Image.fromarray((np.clip(np.asarray(picture), 0, 65535).astype(np.uint16) >> 8).astype(np.uint8))


def _resize_longest_edge(pixels: Bytes, operation: ResizeLongestEdge, _: bool) -> Bytes:
    height, width = pixels.shape[:2]
    size = geometry.longest_edge_size(height, width, operation.longest_edge, operation.cap)
    return resample.resize(pixels, *size, operation.filter)


def _resize(pixels: Bytes, operation: ResizeExact | SmartResize, _: bool) -> Bytes:
    return tiles.resized(pixels, operation)


def _refuse_needle(value: Any, operation: Any, layout: PatchifyPadded) -> None:
    """A view with too many patches could also be too large for the memory: refused before it is made."""
    if not isinstance(operation, (GridTiles, SmartResize)):
        return
    height, width = value.shape[:2]
    if isinstance(operation, GridTiles):
        size = geometry.grid_plan(height, width, operation)[1]
    else:
        size = geometry.smart_size(height, width, operation)
    if size is not None:
        patches.refuse_needle(*size, layout)


def _normalise(pixels: Bytes, operation: Any) -> NDArray[np.float32]:
    assert isinstance(operation, Normalise)  # the manifest's order
    subtract, divide = (
        np.array(values, dtype=np.float32) for values in (operation.subtract, operation.divide)
    )
    return (pixels.astype(np.float32) - subtract) / divide


def _to_nchw(values: NDArray[np.float32], _: ToNchw) -> dict[str, NDArray[Any]]:
    return {"pixel_values": np.ascontiguousarray(values.transpose(2, 0, 1)[None])}


OPERATIONS: dict[type, Callable[[Any, Any, bool], Any]] = {
    ExifRotate: _exif_rotate,
    ToRgb: _to_rgb,
    ResizeLongestEdge: _resize_longest_edge,
    ResizeExact: _resize,
    SmartResize: _resize,
}
"""On the picture: (value, operation, whether it is from a file) -> value."""

CUTS: dict[type, Callable[[Bytes, Any], tiles.Cut]] = {SplitTiles: tiles.split, GridTiles: tiles.grid}
"""(H, W, 3) bytes -> views as bytes, in their order, and the (rows, columns) of tiles."""

LAYOUTS: dict[type, Callable[[NDArray[Any], Any], dict[str, NDArray[Any]]]] = {
    ToNchw: _to_nchw,
    PatchifyBlocks: patches.blocks,
    PatchifyPadded: patches.padded,
    ToBytes: lambda pixels, _: {"pixel_bytes": np.ascontiguousarray(pixels)},
}
"""A view's (H, W, 3), float32 or bytes -> the vision part's inputs by name."""

"""The manifest's image section: how a picture becomes the vision part's inputs.

In: JSON. Out: a checked `ImageSpec`. Not here: carrying the operations out (`runtime/image.py`).

A picture becomes one or more *views* (itself, or tiles and a whole view after them). Each view goes through
the vision part alone; its features are joined in the order of the views.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from runtime.contract import Contract, Filter


class ExifRotate(Contract):
    """Files only: turn the picture upright by its EXIF orientation (1-8)."""

    op: Literal["exif_rotate@1"] = "exif_rotate@1"


class ToRgb(Contract):
    """8-bit RGB. Transparency is dropped (the stored colour stays) or laid over white."""

    op: Literal["to_rgb@1"] = "to_rgb@1"
    file_alpha: Literal["drop", "white"]
    pixels_alpha: Literal["drop", "white"]


class ResizeLongestEdge(Contract):
    """Scale the longest edge to `longest_edge`, at most `cap`; an odd other edge grows by one."""

    op: Literal["resize_longest_edge@1"] = "resize_longest_edge@1"
    longest_edge: int = Field(gt=0)
    cap: int = Field(gt=0)
    filter: Filter


class ResizeExact(Contract):
    """Stretch to exactly `height` x `width`, whatever the aspect."""

    op: Literal["resize_exact@1"] = "resize_exact@1"
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    filter: Filter


class SmartResize(Contract):
    """Both sides to multiples of `factor` near the picture's aspect, the area within bounds.

    `aspect_limit`: a picture whose longer side is more than so many times the shorter is refused; null: none
    is. `at_least_factor`: a side that rounds to 0 counts as one `factor` when the area is compared.
    """

    op: Literal["smart_resize@1"] = "smart_resize@1"
    factor: int = Field(gt=0)
    min_pixels: int = Field(gt=0)
    max_pixels: int = Field(gt=0)
    aspect_limit: int | None = Field(default=None, gt=0)
    at_least_factor: bool = False
    filter: Filter

    @model_validator(mode="after")
    def _bounds(self) -> SmartResize:
        if not self.min_pixels <= self.max_pixels or self.max_pixels < self.factor**2:
            raise ValueError(
                f"smart_resize: {self.min_pixels} to {self.max_pixels} pixels cannot be met in steps of "
                f"{self.factor} x {self.factor}"
            )
        return self


class SplitTiles(Contract):
    """Both sides up to multiples of `side`, cut into squares of `side`; then the whole, made one such square.

    A picture of one square is one view and no tile.
    """

    op: Literal["tiles.split@1"] = "tiles.split@1"
    side: int = Field(gt=0)
    filter: Filter


class LargePicture(Contract):
    """A picture whose sides, rounded to multiples of `factor` and at least `least`, cover more `pixels`."""

    factor: int = Field(gt=0)
    least: int = Field(gt=0)
    pixels: float = Field(ge=0)


class GridTiles(Contract):
    """Stretch to the grid of height x width tiles whose aspect is nearest, and cut it; then the whole.

    `grids`: candidate (rows, columns), in the order in which they are tried. `only`: which pictures are cut;
    null: all. `whole`: how the whole view is made from the picture as it came here. A picture that is not
    cut, or whose grid is 1 x 1, is that view alone. `whole_after_tiles`: whether it also follows tiles.
    """

    op: Literal["tiles.grid@1"] = "tiles.grid@1"
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    grids: tuple[tuple[int, int], ...] = Field(min_length=1)
    only: LargePicture | None = None
    whole: Annotated[ResizeExact | SmartResize, Field(discriminator="op")]
    whole_after_tiles: bool = True
    filter: Filter

    @model_validator(mode="after")
    def _grids(self) -> GridTiles:
        if any(side < 1 for grid in self.grids for side in grid):
            raise ValueError("tiles.grid: a grid has at least one row and one column")
        return self


class Normalise(Contract):
    """float32 `(byte - subtract) / divide` by channel; both numbers are in units of bytes (0-255)."""

    op: Literal["normalise@1"] = "normalise@1"
    subtract: tuple[float, float, float]
    divide: tuple[float, float, float]


class ToNchw(Contract):
    """Each view as `pixel_values` (1, 3, height, width) float32, RGB."""

    op: Literal["to_nchw@1"] = "to_nchw@1"


class PatchifyBlocks(Contract):
    """`pixel_values` (patches, 3 * frames * patch * patch) float32, `image_grid_thw` (1, 3) int64.

    Patches in blocks of merge x merge, the blocks in reading order, the patches of a block in reading order.
    A patch is channel, frame (the picture repeated), row, column.
    """

    op: Literal["patchify.blocks@1"] = "patchify.blocks@1"
    patch: int = Field(gt=0)
    merge: int = Field(gt=0)
    frames: int = Field(gt=0)


class PatchifyPadded(Contract):
    """`pixel_values` (1, length, patch * patch * 3) float32, `pixel_attention_mask` (1, length) int32 and
    `spatial_shapes` (1, 2) int64.

    Patches in reading order, zeros after them; a patch is row, column, channel. More than `length` patches:
    the picture is refused.
    """

    op: Literal["patchify.padded@1"] = "patchify.padded@1"
    patch: int = Field(gt=0)
    length: int = Field(gt=0)


class ToBytes(Contract):
    """`pixel_bytes` (height, width, 3) uint8, RGB: the vision part normalises by itself."""

    op: Literal["to_bytes@1"] = "to_bytes@1"


ImageOperation = Annotated[
    ExifRotate
    | ToRgb
    | ResizeLongestEdge
    | ResizeExact
    | SmartResize
    | SplitTiles
    | GridTiles
    | Normalise
    | ToNchw
    | PatchifyBlocks
    | PatchifyPadded
    | ToBytes,
    Field(discriminator="op"),
]

PICTURE = ("resize_longest_edge", "resize_exact", "smart_resize")
"""Operations on one picture, between `to_rgb` and the views."""

VIEWS = ("tiles.split", "tiles.grid")
"""Operations that cut a picture into views; at most one, after those on the picture."""

LAYOUTS = ("to_nchw", "patchify.blocks", "patchify.padded", "to_bytes")
"""Operations that give the vision part's inputs; exactly one, the last."""


class TokenGrid(Contract):
    """A view of h x w pixels: `ceil(floor(h / patch) / merge) * ceil(floor(w / patch) / merge)` tokens."""

    op: Literal["tokens.grid@1"] = "tokens.grid@1"
    patch: int = Field(gt=0)
    merge: int = Field(gt=0)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of image tokens of a view."""
        rows, columns = (-(-(side // self.patch) // self.merge) for side in (height, width))
        return rows, columns


class ImageSpec(Contract):
    """The operations in their order, how many tokens a view takes, and the most that one picture becomes."""

    operations: tuple[ImageOperation, ...]
    tokens: TokenGrid
    max_views: int = Field(gt=0)
    max_tokens: int = Field(gt=0, description="most image tokens of one picture, of all its views")

    @model_validator(mode="after")
    def _order(self) -> ImageSpec:
        kinds = [operation.op.split("@")[0] for operation in self.operations]
        rest = kinds[1:] if kinds[:1] == ["exif_rotate"] else kinds
        raw = rest[-1:] == ["to_bytes"]
        middle = rest[1:-1] if raw else rest[1:-2]
        ordered = sorted(middle, key=lambda kind: kind in VIEWS)
        if (
            rest[:1] != ["to_rgb"]
            or (not raw and rest[-2:-1] != ["normalise"])
            or rest[-1] not in LAYOUTS
            or any(kind not in (*PICTURE, *VIEWS) for kind in middle)
            or sum(kind in VIEWS for kind in middle) > 1
            or middle != ordered
        ):
            raise ValueError(
                "operations must be [exif_rotate,] to_rgb, resizes, [one that cuts into views,] normalise "
                f"(not before to_bytes), one layout; got {kinds}"
            )
        return self

    @model_validator(mode="after")
    def _patches(self) -> ImageSpec:
        """Resizing, layout and token count must mean the same patches."""
        token = self.tokens.patch * self.tokens.merge
        for operation in self.operations:
            for resize in (operation, getattr(operation, "whole", None)):
                if isinstance(resize, SmartResize) and resize.factor % token:
                    raise ValueError(
                        f"smart_resize: factor {resize.factor} is no multiple of a token's {token}"
                    )
        layout = self.operations[-1]
        patch = getattr(layout, "patch", self.tokens.patch)
        merge = getattr(layout, "merge", self.tokens.merge)
        if (patch, merge) != (self.tokens.patch, self.tokens.merge):
            raise ValueError(
                f"{layout.op}: patch {patch} and merge {merge}, but tokens have {self.tokens.patch} and "
                f"{self.tokens.merge}"
            )
        return self

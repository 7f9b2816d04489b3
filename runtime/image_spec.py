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


class Normalise(Contract):
    """float32 `(byte - subtract) / divide` by channel; both numbers are in units of bytes (0-255)."""

    op: Literal["normalise@1"] = "normalise@1"
    subtract: tuple[float, float, float]
    divide: tuple[float, float, float]


class ToNchw(Contract):
    """Each view as `pixel_values` (1, 3, height, width) float32, RGB."""

    op: Literal["to_nchw@1"] = "to_nchw@1"


ImageOperation = Annotated[
    ExifRotate | ToRgb | ResizeLongestEdge | ResizeExact | Normalise | ToNchw,
    Field(discriminator="op"),
]

PICTURE = ("resize_longest_edge", "resize_exact")
"""Operations on one picture, between `to_rgb` and the views."""

VIEWS: tuple[str, ...] = ()
"""Operations that cut a picture into views; at most one, after those on the picture."""

LAYOUTS = ("to_nchw",)
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
        middle = rest[1:-2]
        ordered = sorted(middle, key=lambda kind: kind in VIEWS)
        if (
            rest[:1] != ["to_rgb"]
            or rest[-2:-1] != ["normalise"]
            or rest[-1] not in LAYOUTS
            or any(kind not in (*PICTURE, *VIEWS) for kind in middle)
            or sum(kind in VIEWS for kind in middle) > 1
            or middle != ordered
        ):
            raise ValueError(
                "operations must be [exif_rotate,] to_rgb, resizes, [one that cuts into views,] normalise, "
                f"one layout; got {kinds}"
            )
        return self

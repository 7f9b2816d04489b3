"""How many image tokens one picture can become, and the same operations held to fewer.

In: a manifest's image operations. Out: upper bounds, an `ImageSpec` with them, or one of at most N tokens.
Not here: what a certain picture becomes (`runtime/geometry.py`), the settings of a checkpoint's processor.

A picture of any size and aspect stays within the bounds; for usual settings some picture reaches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any

from runtime.errors import InputError
from runtime.image_spec import (
    VIEWS,
    GridTiles,
    ImageOperation,
    ImageSpec,
    PatchifyPadded,
    ResizeExact,
    ResizeLongestEdge,
    SmartResize,
    SplitTiles,
    TokenGrid,
)

Operations = tuple[ImageOperation, ...]


def bounded(operations: Sequence[ImageOperation], tokens: TokenGrid) -> ImageSpec:
    """The image section of these operations, `max_views` and `max_tokens` filled in."""
    views, most = bounds(operations, tokens)
    return ImageSpec(operations=tuple(operations), tokens=tokens, max_views=views, max_tokens=most)


def bounds(operations: Sequence[ImageOperation], tokens: TokenGrid) -> tuple[int, int]:
    """(views, image tokens) that one picture becomes at most. Raises InputError when nothing bounds them."""
    resizes = [op for op in operations if isinstance(op, (ResizeLongestEdge, ResizeExact, SmartResize))]
    cut = next((op for op in operations if op.op.split("@")[0] in VIEWS), None)
    layout = operations[-1]
    if isinstance(cut, SplitTiles):
        if not resizes or not isinstance(resizes[-1], ResizeLongestEdge):
            raise _unbounded()
        count, tile = -(-_longest(resizes[-1]) // cut.side), _tokens(tokens, cut.side, cut.side)
        views = count * count + 1 if count > 1 else 1
        return views, views * tile
    if isinstance(cut, GridTiles):
        whole = _whole_tokens(cut.whole, tokens, layout)
        tiles = max(rows * columns for rows, columns in cut.grids)
        if tiles == 1:
            return 1, whole
        after = 1 if cut.whole_after_tiles else 0
        cut_tokens = tiles * _tokens(tokens, cut.height, cut.width) + after * whole
        return tiles + after, max(whole, cut_tokens)
    if not resizes:
        raise _unbounded()
    return 1, _whole_tokens(resizes[-1], tokens, layout)


def _unbounded() -> InputError:
    return InputError("image operations: none of them bounds a picture's tokens; add a resize")


def _tokens(tokens: TokenGrid, height: int, width: int) -> int:
    rows, columns = tokens.grid(height, width)
    return rows * columns


def _longest(resize: ResizeLongestEdge) -> int:
    """The longest edge in pixels after this resize: the other one may grow by one and be longer."""
    return min(resize.longest_edge + resize.longest_edge % 2, resize.cap)


def _whole_tokens(
    resize: ResizeLongestEdge | ResizeExact | SmartResize, tokens: TokenGrid, layout: Any
) -> int:
    """Most tokens of a picture that is resized so and not cut."""
    if isinstance(resize, ResizeExact):
        return _tokens(tokens, resize.height, resize.width)
    if isinstance(resize, ResizeLongestEdge):
        edge = _longest(resize)
        return _tokens(tokens, edge, edge)
    per_cell = _tokens(tokens, resize.factor, resize.factor)
    found = [] if resize.aspect_limit is None else [most_cells(resize, resize.aspect_limit) * per_cell]
    if isinstance(layout, PatchifyPadded):  # refuses what is longer; a token is merge x merge patches
        found.append(layout.length // tokens.merge**2)
    if not found:
        raise _unbounded()
    return min(found)


def most_cells(resize: SmartResize, aspect: int) -> int:
    """Most squares of `factor` pixels after `smart_resize@1` for pictures up to this aspect.

    With x and y the scaled edges in units of `factor`, x <= y: shrunk to `max_pixels`, x y = N, both are
    floored, but not below 1; grown to `min_pixels`, x y = M, both are ceiled; otherwise the rounded edges
    have a product of at most N. Ties of doubles are counted as if they rounded up.
    """
    cell = resize.factor**2
    n, most = resize.max_pixels // cell, 1
    if resize.max_pixels < aspect * cell:  # x below 1 is possible: one row of y
        most = isqrt(aspect * resize.max_pixels // cell)
    for rows in range(1, isqrt(n) + 1):
        most = max(most, rows * min(n // rows, aspect * (rows + 1)))
    longest = isqrt(aspect * resize.min_pixels // cell) + 1
    for rows in range(1, isqrt(resize.min_pixels // cell) + 2):
        other = resize.min_pixels // (cell * (rows - 1)) + 1 if rows > 1 else longest
        most = max(most, rows * min(other, longest))
    return most


# --- fewer tokens -----------------------------------------------------


def limit(spec: ImageSpec, max_tokens: int) -> ImageSpec:
    """The same image section with at most `max_tokens` image tokens a picture, itself if that holds.

    First tiles are given up (fewer, then none), then pixels of the whole view; a checkpoint's processor is
    held to the same by its own settings (longest edge, most tiles, pixels or tokens). Raises InputError
    naming the smallest number possible.
    """
    smallest = spec.max_tokens
    for candidate in _smaller(spec, max_tokens):
        if candidate.max_tokens <= max_tokens:
            return candidate
        smallest = min(smallest, candidate.max_tokens)
    raise InputError(
        f"max_image_tokens: got {max_tokens}, a picture of this model takes {smallest} at least; "
        f"give {smallest} or more"
    )


def _smaller(spec: ImageSpec, max_tokens: int) -> Iterator[ImageSpec]:
    """The section itself, then with fewer and fewer tokens."""
    yield spec
    *before, last, normalise, layout = spec.operations
    if isinstance(last, SplitTiles) and isinstance(before[-1], ResizeLongestEdge):
        for count in range(isqrt(spec.max_views) - 1, 0, -1):
            edge = before[-1].model_copy(update={"longest_edge": count * last.side})
            yield bounded((*before[:-1], edge, last, normalise, layout), spec.tokens)
    elif isinstance(last, GridTiles):
        for count in range(max(rows * columns for rows, columns in last.grids) - 1, 1, -1):
            if grids := tuple(grid for grid in last.grids if grid[0] * grid[1] <= count):
                fewer = last.model_copy(update={"grids": grids})
                yield bounded((*before, fewer, normalise, layout), spec.tokens)
        whole = (*before, last.whole, normalise, _shorter(layout, last.whole))
        yield from _smaller(bounded(whole, spec.tokens), max_tokens)
    elif isinstance(last, SmartResize):
        fewer_pixels = _fewer_pixels(last, spec.tokens, max_tokens)
        yield bounded((*before, fewer_pixels, normalise, _shorter(layout, fewer_pixels)), spec.tokens)


def _fewer_pixels(resize: SmartResize, tokens: TokenGrid, max_tokens: int) -> SmartResize:
    """The resize to at most so many tokens, one cell at least; a limited aspect is narrowed where it must."""
    cell = resize.factor**2
    count = max(1, max_tokens // _tokens(tokens, resize.factor, resize.factor))
    most = min(resize.max_pixels, count * cell)
    fewer = resize.model_copy(update={"max_pixels": most, "min_pixels": min(resize.min_pixels, most)})
    if resize.aspect_limit is None:  # the layout's length refuses what is longer
        return fewer
    aspect = min(resize.aspect_limit, count + 2)  # sqrt(count * (count + 2)) < count + 1
    low, high = 1, fewer.min_pixels
    while low < high:  # the largest lower bound that keeps to the count
        middle = (low + high + 1) // 2
        holds = most_cells(fewer.model_copy(update={"min_pixels": middle}), aspect) <= count
        low, high = (middle, high) if holds else (low, middle - 1)
    return fewer.model_copy(update={"min_pixels": low, "aspect_limit": aspect})


def _shorter(layout: Any, resize: ResizeExact | SmartResize) -> Any:
    """The layout without padding that no view needs after this resize."""
    if isinstance(layout, PatchifyPadded) and isinstance(resize, SmartResize):
        return layout.model_copy(update={"length": min(layout.length, resize.max_pixels // layout.patch**2)})
    return layout

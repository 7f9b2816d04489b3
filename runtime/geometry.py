"""Sizes that image operations make of a picture's size: integers in, integers out.

In: a height and a width in pixels, and an operation of the manifest. Out: another size, a grid, or whether.
Not here: pixels (`runtime/image.py`, `runtime/tiles.py`), the largest size (`runtime/image_limits.py`).

Every fraction is an IEEE double, in the order written, because the processors of transformers compute so
and a size can hang on the last bit. docs/bundle.md says the same in words.
"""

from __future__ import annotations

import math

from runtime.errors import InputError
from runtime.image_spec import GridTiles, LargePicture, ResizeExact, SmartResize


def longest_edge_size(height: int, width: int, longest_edge: int, cap: int) -> tuple[int, int]:
    """(height, width) after `resize_longest_edge@1`: doubles, truncated, an odd shorter edge grows by one."""
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > cap:
        width, height = cap, int(cap / aspect)
    elif height > width and height > cap:
        width, height = int(cap * aspect), cap
    return max(height, 1), max(width, 1)


def smart_size(height: int, width: int, resize: SmartResize) -> tuple[int, int]:
    """(height, width) after `smart_resize@1`. Raises InputError for a picture that is too long and thin."""
    longer, shorter = max(height, width), min(height, width)
    if resize.aspect_limit is not None and longer > resize.aspect_limit * shorter:
        raise InputError(
            f"image: {width} x {height}: one side is more than {resize.aspect_limit} times the other; crop it"
        )
    factor, sides = resize.factor, (height, width)
    least = factor if resize.at_least_factor else 0
    rounded = [max(least, round(side / factor) * factor) for side in sides]  # a half goes to the even number
    area = rounded[0] * rounded[1]
    if area > resize.max_pixels:
        shrink = math.sqrt(height * width / resize.max_pixels)
        rounded = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    elif area < resize.min_pixels:
        grow = math.sqrt(resize.min_pixels / (height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in sides]
    return rounded[0], rounded[1]


def resized_size(height: int, width: int, resize: ResizeExact | SmartResize) -> tuple[int, int]:
    """(height, width) after either operation."""
    if isinstance(resize, ResizeExact):
        return resize.height, resize.width
    return smart_size(height, width, resize)


def split_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width), multiples of `side`, to which `tiles.split@1` stretches a picture.

    The longer edge goes up to a multiple; the other follows the aspect, truncated, then up to a multiple.
    """
    aspect = width / height
    if width >= height:
        width = _up(width, side)
        height = _up(int(width / aspect), side)
    else:
        height = _up(height, side)
        width = _up(int(height * aspect), side)
    return height, width


def is_large(height: int, width: int, test: LargePicture) -> bool:
    """Whether a picture is among those that `only` of `tiles.grid@1` means."""
    rounded = [max(test.least, round(side / test.factor) * test.factor) for side in (height, width)]
    return rounded[0] * rounded[1] > test.pixels


def nearest_grid(height: int, width: int, tiles: GridTiles) -> tuple[int, int]:
    """(rows, columns) of `tiles.grid@1`: the first grid of the nearest aspect.

    A later one that is exactly as near takes its place if the picture has more than half of its pixels.
    """
    aspect = width / height
    best, best_distance = (1, 1), math.inf
    for rows, columns in tiles.grids:
        distance = abs(aspect - columns / rows)
        area = tiles.height * tiles.width * rows * columns
        if distance < best_distance or (distance == best_distance and 2 * height * width > area):
            best, best_distance = (rows, columns), distance
    return best


def grid_plan(height: int, width: int, tiles: GridTiles) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """What `tiles.grid@1` makes: (rows, columns) of tiles, (0, 0) for none; the whole view's size, if any."""
    cut = tiles.only is None or is_large(height, width, tiles.only)
    grid = nearest_grid(height, width, tiles) if cut else (1, 1)
    if grid == (1, 1):
        return (0, 0), resized_size(height, width, tiles.whole)
    return grid, resized_size(height, width, tiles.whole) if tiles.whole_after_tiles else None


def _up(length: int, side: int) -> int:
    return -(-length // side) * side

"""No picture of any size becomes more views or tokens than the bounds say, and some picture reaches them.

No pixel is computed: resampling is replaced by the size that it makes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import (
    GotOcr2ImageProcessor,
    Lfm2VlImageProcessor,
    Qwen2VLImageProcessor,
    SmolVLMImageProcessor,
)

from runtime import geometry, image_limits, resample, tiles
from runtime.errors import InputError
from runtime.image_spec import (
    GridTiles,
    ImageSpec,
    PatchifyPadded,
    ResizeExact,
    ResizeLongestEdge,
    SmartResize,
    SplitTiles,
    TokenGrid,
)
from tests.runtime.processors import processors, spec_of
from tests.runtime.test_image_sizes import edges

PROCESSORS = processors()
SPECS = {name: spec_of(*found) for name, found in PROCESSORS.items()}


@pytest.fixture(autouse=True)
def sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "resize", lambda _, height, width, __: blank(height, width))


def blank(height: int, width: int) -> Any:
    return np.broadcast_to(np.uint8(0), (height, width, 3))


def counts(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """(views, tokens) of a picture of this size; (0, 0) when it is refused."""
    value, views = blank(height, width), []
    try:
        for operation in spec.operations[:-2]:
            if isinstance(operation, ResizeLongestEdge):
                edge = operation.longest_edge, operation.cap
                value = blank(*geometry.longest_edge_size(*value.shape[:2], *edge))
            elif isinstance(operation, (ResizeExact, SmartResize)):
                value = tiles.resized(value, operation)
            elif isinstance(operation, SplitTiles):
                views, _ = tiles.split(value, operation)
            elif isinstance(operation, GridTiles):
                views, _ = tiles.grid(value, operation)
    except InputError:
        return 0, 0
    layout = spec.operations[-1]
    sizes = [view.shape[:2] for view in views or [value]]
    if isinstance(layout, PatchifyPadded) and any(
        (height // layout.patch) * (width // layout.patch) > layout.length for height, width in sizes
    ):
        return 0, 0
    grids = [spec.tokens.grid(*size) for size in sizes]
    return len(sizes), sum(rows * columns for rows, columns in grids)


def assert_bounded(height: int, width: int, spec: ImageSpec) -> None:
    views, tokens = counts(height, width, spec)
    assert views <= spec.max_views
    assert tokens <= spec.max_tokens


# --- bounds ---------------------------------------------------------------


def test_known_bounds() -> None:
    """As the models' cards and processors have them."""
    assert {name: (spec.max_views, spec.max_tokens) for name, spec in SPECS.items()} == {
        "smolvlm-256m": (17, 17 * 64),
        "smolvlm-256m-whole": (1, 64),
        "idefics3": (17, 17 * 169),
        "qwen2.5-vl": (1, 134),
        "qwen3-vl": (1, 160),
        "internvl": (13, 13 * 256),
        "internvl-whole": (1, 256),
        "lfm2-vl": (11, 11 * 256),
        "lfm2-vl-no-thumbnail": (10, 10 * 256),
        "lfm2-vl-whole": (1, 256),
        "gemma3": (1, 256),
    }


@settings(max_examples=300, deadline=None)
@given(height=edges(100_000), width=edges(100_000), name=st.sampled_from(list(SPECS)))
def test_bounds_hold(height: int, width: int, name: str) -> None:
    assert_bounded(height, width, SPECS[name])


WITNESSES = [
    *((s * k, s * r * k) for s in (1, 8, 28, 100) for r in (1, 2, 3, 4, 16, 100) for k in (1, 7, 90))
]


@pytest.mark.parametrize("name", SPECS)
def test_bounds_are_reached(name: str) -> None:
    spec = SPECS[name]
    sizes = [*WITNESSES, (1200, 900), (100, 20_000), (1, 200), (5, 1000)]
    sizes += [(100, width) for width in range(15_000, 20_001)]
    found = [counts(*size, spec) for size in sizes]
    assert max(views for views, _ in found) == spec.max_views
    assert max(tokens for _, tokens in found) == spec.max_tokens


@st.composite
def smart_specs(draw: Any) -> ImageSpec:
    factor = draw(st.sampled_from([4, 28]))
    most = draw(st.one_of(st.integers(1, 60), st.integers(1, 3000))) * factor**2 + draw(st.integers(0, 20))
    resize = SmartResize(
        factor=factor,
        min_pixels=draw(st.one_of(st.integers(1, most), st.just(most))),
        max_pixels=most,
        aspect_limit=draw(st.sampled_from([1, 2, 10, 200])),
        at_least_factor=draw(st.booleans()),
        filter="bicubic",
    )
    operations = SPECS["qwen2.5-vl"].operations
    tokens = TokenGrid(patch=factor // 2, merge=2)
    layout = operations[-1].model_copy(update={"patch": factor // 2})
    return image_limits.bounded((*operations[:2], resize, operations[-2], layout), tokens)


@settings(max_examples=500, deadline=None)
@given(spec=smart_specs(), height=edges(), width=edges(), aspect=st.floats(0.9, 1.1))
def test_bounds_hold_for_any_smart_resize(spec: ImageSpec, height: int, width: int, aspect: float) -> None:
    assert_bounded(height, width, spec)
    limit = spec.operations[2].aspect_limit  # where the longest rows of tokens are
    assert_bounded(height, int(height * limit * aspect) or 1, spec)


@pytest.mark.parametrize(
    ("longest", "cap", "views"), [(512, 4096, 1), (513, 4096, 5), (513, 513, 1), (1026, 4096, 5)]
)
def test_an_odd_longest_edge_grows_by_one(longest: int, cap: int, views: int) -> None:
    operations = list(SPECS["smolvlm-256m"].operations)
    operations[2] = ResizeLongestEdge(longest_edge=longest, cap=cap, filter="lanczos")
    operations[3] = SplitTiles(side=513, filter="lanczos")
    spec = image_limits.bounded(operations, TokenGrid(patch=27, merge=1))
    assert (spec.max_views, spec.max_tokens) == (views, views * 19 * 19) == counts(100, 100, spec)


def test_operations_without_a_bound_are_refused() -> None:
    spec = SPECS["gemma3"]
    with pytest.raises(InputError, match="none of them bounds a picture's tokens; add a resize"):
        image_limits.bounds((*spec.operations[:2], *spec.operations[3:]), spec.tokens)
    endless = SPECS["lfm2-vl-whole"].operations[2]
    with pytest.raises(InputError, match="none of them bounds"):
        image_limits.bounds((*spec.operations[:2], endless, *spec.operations[3:]), spec.tokens)


# --- fewer tokens -----------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(SPECS)), most=st.integers(1, 3000), sizes=st.lists(st.tuples(edges(), edges()))
)
def test_limited_to_fewer_tokens(name: str, most: int, sizes: list[tuple[int, int]]) -> None:
    try:
        spec = image_limits.limit(SPECS[name], most)
    except InputError as error:
        assert str(error).startswith(f"max_image_tokens: got {most}, a picture of this model takes ")
        smallest = int(str(error).rsplit("give ", 1)[1].split()[0])
        assert most < smallest
        assert image_limits.limit(SPECS[name], smallest).max_tokens == smallest
        return
    assert spec.max_tokens <= most
    assert spec == SPECS[name] or SPECS[name].max_tokens > most
    for size in sizes:
        assert_bounded(*size, spec)


@pytest.mark.parametrize(
    ("name", "most", "smallest"),
    [("smolvlm-256m", 63, 64), ("internvl", 9, 256), ("qwen3-vl", 0, 1), ("lfm2-vl", 0, 1)],
)  # fmt: skip
def test_the_smallest_is_named(name: str, most: int, smallest: int) -> None:
    words = f"got {most}, a picture of this model takes {smallest} at least; give {smallest} or more"
    with pytest.raises(InputError, match=words):
        image_limits.limit(SPECS[name], most)


def with_settings(name: str, kind: Any, **changed: Any) -> ImageSpec:
    """The section of the same processor with other settings."""
    processor, tokens = PROCESSORS[name]
    return spec_of(kind(**{**processor.to_dict(), **changed}), tokens)


def in_one_order(spec: ImageSpec) -> ImageSpec:
    """Grids of equal area, whose order is a set's in one processor and decides nothing, sorted."""
    cut = spec.operations[2]
    if not isinstance(cut, GridTiles):
        return spec
    grids = sorted(cut.grids, key=lambda grid: (grid[0] * grid[1], grid))
    changed = cut.model_copy(update={"grids": tuple(grids)})
    return spec.model_copy(update={"operations": (*spec.operations[:2], changed, *spec.operations[3:])})


@pytest.mark.parametrize(
    ("name", "most", "kind", "changed"),
    [
        ("smolvlm-256m", 700, SmolVLMImageProcessor, {"size": {"longest_edge": 1536}}),
        ("smolvlm-256m", 64, SmolVLMImageProcessor, {"size": {"longest_edge": 512}}),
        ("internvl", 7 * 256 + 255, GotOcr2ImageProcessor, {"max_patches": 6}),
        ("internvl", 2 * 256, GotOcr2ImageProcessor, {"crop_to_patches": False}),
        ("lfm2-vl", 5 * 256, Lfm2VlImageProcessor, {"max_tiles": 4}),
        ("lfm2-vl", 500, Lfm2VlImageProcessor, {"do_image_splitting": False}),
        ("lfm2-vl", 128, Lfm2VlImageProcessor, {"do_image_splitting": False, "max_image_tokens": 128}),
        (
            "lfm2-vl", 50, Lfm2VlImageProcessor,
            {"do_image_splitting": False, "max_image_tokens": 50, "min_image_tokens": 50},
        ),
    ],
)  # fmt: skip
def test_a_limit_is_a_setting_of_the_processor(
    name: str, most: int, kind: Any, changed: dict[str, Any]
) -> None:
    limited, wanted = image_limits.limit(SPECS[name], most), with_settings(name, kind, **changed)
    assert in_one_order(limited) == in_one_order(wanted)


def test_fewer_pixels_are_settings_of_the_processor_and_a_narrower_aspect() -> None:
    limited = image_limits.limit(SPECS["qwen2.5-vl"], 40)
    resize = limited.operations[2]
    assert isinstance(resize, SmartResize)
    assert (resize.max_pixels, resize.aspect_limit) == (40 * 28 * 28, 42)
    assert resize.min_pixels == 56 * 56  # a needle of 42 : 1 still fits
    size = {"shortest_edge": resize.min_pixels, "longest_edge": resize.max_pixels}
    assert counts(10, 400, limited) == counts(
        10, 400, with_settings("qwen2.5-vl", Qwen2VLImageProcessor, size=size)
    )
    assert counts(10, 421, limited) == (0, 0)


# --- checks of the contract -----------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_pixels": 100}, "cannot be met in steps of 28 x 28"),
        ({"min_pixels": 10**6}, "1000000 to 70560 pixels cannot be met"),
        ({"factor": 42, "max_pixels": 10**5}, "factor 42 is no multiple of a token's 28"),
    ],
)
def test_resizes_that_contradict_themselves_are_refused(change: dict[str, int], words: str) -> None:
    spec = SPECS["qwen2.5-vl"]
    data = spec.model_dump()
    data["operations"][2].update(change)
    with pytest.raises(ValidationError, match=words):
        ImageSpec.model_validate(data)


def test_patches_must_be_those_of_the_tokens() -> None:
    data = SPECS["qwen2.5-vl"].model_dump()
    data["operations"][-1]["merge"] = 4
    with pytest.raises(
        ValidationError, match=r"patchify.blocks@1: patch 14 and merge 4, but tokens have 14 and 2"
    ):
        ImageSpec.model_validate(data)


def test_one_operation_cuts() -> None:
    spec = SPECS["smolvlm-256m"]
    split = spec.operations[3]
    with pytest.raises(ValidationError, match="one that cuts into views"):
        ImageSpec(
            operations=(*spec.operations[:3], split, *spec.operations[3:]),
            tokens=spec.tokens,
            max_views=17,
            max_tokens=17 * 64,
        )

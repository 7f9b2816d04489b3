"""Vectors of pictures of several views: every view counts, and large pictures leave small files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import conformance, image, prompt
from runtime.errors import BundleError
from runtime.image import ImageFeatures, PreparedImage
from runtime.image_spec import ImageSpec
from runtime.manifest import PositionsMrope
from runtime.positions import position_ids
from tests.runtime.processors import processors, spec_of
from tests.runtime.specs import prompt_spec

QUESTION = "what color is the shape?"
TOKEN = 1


class Reader:
    """A session up to the models, whose logits only count the image tokens."""

    def __init__(self, spec: ImageSpec, tokenizer: Any) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        pieces = {"before": [5], "after": [6], "system": [7], "user": [8], "end": [9], "assistant": [10]}
        self.prompt = prompt_spec({**pieces, "image": [TOKEN]})

    def prepare(self, source: Any) -> PreparedImage:
        return image.prepare(source, self.spec)

    def prompt_ids(self, question: str, images: list[PreparedImage]) -> Any:
        return prompt.render(self.prompt, self.tokenizer, question, images)

    def positions(self, ids: Any, images: list[PreparedImage]) -> Any:
        grids = [view.grid for each in images for view in each.views]
        scheme = PositionsMrope(sections=(2, 3, 3), interleaved=True)
        return position_ids(scheme, ids == TOKEN, grids, 0)[0]

    def encode_image(self, prepared: PreparedImage) -> ImageFeatures:
        grids = tuple(view.grid for view in prepared.views)
        return ImageFeatures(np.ones((prepared.tokens, 1), np.float32), grids)

    def prefill(self, ids: Any, images: list[ImageFeatures]) -> Any:
        return np.arange(20, dtype=np.float32) * float(sum(map(len, images)))


def png(width: int = 120, height: int = 90) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["internvl", "lfm2-vl", "qwen2.5-vl"])
def spec(request: pytest.FixtureRequest) -> ImageSpec:
    return spec_of(*processors()[request.param])


@pytest.fixture
def reader(spec: ImageSpec, tiny_checkpoint: Path) -> Any:
    return Reader(spec, prompt.load_tokenizer(tiny_checkpoint / "tokenizer.json"))


def write(reader: Any, directory: Path) -> dict[str, Any]:
    """One case in the directory; it as JSON."""
    vector = conformance.record(reader, "a", png(1000, 700), QUESTION)
    conformance.write(directory, [vector], pixels_tolerance=0.0, logit_tolerance=0.0)
    return json.loads((directory / conformance.CASES_PATH).read_text())["cases"][0]


def test_a_picture_of_many_views_conforms_and_is_a_small_file(reader: Any, bundle_copy: Path) -> None:
    case = write(reader, bundle_copy)
    assert conformance.check(reader, bundle_copy) == []
    sizes = [int(np.prod(shape)) for shape in case["pixels_shapes"]]
    kept = (bundle_copy / "conformance" / "a.f32").stat().st_size // 4
    assert kept == -(-sum(sizes) // case["pixels_step"]) <= conformance.MOST_VALUES
    assert np.gcd(case["pixels_step"], sum(sizes)) == 1


def test_each_view_counts(reader: Any, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = write(reader, bundle_copy)
    right, last = reader.prepare, len(case["pixels_shapes"]) - 1
    for number in {0, last // 2, last}:

        def wrong(source: Any, number: int = number) -> PreparedImage:
            prepared = right(source)
            views = list(prepared.views)
            pixels = views[number].inputs["pixel_values"]
            views[number].inputs["pixel_values"] = pixels[..., ::-1] + np.float32(0.5)
            return PreparedImage(tuple(views), prepared.tiles)

        monkeypatch.setattr(reader, "prepare", wrong)
        assert any("a: pixels differ by" in line for line in conformance.check(reader, bundle_copy))


def test_one_view_less_is_another_shape(reader: Any, bundle_copy: Path, monkeypatch: Any) -> None:
    write(reader, bundle_copy)
    right = reader.prepare
    monkeypatch.setattr(reader, "prepare", lambda source: PreparedImage(right(source).views[:-1]))
    [line] = conformance.check(reader, bundle_copy)
    assert line.startswith("a: pixels have shapes ")


def test_a_grid_that_is_turned_shows_in_the_positions(
    reader: Any, bundle_copy: Path, monkeypatch: Any
) -> None:
    case = write(reader, bundle_copy)
    assert [len(row) for row in case["positions"]] == [len(case["ids"])] * 3
    right = reader.prepare

    def turned(source: Any) -> PreparedImage:
        prepared = right(source)
        views = (image.View(view.inputs, (view.grid[1], view.grid[0])) for view in prepared.views)
        return PreparedImage(tuple(views), prepared.tiles)

    square = all(view.grid[0] == view.grid[1] for view in right(png(1000, 700)).views)
    monkeypatch.setattr(reader, "prepare", turned)
    assert conformance.check(reader, bundle_copy) == ([] if square else ["a: positions differ"])


def test_a_step_that_the_file_was_not_written_with_is_a_damaged_bundle(
    reader: Any, bundle_copy: Path
) -> None:
    case = write(reader, bundle_copy)
    path = bundle_copy / conformance.CASES_PATH
    path.write_text(json.dumps({"cases": [{**case, "pixels_step": case["pixels_step"] + 1}]}))
    with pytest.raises(
        BundleError, match=r"a\.f32: holds \d+ values, its shapes and step say \d+; re-export"
    ):
        conformance.check(reader, bundle_copy)

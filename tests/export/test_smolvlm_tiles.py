"""SmolVLM and Idefics3 with tiles, against their own processors and models; damages: `test_gate_tiles.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import onnx
from export.checkpoint import load
from export.facts import prepare
from export.families import family_of
from runtime import bundle, image
from runtime.generation import GenerationOptions
from runtime.image_spec import ResizeExact, SplitTiles
from runtime.session import Session
from tests.checkpoints import VARIANTS

SIZES = ((64, 64), (300, 200), (200, 300), (500, 60), (60, 500), (333, 777), (1024, 768))


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("name", ["smolvlm_tiles", "idefics3_tiles"])
def test_tiles_are_data_and_equal_the_processor(tmp_path: Path, name: str) -> None:
    checkpoint = load(VARIANTS[name](tmp_path / "tiny"))
    spec, prompt = family_of(checkpoint).image(checkpoint), family_of(checkpoint).prompt(checkpoint)
    assert (spec.max_views, spec.max_tokens) == (17, 272)
    assert any(isinstance(op, SplitTiles) for op in spec.operations)
    assert prompt.image.tiled is not None and len(prompt.image.tiled.cells) == 4
    seen = set()
    for size in SIZES:
        prepared = image.prepare(noise(*size), spec)
        seen.add(prepared.tiles)
        wanted = checkpoint.processor.image_processor([[noise(*size)]], return_tensors="pt")["pixel_values"]
        assert np.array_equal(np.concatenate(prepared.pixels), wanted[0].numpy()), size
    assert len(seen) >= 5 and max(rows * columns for rows, columns in seen) == 16


def test_a_picture_that_fits_one_tile_is_not_cut(tmp_path: Path) -> None:
    checkpoint = load(VARIANTS["smolvlm_tiles"](tmp_path / "tiny"))
    checkpoint.processor.image_processor.size = {"longest_edge": 64}
    spec = family_of(checkpoint).image(checkpoint)
    assert (spec.max_views, image.prepare(noise(50, 64), spec).tiles) == (1, (0, 0))
    checkpoint.processor.image_processor.do_image_splitting = False
    plain = family_of(checkpoint).image(checkpoint)
    assert any(isinstance(op, ResizeExact) for op in plain.operations)


def test_an_idefics3_bundle_with_tiles_answers_as_the_checkpoint(tmp_path: Path) -> None:
    """Its tile names are plain text, several ids each."""
    facts = prepare(load(VARIANTS["idefics3_tiles"](tmp_path / "tiny")), (), lambda _: None)
    out = tmp_path / "out"
    out.mkdir()
    onnx.build(facts, out, "fp32", "tiny", tmp_path)
    options = GenerationOptions(max_new_tokens=12)
    with Session.from_manifest(out, bundle.read(out), threads=1) as session:
        for size in SIZES[1:4]:
            answer = session.ask(noise(*size), "is it red?", options)
            assert answer.token_ids == facts.reference.generate(noise(*size), "is it red?", 12)

"""InternVL: tiles and a thumbnail, every text model, without tiles, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export import onnx
from export.checkpoint import load, read_config
from export.facts import Facts, prepare
from export.families import family_of, without_tiles
from runtime import bundle, image
from runtime.errors import CheckpointError
from runtime.generation import GenerationOptions
from runtime.image_spec import GridTiles
from runtime.prompt_spec import ImageSlot
from runtime.session import Session
from tests.checkpoints import VARIANTS, write_internvl

SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
SIZES = ((32, 32), (96, 40), (40, 120), (64, 64), (333, 777))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("internvl") / "tiny")


@pytest.fixture(params=["internvl", "internvl_qwen3", "internvl_llama"])
def facts(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Facts:
    path = checkpoint if request.param == "internvl" else VARIANTS[request.param](tmp_path / "tiny")
    return prepare(load(path), (), lambda _: None)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_bundle_sees_and_answers_as_the_checkpoint(facts: Facts, tmp_path: Path) -> None:
    """Exported through the gate, then on pictures that the gate does not know."""
    out = tmp_path / "bundle"
    out.mkdir()
    onnx.build(facts, out, "fp32", "tiny", tmp_path)
    manifest, options = bundle.read(out), GenerationOptions(max_new_tokens=12)
    assert manifest.prompt.later is not None and manifest.limits.images == facts.plan.max_images
    with Session.from_manifest(out, manifest, threads=1) as session:
        tiles = set()
        for size in SIZES:
            picture = noise(*size)
            prepared = session.prepare(picture)
            tiles.add(prepared.tiles)
            inputs = facts.reference.prepare(picture).inputs["pixel_values"]
            assert np.array_equal(np.concatenate(prepared.pixels), inputs.numpy())
            with torch.no_grad():
                wanted = facts.checkpoint.model.get_image_features(pixel_values=inputs).pooler_output
            got = session.encode_image(prepared).tokens
            assert np.abs(got - wanted.reshape(got.shape).numpy()).max() < 1e-5 * wanted.abs().max()
            answer = session.ask(picture, "what color is the shape?", options)
            assert answer.token_ids == facts.reference.generate(picture, "what color is the shape?", 12)
    assert tiles == {(0, 0), (1, 2), (3, 1), (2, 1)} | tiles and len(tiles) >= 4


@pytest.mark.parametrize("precision", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_rounded_bundles_pass_the_gate(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    out = onnx.export_onnx(checkpoint, {precision: tmp_path / "out"}, names={precision: "tiny"})
    assert bundle.read(out[0]).precision == precision


def test_tiles_and_thumbnail_are_data(checkpoint: Path) -> None:
    found = load(checkpoint)
    spec, prompt = family_of(found).image(found), family_of(found).prompt(found)
    cut = next(op for op in spec.operations if isinstance(op, GridTiles))
    assert cut.grids == ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (2, 2), (1, 4))
    assert (spec.max_views, spec.max_tokens) == (5, 20)
    decoded = [found.tokenizer.decode(ids) for ids in (prompt.image.before, prompt.image.after)]
    assert decoded == ["<img>", "</img>"] and prompt.image.tiled is None
    slot = next(segment for segment in prompt.user if isinstance(segment, ImageSlot))
    assert found.tokenizer.decode(slot.between) == "\n"


def test_without_tiles_a_picture_is_one_view(checkpoint: Path) -> None:
    """The processor then gives one tile too, so the reference is the same model."""
    found = load(checkpoint)
    assert without_tiles(found) == {"image_processor.max_patches": 1}
    spec = family_of(found).image(found)
    assert (spec.max_views, spec.max_tokens) == (1, 4)
    picture = noise(333, 777)
    inputs = found.processor.image_processor(picture, crop_to_patches=True, return_tensors="pt")
    assert np.array_equal(image.prepare(picture, spec).pixels[0], inputs["pixel_values"].numpy())


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"vision_feature_layer": [0, 1]}, r"vision_feature_layer is \[0, 1\]"),
        ("config.json", {"text_config": SLIDING}, "layer_types has sliding_attention"),
        ("processor_config.json", {"image_seq_length": 9}, "9 tokens a tile, the model makes 4"),
        ("processor_config.json", {"image_processor": {"size": {"height": 64, "width": 64}}}, "size is"),
        ("processor_config.json", {"image_processor": {"do_rescale": False}}, "do_rescale is False"),
        ("processor_config.json", {"image_processor": {"resample": 0}}, "resample is 0"),
    ],
)
def test_settings_the_parts_cannot_reproduce_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, file: str, change: dict[str, Any], says: str
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))

    def merge(value: dict[str, Any], new: dict[str, Any] = change) -> None:
        for key, inner in new.items():
            if isinstance(inner, dict) and isinstance(value.get(key), dict):
                merge(value[key], inner)
            else:
                value[key] = inner

    edit(copy / file, merge)
    if file == "config.json" and "text_config" in change:
        edit(copy / file, lambda c: c["text_config"].pop("layer_types", None))
    with pytest.raises(CheckpointError, match=says):
        family_of(load(copy))


def test_an_original_repository_is_told_of_its_twin(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "InternVL3-1B"))
    edit(copy / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_internvl_chat.Model"}))
    with pytest.raises(CheckpointError, match=r"auto_map.*InternVL3-1B-hf"):
        read_config(copy)

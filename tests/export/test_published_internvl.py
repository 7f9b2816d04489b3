"""InternVL3 and 3.5 as published, at toy size, and the layout that is not transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export import export_checkpoint, gate
from export.checkpoint import load
from export.facts import prepare
from export.families import family_of
from runtime import bundle, session
from runtime.errors import CheckpointError, ParityError
from runtime.image_spec import GridTiles
from tests.checkpoints import write_internvl

DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}


def edit(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys as in InternVL3-1B-hf: old rotary ones, no tie_word_embeddings, a preprocessor_config.json."""
    path = write_internvl(tmp_path_factory.mktemp("internvl") / "tiny")
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters", None) or {}
    text |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": DYNAMIC, "sliding_window": None}
    text |= {"use_sliding_window": False, "max_window_layers": 70, "max_position_embeddings": 32768}
    config.pop("tie_word_embeddings", None)
    edit(path / "config.json", text_config=text)
    processor = json.loads((path / "processor_config.json").read_text())
    image = {**processor["image_processor"], "image_processor_type": "GotOcr2ImageProcessorFast"}
    image |= {"crop_to_patches": False, "max_patches": 12, "crop_size": None, "do_center_crop": None}
    (path / "preprocessor_config.json").write_text(json.dumps(image))
    kept = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
    (path / "processor_config.json").write_text(json.dumps(kept))
    return path


def test_pictures_are_cut_although_the_file_says_no(published: Path) -> None:
    """The processor's class turns crop_to_patches on."""
    checkpoint = load(published)
    (cut,) = (
        each for each in family_of(checkpoint).image(checkpoint).operations if isinstance(each, GridTiles)
    )
    assert max(rows * columns for rows, columns in cut.grids) == 12


def test_llama_cpp_is_told_of_tiles_although_the_file_says_no(published: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from export.gguf import plan_files

    writer = gguf.GGUFWriter(tmp_path / "f", "clip")
    plan_files(published).vision.values(writer)
    (values,) = writer.kv_data
    assert values["clip.vision.preproc_min_tiles"].value == 1
    assert values["clip.vision.preproc_max_tiles"].value == 12


def test_the_gate_has_room_for_two_pictures_of_many_tiles(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 views of 256 tokens each are less than a session's usual room, twice as many are more."""
    monkeypatch.setattr(session, "DEFAULT_CONTEXT", 64)
    monkeypatch.setattr(session, "TEXT_ROOM", 66)
    out = export_checkpoint(published, tmp_path / "bundle")
    manifest = bundle.read(out)
    assert manifest.limits.context == 32768
    facts = prepare(load(published), (), lambda _: None, trace=False)
    assert facts.expected is not None
    longest = max(len(each.ids) for each in facts.expected.sides)
    usual = session.usual_context(manifest.limits.context, manifest.image.max_tokens)
    assert usual < longest < gate.room(manifest, facts.expected) < 2 * longest
    monkeypatch.setattr(gate, "room", lambda draft, expected: usual)
    with pytest.raises(ParityError, match="are available"):
        export_checkpoint(published, tmp_path / "other")


@pytest.mark.parametrize("to", ["onnx", "gguf"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model_type": "internvl_chat"}, r"original layout of InternVL.*NAME-hf or -HF"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoModel": "m.M"}}, r"never run.*tiny-hf or -HF"),
    ],
)
def test_the_original_layout_is_refused_with_what_to_take(
    published: Path, tmp_path: Path, changed: dict[str, Any], told: str, to: str
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    copy = tmp_path / "tiny"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps({"vision_config": {}, "llm_config": {}, **changed}))
    (copy / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    precision = "fp32" if to == "onnx" else "f16"
    with pytest.raises(CheckpointError, match=told) as raised:
        export_checkpoint(copy, tmp_path / "bundle", to=to, precision=precision)
    assert "\n" not in str(raised.value)

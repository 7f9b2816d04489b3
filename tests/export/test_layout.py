"""Files of large parts, and what transformers.js reads beside the parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export import layout, onnx, passes, storage
from runtime import bundle
from runtime.errors import BundleError, CheckpointError
from runtime.session import open_bundle
from tests.export.conftest import Exported

LIMIT = 100_000  # bytes; the decoder then needs several data files


@pytest.fixture(scope="module")
def large(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in float32 with a limit that no part keeps."""
    out = tmp_path_factory.mktemp("large") / "bundle"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LIMIT_BYTES", LIMIT)
        onnx.build(exported.facts, out, "fp32", "large", out.parent)
    return out


def weights(*shapes: tuple[int, ...]) -> ir.Model:
    """A graph with float32 weights of these shapes."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="g")
    draw = np.random.default_rng(0)
    for index, shape in enumerate(shapes):
        passes.add_initializer(graph, f"w{index}", draw.standard_normal(shape).astype(np.float32))
    return ir.Model(graph, ir_version=10)


def test_no_file_is_above_the_limit_and_every_weight_lies_once(large: Path, exported: Exported) -> None:
    manifest = bundle.read(large)
    files = list((large / "onnx").iterdir())
    assert max(file.stat().st_size for file in files) <= LIMIT
    named = {part.path for part in manifest.parts} | {f.path for part in manifest.parts for f in part.data}
    assert {file.relative_to(large).as_posix() for file in files} == named
    decoder = manifest.part("decoder")
    names = [Path(file.path).name for file in decoder.data]
    numbers = ["", *(f"_{i}" for i in range(1, len(names)))]
    assert names == [f"decoder_model_merged.onnx_data{number}" for number in numbers] and len(names) > 1
    initializers = exported.facts.graphs["decoder"].graph.initializers.values()
    size = sum(value.const_value.nbytes for value in initializers if value.const_value is not None)
    stored = sum(file.bytes for file in decoder.data)
    assert stored <= size < stored + decoder.bytes


def test_a_bundle_of_many_files_answers_as_one_of_few(large: Path, exported: Exported) -> None:
    question = "what color is the shape?"
    picture = next(case.image for case in exported.facts.cases if isinstance(case.image, bytes))
    answers = []
    for path in (large, exported.bundles["fp32"]):
        with open_bundle(path, threads=1) as session:
            answers.append(session.ask(picture, question).token_ids)
    assert answers[0] == answers[1]


def test_a_changed_or_missing_data_file_is_refused(large: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(large, copy)
    path = copy / "onnx" / "decoder_model_merged.onnx_data_1"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"decoder_model_merged.onnx_data_1: sha256"):
        bundle.read(copy)
    path.unlink()
    with pytest.raises(BundleError, match="missing"):
        bundle.read(copy)


def test_a_weight_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"part.onnx: w1 has 40,000 bytes, .* at most 20,000"):
        storage.save(weights((8, 8), (100, 100)), tmp_path / "part.onnx", 20_000)


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = weights((50, 50), (60, 60), (4,))
    before = ir.to_proto(model).SerializeToString()
    files = storage.save(model, tmp_path / "part.onnx", 20_000)
    assert [file.name for file in files] == ["part.onnx", "part.onnx_data", "part.onnx_data_1"]
    assert files[1:] == storage.data_files(tmp_path / "part.onnx")
    assert ir.to_proto(model).SerializeToString() == before
    found = ir.load(tmp_path / "part.onnx")
    for name, value in model.graph.initializers.items():
        assert np.array_equal(passes.constant(value), passes.constant(found.graph.initializers[name]))  # type: ignore[arg-type]


def test_a_model_as_from_a_file_shares_its_weights() -> None:
    model = weights((50, 50), (4,))
    found = storage.as_from_file(model)
    assert ir.to_proto(found).SerializeToString() == ir.to_proto(model).SerializeToString()
    one, other = (passes.constant(m.graph.initializers["w0"]) for m in (model, found))
    assert one is not None and other is not None and np.shares_memory(one, other)


def test_shared_bytes_see_a_tied_head() -> None:
    """An LM head holds the embedding's transpose."""
    table = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    graphs = {}
    for role, array in (("embed_tokens", table), ("decoder", table.T)):
        graphs[role] = weights((20, 20))
        passes.add_initializer(graphs[role].graph, "table", array)
    graphs["decoder"].graph.initializers.pop("w0")
    assert storage.shared_bytes(graphs) == {"decoder + embed_tokens": 300 * 16 * 4}


# --- transformers.js ---------------------------------------------------


def settings(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())[layout.JS_KEY]
    return found


def test_the_configuration_names_every_part_and_its_files(large: Path, exported: Exported) -> None:
    assert settings(exported.bundles["int4"]) == {
        "dtype": {"vision_encoder": "int8", "embed_tokens": "int8", "decoder_model_merged": "q4"},
        "use_external_data_format": {},
        "kv_cache_dtype": "float32",
    }
    found = settings(large)
    assert set(found["dtype"].values()) == {"fp32"}
    decoder = bundle.read(large).part("decoder")
    assert found["use_external_data_format"]["decoder_model_merged.onnx"] == len(decoder.data) > 1
    for path in (large, exported.bundles["int4"]):
        assert (
            json.loads((path / "preprocessor_config.json").read_text())["processor_class"]
            == "SmolVLMProcessor"
        )
        assert json.loads((path / "tokenizer_config.json").read_text())["chat_template"]


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 2, 3, 64, 64), (2, 1, 3, 64, 64)])
def test_a_picture_may_come_with_a_batch_in_front(shape: tuple[int, ...], exported: Exported) -> None:
    part = exported.manifest("fp32").part("vision_encoder")
    assert part.inputs[0].shape == ("num_images", 3, 64, 64)
    session = onnxruntime.InferenceSession(
        exported.bundles["fp32"] / part.path, providers=["CPUExecutionProvider"]
    )
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    wanted = session.run(None, {"pixel_values": pixels})[0]
    assert np.array_equal(session.run(None, {"pixel_values": pixels.reshape(shape)})[0], wanted)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("decoder_model_merged_q4", ("decoder_model_merged", "_q4")),
        ("embed_tokens", ("embed_tokens", "")),
        ("vision_encoder_fp16", ("vision_encoder", "_fp16")),
    ],
)
def test_suffixes(name: str, parts: tuple[str, str]) -> None:
    assert layout.split_suffix(name) == parts


def test_bytes_that_two_parts_share_are_told(exported: Exported) -> None:
    notes = exported.manifest("fp32").notes
    assert any("store" in note and "twice" in note for note in notes), notes

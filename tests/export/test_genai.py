"""Files for onnxruntime-genai: weights once, names that hold, graphs that compute what the parts do."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export import genai, genai_check, onnx
from export.checkpoint import load
from export.draft import draft_manifest
from export.facts import Facts, prepare
from export.families.gemma3 import GEMMA3
from export.families.lfm2_vl import LFM2_VL
from export.families.qwen_vl import QWEN_VL
from export.families.smolvlm import SMOLVLM
from export.passes import add_initializer
from export.quantize import quantize, resolve
from runtime.errors import CheckpointError, ParityError
from runtime.image_spec import (
    ExifRotate,
    ImageSpec,
    Normalise,
    PatchifyBlocks,
    ResizeExact,
    ResizeLongestEdge,
    SmartResize,
    TokenGrid,
    ToNchw,
    ToRgb,
)
from runtime.manifest import Manifest
from tests.checkpoints import FAMILIES, write_gemma3

MAKERS: dict[str, Callable[..., Path]] = {
    **FAMILIES,
    "gemma3": functools.partial(write_gemma3, side=128, tokens=256),
}
NAMES = (
    "qwen3_vl",
    "lfm2_vl",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "gemma3")),
)
SMALL_BYTES = 100_000  # the largest graph here has 42 kB, its weights 1.5 MB


@dataclass(frozen=True)
class Written:
    """A checkpoint's parts and the files for onnxruntime-genai, without the gate and the manifest."""

    facts: Facts
    folder: Path
    draft: Manifest

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / genai.CONFIG).read_text())["model"])

    def graph(self, name: str) -> ir.Model:
        return ir.load(self.folder / self.config[name]["filename"])


Writer = Callable[[str], Written]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    @functools.cache
    def get(name: str) -> Written:
        out = tmp_path_factory.mktemp(name)
        facts = prepare(load(MAKERS[name](out / "tiny")), (), lambda _: None)
        return write(facts, out / "bundle", facts.graphs, "fp32")

    return get


def write(facts: Facts, folder: Path, graphs: Any, precision: str) -> Written:
    onnx.write_files(facts, folder, graphs, beside=True)
    draft = draft_manifest(facts, folder, precision, "tiny")
    genai.write(folder, draft, facts.family, facts.checkpoint)
    return Written(facts, folder, draft)


def copied(source: Written, folder: Path) -> Written:
    shutil.copytree(source.folder, folder)
    return Written(source.facts, folder, source.draft)


def names(values: Any) -> set[str]:
    return {str(value.name) for value in values}


# --- files ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_lie_once_in_the_data_files_of_the_parts(written: Writer, name: str) -> None:
    made = written(name)
    data = {Path(file.path).name for part in made.draft.parts for file in part.data}
    own = list((made.folder / "onnx").glob("genai_*.onnx"))
    assert len(own) == (2 if name == "qwen2_5_vl" else 3)
    assert {file.name for file in (made.folder / "onnx").glob("*_data*")} == data
    for path in own:
        assert path.stat().st_size < SMALL_BYTES
        tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
        outside = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        assert outside and {str(tensor.location) for tensor in outside} <= data


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_names_what_the_graphs_have(written: Writer, name: str) -> None:
    made = written(name)
    config, layers = made.config, range(made.config["decoder"]["num_hidden_layers"])
    for part in ("embedding", "vision"):
        graph = made.graph(part).graph
        assert set(config[part]["inputs"].values()) == names(graph.inputs)
        assert set(config[part]["outputs"].values()) == names(graph.outputs)
    kinds = config["decoder"].get("layer_types", ["full_attention"] * len(layers))

    def spelled(side: str) -> set[str]:
        found = set()
        for template in config["decoder"][side].values():
            wanted = "conv" if "conv" in template else "full_attention"
            found |= {template % i for i in layers if kinds[i] == wanted} if "%d" in template else {template}
        return found

    decoder = made.graph("decoder").graph
    assert spelled("inputs") == names(decoder.inputs)
    assert spelled("outputs") == names(decoder.outputs)
    logits = next(value for value in decoder.outputs if value.name == "logits")
    assert logits.shape is not None and logits.shape[1] == 1  # it then allocates one row (IsPruned)


def test_widths_and_states_are_those_of_the_graphs(written: Writer) -> None:
    for name in ("qwen3_vl", "lfm2_vl"):
        made = written(name)
        shapes = {str(value.name): list(value.shape or ()) for value in made.graph("decoder").graph.inputs}
        decoder = made.config["decoder"]
        assert shapes["inputs_embeds"][-1] == decoder["hidden_size"]
        keys = next(shape for key, shape in shapes.items() if key.endswith(".key"))
        assert [keys[1], keys[3]] == [decoder["num_key_value_heads"], decoder["head_size"]]
        if name == "lfm2_vl":
            assert shapes["past_conv.0"][1:] == [decoder["hidden_size"], decoder["conv_cache_size"]]
        else:
            assert decoder["hidden_size"] == 3 * 64  # the embedding and what two layers add


def test_padding_is_no_token_of_a_prompt(written: Writer) -> None:
    """What equals it is masked, wherever it stands, and its own default is id 0."""
    made = written("qwen3_vl")
    own, stop = made.facts.checkpoint.tokenizer.pad_token_id, list(made.draft.tokenizer.stop_ids)
    assert made.config["pad_token_id"] == own and own not in stop
    start = made.draft.prompt.assistant[0]
    for pad, wanted in ((own, own), (None, -1), (stop[0], -1), (start, -1)):
        tokenizer = SimpleNamespace(pad_token_id=pad, bos_token_id=None)
        checkpoint = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(image_token_id=5))
        found = genai._token_ids(made.draft, checkpoint)  # type: ignore[arg-type]
        assert found == {"eos_token_id": stop, "pad_token_id": wanted, "image_token_id": 5}


# --- the graphs -------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_of_graphs_gives_the_logits_of_the_parts(written: Writer, name: str) -> None:
    made = written(name)
    assert {len(case.images) for case in made.facts.cases} == {0, 1, 2}
    assert genai_check.check(made.folder, made.draft, made.facts.cases) <= genai_check.MOST


@pytest.mark.parametrize("precision", ["fp16", "int4-b64-prefill8"])
def test_rounded_parts_are_chained_as_they_are(written: Writer, tmp_path: Path, precision: str) -> None:
    facts = written("qwen3_vl").facts
    policy = resolve(precision)
    roles = {**facts.graphs, **({"decoder_prefill": facts.graphs["decoder"]} if policy.prefill else {})}
    graphs = {role: quantize(model, role, policy.rules, None) for role, model in roles.items()}
    made = write(facts, tmp_path / "bundle", graphs, precision)
    assert genai_check.check(made.folder, made.draft, facts.cases) <= genai_check.MOST


def test_an_image_token_without_a_feature_keeps_its_embedding(written: Writer) -> None:
    made = written("lfm2_vl")
    ids = np.array([[7, made.draft.merge.token, 9]], np.int64)
    table, merging = (
        onnxruntime.InferenceSession(str(made.folder / path), providers=["CPUExecutionProvider"])
        for path in (made.draft.part("embed_tokens").path, genai.EMBEDDING)
    )
    wanted = table.run(None, {"input_ids": ids})[0]
    none = np.zeros((0, wanted.shape[-1]), np.float32)
    np.testing.assert_array_equal(merging.run(None, {"input_ids": ids, "image_features": none})[0], wanted)
    one = np.full((1, wanted.shape[-1]), 3, np.float32)
    merged = merging.run(None, {"input_ids": ids, "image_features": one})[0]
    np.testing.assert_array_equal(merged[0, 1], one[0])
    np.testing.assert_array_equal(merged[0, ::2], wanted[0, ::2])


def turn_around(graph: ir.Graph) -> None:
    """Deepstack's layers in the wrong order."""
    node = next(node for node in graph if node.name == "genai.turned")
    ends = {"start": -1, "end": np.iinfo(np.int64).min, "axis": 2, "step": -1}
    numbers = [add_initializer(graph, f"back.{key}", np.array([n], np.int64)) for key, n in ends.items()]
    back = ir.node("Slice", [node.inputs[0], *numbers], name="back")
    graph.insert_before(node, back)
    node.replace_input_with(0, back.outputs[0])


def other_token(graph: ir.Graph) -> None:
    """Features go where another token is."""
    graph.initializers["genai.token"].const_value = ir.tensor(np.array(7, np.int64), name="genai.token")


def no_features(graph: ir.Graph) -> None:
    """Image tokens keep their embedding."""
    node = next(node for node in graph if node.name == "genai.merged")
    graph.outputs.clear()
    node.inputs[0].name, node.outputs[0].name = "inputs_embeds", "unused"  # type: ignore[union-attr]
    graph.outputs.append(node.inputs[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("decoder", turn_around, "graphs give logits .* away from the parts'"),
        ("embedding", no_features, "graphs give logits .* away from the parts'"),
        ("embedding", other_token, "graphs do not run .*ScatterND"),
    ],
)
def test_a_damaged_graph_fails_the_check(
    written: Writer, tmp_path: Path, part: str, damage: Callable[[ir.Graph], None], message: str
) -> None:
    made = copied(written("qwen3_vl"), tmp_path / "bundle")
    model = made.graph(part)
    damage(model.graph)
    ir.save(model, made.folder / made.config[part]["filename"])
    with pytest.raises(ParityError, match=message):
        genai_check.check(made.folder, made.draft, made.facts.cases)


# --- which bundles ----------------------------------------------------


def test_a_family_that_it_lacks_gets_nothing(tiny_bundle: Path) -> None:
    assert not list(tiny_bundle.rglob("genai*"))
    assert not genai.wanted(SMOLVLM, None, None)  # type: ignore[arg-type]


def test_a_bundle_for_browsers_gets_nothing(written: Writer) -> None:
    facts = written("lfm2_vl").facts
    assert genai.wanted(facts.family, facts.checkpoint, "cpu")
    assert not genai.wanted(facts.family, facts.checkpoint, "browser")


def test_other_marks_around_a_picture_get_nothing(written: Writer) -> None:
    """Its processors write their own into the prompt."""
    real = written("lfm2_vl").facts.checkpoint.processor
    marks = {key: getattr(real, key) for key in ("image_token", "image_start_token", "image_end_token")}
    for change in ({"use_image_special_tokens": False}, {"image_end_token": "<end>"}):
        processor = SimpleNamespace(**{**marks, "use_image_special_tokens": True, **change})
        assert LFM2_VL.genai_type(SimpleNamespace(processor=processor)) is None  # type: ignore[arg-type]
    for tokens, known in ((256, "gemma3"), (16, None)):
        text = "\n\n<start_of_image>" + "<image_soft_token>" * tokens + "<end_of_image>\n\n"
        processor = SimpleNamespace(full_image_sequence=text)
        assert GEMMA3.genai_type(SimpleNamespace(processor=processor)) == known  # type: ignore[arg-type]
    qwen = written("qwen3_vl").facts.checkpoint
    assert QWEN_VL.genai_type(qwen) == "qwen3_vl"
    strange = SimpleNamespace(
        config=qwen.config,
        model_type=qwen.model_type,
        tokenizer=SimpleNamespace(convert_ids_to_tokens=lambda _: "<x>"),
    )
    assert QWEN_VL.genai_type(strange) is None  # type: ignore[arg-type]


# --- pictures ---------------------------------------------------------


def steps(image: ImageSpec) -> list[tuple[str, dict[str, Any]]]:
    found = [each["operation"] for each in genai.processor(image)["processor"]["transforms"]]
    return [(each["type"], each.get("attrs", {})) for each in found]


def test_the_image_section_becomes_transforms() -> None:
    spec = ImageSpec(
        operations=(
            ExifRotate(),
            ToRgb(file_alpha="drop", pixels_alpha="white"),
            SmartResize(factor=28, min_pixels=3136, max_pixels=100_352, aspect_limit=200, filter="bicubic"),
            Normalise(subtract=(0.0, 51.0, 127.5), divide=(255.0, 127.5, 51.0)),
            PatchifyBlocks(patch=14, merge=2, frames=2),
        ),
        tokens=TokenGrid(patch=14, merge=2),
        max_views=1,
        max_tokens=128,
    )
    resize = {"min_pixels": 3136, "max_pixels": 100_352, "patch_size": 14, "merge_size": 2}
    assert steps(spec) == [
        ("DecodeImage", {"color_space": "RGB"}),
        ("Resize", {"interpolation": "CUBIC", "smart_resize": 1, **resize}),
        ("Rescale", {"rescale_factor": 1 / 255}),
        ("Normalize", {"mean": [0.0, 0.2, 0.5], "std": [1.0, 0.5, 0.2]}),
        ("PatchImage", {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}),
    ]


def test_one_size_is_stretched_and_another_resize_is_refused(written: Writer) -> None:
    draft = written("lfm2_vl").draft
    front, colours = draft.image.operations[:2], draft.image.operations[-2]

    def section(resize: Any) -> ImageSpec:
        return ImageSpec(
            operations=(*front, resize, colours, ToNchw()),
            tokens=TokenGrid(patch=8, merge=2),
            max_views=1,
            max_tokens=16,
        )

    found = steps(section(ResizeExact(height=64, width=48, filter="bilinear")))
    assert [kind for kind, _ in found][-2:] == ["Normalize", "Permute3D"]
    exact = {"interpolation": "LINEAR", "keep_aspect_ratio": 0, "height": 64, "width": 48}
    assert dict(found)["Resize"] == exact
    with pytest.raises(CheckpointError, match=r"resize_longest_edge@1.*has no such resize"):
        genai.processor(section(ResizeLongestEdge(longest_edge=64, cap=64, filter="lanczos")))


def test_tiles_become_the_whole_picture(written: Writer) -> None:
    draft = written("lfm2_vl").draft
    assert any(operation.op == "tiles.grid@1" for operation in draft.image.operations)
    found = steps(draft.image)
    assert [kind for kind, _ in found][-2:] == ["Permute3D", "PixtralImageSizes"]
    pixels = [dict(found)["Resize"][key] for key in ("min_pixels", "max_pixels")]
    assert pixels == [4 * 16 * 16, 16 * 16 * 16]  # tokens of 16 x 16 pixels

"""LFM2-VL: convolution states beside keys and values, and positions resized inside the vision graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.nn import functional

from export import gate, onnx
from export.checkpoint import Checkpoint, load
from export.draft import draft_manifest
from export.facts import expected_of, prepare
from export.families.lfm2_vl import LFM2_VL, _triangle
from export.graphs import ROLES, trace_all
from runtime.errors import CheckpointError, InputError, ParityError
from runtime.generation import GenerationOptions
from runtime.session import open_bundle
from tests.checkpoints import write_lfm2_vl
from tests.export.conftest import Exported

SHAPES = [(2, 2), (2, 6), (8, 4), (6, 2), (8, 8)]
"""Rows and columns of patches: the table has 8 x 8, so rows or columns shrink, stay, or both."""


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("lfm2")
    facts = prepare(load(write_lfm2_vl(out / "tiny")), (), lambda _: None)
    bundles = {}
    for precision in ("fp32", "int8", "int4"):
        bundles[precision] = out / precision
        bundles[precision].mkdir()
        onnx.build(facts, bundles[precision], precision, f"tiny-{precision}", out)
    return Exported(facts, bundles, out)


def run(model: ir.Model) -> onnxruntime.InferenceSession:
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def steps(model: ir.Model, embeds: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Logits (1, S, vocab) of embeddings (1, S, hidden) given to the decoder in pieces of these sizes."""
    session = run(model)
    state = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
            state[value.name] = np.zeros((1, *shape), np.float32)
    rows, done = [], 0
    for size in sizes:
        logits, *present = session.run(
            None,
            {
                "inputs_embeds": embeds[:, done : done + size],
                "attention_mask": np.ones((1, done + size), np.int64),
                "position_ids": np.arange(done, done + size, dtype=np.int64)[None],
                "num_logits_to_keep": np.array(0, np.int64),
                **state,
            },
        )
        state = dict(zip(state, present, strict=True))
        rows.append(logits)
        done += size
    return np.concatenate(rows, axis=1)


def text_logits(checkpoint: Checkpoint, embeds: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        model = checkpoint.model
        hidden = model.model.language_model(inputs_embeds=torch.from_numpy(embeds)).last_hidden_state
        return model.lm_head(hidden).numpy()


# --- bundles ----------------------------------------------------------


def test_every_precision_passes_its_gate(lfm2: Exported) -> None:
    for precision in ("fp32", "int8", "int4"):
        figures = lfm2.manifest(precision).parity.figures
        assert figures["pixel_max_diff"] == 0 and figures["ids_equal"] == 1
    assert lfm2.manifest("fp32").parity.figures["logit_rel_diff"] < 1e-5
    bits = {part.role: min(entry.bits for entry in part.bits) for part in lfm2.manifest("int4").parts}
    assert bits == {"vision_encoder": 8, "embed_tokens": 8, "decoder": 4}


def test_states_of_two_kinds_in_the_layout_of_the_ecosystem(lfm2: Exported) -> None:
    manifest = lfm2.manifest("fp32")
    conv = [state for state in manifest.state if state.kind == "conv"]
    assert [state.input for state in conv] == ["past_conv.0", "past_conv.2"]
    assert [state.output for state in conv] == ["present_conv.0", "present_conv.2"]
    assert all(state.shape == ("batch_size", 64, 3) and not state.rewindable for state in conv)
    assert all(state.padding_side is None and not state.in_place for state in conv)
    kv = {state.input for state in manifest.state} - {state.input for state in conv}
    assert kv == {f"past_key_values.{layer}.{name}" for layer in (1, 3) for name in ("key", "value")}


def test_convolutions_stay_float_and_projections_do_not(lfm2: Exported) -> None:
    part = lfm2.manifest("int4").part("decoder")
    model = ir.load(lfm2.bundles["int4"] / part.path)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Conv") == 2 and "MatMul" not in kinds
    assert kinds.count("GroupQueryAttention") == 2
    vision = ir.load(lfm2.bundles["int4"] / lfm2.manifest("int4").part("vision_encoder").path)
    names = [node.op_type for node in vision.graph]
    assert "Gemm" not in names and names.count("MultiHeadAttention") == 2
    assert names.count("MatMul") == 1  # the position table, which is no layer's weight


def test_a_large_picture_becomes_tiles_and_a_small_one_keeps_its_aspect(lfm2: Exported) -> None:
    with open_bundle(lfm2.bundles["fp32"], threads=1) as session:
        small, large = (session.prepare(Image.new("RGB", size)) for size in ((40, 20), (300, 90)))
        assert small.tiles == (0, 0) and len(small.views) == 1
        rows, columns = large.tiles
        assert rows * columns > 1 and len(large.views) == rows * columns + 1
        ids = session.prompt_ids("what?", [large]).tolist()
        assert ids.count(session.manifest.prompt.image.token) == large.tokens
        tokenizer = lfm2.facts.checkpoint.tokenizer
        assert ids.count(tokenizer.convert_tokens_to_ids("<|img_thumbnail|>")) == 1
        assert ids.count(tokenizer.convert_tokens_to_ids("<|img_row_1_col_2|>")) == 1
        with pytest.raises(InputError, match="too long and thin"):
            session.prepare(Image.new("RGB", (4000, 2)))


def test_without_tiles(lfm2: Exported, tmp_path: Path) -> None:
    checkpoint = load(lfm2.facts.checkpoint.path)
    facts = prepare(checkpoint, (), lambda _: None, plan=onnx.Plan(split_images=False))
    assert facts.image.max_views == 1 and facts.prompt.image.tiled is None
    (tmp_path / "bundle").mkdir()
    onnx.build(facts, tmp_path / "bundle", "fp32", "tiny", tmp_path)


def test_a_later_question_goes_on_from_a_state_that_cannot_be_cut(lfm2: Exported) -> None:
    """Each turn equals the whole conversation given at once, to a fresh bundle and to the checkpoint."""
    picture, reference = gate.pictures()[0][1], lfm2.facts.reference
    features = [reference.encode_image(reference.prepare(picture))]
    with open_bundle(lfm2.bundles["fp32"], threads=1) as session:
        chat, prepared = session.chat(picture), session.prepare(picture)
        for question in ("what color is it?", "is there a circle?", "yes or no?"):
            images = () if chat.turns else (prepared,)
            ids = session.prompt_ids(question, images, history=chat.turns)
            wanted = reference.prefill(ids, features)
            got = session.prefill(ids, [session.encode_image(prepared)], reuse=True)
            assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
            chat.ask(question, GenerationOptions(max_new_tokens=6))
        last = chat.turns[-1].answer
        chat.undo()
        assert tuple(chat.ask(question, GenerationOptions(max_new_tokens=6)).token_ids) == last


# --- decoder ----------------------------------------------------------


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [2, 1, 1, 5, 3], [1, 9, 2], [11, 1]])
def test_pieces_of_any_length_give_the_same_logits(lfm2: Exported, sizes: list[int]) -> None:
    """The first pieces are shorter than the kernel: zeros of the empty state stand before them."""
    embeds = np.random.default_rng(0).standard_normal((1, 12, 64)).astype(np.float32)
    got = steps(lfm2.facts.graphs["decoder"], embeds, sizes)
    wanted = text_logits(lfm2.facts.checkpoint, embeds)
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_heads_too_narrow_for_folded_rope_and_biased_convolutions(tmp_path: Path) -> None:
    path = write_lfm2_vl(tmp_path / "narrow", heads=8, kv_heads=4)
    change(path, "config.json", ("text_config", "conv_L_cache"), 3)
    checkpoint = load(path)
    model = trace_all(checkpoint, LFM2_VL)["decoder"]
    embeds = np.random.default_rng(1).standard_normal((1, 9, 64)).astype(np.float32)
    wanted = text_logits(checkpoint, embeds)
    assert np.abs(steps(model, embeds, [4, 1, 4]) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_the_modules_are_left_as_they_were(lfm2: Exported) -> None:
    for module in lfm2.facts.checkpoint.model.modules():
        assert "forward" not in vars(module), type(module).__name__


@pytest.mark.parametrize("damage", ["state", "kernel"])
def test_the_gate_sees_a_wrong_convolution(lfm2: Exported, tmp_path: Path, damage: str) -> None:
    """A state one column late, and a kernel read backwards: each alone must fail the gate."""
    facts = lfm2.facts
    model = ir.from_proto(ir.to_proto(facts.graphs["decoder"]))
    conv = next(node for node in model.graph if node.op_type == "Conv")
    if damage == "kernel":
        weight = conv.inputs[1]
        assert weight is not None and weight.const_value is not None
        weight.const_value = ir.tensor(np.ascontiguousarray(weight.const_value.numpy()[:, :, ::-1]))
    else:
        state = next(value for value in model.graph.outputs if value.name == "present_conv.0")
        cut = state.producer()
        assert cut is not None and cut.op_type == "Slice"
        starts = ir.Value(name="late", const_value=ir.tensor(np.array([-4], np.int64)))
        ends = ir.Value(name="early", const_value=ir.tensor(np.array([-1], np.int64)))
        for value in (starts, ends):
            model.graph.register_initializer(value)
        cut.replace_input_with(1, starts)
        cut.replace_input_with(2, ends)
    onnx.write_files(facts, tmp_path, {**facts.graphs, "decoder": model})
    draft = draft_manifest(facts, tmp_path, "fp32", "damaged")
    with pytest.raises(ParityError, match="logit_rel_diff"):
        gate.check_float(facts.checkpoint, tmp_path, draft, expected_of(facts))


# --- vision -----------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "side"), [(3, 5, 8), (16, 7, 8), (8, 8, 8), (1, 20, 16)])
def test_positions_are_those_of_an_antialiased_resize(rows: int, columns: int, side: int) -> None:
    table = torch.randn(side, side, 5, generator=torch.Generator().manual_seed(0))
    number = torch.arange(rows * columns)
    down = _triangle(number // columns, torch.tensor(rows), side)
    across = _triangle(number % columns, torch.tensor(columns), side)
    got = torch.einsum("na,nb,abc->nc", down, across, table)
    wanted = functional.interpolate(
        table.permute(2, 0, 1)[None], size=(rows, columns), mode="bilinear", antialias=True
    )[0]
    assert (got - wanted.flatten(1).T).abs().max() < 2e-6


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("padding", [0, 9])
def test_vision_of_any_shape_with_and_without_padding(
    lfm2: Exported, rows: int, columns: int, padding: int
) -> None:
    pixels = np.random.default_rng(2).standard_normal((1, rows * columns, 192)).astype(np.float32)
    shapes = np.array([[rows, columns]], np.int64)
    padded = np.concatenate([pixels, np.full((1, padding, 192), 7.0, np.float32)], axis=1)
    session = run(lfm2.facts.graphs["vision_encoder"])
    got = session.run(None, {"pixel_values": padded, "spatial_shapes": shapes})[0]
    with torch.no_grad():
        wanted = (
            lfm2.facts.checkpoint.model.get_image_features(
                pixel_values=torch.from_numpy(pixels),
                spatial_shapes=torch.from_numpy(shapes),
                pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.int32),
            )
            .pooler_output[0]
            .numpy()
        )
    assert got.shape == wanted.shape == (rows * columns // 4, 64)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


# --- refusals ---------------------------------------------------------


def change(path: Path, file: str, keys: tuple[str, ...], value: object) -> None:
    data = json.loads((path / file).read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (path / file).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("tile_size", 72, "multiples of 16"),
        ("min_tiles", 1, "at least two"),
        ("encoder_patch_size", 16, "the model has 8"),
        ("downsample_factor", 4, "the model has 2"),
        ("do_normalize", False, "do_normalize is False"),
        ("resample", 0, "resample is 0"),
    ],
)
def test_unfit_processors_are_refused_by_name(
    lfm2: Exported, setting: str, value: object, message: str
) -> None:
    checkpoint = load(lfm2.facts.checkpoint.path)
    setattr(checkpoint.processor.image_processor, setting, value)
    with pytest.raises(CheckpointError, match=message):
        LFM2_VL.check(checkpoint)


def test_a_text_model_without_attention_is_refused(lfm2: Exported) -> None:
    checkpoint = replace(load(lfm2.facts.checkpoint.path))
    checkpoint.config.text_config.layer_types = ["conv"] * 4
    with pytest.raises(CheckpointError, match="one full_attention at least"):
        LFM2_VL.check(checkpoint)


def test_roles_are_complete(lfm2: Exported) -> None:
    assert [part.role for part in lfm2.manifest("fp32").parts] == list(ROLES)

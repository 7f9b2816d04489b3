"""Qwen-VL: the grid inside the vision graph, M-RoPE and deepstack in the decoder, the gate, damage to it."""

from __future__ import annotations

import collections
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import runtime
from export import decoder, onnx, passes, quantize
from export.checkpoint import Checkpoint, load
from export.facts import Facts, expected_of, prepare
from export.families import family_of
from export.families.qwen_vision import QwenVision
from export.passes import add_initializer, constant
from runtime import bundle
from runtime.errors import CheckpointError, InputError, ParityError
from runtime.manifest import Manifest, PositionsMrope
from tests.checkpoints import FAMILIES, VARIANTS, write_qwen2_5_vl, write_qwen3_vl
from tests.export.test_gate import positions_shifted_by_one
from tests.export.test_parts import open_model

MAKERS = {**FAMILIES, **VARIANTS}
NAMES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
FIRST_FAST = (NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:]))
GRIDS = ((2, 2), (2, 14), (8, 8), (6, 10), (10, 4), (16, 18))
"""Patches; windows hold 4 x 4 of them (2 x 2 tokens), so that half of these are no multiple."""


Prepared = Callable[[str], Facts]
Built = Callable[[str, str], Path]


def make(name: str, out: Path, **options: int) -> Path:
    return MAKERS[name](out, **options)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Checkpoint, graphs and reference by family name, each made once."""

    @functools.cache
    def get(name: str) -> Facts:
        return prepare(load(make(name, tmp_path_factory.mktemp(name) / "tiny")), (), lambda _: None)

    return get


@pytest.fixture(scope="module")
def built(traced: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A bundle that passed the gate, by family and precision."""

    @functools.cache
    def get(name: str, precision: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{precision}")
        (folder / "bundle").mkdir()
        onnx.build(traced(name), folder / "bundle", precision, "tiny", folder)
        return folder / "bundle"

    return get


# --- vision -----------------------------------------------------------


def patches(rows: int, columns: int) -> dict[str, torch.Tensor]:
    values = torch.randn(rows * columns, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(rows))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, rows, columns]])}


def reference(visual: Any, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        found = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    stack = getattr(found, "deepstack_features", None)
    return [found.pooler_output.numpy(), *([torch.stack(stack).numpy()] if stack else [])]


def close(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    """Within the order of summation; shapes too."""
    assert [x.shape for x in found] == [x.shape for x in wanted]
    return all(np.abs(a - b).max() < 1e-5 * np.abs(b).max() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", FIRST_FAST)
def test_the_vision_graph_takes_any_grid_by_itself(traced: Prepared, name: str) -> None:
    found = traced(name)
    session = open_model(found.graphs["vision_encoder"])
    assert [each.name for each in session.get_inputs()] == ["pixel_values", "image_grid_thw"]
    for rows, columns in GRIDS:
        inputs = patches(rows, columns)
        got = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        assert close(got, reference(found.checkpoint.model.model.visual, inputs)), (rows, columns)


@pytest.mark.parametrize("pixels", [16, 32, 48, 80, 192])
def test_windows_of_every_size(traced: Prepared, pixels: int) -> None:
    """One token, two, three and five a side, and one window larger than any of the pictures; in torch."""
    visual = traced("qwen2_5_vl").checkpoint.model.model.visual
    before = visual.window_size, visual.config.window_size
    visual.window_size = visual.config.window_size = pixels
    try:
        module = QwenVision(visual).eval()
        for rows, columns in GRIDS:
            inputs = patches(rows, columns)
            with torch.no_grad():
                got = [x.numpy() for x in module(**inputs)]
            assert close(got, reference(visual, inputs)), (rows, columns)
    finally:
        visual.window_size, visual.config.window_size = before


def test_each_vision_layer_is_few_nodes(traced: Prepared) -> None:
    for name, layers, windows in (("qwen3_vl", 3, 0), ("qwen2_5_vl", 2, 1), ("qwen2_vl", 2, 0)):
        graph = traced(name).graphs["vision_encoder"].graph
        counts = collections.Counter(node.op_type for node in graph)
        assert counts["MultiHeadAttention"] == layers and counts["RotaryEmbedding"] == 2 * layers
        assert counts["Transpose"] == 0 and counts["Softmax"] == 0 and counts["Gemm"] == 0
        skips = counts["SkipLayerNormalization"] + counts["SkipSimplifiedLayerNormalization"]
        assert skips == 2 * layers, counts
        masked = [n for n in graph if n.op_type == "MultiHeadAttention" and len(n.inputs) > 3]
        assert len(masked) == windows, "only windows need a mask"
    assert counts["Cos"] == counts["Sin"] == 1


def test_gate_and_up_with_biases_are_packed(traced: Prepared) -> None:
    names = [node.name for node in traced("qwen2_5_vl").graphs["vision_encoder"].graph]
    assert sum(str(name).endswith("mlp.gate_up_proj") for name in names) == 2
    assert not any(str(name).endswith(("gate_proj", "mlp.up_proj")) for name in names)


# --- decoder ----------------------------------------------------------


class Steps:
    """Runs a decoder graph on embeddings (B, S, hidden) at positions (3, B, S)."""

    def __init__(self, model: ir.Model, shape: decoder.DecoderShape, batch: int = 1) -> None:
        self.session = open_model(model)
        empty = np.zeros((batch, shape.kv_heads, 0, shape.head_dim), np.float32)
        self.names = [each.name for each in self.session.get_outputs()][1:]
        self.state = {name.replace("present.", "past_key_values."): empty for name in self.names}

    def __call__(
        self, embeds: torch.Tensor, mask: np.ndarray, positions: torch.Tensor, stack: torch.Tensor | None
    ) -> np.ndarray:
        feeds = {
            "inputs_embeds": embeds.numpy(),
            "attention_mask": mask.astype(np.int64),
            "position_ids": positions.numpy(),
            "num_logits_to_keep": np.array(0, np.int64),
            **({"deepstack_embeds": stack.numpy()} if stack is not None else {}),
        }
        logits, *present = self.session.run(None, {**feeds, **self.state})
        self.state = dict(zip(self.state, present, strict=True))
        return logits


def sequence(found: Facts, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Embeddings, three rows of positions that differ, and what deepstack adds."""
    shape = family_of(found.checkpoint).decoder_shape(found.checkpoint)
    random = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, length, shape.hidden, generator=random) * 0.3
    positions = torch.randint(0, 40, (3, batch, length), generator=random)
    layers = shape.deepstack_layers
    stack = torch.randn(layers, batch, length, shape.hidden, generator=random) if layers else None
    return embeds, positions, stack


def torch_logits(
    checkpoint: Checkpoint, embeds: torch.Tensor, positions: torch.Tensor, stack: Any
) -> np.ndarray:
    model = checkpoint.model
    more = {}
    if stack is not None:
        everywhere = torch.ones(embeds.shape[:2], dtype=torch.bool)
        more = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": [x.flatten(0, 1) for x in stack]}
    with torch.no_grad():
        out = model.model.language_model(inputs_embeds=embeds, position_ids=positions, **more)
        return model.lm_head(out.last_hidden_state).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_serves_prefill_decode_and_continuation(traced: Prepared, name: str) -> None:
    """At any positions of three rows, and with something added at every place."""
    found = traced(name)
    embeds, positions, stack = sequence(found, 1, 14)
    wanted = torch_logits(found.checkpoint, embeds, positions, stack)
    shape = found.family.decoder_shape(found.checkpoint)
    step, done, got = Steps(found.graphs["decoder"], shape), 0, []
    for length in (7, 1, 1, 4, 1):
        part = slice(done, done + length)
        done += length
        added = None if stack is None else stack[:, :, part]
        got.append(step(embeds[:, part], np.ones((1, done)), positions[:, :, part], added))
    assert np.abs(np.concatenate(got, axis=1) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES[:2])
def test_rows_of_a_batch_keep_to_their_own_positions(traced: Prepared, name: str) -> None:
    """Right padding in the prefill, then one token a row."""
    found = traced(name)
    embeds, positions, stack = sequence(found, 2, 10)
    lengths = np.array([[5], [9]])
    shape = found.family.decoder_shape(found.checkpoint)
    both = Steps(found.graphs["decoder"], shape, batch=2)
    first = both(embeds[:, :9], np.arange(9) < lengths, positions[:, :, :9], _part(stack, slice(0, 9)))
    mask = np.concatenate([np.arange(9) < lengths, np.ones((2, 1))], axis=1)
    mask[0] = np.arange(10) < 6
    last = both(embeds[:, 9:], mask, positions[:, :, 9:], _part(stack, slice(9, 10)))
    for row, length in enumerate((5, 9)):
        kept, one = [*range(length), 9], slice(row, row + 1)
        added = None if stack is None else stack[:, one][:, :, kept]
        wanted = torch_logits(found.checkpoint, embeds[one, kept], positions[:, one, kept], added)[0]
        got = np.concatenate([first[row, :length], last[row]])
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_far_positions_and_scaled_rotary_embeddings(tmp_path: Path) -> None:
    """YaRN scales angles and attention; positions of tens of thousands are as exact as in torch."""
    path = make("qwen3_vl", tmp_path / "tiny")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    edit(path / "config.json", lambda c: c["text_config"]["rope_parameters"].update(yarn))
    checkpoint = load(path)
    family = family_of(checkpoint)
    modules, shape = family.modules(checkpoint), family.decoder_shape(checkpoint)
    model = decoder.trace_decoder(modules.text, modules.head, shape)
    passes.run(model, passes.DECODER_PASSES)
    random = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 12, shape.hidden, generator=random) * 0.3
    positions = 30000 + torch.randint(0, 2000, (3, 1, 12), generator=random)
    stack = torch.zeros(shape.deepstack_layers, 1, 12, shape.hidden)
    assert checkpoint.model.model.language_model.rotary_emb.attention_scaling != 1.0
    wanted = torch_logits(checkpoint, embeds, positions, stack)
    got = Steps(model, shape)(embeds, np.ones((1, 12)), positions, stack)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def _part(stack: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if stack is None else stack[:, :, part]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_packed_and_the_cosines_are_shared(traced: Prepared, name: str) -> None:
    counts = collections.Counter(node.op_type for node in traced(name).graphs["decoder"].graph)
    assert counts["GroupQueryAttention"] == 2 and counts["RotaryEmbedding"] == 4
    assert counts["Cos"] == counts["Sin"] == 1 and counts["Transpose"] == 0
    assert counts["MatMul"] == 2 * 4 + 1  # qkv, output, gate and up, down; and the head
    assert counts["Split"] == 2 * 2 and counts["SkipSimplifiedLayerNormalization"] == 4
    # per layer: a norm on queries and one on keys (Qwen3), each between two reshapes
    norms = 4 if name == "qwen3_vl" else 0
    assert counts["SimplifiedLayerNormalization"] == 1 + norms
    assert counts["Reshape"] == 3 + 2 * norms  # positions, their row numbers, num_logits_to_keep
    assert counts["Gather"] == (2 if name == "qwen3_vl" else 0)  # a row of deepstack a layer


# --- the gate ---------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow), "int4"])
@pytest.mark.parametrize("name", FIRST_FAST)
def test_bundles_pass_the_gate(built: Built, name: str, precision: str) -> None:
    manifest = bundle.read(built(name, precision))
    assert isinstance(manifest.positions, PositionsMrope)
    assert manifest.positions.interleaved == (name == "qwen3_vl")
    assert (manifest.deepstack is not None) == (name == "qwen3_vl")
    inputs = [spec.name for spec in manifest.part("vision_encoder").inputs]
    assert inputs == ["pixel_values", "image_grid_thw"]
    if precision == "fp32":
        figures = manifest.parity.figures
        assert figures["logit_rel_diff"] < 1e-4 and figures["top1_agreement"] == 1.0


def test_the_gate_sees_grids_that_fill_no_windows(traced: Prepared) -> None:
    facts = traced("qwen2_5_vl")
    pictures: list[Any] = [case.image for case in facts.cases if isinstance(case.image, (bytes, Image.Image))]
    grids = [facts.reference.prepare(each).inputs["image_grid_thw"][0].tolist() for each in pictures]
    assert any(rows % 4 or columns % 4 for _, rows, columns in grids), grids
    assert len({tuple(grid) for grid in grids}) > 2


def test_answers_on_pictures_that_the_gate_does_not_know(traced: Prepared, built: Built) -> None:
    for name in NAMES:
        facts = traced(name)
        with runtime.open_bundle(built(name, "fp32"), threads=1) as session:
            for size in ((40, 200), (64, 64), (501, 130)):
                picture = Image.effect_noise(size, 90).convert("RGB")
                got = session.ask(picture, "what color?", runtime.GenerationOptions(max_new_tokens=8))
                assert got.token_ids == facts.reference.generate(picture, "what color?", 8)


def test_a_picture_that_is_too_thin_is_refused(
    built: Built,
) -> None:
    with (
        runtime.open_bundle(built("qwen3_vl", "fp32"), threads=1) as session,
        pytest.raises(InputError, match="more than 200 times the other"),
    ):
        session.prepare(Image.new("RGB", (3, 900)))


# --- damage -----------------------------------------------------------


def deepstack_zeroed(model: ir.Model) -> None:
    """The decoder adds row 0 of deepstack times nothing."""
    stack = next(x for x in model.graph.inputs if x.name == "deepstack_embeds")
    node = next(node for node, _ in stack.uses() if node.op_type == "Gather")
    users = list(node.outputs[0].uses())
    zero = add_initializer(model.graph, "zero", np.zeros(1, np.float32))
    product = ir.node("Mul", [node.outputs[0], zero], name="mutant_zero")
    product.outputs[0].dtype = ir.DataType.FLOAT
    for user, index in users:
        user.replace_input_with(index, product.outputs[0])
    model.graph.insert_after(node, product)


def deepstack_rows_swapped(model: ir.Model) -> None:
    """Two layers, each with the other's features, where the vision part joins them."""
    node = next(x for x in model.graph.outputs if x.name == "deepstack_features").producer()
    assert node is not None and node.op_type == "Concat" and len(node.inputs) == 2
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


def position_rows_swapped(model: ir.Model) -> None:
    """Frequencies turned by the row of a patch turn by its column, and the other way round."""
    value = model.graph.initializers["frequencies"]
    array = constant(value)
    assert array is not None and array.shape[:2] == (3, 1)
    value.const_value = ir.tensor(np.ascontiguousarray(array[[0, 2, 1]]), name=value.name)


def window_of_other_slots(model: ir.Model) -> None:
    """The columns of a window's tokens in another order, in the gathered index only."""
    value = model.graph.initializers["slot_column"]
    array = constant(value)
    assert array is not None
    value.const_value = ir.tensor(np.roll(array, 4), name=value.name)


def windows_unmasked(model: ir.Model) -> None:
    """Padding of a window counts as a key."""
    for node in model.graph:
        if node.op_type == "MultiHeadAttention" and len(node.inputs) > 4:
            node.replace_input_with(4, None)


DAMAGE: tuple[tuple[str, str, Callable[[ir.Model], None]], ...] = (
    ("qwen3_vl", "decoder", deepstack_zeroed),
    ("qwen3_vl", "vision_encoder", deepstack_rows_swapped),
    ("qwen3_vl", "decoder", position_rows_swapped),
    ("qwen2_5_vl", "decoder", position_rows_swapped),
    ("qwen2_5_vl", "decoder", positions_shifted_by_one),
    ("qwen2_5_vl", "vision_encoder", window_of_other_slots),
    ("qwen2_5_vl", "vision_encoder", windows_unmasked),
)


def judge(facts: Facts, precision: str, folder: Path, manifest: Manifest, scratch: Path) -> None:
    if precision == "fp32":
        onnx.gate.check_float(facts.checkpoint, folder, manifest, expected_of(facts))
    else:
        onnx.gate.check_quantized(
            facts.checkpoint, facts.graphs, folder, manifest, expected_of(facts), scratch
        )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("name", "role", "damage"), DAMAGE, ids=[f"{d.__name__}-{n}" for n, _, d in DAMAGE])
def test_a_damaged_part_fails_the_gate(
    traced: Prepared,
    built: Built,
    tmp_path: Path,
    name: str,
    role: str,
    damage: Callable[[ir.Model], None],
    precision: str,
) -> None:
    folder = Path(shutil.copytree(built(name, precision), tmp_path / "bundle"))
    manifest = bundle.read(folder)
    part = folder / manifest.part(role).path
    model, before = ir.load(part), part.read_bytes()
    damage(model)
    ir.save(model, part)
    assert part.read_bytes() != before
    with pytest.raises(ParityError):
        judge(traced(name), precision, folder, manifest, tmp_path)


@pytest.mark.parametrize("name", NAMES[:2])
def test_angles_and_places_stay_float32_in_half_precision(traced: Prepared, name: str) -> None:
    """float16 holds whole numbers up to 2048: positions behind that would fall together."""
    for role in ("vision_encoder", "decoder"):
        model = quantize.quantize(traced(name).graphs[role], role, quantize.policy("fp16"))
        waves = [node for node in model.graph if node.op_type in ("Cos", "Sin", "Floor")]
        assert len(waves) >= 2
        for node in waves:
            source = node.inputs[0]
            assert source is not None and source.dtype == ir.DataType.FLOAT
        halves = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16]
        assert len(halves) > 10


# --- checkpoints of other kinds ---------------------------------------


@pytest.mark.parametrize(
    ("write", "shape", "dtype"),
    [
        (write_qwen3_vl, {"heads": 8, "kv_heads": 4}, torch.bfloat16),  # heads of 8
        pytest.param(write_qwen3_vl, {"hidden": 96}, torch.float16, marks=pytest.mark.slow),  # of 24
        pytest.param(
            write_qwen2_5_vl, {"heads": 8, "kv_heads": 2, "seed": 1}, torch.float16, marks=pytest.mark.slow
        ),
    ],
)
def test_narrow_heads_half_precision_and_shards(
    tmp_path: Path, write: Callable[..., Path], shape: dict[str, int], dtype: torch.dtype
) -> None:
    path = write(tmp_path / "tiny", **shape)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    facts = prepare(load(path), (), lambda _: None)
    (tmp_path / "bundle").mkdir()
    onnx.build(facts, tmp_path / "bundle", "fp32", "tiny", tmp_path)
    assert bundle.read(tmp_path / "bundle").parity.figures["top1_agreement"] == 1.0


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


REFUSED: tuple[tuple[str, str, Callable[[dict[str, Any]], None], str], ...] = (
    (
        "qwen2_5_vl",
        "config.json",
        lambda c: c["text_config"].update(
            use_sliding_window=True, sliding_window=64, max_window_layers=1, layer_types=None
        ),
        "sliding_attention",
    ),
    (
        "qwen3_vl",
        "config.json",
        lambda c: c["text_config"]["rope_parameters"].update(
            rope_type="longrope", factor=2.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8
        ),
        "rope_type 'longrope'",
    ),
    (
        "qwen3_vl",
        "processor_config.json",
        lambda c: c["image_processor"].update(patch_size=16),
        "image_processor.patch_size is 16, vision_config.patch_size is 8",
    ),
    (
        "qwen3_vl",
        "processor_config.json",
        lambda c: c["image_processor"].update(do_resize=False),
        "image_processor.do_resize is False",
    ),
    (
        "qwen2_5_vl",
        "config.json",
        lambda c: c["vision_config"].update(window_size=8),
        "window_size 8 holds no",
    ),
    ("qwen2_5_vl", "config.json", lambda c: c["vision_config"].update(num_heads=16), "are 4 wide"),
)


@pytest.mark.parametrize(("name", "file", "change", "message"), REFUSED, ids=[each[3] for each in REFUSED])
def test_what_the_parts_cannot_do_is_refused_by_name(
    tmp_path: Path, name: str, file: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = make(name, tmp_path / "tiny")
    edit(path / file, change)
    with pytest.raises(CheckpointError, match=message):
        family_of(load(path))


def test_a_mixture_of_experts_is_named(traced: Prepared) -> None:
    from export.families import check_type

    with pytest.raises(CheckpointError, match=r"'qwen3_vl_moe' .*known: .*qwen3_vl"):
        check_type(traced("qwen3_vl").checkpoint.path, "qwen3_vl_moe")

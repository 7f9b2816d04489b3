"""Tracing, passes and quantization of the parts, against torch and against their definitions."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from export import audit, decoder, passes, quantize
from export.checkpoint import Checkpoint, load
from export.families import family_of
from export.graphs import ROLES, trace_all
from runtime.errors import CheckpointError, InputError, ParityError
from tests.checkpoints import write_smolvlm
from tests.export.conftest import Exported


def open_model(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


class Cached:
    """Runs a decoder graph step by step on embeddings (B, S, hidden)."""

    def __init__(self, model: ir.Model, shape: decoder.DecoderShape, batch: int = 1) -> None:
        self.session = open_model(model)
        self.names = [out.name for out in self.session.get_outputs()][1:]
        self.batch, self.shape = batch, shape
        self.state = self._empty()

    def _empty(self) -> dict[str, np.ndarray]:
        empty = np.zeros((self.batch, self.shape.kv_heads, 0, self.shape.head_dim), np.float32)
        return {name.replace("present.", "past_key_values."): empty for name in self.names}

    def step(self, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, keep: int = 0) -> np.ndarray:
        feeds = {
            "inputs_embeds": embeds.astype(np.float32),
            "attention_mask": mask.astype(np.int64),
            "position_ids": positions.astype(np.int64),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        logits, *present = self.session.run(None, {**feeds, **self.state})
        names = [name.replace("present.", "past_key_values.") for name in self.names]
        self.state = dict(zip(names, present, strict=True))
        return logits


@pytest.fixture(scope="module")
def unfolded(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Heads of 8: too narrow for RoPE inside the attention node, so it stays outside."""
    return load(write_smolvlm(tmp_path_factory.mktemp("narrow") / "tiny", heads=8, kv_heads=4))


@pytest.fixture(scope="module")
def unfolded_graphs(unfolded: Checkpoint) -> dict[str, ir.Model]:
    return trace_all(unfolded, family_of(unfolded))


@pytest.fixture(params=["folded", "unfolded"])
def traced(
    request: pytest.FixtureRequest, exported: Exported
) -> tuple[Checkpoint, ir.Model, decoder.DecoderShape]:
    if request.param == "folded":
        checkpoint, graphs = exported.facts.checkpoint, dict(exported.facts.graphs)
    else:
        checkpoint = request.getfixturevalue("unfolded")
        graphs = request.getfixturevalue("unfolded_graphs")
    shape = family_of(checkpoint).decoder_shape(checkpoint)
    assert shape.folds_rope == (request.param == "folded")
    return checkpoint, graphs["decoder"], shape


def test_one_graph_serves_prefill_decode_and_continuation(
    traced: tuple[Checkpoint, ir.Model, decoder.DecoderShape],
) -> None:
    checkpoint, model, shape = traced
    embeds = torch.randn(1, 14, shape.hidden, generator=torch.Generator().manual_seed(0)) * 0.3
    with torch.no_grad():
        hidden = checkpoint.model.model.text_model(inputs_embeds=embeds).last_hidden_state
        wanted = checkpoint.model.lm_head(hidden).numpy()
    cached, done, got = Cached(model, shape), 0, []
    for length in (7, 1, 1, 4, 1):  # prefill, decode, decode, continuation, decode
        place = np.arange(done, done + length)[None]
        got.append(cached.step(embeds[:, place[0]].numpy(), np.ones((1, done + length)), place))
        done += length
    error = np.abs(np.concatenate(got, axis=1) - wanted).max() / np.abs(wanted).max()
    assert error < 1e-5  # order of summation


def test_rows_of_different_length_with_right_padding(
    traced: tuple[Checkpoint, ir.Model, decoder.DecoderShape],
) -> None:
    _, model, shape = traced
    random = np.random.default_rng(0)
    embeds = random.standard_normal((2, 9, shape.hidden)) * 0.3
    mask = np.arange(9)[None] < np.array([[5], [9]])
    both = Cached(model, shape, batch=2).step(embeds, mask, np.tile(np.arange(9), (2, 1)))
    for row, length in enumerate((5, 9)):
        alone = Cached(model, shape).step(
            embeds[row : row + 1, :length], np.ones((1, length)), np.arange(length)[None]
        )
        assert np.abs(both[row, :length] - alone[0]).max() < 1e-5


def test_only_the_asked_for_logits_are_computed(exported: Exported) -> None:
    shape = exported.facts.family.decoder_shape(exported.facts.checkpoint)
    embeds = np.random.default_rng(1).standard_normal((1, 6, shape.hidden))
    runs = [
        Cached(exported.facts.graphs["decoder"], shape).step(
            embeds, np.ones((1, 6)), np.arange(6)[None], keep
        )
        for keep in (0, 1, 3)
    ]
    assert [run.shape[1] for run in runs] == [6, 1, 3]
    assert np.array_equal(runs[1], runs[0][:, -1:]) and np.array_equal(runs[2], runs[0][:, -3:])


def test_the_passes_leave_no_reshape_and_pack_every_layer(exported: Exported) -> None:
    counts = collections.Counter(node.op_type for node in exported.facts.graphs["decoder"].graph)
    assert counts["GroupQueryAttention"] == 2
    assert counts["MatMul"] == 2 * 4 + 1  # qkv, output, gate and up, down; and the head
    assert counts["SkipSimplifiedLayerNormalization"] == 4 and counts["Transpose"] == 0
    assert counts["Reshape"] == 1  # of num_logits_to_keep


def test_position_ids_are_obeyed(exported: Exported) -> None:
    shape = exported.facts.family.decoder_shape(exported.facts.checkpoint)
    embeds = np.random.default_rng(1).standard_normal((1, 6, shape.hidden))
    results = []
    for jump in (0, 3):
        cached = Cached(exported.facts.graphs["decoder"], shape)
        cached.step(embeds[:, :5], np.ones((1, 5)), np.arange(5)[None])
        results.append(cached.step(embeds[:, 5:], np.ones((1, 6)), np.array([[5 + jump]])))
    assert np.abs(results[0] - results[1]).max() > 1e-3


def test_tracing_leaves_transformers_as_it_was_also_on_an_error(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    model = exported.facts.checkpoint.model
    text, rotate = model.model.text_model, modeling_llama.apply_rotary_pos_emb
    before = text.config._attn_implementation
    seen = []

    def fail(*_: object) -> None:
        seen.append((text.config._attn_implementation, modeling_llama.apply_rotary_pos_emb is rotate))
        raise RuntimeError("tracer")

    monkeypatch.setattr(decoder, "to_onnx", fail)
    with pytest.raises(RuntimeError, match="tracer"):
        decoder.trace_decoder(
            text, model.lm_head, family_of(exported.facts.checkpoint).decoder_shape(exported.facts.checkpoint)
        )
    assert seen == [(decoder._KEY, False)]
    assert text.config._attn_implementation == before
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert decoder._KEY not in AttentionInterface() and decoder._KEY not in AttentionMaskInterface()
    assert all("forward" not in module.__dict__ for module in text.modules())


@pytest.mark.parametrize("head_dim", [4, 12, 20])
def test_head_sizes_without_a_kernel_are_refused(head_dim: int) -> None:
    shape = decoder.DecoderShape(1, 2, 1, head_dim, 2 * head_dim, 32, 64)
    with pytest.raises(CheckpointError, match=f"head_dim is {head_dim}; .* multiple of 8"):
        shape.check("student")


# --- quantization -----------------------------------------------------


def matmul_model(rows: int, columns: int) -> ir.Model:
    """One MatMul called `text.up_proj` with a random weight (rows, columns)."""
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape(["n", rows]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="g")
    node = ir.node("MatMul", [x, passes.add_initializer(graph, "w", weight)], name="text.up_proj")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["n", columns])
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("rows", "precision", "bits"),
    [(64, "int4", 4), (80, "int4", 4), (24, "int4", 32), (24, "int8", 8), (64, "fp32", 32)],
)
def test_actual_bits_are_recorded(rows: int, precision: str, bits: int) -> None:
    """80 rows are no whole number of blocks; 24 do not fill one and stay float, which must show."""
    model = matmul_model(rows, 40)
    found = quantize.quantize(model, "decoder", quantize.policy(precision))
    entry = quantize.weight_bits(found)[0]
    assert (entry.bits, entry.parameters) == (bits, rows * 40)
    twin = audit.float_twin(found)
    assert audit.same_but_rounded(model, twin, "part") <= (1.0 if bits == 4 else 0.5) + 1e-3
    x = np.random.default_rng(1).standard_normal((5, rows)).astype(np.float32)
    got, wanted = (open_model(m).run(None, {"x": x})[0] for m in (found, twin.model))
    assert np.sqrt(np.mean((got - wanted) ** 2)) < 0.02 * np.sqrt(np.mean(wanted**2))  # rounded activations


def test_the_first_matching_rule_wins() -> None:
    node = next(iter(matmul_model(64, 8).graph))
    rules = (
        quantize.Rule("decoder", "MatMul:*up_proj", "int8-dynamic"),
        quantize.Rule("*", "MatMul:*", "int4-block32"),
    )
    assert quantize.scheme_of(node, "decoder", rules) == "int8-dynamic"
    assert quantize.scheme_of(node, "decoder", rules[::-1]) == "int4-block32"
    assert quantize.scheme_of(node, "vision_encoder", rules[:1]) == "keep"
    assert quantize.scheme_of(node, "decoder", ()) == "keep"


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_policies_keep_vision_and_embeddings_at_eight_bits_or_more(
    exported: Exported, precision: str
) -> None:
    manifest = exported.manifest(precision)
    for part in manifest.parts:
        smallest = min(entry.bits for entry in part.bits)
        wanted = {"fp32": 32, "int8": 8, "int4": 4 if part.role == "decoder" else 8}[precision]
        assert smallest == wanted, part.role
        assert part.path.endswith(
            {
                32: f"{part.role.replace('decoder', 'decoder_model_merged')}.onnx",
                8: "_int8.onnx",
                4: "_q4.onnx",
            }[wanted]
        )


def test_the_head_is_rounded_to_four_bits_too(exported: Exported) -> None:
    model = ir.load(exported.bundles["int4"] / exported.manifest("int4").part("decoder").path)
    counts = collections.Counter(node.op_type for node in model.graph)
    assert counts["MatMul"] == 0 and counts["MatMulNBits"] == 9
    blocks = [node.attributes for node in model.graph if node.op_type == "MatMulNBits"]
    assert {(a["block_size"].as_int(), a["accuracy_level"].as_int()) for a in blocks} == {(32, 4)}


def test_quantizing_does_not_change_the_float_graphs(exported: Exported) -> None:
    for role in ROLES:
        model = exported.facts.graphs[role]
        before = ir.to_proto(model).SerializeToString()
        quantize.quantize(model, role, quantize.policy("int4"))
        assert ir.to_proto(model).SerializeToString() == before


def test_an_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="fp32, fp16, int8, int8-blocks, int4"):
        quantize.policy("int3")


def test_the_audit_sees_one_weight_two_steps_off(exported: Exported) -> None:
    """One element of one table: no answer of any case would change."""
    model = exported.facts.graphs["embed_tokens"]
    rounded = quantize.quantize(model, "embed_tokens", quantize.policy("int8"))
    table = next(v for v in rounded.graph.initializers.values() if str(v.name).endswith(".int8"))
    array = passes.constant(table)
    assert array is not None
    changed = array.copy()
    changed[-1, 0] = changed[-1, 0] - 2 if changed[-1, 0] > 0 else changed[-1, 0] + 2
    table.const_value = ir.tensor(changed, name=table.name)
    with pytest.raises(ParityError, match="grid steps"):
        audit.same_but_rounded(model, audit.float_twin(rounded), "embed")


def test_parts_stay_at_the_floor_of_the_device_runtime(exported: Exported) -> None:
    for precision in exported.bundles:
        for part in exported.manifest(precision).parts:
            assert part.onnx is not None and part.onnx.ir_version <= 10
            assert part.onnx.opsets["ai.onnx"] <= 20 and set(part.onnx.opsets) <= {"ai.onnx", "com.microsoft"}


def test_weights_are_stored_once_per_part(exported: Exported) -> None:
    for role in ROLES:
        model = ir.load(exported.bundles["fp32"] / exported.manifest("fp32").part(role).path)
        arrays = [
            a
            for v in model.graph.initializers.values()
            if (a := passes.constant(v)) is not None and a.size > 64
        ]
        assert len({array.tobytes() for array in arrays}) == len(arrays)


def test_no_trace_of_this_machine_in_the_parts(exported: Exported) -> None:
    for precision in exported.bundles:
        for part in exported.manifest(precision).parts:
            data = (exported.bundles[precision] / part.path).read_bytes()
            assert b"site-packages" not in data and str(Path.home()).encode() not in data

"""The vision graph's fused nodes: what was found, what they compute, and that transformers is left alone."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from export import passes, vision_passes
from tests.export.conftest import Exported


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_every_layer_has_one_attention_node_and_fused_norms(exported: Exported) -> None:
    graph = exported.facts.graphs["vision_encoder"].graph
    counts = collections.Counter(node.op_type for node in graph)
    layers = exported.facts.checkpoint.config.vision_config.num_hidden_layers
    assert counts["MultiHeadAttention"] == layers and counts["Softmax"] == 0
    assert counts["SkipLayerNormalization"] == 2 * layers and counts["LayerNormalization"] == 1
    assert counts["Gelu"] == layers
    for node in graph:
        if node.op_type == "MultiHeadAttention":  # straight into the projection, no reshape between
            assert [user.op_type for user, _ in node.outputs[0].uses()] == ["MatMul"]


def test_fused_vision_computes_what_the_checkpoint_does(exported: Exported) -> None:
    model = exported.facts.checkpoint.model
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.model.get_image_features(pixel_values=pixels[None]).pooler_output
    wanted = torch.cat([*wanted]).reshape(3, -1, wanted[0].shape[-1]).numpy()
    got = run(exported.facts.graphs["vision_encoder"], pixel_values=pixels.numpy())
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()  # order of summation


def test_the_change_to_transformers_ends_also_on_an_error(exported: Exported) -> None:
    vision = exported.facts.checkpoint.model.model.vision_model
    before = vision.config._attn_implementation
    with pytest.raises(RuntimeError, match="tracer"), vision_passes.emitted_attention(vision):
        assert vision.config._attn_implementation == vision_passes._KEY
        raise RuntimeError("tracer")
    assert vision.config._attn_implementation == before
    assert (
        vision_passes._KEY not in AttentionInterface() and vision_passes._KEY not in AttentionMaskInterface()
    )


def test_attention_with_a_mask_stays_as_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4, generator=draw) for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    got, _ = vision_passes._attention(torch.nn.Identity(), query, key, value, mask, scaling=0.5)
    scores = (0.5 * query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    assert torch.allclose(got, (scores.softmax(-1) @ value).transpose(1, 2), atol=1e-6)


def residual(shape: tuple[int | str, ...], weight: bool) -> ir.Model:
    """x + y, then a LayerNorm over 8; the sum is an output, too. `weight`: y is a constant row."""
    like = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(("n", 4, 8)), type=like)
    y = ir.Value(name="y", shape=ir.Shape(shape), type=like)
    graph = ir.Graph([x] if weight else [x, y], [], nodes=[], opset_imports={"": 20}, name="g")
    draw = np.random.default_rng(0)
    scale, bias, row = (
        passes.add_initializer(graph, name, draw.standard_normal(8).astype(np.float32))
        for name in ("scale", "bias", "row")
    )
    add = ir.node("Add", [x, row if weight else y], name="add")
    inputs, epsilon = [add.outputs[0], scale, bias], {"epsilon": 1e-6}
    norm = ir.node("LayerNormalization", inputs, attributes=epsilon, name="norm")
    for node, name in ((add, "sum"), (norm, "normed")):
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(("n", 4, 8))
        graph.append(node)
    final = ir.node("Add", [norm.outputs[0], add.outputs[0]], name="final")
    final.outputs[0].name, final.outputs[0].dtype = "out", ir.DataType.FLOAT
    final.outputs[0].shape = ir.Shape(("n", 4, 8))
    graph.append(final)
    graph.outputs.append(final.outputs[0])
    return ir.Model(graph, ir_version=10)


def test_a_residual_and_its_norm_become_one_node() -> None:
    draw = np.random.default_rng(1)
    feeds = {name: draw.standard_normal((2, 4, 8)).astype(np.float32) for name in ("x", "y")}
    model = residual(("n", 4, 8), weight=False)
    before = run(model, **feeds)
    assert vision_passes.fuse_skip_layer_norm(model) == 1
    model.opset_imports[passes.MICROSOFT] = 1
    assert [node.op_type for node in model.graph] == ["SkipLayerNormalization", "Add"]
    assert np.abs(run(model, **feeds) - before).max() < 1e-6


@pytest.mark.parametrize(("shape", "weight"), [((1, 4, 8), False), (("n", 4, 8), True)])
def test_what_is_no_residual_is_left(shape: tuple[int | str, ...], weight: bool) -> None:
    """The fused node broadcasts nothing; position embeddings are added so, and biases."""
    assert vision_passes.fuse_skip_layer_norm(residual(shape, weight)) == 0

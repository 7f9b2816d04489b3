"""Every scheme on small graphs: the numbers, the fallbacks, what is recorded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime import quantization

from export import audit, calibrate, gptq, passes, quantize, storage
from export.quantize import Rule
from export.quantize_policy import SCHEMES, Scheme
from runtime.errors import InputError

RANDOM = np.random.default_rng(0)


def chain(*weights: np.ndarray) -> ir.Model:
    """x (n, K) through MatMuls, `m0`, `m1`, ..., with a Relu between two."""
    x = ir.Value(name="x", shape=ir.Shape(["n", len(weights[0])]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="g")
    value = x
    for index, weight in enumerate(weights):
        if index:
            value = _add(graph, ir.node("Relu", [value], name=f"relu{index}"), f"r{index}")
        initializer = passes.add_initializer(graph, f"w{index}", weight.astype(np.float32))
        value = _add(graph, ir.node("MatMul", [value, initializer], name=f"m{index}"), f"y{index}")
    value.shape = ir.Shape(["n", weights[-1].shape[1]])
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def _add(graph: ir.Graph, node: ir.Node, name: str) -> ir.Value:
    graph.append(node)
    node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
    return node.outputs[0]


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def rounded(model: ir.Model, scheme: Scheme, pattern: str = "MatMul:*") -> ir.Model:
    return quantize.quantize(model, "decoder", (Rule("decoder", pattern, scheme),))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "block" in s and "gptq" not in s])
@pytest.mark.parametrize("rows", [128, 150])
def test_blocks(scheme: Scheme, rows: int) -> None:
    """150 rows are no whole number of blocks: the kernel pads."""
    model = chain(RANDOM.standard_normal((rows, 48)))
    found = rounded(model, scheme)
    bits, size = int(scheme[3]), int(scheme.removesuffix("-gptq").rpartition("block")[2])
    (entry, scales) = quantize.weight_bits(found)
    assert (entry.bits, entry.parameters, entry.scheme) == (bits, rows * 48, scheme)
    assert scales.parameters == 48 * -(-rows // size) and quantize.fallbacks(found) == ()
    twin = audit.float_twin(found)
    assert audit.same_but_rounded(model, twin, "part") <= 1.001
    x = RANDOM.standard_normal((5, rows)).astype(np.float32)
    assert relative(run(found, x), run(twin.model, x)) < 0.02  # activations rounded to int8 in blocks
    assert relative(run(twin.model, x), run(model, x)) < (0.25 if bits == 4 else 0.02)
    assert quantize.suffix(found) == ("_q4" if bits == 4 else "_int8")


@pytest.mark.parametrize(
    ("rows", "asked", "got"),
    [
        (100, "int4-block128", "int4-block64"),
        (40, "int8-block128", "int8-block32"),
        (24, "int4-block32", "keep"),
    ],
)
def test_a_shape_that_a_scheme_does_not_allow_is_recorded(rows: int, asked: Scheme, got: Scheme) -> None:
    model = chain(RANDOM.standard_normal((rows, 8)))
    found = rounded(model, asked)
    (fallback,) = quantize.fallbacks(found)
    assert (fallback.node, fallback.asked, fallback.got) == ("m0", asked, got)
    assert f"{rows} rows do not fill a block" in fallback.reason
    wanted = "float32" if got == "keep" else got
    assert quantize.weight_bits(found)[0].scheme == wanted
    node = next(iter(model.graph))
    assert quantize.scheme_of(node, "decoder", (Rule("*", "*", asked),)) == got
    again = ir.from_proto(ir.to_proto(found))
    assert quantize.fallbacks(again) == (fallback,)  # it is in the file


def test_calibrated_schemes_need_a_calibration() -> None:
    model = chain(RANDOM.standard_normal((64, 8)))
    with pytest.raises(InputError, match="int4-block32-gptq: needs a calibration"):
        rounded(model, "int4-block32-gptq")
    vision = quantize.quantize(model, "vision_encoder", (Rule("*", "*", "int4-block32-gptq"),))
    assert quantize.fallbacks(vision)[0].reason == "only the decoder is calibrated"
    assert quantize.weight_bits(vision)[0].scheme == "int4-block32"


def test_dynamic_int8_is_what_onnxruntimes_quantizer_writes(tmp_path: Path) -> None:
    """Its numbers to the last bit, a column of zeros among them, and its answers."""
    weight = RANDOM.standard_normal((70, 48))
    weight[:, 5] = 0
    model = chain(weight, RANDOM.standard_normal((48, 8)))
    ir.save(model, tmp_path / "in.onnx")
    quantization.quantize_dynamic(
        tmp_path / "in.onnx", tmp_path / "out.onnx", op_types_to_quantize=["MatMul"], per_channel=True,
        weight_type=quantization.QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    theirs, ours = ir.load(tmp_path / "out.onnx"), rounded(model, "int8-dynamic")
    assert set(theirs.graph.initializers) == set(ours.graph.initializers)
    for name, value in theirs.graph.initializers.items():
        wanted, got = passes.constant(value), passes.constant(ours.graph.initializers[name])
        assert wanted is not None and got is not None
        assert got.dtype == wanted.dtype and np.array_equal(got, wanted)
    x = RANDOM.standard_normal((5, 70)).astype(np.float32)
    assert np.array_equal(run(ours, x), run(theirs, x))


def test_matmuls_of_one_input_round_it_once() -> None:
    model = chain(RANDOM.standard_normal((64, 8)))
    graph = model.graph
    other = passes.add_initializer(graph, "other", RANDOM.standard_normal((64, 4)).astype(np.float32))
    graph.outputs.append(_add(graph, ir.node("MatMul", [graph.inputs[0], other], name="second"), "z"))
    kinds = [node.op_type for node in rounded(model, "int8-dynamic").graph]
    assert (kinds.count("DynamicQuantizeLinear"), kinds.count("MatMulInteger")) == (1, 2)


def test_a_quantizer_of_onnxruntime_leaves_the_logs_alone() -> None:
    """Importing it sets the root logger to print every remark of every library, with its stack."""
    code = (
        "import logging; from tests.export import test_quantize as t\n"
        "t.rounded(t.chain(t.RANDOM.standard_normal((64, 8))), 'int4-block32')\n"
        "assert not logging.root.handlers and logging.root.level == logging.WARNING"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-block32", "int8-block64"])
def test_a_model_that_no_single_file_holds(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(RANDOM.standard_normal((64, 64)), RANDOM.standard_normal((64, 64)))
    wanted = rounded(model, scheme)
    monkeypatch.setattr(storage, "LIMIT_BYTES", 20_000)
    x = RANDOM.standard_normal((3, 64)).astype(np.float32)
    assert np.array_equal(run(rounded(model, scheme), x), run(wanted, x))


# --- float16 ----------------------------------------------------------


def test_float16_has_casts_only_at_the_borders() -> None:
    model = chain(RANDOM.standard_normal((32, 32)), RANDOM.standard_normal((32, 8)))
    found = rounded(model, "fp16", "*")
    casts = [node for node in found.graph if node.op_type == "Cast"]
    assert len(casts) == 2
    assert [value.dtype for value in (*found.graph.inputs, *found.graph.outputs)] == [ir.DataType.FLOAT] * 2
    assert [entry.bits for entry in quantize.weight_bits(found)] == [16]
    assert quantize.suffix(found) == "_fp16"
    x = RANDOM.standard_normal((3, 32)).astype(np.float32)
    assert 0 < relative(run(found, x), run(model, x)) < 2e-3
    twin = audit.float_twin(found)
    assert audit.same_but_rounded(model, twin, "part") <= 0.501
    assert len(list(twin.model.graph)) == len(list(model.graph))


def test_a_scalar_stays_one_in_the_twin_of_float16() -> None:
    model = chain(RANDOM.standard_normal((32, 8)))
    factor = passes.add_initializer(model.graph, "factor", np.array(0.5, np.float32))
    last = model.graph.outputs[0]
    model.graph.outputs[0] = _add(model.graph, ir.node("Mul", [last, factor], name="half"), "z")
    model.graph.outputs[0].shape = last.shape
    assert audit.same_but_rounded(model, audit.float_twin(rounded(model, "fp16", "*")), "part") <= 0.501


def test_float16_of_one_node_leaves_the_others() -> None:
    model = chain(RANDOM.standard_normal((32, 32)), RANDOM.standard_normal((32, 8)))
    found = rounded(model, "fp16", "MatMul:m1")
    assert {entry.bits: entry.parameters for entry in quantize.weight_bits(found)} == {16: 256, 32: 1024}
    assert audit.same_but_rounded(model, audit.float_twin(found), "part") <= 0.501
    x = RANDOM.standard_normal((3, 32)).astype(np.float32)
    assert relative(run(found, x), run(model, x)) < 2e-3


@pytest.mark.parametrize(("scheme", "bits"), [("int4-block32", 4), ("int8-block64", 8)])
def test_blocks_between_float16_nodes_are_float16_with_their_scales(scheme: Scheme, bits: int) -> None:
    model = chain(*(RANDOM.standard_normal((64, 64)) for _ in range(3)))
    rules = (Rule("*", "MatMul:m1", scheme), Rule("*", "*", "fp16"))
    found = quantize.quantize(model, "decoder", rules)
    assert {entry.bits for entry in quantize.weight_bits(found)} == {bits, 16}
    assert len([node for node in found.graph if node.op_type == "Cast"]) == 2  # at the borders
    assert quantize.suffix(found) == ("_q4f16" if bits == 4 else "_int8")
    twin = audit.float_twin(found)
    assert audit.same_but_rounded(model, twin, "part") <= 1.07
    x = RANDOM.standard_normal((5, 64)).astype(np.float32)
    assert relative(run(found, x), run(twin.model, x)) < 0.02


def test_a_weight_that_float16_cannot_hold_stays(capsys: pytest.CaptureFixture[str]) -> None:
    model = chain(np.full((4, 4), 1e6), RANDOM.standard_normal((4, 4)))
    found = rounded(model, "fp16", "*")
    assert [each.node for each in quantize.fallbacks(found)] == ["m0"]
    assert "larger than 65504" in quantize.fallbacks(found)[0].reason
    assert audit.same_but_rounded(model, audit.float_twin(found), "part") <= 0.501


# --- GPTQ -------------------------------------------------------------


def correlated(rows: int, width: int, seed: int) -> np.ndarray:
    """Inputs in a few directions, as activations are."""
    mixing = np.random.default_rng(7).standard_normal((width // 8, width))
    random = np.random.default_rng(seed)
    noise = 0.1 * random.standard_normal((rows, width))
    return (random.standard_normal((rows, width // 8)) @ mixing + noise).astype(np.float32)


def test_nearest_is_what_onnxruntime_rounds_to() -> None:
    weight = RANDOM.standard_normal((96, 40)).astype(np.float32)
    twin = audit.float_twin(rounded(chain(weight), "int4-block32"))
    (stored,) = [passes.constant(v) for v in twin.model.graph.initializers.values() if v.uses()]
    ours = gptq.dequantized(*gptq.nearest(weight, 32), 96)
    differing = (ours != stored).mean()
    assert differing < 0.002  # halves may go either way
    assert np.abs(ours - stored).max() <= np.abs(stored).max()


@pytest.mark.parametrize("width", [64, 100, 160])
def test_calibrated_blocks_lose_less_on_inputs_they_have_not_seen(width: int) -> None:
    weight = RANDOM.standard_normal((width, 24)).astype(np.float32)
    seen, unseen = correlated(400, width, 1), correlated(64, width, 2)
    found = gptq.better(weight, seen.T @ seen, unseen, 32)
    assert found.calibrated and found.grid.max() <= 15
    assert found.error < 0.5 * found.nearest_error
    assert found.error == pytest.approx(gptq.output_error(weight, found.weight, unseen))


def test_where_calibration_gains_nothing_nearest_stays() -> None:
    """Fitted to inputs that have nothing to do with those it is judged by."""
    weight = RANDOM.standard_normal((64, 24)).astype(np.float32)
    seen = np.zeros((50, 64), np.float32)
    seen[:, :2] = RANDOM.standard_normal((50, 2))
    seen[:, 1] = seen[:, 0]
    unseen = np.zeros((50, 64), np.float32)
    unseen[:, 2:] = RANDOM.standard_normal((50, 62))
    found = gptq.better(weight, seen.T @ seen, unseen, 32)
    grid, scale = gptq.nearest(weight, 32)
    assert not found.calibrated
    assert np.array_equal(found.grid, grid) and np.array_equal(found.scale, scale)


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    weight = RANDOM.standard_normal((64, 8)).astype(np.float32)
    seen = correlated(200, 64, 1)
    seen[:, 10:20] = 0
    grid, scale = gptq.calibrated(weight, seen.T @ seen, 32)
    assert (
        np.isfinite(scale).all() and gptq.output_error(weight, gptq.dequantized(grid, scale, 64), seen) < 0.05
    )
    gptq.calibrated(np.zeros((64, 8), np.float32), np.zeros((64, 64), np.float32), 32)


def test_written_blocks_are_the_kernels() -> None:
    weight = RANDOM.standard_normal((100, 24)).astype(np.float32)
    seen = correlated(300, 100, 1)
    found = gptq.better(weight, seen.T @ seen, correlated(50, 100, 2), 32)
    model = chain(weight)
    gptq.write(model, {"m0": found})
    entry = quantize.weight_bits(model)[0]
    assert (entry.bits, entry.scheme, entry.parameters) == (4, "int4-block32-gptq", 2400)
    x = correlated(5, 100, 3)
    assert relative(run(model, x), x @ found.weight) < 0.02  # activations rounded to int8


# --- cache ------------------------------------------------------------


def test_a_keys_scale_holds_at_every_position() -> None:
    """RoPE turns channels i and i + D/2 into each other; values are not turned."""
    keys = RANDOM.standard_normal((1, 2, 5, 8)).astype(np.float32)
    largest = calibrate._largest(keys, paired=True)
    for angle in np.linspace(0, 2 * np.pi, 64):
        low, high = np.split(keys, 2, axis=-1)
        turned = np.concatenate(
            [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], axis=-1
        )
        assert (np.abs(turned).max(axis=(0, 2)) <= largest + 1e-5).all()
    assert np.array_equal(calibrate._largest(keys, paired=False), np.abs(keys).max(axis=(0, 2)))


def test_a_calibration_needs_prompts_to_fit_and_to_judge() -> None:
    with pytest.raises(InputError, match="got 1 prompts, wanted at least 2"):
        calibrate.Calibration(chain(np.ones((4, 4))), [{}])

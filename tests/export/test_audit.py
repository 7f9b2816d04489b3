"""The audit of calibrated, float16 and cached schemes: what it takes, and each damage that it must see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export import audit, onnx, passes, quantize
from export.calibrate import Calibration
from export.quantize_policy import named
from runtime.errors import ParityError
from tests.export.conftest import Exported


@pytest.fixture(scope="module")
def calibration(exported: Exported) -> Calibration:
    return onnx.calibration_of(exported.facts, exported.scratch)


def decoder(exported: Exported, precision: str, calibration: Calibration | None = None) -> ir.Model:
    return quantize.quantize(exported.facts.graphs["decoder"], "decoder", named(precision).rules, calibration)


def judge(exported: Exported, model: ir.Model, calibration: Calibration | None) -> float:
    original = exported.facts.graphs["decoder"]
    return audit.same_but_rounded(original, audit.float_twin(model), "decoder", calibration)


SCHEMES = [
    "fp16",
    "int4-fp16",
    "int4-gptq-fp16",
    "int8-blocks-fp16-kv8",
    "fp16-kv8",
    "fp32-kv8",
    "int4-gptq",
    "int4-b64-gptq-kv8",
    "int8-blocks-b64",
    "int4-b128",
]


@pytest.mark.parametrize("precision", SCHEMES)
def test_every_scheme_passes(exported: Exported, calibration: Calibration, precision: str) -> None:
    model = decoder(exported, precision, calibration)
    assert judge(exported, model, calibration) <= 1.07  # 8 bits with float16 scales
    again = ir.from_proto(ir.to_proto(model))
    assert judge(exported, again, calibration) <= 1.07  # as a file has it


@pytest.mark.parametrize("precision", ["int4-gptq", "fp32-kv8"])
def test_what_is_calibrated_is_not_taken_on_trust(
    exported: Exported, calibration: Calibration, precision: str
) -> None:
    with pytest.raises(ParityError, match="no calibration"):
        judge(exported, decoder(exported, precision, calibration), None)


def weights(model: ir.Model, ending: str) -> ir.Value:
    return next(v for name, v in model.graph.initializers.items() if name.endswith(ending))


def change(value: ir.Value, how: Callable[[np.ndarray], np.ndarray]) -> None:
    array = passes.constant(value)
    assert array is not None
    value.const_value = ir.tensor(how(array.copy()).astype(array.dtype), name=value.name)


def first(step: float) -> Callable[[np.ndarray], np.ndarray]:
    def moved(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] += step
        return array

    return moved


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "GroupQueryAttention")


def swap_scales(model: ir.Model) -> None:
    node = attention(model)
    key, value = node.inputs[12], node.inputs[13]
    node.replace_input_with(12, value)
    node.replace_input_with(13, key)


def narrow_cache(model: ir.Model) -> None:
    attention(model).attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 4)


DAMAGES = [
    ("fp16", lambda m: change(weights(m, "norm.weight.half"), first(0.01)), "grid steps"),
    ("fp16", lambda m: change(weights(m, "head.weight.half"), first(0.5)), "grid steps"),
    ("fp32-kv8", lambda m: change(weights(m, ".key.scale"), lambda a: 2 * a), "scales of present"),
    ("fp32-kv8", swap_scales, "scales of present"),
    ("fp32-kv8", narrow_cache, "quantized as"),
    ("int4-gptq", lambda m: change(weights(m, ".blocks"), lambda a: a ^ 1), "not hold the blocks"),
    ("int4-gptq", lambda m: change(weights(m, ".scales"), lambda a: 1.01 * a), "not hold the blocks"),
    ("int8-blocks-b64", lambda m: change(weights(m, "_Q8"), lambda a: a + 3), "grid steps"),
    ("int4-b128", lambda m: change(weights(m, "_scales"), lambda a: 1.5 * a), "grid steps"),
]


@pytest.mark.parametrize(("precision", "damage", "said"), DAMAGES)
def test_damage_is_seen(
    exported: Exported,
    calibration: Calibration,
    precision: str,
    damage: Callable[[ir.Model], None],
    said: str,
) -> None:
    model = decoder(exported, precision, calibration)
    damage(model)
    with pytest.raises(ParityError, match=said):
        judge(exported, model, calibration)


def test_calibrated_blocks_of_another_weight_are_seen(exported: Exported, calibration: Calibration) -> None:
    """Bit for bit what the calibration gave, but for a weight that has changed since."""
    model = decoder(exported, "int4-gptq", calibration)
    original = ir.from_proto(ir.to_proto(exported.facts.graphs["decoder"]))
    change(weights(original, "down_proj.weight"), lambda a: a[::-1])
    with pytest.raises(ParityError, match=r"loses .* of its output, rounding to nearest"):
        audit.same_but_rounded(original, audit.float_twin(model), "decoder", calibration)


@pytest.mark.parametrize("precision", ["fp16", "int4-fp16", "int4-b64-gptq-kv8"])
def test_a_whole_bundle_passes_the_gate(exported: Exported, tmp_path: Path, precision: str) -> None:
    (tmp_path / "b").mkdir()
    onnx.build(exported.facts, tmp_path / "b", precision, "tiny", tmp_path)
    from runtime import bundle, conformance, open_bundle

    manifest = bundle.read(tmp_path / "b")
    part = manifest.part("decoder")
    assert manifest.precision == precision and part.onnx is not None
    cached = precision.endswith("kv8")
    assert part.onnx.min_onnxruntime == ("1.27" if cached else "1.23")
    assert {state.dtype for state in manifest.state} == {"int8" if cached else "float16"}
    with open_bundle(tmp_path / "b", threads=1) as session:
        assert conformance.check(session, tmp_path / "b") == []


@pytest.mark.parametrize("precision", ["fp16", "fp16-kv8", "int4-gptq-fp16"])
def test_quantizing_and_the_audit_leave_both_graphs_alone(
    exported: Exported, calibration: Calibration, precision: str
) -> None:
    original = exported.facts.graphs["decoder"]
    model = decoder(exported, precision, calibration)
    before = [ir.to_proto(each).SerializeToString() for each in (original, model)]
    decoder(exported, precision, calibration)
    audit.float_twin(model)
    assert [ir.to_proto(each).SerializeToString() for each in (original, model)] == before

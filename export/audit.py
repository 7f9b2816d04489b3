"""Proof that a quantized part is the float32 part with rounded weights, and nothing else.

In: the float32 model and the quantized one's float twin (`twin.py`). Out: the largest weight error, or a
ParityError. Not here: running anything.

What was calibrated is no nearest rounding: such blocks must be bit for bit what the calibration gives, and
lose less than rounding to nearest on inputs that they were not fitted to, counted here anew. The scales of
an int8 cache must be the calibration's.

Judging a quantized graph by its answers alone cannot work: on some weights correct int4 is far from
float32, on others a wrong wire moves little. So structure and weights are checked exactly here, and what
remains (rounded activations, the kernels) is a small difference between the quantized part and its twin.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export import gptq
from export.calibrate import Calibration
from export.passes import constant
from export.twin import ROUNDING, Steps, Twin, float_twin, twin_manifest
from runtime.errors import ParityError

__all__ = ["ROUNDING", "Steps", "Twin", "float_twin", "same_but_rounded", "twin_manifest"]


_FLOAT32 = 2.0**-23
"""Relative error of float32 in a product of level and scale, and in what it is compared with."""


def same_but_rounded(
    original: ir.Model, twin: Twin, where: str, calibration: Calibration | None = None
) -> float:
    """Walk both graphs in step from their outputs. Returns the largest weight error, in grid steps.

    Calibrated weights, which `calibration` answers for, do not count there. Raises ParityError at the first
    node, wire, attribute or weight that differs by more than rounding.
    """
    _check_caches(twin, where, calibration)
    pairs = list(zip(original.graph.outputs, twin.model.graph.outputs, strict=False))
    names = [[value.name for value in m.graph.outputs] for m in (original, twin.model)]
    inputs = [[value.name for value in m.graph.inputs] for m in (original, twin.model)]
    if names[0] != names[1] or inputs[0] != inputs[1]:
        raise ParityError(
            f"{where}: inputs or outputs differ from the float32 part: {inputs[1]} -> {names[1]}"
        )
    seen: set[tuple[int, int]] = set()
    worst = 0.0
    while pairs:
        left, right = pairs.pop()
        if (id(left), id(right)) in seen:
            continue
        seen.add((id(left), id(right)))
        if (array := constant(left)) is not None:
            worst = max(worst, _weight_error(left, array, right, twin, where, calibration))
            continue
        first, second = left.producer(), right.producer()
        if first is None or second is None:
            if first is not second or left.name != right.name:
                raise ParityError(f"{where}: {right.name} stands where the float32 part has {left.name}")
            continue
        _same_node(first, second, left.index(), right.index(), where)
        for one, other in zip(first.inputs, second.inputs, strict=True):
            if (one is None) != (other is None):
                raise ParityError(f"{where}: {second.name} has other optional inputs than {first.name}")
            if one is not None and other is not None:
                pairs.append((one, other))
        for inner, twin_inner in zip(_branches(first), _branches(second), strict=True):
            pairs += zip(inner.outputs, twin_inner.outputs, strict=True)
    return worst


def _branches(node: ir.Node) -> list[ir.Graph]:
    """Graphs inside a node, by attribute name; they read the outer graph's values."""
    found = sorted(node.attributes.items())
    return [value.as_graph() for _, value in found if value.type == ir.AttributeType.GRAPH]


def _same_node(first: ir.Node, second: ir.Node, out: int | None, other_out: int | None, where: str) -> None:
    def shape(node: ir.Node) -> tuple[object, ...]:
        attributes = {
            key: f"graph of {len(value.as_graph().outputs)}"
            if value.type == ir.AttributeType.GRAPH
            else repr(value.value)
            for key, value in node.attributes.items()
            if value.value is not None
        }
        return node.domain, node.op_type, sorted(attributes.items())

    trimmed = [_trim(list(node.inputs)) for node in (first, second)]
    if shape(first) != shape(second) or out != other_out or len(trimmed[0]) != len(trimmed[1]):
        raise ParityError(
            f"{where}: {second.op_type} {second.name} stands where the float32 part has "
            f"{first.op_type} {first.name}"
        )


def _trim(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _check_caches(twin: Twin, where: str, calibration: Calibration | None) -> None:
    for name, scale in twin.caches.items():
        if calibration is None:
            raise ParityError(
                f"{where}: {name} is int8, and there is no calibration to hold its scales against"
            )
        if not np.array_equal(scale, calibration.scales[name]):
            raise ParityError(f"{where}: the scales of {name} are not those that calibration gives")


def _check_calibrated(
    left: ir.Value, array: np.ndarray, other: np.ndarray, made: tuple[str, int], where: str,
    calibration: Calibration | None,
) -> None:  # fmt: skip
    """Blocks are those that calibration gives, and lose less than nearest rounding on held-out inputs."""
    if calibration is None:
        raise ParityError(
            f"{where}: weight {left.name} is calibrated, and there is no calibration to hold it to"
        )
    node, size = made
    wanted = calibration.rounded(node, size)
    if not np.array_equal(other, wanted.weight):
        raise ParityError(f"{where}: weight {left.name} does not hold the blocks that calibration gives")
    plain = gptq.dequantized(*gptq.nearest(array, size), len(array))
    lost, rival = (gptq.output_error(array, each, wanted.probe) for each in (other, plain))
    if not lost <= rival * (1 + 1e-6):
        raise ParityError(
            f"{where}: weight {left.name} loses {lost:.3g} of its output, rounding to nearest {rival:.3g}"
        )


def _weight_error(
    left: ir.Value, array: np.ndarray, right: ir.Value, twin: Twin, where: str,
    calibration: Calibration | None,
) -> float:  # fmt: skip
    other = constant(right)
    if other is None or other.shape != array.shape:
        raise ParityError(f"{where}: weight {left.name} is missing or has another shape")
    if (made := twin.calibrated.get(str(right.name))) is not None:
        _check_calibrated(left, array, other, made, where, calibration)
        return 0.0
    if str(right.name) not in twin.steps:
        if not np.array_equal(array, other):
            raise ParityError(f"{where}: weight {left.name} differs, though no rule rounds it")
        return 0.0
    make_step, allowed = twin.steps[str(right.name)]
    step = make_step()
    error = np.asarray(np.subtract(array, other))
    np.abs(error, out=error)
    error -= np.abs(array) * _FLOAT32  # a bias has millions of steps: float32 itself is off by some
    np.divide(error, step, out=error, where=step > 0)  # a block of zeros has no step
    worst = float(error.max())
    if not worst <= allowed:
        place = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
        raise ParityError(
            f"{where}: weight {left.name}{list(place)} is {worst:.3g} grid steps from the float32 weight, "
            f"rounding gives at most {allowed:.3g}; the part does not hold the checkpoint's weights"
        )
    return worst

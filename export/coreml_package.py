"""What a saved `.mlpackage` holds: tensors of its functions, weights and how they are stored.

In: a package directory. Out: plain facts, read from the files by the runtime's own reader, not remembered
from what was meant to be written. Not here: conversion, running. No coremltools.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime import mil_program
from runtime.contract import TensorSpec
from runtime.manifest import WeightBits
from runtime.mil_program import Blob, Function, Operation, Ref, TensorType

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
_FLOATS = {"float16": "fp16", "float32": "fp32"}
_PACKED = {"constexpr_blockwise_shift_scale": "data", "constexpr_lut_to_dense": "indices"}
_ENDINGS = ("_to_fp16", "_weight")
_ADDED = ("_quantized", "_palettized")
_CHANGING = "tokens"
"""The name of a dimension that functions of one part differ in."""


@dataclass(frozen=True)
class Weight:
    """A constant of the weight file. `name`: as coremltools calls it before compression. `label`:
    `OPERATION:place`, as rules match it. `values`: what is stored; `scheme` and `bits` say how."""

    name: str
    label: str
    values: Blob
    scheme: str
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size or 0 for size in self.values.type.shape)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def functions(package: Path) -> Mapping[str, Function]:
    """Functions by name. Raises WireError when the file is no ML program."""
    return mil_program.parse((package / MODEL).read_bytes()).functions


def weights(function: Function) -> list[Weight]:
    """Weights of numbers in the order of the program; indices and masks of integers are none."""
    readers: dict[str, str] = {}
    for operation in function.operations:
        for given in operation.inputs.values():
            for each in given:
                if isinstance(each, Ref):
                    readers.setdefault(each.name, operation.type)
    found = []
    for operation in function.operations:
        reader = readers.get(operation.outputs[0][0], "none") if operation.outputs else "none"
        if (weight := weight_of(operation, reader)) is not None:
            found.append(weight)
    return found


def weight_of(operation: Operation, reader: str = "none") -> Weight | None:
    """The weight that an operation holds, if it does. `reader`: the type of what takes it."""
    if operation.type == "const":
        values = operation.attributes.get("val")
        if not isinstance(values, Blob) or values.type.dtype not in _FLOATS:
            return None
        scheme, bits = _FLOATS[values.type.dtype], 8 * values.type.numpy.itemsize
    elif operation.type in _PACKED:
        given = operation.inputs[_PACKED[operation.type]][0]
        if not isinstance(given, Blob):
            return None
        values = given
        bits = mil_program.SUB_BYTE_BITS.get(values.type.dtype) or 8 * values.type.numpy.itemsize
        scheme = f"{'pal' if operation.type.endswith('lut_to_dense') else 'int'}{bits}"
    else:
        return None
    name = operation.name
    for added in _ADDED:
        name = name.removesuffix(added)
    return Weight(name, f"{reader}:{_place(name)}", values, scheme, bits)


def _place(name: str) -> str:
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name


def stored(found: Sequence[Function]) -> tuple[WeightBits, ...]:
    """Parameters by bits and scheme; what functions share counts once."""
    seen: dict[tuple[str, int], Weight] = {}
    for function in found:
        for weight in weights(function):
            seen.setdefault((weight.values.file, weight.values.offset), weight)
    counts = Counter[tuple[int, str]]()
    for weight in seen.values():
        counts[weight.bits, weight.scheme] += weight.parameters
    return tuple(
        WeightBits(bits=bits, parameters=count, scheme=scheme)
        for (bits, scheme), count in sorted(counts.items(), reverse=True)
    )


def tensors(found: Sequence[Function]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a part whose functions differ in the number of tokens alone; states apart."""
    inputs = [{n: t for n, t in function.inputs.items() if not t.is_state} for function in found]
    return _merged(inputs), _merged([_outputs(function) for function in found])


def states(function: Function) -> dict[str, TensorType]:
    """The states of a function by name."""
    return {name: kind for name, kind in function.inputs.items() if kind.is_state}


def _outputs(function: Function) -> dict[str, TensorType]:
    known = {name: kind for operation in function.operations for name, kind in operation.outputs}
    return {name: known[name] for name in function.outputs}


def _merged(found: Sequence[Mapping[str, TensorType]]) -> tuple[TensorSpec, ...]:
    specs = []
    for name, kind in found[0].items():
        axes = zip(*(each[name].shape for each in found), strict=True)
        shape = tuple(int(sizes[0] or 0) if len(set(sizes)) == 1 else _CHANGING for sizes in axes)
        specs.append(TensorSpec(name=name, dtype=kind.dtype, shape=shape))  # type: ignore[arg-type]
    return tuple(specs)

"""An ML program as data: functions, operations, types, constants; read from `model.mlmodel`.

In: the bytes of a Core ML model. Out: a `Model`. Not here: weights (`runtime/mil_weights.py`), evaluating
(`runtime/mil.py`). Field numbers are those of coremltools' `Model.proto` and `MIL.proto`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.mil_wire import WireError, fields, floats, number, text, varints, view

Array = NDArray[Any]

DTYPES = {
    1: "bool",
    2: "string",
    10: "float16",
    11: "float32",
    12: "float64",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
"""MIL.proto's DataType, as far as values of it can be held here."""

SUB_BYTE_BITS = {"int4": 4, "uint4": 4, "uint2": 2, "uint1": 1, "uint6": 6, "uint3": 3}
"""Types that are stored packed; one value takes a whole int8 or uint8 here."""

_MAX_DEPTH = 32  # of types inside of each other


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; a dimension that is not known before the run is None."""

    dtype: str
    shape: tuple[int | None, ...]
    is_state: bool = False

    @property
    def numpy(self) -> np.dtype[Any]:
        """What holds one value."""
        if self.dtype in SUB_BYTE_BITS:
            return np.dtype("int8" if self.dtype == "int4" else "uint8")
        if self.dtype not in DTYPES.values() or self.dtype == "string":
            raise WireError(f"values of {self.dtype} are not read")
        return np.dtype(self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Blob:
    """A constant in the weight file: its name there, the place of its record, its type."""

    file: str
    offset: int
    type: TensorType


@dataclass(frozen=True)
class Ref:
    """The name of another operation's output or of an input."""

    name: str


Constant = Array | str | Blob
Argument = Ref | Constant


@dataclass(frozen=True)
class Operation:
    """One step: `inputs` by parameter (several values for a list), `outputs` with their declared types."""

    type: str
    name: str
    inputs: dict[str, tuple[Argument, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    attributes: dict[str, Constant]
    blocks: int = 0


@dataclass(frozen=True)
class Function:
    """`inputs` holds the states as well, marked as such."""

    name: str
    opset: str
    inputs: dict[str, TensorType]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass
class Model:
    """`default`: the function that a caller gets who names none."""

    specification: int = 0
    functions: dict[str, Function] = field(default_factory=dict)
    default: str = "main"


def parse(data: bytes) -> Model:
    """Raises WireError when the bytes are no ML program."""
    model, program = Model(), None
    for tag, value in fields(memoryview(data)):
        if tag == 1:
            model.specification = number(value)
        elif tag == 2:
            model.default = next((text(v) for n, v in fields(view(value)) if n == 21), "main")
        elif tag == 502:
            program = view(value)
    if program is None:
        raise WireError("holds no ML program (neural networks and pipelines are not read)")
    for tag, value in fields(program):
        if tag == 2:
            name, body = _entry(view(value))
            model.functions[name] = _function(name, body)
    if not model.functions:
        raise WireError("the ML program has no function")
    if model.default not in model.functions:
        model.default = next(iter(model.functions))
    return model


def _entry(data: memoryview) -> tuple[str, memoryview]:
    """Key and value of one entry of a map."""
    key, found = "", memoryview(b"")
    for tag, value in fields(data):
        if tag == 1:
            key = text(value)
        elif tag == 2:
            found = view(value)
    return key, found


def _function(name: str, data: memoryview) -> Function:
    inputs, opset, blocks = {}, "", {}
    for tag, value in fields(data):
        if tag == 1:
            key, kind = _named_type(view(value))
            inputs[key] = kind
        elif tag == 2:
            opset = text(value)
        elif tag == 3:
            key, block = _entry(view(value))
            blocks[key] = block
    if opset not in blocks:
        raise WireError(f"function {name}: has no block for its opset {opset!r}")
    operations, outputs = [], []
    for tag, value in fields(blocks[opset]):
        if tag == 2:
            outputs.append(text(value))
        elif tag == 3:
            operations.append(_operation(view(value)))
    return Function(name, opset, inputs, tuple(operations), tuple(outputs))


def _operation(data: memoryview) -> Operation:
    kind, blocks = "", 0
    inputs: dict[str, tuple[Argument, ...]] = {}
    outputs, attributes = [], {}
    for tag, value in fields(data):
        if tag == 1:
            kind = text(value)
        elif tag == 2:
            key, body = _entry(view(value))
            inputs[key] = tuple(_binding(view(v)) for n, v in fields(body) if n == 1)
        elif tag == 3:
            outputs.append(_named_type(view(value)))
        elif tag == 4:
            blocks += 1
        elif tag == 5:
            key, body = _entry(view(value))
            attributes[key] = _value(body)
    given = attributes.pop("name", None)
    name = given if isinstance(given, str) else (outputs[0][0] if outputs else "")
    return Operation(kind, name, inputs, tuple(outputs), attributes, blocks)


def _binding(data: memoryview) -> Argument:
    for tag, value in fields(data):
        if tag == 1:
            return Ref(text(value))
        if tag == 2:
            return _value(view(value))
    raise WireError("an argument is empty")


def _named_type(data: memoryview) -> tuple[str, TensorType]:
    name, kind = "", None
    for tag, value in fields(data):
        if tag == 1:
            name = text(value)
        elif tag == 2:
            kind = _type(view(value))
    if kind is None:
        raise WireError(f"{name!r} has no type")
    return name, kind


def _type(data: memoryview, depth: int = 0) -> TensorType:
    for tag, value in fields(data):
        if tag == 1:
            return _tensor_type(view(value))
        if tag == 5 and depth < _MAX_DEPTH:
            wrapped = next((v for n, v in fields(view(value)) if n == 1), b"")
            inner = _type(view(memoryview(wrapped) if isinstance(wrapped, bytes) else wrapped), depth + 1)
            return TensorType(inner.dtype, inner.shape, is_state=True)
        # lists, tuples and dictionaries: no operation here takes one
        return TensorType("other", ())
    raise WireError("a type is empty")


def _tensor_type(data: memoryview) -> TensorType:
    dtype, shape = "other", []
    for tag, value in fields(data):
        if tag == 1:
            dtype = DTYPES.get(number(value), f"type {number(value)}")
        elif tag == 3:
            shape.append(_dimension(view(value)))
    return TensorType(dtype, tuple(shape))


def _dimension(data: memoryview) -> int | None:
    for tag, value in fields(data):
        if tag == 1:
            return next((number(v) for n, v in fields(view(value)) if n == 1), 0)
    return None


def _value(data: memoryview) -> Constant:
    kind, immediate, blob = None, None, None
    for tag, value in fields(data):
        if tag == 2:
            kind = _type(view(value))
        elif tag == 3:
            immediate = view(value)
        elif tag == 5:
            blob = view(value)
    if kind is None:
        raise WireError("a value has no type")
    if blob is not None:
        found = dict(fields(blob))
        return Blob(text(found.get(1, memoryview(b""))), number(found.get(2, 0)), kind)
    if immediate is None:
        raise WireError("a value is empty")
    for tag, value in fields(immediate):
        if tag == 1:
            return _tensor(view(value), kind)
    return np.zeros(0, np.uint8)  # a list or dictionary: only attributes that no operation here reads


def _tensor(data: memoryview, kind: TensorType) -> Constant:
    """An immediate tensor; one without elements has no field of values."""
    for tag, packed in fields(data):
        found: list[Any] = []
        for inner, value in fields(view(packed)):
            if inner != 1:
                continue
            if tag in (1, 6):
                found += floats(value, 4 if tag == 1 else 8)
            elif tag in (2, 3, 5):
                found += varints(value)
            elif tag == 4:
                found.append(text(value))
            elif tag == 7:
                return unpack(np.frombuffer(view(value), np.uint8), kind)
        if tag == 4:
            return str(found[0]) if found else ""
        return _shaped(np.array(found).astype(kind.numpy), kind)
    return _shaped(np.zeros(0, kind.numpy), kind)


def unpack(data: NDArray[np.uint8], kind: TensorType) -> Array:
    """Values of a type from their bytes; those under a byte lie bit by bit, the lowest bit first."""
    bits = SUB_BYTE_BITS.get(kind.dtype)
    if bits is None:
        if len(data) % kind.numpy.itemsize:
            raise WireError(f"{len(data)} bytes hold no whole number of {kind.dtype}")
        return _shaped(data.view(kind.numpy), kind)
    count = _count(kind)
    if len(data) * 8 < count * bits:
        raise WireError(f"{len(data)} bytes are too few for {kind}")
    if bits == 4:
        pairs = np.stack([data & 15, data >> 4], axis=-1)
        values = pairs.reshape(-1)[:count]
    else:
        single = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
        values = single @ (1 << np.arange(bits)).astype(np.uint8)
    if kind.dtype == "int4":
        values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return _shaped(values, kind)


def _count(kind: TensorType) -> int:
    sizes = [size for size in kind.shape if size is not None]
    if len(sizes) != len(kind.shape):
        raise WireError(f"a constant has the type {kind}")
    return int(np.prod(sizes, dtype=np.int64))


def _shaped(values: Array, kind: TensorType) -> Array:
    """A single value may stand for a shape of one element."""
    count = _count(kind)
    if values.size != count:
        raise WireError(f"{values.size} values were given for {kind}")
    return values.reshape([size for size in kind.shape if size is not None])

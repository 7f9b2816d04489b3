"""Writes small Core ML packages by hand: the wire format, the program's messages, the weight file.

So the reader is tested where coremltools is not installed, and on what coremltools would never write.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.mil_program import DTYPES, SUB_BYTE_BITS
from runtime.mil_weights import STORED

Array = NDArray[Any]
CODES = {name: code for code, name in DTYPES.items()}
STORED_CODES = {name: code for code, name in STORED.items()}
Type = tuple[str, tuple[int | None, ...]]
"""(dtype, shape)"""
WEIGHT_FILE = "@model_path/weights/weight.bin"


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    found = b""
    for number, value in fields:
        if isinstance(value, int):
            found += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            found += varint(number << 3 | 2) + varint(len(data)) + data
    return found


def entry(number: int, key: str, value: bytes) -> tuple[int, bytes]:
    return number, message((1, key), (2, value))


def value_type(kind: Type, *, state: bool = False) -> bytes:
    dtype, shape = kind
    dimensions = [(3, message((2, message()) if size is None else (1, message((1, size))))) for size in shape]
    tensor = message((1, message((1, CODES[dtype]), (2, len(shape)), *dimensions)))
    return message((5, message((1, tensor)))) if state else tensor


def named(name: str, kind: Type, *, state: bool = False) -> bytes:
    return message((1, name), (2, value_type(kind, state=state)))


def packed(values: Array, dtype: str) -> bytes:
    """Bytes of values, those under a byte bit by bit, the lowest bit first."""
    bits = SUB_BYTE_BITS.get(dtype)
    if bits is None:
        return values.astype(np.dtype(dtype)).tobytes()
    flat = values.reshape(-1).astype(np.int64) & (1 << bits) - 1
    each = (flat[:, None] >> np.arange(bits)) & 1
    return np.packbits(each.reshape(-1).astype(np.uint8), bitorder="little").tobytes()


def immediate(values: Array | str, dtype: str) -> bytes:
    """A value that stands in the program itself."""
    if isinstance(values, str):
        tensor, shape = message((4, message((1, values)))), ()
    else:
        shape = values.shape
        if dtype == "float32":
            inner = (1, message((1, values.astype("<f4").tobytes())))
        elif dtype in ("int32", "int64", "bool"):
            kinds = {"int32": 2, "int64": 5, "bool": 3}
            inner = (kinds[dtype], message((1, b"".join(varint(int(v)) for v in values.reshape(-1)))))
        else:
            inner = (7, message((1, packed(values, dtype))))
        tensor = message(inner)
    return message((2, value_type((dtype, shape))), (3, message((1, tensor))))


@dataclass
class Weights:
    """The weight file, record after record, each at a multiple of 64 bytes."""

    data: bytearray = field(default_factory=lambda: bytearray(struct.pack("<II56x", 0, 2)))

    def add(self, values: Array, dtype: str, *, stored: str | None = None) -> bytes:
        """Append values; the message of a value that points there."""
        offset, raw = len(self.data), packed(values, dtype)
        code = STORED_CODES[stored or dtype]
        self.data += struct.pack("<IIQQQ32x", 0xDEADBEEF, code, len(raw), offset + 64, 0) + raw
        self.data += bytes(-len(self.data) % 64)
        blob = message((1, WEIGHT_FILE), (2, offset))
        return message((2, value_type((dtype, values.shape))), (5, blob))


def operation(
    kind: str,
    inputs: Mapping[str, str | bytes | Sequence[str]],
    outputs: Mapping[str, Type],
    attributes: Mapping[str, bytes] | None = None,
) -> bytes:
    """`inputs`: a name, several names, or the message of a value."""
    fields: list[tuple[int, int | str | bytes]] = [(1, kind)]
    for key, given in inputs.items():
        if isinstance(given, bytes):
            bindings = [message((2, given))]
        else:
            bindings = [message((1, name)) for name in ([given] if isinstance(given, str) else given)]
        fields.append(entry(2, key, message(*((1, binding) for binding in bindings))))
    fields += [(3, named(name, type_)) for name, type_ in outputs.items()]
    fields += [entry(5, key, value) for key, value in (attributes or {}).items()]
    return message(*fields)


def const(name: str, value: bytes, kind: Type) -> bytes:
    return operation("const", {}, {name: kind}, {"val": value})


def number(name: str, values: Any, dtype: str = "int32") -> bytes:
    """A constant inside of the program."""
    array = np.asarray(values)
    return const(name, immediate(array, dtype), (dtype, array.shape))


def function(
    inputs: Mapping[str, Type],
    operations: Sequence[bytes],
    outputs: Sequence[str],
    *,
    states: Mapping[str, Type] | None = None,
) -> bytes:
    block = message(*((2, name) for name in outputs), *((3, each) for each in operations))
    return message(
        *((1, named(name, kind)) for name, kind in inputs.items()),
        *((1, named(name, kind, state=True)) for name, kind in (states or {}).items()),
        (2, "CoreML8"),
        entry(3, "CoreML8", block),
    )


def model(functions: Mapping[str, bytes], default: str | None = None) -> bytes:
    program = message((1, 1), *(entry(2, name, body) for name, body in functions.items()))
    description = message((21, default)) if default else b""
    return message((1, 9), (2, description), (502, program))


def package(path: Path, data: bytes, weights: Weights | None = None) -> Path:
    """A directory as Core ML has it."""
    folder = path / "Data" / "com.apple.CoreML"
    (folder / "weights").mkdir(parents=True)
    (folder / "model.mlmodel").write_bytes(data)
    if weights is not None:
        (folder / "weights" / "weight.bin").write_bytes(bytes(weights.data))
    entries = {"A": {"path": "com.apple.CoreML/model.mlmodel"}, "B": {"path": "com.apple.CoreML/weights"}}
    (path / "Manifest.json").write_text(json.dumps({"itemInfoEntries": entries, "rootModelIdentifier": "A"}))
    return path

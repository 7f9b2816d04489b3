"""Constants of an ML program: the weight file, and a store of the ones that were expanded.

In: a directory, `Blob`s. Out: arrays; mapped from disk where the file holds them as they are.
Not here: dequantizing (`runtime/mil_ops_constexpr.py`).

File: a header of 64 bytes (number of records, version 2), then records of 64 bytes (marker 0xDEADBEEF, type,
bytes, place of the data) each followed by its data; all little-endian. From MILBlob's `StorageFormat.hpp`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable
from pathlib import Path, PurePosixPath

import numpy as np

from runtime.mil_program import Array, Blob, unpack
from runtime.mil_wire import WireError

_MARKER = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQ")
STORED = {
    1: "float16",
    2: "float32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}
"""Types by their number in the weight file."""
_ALIKE = {"bool": "uint8"}  # how the file calls what the program calls otherwise

EXPANDED_BYTES = 2 << 30


class Store:
    """Arrays made from constants, kept until they are too many bytes; further ones are made each time."""

    def __init__(self, most_bytes: int = EXPANDED_BYTES) -> None:
        self._kept: dict[Hashable, Array] = {}
        self._left = most_bytes

    @property
    def kept_bytes(self) -> int:
        return sum(array.nbytes for array in self._kept.values())

    def get(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """The array of a key; `make` gives it when it is not kept."""
        found = self._kept.get(key)
        if found is None:
            found = make()
            if found.nbytes <= self._left:
                self._left -= found.nbytes
                self._kept[key] = found
        return found


class WeightFiles:
    """The weight files of one package, mapped when they are first read."""

    def __init__(self, model: Path) -> None:
        self._directory = model.parent
        self._open: dict[str, Array] = {}

    def read(self, blob: Blob) -> Array:
        """The values of a constant. Raises WireError when the file is not as the program says."""
        data = self._map(blob.file)
        if blob.offset + _RECORD.size > len(data):
            raise WireError(f"{blob.file}: has {len(data)} bytes, a record is at {blob.offset}")
        marker, code, size, start = _RECORD.unpack(data[blob.offset : blob.offset + _RECORD.size].tobytes())
        if marker != _MARKER:
            raise WireError(f"{blob.file}: no record at {blob.offset}")
        wanted = _ALIKE.get(blob.type.dtype, blob.type.dtype)
        if STORED.get(code) != wanted:
            raise WireError(
                f"{blob.file}: holds {STORED.get(code, f'type {code}')} at {blob.offset}, not {wanted}"
            )
        if start + size > len(data):
            raise WireError(f"{blob.file}: ends inside of the record at {blob.offset}")
        return unpack(data[start : start + size], blob.type)

    def key(self, blob: Blob) -> Hashable:
        """Equal for constants that are the same bytes of one package, whatever function they stand in."""
        return (str(self._directory), blob.file, blob.offset, blob.type.dtype, blob.type.shape)

    def _map(self, file: str) -> Array:
        if file not in self._open:
            # "@model_path/weights/weight.bin": beside the model
            pure = PurePosixPath(file.removeprefix("@model_path/"))
            if pure.is_absolute() or ".." in pure.parts:
                raise WireError(f"{file}: leads out of the package")
            path = self._directory / pure
            try:
                self._open[file] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            except (OSError, ValueError) as error:
                raise WireError(f"{file}: cannot be read ({error})") from error
        return self._open[file]
